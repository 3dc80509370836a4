"""Optimization: the learning rate schedule, parameter groups, and the update step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

AMP_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKEN_PARAMETERS = (
    "cls_token",
    "pos_embed",
    "pos_embed_spatial",
    "pos_embed_temporal",
    "pos_embed_class",
)


def warmup_cosine(
    progress: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> float:
    """Return the learning rate at `progress`, in epochs, which may be fractional.

    Linear warm-up from 0 to lr, then half a cosine down to min_lr (arXiv 1608.03983).
    """
    if progress < warmup_epochs:
        return lr * progress / warmup_epochs
    fraction = min((progress - warmup_epochs) / max(epochs - warmup_epochs, 1e-12), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))


class Schedule(NamedTuple):
    """Length and learning rate of a run, for its data set and number of processes."""

    lr: float  # peak learning rate
    min_lr: float
    warmup_epochs: float
    steps_per_epoch: int  # optimizer updates
    total_steps: int

    def end_of_epoch(self, epoch: int) -> int:
        """Return the number of updates done in the run when this epoch ends."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update `step` (0 is the first)."""
        return warmup_cosine(
            step / self.steps_per_epoch,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_epochs=self.warmup_epochs,
            epochs=self.total_steps / self.steps_per_epoch,
        )


def amp_dtype(choice: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype of --amp.

    "auto" is fp32 on a CPU, bf16 on a GPU that has it, and fp16 on any other GPU.
    """
    if choice != "auto":
        return AMP_DTYPES[choice]
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def residual_dtype(bf16_residual: bool, amp: torch.dtype) -> torch.dtype | None:
    """Return the dtype of the residual stream for --bf16_residual, None: that of the parameters.

    Raises ValueError without bf16 autocast.
    """
    if not bf16_residual:
        return None
    if amp != torch.bfloat16:
        raise ValueError(f"--bf16_residual needs bfloat16, not {amp}. Add --amp bf16.")
    return amp


def autocast(device: torch.device, amp: torch.dtype) -> torch.autocast:
    """Return the autocast context of a device for `amp`; float32 means no autocast."""
    return torch.autocast(device.type, amp, enabled=amp != torch.float32)


def layer_lr_scale(name: str, depth: int, layer_decay: float) -> float:
    """Return a classifier parameter's learning rate factor, layer_decay^(depth + 1 - layer).

    Layer 0 is the tubelet embedding, class token and positions, block i is layer i + 1, and the
    final norm and the head are layer depth + 1 (arXiv 2106.08254, "layer-wise decay").
    """
    if name in TOKEN_PARAMETERS or name.startswith("patch_embed."):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = depth + 1
    return layer_decay ** (depth + 1 - layer)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    decays: Callable[[str, Tensor], bool],
    lr_scale: Callable[[str], float],
) -> list[dict]:
    """Return the trainable parameters in one group per learning rate factor and decay.

    decays: whether the parameter of this name decays; lr_scale: its learning rate factor. Groups
    and the parameters in them are in model order.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (lr_scale(name), decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for (scale, decayed), params in groups.items()
    ]


def pretrain_param_groups(
    model: nn.Module, weight_decay: float, bias_wd: bool = False
) -> list[dict]:
    """Return two groups, first the parameters without decay: biases and other 1-d parameters.

    With bias_wd the 1-d parameters other than biases (LayerNorm weights) decay too. The flag of
    that name does the same in the ancestor.
    """

    def decays(name: str, parameter: Tensor) -> bool:
        return not name.endswith(".bias") and (parameter.ndim > 1 or bias_wd)

    groups = param_groups(model, weight_decay, decays, lr_scale=lambda _name: 1.0)
    # The first parameter of a model is an embedding, which decays. Saved optimizer states have the
    # group without decay first.
    return groups[::-1]


def finetune_param_groups(
    model: nn.Module, depth: int, weight_decay: float, layer_decay: float
) -> list[dict]:
    """Return one group per layer and decay, see `layer_lr_scale`.

    1-d parameters, the class token and the positions do not decay.
    """

    def decays(name: str, parameter: Tensor) -> bool:
        return weight_decay > 0 and parameter.ndim > 1 and name not in TOKEN_PARAMETERS

    def lr_scale(name: str) -> float:
        return layer_lr_scale(name, depth, layer_decay)

    return param_groups(model, weight_decay, decays, lr_scale)


def make_optimizer(groups: list[dict], parameters, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return fused AdamW over groups that hold each trainable parameter exactly once (asserted)."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in parameters if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to lr * lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def backward(loss: Tensor, scaler: torch.amp.GradScaler, accum_iter: int) -> None:
    """Add the gradients of loss / accum_iter to those of the parameters.

    A non-finite loss turns all gradients to NaN, even where its own gradients are finite. DDP
    spreads the NaNs to every rank, so either all ranks skip the update or none does.
    """
    nan_if_bad = torch.where(loss.isfinite(), 1.0, torch.nan)  # on the device: no GPU sync
    (scaler.scale(loss / accum_iter) * nan_if_bad).backward()


def update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> tuple[Tensor, Tensor]:
    """Clip the gradients by their total norm, take an optimizer step, and clear the gradients.

    A non-finite gradient makes the fused kernel skip the update: weights and moments stay as they
    are. Returns the norm before clipping, and whether the step was skipped (0. or 1.). Both stay on
    the device: no GPU sync.
    """
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True)
    skipped = (~torch.isfinite(norm)).float()
    if scaler.is_enabled():
        if clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm, foreach=True)
        scaler.step(optimizer)
        scaler.update()
    else:
        grad_scale = None
        if clip_grad is not None:
            grad_scale = ((norm + 1e-6) / clip_grad).clamp(min=1)
        # The fused kernel reads these attributes, which a GradScaler would set. It divides the
        # gradients by grad_scale while it reads them.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.found_inf = None  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
