"""Metric sums over updates and ranks, throughput, and the time spent waiting for data."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from util.dist import all_reduce_sum, peak_flops, world_size

COUNTS = {  # key in a checkpoint: attribute of Sums
    "updates": "updates",
    "skipped": "skipped",
    "shares": "rank_updates",
    "replaced": "replaced_frames",
}


class DataWaitTimer:
    """Measures how long the device is idle between micro-steps, waiting for the next batch.

    On CUDA a wait is the gap on the stream between the last kernel of one micro-step and the first
    of the next, measured with events that are read only when logging. On a CPU it is the time that
    the loop spends in the loader.
    """

    def __init__(self, device: torch.device):
        """Start the clock; `device` decides how waits are measured."""
        self.on_cuda = device.type == "cuda"
        self.gaps: list[list] = []  # [time or event at its start, and at its end or None]
        self.last_read = time.perf_counter()
        self.seconds_before_pause = 0.0

    def _now(self):
        """Return the time in seconds, or a recorded event on CUDA."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin_wait(self) -> None:
        """Mark the start of a wait: the micro-step's work is queued."""
        self.gaps.append([self._now(), None])

    def end_wait(self) -> None:
        """Mark the end of a wait: the next batch is here."""
        self.gaps[-1][1] = self._now()

    def pause(self) -> None:
        """Pause at the end of an epoch, for example for a validation."""
        self.seconds_before_pause += time.perf_counter() - self.last_read
        self._drop_open_gap()

    def resume(self) -> None:
        """Start or continue, at the start of a wait."""
        self.last_read = time.perf_counter()
        self.begin_wait()

    def _drop_open_gap(self) -> None:
        self.gaps = [gap for gap in self.gaps if gap[1] is not None]

    def read(self) -> tuple[float, float]:
        """Return the seconds since the last call, and the share of them spent waiting.

        On CUDA, call it only after a synchronization.
        """
        closed = [gap for gap in self.gaps if gap[1] is not None]
        self.gaps = [gap for gap in self.gaps if gap[1] is None]
        if self.on_cuda:
            waited = sum(begin.elapsed_time(end) / 1000 for begin, end in closed)
        else:
            waited = sum(end - begin for begin, end in closed)
        now = time.perf_counter()
        seconds = self.seconds_before_pause + now - self.last_read
        self.last_read = now
        self.seconds_before_pause = 0.0
        return seconds, min(waited / max(seconds, 1e-9), 1.0)


@dataclass
class Sums:
    """Sums over all ranks and a number of updates. Floats, as in checkpoints."""

    totals: dict[str, float]  # of each metric, over the updates that were not skipped
    updates: float = 0.0
    skipped: float = 0.0  # updates that were skipped, since loss or gradient was not finite
    rank_updates: float = 0.0  # the other updates, times the number of ranks
    replaced_frames: float = 0.0  # frames that could not be decoded

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over ranks and updates, skipped ones excluded."""
        count = max(self.rank_updates, 1)
        return {name: total / count for name, total in self.totals.items()}

    def state_dict(self) -> dict[str, float]:
        """Return the sums under the names that a checkpoint has for them."""
        return self.totals | {key: getattr(self, name) for key, name in COUNTS.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the sums from `state_dict`."""
        self.totals = {name: state[name] for name in self.totals}
        for key, name in COUNTS.items():
            setattr(self, name, state.get(key, 0.0))


class MetricSums:
    """Sums of metrics over the updates of an epoch, and over those since the last log line.

    They grow on the device; only `all_reduce` waits for it. Sums are float64 and divided once, so
    the result does not depend on where a run was interrupted.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device, max_bad_steps: int):
        """Set all sums to zero.

        names: of the metrics. max_bad_steps: number of skipped updates in a row that end the run.
        """
        self.names = names
        self.max_bad_steps = max_bad_steps
        self.bad_streak = 0  # skipped updates in a row
        self.failed_step: int | None = None  # update at which the streak reached max_bad_steps
        self.on_device = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        self.pending: list[tuple[Tensor, list[str]]] = []  # skipped (0. or 1.), this rank's files
        self.reset()

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self.on_device.device

    def reset(self) -> None:
        """Begin an epoch."""
        self.epoch = Sums(dict.fromkeys(self.names, 0.0))
        self.line = Sums(dict.fromkeys(self.names, 0.0))

    @property
    def updates(self) -> int:
        """Number of updates in this epoch so far."""
        return int(self.epoch.updates) + len(self.pending)

    def add(self, values: Tensor, skipped: Tensor, replaced: Tensor, paths: list[str]) -> None:
        """Add an update, without waiting for the device.

        values (len(names),); skipped: 1.0 if the update was skipped, else 0.0; replaced: number of
        frames that could not be decoded; paths: the files that this rank fed it.
        """
        zero = values.new_zeros((), dtype=torch.float64)
        used = values.double().where(skipped == 0, zero)
        self.on_device += torch.cat([used, replaced.double()[None]])
        self.pending.append((skipped, paths))

    def all_reduce(self, step: int) -> dict[int, list[str]]:
        """Sum the updates since the last call over all ranks. Call on every rank.

        step: number of updates done. Returns the skipped updates with this rank's files.
        """
        if not self.pending:
            return {}
        flags = torch.stack([skipped for skipped, _ in self.pending]).double()
        reduced = all_reduce_sum(torch.cat([self.on_device, flags])).tolist()
        count = len(self.names)
        values = dict(zip(self.names, reduced[:count], strict=True))
        replaced = reduced[count]
        skipped = [flag > 0 for flag in reduced[count + 1 :]]  # flags of all ranks, added
        paths = [paths for _, paths in self.pending]
        self.pending = []
        self.on_device.zero_()
        for sums in (self.epoch, self.line):
            for name, value in values.items():
                sums.totals[name] += value
            sums.updates += len(skipped)
            sums.skipped += sum(skipped)
            sums.rank_updates += (len(skipped) - sum(skipped)) * world_size()
            sums.replaced_frames += replaced
        first_step = step - len(skipped) + 1
        self._count_streak(first_step, skipped)
        return {first_step + i: paths[i] for i, bad in enumerate(skipped) if bad}

    def _count_streak(self, first_step: int, skipped: list[bool]) -> None:
        """Count skipped updates in a row, and note where there were too many."""
        for step, bad in enumerate(skipped, first_step):
            self.bad_streak = self.bad_streak + 1 if bad else 0
            if self.bad_streak >= self.max_bad_steps and self.failed_step is None:
                self.failed_step = step

    def pop_line(self) -> Sums:
        """Return the sums since the last log line, and start the next ones."""
        line = self.line
        self.line = Sums(dict.fromkeys(self.names, 0.0))
        return line

    def state_dict(self) -> dict:
        """Return the sums for a checkpoint; call `all_reduce` first."""
        sums = {"epoch": self.epoch.state_dict(), "line": self.line.state_dict()}
        return {"sums": sums, "streak": self.bad_streak}

    def load_state_dict(self, state: dict | None) -> None:
        """Restore the sums from `state_dict`; None: from a checkpoint without them."""
        if state:
            self.epoch.load_state_dict(state["sums"]["epoch"])
            self.line.load_state_dict(state["sums"]["line"])
            self.bad_streak = state["streak"]


def memory_gib(device: torch.device) -> float:
    """Return this process's peak memory in GiB: the GPU's, or resident host memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: macOS, Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**30


def throughput(
    clips: int, seconds: float, flops_per_clip: float, device: torch.device
) -> dict[str, float]:
    """Return the clips per second of all ranks, and TFLOP/s and memory of this device.

    clips: number processed by all ranks in `seconds`. The keys are TensorBoard's names:
    clips_per_second, tflops, memory_gib, and mfu where the device's peak is known.
    """
    clips_per_second = clips / max(seconds, 1e-9)
    flops = clips_per_second / world_size() * flops_per_clip
    rates = {
        "clips_per_second": clips_per_second,
        "tflops": flops / 1e12,
        "memory_gib": memory_gib(device),
    }
    peak = peak_flops(device)
    if peak:
        rates["mfu"] = flops / peak
    return rates
