"""Where a run starts, and its model: flags that are not given take the values of a checkpoint.

The checkpoint is the one that the run resumes from or evaluates, else that of --finetune or
--init_from. Only the three scripts call this, with their flags.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from models_vit import named_size
from util import dist, resume
from util.args import SAMPLING_METHODS, check_sampling, manifest_path
from util.dist import UserError, print0
from util.files import RunFiles
from util.model_source import (
    IMAGE_CLIP,
    ModelSource,
    decoder_for_clips,
    describe_checkpoint,
    require_head,
    require_read_out,
)

SIZE_FLAGS = (
    "patch_size",
    "img_size",
    "num_frames",
    "t_patch_size",
    "cls_embed",
    "sep_pos_embed",
    "no_qkv_bias",
)
SPACING_FLAGS = ("sampling_rate", "target_fps")
# Flags that replace the checkpoint's value where they are given; the others must not differ.
REPLACING = ("img_size", "num_frames", "norm_pix_loss", "sampling", *SPACING_FLAGS)


class Start(NamedTuple):
    """Where a run starts, and what its model is."""

    path: Path | None  # the checkpoint to resume from or to evaluate
    source: ModelSource | None  # the checkpoint that the model is taken from, None: from scratch
    sizes: dict  # VideoEncoder's arguments
    given: set[str]  # names of the flags on the command line


def find_start(args: argparse.Namespace, given: set[str], pretrained: str) -> Start:
    """Find the checkpoint that a run starts from, and complete the flags by it. Call on every rank.

    given: the names of the flags on the command line. pretrained: the checkpoint of --finetune or
    --init_from, "" for none. Sets --save_prefix and the flags of the model. Raises UserError for a
    flag that contradicts the checkpoint.
    """
    args.save_prefix = dist.on_rank0(lambda: settle_prefix(args, given, pretrained))
    path = dist.on_rank0(lambda: find_checkpoint(args))
    source = None
    if path is not None or pretrained:
        start = str(path or pretrained)
        source = dist.on_rank0(lambda: read_source(args, given, start))
    resumes = path is not None and not evaluates(args)
    if source is not None:
        complete_flags(args, given, source, resumes)
    if hasattr(args, "sampling"):
        check_sampling(args, given)
    if source is not None:
        print0(describe_model(args, source))
    if source is None or (resumes and "model" in given):
        architecture = architecture_named(args.model, args.patch_size)
    else:
        architecture = dict(source.sizes)
        if "patch_size" in given:
            architecture["patch_size"] = args.patch_size
    return Start(path, source, architecture | sizes_in(args), given)


def changed_flags(args: argparse.Namespace, start: Start, names: tuple[str, ...]) -> str:
    """Return which of these flags have other values than in the resumed run, in words.

    None have if all of them are left out.
    """
    values = {name: getattr(args, name) for name in names}
    if start.path is None or start.source is None or not any(values.values()):
        return ""
    recorded = values | start.source.flags
    return " and ".join(f"--{name}" for name in names if recorded[name] != values[name])


def note_kept_list(args: argparse.Namespace, start: Start, names: tuple[str, ...]) -> None:
    """Print a note if flags that choose the training set of a resumed run have changed."""
    changed = changed_flags(args, start, names)
    if changed:
        print0(
            f"note: {changed} changed, but a resumed run keeps its training set, that of "
            f"{manifest_path(args, 'train')}. Another --save_prefix starts a new run."
        )


def lists_again(args: argparse.Namespace, start: Start, names: tuple[str, ...]) -> bool:
    """Return whether flags that choose the validation set of a resumed run have changed.

    If so, print a note.
    """
    changed = changed_flags(args, start, names)
    if changed:
        print0(
            f"note: {changed} changed, so the validation set is listed again. Earlier results of "
            "this run are those of the old set."
        )
    return changed != ""


def settle_prefix(args: argparse.Namespace, given: set[str], pretrained: str) -> str:
    """Return --save_prefix, if not given the name of the run that the flags mean. Call on rank 0.

    It is that of the model, taken from the checkpoint that the run starts from if --model is not
    given. The same command returns the same name again, also after that checkpoint was deleted.
    """
    if args.save_prefix:
        return args.save_prefix
    folder = Path(args.output_dir)
    start = pretrained
    if args.resume not in ("auto", "") or evaluates(args):
        start = args.resume
    if "model" in given or not start:
        return args.model
    if start == "auto":
        return resume.only_run(folder, default=args.model)
    try:
        return prefix_of(args, read_source(args, given, start))
    except UserError:
        if evaluates(args):
            return args.model
        prefix = resume.run_started_from(folder, start)
        if prefix is None:
            raise
        return prefix


def sizes_in(args: argparse.Namespace) -> dict:
    """Return VideoEncoder's arguments that are flags, except patch_size."""
    return {
        "img_size": args.img_size,
        "num_frames": args.num_frames,
        "t_patch_size": args.t_patch_size,
        "cls_embed": args.cls_embed,
        "sep_pos_embed": args.sep_pos_embed,
        "no_qkv_bias": args.no_qkv_bias,
    }


def architecture_named(model: str, patch_size: int | None) -> dict:
    """Return the sizes of a named model. Raises UserError for an unknown name."""
    try:
        return named_size(model, patch_size)
    except ValueError as error:
        raise UserError(str(error)) from error


def prefix_of(args: argparse.Namespace, source: ModelSource) -> str:
    """Return the default of --save_prefix: the model's name."""
    return source.name if is_classifier(args) else f"mae_{source.name}"


def is_classifier(args: argparse.Namespace) -> bool:
    """Return whether the flags are those of a finetuning script."""
    return hasattr(args, "num_classes")


def evaluates(args: argparse.Namespace) -> bool:
    """Return whether the run only evaluates a checkpoint. Pretraining has no --eval."""
    return getattr(args, "eval", False)


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to resume from or to evaluate, None for a new run. Call on rank 0."""
    files = RunFiles(Path(args.output_dir), args.save_prefix)
    if evaluates(args):
        return resume.find_eval_checkpoint(files, args.resume)
    return resume.find_resume(files, args.resume, args.overwrite)


def read_source(args: argparse.Namespace, given: set[str], path: str) -> ModelSource:
    """Return the description of a checkpoint. Raises UserError.

    Given flags complete what it does not record. An image model gets clips of --num_frames in the
    scripts for videos, and one tubelet in the one for images.
    """
    sizes: dict[str, int] = {
        name: getattr(args, name)
        for name in ("img_size", "num_frames", "t_patch_size", "decoder_num_heads")
        if name in given
    }
    if "model" in given:
        sizes["num_heads"] = architecture_named(args.model, None)["num_heads"]
    image_clip = IMAGE_CLIP
    if hasattr(args, "sampling_rate"):
        image_clip = {"num_frames": args.num_frames, "t_patch_size": args.t_patch_size}
    return describe_checkpoint(path, sizes, image_clip)


def complete_flags(
    args: argparse.Namespace, given: set[str], source: ModelSource, resumes: bool
) -> None:
    """Set the flags that are not given to the checkpoint's values, and check those that are.

    resumes: a training run goes on. Its own flags are completed here and compared later
    (`util.resume.check_same_run`). Raises UserError for flags that contradict the checkpoint.
    """
    values = values_for(args, given, source)
    conflicts = []
    rates = source.flags.get("sampling_rate")
    if resumes:
        if isinstance(rates, list) and hasattr(args, "sampling_rate"):
            values["sampling_rate"] = rates
        recorded = {name: source.flags[name] for name in values if name in source.flags}
        values |= recorded
        name = source.flags.get("model", prefix_of(args, source))
    else:
        conflicts += model_conflicts(args, given, source)
        name = prefix_of(args, source)
    if "model" not in given:
        args.model = name
    for name, value in values.items():
        current = getattr(args, name)
        if name not in given:
            setattr(args, name, value)
        elif current == value or resumes:
            continue
        elif name in REPLACING:
            print0(f"--{name} {spaced(current)} replaces the {value} of {source.path}")
        else:
            conflicts.append(f"--{name} is {current}, but the checkpoint has {value}")
    if isinstance(rates, list) and not resumes and hasattr(args, "sampling_rate"):
        print0(
            f"note: {source.path} was trained at --sampling_rate {spaced(rates)}, this run is at "
            f"{spaced(args.sampling_rate)}"
        )
    if conflicts:
        raise UserError(
            f"{source.path} is another model: {'; '.join(conflicts)}. Drop the flags, or pass "
            "another checkpoint."
        )


def values_for(args: argparse.Namespace, given: set[str], source: ModelSource) -> dict:
    """Return the values of the checkpoint for the flags that the script has."""
    values = {name: source.sizes[name] for name in SIZE_FLAGS}
    for name in SPACING_FLAGS:
        value = source.flags.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            values[name] = value
    if source.flags.get("sampling") in SAMPLING_METHODS:
        values["sampling"] = source.flags["sampling"]
    if is_classifier(args):
        values |= classifier_values(args, given, source)
    else:
        values |= decoder_values(args, given, source)
    return {name: value for name, value in values.items() if hasattr(args, name)}


def classifier_values(args: argparse.Namespace, given: set[str], source: ModelSource) -> dict:
    """Return the checkpoint's values for the flags of a classifier.

    Raises UserError if it is evaluated and has no head, or none whose read-out is known.
    """
    if args.eval:
        read_out = args.global_pool if "global_pool" in given else None
        return {
            "num_classes": require_head(source),
            "global_pool": require_read_out(source, read_out),
        }
    if source.global_pool is None:
        return {}
    return {"global_pool": source.global_pool}


def decoder_values(args: argparse.Namespace, given: set[str], source: ModelSource) -> dict:
    """Return the checkpoint's values for the flags of a decoder, for clips of --num_frames.

    A new decoder predicts all frames. Raises UserError if nothing tells the number of attention
    heads of the checkpoint's decoder.
    """
    num_frames = args.num_frames if "num_frames" in given else source.sizes["num_frames"]
    if not source.decoder:
        return {} if "pred_t_dim" in given else {"pred_t_dim": num_frames}
    if "decoder_num_heads" not in source.decoder:
        raise UserError(
            f"{source.path} does not record the attention heads of its decoder, and width "
            f"{source.decoder['decoder_embed_dim']} is unusual. Pass --decoder_num_heads."
        )
    decoder = decoder_for_clips(source.decoder, source.sizes, num_frames)
    if source.targets != "pixels":
        decoder.pop("norm_pix_loss", None)
    return decoder


def model_conflicts(args: argparse.Namespace, given: set[str], source: ModelSource) -> list[str]:
    """Return how a given --model contradicts the checkpoint."""
    if "model" not in given:
        return []
    patch_size = args.patch_size if "patch_size" in given else None
    named = architecture_named(args.model, patch_size)
    differing = [name for name in named if named[name] != source.sizes[name]]
    if not differing:
        return []
    wanted = ", ".join(f"{name} {named[name]}" for name in differing)
    found = ", ".join(f"{name} {source.sizes[name]}" for name in differing)
    return [f"--model {args.model} has {wanted}, but the checkpoint has {found}"]


def spaced(value: int | list[int]) -> str:
    """Return the value of a flag that takes one or several, as on a command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_model(args: argparse.Namespace, source: ModelSource) -> str:
    """Return a line about the model that the flags describe after `complete_flags`."""
    spacing = ""
    if hasattr(args, "sampling"):
        spacing = f", every {spaced(args.sampling_rate)} frames at {args.target_fps:g} fps"
        if args.sampling == "uniform":
            spacing = ", spread over the video"
    return (
        f"model of {source.path} ({source.family}): {args.model}, patch "
        f"{source.sizes['patch_size']}, {args.num_frames} frames of {args.img_size} x "
        f"{args.img_size} pixels{spacing}"
    )
