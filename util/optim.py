"""Optimisation: learning rate as a function of progress, parameter groups, and the update step."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

POSITION_PARAMETERS = (
    "cls_token",
    "pos_embed",
    "pos_embed_spatial",
    "pos_embed_temporal",
    "pos_embed_class",
)


def learning_rate(
    progress: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> float:
    """Linear warm-up from 0, then half a cosine down to min_lr. `progress` in epochs, fractional (arXiv 1608.03983)."""
    if progress < warmup_epochs:
        return lr * progress / warmup_epochs
    fraction = min((progress - warmup_epochs) / max(epochs - warmup_epochs, 1e-12), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))


class Plan(NamedTuple):
    """What the flags come to for this data and this number of processes."""

    lr: float  # peak learning rate
    steps_per_epoch: int  # optimizer updates
    total_steps: int
    amp: torch.dtype  # float32: no autocast
    bad_limit: float  # unreadable videos above which the run stops
    flops: float  # of a training step, per clip

    def end_of_epoch(self, epoch: int) -> int:
        """The updates done in the run when this epoch ends."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def learning_rate(self, step: int, args) -> float:
        """The learning rate of update `step` (0 for the first)."""
        epochs = self.total_steps / self.steps_per_epoch
        return learning_rate(
            step / self.steps_per_epoch,
            lr=self.lr,
            min_lr=args.min_lr,
            warmup_epochs=args.warmup_epochs,
            epochs=epochs,
        )


def amp_dtype(choice: str, device: torch.device) -> torch.dtype:
    """--amp: the autocast type; auto is bf16 where the GPU has it, else fp16, and fp32 on a CPU."""
    if choice == "auto":
        choice = (
            "fp32"
            if device.type == "cpu"
            else "bf16"
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else "fp16"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def layer_scale(name: str, depth: int, layer_decay: float) -> float:
    """Factor of a classifier parameter's learning rate: layer_decay^(depth + 1 - layer).

    Layer 0 is what makes the tokens (embedding, class token, positions), block i is layer i + 1, the rest depth + 1.
    """
    if name in POSITION_PARAMETERS or name.startswith("patch_embed."):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = depth + 1
    return layer_decay ** (depth + 1 - layer)


def pretrain_groups(model: nn.Module, weight_decay: float, bias_wd: bool = False) -> list[dict]:
    """Two groups, the one without decay first: 1-d parameters and biases do not decay, all else does.

    bias_wd lets 1-d parameters that are no biases (LayerNorm weights) decay too, as the ancestor's flag of that name did.
    """

    def decays(name: str, parameter: Tensor) -> bool:
        return not name.endswith(".bias") and (parameter.ndim > 1 or bias_wd)

    named = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    plain = [parameter for name, parameter in named if not decays(name, parameter)]
    decayed = [parameter for name, parameter in named if decays(name, parameter)]
    return [
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
    ]


def finetune_groups(
    model: nn.Module, depth: int, weight_decay: float, layer_decay: float
) -> list[dict]:
    """One group per layer and decay; 1-d parameters, class token and positions do not decay. See `layer_scale`."""
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim == 1 or name in POSITION_PARAMETERS else weight_decay
            scale = layer_scale(name, depth, layer_decay)
            groups.setdefault(
                (scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale}
            )["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict], parameters, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW over groups that hold every trainable parameter exactly once (asserted)."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(
        id(parameter) for parameter in parameters if parameter.requires_grad
    )
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its learning rate, lr * lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def backward(loss: Tensor, scaler: torch.amp.GradScaler, accum_iter: int) -> None:
    """Gradients of loss / accum_iter, added up. A loss that is not finite makes them all NaN, and so, summed by DDP, those of all ranks:
    the update is skipped everywhere or nowhere, even where such a loss has finite gradients. Nothing here waits for the GPU."""
    honest = torch.ones_like(loss).where(loss.isfinite(), loss.new_full((), torch.nan))
    (scaler.scale(loss / accum_iter) * honest).backward()


def update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> tuple[Tensor, Tensor]:
    """Clip the gradients by their total norm, step, and clear them. Nothing here waits for the GPU.

    A gradient that is not finite, on any rank (DDP has summed it into all of them), makes the fused kernel leave weights
    and moments alone. Returns the norm before clipping, and whether the step was skipped (0. or 1.), both on the device.
    """
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    scaler.unscale_(optimizer) if scaler.is_enabled() else None
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm, foreach=True)
    skipped = (~torch.isfinite(norm)).float()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = skipped  # read by the fused kernel, as a GradScaler would set it
        optimizer.step()
        optimizer.found_inf = None
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
