"""Load models from checkpoints of any family: encoders, classifiers, autoencoders.

Letters as in models_vit.py.
"""

import math
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models_mae import MaskedAutoencoderViT
from models_vit import VideoEncoder, VisionTransformer, model_names
from util.checkpoint import load
from util.checkpoint_formats import (
    NON_ENCODER,
    ImportedModel,
    describe_num_heads,
    parse_checkpoint,
)
from util.class_names import class_list
from util.dist import UserError, print0
from util.ema import averaged_checkpoint
from util.model_source import (
    IMAGE_CLIP,
    decoder_for_clips,
    describe,
    model_name,
    require_head,
    require_read_out,
)

VALUE_FLAGS = ("patch_size", "t_patch_size", "decoder_num_heads")
BOOL_FLAGS = ("cls_embed", "sep_pos_embed", "global_pool")
RESAMPLED = ("img_size", "num_frames")  # sizes that may differ from the checkpoint's


def load_encoder(
    path: str | Path,
    *,
    num_heads: int | None = None,
    img_size: int | None = None,
    num_frames: int | None = None,
    t_patch_size: int | None = None,
) -> VideoEncoder:
    """Return the encoder of a checkpoint of any family, in evaluation mode.

        encoder = load_encoder("run.pth")
        tokens = encoder(clips)  # (B, 3, T, H, W) -> (B, [1 +] L, D)

    The clips are uint8, or float and normalized by encoder.config["mean"] and
    encoder.config["std"].

    The sizes are for files that do not record them: num_heads for unusual widths, num_frames and
    t_patch_size (frames) for image models, img_size (pixels) and num_frames for VideoMAE's. Where
    img_size or num_frames differ from the file's, positions are resampled. Raises UserError.
    """
    sizes = {
        "num_heads": num_heads,
        "img_size": img_size,
        "num_frames": num_frames,
        "t_patch_size": t_patch_size,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    found = parse_checkpoint(load(path), given, path)
    try:
        encoder = VideoEncoder(**sizes_to_build(found, given, path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    load_into(encoder, found, path)
    return for_inference(encoder)


def load_classifier(
    path: str | Path, *, given: dict | None = None, class_names: str = ""
) -> VisionTransformer:
    """Return the classifier in a checkpoint of any family, with its head, in evaluation mode.

    It takes clips like `load_encoder`'s; those of an image model have one tubelet of two frames
    unless given. given: sizes by name as for `load_encoder`, and global_pool, where the file does
    not record the read-out. class_names: see `class_list`; config["classes"] has the names of all
    outputs. Raises UserError.
    """
    given = dict(given or {})
    found = parse_checkpoint(load(path), given, path, IMAGE_CLIP)
    source = describe(found, path)
    num_classes = require_head(source)
    global_pool = require_read_out(source, given.pop("global_pool", None))
    try:
        model = VisionTransformer(
            **sizes_to_build(found, given, path),
            num_classes=num_classes,
            global_pool=global_pool,
            attentive_pool=source.attentive,
            drop_path_rate=0.0,
            dropout=0.0,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    load_into(model, found, path, keep_head=True)
    names = class_list(path, num_classes, source.classes, class_names)
    names += [str(index) for index in range(len(names), num_classes)]  # outputs without a name
    model.config["classes"] = names
    return for_inference(model)


def load_autoencoder(path: str | Path, *, given: dict | None = None) -> MaskedAutoencoderViT:
    """Return encoder and decoder of a checkpoint of any family, in evaluation mode.

    It takes clips like `load_encoder`'s. given: sizes by name as for `load_encoder`, and
    decoder_num_heads. If config has "targets": "videomae", the decoder predicts pixels in [0, 1],
    normalized per token and color. Raises UserError, also if there is no decoder that
    MaskedAutoencoderViT can express.
    """
    given = given or {}
    found = parse_checkpoint(load(path), given, path)
    if not found.decoder:
        raise UserError(
            f"{path} has no decoder that this repository can run. Pass a pretraining checkpoint."
        )
    require_decoder_heads(found, path)
    sizes = sizes_to_build(found, given, path)
    decoder = decoder_for_clips(found.decoder_sizes, found.sizes, sizes["num_frames"])
    try:
        model = MaskedAutoencoderViT(**sizes, **decoder)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    load_into(model, found, path)
    if found.targets != "pixels":
        model.config["targets"] = found.targets
    return for_inference(model)


def for_inference(model):
    """Return a loaded model in evaluation mode. It normalizes uint8 clips as in its training."""
    model.pixel_stats = (tuple(model.config["mean"]), tuple(model.config["std"]))
    return model.eval()


def sizes_to_build(found: ImportedModel, given: dict, path: str | Path) -> dict:
    """Return VideoEncoder's arguments: those of a file, but img_size and num_frames as given.

    Raises UserError if another size that is given contradicts the file.
    """
    for name in ("num_heads", "t_patch_size"):
        if name in given and given[name] != found.sizes[name]:
            raise UserError(f"{path} has {name} {found.sizes[name]}, not {given[name]}")
    return found.sizes | {name: given[name] for name in RESAMPLED if name in given}


def require_decoder_heads(found: ImportedModel, path: str | Path) -> None:
    """Raise UserError if a decoder's number of heads is unknown: no tensor's shape contains it."""
    if "decoder_num_heads" not in found.decoder_sizes:
        raise UserError(
            f"{path} does not record the attention heads of its decoder, and width "
            f"{found.decoder_sizes['decoder_embed_dim']} is unusual. Pass decoder_num_heads."
        )


def load_pretrained(
    path: str | Path, model: VideoEncoder, keep_head: bool = False, averaged: bool = False
) -> None:
    """Copy the encoder of a checkpoint into a model, and the decoder if both have one.

    keep_head: copy the classifier's head too. averaged: read the EMA instead of the weights beside
    it. All other weights of the model stay as initialized. Set model.config["mean"] and ["std"] to
    those of the pixels that the encoder was trained on. Raises UserError, with the flags that fit
    the checkpoint, if the model has another architecture.
    """
    saved = load(path)
    if averaged:
        saved = averaged_checkpoint(path, saved)
    found = parse_checkpoint(saved, model.config, path)
    sizes = dict(found.sizes)
    if keep_head and found.global_pool is not None:
        sizes["global_pool"] = found.global_pool
    if "decoder_num_heads" in found.decoder_sizes and "decoder_num_heads" in model.config:
        sizes["decoder_num_heads"] = found.decoder_sizes["decoder_num_heads"]
    compared = sorted(sizes.keys() - {"img_size", "num_frames"})
    differing = [name for name in compared if sizes[name] != model.config[name]]
    if differing:
        listing = "; ".join(f"{name} {sizes[name]}, not {model.config[name]}" for name in differing)
        raise UserError(
            f"{path} has {listing}. Pass the flags that fit it ({flags_for(differing, sizes)}), "
            "or another checkpoint."
        )
    load_into(model, found, path, keep_head)


def flags_for(names: list[str], sizes: dict) -> str:
    """Return the flags that give a model these sizes, for the sizes in `names`."""
    flags = []
    if not {"embed_dim", "depth", "num_heads"}.isdisjoint(names):
        flags.append(_model_flag(sizes))
    flags += [f"--{name} {sizes[name]}" for name in names if name in VALUE_FLAGS]
    for name in names:
        if name in BOOL_FLAGS and sizes[name]:
            flags.append(f"--{name}")
        elif name in BOOL_FLAGS:
            flags.append(f"--no-{name}")
    if "no_qkv_bias" in names and sizes["no_qkv_bias"]:
        flags.append("--no_qkv_bias")
    elif "no_qkv_bias" in names:
        flags.append("no --no_qkv_bias")
    return " ".join(flags)


def _model_flag(sizes: dict) -> str:
    """Return the --model flag for a width, depth and number of heads."""
    name = model_name(sizes)
    if name in model_names():
        return f"--model {name}"
    return "num_heads in your own code"


def load_into(
    model: VideoEncoder, found: ImportedModel, path: str | Path, keep_head: bool = False
) -> None:
    """Copy the weights of a file into a model and print a report; resample positions if needed.

    The decoder is copied if both have one, the head if keep_head. Raises UserError, before the
    model is changed, if tensors are missing, unknown or of another shape.
    """
    target = model.state_dict()
    weights = dict(found.weights)
    if "decoder_pred.weight" in target:
        weights |= found.decoder
    if keep_head:
        weights |= found.head
    weights, resampled = _resample_all(weights, model, found, path)
    fresh = [name for name in target if _may_be_fresh(name, weights)]
    faults = [f"{name} is missing" for name in target if name not in weights and name not in fresh]
    for name, value in weights.items():
        shape = tuple(value.shape)
        if name not in target:
            faults.append(f"{name} is not in the model")
        elif shape != tuple(target[name].shape):
            faults.append(f"{name} has shape {shape}, not {tuple(target[name].shape)}")
    if faults:
        shown = "; ".join(faults[:3])
        if len(faults) > 3:
            shown += " ..."
        raise UserError(f"{path} does not fit the model: {len(faults)} tensors, {shown}")
    model.load_state_dict({name: target[name] for name in fresh} | weights)
    model.config |= found.pixel_stats
    _print_report(path, found, weights, found.resized | resampled, fresh)


def _may_be_fresh(name: str, weights: dict[str, Tensor]) -> bool:
    """Return whether a tensor of a model may stay as initialized.

    A head may, and a decoder of which the file has no part.
    """
    if name in weights:
        return False
    if name.startswith("head."):
        return True
    return name.startswith(NON_ENCODER) and "decoder_pred.weight" not in weights


def _resample_all(
    weights: dict[str, Tensor], model: VideoEncoder, found: ImportedModel, path: str | Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights with positions that fit the model, and the shapes of those resampled."""
    target = model.state_dict()
    old_steps = None
    if "num_frames" in found.config or "pos_embed" in found.synthesized:
        old_steps = found.sizes["num_frames"] // found.sizes["t_patch_size"]
    weights = dict(weights)
    resampled = {}
    for name, value in weights.items():
        if "pos_embed" not in name or name not in target:
            continue
        kind = name.removeprefix("decoder_")
        same_steps = kind != "pos_embed" or old_steps in (None, model.grid[0])
        if not _needs_resampling(value, target[name], same_steps):
            continue
        try:
            weights[name] = resample_positions(kind, value.float(), model, old_steps)
        except ValueError as error:
            raise UserError(f"{path}: {name}: {error}") from None
        resampled[name] = f"{tuple(value.shape)} -> {tuple(target[name].shape)}"
    return weights, resampled


def _needs_resampling(old: Tensor, new: Tensor, same_steps: bool) -> bool:
    """Return whether positions (1, N, D) and (1, N', D) are of different grids.

    same_steps: joint positions have as many time steps as the model, as far as is known. Other
    ones, such as 2 x 4 x 4 and 8 x 2 x 2, may have the same number N.
    """
    if old.shape == new.shape and same_steps:
        return False
    return old.ndim == 3 and old.shape[0] == 1 and old.shape[1] > 0 and old.shape[2] == new.shape[2]


def resample_positions(
    kind: str, positions: Tensor, model: VideoEncoder, old_steps: int | None = None
) -> Tensor:
    """Return position embeddings (1, N, D) resampled to the model's grid (1, N', D).

    Bicubic in space, linear in time (Dosovitskiy et al. 2020, 3.2). kind: "pos_embed_spatial",
    "pos_embed_temporal", or "pos_embed" for joint ones. old_steps: time steps of joint positions,
    if known; else that or the frame size must be the model's. Raises ValueError if the positions
    do not form a square grid.
    """
    steps, h, w = model.grid
    if kind == "pos_embed_temporal":
        return _interpolate_time(positions.transpose(1, 2), steps).transpose(1, 2)
    joint = kind == "pos_embed"
    num_class = int(joint and model.cls_embed)
    class_position = positions[:, :num_class]
    patches = positions[:, num_class:]
    if not joint:
        old_steps = 1
    elif old_steps is None:
        old_steps = _infer_steps(patches.shape[1], model.grid)
    side = _square_side(patches.shape[1], old_steps)
    maps = patches[0].unflatten(0, (old_steps, side, side)).permute(0, 3, 1, 2)  # (t', D, h', w')
    if side != h:
        maps = F.interpolate(maps, size=(h, w), mode="bicubic", align_corners=False)
    if joint and old_steps != steps:
        series = maps.permute(2, 3, 1, 0).flatten(0, 1)  # (hw, D, t')
        maps = _interpolate_time(series, steps).unflatten(0, (h, w)).permute(3, 2, 0, 1)
    patches = maps.permute(0, 2, 3, 1).flatten(0, 2)[None]
    return torch.cat([class_position, patches], dim=1)


def _interpolate_time(series: Tensor, steps: int) -> Tensor:
    """Return series (B, D, t') interpolated linearly to (B, D, steps)."""
    return F.interpolate(series, size=steps, mode="linear", align_corners=False)


def _infer_steps(count: int, grid: tuple[int, int, int]) -> int:
    """Return the time steps of `count` joint positions: the model's, or those of its frame size.

    Return 0 if neither is possible.
    """
    steps, h, w = grid
    if steps * math.isqrt(count // steps) ** 2 == count:
        return steps
    if count % (h * w) == 0:
        return count // (h * w)
    return 0


def _square_side(count: int, steps: int) -> int:
    """Return the side of the square frames that `count` positions form in `steps` steps."""
    if steps > 0:
        side = math.isqrt(count // steps)
        if side > 0 and steps * side**2 == count:
            return side
    raise ValueError(
        f"{count} positions: neither their frame size nor their number of frames is the model's"
    )


def _print_report(
    path: str | Path,
    found: ImportedModel,
    weights: dict[str, Tensor],
    resized: dict[str, str],
    fresh: list[str],
) -> None:
    """Print which tensors were matched, resized, initialized and unused."""
    pixels = found.pixel_stats
    matched = weights.keys() - resized.keys() - found.synthesized.keys()
    synthesized = Counter(
        f"{re.sub(r'[.][0-9]+[.]', '.*.', name)}: {what}"
        for name, what in found.synthesized.items()
    )
    beside = [*found.unused, *found.decoder, *found.head]
    unused = Counter(name.split(".")[0] for name in beside if name not in weights)
    print0(
        f"weights from {path} ({found.family}): {describe_num_heads(found)}; "
        f"trained on pixels of mean {pixels['mean']}, std {pixels['std']}"
    )
    _print_row("matched", [f"{len(matched)} tensors"])
    _print_row("resized", [f"{name} {shapes}" for name, shapes in sorted(resized.items())])
    heads = [name for name in fresh if name.startswith("head.")]
    decoder = Counter(name.split(".")[0] for name in fresh if name not in heads)
    counted = [f"{what} ({n})" for what, n in (decoder + synthesized).items()]
    _print_row("initialized", heads + counted)
    _print_row("unused", [f"{name} ({n})" for name, n in unused.items()])


def _print_row(heading: str, items: list[str]) -> None:
    """Print a row of the report, "-" if there are no items."""
    print0(f"  {heading:<12} {', '.join(items) or '-'}")
