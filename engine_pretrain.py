"""One epoch of masked reconstruction. Shapes as in models_mae.py; R clips per video."""

import contextlib

import torch
from torch import Tensor, nn

from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize
from util.dist import Place, sum_over_ranks
from util.optim import Plan, set_learning_rate, update
from util.tracking import Run, StallClock


def micro_step(model: nn.Module, batch: dict, scaler, args, amp: torch.dtype) -> Tensor:
    """Forward and backward of one batch of clips (B, R, C, T, H, W) uint8: the detached loss; gradients add up."""
    clips, noise = batch["clips"].flatten(0, 1), batch["noise"].flatten(0, 1)  # (B R, C, T, H, W), (B R, L)
    clips = normalize(clips, VIDEO_MEAN, VIDEO_STD)
    with torch.autocast(clips.device.type, amp, enabled=amp != torch.float32):
        loss, _, _ = model(clips, args.mask_ratio, args.mask_type, noise)
    scaler.scale(loss / args.accum_iter).backward()
    return loss.detach()


def train_one_epoch(model: nn.Module, batches, optimizer, scaler, args, plan: Plan, run: Run, place: Place, step: int) -> tuple[int, dict]:
    """Train from update `step` to the end of its epoch, or of the run.

    batches: the rest of the epoch's loader batches, on the device; model: plain or wrapped in DDP. The host waits for the
    device at logging updates only (every --log_every). Returns the updates done so far in the run, and the epoch's means
    over all ranks: train_loss, train_lr, train_grad_norm, and the number of skipped_steps.
    """
    model.train()
    clock, device, world_size = StallClock(place.device), place.device, place.world_size
    totals = torch.zeros(3, dtype=torch.float64)  # loss, gradient norm, skipped updates: of the epoch
    sums, loss = torch.zeros(3, device=device), torch.zeros((), device=device)
    streak = torch.full((1,), float(run.skipped_in_a_row), device=device)
    first, logged, last = step, step, min((step // plan.steps_per_epoch + 1) * plan.steps_per_epoch, plan.total_steps)
    for micro, batch in enumerate(batches, 1):
        clock.start()
        run.check_batch(batch, plan.bad_limit)
        opening, closing = (micro - 1) % args.accum_iter == 0, micro % args.accum_iter == 0
        if opening:
            lr = plan.learning_rate(step, args)
            set_learning_rate(optimizer, lr)
        with contextlib.nullcontext() if closing or world_size == 1 else model.no_sync():
            loss = loss + micro_step(model, batch, scaler, args, plan.amp)
        if closing:
            norm, skipped = update(optimizer, scaler, args.clip_grad)
            sums += torch.stack([loss / args.accum_iter, norm, skipped]).where(skipped == 0, skipped.new_tensor([0.0, 0.0, 1.0]))
            streak = (streak + 1) * skipped
            loss = torch.zeros((), device=device)
            step += 1
        clock.stop()
        if closing and (step % args.log_every == 0 or step == last):
            *sums_read, run.skipped_in_a_row = (sum_over_ranks(torch.cat([sums, streak])) / world_size).tolist()  # waits for the device
            totals += torch.tensor(sums_read)
            run.check_streak(args.max_bad_steps, step)
            used = max(step - logged - sums_read[2], 1)
            values = {"loss": sums_read[0] / used, "lr": lr, "grad_norm": sums_read[1] / used, "skipped": int(sums_read[2])}
            clips = (step - logged) * args.accum_iter * batch["noise"].shape[:2].numel() * world_size
            run.progress(step, plan, values, clips, clock, device)
            sums.zero_()
            logged = step
        if step == last:
            break
    used = max(step - first - int(totals[2]), 1)
    means = {"train_loss": float(totals[0]) / used, "train_lr": lr, "train_grad_norm": float(totals[1]) / used}
    return step, means | {"skipped_steps": int(totals[2])}
