"""What a run says about itself: progress lines, one JSON line per epoch, TensorBoard, pictures, unreadable videos."""

import csv
import json
import resource
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from util.dist import UserError, gather_objects, peak_flops, print0, rank, world_size
from util.optim import Plan


class StallClock:
    """How long the device stood idle between micro-steps, waiting for the next batch; never waits for the device itself.

    On CUDA: the gap on the stream between the last kernel of one step and the first of the next, by events that are read
    at the logging steps. On a CPU: the time that the loop spent in the loader.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks = [[self._mark(), None]]  # [work handed over, next batch here]
        self.since = time.perf_counter()

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        """The step's work is under way; what follows is waiting for data."""
        self.marks.append([self._mark(), None])

    def start(self) -> None:
        """The next batch is here."""
        self.marks[-1][1] = self._mark()

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the share of them spent waiting. On CUDA after a synchronisation only."""
        closed = [mark for mark in self.marks if mark[1] is not None]
        idle = sum(begin.elapsed_time(end) / 1000 if self.cuda else end - begin for begin, end in closed)
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        self.marks = [mark for mark in self.marks if mark[1] is None]
        return seconds, min(idle / max(seconds, 1e-9), 1.0)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: the GPU's where there is one, else resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Run:
    """The files of a run in `output_dir`, written by rank 0 only; every method may be called on every rank."""

    def __init__(self, args, suffix: str = ""):
        """suffix: follows --save_prefix in the names of all files."""
        self.folder, self.prefix = Path(args.output_dir), args.save_prefix + suffix
        self.checkpoint, self.best = self.folder / f"{self.prefix}.pth", self.folder / f"{self.prefix}_best.pth"
        self.first = None  # step and time of the first progress line, for the ETA
        self.unreadable: dict[str, str] = {}
        self.skipped_in_a_row = 0.0  # updates without a finite gradient, up to now
        self.board = None
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(f"{self.prefix}*.pth.tmp"):
                stale.unlink()
            (self.folder / f"{self.prefix}_args.json").write_text(json.dumps(vars(args), indent=2, sort_keys=True) + "\n")
            self.board = SummaryWriter(str(self.folder / "tb" / self.prefix))

    def progress(self, step: int, plan: Plan, values: dict[str, float], clips: int, clock: StallClock, device: torch.device) -> None:
        """One progress line and the same numbers in TensorBoard. A terminal's line is overwritten, a file's is not.

        clips: how many went through all processes since the last call.
        """
        seconds, waited = clock.read()
        if rank() != 0:
            return
        self.first = self.first or (step, time.time())
        done, elapsed = step - self.first[0], time.time() - self.first[1]
        left = timedelta(seconds=int(elapsed / done * (plan.total_steps - step))) if done else "?"
        values = {name: value for name, value in values.items() if name != "skipped" or value}
        speed, memory = clips / max(seconds, 1e-9), memory_gib(device)
        each, peak = speed / world_size(), peak_flops(device)
        rates = {"clips_per_second": speed, "tflops": each * plan.flops / 1e12, "data_wait": waited, "memory_gib": memory}
        rates |= {"mfu": each * plan.flops / peak} if peak else {}
        line = (
            f"epoch {step / plan.steps_per_epoch:.2f}  update {step}/{plan.total_steps}  "
            + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            + f"  {speed:.1f} clips/s ({each:.1f} per device, {rates['tflops']:.3g} TFLOP/s" + (f", mfu {rates['mfu']:.1%})" if peak else ")")
            + f"  data wait {waited:.0%}  mem {memory:.2f} GiB  eta {left}"
        )
        if sys.stdout.isatty():
            print0(f"\r\033[K{line}", end="\n" if step % plan.steps_per_epoch == 0 or step == plan.total_steps else "")
        else:
            print0(line)
        for name, value in (values | rates).items():
            self.board.add_scalar(f"train/{name}", value, step)

    def epoch(self, record: dict) -> None:
        """Append one JSON line to the log, and its numbers to TensorBoard."""
        if rank() != 0:
            return
        with open(self.folder / f"{self.prefix}_log.txt", "a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self.board.add_scalar(f"epoch/{name}", value, record["epoch"])
        self.board.flush()

    def picture(self, name: str, image: Tensor, epoch: int, numbered: bool = True) -> None:
        """Save a picture (3, H, W) uint8 as {prefix}_{name}[_{epoch}].png and show it in TensorBoard."""
        if rank() == 0:
            file = f"{self.prefix}_{name}_{epoch:05d}.png" if numbered else f"{self.prefix}_{name}.png"
            torchvision.io.write_png(image, str(self.folder / file))
            self.board.add_image(name, image, epoch)

    def table(self, name: str, columns: dict[str, list]) -> None:
        """Save a table as {prefix}_{name}.csv."""
        if rank() == 0:
            import pandas as pd  # here, so that a machine without it can train and measure

            pd.DataFrame(columns).to_csv(self.folder / f"{self.prefix}_{name}.csv", index=False)

    def check_streak(self, limit: int, step: int) -> None:
        """Raises UserError when too many updates in a row, up to `step`, had no finite gradient."""
        if self.skipped_in_a_row >= limit:
            raise UserError(f"{self.skipped_in_a_row:.0f} updates in a row without a finite gradient, up to update {step}: "
                            f"lower --lr, or try --amp bf16")  # fmt: skip

    def check_batch(self, batch: dict, limit: float) -> None:
        """Remember the videos of a batch that this rank could not read. Raises UserError when they are more than `limit`."""
        self.unreadable.update(batch["bad"])
        if batch["clips"] is not None and len(self.unreadable) <= limit:
            return
        self.write_unreadable(self.unreadable)
        path, reason = next(iter(self.unreadable.items()))
        tail = f"for example {path}: {reason}; all in {self.folder / 'bad_videos.csv'}"
        if batch["clips"] is None:
            raise UserError(f"no readable file found in {len(batch['bad'])} tries, {tail}", this_rank_only=True)
        raise UserError(f"{len(self.unreadable)} files cannot be read, more than --max_bad_frac allows, {tail}", this_rank_only=True)

    def gather_unreadable(self) -> int:
        """Put all ranks' unreadable videos together (a collective call), list the new ones, return how many there are."""
        for bad in gather_objects(self.unreadable):
            self.unreadable.update(bad)
        if rank() == 0:
            self.write_unreadable(self.unreadable)
        return len(self.unreadable)

    def write_unreadable(self, bad: dict[str, str]) -> None:
        """Append the videos that are not yet in bad_videos.csv."""
        path = self.folder / "bad_videos.csv"
        listed = set()
        if path.exists():
            with open(path, newline="") as file:
                listed = {row[0] for row in csv.reader(file) if row}
        new = [(video, reason) for video, reason in sorted(bad.items()) if video not in listed]
        if new:
            with open(path, "a", newline="") as file:
                csv.writer(file).writerows(([] if listed else [("path", "reason")]) + new)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.board is not None:
            self.board.close()


def say_versions() -> None:
    """One line with the versions and the git revision that this run used."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    revision = git.stdout.strip() or "unknown"
    python = ".".join(map(str, sys.version_info[:3]))
    print0(f"revision {revision}, python {python}, torch {torch.__version__}, torchvision {torchvision.__version__}")
