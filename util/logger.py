"""Logging of a run: progress lines, one JSON line per epoch, TensorBoard, pictures, tables."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from util import __version__
from util.checkpoint import rename_aside
from util.dist import (
    UserError,
    all_gather_object,
    on_rank0,
    print0,
    rank,
    show_progress,
    world_size,
)
from util.files import RunFiles, append_lines, atomic_write, save_csv

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LONG_SECONDS = 10  # shorter epochs get no line of their own


class RunLogger:
    """Writes the reports of a run into its folder, on rank 0. Other ranks may call every method.

    If a file cannot be written (for example on a full disk), training continues with a warning.
    """

    def __init__(self, files: RunFiles):
        """Write nothing before `open`."""
        self.files = files
        self.warned: set[str] = set()  # what could not be written last time
        self.eta_start: tuple[int, float] | None = None  # step and time of the first line
        self.last_line_time = time.monotonic()
        self.last_epoch_time = time.monotonic()
        self.writer: SummaryWriter | None = None  # of TensorBoard, imported when it is used
        self.purge_step: int | None = None  # TensorBoard hides events from this step on

    def open(self, flags: dict, step: int | None = None, epoch_is_open: bool = False) -> None:
        """Start writing; record the flags. Call on every rank.

        step: number of updates done in a training run; None: an evaluation. epoch_is_open: the
        epoch of `step` is not logged yet. Log lines of updates that will be repeated are dropped; a
        new run renames an old log. Raises UserError if nothing can be written.
        """
        on_rank0(lambda: self._open(flags, step, epoch_is_open))

    def _open(self, flags: dict, step: int | None, epoch_is_open: bool) -> None:
        # imported now, so that a missing package is reported before any training
        import torch.utils.tensorboard  # noqa: F401

        threading.excepthook = report_thread_error
        folder = self.files.folder
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if step is not None:
                self.files.marker.unlink(missing_ok=True)
                self._trim_log(step, epoch_is_open)
            text = json.dumps(flags, indent=2, sort_keys=True) + "\n"
            replace_text(self.files.path("_args.json"), text)
        self.purge_step = step + 1 if step else None

    def _trim_log(self, step: int, epoch_is_open: bool) -> None:
        """Drop the lines of updates that will be repeated."""
        log = self.files.log
        if not log.exists():
            return
        if step == 0:
            rename_aside(log, ".before")
            return
        lines = log.read_text("utf-8", errors="replace").splitlines(keepends=True)
        last = step - 1 if epoch_is_open else step
        kept = [line for line in lines if 0 <= logged_step(line) <= last]  # -1: a corrupt line
        if kept != lines:
            replace_text(log, "".join(kept))

    @contextlib.contextmanager
    def warn_on_oserror(self, what: str) -> Iterator[None]:
        """Turn an OSError in the block into a warning that names `what`, once until it succeeds."""
        try:
            yield
            self.warned.discard(what)
        except OSError as error:
            if what not in self.warned:
                self.warned.add(what)
                reason = error.strerror or error
                print0(f"warning: could not write {what} ({reason}); the run continues")

    def _take_writer(self) -> SummaryWriter:
        """Return TensorBoard's writer and forget it: after a failure it would never write again.

        Makes one if there is none. Raises OSError if its folder has vanished or cannot be made.
        """
        from torch.utils.tensorboard import SummaryWriter

        writer = self.writer
        self.writer = None
        folder = self.files.folder / "tb" / self.files.prefix
        if writer is None:
            return SummaryWriter(str(folder), purge_step=self.purge_step)
        folder.stat()  # TensorBoard writes in a thread, which would print a traceback
        return writer

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[SummaryWriter]:
        """Yield TensorBoard's writer, which is kept unless the block fails. Raises OSError."""
        writer = self._take_writer()
        yield writer
        self.writer = writer

    def log_step(
        self,
        step: int,
        total_steps: int,
        epoch: float,
        values: dict[str, float],
        rates: dict[str, float],
    ) -> None:
        """Show one progress line and write the same numbers to TensorBoard.

        step: number of updates done; values: means since the last line; rates: `metrics.throughput`
        and the share of time spent waiting for data. On a terminal each line replaces the previous
        one.
        """
        self.last_line_time = time.monotonic()
        if rank() != 0:
            return
        if self.eta_start is None:
            self.eta_start = (step, time.time())
        line = progress_line(step, total_steps, epoch, values, rates)
        show_progress(line + self._eta(step, total_steps))
        with self.warn_on_oserror("to TensorBoard"), self._tensorboard() as writer:
            for name, value in (values | rates).items():
                writer.add_scalar(f"train/{name}", value, step)

    def _eta(self, step: int, total_steps: int) -> str:
        """Return the time left, by the mean speed since the first line."""
        first_step, first_time = self.eta_start or (step, 0.0)
        if step == first_step:
            return "  eta ?"
        seconds_per_step = (time.time() - first_time) / (step - first_step)
        left = timedelta(seconds=int(seconds_per_step * (total_steps - step)))
        return f"  eta {left}"

    def was_quiet_long(self) -> bool:
        """Return whether the last progress line is LONG_SECONDS old."""
        return time.monotonic() - self.last_line_time >= LONG_SECONDS

    def print_epoch(self, text: str, last: bool) -> None:
        """Print the results of an epoch that took long, or of the last one."""
        if last or time.monotonic() - self.last_epoch_time >= LONG_SECONDS:
            self.last_epoch_time = time.monotonic()
            print0(text)

    def log_epoch(self, record: dict) -> None:
        """Append one JSON line to the log, and write its numbers to TensorBoard."""
        if rank() != 0:
            return
        with self.warn_on_oserror(self.files.log.name):
            append_lines(self.files.log, json.dumps(record).encode() + b"\n")
        with self.warn_on_oserror("to TensorBoard"), self._tensorboard() as writer:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    writer.add_scalar(f"epoch/{name}", value, record["epoch"])
            writer.flush()

    def log_image(self, name: str, image: Tensor, epoch: int, numbered: bool = True) -> None:
        """Save an image (3, H, W) uint8 as {prefix}_{name}[_{epoch}].png, and in TensorBoard."""
        if rank() != 0:
            return
        suffix = f"_{name}_{epoch:05d}.png" if numbered else f"_{name}.png"
        path = self.files.path(suffix)
        with self.warn_on_oserror(path.name):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        with self.warn_on_oserror("to TensorBoard"), self._tensorboard() as writer:
            writer.add_image(name, image, epoch)

    def save_table(self, name: str, columns: dict[str, list]) -> None:
        """Save a table as {prefix}_{name}.csv."""
        if rank() != 0:
            return
        import pandas as pd  # imported here, so that training works without it

        path = self.files.path(f"_{name}.csv")
        with self.warn_on_oserror(path.name):
            save_csv(pd.DataFrame(columns), path)

    def log_skipped(self, skipped: dict[int, list[str]]) -> None:
        """List skipped updates with the files of all ranks. Call on every rank.

        skipped: {step: this rank's files}.
        """
        skipped_by_rank = all_gather_object(skipped)
        if rank() != 0:
            return
        path = self.files.folder / "nonfinite.jsonl"
        with self.warn_on_oserror(path.name), open(path, "a") as file:
            for step in skipped:
                videos = [video for skipped in skipped_by_rank for video in skipped[step]]
                record = {"run": self.files.prefix, "update": step, "files": videos}
                file.write(json.dumps(record) + "\n")

    def mark_preempted(self, step: int) -> None:
        """Write the .PREEMPTED marker; the next run deletes it."""
        if rank() == 0:
            with self.warn_on_oserror(self.files.marker.name):
                replace_text(self.files.marker, f"{step}\n")

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.writer is not None:
            with self.warn_on_oserror("to TensorBoard"):
                self._take_writer().close()


def report_thread_error(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except where TensorBoard's cannot write.

    The writer's next call in the main thread raises that OSError again, which is a warning.
    """
    of_tensorboard = type(failed.thread).__module__.startswith("tensorboard")
    if not (of_tensorboard and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError in the block into a UserError about --output_dir."""
    try:
        yield
    except OSError as error:
        place = os.fsdecode(error.filename or folder)
        raise UserError(
            f"cannot write to {folder} ({place}: {error.strerror}): make room or remove what is in "
            "the way, or give another --output_dir"
        ) from error


def progress_line(
    step: int,
    total_steps: int,
    epoch: float,
    values: dict[str, float],
    rates: dict[str, float],
) -> str:
    """Return a line about the run's progress, without the time left. See `RunLogger.log_step`."""
    clips_per_second = rates["clips_per_second"]
    per_device = f"{clips_per_second / world_size():.1f} per device"
    if rates["tflops"]:  # probes do not count theirs
        per_device += f", {rates['tflops']:.3g} TFLOP/s"
    if "mfu" in rates:
        per_device += f", mfu {rates['mfu']:.1%}"
    parts = [
        f"epoch {epoch:.2f}",
        f"update {step}/{total_steps}",
        *(f"{name} {value:.4g}" for name, value in values.items()),
        f"{clips_per_second:.1f} clips/s ({per_device})",
        f"data wait {rates['data_wait']:.0%}",
        f"mem {rates['memory_gib']:.2f} GiB",
    ]
    return "  ".join(parts)


def logged_step(line: str) -> int:
    """Return the step of a line of the log, or -1 if the line is incomplete or corrupt."""
    if not line.endswith("\n"):
        return -1
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return -1


def replace_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def print_versions() -> None:
    """Print one line with the versions and the git revision that this run uses."""
    names = ("torch", "torchvision", "av", "decord")
    packages = ", ".join(f"{name} {installed_version(name)}" for name in names)
    python = platform.python_version()
    print0(f"st-mae {__version__} (revision {git_revision()}), python {python}, {packages}")


def git_revision() -> str:
    """Return the git revision of this source, or "unknown" without a repository or git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return completed.stdout.strip() or "unknown"


def installed_version(package: str) -> str:
    """Return the version of an installed package, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
