"""Flags shared by the three scripts, one add_* function per topic; each script adds its own.

Flags that may change results stand in the groups "model", "optimisation" and "data"; those of "run" and "system" should not.
"""

import argparse
import os

from util.cli import Parser, at_least_two, natural, positive
from util.dist import UserError, local_world_size, print0, usable_cores

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
EFFECTIVE = "batch_size_per_gpu * accum_iter * processes"
SWITCH = argparse.BooleanOptionalAction  # --x / --no-x


class ScriptParser(Parser):
    """The parser of one of the three scripts, which accepts flags of the ancestors that have no effect any more."""

    def __init__(self, description: str, retired: tuple[str, ...] = ()):
        """retired: flags without effect beside RETIRED."""
        super().__init__(description)
        self.retired = RETIRED + retired
        for flag in self.retired:
            self.add_argument(flag, nargs="*", help=argparse.SUPPRESS)


def add_model(parser: ScriptParser, *, model: str, num_frames: int) -> argparse._ArgumentGroup:
    """Architecture flags that all scripts have. Returns the group, for the script's own."""
    group = parser.add_argument_group("model (changes results)")
    group.add_argument(
        "--model",
        default=model,
        help="named size, see SIZES in models_vit.py (default: %(default)s)",
    )
    group.add_argument(
        "--img_size",
        "--input_size",
        type=positive,
        default=224,
        help="frame side in pixels (default: %(default)s)",
    )
    group.add_argument(
        "--patch_size",
        type=positive,
        help="patch side in pixels (default: the one in the model's name)",
    )
    group.add_argument(
        "--num_frames",
        type=positive,
        default=num_frames,
        help="frames per clip (default: %(default)s)",
    )
    group.add_argument(
        "--t_patch_size", type=positive, default=2, help="frames per tubelet (default: %(default)s)"
    )
    group.add_argument(
        "--cls_embed", action=SWITCH, default=True, help="class token in the encoder (default: on)"
    )
    group.add_argument(
        "--sep_pos_embed",
        action=SWITCH,
        default=True,
        help="separate space and time positions (default: on)",
    )
    group.add_argument("--no_qkv_bias", action="store_true", help="no bias in q, k, v")
    return group


def add_optimisation(
    parser: ScriptParser, *, epochs: int, batch_size: int, effective: str = EFFECTIVE
) -> argparse._ArgumentGroup:
    """Schedule and optimizer flags. `effective` names the factors of the effective batch, for the help text."""
    group = parser.add_argument_group("optimisation (changes results)")
    group.add_argument(
        "--epochs",
        type=positive,
        default=epochs,
        help="passes over the data (default: %(default)s)",
    )
    group.add_argument(
        "--max_steps", type=positive, help="run length in optimizer updates, instead of --epochs"
    )
    group.add_argument(
        "--batch_size_per_gpu",
        type=positive,
        default=batch_size,
        help="videos per process and micro-step (default: %(default)s)",
    )
    group.add_argument(
        "--accum_iter",
        type=positive,
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
        "--min_lr", type=float, default=1e-5, help="where the cosine ends (default: %(default)s)"
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
    group.add_argument("--seed", type=natural, default=0, help="(default: %(default)s)")
    return group


def add_classifier(
    model: argparse._ArgumentGroup, optimisation: argparse._ArgumentGroup, *, smoothing: float
) -> None:
    """Classification flags, in the groups of `add_model` and `add_optimisation`."""
    model.add_argument(
        "--num_classes",
        type=positive,
        default=700,
        help="size of the classifier (default: %(default)s)",
    )
    model.add_argument(
        "--global_pool",
        action=SWITCH,
        default=True,
        help="classify the mean of the patch tokens (default: on)",
    )
    model.add_argument(
        "--cls_token",
        action="store_false",
        dest="global_pool",
        help="classify the class token: same as --no-global_pool",
    )
    model.add_argument(
        "--dropout", type=float, default=0.3, help="before the head (default: %(default)s)"
    )
    model.add_argument(
        "--drop_path_rate",
        type=float,
        default=0.1,
        help="stochastic depth of the last block (default: %(default)s)",
    )
    model.add_argument(
        "--finetune",
        default="",
        metavar="PATH",
        help="start from this checkpoint's encoder; '': from scratch (default: '')",
    )
    model.add_argument(
        "--freeze_backbone",
        action="store_true",
        help="train the head alone (linear probe; without drop path)",
    )
    group = optimisation
    group.add_argument(
        "--layer_decay",
        type=float,
        default=0.8,
        help="learning rate factor from layer to layer (default: %(default)s)",
    )
    group.add_argument(
        "--smoothing", type=float, default=smoothing, help="label smoothing (default: %(default)s)"
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
    group.add_argument(
        "--rand_aug",
        action=SWITCH,
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
        help="what fills the box (default: %(default)s)",
    )
    group.add_argument(
        "--recount", type=positive, default=1, help="boxes per erased clip (default: %(default)s)"
    )


def add_eval(run: argparse._ArgumentGroup) -> None:
    """--eval and --extract_features, in the group of `add_run`."""
    run.add_argument(
        "--eval",
        action=SWITCH,
        default=False,
        help="only evaluate the checkpoint of --resume (auto: best, else newest)",
    )
    run.add_argument(
        "--extract_features",
        action=SWITCH,
        default=False,
        help="only write the validation set's features, by the weights of --resume as for --eval; if none, --finetune's",
    )


def add_shared_data(group: argparse._ArgumentGroup) -> None:
    """Data flags of videos and images."""
    group.add_argument(
        "--flip", action=SWITCH, default=True, help="mirror half of the clips (default: on)"
    )
    group.add_argument(
        "--max_bad_frac",
        type=float,
        default=0.1,
        help="stop when more of the files cannot be read (default: %(default)s)",
    )


def add_video(
    parser: ScriptParser, *, sampling_rate: int, repeat_aug: int, scales: tuple[float, float]
) -> argparse._ArgumentGroup:
    """Flags of the video pipeline."""
    group = parser.add_argument_group("data (changes results)")
    group.add_argument(
        "--sampling_rate",
        type=positive,
        default=sampling_rate,
        help="distance of frames at --target_fps (default: %(default)s)",
    )
    group.add_argument(
        "--target_fps",
        type=float,
        default=30,
        help="videos are read as if at this rate (default: %(default)s)",
    )
    group.add_argument(
        "--repeat_aug",
        type=positive,
        default=repeat_aug,
        help="clips taken from each video it reads (default: %(default)s)",
    )
    group.add_argument(
        "--repeat_windows",
        type=positive,
        default=1,
        help="time windows these come from, one decode each (default: %(default)s)",
    )
    group.add_argument(
        "--short_side",
        type=positive,
        help="decode at this short side, never enlarged (default: 256, more if img_size > 224)",
    )
    span = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
    group.add_argument(
        "--jitter_scales_relative",
        **span,
        default=scales,
        help="area of the crop (default: %(default)s)",
    )
    group.add_argument(
        "--jitter_aspect_relative",
        **span,
        default=(0.75, 1.3333),
        help="aspect of the crop (default: %(default)s)",
    )
    group.add_argument(
        "--color_jitter",
        type=float,
        default=0.0,
        help="strength of colour jitter, 0 = off (default: %(default)s)",
    )
    group.add_argument(
        "--decoder",
        choices=("auto", "pyav", "decord"),
        default="auto",
        help="auto is pyav, which is faster (default: %(default)s)",
    )
    add_shared_data(group)
    group.add_argument("--datafile_dir", help="where the manifests go (default: --output_dir)")
    return group


def add_run(parser: ScriptParser) -> argparse._ArgumentGroup:
    """Flags about the files of a run."""
    group = parser.add_argument_group("run (should not change results)")
    group.add_argument(
        "--output_dir",
        default="./output_dir",
        help="checkpoints, log, TensorBoard, pictures (default: %(default)s)",
    )
    group.add_argument(
        "--save_prefix", default="", help="names the run's files (default: the model's name)"
    )
    group.add_argument(
        "--resume",
        default="auto",
        metavar="PATH",
        help="go on from a checkpoint; auto: this run's newest, if any (default: auto)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="allow --resume '' and --visualize to write over files of this prefix",
    )
    group.add_argument(
        "--checkpoint_period",
        type=positive,
        default=1,
        help="epochs between checkpoints (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint_every_steps",
        type=positive,
        help="updates between further checkpoints (default: none)",
    )
    group.add_argument(
        "--checkpoint_every_minutes",
        type=float,
        default=30,
        help="minutes between further ones, 0 = none (default: %(default)s)",
    )
    group.add_argument(
        "--keep",
        type=at_least_two,
        default=2,
        help="newest checkpoints to keep, at least 2 (default: %(default)s)",
    )
    group.add_argument(
        "--force_resume",
        action="store_true",
        help="go on even if data, global batch or model settings are not the checkpoint's",
    )
    group.add_argument(
        "--log_every",
        type=positive,
        default=20,
        help="updates between log lines (default: %(default)s)",
    )
    group.add_argument(
        "--max_bad_steps",
        type=positive,
        default=50,
        help="stop after this many non-finite updates in a row (default: %(default)s)",
    )
    return group


def add_system(parser: ScriptParser) -> argparse._ArgumentGroup:
    """Flags about the machine."""
    group = parser.add_argument_group("system (should not change results, up to rounding)")
    group.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    group.add_argument("--compile", action=SWITCH, help="torch.compile (default: on with CUDA)")
    group.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 if the GPU has it, else fp16; CPU: fp32",
    )
    group.add_argument(
        "--attn",
        choices=("auto", "flash_attn", "sdpa", "cudnn", "math"),
        default="auto",
        help="attention kernel (default: auto)",
    )
    group.add_argument(
        "--activation_checkpointing",
        action=SWITCH,
        default=False,
        help="compute blocks twice, to save memory (default: off)",
    )
    group.add_argument(
        "--deterministic",
        action=SWITCH,
        default=False,
        help="only kernels that repeat bit by bit; slower (default: off)",
    )
    group.add_argument(
        "--read_timeout",
        type=float,
        default=60,
        help="seconds that a file may take before it is set aside (default: %(default)s)",
    )
    group.add_argument(
        "--num_workers",
        type=natural,
        help="loader processes (default: this machine's cores / processes, at most 16)",
    )
    group.add_argument(
        "--pin_mem", action=SWITCH, default=True, help="pinned host memory (default: on)"
    )
    group.add_argument(
        "--no_pin_mem", action="store_false", dest="pin_mem", help="same as --no-pin_mem"
    )
    return group


def parse(parser: ScriptParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line and fill in the defaults that depend on the machine. Raises UserError."""
    args = parser.parse_args(argv)
    for flag in parser.retired:
        if vars(args).pop(flag[2:]) is not None:
            print0(f"note: {flag} has no effect any more and can be dropped")
    args.save_prefix = args.save_prefix or args.model
    if os.path.basename(args.save_prefix) != args.save_prefix:
        raise UserError(
            f"--save_prefix {args.save_prefix!r} must be a file name, not a path: the folder is --output_dir"
        )
    if vars(args).get("datafile_dir", "") is None:  # the image script has no manifests
        args.datafile_dir = args.output_dir
    if args.num_workers is None:
        args.num_workers = max(1, min(16, usable_cores() // local_world_size()))
    return args


def augmentation(args: argparse.Namespace) -> str:
    """The RandAugment policy in use, "" for none; says once what of it is not supported."""
    if args.rand_aug and "mstd" in args.aa:
        print0(f"note: --aa {args.aa}: mstd (noise on the magnitude) is not supported and left out")
    return args.aa if args.rand_aug else ""


def effective_lr(args: argparse.Namespace, world_size: int, factors: dict[str, int]) -> float:
    """--lr, or --blr * effective batch / 256; says on rank 0 how the effective batch came about."""
    factors = {
        "batch_size_per_gpu": args.batch_size_per_gpu,
        "accum_iter": args.accum_iter,
        "processes": world_size,
        **factors,
    }
    batch = 1
    for value in factors.values():
        batch *= value
    lr = args.blr * batch / 256 if args.lr is None else args.lr
    print0(
        f"effective batch {batch} = "
        + " x ".join(f"{value} {name}" for name, value in factors.items())
    )
    print0(
        f"learning rate {lr:.4g}"
        + (f" = blr {args.blr:g} x {batch} / 256" if args.lr is None else " (--lr)")
    )
    return lr
