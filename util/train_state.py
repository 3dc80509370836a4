"""The state of a training run, and what its checkpoints contain."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from util.checkpoint_schema import MOMENTS
from util.ema import WeightAverage
from util.metrics import DataWaitTimer, MetricSums
from util.optim import Schedule, set_learning_rate


def dataset_fingerprint(
    paths: list[str],
    labels: list[int] | None = None,
    spans: np.ndarray | None = None,
    weighting: str = "",
) -> dict:
    """Return the number of samples and a hash of their paths, labels and spans, in order.

    weighting: the flags by which some samples are drawn more often than others, "" for none.
    """
    text = "\n".join(paths) + "\n" + ",".join(map(str, labels or []))
    if spans is not None:
        text += "\n" + repr(spans.tolist())
    encoded = text.encode("utf-8", "surrogateescape")
    fingerprint = {"samples": len(paths), "sha256": hashlib.sha256(encoded).hexdigest()}
    if weighting:
        fingerprint["weighting"] = weighting
    return fingerprint


@dataclass(kw_only=True)
class TrainState:
    """A training run: its parts, its settings, and how far along it is.

    Checkpoints include the metrics of the current epoch: a resumed epoch logs the same values.
    """

    model: nn.Module  # unwrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    metrics: MetricSums
    accum_iter: int  # micro-steps per update
    clip_grad: float | None  # maximum gradient norm; None: no clipping
    global_batch: int  # videos or images per update, over all ranks
    flops_per_clip: float  # FLOPs per clip of a training step
    config: dict  # what is needed to use the model: see util/checkpoint.py
    flags: dict  # the command line, as recorded in checkpoints
    data: dict  # `dataset_fingerprint` of the training set
    best_acc1: float | None = None  # None in pretraining
    ema: WeightAverage | None = None  # None without --ema

    step: int = 0  # number of updates done
    samples_consumed: int = 0  # videos or images
    start_step: int = 0  # `step` when this process began
    last_logged_step: int = 0  # `step` at the last progress line

    def __post_init__(self):
        self.wait_timer = DataWaitTimer(self.metrics.device)

    def position(self) -> tuple[int, int]:
        """Return the current epoch and the number of updates done in it.

        A finished epoch stays current until `Checkpointer.end_epoch` logs it.
        """
        epoch_is_open = self.metrics.updates > 0
        steps_per_epoch = self.schedule.steps_per_epoch
        epoch = (self.step - int(epoch_is_open)) // steps_per_epoch
        return epoch, self.step - epoch * steps_per_epoch

    def unfinished(self) -> bool:
        """Return whether an update, or the end of an epoch, is left to do."""
        return self.step < self.schedule.total_steps or self.metrics.updates > 0

    def is_last_step(self) -> bool:
        """Return whether all updates of the run are done."""
        return self.step >= self.schedule.total_steps

    def end_of_epoch(self) -> int:
        """Return the step at which the current epoch ends."""
        epoch, _ = self.position()
        return self.schedule.end_of_epoch(epoch)

    def last_learning_rate(self) -> float:
        """Return the learning rate of the last update."""
        return self.schedule.learning_rate(self.step - 1)

    def position_facts(self) -> dict[str, object]:
        """Return what must be equal on all processes: data, position, a sample of the weights."""
        tensors = self.model.state_dict().values()
        values = torch.cat([value.flatten()[:4].float() for value in tensors])
        weights = hashlib.sha256(repr(values.tolist()).encode())
        return {
            "the training set": self.data,
            "the update to start from": self.step,
            "the samples consumed": self.samples_consumed,
            "the model's weights": weights.hexdigest()[:12],
        }

    def state_dict(self, epoch: int) -> dict:
        """Return the contents of a checkpoint. Call `reduce_metrics` first.

        epoch: the one to record.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": self.step,
            "samples_consumed": self.samples_consumed,
            "config": self.config,
            "args": dict(sorted(self.flags.items())),
            "tally": self.metrics.state_dict(),  # the key of earlier versions
            "global_batch": self.global_batch,
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "data": self.data,
        }
        if self.best_acc1 is not None:
            state["best_acc1"] = self.best_acc1
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def restore_progress(self, state: dict) -> None:
        """Restore optimizer and counts; the model's weights are loaded separately.

        state: the contents of a checkpoint. Raises KeyError, TypeError or ValueError.
        """
        self._require_fitting_moments(state["optimizer"])
        self._load_optimizer(state)
        self._load_position(state)
        if self.step > 0:  # an optimizer keeps the rate of its last update
            set_learning_rate(self.optimizer, self.last_learning_rate())
        self.start_step = self.step
        self.last_logged_step = self.step

    def _require_fitting_moments(self, saved: dict) -> None:
        """Raise ValueError if a saved moment has not the shape of its parameter.

        torch does not compare them, and the fused kernel reads beyond the end of a smaller one.
        """
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        for index, entry in saved["state"].items():
            for name in MOMENTS:
                shape = tuple(entry[name].shape)
                expected = tuple(parameters[index].shape)
                if shape != expected:
                    raise ValueError(
                        f"{name} of parameter {index} has shape {shape}, not {expected}"
                    )

    def _load_optimizer(self, state: dict) -> None:
        """Restore moments and loss scale; weight decay and betas still come from the flags."""
        settings = []
        for group in self.optimizer.param_groups:
            settings.append({key: value for key, value in group.items() if key != "params"})
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _load_position(self, state: dict) -> None:
        """Restore the counts.

        With another batch or training set (--force_resume) the run continues in the same epoch
        after the same number of samples, with fresh metrics.
        """
        steps_per_epoch = self.schedule.steps_per_epoch
        saved_global_batch = state.get("global_batch", self.global_batch)
        saved_steps_per_epoch = state.get("steps_per_epoch", steps_per_epoch)
        self.samples_consumed = state["samples_consumed"]
        self.best_acc1 = state.get("best_acc1", self.best_acc1)
        saved = (saved_global_batch, saved_steps_per_epoch)
        if saved == (self.global_batch, steps_per_epoch):
            self.step = state["step"]
            self.metrics.load_state_dict(state.get("tally"))
            return
        epoch, updates_done = divmod(state["step"], saved_steps_per_epoch)
        samples_done = updates_done * saved_global_batch
        updates_done = min(samples_done // self.global_batch, steps_per_epoch - 1)
        self.step = epoch * steps_per_epoch + updates_done
