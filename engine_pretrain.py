"""One epoch of masked reconstruction. Shapes as in models_mae.py; R clips per video."""

import contextlib

import torch
from torch import Tensor, nn

from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize
from util.dist import Place, warm_up
from util.optim import Plan, backward, set_learning_rate, update
from util.saver import Saver
from util.tracking import Run

SUMS = ("loss", "grad_norm")


def micro_step(model: nn.Module, batch: dict, scaler, args, amp: torch.dtype) -> Tensor:
    """Forward and backward of one batch of clips (B, R, C, T, H, W) uint8: the detached loss; gradients add up."""
    clips, noise = (
        batch["clips"].flatten(0, 1),
        batch["noise"].flatten(0, 1),
    )  # (B R, C, T, H, W), (B R, L)
    clips = normalize(clips, VIDEO_MEAN, VIDEO_STD)
    with torch.autocast(clips.device.type, amp, enabled=amp != torch.float32):
        loss, _, _ = model(clips, args.mask_ratio, args.mask_type, noise)
    backward(loss, scaler, args.accum_iter)
    return loss.detach()


def train_one_epoch(
    model: nn.Module,
    batches,
    optimizer,
    scaler,
    args,
    plan: Plan,
    run: Run,
    place: Place,
    saver: Saver,
) -> dict:
    """Train from the update that `saver` is at to the end of its epoch, or of the run.

    batches: the rest of the epoch's loader batches, on the device; model: plain or wrapped in DDP. The host waits for the
    device at logging updates (every --log_every) and when saving only. Returns the epoch's means over all ranks, interruptions
    included: train_loss, train_lr, train_grad_norm, and the numbers of skipped_steps and replaced_frames. Raises Stopped.
    """
    model.train()
    tally, (clock, last) = saver.tally, saver.begin_epoch()
    loss, replaced, files = (
        torch.zeros((), device=place.device),
        torch.zeros((), device=place.device),
        [],
    )
    for micro, batch in enumerate(batches if saver.step < last else (), 1):
        clock.start()
        run.check_batch(batch, plan.bad_limit)
        opening, closing = (micro - 1) % args.accum_iter == 0, micro % args.accum_iter == 0
        if micro == 1 and saver.step == saver.first:
            warm_up(model, lambda batch=batch: micro_step(model, batch, scaler, args, plan.amp))
        if opening:
            set_learning_rate(optimizer, plan.learning_rate(saver.step, args))
        with contextlib.nullcontext() if closing or place.world_size == 1 else model.no_sync():
            loss = loss + micro_step(model, batch, scaler, args, plan.amp)
        replaced, files = replaced + batch["replaced"].sum(), files + batch["paths"]
        if closing:
            norm, skipped = update(optimizer, scaler, args.clip_grad)
            tally.add(torch.stack([loss / args.accum_iter, norm]), skipped, replaced, files)
            loss, replaced, files = torch.zeros_like(loss), torch.zeros_like(replaced), []
            saver.after_update(args.accum_iter * batch["noise"].shape[:2].numel())
        clock.stop()
        if saver.step == last:
            break
    means = tally.means("epoch")
    return {
        "train_loss": means["loss"],
        "train_lr": plan.learning_rate(saver.step - 1, args),
        "train_grad_norm": means["grad_norm"],
        "skipped_steps": means["skipped"],
        "replaced_frames": means["replaced"],
    }
