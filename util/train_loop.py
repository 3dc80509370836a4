"""The training loop of both engines: accumulation, learning rate, logging, saving, stopping."""

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.checkpointer import Checkpointer, reduce_metrics
from util.dist import settle_ddp_buckets, world_size
from util.logger import RunLogger
from util.metrics import throughput
from util.optim import set_learning_rate, update
from util.train_state import TrainState

MicroStep = Callable[[dict, int], Tensor]


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[dict],
    micro_step: MicroStep,
    checkpointer: Checkpointer,
    log_every: int,
) -> dict[str, float]:
    """Train until the end of the current epoch or of the run.

    model: plain, or wrapped in DDP.
    batches: the rest of the epoch, on the device.
    micro_step: (batch, index in the update) -> metrics (M,). Runs forward and backward of a batch;
        returns what `state.metrics` averages, detached, without the gradient norm.
    log_every: updates between log lines.

    The host waits for the device only to log and to save. Returns the epoch's record: means over
    all ranks; a resumed epoch includes its earlier part. Raises preemption.Stopped.
    """
    model.train()
    state = checkpointer.state
    last_step = state.end_of_epoch()
    state.wait_timer.resume()
    values: list[Tensor] = []  # of the current update's micro-steps
    replaced: list[Tensor] = []
    paths: list[str] = []
    for index, batch in enumerate(batches):
        state.wait_timer.end_wait()
        checkpointer.bad_files.add_batch(batch)
        index_in_update = index % state.accum_iter
        ends_update = index_in_update == state.accum_iter - 1
        if index == 0 and state.step == state.start_step:  # the first of this process
            settle_ddp_buckets(model, functools.partial(micro_step, batch, 0))
        with gradient_sync(model, enabled=ends_update):
            values.append(micro_step(batch, index_in_update))
        replaced.append(batch["replaced"].sum())
        paths += batch["paths"]
        if ends_update:
            apply_update(state, values, replaced, paths)
            clips = state.accum_iter * batch["clips"].shape[:2].numel()
            finish_update(checkpointer, clips, log_every)
            values, replaced, paths = [], [], []
        state.wait_timer.begin_wait()
        if state.step == last_step:
            break  # without waiting for a batch of the next epoch
    return epoch_record(state)


def apply_update(
    state: TrainState, values: list[Tensor], replaced: list[Tensor], paths: list[str]
) -> None:
    """Step the optimizer, update the EMA, add the metrics, all without waiting for the device.

    values: each micro-step's metrics (M,). replaced: each micro-step's number of undecodable
    frames. paths: the files of all micro-steps.
    """
    set_learning_rate(state.optimizer, state.schedule.learning_rate(state.step))
    grad_norm, skipped = update(state.optimizer, state.scaler, state.clip_grad)
    if state.ema is not None:
        state.ema.update(skipped)
    # added one by one: another order would change the last bits of the log
    means = torch.cat([sum(values[1:], values[0]) / state.accum_iter, grad_norm[None]])
    state.metrics.add(means, skipped, sum(replaced[1:], replaced[0]), paths)


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Return a context in which DDP all-reduces gradients only if enabled."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def finish_update(checkpointer: Checkpointer, clips: int, log_every: int) -> None:
    """Count an update; log, save or stop when due. Call on every rank.

    clips: number of clips of the update on this rank. Raises preemption.Stopped.
    """
    state = checkpointer.state
    logger = checkpointer.logger
    state.step += 1
    state.samples_consumed += state.global_batch
    ends_epoch = state.step % state.schedule.steps_per_epoch == 0
    log_due = state.step % log_every == 0 or state.is_last_step()
    if log_due or ends_epoch:
        reduce_metrics(state, logger)
    if log_due or (ends_epoch and logger.was_quiet_long()):
        log_progress(state, logger, clips)
    if ends_epoch:
        state.wait_timer.pause()
    checkpointer.save_or_stop_if_due()


def log_progress(state: TrainState, logger: RunLogger, clips: int) -> None:
    """Log the means since the last line. clips: of the last update on this rank."""
    schedule = state.schedule
    line = state.metrics.pop_line()
    values = line.means()
    if line.skipped:
        values["skipped"] = int(line.skipped)
    if line.replaced_frames:
        values["replaced"] = int(line.replaced_frames)
    values["lr"] = state.last_learning_rate()
    seconds, data_wait = state.wait_timer.read()
    clips_since_line = (state.step - state.last_logged_step) * clips * world_size()
    state.last_logged_step = state.step
    rates = throughput(clips_since_line, seconds, state.flops_per_clip, state.metrics.device)
    rates["data_wait"] = data_wait
    epoch = state.step / schedule.steps_per_epoch
    logger.log_step(state.step, schedule.total_steps, epoch, values, rates)


def epoch_record(state: TrainState) -> dict[str, float]:
    """Return the epoch's means and its counts of skipped updates and replaced frames."""
    sums = state.metrics.epoch
    means = sums.means()
    grad_norm = means.pop("grad_norm")
    record = {f"train_{name}": mean for name, mean in means.items()}
    return record | {
        "train_lr": state.last_learning_rate(),
        "train_grad_norm": grad_norm,
        "skipped_steps": int(sums.skipped),
        "replaced_frames": int(sums.replaced_frames),
    }
