"""Exponential moving average (EMA) of a model's weights, and checkpoints that contain one.

A checkpoint of a run with --ema has the average under the key `ema`, beside `model`. A file in
which the average is `model` has the entry "averaged": True.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from util.checkpoint import load_weights
from util.dist import UserError, print0


class WeightAverage:
    """The EMA of a model's trained weights, in float32 on their device.

    torch's AveragedModel does the same, but reads its counter on the host in each update. Also, it
    cannot leave out an update that was skipped on the device.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Start from the model's weights. model: unwrapped."""
        self.model = model
        self.decay = decay
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.weights = [parameter.detach() for _, parameter in trained]
        self.averages = [weight.to(torch.float32, copy=True) for weight in self.weights]

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the model's weights."""
        torch._foreach_copy_(self.averages, self.weights)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Set average = decay * average + (1 - decay) * weights, without waiting for the device.

        skipped: 1.0 if the optimizer skipped its update, which then leaves the average as it is,
        else 0.0.
        """
        share = (1 - self.decay) * (1 - skipped)
        torch._foreach_lerp_(self.averages, self.weights, [share] * len(self.averages))

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model for the block, and the weights back after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange average and weights in place: compiled code keeps their addresses."""
        for weight, average in zip(self.weights, self.averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with the average of the weights that are trained."""
        return self.model.state_dict() | dict(zip(self.names, self.averages, strict=True))

    def resume(self, path: Path, saved: dict, step: int) -> None:
        """Restore the average from a checkpoint of the run, or start it from the weights.

        saved: the checkpoint that was read from `path` and is in the model; step: its number of
        updates. Raises UserError if the average does not fit.
        """
        if not has_ema(saved):
            self.restart()
            print0(f"{path} has no EMA: it starts from the weights at update {step}")
            return
        with self.in_model():
            load_weights(path, self.model, saved["ema"])


def weight_average(model: nn.Module, decay: float) -> WeightAverage | None:
    """Return the EMA of --ema, None if it is off (0)."""
    return WeightAverage(model, decay) if decay > 0 else None


def has_ema(saved: dict) -> bool:
    """Return whether a checkpoint has an EMA beside its weights."""
    return isinstance(saved.get("ema"), dict)


def require_trained_weights(path: Path, saved: dict) -> None:
    """Raise UserError for a checkpoint whose weights are an average: no optimizer trained them."""
    if saved.get("averaged"):
        raise UserError(
            f"{path} has the EMA of a run's weights, from which training cannot be resumed. "
            "Resume from the run's newest checkpoint, or start a new run from this file."
        )


def averaged_checkpoint(path: str | Path, saved: dict) -> dict:
    """Return a checkpoint that was read from `path` with its EMA as `model`.

    Raises UserError if it has none.
    """
    if saved.get("averaged"):
        raise UserError(f"{path} has the EMA as its weights already. Use it as it is.")
    if not has_ema(saved):
        raise UserError(f"{path} has no EMA of the weights. Pass a checkpoint of a run with --ema.")
    others = {key: value for key, value in saved.items() if key != "ema"}
    return others | {"model": saved["ema"], "averaged": True}
