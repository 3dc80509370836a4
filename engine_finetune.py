"""Classification: one epoch of training, exact evaluation, and `run`, the loop that both finetuning scripts share.

Shapes as in models_vit.py; R clips per video (repeats in training, views in evaluation), n videos, K classes.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from data.transforms import erase, mixer, normalize, sample_seed
from engine_eval import features, in_full_batches, in_order
from models_vit import VisionTransformer, named_size
from util import checkpoint, dist, importer, stop
from util.args import effective_lr
from util.dist import Place, UserError, print0
from util.optim import (
    Plan,
    amp_dtype,
    backward,
    finetune_groups,
    make_optimizer,
    set_learning_rate,
    update,
)
from util.saver import Saver
from util.tracking import Run, Tally, say_versions

SUMS = ("loss", "acc1", "grad_norm")


class Task(NamedTuple):
    """What a finetuning script hands over."""

    classes: list[str]
    val_paths: list[str]
    val_batches: Callable[[], Iterator[dict]]  # this rank's share, on the device
    views: int  # clips per sample in evaluation
    val_labels: list[int] = []  # class numbers, -1 for none: for --extract_features
    still_frames: int = (
        1  # for images: how many frames each is shown; 1: the model sees a single frame
    )
    data: dict | None = (
        None  # `util.saver.digest` of the training set; these four are not needed for --eval
    )
    updates_per_epoch: int = 0
    train_batches: Callable[[int, int], Iterator[dict]] | None = (
        None  # (epoch, updates already done in it) -> the rest of its batches
    )
    repeats: int = 1  # clips per sample in training


class Scores(NamedTuple):
    """An evaluation: totals, and per sample (in the order of the validation set) label, loss and best classes."""

    loss: float
    acc1: float  # percent
    acc5: float
    labels: Tensor  # (n,)
    top: Tensor  # (n, min(5, K)) classes, best first
    top_scores: Tensor  # (n, min(5, K)) probabilities


class Recipe:
    """From a batch to the model's input and targets: normalisation, erasing, MixUp, CutMix, one-hot targets."""

    def __init__(self, args, config: dict, still_frames: int):
        self.args, self.config, self.still_frames = args, config, still_frames
        self.mixes = args.mixup > 0 or args.cutmix > 0
        self.mix = mixer(args.mixup, args.cutmix, args.mixup_prob, config["num_classes"])
        self.plain = mixer(0, 0, 0, config["num_classes"])

    def __call__(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(B, R, C, T, H, W) uint8 -> (R B, C, T, H, W) float and targets (R B, K). Repeats lie B apart, so that the
        neighbour that a clip is mixed with is always of another video; a batch of one video is not mixed."""
        args, (videos, repeats) = self.args, batch["clips"].shape[:2]
        clips = normalize(
            batch["clips"].transpose(0, 1).flatten(0, 1), self.config["mean"], self.config["std"]
        )
        if args.rand_aug and args.reprob:
            erase(clips, args.reprob, args.remode, args.recount)
        clips, targets = (self.mix if self.mixes and videos > 1 else self.plain)(
            clips, batch["labels"].repeat(repeats)
        )
        return hold(clips, self.still_frames), targets


def hold(clips: Tensor, frames: int) -> Tensor:
    """Clips of one frame (B, C, 1, H, W) shown for `frames` frames, without copying; other clips as they are."""
    return clips.expand(-1, -1, frames, -1, -1) if clips.shape[2] == 1 else clips


def micro_step(
    model: nn.Module, batch: dict, recipe: Recipe, scaler, args, amp: torch.dtype
) -> Tensor:
    """Forward and backward of one batch of clips (B, R, C, T, H, W) uint8: loss and top-1 in percent (2,); gradients add up."""
    clips, targets = recipe(batch)
    with torch.autocast(clips.device.type, amp, enabled=amp != torch.float32):
        logits = model(clips)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
    backward(loss, scaler, args.accum_iter)
    right = (logits.detach().argmax(1) == targets.argmax(1)).float().mean() * 100
    return torch.stack([loss.detach(), right])


def train_one_epoch(
    model: nn.Module,
    batches,
    optimizer,
    scaler,
    args,
    plan: Plan,
    recipe: Recipe,
    run: Run,
    place: Place,
    saver: Saver,
) -> dict:
    """Train from the update that `saver` is at to the end of its epoch, or of the run; as engine_pretrain.train_one_epoch, for classes.

    Returns the epoch's means over all ranks: train_loss, train_acc1 (percent; of mixed clips, the heavier class), train_lr,
    train_grad_norm, and the numbers of skipped_steps and replaced_frames. Raises Stopped.
    """
    model.train()
    tally, (clock, last) = saver.tally, saver.begin_epoch()
    window, replaced, files = (
        torch.zeros(2, device=place.device),
        torch.zeros((), device=place.device),
        [],
    )
    for micro, batch in enumerate(batches if saver.step < last else (), 1):
        clock.start()
        run.check_batch(batch, plan.bad_limit)
        closing = micro % args.accum_iter == 0
        if (micro - 1) % args.accum_iter == 0:
            set_learning_rate(optimizer, plan.learning_rate(saver.step, args))
        if micro == 1 and saver.step == saver.first:
            dist.warm_up(
                model, lambda batch=batch: micro_step(model, batch, recipe, scaler, args, plan.amp)
            )
        torch.manual_seed(
            sample_seed(
                args.seed,
                saver.step * args.accum_iter + (micro - 1) % args.accum_iter,
                place.rank,
                4,
            )
        )
        with contextlib.nullcontext() if closing or place.world_size == 1 else model.no_sync():
            window = (
                window + micro_step(model, batch, recipe, scaler, args, plan.amp) / args.accum_iter
            )
        replaced, files = replaced + batch["replaced"].sum(), files + batch["paths"]
        if closing:
            norm, skipped = update(optimizer, scaler, args.clip_grad)
            tally.add(torch.cat([window, norm[None]]), skipped, replaced, files)
            window, replaced, files = torch.zeros_like(window), torch.zeros_like(replaced), []
            saver.after_update(args.accum_iter * batch["clips"].shape[:2].numel())
        clock.stop()
        if saver.step == last:
            break
    means = tally.means("epoch")
    return {
        "train_loss": means["loss"],
        "train_acc1": means["acc1"],
        "train_lr": plan.learning_rate(saver.step - 1, args),
        "train_grad_norm": means["grad_norm"],
        "skipped_steps": means["skipped"],
        "replaced_frames": means["replaced"],
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, batches, size: int, config: dict, amp: torch.dtype, still_frames: int = 1
) -> Scores:
    """Every sample exactly once over all ranks; the probabilities of a sample's views are averaged.

    model: unwrapped. It always sees `size` clips at a time (the last ones filled up), so that a
    sample's scores depend neither on its neighbours nor on the number of ranks. Raises UserError for an unreadable file.
    """
    model.eval()
    rows = []

    def logits_of(clips: Tensor, _index: Tensor) -> Tensor:
        with torch.autocast(clips.device.type, amp, enabled=amp != torch.float32):
            return model(
                hold(normalize(clips, config["mean"], config["std"]), still_frames)
            ).float()

    for batch, logits in in_full_batches(batches, size, logits_of):
        probabilities = logits.softmax(2).mean(1)  # (B, K)
        scores, classes = probabilities.topk(min(5, probabilities.shape[1]))
        losses = -probabilities.gather(1, batch["labels"][:, None]).clamp(min=1e-30).log()
        rows.append(
            torch.cat(
                [
                    batch["index"][:, None].double(),
                    batch["labels"][:, None],
                    losses,
                    classes,
                    scores,
                ],
                dim=1,
            ).cpu()
        )
    table = in_order(rows)
    best = (table.shape[1] - 2) // 2
    labels, top = table[:, 0].long(), table[:, 2 : 2 + best].long()
    hits = top == labels[:, None]
    acc1, acc5 = (100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5))
    return Scores(table[:, 1].mean().item(), acc1, acc5, labels, top, table[:, 2 + best :])


def confusion_picture(scores: Scores, classes: list[str], num_classes: int) -> Tensor:
    """The confusion matrix as a picture (3, H', W') uint8: rows true classes, columns predictions, blue = share of the row.

    Up to 40 classes are named, and their shares written in percent.
    """
    counts = torch.zeros(num_classes, num_classes).index_put_(
        (scores.labels, scores.top[:, 0]), torch.ones(len(scores.labels)), accumulate=True
    )
    counts = counts[: len(classes), : max(len(classes), int(scores.top[:, 0].max()) + 1)]
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    cell, left, top = (36, 200, 24) if len(classes) <= 40 else (max(1, 1200 // num_classes), 0, 0)
    low, high = torch.tensor([255.0, 255.0, 255.0]), torch.tensor([8.0, 48.0, 107.0])
    colours = (
        (low + share[..., None] * (high - low))
        .to(torch.uint8)
        .repeat_interleave(cell, 0)
        .repeat_interleave(cell, 1)
    )
    picture = Image.new("RGB", (left + colours.shape[1], top + colours.shape[0]), "white")
    picture.paste(Image.fromarray(colours.numpy()), (left, top))
    if left:
        draw = ImageDraw.Draw(picture)
        for row, name in enumerate(classes):
            draw.text(
                (left - 6, top + cell * (row + 0.5)),
                f"{name[:24]}  {row}",
                fill="black",
                anchor="rm",
            )
            for column, part in enumerate(share[row].tolist()):
                ink = "white" if part > 0.5 else "black"
                draw.text(
                    (left + cell * (column + 0.5), top + cell * (row + 0.5)),
                    f"{100 * part:.0f}" if part else "",
                    fill=ink,
                    anchor="mm",
                )
        for column in range(share.shape[1]):
            draw.text(
                (left + cell * (column + 0.5), top / 2), str(column), fill="black", anchor="mm"
            )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def report(scores: Scores, task: Task, num_classes: int, run: Run, epoch: int) -> None:
    """Write predictions, accuracy per class and the confusion matrix."""
    names, best = task.classes, range(scores.top.shape[1])
    predictions = {"path": task.val_paths, "label": [names[label] for label in scores.labels]}
    for place in best:
        predictions[f"top{place + 1}"] = [
            names[label] if label < len(names) else str(int(label))
            for label in scores.top[:, place]
        ]
        predictions[f"score{place + 1}"] = [
            f"{score:.6f}" for score in scores.top_scores[:, place].tolist()
        ]
    run.table("predictions", predictions)
    right = (scores.top[:, 0] == scores.labels).numpy()
    labels = scores.labels.numpy()
    counts = np.bincount(labels, minlength=len(names))
    hits = np.bincount(labels, weights=right, minlength=len(names))
    accuracy = [
        f"{100 * hit / count:.2f}" if count else "" for hit, count in zip(hits, counts, strict=True)
    ]
    run.table("classes", {"class": names, "samples": counts.tolist(), "acc1": accuracy})
    run.picture("confusion", confusion_picture(scores, names, num_classes), epoch, numbered=False)


def test(args, place: Place, model: nn.Module, config: dict, task: Task, path: Path) -> Scores:
    """--eval: the validation set by the weights of a checkpoint, every view that the flags ask for."""
    checkpoint.load_strictly(path, model, config)
    if args.compile:
        model.compile_parts()
    scores = evaluate(
        model,
        task.val_batches(),
        args.batch_size_per_gpu,
        config,
        amp_dtype(args.amp, place.device),
        task.still_frames,
    )
    files = Run(args, "_test")
    files.begin()
    report(scores, task, config["num_classes"], files, 0)
    files.close()
    print0(
        f"top-1 {scores.acc1:.2f} %  top-5 {scores.acc5:.2f} %  loss {scores.loss:.4f}  ({len(scores.labels)} samples, {task.views} views each)"
    )
    return scores


def extract(
    args, place: Place, model: VisionTransformer, config: dict, task: Task, path: Path | None
) -> None:
    """--extract_features: the validation set's pooled features, what enters the head, as {prefix}_features.npz: features (n, D)
    float32, labels (n,) int64 (-1: none), paths (n,), classes (the names of the labels). The same file on any number of ranks.

    The weights are those of the checkpoint, head included; where there is none, the encoder of --finetune.
    """
    if path:  # else `build_model` has read --finetune
        checkpoint.load_strictly(path, model, config)
    model.eval()

    def pooled(clips: Tensor) -> Tensor:
        return model.forward_features(
            hold(normalize(clips, config["mean"], config["std"]), task.still_frames)
        )

    values = features(
        pooled, task.val_batches(), args.batch_size_per_gpu, amp_dtype(args.amp, place.device)
    ).numpy()
    target = Path(args.output_dir, f"{args.save_prefix}_features.npz")
    if place.rank == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            features=values,
            labels=np.array(task.val_labels, np.int64),
            paths=np.array(task.val_paths),
            classes=np.array(task.classes, str),
        )
        os.replace(temporary, target)
    print0(
        f"wrote {target}: features {values.shape[0]} x {values.shape[1]}, {len(task.classes)} classes"
    )


def prepare(args) -> tuple[Place, Path | None, dict | None]:
    """What both finetuning scripts begin with: this process's place, the checkpoint that it evaluates or goes on from, and its config, if any."""
    place = dist.setup(args.device, args.deterministic)
    only_reads = args.eval or args.extract_features
    stop.listen() if not only_reads else None
    say_versions()
    args.compile = place.device.type == "cuda" if args.compile is None else args.compile
    path = dist.on_rank0(
        lambda: checkpoint.find_eval(args) if only_reads else checkpoint.find_resume(args)
    )
    return place, path, dist.on_rank0(lambda: checkpoint.known_config(path))


def work(args, place: Place, model: nn.Module, config: dict, task: Task, path: Path | None) -> None:
    """What the flags ask for: training, --eval or --extract_features."""
    job = extract if args.extract_features else test if args.eval else run
    job(args, place, model, config, task, path)


def build_model(args, device: torch.device, known: dict | None) -> VisionTransformer:
    """The classifier that the flags describe, initialised from --seed and then from --finetune, on the device.

    known: the config of the checkpoint that the run goes on from or evaluates: no --finetune then. model.config says the
    mean and std of the pixels that the weights were trained on, where one of the two does.
    """
    torch.manual_seed(sample_seed(args.seed))
    try:
        model = VisionTransformer(
            **named_size(args.model, args.patch_size),
            img_size=args.img_size,
            num_frames=args.num_frames,
            t_patch_size=args.t_patch_size,
            num_classes=args.num_classes,
            dropout=args.dropout,
            drop_path_rate=0.0 if args.freeze_backbone else args.drop_path_rate,
            global_pool=args.global_pool,
            sep_pos_embed=args.sep_pos_embed,
            cls_embed=args.cls_embed,
            no_qkv_bias=args.no_qkv_bias,
            attn=args.attn,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not args.freeze_backbone or name.startswith("head.")
    model.activation_checkpointing = args.activation_checkpointing
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(
        f"model {args.model}: {trained / 1e6:.1f} M parameters to train, {model.num_tokens} tokens per clip"
    )
    if known:
        model.config |= {key: known[key] for key in ("mean", "std") if key in known}
    elif args.finetune:
        importer.load_pretrained(args.finetune, model)
    return model.to(device)


def run(
    args, place: Place, model: nn.Module, config: dict, task: Task, path: Path | None
) -> Scores | None:
    """Train, and validate after each epoch. Returns the last validation (None: the run was complete already, or was stopped).

    path: the checkpoint that it goes on from, if any. `{prefix}_best.pth` and the tables are those of the best top-1.
    """
    lr = effective_lr(
        args, place.world_size, {"repeat_aug": task.repeats} if task.repeats > 1 else {}
    )
    amp = amp_dtype(args.amp, place.device)
    total_steps = args.max_steps or args.epochs * task.updates_per_epoch
    plan = Plan(
        lr,
        task.updates_per_epoch,
        total_steps,
        amp,
        args.max_bad_frac * task.data["samples"],
        model.flops_per_clip(),
    )
    optimizer = make_optimizer(
        finetune_groups(model, config["depth"], args.weight_decay, args.layer_decay),
        model.parameters(),
        (0.9, 0.999),
    )
    scaler = torch.amp.GradScaler(place.device.type, enabled=amp == torch.float16)
    files, tally, scores = Run(args), Tally(SUMS, place.device), None
    saver = Saver(args, model, optimizer, scaler, plan, config, task.data, tally, files, best=-1.0)
    saver.resume(path)
    if args.compile:
        model.compile_parts()
    wrapped, recipe = (
        dist.wrap(model, place, static_graph=args.accum_iter == 1),
        Recipe(args, config, task.still_frames),
    )
    with saver.until_stopped():
        while saver.unfinished():
            epoch, done = saver.position()
            record = train_one_epoch(
                wrapped,
                task.train_batches(epoch, done),
                optimizer,
                scaler,
                args,
                plan,
                recipe,
                files,
                place,
                saver,
            )
            batches = saver.interruptible(task.val_batches())
            scores = evaluate(
                model, batches, args.batch_size_per_gpu, config, amp, task.still_frames
            )
            best, saver.best = saver.best, max(saver.best, scores.acc1)
            files.epoch_line(
                f"epoch {epoch}: train top-1 {record['train_acc1']:.2f} %, validation top-1 {scores.acc1:.2f} % (best {saver.best:.2f} %), "
                f"top-5 {scores.acc5:.2f} %, loss {scores.loss:.4f}, {len(scores.labels)} samples",
                last=saver.step >= plan.total_steps,
            )
            if scores.acc1 > best:
                report(scores, task, config["num_classes"], files, epoch)
                saver.best = (
                    saver.best if saver.save(epoch, files.best) else best
                )  # not written: the next best one is
            record |= {"test_loss": scores.loss, "test_acc1": scores.acc1, "test_acc5": scores.acc5}
            saver.close_epoch(record | {"unreadable_samples": files.gather_unreadable()})
    files.close()
    return scores
