"""Classification: one micro-step, the training run, and the evaluation of a checkpoint.

Both finetuning scripts use it. Shapes as in models_vit.py; R clips per sample (repeats in training,
views in evaluation), n samples, K classes.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.transforms import make_mixup, random_erasing_
from models_vit import VisionTransformer, normalize
from util import checkpoint, dist, pictures, preemption, resume, same_run
from util.args import (
    ScriptParser,
    apply_system_flags,
    make_schedule,
    parse,
    probe_schedule,
    resolve_compile,
    resolve_probe,
)
from util.bad_files import BadFiles
from util.checkpointer import Checkpointer
from util.class_names import class_list, names_or_numbers, read_class_names
from util.dist import DistEnv, UserError, print0
from util.ema import WeightAverage, has_ema, weight_average
from util.evaluation import Scores, evaluate, evaluate_heads
from util.files import RunFiles, span_columns
from util.frozen_features import (
    FeatureTable,
    FrozenEncoder,
    batch_to,
    collect_features,
    table_batches,
    with_progress,
)
from util.logger import RunLogger, print_versions
from util.metrics import MetricSums
from util.model_flags import Start, find_start
from util.model_source import ModelSource
from util.optim import (
    amp_dtype,
    autocast,
    backward,
    finetune_param_groups,
    make_optimizer,
)
from util.pretrained import load_pretrained
from util.probe_heads import ProbeHeads, probe_param_groups
from util.seeds import DROPOUT_STREAM, derive_seed
from util.train_loop import MicroStep, train_one_epoch
from util.train_state import TrainState

# `micro_step` returns the first two; `apply_update` appends grad_norm.
METRICS = ("loss", "acc1", "grad_norm")
HEAD_PREFIX = "test_lr"  # with the learning rate, the name of the scores of a probe's head


class Split(NamedTuple):
    """The training or validation samples, as `Samples` in data/manifest.py but with indices."""

    paths: list[str]
    labels: list[int]  # class indices
    spans: np.ndarray | None = None  # (n, 2) seconds, None: whole files


class EvalData(NamedTuple):
    """The samples that a finetuning script evaluates."""

    classes: list[str]
    samples: Split
    batches: Callable[[], Iterator[dict]]  # this rank's share, on the device
    views: int  # clips per sample
    still_frames: int = 1  # repeat each image to this many frames


class TrainData(NamedTuple):
    """The samples that a finetuning script trains on."""

    fingerprint: dict  # `dataset_fingerprint` of the training set
    paths: list[str]
    updates_per_epoch: int
    batches: Callable[[int, int], Iterator[dict]]  # (epoch, updates done) -> the rest of it
    repeats: int = 1  # clips per sample
    # With --probe: this rank's share of the samples, one center view each
    views: Callable[[], Iterator[dict]] | None = None
    # (epoch, updates done) -> indices of this rank's micro-batches in the rest of the epoch
    order: Callable[[int, int], list[list[int]]] | None = None


class Work(NamedTuple):
    """What a run does in each epoch: train a part of the model, then validate."""

    trained: nn.Module  # plain, or wrapped in DDP
    batches: Callable[[int, int], Iterator[dict]]  # as in TrainData
    micro_step: MicroStep
    # "test" -> scores, and those of the EMA or of each head; call on every rank; may raise Stopped
    validate: Callable[[], dict[str, Scores]]


class ProbeFeatures(NamedTuple):
    """Batches of a probe, on the device."""

    are_kept: bool  # training batches have features in place of clips
    training: Callable[[int, int], Iterator[dict]]  # as in TrainData
    validation: Callable[[], Iterator[dict]]  # features (B, R, ...) in place of clips


class BatchTransform:
    """Turns a batch into inputs and targets: normalization, erasing, MixUp, CutMix, one-hot."""

    def __init__(self, args: argparse.Namespace, config: dict, still_frames: int):
        """Read the flags; config has the pixels' mean and std and the number of classes."""
        num_classes = config["num_classes"]
        self.mean = config["mean"]
        self.std = config["std"]
        self.still_frames = still_frames
        self.erases = args.rand_aug and args.reprob > 0
        self.erasing = (args.reprob, args.remode, args.recount)
        self.mixes = args.mixup > 0 or args.cutmix > 0
        self.mix = make_mixup(args.mixup, args.cutmix, args.mixup_prob, num_classes)
        self.one_hot = make_mixup(0, 0, 0, num_classes)

    def __call__(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Return clips (R B, C, T, H, W) float and targets (R B, K) of (B, R, C, T, H, W) uint8.

        Repeats of a video are B rows apart: MixUp pairs clips of different videos. A batch of one
        video is not mixed.
        """
        videos, repeats = batch["clips"].shape[:2]
        clips = batch["clips"].transpose(0, 1).flatten(0, 1)  # (R B, C, T, H, W)
        clips = normalize(clips, self.mean, self.std)
        labels = batch["labels"].repeat(repeats)  # (R B,)
        if self.erases:
            random_erasing_(clips, *self.erasing)
        if self.mixes and videos > 1:
            clips, targets = self.mix(clips, labels)
        else:
            clips, targets = self.one_hot(clips, labels)
        return expand_static(clips, self.still_frames), targets


def expand_static(clips: Tensor, num_frames: int) -> Tensor:
    """Repeat clips of one frame (B, C, 1, H, W) without copying; return others as they are."""
    if clips.shape[2] != 1:
        return clips
    return clips.expand(-1, -1, num_frames, -1, -1)


def model_input(clips: Tensor, config: dict, still_frames: int) -> Tensor:
    """Return uint8 clips normalized by the config's mean and std, images repeated."""
    return expand_static(normalize(clips, config["mean"], config["std"]), still_frames)


def micro_step(
    model: nn.Module,
    clips: Tensor,
    targets: Tensor,
    args: argparse.Namespace,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype,
) -> Tensor:
    """Run forward and backward of clips (B, C, T, H, W) float with targets (B, K).

    Gradients accumulate. Returns the detached loss and top-1 in percent (2,).
    """
    with autocast(clips.device, amp):
        logits = model(clips)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
    backward(loss, scaler, args.accum_iter)
    correct = logits.detach().argmax(1) == targets.argmax(1)
    return torch.stack([loss.detach(), 100 * correct.float().mean()])


def heads_micro_step(
    heads: nn.Module,
    features: Tensor,
    targets: Tensor,
    args: argparse.Namespace,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype,
) -> Tensor:
    """Run forward and backward of H heads on features (B, ...) with targets (B, K).

    The losses are summed, so that each head's gradients are those of its own loss. Returns the
    means over the heads of the detached loss and top-1 in percent (2,).
    """
    with autocast(features.device, amp):
        logits = heads(features)  # (B, H, K)
    losses = [
        F.cross_entropy(per_head, targets, label_smoothing=args.smoothing)
        for per_head in logits.float().unbind(1)
    ]
    loss = torch.stack(losses)
    backward(loss.sum(), scaler, args.accum_iter)
    correct = logits.detach().argmax(2) == targets.argmax(1)[:, None]
    return torch.stack([loss.detach().mean(), 100 * correct.float().mean()])


def setup(
    parser: ScriptParser, argv: list[str] | None
) -> tuple[argparse.Namespace, DistEnv, Start, list[str] | None]:
    """Set up either finetuning script, from its command line (None: sys.argv).

    Returns the flags, completed by the checkpoint that the run starts from; this process's
    environment; where the run starts; and the class names that the checkpoint or --class_names has,
    if there is one.
    """
    args, given = parse(parser, argv)
    resolve_probe(args, given)
    env = dist.setup(args.device, args.deterministic)
    same_run.compare_commands(vars(args))
    if not args.eval:
        preemption.install_signal_handlers()
    print_versions()
    resolve_compile(args, env.device)
    start = find_start(args, given, args.finetune)
    check_same_probe(args, start)
    return args, env, start, dist.on_rank0(lambda: known_classes(args, start))


def check_same_probe(args: argparse.Namespace, start: Start) -> None:
    """Raise UserError if --probe is not that of the run to resume. Print a note from scratch."""
    if args.eval:
        return
    if args.probe and start.source is None:
        print0("note: --probe without --finetune reads an encoder that was never trained")
    if start.path is None or start.source is None:
        return
    recorded = start.source.flags.get("probe", "")
    if recorded != args.probe:
        raise UserError(
            f"{start.path} is of a run with --probe {recorded or repr('')}, not "
            f"{args.probe or repr('')}. Use the flags of that run, or another --save_prefix."
        )


def known_classes(args: argparse.Namespace, start: Start) -> list[str] | None:
    """Return the class names of the checkpoint that is resumed or evaluated, or of --class_names.

    Return None if a new run has no --class_names. Raises UserError.
    """
    if args.eval:
        assert start.path is not None  # --eval has found a checkpoint
        assert start.source is not None
        return class_list(start.path, args.num_classes, start.source.classes, args.class_names)
    if start.path is not None:
        recorded = resume.recorded_classes(start.path)
        return class_list(start.path, len(recorded), recorded, args.class_names)
    if args.class_names:
        return read_class_names(args.class_names)
    return None


def settle_num_classes(args: argparse.Namespace, start: Start, classes: list[str]) -> None:
    """Set --num_classes, if it is not given, to that of a checkpoint with the same classes.

    Prints a note for fewer classes than outputs. Raises UserError for more.
    """
    source = start.source
    listed = bool(args.class_names)
    is_free = "num_classes" not in start.given
    if is_free and source is not None and has_classes(source, classes, listed):
        args.num_classes = source.num_classes
    if len(classes) > args.num_classes:
        raise UserError(
            f"the training set has {len(classes)} classes, --num_classes is {args.num_classes}: "
            f"use --num_classes {len(classes)}"
        )
    if len(classes) < args.num_classes:
        print0(
            f"note: --num_classes {args.num_classes} is larger than the {len(classes)} classes of "
            "the training set; the others stay unused"
        )


def has_classes(source: ModelSource, classes: list[str], listed: bool) -> bool:
    """Return whether a checkpoint's head has these classes, in this order.

    listed: the classes are those of --class_names, which names the outputs of a checkpoint that
    records no names. Otherwise their names are numbers.
    """
    if source.num_classes is None:
        return False
    if source.classes is None and listed:
        return source.num_classes == len(classes)
    return names_or_numbers(source.classes, source.num_classes) == classes


def run_files(args: argparse.Namespace, suffix: str = "") -> RunFiles:
    """Return the paths of the run's files."""
    return RunFiles(Path(args.output_dir), args.save_prefix + suffix)


def build_model(
    args: argparse.Namespace, env: DistEnv, start: Start, classes: list[str]
) -> VisionTransformer:
    """Return the classifier that the flags describe, on the device.

    Its weights come from --seed and then from --finetune, unless a checkpoint is resumed or
    evaluated. The head comes from there too if it has the same classes. `model.config` gets the
    pixels' mean and std of the checkpoint, if there is one.
    """
    settle_num_classes(args, start, classes)
    model = new_model(args, env, start)
    if args.probe:
        model.add_module("probe_heads", ProbeHeads(model, len(args.probe_lrs)))
        model.config |= {"probe": args.probe, "probe_lrs": tuple(args.probe_lrs)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(trained_prefix(args))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(
        f"model {args.model}: {trained / 1e6:.1f} M parameters to train, "
        f"{model.num_tokens} tokens per clip"
    )
    source = start.source
    if source is None:
        return model.to(env.device)
    model.config |= source.mean_std
    if start.path is None:
        load_pretrained(source.path, model, keeps_head(args, start, classes))
    return model.to(env.device)


def new_model(args: argparse.Namespace, env: DistEnv, start: Start) -> VisionTransformer:
    """Return the classifier that the flags describe, initialized from --seed."""
    attentive = args.probe == "attentive"
    if args.eval:
        assert start.source is not None  # the checkpoint that is evaluated
        attentive = start.source.attentive
    is_frozen = args.freeze_backbone or args.probe
    torch.manual_seed(derive_seed(args.seed))
    try:
        model = VisionTransformer(
            **start.sizes,
            num_classes=args.num_classes,
            dropout=args.dropout,
            drop_path_rate=0.0 if is_frozen else args.drop_path_rate,
            global_pool=args.global_pool,
            attentive_pool=attentive,
            attn=args.attn,
        )
        attention = apply_system_flags(args, model, env.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    for line in attention:
        print0(line)
    return model


def trained_prefix(args: argparse.Namespace) -> str:
    """Return the beginning of the names of the parameters that the run trains."""
    if args.probe:
        return "probe_heads."
    if args.freeze_backbone:
        return "head."
    return ""


def keeps_head(args: argparse.Namespace, start: Start, classes: list[str]) -> bool:
    """Return whether finetuning starts with the checkpoint's head; print it if it has one."""
    source = start.source
    if source is None or source.num_classes is None or args.probe:
        return False
    if source.attentive:
        print0(f"the head is new: {source.path} is an attentive probe, which finetuning drops")
        return False
    if not source.head_is_trained:
        print0(f"the head is new: {source.path} is a probe before its first validation")
        return False
    if source.global_pool is None and "global_pool" not in start.given:
        print0(
            f"the head is new: {source.path} does not record its read-out "
            "(pass --global_pool or --cls_token to keep its head)"
        )
        return False
    same = has_classes(source, classes, bool(args.class_names))
    if same and source.num_classes == args.num_classes:
        print0(f"the head of {source.path} is kept: it has the same {len(classes)} classes")
        return True
    reason = "has other classes"
    if source.classes is None and not args.class_names:
        reason = "does not record the names of its classes (pass them to --class_names)"
    print0(f"the head is new: {source.path}, of {source.num_classes} classes, {reason}")
    return False


def run(
    args: argparse.Namespace,
    env: DistEnv,
    model: VisionTransformer,
    config: dict,
    data: tuple[TrainData | None, EvalData],
    path: Path | None,
) -> None:
    """Train from a checkpoint of the run if there is one, or only evaluate it (--eval).

    config: what checkpoints record of the model.
    """
    train_data, eval_data = data
    if train_data is None:
        assert path is not None  # `setup` has found it, or raised
        evaluate_checkpoint(args, env, model, config, eval_data, path)
    else:
        train(args, env, model, config, (train_data, eval_data), path)


def evaluate_checkpoint(
    args: argparse.Namespace,
    env: DistEnv,
    model: VisionTransformer,
    config: dict,
    data: EvalData,
    path: Path,
) -> Scores:
    """Evaluate a checkpoint (--eval) and write the tables. Call on every rank.

    If it has an EMA beside the weights, both are evaluated. Returns the scores of the weights.
    """
    if args.ema:
        print0("note: --eval evaluates the EMA of every checkpoint that has one; --ema is not used")
    prepare = partial(model_input, config=config, still_frames=data.still_frames)
    amp = amp_dtype(args.amp, env.device)
    if args.compile:
        model.compile_parts()

    def test(averaged: bool) -> Scores:
        load_pretrained(path, model, keep_head=True, averaged=averaged)
        scores = evaluate(model, data.batches(), args.batch_size_per_gpu, prepare, amp)
        logger = RunLogger(run_files(args, "_test_ema" if averaged else "_test"))
        logger.open(vars(args))
        write_report(scores, data, logger, epoch=0)
        logger.close()
        name = "EMA: " if averaged else ""
        print0(
            f"{name}top-1 {scores.acc1:.2f} %  top-5 {scores.acc5:.2f} %  loss {scores.loss:.4f}  "
            f"({len(scores.labels)} samples, {data.views} views each)"
        )
        return scores

    scores = test(averaged=False)
    if has_ema(checkpoint.load(path, check=False, lazily=True)):
        test(averaged=True)
    return scores


def train(
    args: argparse.Namespace,
    env: DistEnv,
    model: VisionTransformer,
    config: dict,
    data: tuple[TrainData, EvalData],
    resume_from: Path | None,
) -> Scores | None:
    """Train, and validate after each epoch. Call on every rank.

    config: what the checkpoints record of the model. Returns the last validation, or None if the
    run was complete already or was stopped. {prefix}_best.pth and the tables belong to the best
    epoch.
    """
    train_data, val_data = data
    checkpointer = start_run(args, env, model, config, train_data, resume_from)
    state = checkpointer.state
    if args.compile:
        model.compile_parts()
    prepare_work = prepare_probe if args.probe else prepare_finetuning
    scores = None
    with checkpointer.graceful_shutdown():
        if state.unfinished():
            work = prepare_work(args, env, model, config, data, checkpointer)
        while state.unfinished():
            batches = work.batches(*state.position())
            record = train_one_epoch(
                work.trained, batches, work.micro_step, checkpointer, args.log_every
            )
            validations = work.validate()
            scores = validations["test"]
            keep_best(validations, val_data, checkpointer, record["train_acc1"])
            record |= validation_record(validations)
            record["unreadable_samples"] = checkpointer.bad_files.gather()
            checkpointer.end_epoch(record, args.checkpoint_period)
    checkpointer.logger.close()
    return scores


def prepare_finetuning(
    args: argparse.Namespace,
    env: DistEnv,
    model: VisionTransformer,
    config: dict,
    data: tuple[TrainData, EvalData],
    checkpointer: Checkpointer,
) -> Work:
    """Return the work of a run that trains the model itself."""
    train_data, val_data = data
    state = checkpointer.state
    wrapped = dist.wrap_ddp(model, env, static_graph=args.accum_iter == 1)
    transform = BatchTransform(args, config, val_data.still_frames)
    prepare = partial(model_input, config=config, still_frames=val_data.still_frames)
    amp = amp_dtype(args.amp, env.device)

    def step(batch: dict) -> Tensor:
        clips, targets = transform(batch)
        return micro_step(wrapped, clips, targets, args, state.scaler, amp)

    def measure() -> Scores:
        batches = checkpointer.stop_between_batches(val_data.batches())
        return evaluate(model, batches, args.batch_size_per_gpu, prepare, amp)

    return Work(
        wrapped,
        train_data.batches,
        seeded_micro_step(args, env, step, state),
        validate=lambda: validate(measure, state.ema),
    )


def prepare_probe(
    args: argparse.Namespace,
    env: DistEnv,
    model: VisionTransformer,
    config: dict,
    data: tuple[TrainData, EvalData],
    checkpointer: Checkpointer,
) -> Work:
    """Return the work of a run that trains heads on the frozen model (--probe).

    Encodes the clips now if their features are kept. Call on every rank. Raises preemption.Stopped.
    """
    _, val_data = data
    state = checkpointer.state
    heads = heads_of(model)
    amp = amp_dtype(args.amp, env.device)
    prepare = partial(model_input, config=config, still_frames=val_data.still_frames)
    encoder = FrozenEncoder(model.eval(), prepare, args.batch_size_per_gpu, amp)
    features = probe_features(args, env, encoder, data, checkpointer)
    wrapped = dist.wrap_ddp(heads, env, static_graph=args.accum_iter == 1)
    transform = BatchTransform(args, config, val_data.still_frames)

    def step(batch: dict) -> Tensor:
        if features.are_kept:
            values = batch["clips"].flatten(0, 1)
            targets = F.one_hot(batch["labels"], config["num_classes"]).float()
        else:
            clips, targets = transform(batch)
            values = encoder.features(clips)
        return heads_micro_step(wrapped, values, targets, args, state.scaler, amp)

    def validate_heads() -> dict[str, Scores]:
        by_head = evaluate_heads(heads, features.validation(), args.batch_size_per_gpu, amp)
        checkpointer.before_changing_weights()
        return choose_head(model, by_head, args.probe_lrs)

    micro_steps = seeded_micro_step(args, env, step, state)
    return Work(wrapped, features.training, micro_steps, validate_heads)


def choose_head(
    model: VisionTransformer, by_head: list[Scores], lrs: list[float]
) -> dict[str, Scores]:
    """Make the best of a probe's heads, in this validation, the head of the model.

    Returns its scores as "test", and those of each head as "test_lr0.001" and so on.
    """
    best = max(range(len(lrs)), key=lambda i: (by_head[i].acc1, -by_head[i].loss))
    heads_of(model).copy_to(model, best)
    named = {f"{HEAD_PREFIX}{lr:g}": scores for lr, scores in zip(lrs, by_head, strict=True)}
    return {"test": by_head[best]} | named


def heads_of(model: VisionTransformer) -> ProbeHeads:
    """Return the heads of a probe that `build_model` has added to its model."""
    heads = model.get_submodule("probe_heads")
    assert isinstance(heads, ProbeHeads)
    return heads


def probe_features(
    args: argparse.Namespace,
    env: DistEnv,
    encoder: FrozenEncoder,
    data: tuple[TrainData, EvalData],
    checkpointer: Checkpointer,
) -> ProbeFeatures:
    """Return the features that a probe trains on and validates with. Call on every rank.

    Encodes all clips if their features are kept, and in any case for the mean and std of a linear
    probe. Raises preemption.Stopped.
    """
    train_data, val_data = data
    heads = heads_of(encoder.model)
    is_new = checkpointer.state.step == 0
    fits = features_fit(args, env, encoder, train_data, val_data)
    keeps_training = fits and not args.probe_augment
    training = train_data.batches
    if keeps_training or (heads.standardizes and is_new):
        table = encode_training_set(encoder, env, train_data, checkpointer)
        if heads.standardizes and is_new:
            heads.standardize_by(table.features)
        if keeps_training:
            training = partial(batches_of_table, table, env, train_data)

    def encode_validation_set() -> Iterator[dict]:
        return encoder.encode(checkpointer.stop_between_batches(val_data.batches()))

    if not fits:
        return ProbeFeatures(keeps_training, training, encode_validation_set)
    kept = [batch_to(batch, torch.device("cpu")) for batch in encode_validation_set()]

    def kept_validation_set() -> Iterator[dict]:
        for batch in checkpointer.stop_between_batches(iter(kept)):
            yield batch_to(batch, env.device)

    return ProbeFeatures(keeps_training, training, kept_validation_set)


def features_fit(
    args: argparse.Namespace,
    env: DistEnv,
    encoder: FrozenEncoder,
    train_data: TrainData,
    val_data: EvalData,
) -> bool:
    """Return whether the features of all clips may stay in memory, and print what happens.

    Pooled features always may, tokens up to --cache_gib.
    """
    kept = len(val_data.samples.paths) / env.world_size * env.local_world_size
    if not args.probe_augment:
        kept += len(train_data.paths) * env.local_world_size
    gib = kept * encoder.bytes_per_clip() / 2**30
    fits = args.probe == "linear" or gib <= args.cache_gib
    allowed = ""
    if args.probe == "attentive":
        allowed = f", of --cache_gib {args.cache_gib:g}"
    then = "each clip is encoded once"
    if args.probe_augment:
        then = "random training clips are encoded in every epoch"
    if not fits:
        then = "too much: all clips are encoded again in every epoch"
    print0(f"{args.probe} probe: the features need {gib:.3g} GiB on a machine{allowed}; {then}")
    return fits


def encode_training_set(
    encoder: FrozenEncoder, env: DistEnv, data: TrainData, checkpointer: Checkpointer
) -> FeatureTable:
    """Return the features of all training samples. Call on every rank.

    Raises UserError for too many unreadable files, and preemption.Stopped.
    """
    assert data.views is not None  # made by the scripts with --probe

    def checked_views() -> Iterator[dict]:
        assert data.views is not None
        for batch in checkpointer.stop_between_batches(data.views()):
            checkpointer.bad_files.add_batch(batch)
            yield batch

    count = len(data.paths)
    batches = encoder.encode(checked_views(), on_unreadable=lambda batch: None)
    return collect_features(with_progress(batches, count), count, encoder, env.device)


def batches_of_table(
    table: FeatureTable, env: DistEnv, data: TrainData, epoch: int, updates_done: int
) -> Iterator[dict]:
    """Yield the rest of an epoch's training batches, with features in place of clips."""
    assert data.order is not None  # made by the scripts with --probe
    return table_batches(table, data.paths, data.order(epoch, updates_done), env.device)


def seeded_micro_step(
    args: argparse.Namespace,
    env: DistEnv,
    step: Callable[[dict], Tensor],
    state: TrainState,
) -> MicroStep:
    """Return the micro-step of `train_one_epoch`: forward and backward of a batch by `step`.

    It seeds dropout, drop path, erasing and MixUp by its position in the run.
    """

    def forward_backward(batch: dict, index_in_update: int) -> Tensor:
        position = state.step * args.accum_iter + index_in_update
        torch.manual_seed(derive_seed(args.seed, position, env.rank, DROPOUT_STREAM))
        return step(batch)

    return forward_backward


def start_run(
    args: argparse.Namespace,
    env: DistEnv,
    model: VisionTransformer,
    config: dict,
    data: TrainData,
    resume_from: Path | None,
) -> Checkpointer:
    """Return the run's state with its log and checkpoints, resumed if there is a checkpoint."""
    state = new_state(args, env, model, config, data)
    logger = RunLogger(run_files(args))
    checkpointer = Checkpointer(
        state=state,
        logger=logger,
        bad_files=BadFiles(
            logger.files.folder, limit=args.max_bad_frac * data.fingerprint["samples"]
        ),
        keep=args.keep,
        every_steps=args.checkpoint_every_steps,
        every_minutes=args.checkpoint_every_minutes,
        sync_save=args.sync_save,
    )
    checkpointer.start(resume_from, args.force_resume)
    return checkpointer


def new_state(
    args: argparse.Namespace, env: DistEnv, model: VisionTransformer, config: dict, data: TrainData
) -> TrainState:
    """Return the state of a new run."""
    amp = amp_dtype(args.amp, env.device)
    global_batch = args.batch_size_per_gpu * args.accum_iter * env.world_size
    factors = {}
    if data.repeats > 1:
        factors["repeat_aug"] = data.repeats
    if args.probe:
        groups = probe_param_groups(heads_of(model), args.probe_lrs, args.weight_decay)
        schedule = probe_schedule(args, global_batch * data.repeats, data.updates_per_epoch)
        flops = 0.0  # those of the heads are not counted
    else:
        groups = finetune_param_groups(model, config["depth"], args.weight_decay, args.layer_decay)
        schedule = make_schedule(args, env.world_size, factors, data.updates_per_epoch)
        flops = model.flops_per_clip()
    return TrainState(
        model=model,
        optimizer=make_optimizer(groups, model.parameters(), betas=(0.9, 0.999)),
        scaler=torch.amp.GradScaler(env.device.type, enabled=amp == torch.float16),
        schedule=schedule,
        metrics=MetricSums(METRICS, env.device, args.max_bad_steps),
        accum_iter=args.accum_iter,
        clip_grad=args.clip_grad,
        global_batch=global_batch,
        flops_per_clip=flops,
        config=config,
        flags=vars(args),
        data=data.fingerprint,
        best_acc1=-1.0,
        ema=weight_average(model, args.ema),
    )


def validate(measure: Callable[[], Scores], ema: WeightAverage | None) -> dict[str, Scores]:
    """Return the scores "test" of the weights, and "test_ema" of their EMA if there is one."""
    validations = {"test": measure()}
    if ema is not None:
        with ema.in_model():
            validations["test_ema"] = measure()
    return validations


def validation_record(validations: dict[str, Scores]) -> dict[str, float]:
    """Return what the log has of each validation, such as test_acc1 (percent)."""
    record = {}
    for name, scores in validations.items():
        record[f"{name}_loss"] = scores.loss
        record[f"{name}_acc1"] = scores.acc1
        record[f"{name}_acc5"] = scores.acc5
    return record


def validation_line(validations: dict[str, Scores], best_acc1: float) -> str:
    """Return the figures of an epoch's validations. best_acc1: the best of the run in percent."""
    scores = validations["test"]
    line = (
        f"validation top-1 {scores.acc1:.2f} % (best {best_acc1:.2f} %), "
        f"top-5 {scores.acc5:.2f} %, loss {scores.loss:.4f}, {len(scores.labels)} samples"
    )
    if "test_ema" in validations:
        ema = validations["test_ema"]
        line += f"; EMA top-1 {ema.acc1:.2f} %, top-5 {ema.acc5:.2f} %, loss {ema.loss:.4f}"
    heads = [f"{lr}: {each.acc1:.2f} %" for lr, each in head_scores(validations).items()]
    if heads:
        line += f"; by learning rate {', '.join(heads)}"
    return line


def keep_best(
    validations: dict[str, Scores],
    data: EvalData,
    checkpointer: Checkpointer,
    train_acc1: float,
) -> None:
    """Print a validation; if it is the best so far, write its checkpoint and its tables.

    validations: see `validate`. The one with the higher top-1 counts, the weights' if they are
    equal.
    """
    checkpointer.wait_for_best()
    best_name = max(validations, key=lambda name: validations[name].acc1)
    best = validations[best_name]
    state = checkpointer.state
    logger = checkpointer.logger
    epoch, _ = state.position()
    best_before = -1.0 if state.best_acc1 is None else state.best_acc1
    state.best_acc1 = max(best_before, best.acc1)
    logger.print_epoch(
        f"epoch {epoch}: train top-1 {train_acc1:.2f} %, "
        f"{validation_line(validations, state.best_acc1)}",
        last=state.is_last_step(),
    )
    if best.acc1 <= best_before:
        return
    write_report(best, data, logger, epoch)
    heads = head_table(validations)
    if heads["lr"]:
        logger.save_table("probe", heads)
    checkpointer.save_best(epoch, best_name == "test_ema", best_before)


def head_scores(validations: dict[str, Scores]) -> dict[str, Scores]:
    """Return the scores of a probe's heads by learning rate, {} in finetuning."""
    return {
        name.removeprefix(HEAD_PREFIX): scores
        for name, scores in validations.items()
        if name.startswith(HEAD_PREFIX)
    }


def head_table(validations: dict[str, Scores]) -> dict[str, list]:
    """Return the columns of probe.csv: the validation of each learning rate's head."""
    heads = head_scores(validations)
    return {
        "lr": list(heads),
        "test_loss": [f"{scores.loss:.6f}" for scores in heads.values()],
        "test_acc1": [f"{scores.acc1:.2f}" for scores in heads.values()],
        "test_acc5": [f"{scores.acc5:.2f}" for scores in heads.values()],
    }


def write_report(scores: Scores, data: EvalData, logger: RunLogger, epoch: int) -> None:
    """Write predictions, accuracy per class and the confusion matrix."""
    classes = data.classes
    logger.save_table("predictions", prediction_table(scores, data))
    predicted = scores.top[:, 0]
    labels = scores.labels.numpy()
    counts = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels, weights=(predicted == scores.labels).numpy(), minlength=len(classes))
    accuracy = []
    for hit, count in zip(hits, counts, strict=True):
        accuracy.append(f"{100 * hit / count:.2f}" if count else "")
    columns = {"class": classes, "samples": counts.tolist(), "acc1": accuracy}
    logger.save_table("classes", columns)
    if dist.rank() == 0:
        figure = pictures.confusion_figure(scores.labels, predicted, classes)
        picture = pictures.figure_pixels(figure)
        logger.log_image("confusion", picture, epoch, numbered=False)


def prediction_table(scores: Scores, data: EvalData) -> dict[str, list]:
    """Return the columns of predictions.csv: path, label, the best classes and their scores.

    If there are parts of videos, also start and end (seconds), as in a manifest.
    """

    def class_name(index: int) -> str:
        return data.classes[index] if index < len(data.classes) else str(index)

    columns: dict[str, list] = {"path": data.samples.paths}
    if data.samples.spans is not None:
        columns |= span_columns(data.samples.spans)
    columns["label"] = [class_name(label) for label in scores.labels.tolist()]
    for i in range(scores.top.shape[1]):
        columns[f"top{i + 1}"] = [class_name(index) for index in scores.top[:, i].tolist()]
        columns[f"score{i + 1}"] = [f"{score:.6f}" for score in scores.top_scores[:, i].tolist()]
    return columns
