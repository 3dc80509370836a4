"""The state of a training run: what its checkpoints hold, when they are written, and how it goes on from one or stops."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from util import checkpoint, stop
from util.dist import UserError, on_rank0, print0, rank, world_size
from util.optim import Plan
from util.tracking import Run, StallClock, Tally


def digest(paths: list[str], labels: list[int] | None = None) -> dict:
    """What a checkpoint remembers of its training set: how many samples, and a hash of their paths and labels in order."""
    text = "\n".join(paths) + "\n" + ",".join(map(str, labels or []))
    return {"samples": len(paths), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def load_here(path: Path) -> dict:
    """A checkpoint that rank 0 has found good. Raises UserError, which this rank says itself: it may be on another machine."""
    try:
        return checkpoint.load(path, check=False)
    except UserError as error:
        raise UserError(f"rank {rank()}: {error}", this_rank_only=True) from error


class Saver:
    """Counts the updates of a run, saves it when that is due, and ends it at a signal.

    tally: the sums of the epoch under way, which are part of a checkpoint: an epoch that was interrupted, in its validation too, is reported
    as if it had not been. best: best_acc1 so far, None in pretraining.
    """

    def __init__(
        self,
        args,
        model: nn.Module,
        optimizer,
        scaler,
        plan: Plan,
        config: dict,
        data: dict,
        tally: Tally,
        run: Run,
        best: float | None = None,
    ):
        """model: unwrapped; data: `digest` of the training set. A collective call."""
        self.args, self.model, self.optimizer, self.scaler, self.plan, self.run = (
            args,
            model,
            optimizer,
            scaler,
            plan,
            run,
        )
        self.config, self.data, self.tally, self.best = config, data, tally, best
        self.step = self.samples = self.first = self.saved_at = self.tried_at = (
            0  # first: updates when this process began
        )
        self.logged, self.clock = (
            0,
            StallClock(tally.device),
        )  # logged: updates at the last progress line
        self.saved_time, self.ballot = time.monotonic(), stop.Ballot()
        self.global_batch = args.batch_size_per_gpu * args.accum_iter * world_size()

    def resume(self, path: Path | None) -> None:
        """Take up the state of a checkpoint, if there is one. Raises UserError if it is not one of this model, data and batch."""
        if path is not None:
            state = load_here(path)
            self._check(path, state)
            checkpoint.load_weights(path, self.model, state["model"])
            try:
                self._load_optimizer(state)
                self._load_position(state)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path} does not fit ({checkpoint.reason(error)}): --layer_decay, --weight_decay, --bias_wd and --freeze_backbone "
                    f"must group the parameters as in that run"
                ) from error
            self.first = self.saved_at = self.tried_at = self.logged = self.step
            print0(f"resumed from {path} at update {self.step}")
        self.run.begin(self.step, self.tally.updates > 0)

    def _load_optimizer(self, state: dict) -> None:
        """Moments and scale; weight decay and betas follow the flags."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _load_position(self, state: dict) -> None:
        """Where the run is, and its counts. With another batch or training set (--force_resume): as many samples of the same epoch are done, and what
        is reported of it begins here."""
        self.samples, self.best = state["samples_consumed"], state.get("best_acc1", self.best)
        self.run.unreadable.update(state.get("unreadable", {}))
        batch, per_epoch = (
            state.get("global_batch", self.global_batch),
            state.get("steps_per_epoch", self.plan.steps_per_epoch),
        )
        if (batch, per_epoch) == (self.global_batch, self.plan.steps_per_epoch):
            self.step = state["step"]
            self.tally.load_state(state.get("tally"))
        else:
            epoch, done = divmod(state["step"], per_epoch)
            self.step = epoch * self.plan.steps_per_epoch + min(
                done * batch // self.global_batch, self.plan.steps_per_epoch - 1
            )

    def _check(self, path: Path, state: dict) -> None:
        """Say which flags have changed. Raises UserError for what must not, unless --force_resume."""
        args = self.args
        missing = {
            "model",
            "optimizer",
            "scaler",
            "step",
            "samples_consumed",
            "config",
            "args",
        } - state.keys()
        if missing or not all(
            isinstance(state[key], dict) for key in ("model", "optimizer", "config", "args")
        ):
            what = f"no {', '.join(sorted(missing))}" if missing else "its parts are of other kinds"
            raise UserError(f"{path} is no checkpoint of a run ({what}): --resume needs one")
        if not args.force_resume:
            checkpoint.check_config(path, state, self.config)
        now = vars(args)
        for key, old in state["args"].items():
            if (
                key in now
                and now[key] != old
                and not (isinstance(old, (list, tuple)) and list(old) == list(now[key]))
            ):
                print0(f"flag changed since the checkpoint: --{key} {old} -> {now[key]}")
        old_data, old_batch = (
            state.get("data", self.data),
            state.get("global_batch", self.global_batch),
        )
        changes = (
            [f"global batch {old_batch} -> {self.global_batch}"]
            if old_batch != self.global_batch
            else []
        )
        changes += (
            [f"training set of {old_data['samples']} -> {self.data['samples']} samples"]
            if old_data != self.data
            else []
        )
        if changes and not args.force_resume:
            cure = (
                "--batch_size_per_gpu x --accum_iter x processes"
                if old_data == self.data
                else "the manifest in --datafile_dir"
            )
            raise UserError(
                f"{path} is of another run ({', '.join(changes)}, or the same in another order): restore {cure}, or give --force_resume"
            )
        for change in changes:
            print0(f"changed since the checkpoint, by --force_resume: {change}")

    def position(self) -> tuple[int, int]:
        """The epoch under way and the updates done in it: all of them if it only remains to be closed."""
        epoch = (self.step - (self.tally.updates > 0)) // self.plan.steps_per_epoch
        return epoch, self.step - epoch * self.plan.steps_per_epoch

    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return self.step < self.plan.total_steps or self.tally.updates > 0

    def begin_epoch(self) -> tuple[StallClock, int]:
        """The clock of the run, and the updates done in the run when the epoch under way ends."""
        self.clock.resume()
        return self.clock, self.plan.end_of_epoch(self.position()[0])

    def after_update(self, clips: int) -> None:
        """Count an update, of so many clips on this rank; print a log line and save if it is time. Raises Stopped. A collective call, as
        all that follow."""
        args, plan = self.args, self.plan
        self.step, self.samples = self.step + 1, self.samples + self.global_batch
        ends_epoch = self.step % plan.steps_per_epoch == 0
        due = self.step % args.log_every == 0 or self.step == plan.total_steps
        if due or ends_epoch:
            self.tally.read(self.run, self.step, args.max_bad_steps)
        if due or (ends_epoch and self.run.line_is_due()):
            values = {**self.tally.means("line"), "lr": plan.learning_rate(self.step - 1, args)}
            self.run.progress(
                self.step,
                plan,
                values,
                (self.step - self.logged) * clips * world_size(),
                self.clock,
                self.tally.device,
            )
            self.logged = self.step
        if ends_epoch:
            self.clock.pause()
        seconds = args.checkpoint_every_minutes * 60
        overdue = rank() == 0 and seconds > 0 and time.monotonic() - self.saved_time >= seconds
        stopping, overdue = self.ballot.later(stop.asked_by() != "", overdue)
        if stopping:
            raise stop.Stopped
        overdue = (
            overdue and self.step > self.tried_at + 1
        )  # else it was handed in before the last save
        if overdue or (
            args.checkpoint_every_steps and self.step % args.checkpoint_every_steps == 0
        ):
            self.save()

    def close_epoch(self, record: dict) -> None:
        """Log a finished epoch, and save if it is the last or as --checkpoint_period says."""
        args, epoch, last = self.args, self.position()[0], self.step >= self.plan.total_steps
        self.run.epoch(record | {"epoch": epoch, "step": self.step})
        self.tally.forget()
        if (last or (epoch + 1) % args.checkpoint_period == 0) and not self.save(epoch) and last:
            raise UserError(
                f"the run is complete, but its last checkpoint could not be written: make room in {args.output_dir} "
                f"and give the same command, it goes on from the one before"
            )

    def save(self, epoch: int | None = None, path: Path | None = None) -> bool:
        """Write the newest checkpoint, or another one. Returns whether that worked: a full disk is no reason to lose the run."""
        self.tally.read(self.run, self.step, self.args.max_bad_steps)
        self.run.gather_unreadable()
        epoch = self.position()[0] if epoch is None else epoch
        written = on_rank0(lambda: self._write(path, epoch))
        if path is None:
            self.saved_time, self.tried_at = time.monotonic(), self.step
            self.saved_at = self.step if written else self.saved_at
        return written

    def _write(self, path: Path | None, epoch: int) -> bool:
        """`save` on rank 0."""
        args = self.args
        weights = self.model.state_dict()
        if not torch.stack(
            [value.isfinite().all() for value in weights.values() if value.is_floating_point()]
        ).all():
            raise UserError(
                f"the weights are not finite at update {self.step}: not saved; lower --lr and go on from the checkpoint before"
            )
        state = {
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": self.step,
            "samples_consumed": self.samples,
            "config": self.config,
            "args": dict(sorted(vars(args).items())),
            "tally": self.tally.state(),
            "global_batch": self.global_batch,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "data": self.data,
            "unreadable": dict(self.run.unreadable),
        }
        state |= {} if self.best is None else {"best_acc1": self.best}
        try:
            checkpoint.save(path or self.run.checkpoint, state, 1 if path else args.keep)
        except OSError as error:
            print0(
                f"warning: could not save {path or self.run.checkpoint} at update {self.step} ({error.strerror}); the run goes on, "
                f"the checkpoint before is untouched"
            )
            return False
        return True

    def interruptible(self, batches: Iterator[dict]) -> Iterator[dict]:
        """A rank's validation batches. Raises Stopped, on all ranks between two rounds, even if some have fewer batches."""
        batches = iter(batches)
        while True:
            batch = next(batches, None)
            stopping, going_on = self.ballot.any(stop.asked_by() != "", batch is not None)
            if stopping:
                raise stop.Stopped
            if batch is not None:
                yield batch
            elif not going_on:
                return

    @contextlib.contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Around the training loop: when it is stopped, save, leave a marker and end in good order. Raises UserError if it cannot save."""
        stop.begin_training()
        try:
            yield
            self.ballot.close()
        except stop.Stopped:
            self.ballot.close()
            if self.step > self.saved_at and not self.save():
                raise UserError(
                    f"stopped at update {self.step}, but the checkpoint could not be written: the run goes on from update "
                    f"{self.saved_at}; make room in {self.args.output_dir}"
                ) from None
            self.run.mark_preempted(self.step)
            print0(
                f"stopped at update {self.step} by {stop.asked_by() or 'a signal to another process'}; saved, and {self.run.marker} says so; "
                f"the same command goes on from here"
            )
        finally:
            stop.deafen()
