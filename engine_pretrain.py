"""Pretraining: the micro-step of masked reconstruction, and the run with its validations.

Shapes as in models_mae.py; R clips per video.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT
from util import dist, pictures
from util.args import make_schedule
from util.bad_files import BadFiles
from util.checkpointer import Checkpointer
from util.dist import DistEnv
from util.ema import weight_average
from util.files import RunFiles
from util.logger import RunLogger
from util.metrics import MetricSums
from util.optim import (
    amp_dtype,
    autocast,
    backward,
    make_optimizer,
    pretrain_param_groups,
)
from util.train_loop import train_one_epoch
from util.train_state import TrainState

METRICS = ("loss", "grad_norm")  # what `micro_step` returns; `apply_update` appends grad_norm


class Validation(NamedTuple):
    """An evaluation of the model on fixed samples."""

    batches: Callable[[], Iterator[dict]]  # this rank's share, on the device
    measure: Callable[[Iterator[dict]], dict[str, float]]  # call on every rank


class PretrainData(NamedTuple):
    """The data that pretrain.py builds."""

    dataset: torch.utils.data.Dataset  # the training clips, for pictures
    fingerprint: dict  # `dataset_fingerprint` of the training set
    updates_per_epoch: int
    batches: Callable[[int, int], Iterator[dict]]  # (epoch, updates done) -> the rest of it
    validations: list[Validation]


def micro_step(
    model: nn.Module,
    batch: dict,
    args: argparse.Namespace,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype,
) -> Tensor:
    """Run forward and backward of one batch of clips (B, R, C, T, H, W) uint8.

    Gradients accumulate. Returns the detached loss (1,).
    """
    clips = batch["clips"].flatten(0, 1)  # (B R, C, T, H, W)
    noise = batch["noise"].flatten(0, 1)  # (B R, L)
    with autocast(clips.device, amp):
        loss, _, _ = model(
            clips,
            args.mask_ratio,
            args.mask_type,
            noise,
            args.decoder_mask_ratio,
            args.decoder_mask_type,
        )
    backward(loss, scaler, args.accum_iter)
    return loss.detach()[None]


def train(
    args: argparse.Namespace,
    env: DistEnv,
    model: MaskedAutoencoderViT,
    data: PretrainData,
    resume_from: Path | None,
) -> None:
    """Pretrain the model, from a checkpoint of the run if there is one. Call on every rank."""
    checkpointer = start_run(args, env, model, data, resume_from)
    state = checkpointer.state
    logger = checkpointer.logger
    amp = amp_dtype(args.amp, env.device)
    if args.compile:
        model.compile_parts()
    wrapped = dist.wrap_ddp(model, env, static_graph=args.accum_iter == 1)

    def forward_backward(batch: dict, _index: int) -> Tensor:
        return micro_step(wrapped, batch, args, state.scaler, amp)

    with checkpointer.graceful_shutdown():
        while state.unfinished():
            epoch, updates_done = state.position()
            batches = data.batches(epoch, updates_done)
            record = train_one_epoch(
                wrapped, batches, forward_backward, checkpointer, args.log_every
            )
            record["unreadable_videos"] = checkpointer.bad_files.gather()
            last = state.is_last_step()
            if data.validations and (last or (epoch + 1) % args.val_every == 0):
                record |= validate(data.validations, checkpointer)
            if args.recon_every and (last or (epoch + 1) % args.recon_every == 0):
                picture = reconstructions(args, model, data)
                if picture is not None:
                    logger.log_image("recon", picture, epoch)
            checkpointer.end_epoch(record, args.checkpoint_period)
    logger.close()


def reconstructions(
    args: argparse.Namespace, model: MaskedAutoencoderViT, data: PretrainData
) -> Tensor | None:
    """Return a picture (3, H', W') uint8 of predictions on rank 0, None on other ranks."""
    if dist.rank() != 0:
        return None
    amp = amp_dtype(args.amp, next(model.parameters()).device)
    return pictures.training_picture(model, data.dataset, args.mask_ratio, args.mask_type, amp)


def start_run(
    args: argparse.Namespace,
    env: DistEnv,
    model: MaskedAutoencoderViT,
    data: PretrainData,
    resume_from: Path | None,
) -> Checkpointer:
    """Return the run's state with its log and checkpoints, resumed if there is a checkpoint."""
    state = new_state(args, env, model, data)
    logger = RunLogger(RunFiles(Path(args.output_dir), args.save_prefix))
    most_unreadable = args.max_bad_frac * data.fingerprint["samples"]
    checkpointer = Checkpointer(
        state=state,
        logger=logger,
        bad_files=BadFiles(logger.files.folder, limit=most_unreadable),
        keep=args.keep,
        every_steps=args.checkpoint_every_steps,
        every_minutes=args.checkpoint_every_minutes,
        sync_save=args.sync_save,
    )
    checkpointer.start(resume_from, args.force_resume)
    return checkpointer


def new_state(
    args: argparse.Namespace, env: DistEnv, model: MaskedAutoencoderViT, data: PretrainData
) -> TrainState:
    """Return the state of a new run."""
    groups = pretrain_param_groups(model, args.weight_decay, args.bias_wd)
    amp = amp_dtype(args.amp, env.device)
    global_batch = args.batch_size_per_gpu * args.accum_iter * env.world_size
    assert model.pixel_stats is not None  # set by the script
    mean, std = model.pixel_stats
    return TrainState(
        model=model,
        optimizer=make_optimizer(groups, model.parameters(), betas=(0.9, 0.95)),
        scaler=torch.amp.GradScaler(env.device.type, enabled=amp == torch.float16),
        schedule=make_schedule(args, env.world_size, {}, data.updates_per_epoch),
        metrics=MetricSums(METRICS, env.device, args.max_bad_steps),
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
        global_batch=global_batch,
        flops_per_clip=model.flops_per_clip(
            args.mask_ratio, args.mask_type, args.decoder_mask_ratio
        ),
        config=model.config | {"model": args.model, "mean": mean, "std": std},
        flags=vars(args),
        data=data.fingerprint,
        ema=weight_average(model, args.ema),
    )


def validate(validations: list[Validation], checkpointer: Checkpointer) -> dict[str, float]:
    """Run the validations; print and return their results. Call on every rank.

    Those of the EMA have the ending "_ema". Raises preemption.Stopped.
    """
    state = checkpointer.state
    results = measure(validations, checkpointer)
    if state.ema is not None:
        with state.ema.in_model():
            of_ema = measure(validations, checkpointer)
        results |= {f"{name}_ema": value for name, value in of_ema.items()}
    epoch, _ = state.position()
    values = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
    checkpointer.logger.print_epoch(f"epoch {epoch}: {values}", state.is_last_step())
    return results


def measure(validations: list[Validation], checkpointer: Checkpointer) -> dict[str, float]:
    """Return the results of the validations for the weights that are in the model.

    Call on every rank. Raises preemption.Stopped.
    """
    results: dict[str, float] = {}
    for validation in validations:
        batches = checkpointer.stop_between_batches(validation.batches())
        results |= validation.measure(batches)
    return results
