"""What a run says about itself: progress lines, one JSON line per epoch, TensorBoard, pictures, unreadable videos."""

import contextlib
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from util import __version__, checkpoint
from util.dist import (
    UserError,
    gather_objects,
    on_rank0,
    peak_flops,
    print0,
    rank,
    show_progress,
    sum_over_ranks,
    world_size,
)
from util.optim import Plan

COUNTS = (
    "updates",
    "skipped",
    "shares",
    "replaced",
)  # shares: updates of a rank that were not skipped; replaced: frames
LONG_SECONDS = 10  # an epoch that takes less gets no line of its own


class StallClock:
    """How long the device stood idle between micro-steps, waiting for the next batch; never waits for the device itself.

    On CUDA: the gap on the stream between the last kernel of one step and the first of the next, by events that are read
    at the logging steps. On a CPU: the time that the loop spent in the loader.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks, self.counted = (
            [],
            0.0,
        )  # marks: [work handed over, next batch here]; counted: seconds before the last pause
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

    def pause(self) -> None:
        """Stop counting: what follows is no training (the end of an epoch, a validation)."""
        self.counted += time.perf_counter() - self.since
        self.marks = [mark for mark in self.marks if mark[1] is not None]

    def resume(self) -> None:
        """Begin to count, or go on; what follows is waiting for data."""
        self.since = time.perf_counter()
        self.stop()

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the share of them spent waiting. On CUDA after a synchronisation only."""
        closed = [mark for mark in self.marks if mark[1] is not None]
        idle = sum(
            begin.elapsed_time(end) / 1000 if self.cuda else end - begin for begin, end in closed
        )
        now = time.perf_counter()
        seconds, self.since, self.counted = self.counted + now - self.since, now, 0.0
        self.marks = [mark for mark in self.marks if mark[1] is None]
        return seconds, min(idle / max(seconds, 1e-9), 1.0)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: the GPU's where there is one, else resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = (
        1 if sys.platform == "darwin" else 1024
    )  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Tally:
    """Sums over the updates of an epoch, and over those since the last log line. They grow on the device; `read` waits for it.

    All in float64, which adds up float32 values without rounding, and divided at the end only: it makes no difference where a run was interrupted.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        """names: of what is summed; what an update adds has as many values."""
        self.names, self.device, self.streak = names, device, 0  # streak: skipped updates in a row
        self.on_device = torch.zeros(
            len(names) + 1, dtype=torch.float64, device=device
        )  # the last: replaced frames
        self.unread: list[
            tuple[Tensor, list[str]]
        ] = []  # of each update since the last reading: skipped (0. or 1.), this rank's files
        self.forget()

    def forget(self) -> None:
        """Begin an epoch."""
        self.sums = {part: dict.fromkeys((*self.names, *COUNTS), 0.0) for part in ("epoch", "line")}

    @property
    def updates(self) -> int:
        """Updates of this epoch so far."""
        return int(self.sums["epoch"]["updates"]) + len(self.unread)

    def add(self, values: Tensor, skipped: Tensor, replaced: Tensor, files: list[str]) -> None:
        """An update: values (len(names),), whether it was skipped (0. or 1.), and how many frames of its clips could not be
        decoded, all on the device; the files that this rank fed it."""
        used = values.double().where(skipped == 0, values.new_zeros((), dtype=torch.float64))
        self.on_device += torch.cat([used, replaced.double()[None]])
        self.unread.append((skipped, files))

    def read(self, run: "Run", step: int, max_bad_steps: int) -> None:
        """Add up over the ranks what has come since the last reading; waits for the device. A collective call.

        step: updates done so far. Skipped updates are listed with their files. Raises UserError for max_bad_steps of them in a row.
        """
        if not self.unread:
            return
        flags = torch.stack([skipped for skipped, _ in self.unread])
        values = sum_over_ranks(torch.cat([self.on_device, flags.double()])).tolist()
        count = len(self.names)
        first, values, replaced, flags = (
            step - len(self.unread) + 1,
            values[:count],
            values[count],
            values[count + 1 :],
        )
        bad = {first + place: self.unread[place][1] for place, flag in enumerate(flags) if flag}
        self.unread = []
        self.on_device.zero_()
        for sums in self.sums.values():
            new = (*values, len(flags), len(bad), (len(flags) - len(bad)) * world_size(), replaced)
            for name, value in zip((*self.names, *COUNTS), new, strict=True):
                sums[name] += value
        if bad:
            run.nonfinite(bad)
        for place, flag in enumerate(flags):
            self.streak = self.streak + 1 if flag else 0
            if self.streak >= max_bad_steps:
                raise UserError(
                    f"{self.streak} updates in a row without a finite loss and gradient, up to update {first + place}: lower --lr, "
                    f"or try --amp bf16; their files are in {run.folder / 'nonfinite.jsonl'}"
                )

    def means(self, part: str) -> dict[str, float]:
        """Means per update that was not skipped, the number of skipped ones and of replaced frames; part: "epoch", or "line", which
        then begins anew."""
        sums = self.sums[part]
        used = max(sums["shares"], 1)
        if part == "line":
            self.sums[part] = dict.fromkeys(sums, 0.0)
        return {name: sums[name] / used for name in self.names} | {
            name: int(sums[name]) for name in ("skipped", "replaced")
        }

    def state(self) -> dict:
        """What a checkpoint keeps of it, after `read`."""
        return {
            "sums": {part: dict(sums) for part, sums in self.sums.items()},
            "streak": self.streak,
        }

    def load_state(self, state: dict | None) -> None:
        """Go on from `state()`; None: from a file that has none."""
        if state:
            for part, sums in self.sums.items():
                sums.update(state["sums"][part])
            self.streak = state["streak"]


class Run:
    """The files of a run in `output_dir`, written by rank 0 only; every method may be called on every rank.

    A file that cannot be written, as on a full disk, is a warning: it ends no training.
    """

    def __init__(self, args, suffix: str = ""):
        """suffix: follows --save_prefix in the names of all files. Nothing is written before `begin`."""
        self.args, self.folder, self.prefix = args, Path(args.output_dir), args.save_prefix + suffix
        self.checkpoint, self.best = (
            self.folder / f"{self.prefix}.pth",
            self.folder / f"{self.prefix}_best.pth",
        )
        self.marker = self.folder / f"{self.prefix}.PREEMPTED"
        self.first = None  # step and time of the first progress line, for the ETA
        self.said = self.epoch_said = (
            time.monotonic()
        )  # when progress, and the results of an epoch, were last printed
        self.unreadable: dict[str, str] = {}
        self.damaged: dict[str, str] = {}  # files that are read, but with many frames replaced
        self.board, self.purge = None, None

    def begin(self, step: int | None = None, unclosed: bool = False) -> None:
        """Start writing. step: of a training run, the updates that are done; unclosed: its epoch is still to be logged. What the log has beyond
        that goes, since it will be done again; where nothing is done, an older log is set aside. Raises UserError where nothing can be
        written. A collective call."""
        on_rank0(lambda: self._begin(step, unclosed))

    def _begin(self, step: int | None, unclosed: bool) -> None:
        """`begin` on rank 0."""
        import torch.utils.tensorboard  # noqa: F401 (now, to say at once if it is not installed)

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.folder / f"{self.prefix}_log.txt"
            if step is not None:
                checkpoint.claim(self.args)
                for path in (self.checkpoint, self.best):
                    checkpoint.sweep(path)
                self.marker.unlink(missing_ok=True)
                if log.exists() and step:
                    lines = log.read_text().splitlines(keepends=True)
                    kept = [line for line in lines if 0 <= step_of(line) <= step - unclosed]
                    replace_text(log, "".join(kept)) if kept != lines else None
                elif log.exists():
                    checkpoint.set_aside(log, ".before")
            replace_text(
                self.folder / f"{self.prefix}_args.json",
                json.dumps(vars(self.args), indent=2, sort_keys=True) + "\n",
            )
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}): make room, or give another --output_dir"
            ) from error
        self.purge = step + 1 if step else None

    @contextlib.contextmanager
    def writing(self, what: str):
        """Around writing to a file: a failure is said and passed over."""
        try:
            yield
        except OSError as error:
            print0(f"warning: could not write {what} ({error.strerror or error}); the run goes on")

    @contextlib.contextmanager
    def showing(self):
        """Around writing to TensorBoard. Its writer does not recover from a full disk: after a failure another one takes its place."""
        from torch.utils.tensorboard import SummaryWriter

        with self.writing("to TensorBoard"):
            board, self.board = (
                self.board
                or SummaryWriter(str(self.folder / "tb" / self.prefix), purge_step=self.purge),
                None,
            )
            yield board
            self.board = board

    def mark_preempted(self, step: int) -> None:
        """Leave the marker that asks for the run to be started again; it goes when that happens."""
        if rank() == 0:
            with self.writing(self.marker.name):
                replace_text(self.marker, f"{step}\n")

    def nonfinite(self, bad: dict[int, list[str]]) -> None:
        """List skipped updates {number: this rank's files} with the files of all ranks. A collective call."""
        shares = gather_objects(bad)
        if rank() == 0:
            with (
                self.writing("nonfinite.jsonl"),
                open(self.folder / "nonfinite.jsonl", "a") as file,
            ):
                for step in bad:
                    files = [path for share in shares for path in share[step]]
                    file.write(
                        json.dumps({"run": self.prefix, "update": step, "files": files}) + "\n"
                    )

    def progress(
        self,
        step: int,
        plan: Plan,
        values: dict[str, float],
        clips: int,
        clock: StallClock,
        device: torch.device,
    ) -> None:
        """One progress line and the same numbers in TensorBoard. A terminal's line is overwritten, a file's is not.

        clips: how many went through all processes since the last call.
        """
        seconds, waited = clock.read()
        self.said = time.monotonic()
        if rank() != 0:
            return
        self.first = self.first or (step, time.time())
        done, elapsed = step - self.first[0], time.time() - self.first[1]
        left = timedelta(seconds=int(elapsed / done * (plan.total_steps - step))) if done else "?"
        values = {
            name: value
            for name, value in values.items()
            if name not in ("skipped", "replaced") or value
        }
        speed, memory = clips / max(seconds, 1e-9), memory_gib(device)
        each, peak = speed / world_size(), peak_flops(device)
        rates = {
            "clips_per_second": speed,
            "tflops": each * plan.flops / 1e12,
            "data_wait": waited,
            "memory_gib": memory,
        }
        rates |= {"mfu": each * plan.flops / peak} if peak else {}
        line = (
            f"epoch {step / plan.steps_per_epoch:.2f}  update {step}/{plan.total_steps}  "
            + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            + f"  {speed:.1f} clips/s ({each:.1f} per device, {rates['tflops']:.3g} TFLOP/s"
            + (f", mfu {rates['mfu']:.1%})" if peak else ")")
            + f"  data wait {waited:.0%}  mem {memory:.2f} GiB  eta {left}"
        )
        show_progress(line)
        with self.showing() as board:
            for name, value in (values | rates).items():
                board.add_scalar(f"train/{name}", value, step)

    def line_is_due(self) -> bool:
        """Whether the last line about progress is LONG_SECONDS old: the end of a long epoch is worth a line, that of a short one is not."""
        return time.monotonic() - self.said >= LONG_SECONDS

    def epoch_line(self, text: str, last: bool) -> None:
        """Print the results of an epoch that was long, or the last."""
        if last or time.monotonic() - self.epoch_said >= LONG_SECONDS:
            self.epoch_said = time.monotonic()
            print0(text)

    def epoch(self, record: dict) -> None:
        """Append one JSON line to the log, and its numbers to TensorBoard."""
        if rank() != 0:
            return
        log = self.folder / f"{self.prefix}_log.txt"
        with self.writing(log.name), open(log, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                file.write(
                    b"" if file.read() == b"\n" else b"\n"
                )  # after a line that found no room
            file.write(json.dumps(record).encode() + b"\n")
        with self.showing() as board:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    board.add_scalar(f"epoch/{name}", value, record["epoch"])
            board.flush()

    def picture(self, name: str, image: Tensor, epoch: int, numbered: bool = True) -> None:
        """Save a picture (3, H, W) uint8 as {prefix}_{name}[_{epoch}].png and show it in TensorBoard."""
        if rank() == 0:
            file = (
                f"{self.prefix}_{name}_{epoch:05d}.png" if numbered else f"{self.prefix}_{name}.png"
            )
            with self.writing(file):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(self.folder / file)
            with self.showing() as board:
                board.add_image(name, image, epoch)

    def table(self, name: str, columns: dict[str, list]) -> None:
        """Save a table as {prefix}_{name}.csv."""
        if rank() == 0:
            import pandas as pd  # here, so that a machine without it can train and measure

            with self.writing(f"{self.prefix}_{name}.csv"):
                pd.DataFrame(columns).to_csv(self.folder / f"{self.prefix}_{name}.csv", index=False)

    def check_batch(self, batch: dict, limit: float) -> None:
        """Remember the videos of a batch that this rank could not read. Raises UserError when they are more than `limit`."""
        self.unreadable.update(batch["bad"])
        self.damaged.update(batch["damaged"])
        if batch["clips"] is not None and len(self.unreadable) <= limit:
            return
        self.write_unreadable(self.unreadable)
        path, reason = next(iter(self.unreadable.items()))
        tail = f"for example {path}: {reason}; all in {self.folder / 'bad_videos.csv'}"
        if batch["clips"] is None:
            raise UserError(
                f"no readable file found in {len(batch['bad'])} tries, {tail}", this_rank_only=True
            )
        raise UserError(
            f"{len(self.unreadable)} files cannot be read, more than --max_bad_frac allows, {tail}",
            this_rank_only=True,
        )

    def gather_unreadable(self) -> int:
        """Put all ranks' unreadable videos together (a collective call), list the new ones, return how many there are. Damaged ones
        are listed too."""
        for unreadable, damaged in gather_objects((self.unreadable, self.damaged)):
            self.unreadable.update(unreadable)
            self.damaged.update(damaged)
        if rank() == 0:
            self.write_unreadable(self.damaged | self.unreadable)
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
            with self.writing(path.name), open(path, "a", newline="") as file:
                csv.writer(file).writerows(([] if listed else [("path", "reason")]) + new)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.board is not None:
            with self.writing("to TensorBoard"):
                self.board.close()


def step_of(line: str) -> int:
    """The update of a line of the log; -1 if it is cut or damaged."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


def replace_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def say_versions() -> None:
    """Print one line with the versions and the git revision that this run uses."""
    packages = ", ".join(
        f"{name} {installed(name)}" for name in ("torch", "torchvision", "av", "decord")
    )
    print0(
        f"st-mae {__version__} (revision {revision()}), python {platform.python_version()}, {packages}"
    )


def revision() -> str:
    """Return the git revision of this source, "unknown" where there is no repository or no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def installed(package: str) -> str:
    """Return the version of an installed package, "none" if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
