"""Flags shared by the three scripts, one add_* function per topic; each script adds its own.

The groups "model", "optimization" and "data" hold the flags that may change results. The flags of
"run" and "system" should not.
"""

import argparse
import math
import os
from pathlib import Path

import torch

from models_vit import VideoEncoder
from util.cli import (
    Parser,
    decay_factor,
    fraction,
    min_two,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from util.dist import UserError, default_workers, print0
from util.optim import Schedule, amp_dtype, residual_dtype

RETIRED = (
    "--local_rank",
    "--dist_url",
    "--world_size",
    "--dist_on_itp",
    "--no_env",
    "--cpu_mix",
    "--beta",
    "--resplit",
    "--num_checkpoint_del",
    "--train_jitter_scales",
    "--start_epoch",
)
EFFECTIVE_BATCH = "batch_size_per_gpu * accum_iter * processes"
SAMPLING_METHODS = ("dense", "uniform")  # see data/clips.py
BoolFlag = argparse.BooleanOptionalAction  # --x / --no-x
PROBE_LRS = (0.0001, 0.0003, 0.001, 0.003, 0.01)
PROBE_FLAGS = ("probe_lrs", "probe_augment", "cache_gib")
# Flags without effect on a probe.
UNUSED_BY_PROBES = (
    "freeze_backbone",
    "lr",
    "blr",
    "min_lr",
    "layer_decay",
    "clip_grad",
    "ema",
    "dropout",
    "drop_path_rate",
    "activation_checkpointing",
)
# Flags without effect on a probe, unless --probe_augment draws random clips.
RANDOM_CLIP_FLAGS = (
    "repeat_aug",
    "repeat_windows",
    "jitter_scales_relative",
    "jitter_aspect_relative",
    "flip",
    "color_jitter",
    "rand_aug",
    "aa",
    "reprob",
    "remode",
    "recount",
    "mixup",
    "cutmix",
    "mixup_prob",
)


class OneOrSeveral(argparse.Action):
    """Stores several values as a list, and a single one as itself."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Set the flag; argparse calls this."""
        if isinstance(values, list) and len(values) == 1:
            values = values[0]
        setattr(namespace, self.dest, values)


class ScriptParser(Parser):
    """The parser of one of the three scripts. It accepts retired flags, which have no effect."""

    def __init__(self, description: str, retired: tuple[str, ...] = ()):
        """Create the parser. retired: flags without effect in addition to RETIRED."""
        super().__init__(description)
        self.retired = RETIRED + retired
        for flag in self.retired:
            self.add_argument(flag, nargs="*", help=argparse.SUPPRESS)


def add_model(parser: ScriptParser, *, model: str, num_frames: int) -> argparse._ArgumentGroup:
    """Add the architecture flags of all scripts. Return the group, for the script's own flags."""
    group = parser.add_argument_group("model (changes results)")
    group.add_argument(
        "--model",
        default=model,
        help="named size, see SIZES in models_vit.py (default: the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--img_size",
        "--input_size",
        type=positive_int,
        default=224,
        help="frame side in pixels (default: the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--patch_size",
        type=positive_int,
        help="patch side in pixels (default: the checkpoint's, else as in the model's name)",
    )
    group.add_argument(
        "--num_frames",
        type=positive_int,
        default=num_frames,
        help="frames per clip (default: the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--t_patch_size",
        type=positive_int,
        default=2,
        help="frames per tubelet (default: the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--cls_embed",
        action=BoolFlag,
        default=True,
        help="class token in the encoder (default: the checkpoint's, else on)",
    )
    group.add_argument(
        "--sep_pos_embed",
        action=BoolFlag,
        default=True,
        help="separate space and time positions (default: the checkpoint's, else on)",
    )
    group.add_argument("--no_qkv_bias", action="store_true", help="no bias in q, k, v")
    return group


def add_optimization(
    parser: ScriptParser, *, epochs: int, batch_size: int, effective: str = EFFECTIVE_BATCH
) -> argparse._ArgumentGroup:
    """Add the schedule and optimizer flags. effective: formula of the effective batch, for --help.

    Return the group, for the script's own flags.
    """
    group = parser.add_argument_group("optimization (changes results)")
    group.add_argument(
        "--epochs",
        type=positive_int,
        default=epochs,
        help="passes over the data (default: %(default)s)",
    )
    group.add_argument(
        "--max_steps",
        type=positive_int,
        help="length of the run in optimizer updates, instead of --epochs",
    )
    group.add_argument(
        "--batch_size_per_gpu",
        type=positive_int,
        default=batch_size,
        help="videos per process and micro-step (default: %(default)s)",
    )
    group.add_argument(
        "--accum_iter",
        type=positive_int,
        default=1,
        help="micro-steps per update (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=float,
        help=f"learning rate (default: blr * effective batch / 256; effective batch = {effective})",
    )
    group.add_argument(
        "--blr", type=float, default=1e-3, help="base learning rate (default: %(default)s)"
    )
    group.add_argument(
        "--min_lr",
        type=float,
        default=1e-5,
        help="learning rate at the end of the cosine (default: %(default)s)",
    )
    group.add_argument(
        "--warmup_epochs",
        type=float,
        default=0,
        help="epochs of linear warm-up (default: %(default)s)",
    )
    group.add_argument("--weight_decay", type=float, default=0.05, help="(default: %(default)s)")
    group.add_argument(
        "--clip_grad", type=float, help="largest total gradient norm (default: no clipping)"
    )
    group.add_argument(
        "--ema",
        type=decay_factor,
        default=0.0,
        metavar="DECAY",
        help="also keep an exponential moving average of the weights, for example 0.9999; 0: none "
        "(default: 0)",
    )
    group.add_argument("--seed", type=nonnegative_int, default=0, help="(default: %(default)s)")
    return group


def add_classifier(
    model: argparse._ArgumentGroup, optimization: argparse._ArgumentGroup, *, smoothing: float
) -> None:
    """Add the classification flags to the groups of `add_model` and `add_optimization`."""
    _add_classifier_model(model)
    _add_regularization(optimization, smoothing)
    _add_rand_aug(optimization)


def _add_classifier_model(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the head, the read-out and the initial weights."""
    group.add_argument(
        "--num_classes",
        type=positive_int,
        default=700,
        help="size of the classifier (default: that of the same classes in --finetune, with --eval "
        "the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--global_pool",
        action=BoolFlag,
        default=True,
        help="classify the mean of the patch tokens (default: the checkpoint's, else on)",
    )
    group.add_argument(
        "--cls_token",
        action="store_false",
        dest="global_pool",
        help="classify the class token: same as --no-global_pool",
    )
    group.add_argument(
        "--dropout", type=float, default=0.3, help="before the head (default: %(default)s)"
    )
    group.add_argument(
        "--drop_path_rate",
        type=float,
        default=0.1,
        help="stochastic depth of the last block (default: %(default)s)",
    )
    group.add_argument(
        "--finetune",
        default="",
        metavar="PATH",
        help="start from this checkpoint's encoder, and its head if it has the same classes; "
        "'': from scratch (default: '')",
    )
    group.add_argument(
        "--class_names",
        default="",
        metavar="FILE",
        help="names of the classes in the order of their numbers, one per line, or a labels.json "
        "(default: the checkpoint's, else the sorted names of the training set)",
    )
    group.add_argument(
        "--freeze_backbone",
        action="store_true",
        help="train the head alone on random clips (without drop path); compare --probe",
    )


def _add_regularization(group: argparse._ArgumentGroup, smoothing: float) -> None:
    """Add layer decay, label smoothing, MixUp and CutMix."""
    group.add_argument(
        "--layer_decay",
        type=float,
        default=0.8,
        help="learning rate factor from layer to layer (default: %(default)s)",
    )
    group.add_argument(
        "--smoothing",
        type=float,
        default=smoothing,
        help="label smoothing (default: %(default)s, with --probe 0)",
    )
    group.add_argument(
        "--mixup",
        type=float,
        default=0.0,
        help="Beta parameter of MixUp, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--cutmix",
        type=float,
        default=0.0,
        help="Beta parameter of CutMix, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--mixup_prob",
        type=float,
        default=1.0,
        help="share of batches that are mixed (default: %(default)s)",
    )


def _add_rand_aug(group: argparse._ArgumentGroup) -> None:
    """Add RandAugment and random erasing."""
    group.add_argument(
        "--rand_aug",
        action=BoolFlag,
        default=False,
        help="RandAugment (--aa) and random erasing (--reprob) (default: off)",
    )
    group.add_argument(
        "--aa",
        default="rand-m7-mstd0.5-inc1",
        metavar="POLICY",
        help="magnitude 0-10 and count, rand-m7-n2 (default: %(default)s)",
    )
    group.add_argument(
        "--reprob",
        type=float,
        default=0.25,
        help="share of clips that are erased (default: %(default)s)",
    )
    group.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="content of the erased box (default: %(default)s)",
    )
    group.add_argument(
        "--recount",
        type=positive_int,
        default=1,
        help="boxes per erased clip (default: %(default)s)",
    )


def add_probe(optimization: argparse._ArgumentGroup, system: argparse._ArgumentGroup) -> None:
    """Add the flags of probes to the groups of `add_optimization` and `add_system`."""
    optimization.add_argument(
        "--probe",
        choices=("", "linear", "attentive"),
        default="",
        help="train only heads on the frozen encoder, on the center clip and crop of each sample; "
        "'': finetune (default: '')",
    )
    optimization.add_argument(
        "--probe_lrs",
        type=positive_float,
        nargs="+",
        default=PROBE_LRS,
        metavar="LR",
        help="with --probe: learning rates, one head each; the best in validation is the result "
        f"(default: {' '.join(map(str, PROBE_LRS))})",
    )
    optimization.add_argument(
        "--probe_augment",
        action=BoolFlag,
        default=False,
        help="with --probe: train on random clips as finetuning does, encoded in every epoch "
        "(default: off)",
    )
    system.add_argument(
        "--cache_gib",
        type=nonnegative_float,
        default=8.0,
        help="with --probe attentive: host memory per machine for the tokens of all clips; if they "
        "need more, every epoch encodes the clips again (default: %(default)s)",
    )


def resolve_probe(args: argparse.Namespace, given: set[str]) -> None:
    """Set the default of --smoothing, which is 0 for a probe. Raises UserError for unused flags.

    given: the names of the flags on the command line.
    """
    if not args.probe:
        refuse_unused(given, PROBE_FLAGS, "without --probe. Drop it, or choose a probe")
        return
    if args.eval:
        raise UserError("--probe has no effect with --eval, which reads the checkpoint. Drop it.")
    refuse_unused(given, UNUSED_BY_PROBES, f"with --probe {args.probe}. Drop it")
    if args.probe == "attentive":
        refuse_unused(given, ("global_pool",), "with --probe attentive. Drop it")
    else:
        refuse_unused(given, ("cache_gib",), "with --probe linear. Drop it")
    if not args.probe_augment:
        refuse_unused(given, RANDOM_CLIP_FLAGS, "with --probe. Drop it, or add --probe_augment")
    values = [f"{lr:g}" for lr in args.probe_lrs]  # as in the log, which has a column for each
    if len(set(values)) < len(values):
        raise UserError(f"--probe_lrs {' '.join(values)} has a learning rate twice. Drop one.")
    if "smoothing" not in given:
        args.smoothing = 0.0


def refuse_unused(given: set[str], unused: tuple[str, ...], cure: str) -> None:
    """Raise UserError if an unused flag is given. cure: end of the message, with what to do."""
    for name in unused:
        if name in given:
            flag = "--global_pool or --cls_token" if name == "global_pool" else f"--{name}"
            raise UserError(f"{flag} has no effect {cure}.")


def add_eval(run: argparse._ArgumentGroup) -> None:
    """Add --eval to the group of `add_run`."""
    run.add_argument(
        "--eval",
        action=BoolFlag,
        default=False,
        help="only evaluate the checkpoint of --resume (auto: best, else newest)",
    )


def add_labeled_data(group: argparse._ArgumentGroup) -> None:
    """Add the flags that choose among labeled training samples, for videos and images."""
    group.add_argument(
        "--frac_retained",
        type=fraction,
        default=1.0,
        help="train on this share of the samples of each class, at least one, chosen by --seed "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--shots",
        type=positive_int,
        metavar="K",
        help="train on K samples of each class, or on all if it has fewer, chosen by --seed "
        "(default: all of each)",
    )
    group.add_argument(
        "--balanced",
        action=BoolFlag,
        default=False,
        help="draw all classes equally often, whatever their numbers of samples (default: off)",
    )


def add_shared_data(group: argparse._ArgumentGroup) -> None:
    """Add the data flags that videos and images share."""
    group.add_argument(
        "--flip", action=BoolFlag, default=True, help="mirror half of the clips (default: on)"
    )
    group.add_argument(
        "--max_bad_frac",
        type=float,
        default=0.1,
        help="stop if a larger share of the samples is unreadable (default: %(default)s)",
    )


def add_video(
    parser: ScriptParser,
    *,
    sampling_rate: int,
    repeat_aug: int,
    scales: tuple[float, float],
    several_rates: bool = False,
) -> argparse._ArgumentGroup:
    """Add the flags of the video pipeline. Return the group, for the script's own flags.

    several_rates: --sampling_rate takes a value for each source of videos.
    """
    group = parser.add_argument_group("data (changes results)")
    _add_sampling(group, sampling_rate, several_rates)
    group.add_argument(
        "--repeat_aug",
        type=positive_int,
        default=repeat_aug,
        help="clips per video that is read (default: %(default)s)",
    )
    group.add_argument(
        "--repeat_windows",
        type=positive_int,
        default=1,
        help="time windows of these clips, one decode each (default: %(default)s)",
    )
    group.add_argument(
        "--short_side",
        type=positive_int,
        help="decode at this short side, never enlarged (default: 256, more if img_size > 224)",
    )
    group.add_argument(
        "--jitter_scales_relative",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=scales,
        help="area of the crop (default: %(default)s)",
    )
    group.add_argument(
        "--jitter_aspect_relative",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=(0.75, 1.3333),
        help="aspect of the crop (default: %(default)s)",
    )
    group.add_argument(
        "--color_jitter",
        type=float,
        default=0.0,
        help="strength of color jitter, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--decoder",
        choices=("auto", "pyav", "decord"),
        default="auto",
        help="auto is pyav, which is faster (default: %(default)s)",
    )
    add_frames_fps(group)
    add_shared_data(group)
    group.add_argument("--datafile_dir", help="folder of the manifests (default: --output_dir)")
    return group


def _add_sampling(group: argparse._ArgumentGroup, sampling_rate: int, several_rates: bool) -> None:
    """Add the flags that choose the frames of a clip. several_rates: see `add_video`."""
    rates = ", one value for all or one for each --data_csv or --data_dirs" if several_rates else ""
    group.add_argument(
        "--sampling_rate",
        type=positive_int,
        nargs="+" if several_rates else None,
        action=OneOrSeveral,
        default=sampling_rate,
        metavar="RATE",
        help=f"spacing of the frames at --target_fps{rates} "
        "(default: the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--target_fps",
        type=positive_float,
        default=30,
        help="frame rate to resample videos to (default: the checkpoint's, else %(default)s)",
    )
    group.add_argument(
        "--sampling",
        choices=SAMPLING_METHODS,
        default="dense",
        help="dense: frames at --sampling_rate; uniform: one from each of --num_frames equal parts "
        "of the video (default: the checkpoint's, else %(default)s)",
    )


def add_frames_fps(group: argparse._ActionsContainer) -> None:
    """Add the flag for folders of frames to a parser or a group of it."""
    group.add_argument(
        "--frames_fps",
        type=positive_float,
        metavar="RATE",
        help="also read folders of numbered images, each as a video of this frame rate "
        "(default: no)",
    )


def add_run(parser: ScriptParser) -> argparse._ArgumentGroup:
    """Add the flags about the files of a run. Return the group, for the script's own flags."""
    group = parser.add_argument_group("run (should not change results)")
    group.add_argument(
        "--output_dir",
        default="./output_dir",
        help="checkpoints, log, TensorBoard, pictures (default: %(default)s)",
    )
    group.add_argument(
        "--save_prefix", default="", help="prefix of the run's files (default: the model's name)"
    )
    group.add_argument(
        "--resume",
        default="auto",
        metavar="PATH",
        help="resume from a checkpoint; auto: this run's newest, if any (default: auto)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="allow --resume '' to overwrite files of this prefix",
    )
    group.add_argument(
        "--checkpoint_period",
        type=positive_int,
        default=1,
        help="epochs between checkpoints (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint_every_steps",
        type=positive_int,
        help="updates between further checkpoints (default: none)",
    )
    group.add_argument(
        "--checkpoint_every_minutes",
        type=float,
        default=30,
        help="minutes between further checkpoints, 0 = none (default: %(default)s)",
    )
    group.add_argument(
        "--keep",
        type=min_two,
        default=2,
        help="number of newest checkpoints to keep, at least 2 (default: %(default)s)",
    )
    group.add_argument(
        "--sync_save",
        action="store_true",
        help="stop training while a checkpoint is written; default: copy it to host memory first, "
        "and write the copy meanwhile",
    )
    group.add_argument(
        "--force_resume",
        action="store_true",
        help="resume even if data, global batch or model settings differ from the checkpoint's",
    )
    group.add_argument(
        "--log_every",
        type=positive_int,
        default=20,
        help="updates between log lines (default: %(default)s)",
    )
    group.add_argument(
        "--max_bad_steps",
        type=positive_int,
        default=50,
        help="stop after this many non-finite updates in a row (default: %(default)s)",
    )
    return group


def add_system(parser: ScriptParser) -> argparse._ArgumentGroup:
    """Add the flags about the machine. Return the group, for the script's own flags."""
    group = parser.add_argument_group("system (should not change results, up to rounding)")
    group.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    group.add_argument("--compile", action=BoolFlag, help="torch.compile (default: on with CUDA)")
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 if the GPU has it, else fp16; CPU: fp32",
    )
    group.add_argument(
        "--bf16_residual",
        action=BoolFlag,
        default=False,
        help="keep the tokens between layers in bfloat16: faster on a GPU (default: off, float32)",
    )
    group.add_argument(
        "--attn",
        choices=("auto", "flash_attn", "sdpa", "cudnn", "math"),
        default="auto",
        help="attention kernel (default: auto, the fastest known for the GPU)",
    )
    group.add_argument(
        "--activation_checkpointing",
        action=BoolFlag,
        default=False,
        help="recompute blocks in the backward pass, to save memory (default: off)",
    )
    group.add_argument(
        "--deterministic",
        action=BoolFlag,
        default=False,
        help="only kernels with bit-identical results; slower (default: off)",
    )
    group.add_argument(
        "--read_timeout",
        type=float,
        default=60,
        help="seconds that a file may take before it is quarantined (default: %(default)s)",
    )
    group.add_argument(
        "--num_workers",
        type=nonnegative_int,
        help="loader processes (default: available CPUs / processes per machine, at most 16)",
    )
    group.add_argument(
        "--pin_mem", action=BoolFlag, default=True, help="pinned host memory (default: on)"
    )
    group.add_argument(
        "--no_pin_mem", action="store_false", dest="pin_mem", help="same as --no-pin_mem"
    )
    return group


def parse(parser: ScriptParser, argv: list[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """Parse a command line and set the defaults that depend on other flags or the machine.

    argv: None for sys.argv. Returns the flags, and the names of those that are given. --compile
    stays None until `resolve_compile`; --save_prefix and the flags of the model stay at their
    defaults until `util.model_flags.find_start`. Raises UserError.
    """
    args = parser.parse_args(argv)
    for flag in parser.retired:
        value = vars(args).pop(flag.removeprefix("--"))
        if value is not None:
            print0(f"note: {flag} no longer has an effect. Remove it.")
    if os.path.basename(args.save_prefix) != args.save_prefix:
        raise UserError(
            f"--save_prefix {args.save_prefix!r} is a path, not a file name. "
            f"Use --output_dir for the folder."
        )
    if getattr(args, "datafile_dir", "") is None:  # the image script has no such flag
        args.datafile_dir = args.output_dir
    if args.num_workers is None:
        args.num_workers = default_workers()
    return args, given_flags(parser, argv)


def given_flags(parser: Parser, argv: list[str] | None) -> set[str]:
    """Return the names of the flags on a command line, such as {"img_size"}."""
    absent = object()
    names = [action.dest for action in parser._actions]
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name for name, value in vars(parsed).items() if value is not absent}


def check_sampling(args: argparse.Namespace, given: set[str]) -> None:
    """Raise UserError for a given flag that has no effect on uniform sampling."""
    if args.sampling != "uniform":
        return
    for name in ("sampling_rate", "target_fps"):
        if name in given:
            raise UserError(
                f"--{name} {getattr(args, name)} has no effect on uniform sampling, which takes "
                "frames from the whole video. Drop it, or pass --sampling dense."
            )


def resolve_compile(args: argparse.Namespace, device: torch.device) -> None:
    """Set the default of --compile, which depends on the device: on with CUDA."""
    if args.compile is None:
        args.compile = device.type == "cuda"


def apply_system_flags(
    args: argparse.Namespace, model: VideoEncoder, device: torch.device
) -> list[str]:
    """Set up a new model by --attn, --amp, --bf16_residual and --activation_checkpointing.

    Returns lines that describe the attention kernels. Raises ValueError for what cannot run.
    """
    amp = amp_dtype(args.amp, device)
    model.residual_dtype = residual_dtype(args.bf16_residual, amp)
    model.activation_checkpointing = args.activation_checkpointing
    return model.set_attention(device.type, amp)


def manifest_path(args: argparse.Namespace, kind: str) -> Path:
    """Return the path of the run's own manifest; kind: "train" or "val"."""
    return Path(args.datafile_dir, f"{args.save_prefix}_{kind}.csv")


def total_steps(args: argparse.Namespace, updates_per_epoch: int) -> int:
    """Return the length of the run in updates: --max_steps, or that of --epochs."""
    return args.max_steps or args.epochs * updates_per_epoch


def augmentation(args: argparse.Namespace) -> str:
    """Return the RandAugment policy in use, "" for none; print a note about an unsupported part."""
    if not args.rand_aug:
        return ""
    if "mstd" in args.aa:
        print0(f"note: --aa {args.aa}: mstd (noise on the magnitude) is not supported and ignored")
    return args.aa


def effective_lr(args: argparse.Namespace, world_size: int, factors: dict[str, int]) -> float:
    """Return --lr, or --blr * effective batch / 256, and print how it results.

    factors: the script's own factors of the effective batch, by name.
    """
    factors = {
        "batch_size_per_gpu": args.batch_size_per_gpu,
        "accum_iter": args.accum_iter,
        "processes": world_size,
        **factors,
    }
    batch = math.prod(factors.values())
    product = " x ".join(f"{value} {name}" for name, value in factors.items())
    print0(f"effective batch {batch} = {product}")
    if args.lr is not None:
        print0(f"learning rate {args.lr:.4g} (--lr)")
        return args.lr
    lr = args.blr * batch / 256
    print0(f"learning rate {lr:.4g} = blr {args.blr:g} x {batch} / 256")
    return lr


def probe_schedule(args: argparse.Namespace, batch: int, updates_per_epoch: int) -> Schedule:
    """Return the schedule of a probe: the factor of the heads' learning rates, from 1 to 0.

    batch: clips per update, which is printed.
    """
    values = ", ".join(f"{lr:g}" for lr in args.probe_lrs)
    print0(f"effective batch {batch}; a head for each learning rate of --probe_lrs: {values}")
    return Schedule(
        lr=1.0,
        min_lr=0.0,
        warmup_epochs=args.warmup_epochs,
        steps_per_epoch=updates_per_epoch,
        total_steps=total_steps(args, updates_per_epoch),
    )


def make_schedule(
    args: argparse.Namespace, world_size: int, factors: dict[str, int], updates_per_epoch: int
) -> Schedule:
    """Return the learning rates of a run. factors: see `effective_lr`."""
    return Schedule(
        lr=effective_lr(args, world_size, factors),
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        steps_per_epoch=updates_per_epoch,
        total_steps=total_steps(args, updates_per_epoch),
    )
