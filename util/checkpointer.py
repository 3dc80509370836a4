"""Save a run when due, resume it, and stop it gracefully."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from util import checkpoint, preemption, resume, same_run
from util.background_save import BackgroundWriter, HostCopy, Outcome
from util.bad_files import BadFiles
from util.dist import UserError, on_rank0, print0, rank
from util.ema import averaged_checkpoint, has_ema, require_trained_weights
from util.host_memory import available_memory
from util.logger import RunLogger, writing_to
from util.train_state import TrainState

MEMORY_RESERVE = 2**30  # bytes of host memory that a copy of the checkpoint leaves
WAIT_SECONDS = 60  # after which the ranks meet while a checkpoint is written
SLOW_SECONDS = 1  # shorter waits for the disk are not worth a note


class Checkpointer:
    """Writes a run's checkpoints, and decides on all ranks alike when to save and to stop."""

    def __init__(
        self,
        *,
        state: TrainState,
        logger: RunLogger,
        bad_files: BadFiles,
        keep: int,
        every_steps: int | None,
        every_minutes: float,
        sync_save: bool = False,
    ):
        """Prepare to save; nothing is written before `start`. Call on every rank.

        keep: number of checkpoints to keep. every_steps, every_minutes: save within an epoch every
        so many updates and minutes; None and 0 turn that off. sync_save: let training wait for each
        write.
        """
        self.state = state
        self.logger = logger
        self.bad_files = bad_files
        self.keep = keep
        self.every_steps = every_steps
        self.every_seconds = every_minutes * 60
        self.sync_save = sync_save
        self.any_rank = preemption.AnyRank()
        self.host_copy = HostCopy()
        self.writer = BackgroundWriter()
        self.noted: set[str] = set()  # notes that were printed: each is, once
        self.step_being_written: int | None = None  # of the writes under way, equal on all ranks
        self.best_is_being_written = False
        self.best_before = -1.0  # accuracy of the best checkpoint before the one under way
        self.lost_best = False  # the writer could not write the best checkpoint
        self.last_saved_step = 0
        # attempts include saves that failed: a full disk is not tried again after every update
        self.last_attempt_step = 0
        self.last_attempt_time = time.monotonic()

    def start(self, path: Path | None, force: bool) -> None:
        """Resume from a checkpoint if there is one, and start logging. Call on every rank.

        force: accept other data, another batch or another model (--force_resume). Raises UserError
        if the checkpoint is of another run or cannot be read.
        """
        if path is not None:
            self._resume(path, force)
        on_rank0(self._prepare_folder)
        state = self.state
        same_run.compare_data(state.position_facts())
        self.logger.open(state.flags, state.step, epoch_is_open=state.metrics.updates > 0)

    def _resume(self, path: Path, force: bool) -> None:
        state = self.state
        saved = load_on_rank(path)
        require_trained_weights(path, saved)
        current = {
            "config": state.config,
            "args": state.flags,
            "data": state.data,
            "global_batch": state.global_batch,
        }
        resume.check_same_run(path, saved, current, force)
        checkpoint.load_weights(path, state.model, saved["model"])
        require_metrics(path, saved, state.metrics.names)
        try:
            state.restore_progress(saved)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path} does not fit ({checkpoint.first_line(error)}): --layer_decay, "
                "--weight_decay, --bias_wd and --freeze_backbone must group the parameters as in "
                "that run"
            ) from error
        self.bad_files.unreadable.update(saved.get("unreadable", {}))
        self.last_saved_step = state.step
        self.last_attempt_step = state.step
        if state.ema is not None:
            state.ema.resume(path, saved, state.step)
        elif has_ema(saved):
            print0(f"the EMA in {path} is not continued, and later checkpoints lack it (--ema 0)")
        print0(f"resumed from {path} at update {state.step}")

    def _prepare_folder(self) -> None:
        """Lock the run and remove partial files left by a crash."""
        files = self.logger.files
        with writing_to(files.folder):
            files.folder.mkdir(parents=True, exist_ok=True)
            resume.lock_run(files)
            for path in (files.checkpoint, files.best):
                checkpoint.remove_stale_tmp(path)

    def save_or_stop_if_due(self) -> None:
        """Stop or save after an update if any rank wants to. Call on every rank.

        The ranks' wishes are combined one update later: no rank blocks here. Raises
        preemption.Stopped on every rank.
        """
        preemption.mark_progress(update=True)
        self._report_problems()
        step = self.state.step
        waited = time.monotonic() - self.last_attempt_time
        overdue = rank() == 0 and self.every_seconds > 0 and waited >= self.every_seconds
        if self.writer.is_busy():
            overdue = False  # a disk slower than every_minutes delays the next save, not training
        stop_requested = preemption.stop_reason() != ""
        stop_requested, overdue = self.any_rank.deferred(stop_requested, overdue)
        if stop_requested:
            raise preemption.Stopped
        if step <= self.last_attempt_step + 1:
            overdue = False  # this wish is older than the last save
        due = self.every_steps is not None and step % self.every_steps == 0
        if overdue or due:
            self.save()

    def end_epoch(self, record: dict, checkpoint_period: int) -> None:
        """Log a finished epoch; save if the run is complete, and every checkpoint_period epochs."""
        state = self.state
        epoch, _ = state.position()
        self.logger.log_epoch(record | {"epoch": epoch, "step": state.step})
        state.metrics.reset()
        last = state.is_last_step()
        due = last or (epoch + 1) % checkpoint_period == 0
        written = due and self.save(epoch, wait=last)
        if last and not written:
            raise UserError(
                "the run is complete, but its last checkpoint could not be written: make room in "
                f"{self.logger.files.folder}, which must be a folder, and run the same command "
                "again; it resumes from the previous checkpoint"
            )

    def save(
        self,
        epoch: int | None = None,
        path: Path | None = None,
        averaged: bool = False,
        wait: bool = False,
    ) -> bool:
        """Save the newest checkpoint, or another one to `path`. Call on every rank.

        epoch: None for the current one. A checkpoint at `path` has one set of weights, the EMA if
        `averaged`; the newest one has both. wait: until the file is written; else training may
        continue meanwhile. Returns False if the file could not be written, as far as that is known:
        a full disk does not end the run. Raises UserError if the weights are not finite.
        """
        state = self.state
        reduce_metrics(state, self.logger)
        self.bad_files.gather()
        if epoch is None:
            epoch, _ = state.position()
        if self.step_being_written not in (None, state.step):
            self._wait_for_earlier_saves()
        target = path or self.logger.files.checkpoint
        with preemption.slow_work():
            in_foreground = on_rank0(lambda: self._start_write(target, epoch, averaged))
        self.step_being_written = state.step
        written = True
        if wait or in_foreground:
            written = self.finish_saves()
        if path is None:
            self.last_attempt_time = time.monotonic()
            self.last_attempt_step = state.step
        return written

    def save_best(self, epoch: int, averaged: bool, best_before: float) -> None:
        """Save the best checkpoint. Call on every rank.

        best_before: accuracy of the best checkpoint so far. It is the best again if the new one
        cannot be written, so that the next improvement is saved.
        """
        self.best_before = best_before
        self.save(epoch, self.logger.files.best, averaged)
        self.best_is_being_written = self.step_being_written is not None

    def before_changing_weights(self) -> None:
        """Prepare for a change of weights outside an update. Call on every rank.

        Waits for the writes of the present copy. The next save copies all weights again.
        """
        self.finish_saves()
        self.host_copy.invalidate()

    def wait_for_best(self) -> None:
        """Wait for the best checkpoint, if it is under way. Call on every rank.

        From then on `state.best_acc1` is the accuracy of a file that exists.
        """
        if self.best_is_being_written:
            self.finish_saves()

    def finish_saves(self) -> bool:
        """Wait for the writes under way. Call on every rank.

        Returns whether the last one succeeded. The ranks meet every WAIT_SECONDS, so that no
        collective times out.
        """
        if self.step_being_written is None:
            return True
        outcomes = None
        with preemption.slow_work():
            while outcomes is None:
                outcomes = on_rank0(self._wait_for_writes)
        self.step_being_written = None
        self.best_is_being_written = False
        files = self.logger.files
        for outcome in outcomes:
            if outcome.path == files.checkpoint and outcome.written:
                self.last_saved_step = outcome.step
            if outcome.path == files.best and not outcome.written:
                self.state.best_acc1 = self.best_before
        return outcomes[-1].written

    def _wait_for_earlier_saves(self) -> None:
        """Wait for the writes under way, whose copy is overwritten next. Call on every rank."""
        start = time.monotonic()
        self.finish_saves()
        seconds = time.monotonic() - start
        if seconds > SLOW_SECONDS:
            self._note_once(
                "slow disk",
                f"note: update {self.state.step} waited {seconds:.0f} s for the checkpoint before "
                "to be written: the disk is too slow for saves this often "
                "(--checkpoint_every_steps, --checkpoint_period)",
            )

    def _note_once(self, subject: str, text: str) -> None:
        """Print a note, unless there was one about this subject."""
        if subject not in self.noted:
            self.noted.add(subject)
            print0(text)

    def _wait_for_writes(self) -> list[Outcome] | None:
        """Return on rank 0 what became of the writes, None if one needs more time."""
        if not self.writer.wait(WAIT_SECONDS):
            return None
        self._report_problems()
        self.lost_best = False
        return self.writer.finish()

    def _report_problems(self) -> None:
        """Print the warnings of writes that failed; only rank 0 writes."""
        for problem in self.writer.new_problems():
            print0(problem)

    def _start_write(self, target: Path, epoch: int, averaged: bool) -> bool:
        """Start writing a checkpoint on rank 0. Return whether training has to wait for it."""
        contents = self.state.state_dict(epoch)
        contents["unreadable"] = dict(self.bad_files.unreadable)
        if not all_finite(contents["model"]):
            raise UserError(
                f"the weights are not finite at update {self.state.step} and were not saved: "
                f"lower {lr_flag(self.state)} and resume from the previous checkpoint"
            )
        copied = self._copy(contents)
        in_foreground = copied is None
        contents = copied or contents
        keep = self.keep
        if target != self.logger.files.checkpoint:
            keep = 1  # the best checkpoint has no history
            if averaged:
                contents = averaged_checkpoint(target, contents)
            contents.pop("ema", None)
        step = self.state.step
        self.writer.start(target, step, lambda: self._write(target, contents, keep))
        return in_foreground

    def _copy(self, contents: dict) -> dict | None:
        """Return a copy of a checkpoint's contents, None to write them in the foreground."""
        if self.sync_save:
            return None
        missing = self.host_copy.missing_bytes(contents)
        available = available_memory() if missing else None
        if available is None or missing + MEMORY_RESERVE <= available:
            try:
                return self.host_copy.take(contents, self.state.step)
            except MemoryError:
                self.host_copy = HostCopy()  # release what there was memory for
        self._note_once(
            "memory",
            f"note: saving in the foreground: a copy of the checkpoint needs {gib(missing)} of "
            f"memory besides {gib(MEMORY_RESERVE)} to spare, and {gib(available)} are left",
        )
        return None

    def _write(self, target: Path, contents: dict, keep: int) -> str:
        """Write a checkpoint, in the writer's thread. Return a warning if that fails, else ""."""
        files = self.logger.files
        if self.lost_best and target == files.checkpoint:
            contents["best_acc1"] = self.best_before
        try:
            target.parent.mkdir(parents=True, exist_ok=True)  # in case somebody has removed it
            checkpoint.save(target, contents, keep)
        except (OSError, MemoryError) as error:
            self.lost_best = self.lost_best or target == files.best
            return (
                f"warning: could not save {target} at update {contents['step']} "
                f"({getattr(error, 'strerror', None) or checkpoint.first_line(error)}); "
                "the run continues, the previous checkpoint is untouched"
            )
        return ""

    def stop_between_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yield a rank's validation batches. Call on every rank.

        Raises preemption.Stopped on every rank at the same batch index, even if ranks have
        different numbers of batches.
        """
        batches = iter(batches)
        while True:
            batch = next(batches, None)
            preemption.mark_progress()
            stop_requested = preemption.stop_reason() != ""
            stop_requested, any_left = self.any_rank.now(stop_requested, batch is not None)
            if stop_requested:
                raise preemption.Stopped
            if batch is not None:
                yield batch
            elif not any_left:
                return

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """Wrap the training loop: when it is stopped, save and write the .PREEMPTED marker.

        After an error a single process completes the writes under way before it exits; several
        processes end at once, which leaves a temporary file. Raises UserError if the checkpoint
        cannot be written.
        """
        preemption.mark_training_started()
        try:
            yield
            self.any_rank.drain()
            self.finish_saves()
        except preemption.Stopped:
            self.any_rank.drain()
            self._save_stopped_run()
        finally:
            preemption.restore_signal_handlers()
            self._report_problems()

    def _save_stopped_run(self) -> None:
        step = self.state.step
        files = self.logger.files
        self.finish_saves()
        written = step == self.last_saved_step or self.save(wait=True)
        if not written:
            raise UserError(
                f"stopped at update {step}, but the checkpoint could not be written: the run will "
                f"resume from update {self.last_saved_step}; make room in {files.folder}"
            ) from None
        self.logger.mark_preempted(step)
        reason = preemption.stop_reason() or "a signal to another rank"
        done = "checkpoint saved" if step > 0 else "there is nothing to save yet"
        print0(
            f"stopped at update {step} ({reason}); {done} (marker: {files.marker}). "
            "Run the same command to resume."
        )


def load_on_rank(path: Path) -> dict:
    """Load a checkpoint that rank 0 found readable. Raises UserError, printed on any rank."""
    try:
        return checkpoint.load(path, check=False)
    except UserError as error:  # the file may be missing on this machine only
        raise UserError(f"rank {rank()}: {error}", print_on_any_rank=True) from error


def require_metrics(path: Path, saved: dict, names: tuple[str, ...]) -> None:
    """Raise UserError if the sums in a checkpoint lack a metric of this run."""
    tally = saved.get("tally")
    if not tally:  # saved by an earlier version
        return
    for sums in tally["sums"].values():
        missing = [name for name in names if name not in sums]
        if missing:
            raise UserError(
                f"{path} has no sums of {', '.join(missing)}: another script or version saved it. "
                "Resume with that one, or start a new run from its weights."
            )


def all_finite(weights: dict[str, torch.Tensor]) -> bool:
    """Return whether all floating-point weights are finite: their extremes are, which takes a read.

    On a CPU this takes a fifteenth of the time of `isfinite`, which makes tensors.
    """
    extremes: list[torch.Tensor] = []
    for value in weights.values():
        if value.is_floating_point():
            extremes += torch.aminmax(value.detach())  # NaN if any is
    return bool(torch.stack(extremes).isfinite().all())


def gib(size: int | None) -> str:
    """Return a number of bytes as text."""
    return "an unknown amount" if size is None else f"{size / 2**30:.1f} GiB"


def lr_flag(state: TrainState) -> str:
    """Return the flag that sets a run's learning rate: a probe has others."""
    return "--probe_lrs" if state.flags.get("probe") else "--lr"


def reduce_metrics(state: TrainState, logger: RunLogger) -> None:
    """Sum the metrics over the ranks and list skipped updates. Call on every rank.

    Raises UserError after too many skipped updates in a row.
    """
    metrics = state.metrics
    skipped = metrics.all_reduce(state.step)
    if skipped:
        logger.log_skipped(skipped)
    if metrics.failed_step is not None:
        raise UserError(
            f"{metrics.max_bad_steps} updates in a row without a finite loss and gradient, up to "
            f"update {metrics.failed_step}: lower {lr_flag(state)}, or try --amp bf16; their files "
            f"are in {logger.files.folder / 'nonfinite.jsonl'}"
        )
