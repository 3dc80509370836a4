"""Encoders from other checkpoints: every public family under our names, strictly, with a report; export; inspection.

| family                                   | what is done to it                                                                            |
| ---------------------------------------- | --------------------------------------------------------------------------------------------- |
| ours, optimized-stmae, mae_st, SlowFast  | names are ours already (q, k, v perhaps fused); a decoder is taken where the model has one     |
| image MAE, timm ViT                      | embedding repeated over t frames and divided by t; positions to class and space, time zero    |
| VideoMAE, VideoMAE v2, also Hugging Face | renamed; k bias zero; positions, which are not stored, the fixed 1-d sinusoid over all tokens |

Letters as in models_vit.py. Sizes come from shapes. Head counts show in no shape: see `sizes_of`.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.transforms import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD
from models_vit import SIZES, VideoEncoder
from util.checkpoint import load, reason
from util.dist import UserError, print0

EMBEDDING = "patch_embed.proj.weight"
LEFT = (
    "decoder",
    "mask_token",
    "encoder_to_decoder",
    "pred_head.",
    "head.",
    "classifier.",
)  # decoders and classifiers
HEADS = {width: heads for width, _, heads in SIZES.values()} | {1408: 16}  # VideoMAE v2's giant
VIDEO, IMAGENET = {"mean": VIDEO_MEAN, "std": VIDEO_STD}, {"mean": IMAGE_MEAN, "std": IMAGE_STD}


class Found(NamedTuple):
    """An encoder from a file."""

    family: str
    weights: dict[str, Tensor]  # under our names
    left: dict[str, Tensor]  # decoder and head
    has_our_decoder: bool
    made: dict[str, str]  # which of the weights are not in the file, and what they are
    resized: dict[str, str]  # which have another shape there
    sizes: dict  # VideoEncoder's arguments
    config: dict  # what the file says itself; {}: nothing
    pixels: dict  # mean and std of the pixels that it was trained on
    heads_from: str


class Family(NamedTuple):
    """How to recognise a family by its tensors, its names in ours, what its files lack, and its pixels' mean and std."""

    name: str
    recognise: Callable[[dict[str, Tensor]], bool]
    renames: tuple[tuple[str, str], ...]  # regular expressions
    complete: Callable[
        [dict[str, Tensor], dict], tuple[dict, dict]
    ]  # (weights, known sizes) -> Found.made, Found.resized
    needs: tuple[str, ...]  # sizes that its tensors do not tell
    pixels: dict
    has_our_decoder: bool = False


def has(weights: dict[str, Tensor], ending: str, axes: int) -> bool:
    """Whether a tensor with so many axes has a name that ends so."""
    return any(name.endswith(ending) and value.ndim == axes for name, value in weights.items())


def sinusoid(count: int, width: int) -> Tensor:
    """Fixed positions (1, N, D): sines in even columns, cosines in odd ones (Vaswani et al. 2017, 3.5)."""
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(width) // 2 * 2 / width
    )
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()[None]


def complete_videomae(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """The zero biases of k, and positions for known img_size and num_frames."""
    biases = [name for name in weights if name.endswith(".attn.q.bias")]
    zero = {
        name.replace(".q.", ".k."): torch.zeros_like(weights[name])
        for name in biases
        if name.replace(".q.", ".k.") not in weights
    }
    weights |= zero
    made = dict.fromkeys(zero, "zero")
    if "pos_embed" not in weights:
        width, _, t, p, _ = weights[EMBEDDING].shape
        grid = known["num_frames"] // t, known["img_size"] // p, known["img_size"] // p
        weights["pos_embed"] = sinusoid(math.prod(grid), width)
        made["pos_embed"] = f"sinusoid over {' x '.join(map(str, grid))} tokens"
    return made, {}


def complete_image(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """From an image model's embedding (D, C, p, p) and positions (1, [1 +] hw, D) to those of clips."""
    t, image, positions = (
        known["t_patch_size"],
        weights[EMBEDDING].float(),
        weights.pop("pos_embed"),
    )
    weights[EMBEDDING] = image[:, :, None].expand(-1, -1, t, -1, -1) / t
    rows = int(
        math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]
    )  # a square number of positions has none for the class token
    weights["pos_embed_spatial"] = positions[:, rows:]
    weights["pos_embed_temporal"] = positions.new_zeros(
        1, known["num_frames"] // t, positions.shape[2]
    )
    made = {"pos_embed_temporal": "zero"}
    if "cls_token" in weights:
        weights["pos_embed_class"] = (
            positions[:, :1] if rows else torch.zeros_like(positions[:, :1])
        )
        made |= {} if rows else {"pos_embed_class": "zero"}
    return made, {EMBEDDING: f"{tuple(image.shape)} -> {tuple(weights[EMBEDDING].shape)}"}


COMMON = ((r"\bfc_norm\.", "norm."), (r"\.attn\.([qv])_bias$", r".attn.\1.bias"))
HUGGING_FACE = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
FAMILIES = (  # the first that recognises a file
    Family(
        "Hugging Face VideoMAE",
        lambda weights: has(weights, "patch_embeddings.projection.weight", 5),
        HUGGING_FACE,
        complete_videomae,
        ("img_size", "num_frames"),
        IMAGENET,
    ),
    Family(
        "image MAE or timm ViT",
        lambda weights: has(weights, EMBEDDING, 4),
        (),
        complete_image,
        ("num_frames", "t_patch_size"),
        IMAGENET,
    ),
    Family(
        "VideoMAE",
        lambda weights: has(weights, EMBEDDING, 5) and has(weights, ".attn.q_bias", 1),
        ((r"^(encoder|backbone)\.", ""),),
        complete_videomae,
        ("img_size", "num_frames"),
        IMAGENET,
    ),
    Family(
        "mae_st, optimized-stmae or SlowFast",
        lambda weights: has(weights, EMBEDDING, 5),
        (),
        lambda weights, known: ({}, {}),
        (),
        VIDEO,
        True,
    ),
)


def read_file(path: str | Path) -> dict:
    """A checkpoint as `util.checkpoint.load` reads it, or model.safetensors (or its folder) with what config.json beside it says."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors":
        return load(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found: check the path")
    try:
        from safetensors import torch as safetensors
    except ImportError:
        raise UserError(
            f"{path} needs safetensors, which is not installed: pip install safetensors"
        ) from None
    beside = path.with_name("config.json")
    try:
        described = json.loads(beside.read_text()) if beside.is_file() else {}
        if "sha256" in described and digest(path) != described.pop("sha256"):
            raise ValueError("its sha256 is not the one in config.json")
        weights = safetensors.load_file(path)
    except (
        Exception
    ) as error:  # the parsers may stumble in any way over bytes that are no such file
        raise UserError(
            f"checkpoint {path} cannot be read ({reason(error)}): damaged, or not a checkpoint"
        ) from error
    if described.get("model_type") == "videomae":
        ours = {
            "img_size": "image_size",
            "num_frames": "num_frames",
            "num_heads": "num_attention_heads",
        }
        described = {
            "config": {key: described[name] for key, name in ours.items() if name in described}
        }
    config = described.get("config")
    if isinstance(config, dict):  # JSON has no tuples
        config |= {key: tuple(config[key]) for key in ("mean", "std") if key in config}
    return described | {"model": weights}


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def under_our_names(
    weights: dict[str, Tensor], renames: tuple[tuple[str, str], ...], path: str | Path
) -> dict[str, Tensor]:
    """Weights renamed, and q, k, v apart. Raises UserError where two would have one name."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in (*renames, *COMMON):
            name = re.sub(pattern, replacement, name)
        fused = ".attn.qkv." in name
        if fused and (value.ndim == 0 or len(value) % 3):
            raise UserError(
                f"{path}: {name} has shape {tuple(value.shape)}, which is not q, k and v"
            )
        parts = (
            zip((name.replace("qkv", part) for part in "qkv"), value.chunk(3), strict=True)
            if fused
            else [(name, value)]
        )
        for new, part in parts:
            if new in renamed:
                raise UserError(
                    f"{path} has two tensors for {new}: no encoder of ours computes what it does"
                )
            renamed[new] = part
    return renamed


def sizes_of(
    weights: dict[str, Tensor], config: dict, given: dict, path: str | Path
) -> tuple[dict, str]:
    """VideoEncoder's arguments as the shapes of its weights tell them, and where the head count, which no shape tells, comes from:
    the file's config, else `given`, else the width's usual count. Raises UserError where none knows."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    width, _, t, p, _ = weights[EMBEDDING].shape
    sources = (
        (config.get("num_heads"), "its config"),
        (given.get("num_heads"), "as --model or num_heads says"),
        (HEADS.get(width), "usual for its width"),
    )
    heads, heads_from = next((source for source in sources if source[0]), (None, None))
    if heads is None:
        raise UserError(
            f"{path} does not say how many attention heads it has, and width {width} is none of {sorted(HEADS)}: give num_heads"
        )
    separate = "pos_embed_spatial" in weights or "pos_embed_temporal" in weights
    if separate:
        side, steps = (
            math.isqrt(weights["pos_embed_spatial"].shape[1]),
            weights["pos_embed_temporal"].shape[1],
        )
    else:
        known = require(given | config, ("img_size", "num_frames"), path)
        side, steps = known["img_size"] // p, known["num_frames"] // t
    sizes = {
        "img_size": side * p,
        "patch_size": p,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "num_frames": steps * t,
        "t_patch_size": t,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "sep_pos_embed": separate,
        "cls_embed": "cls_token" in weights,
        "no_qkv_bias": "blocks.0.attn.q.bias" not in weights,
    }
    return sizes, f"{heads} attention heads ({heads_from})"


def require(known: dict, keys: tuple[str, ...], path: str | Path) -> dict:
    """known, if it has positive numbers for all keys; else UserError."""
    missing = [key for key in keys if not isinstance(known.get(key), int) or known[key] < 1]
    if missing:
        raise UserError(
            f"{path} does not say its {' and '.join(missing)}: give {', '.join(missing)}"
        )
    return known


def read(checkpoint: dict, given: dict, path: str | Path) -> Found:
    """The encoder in a checkpoint of any family. given: sizes for what it does not say. Raises UserError, which names path."""
    config = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
    weights = next(
        (
            checkpoint[key]
            for key in ("model", "model_state", "module")
            if isinstance(checkpoint.get(key), dict)
        ),
        checkpoint,
    )
    weights = {
        re.sub(r"^((module|model)\.)+", "", name.replace("_orig_mod.", "")): value
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    family = next((family for family in FAMILIES if family.recognise(weights)), None)
    if family is None:
        raise UserError(
            f"{path} holds no video encoder (no {EMBEDDING} with 5 axes): is it another kind of model?"
        )
    weights = under_our_names(weights, family.renames, path)
    left = {name: weights.pop(name) for name in list(weights) if name.startswith(LEFT)}
    try:
        require(
            config,
            tuple(key for key in ("num_heads", "img_size", "num_frames") if key in config),
            path,
        )
        made, resized = family.complete(weights, require(given | config, family.needs, path))
        sizes, heads_from = sizes_of(weights, config, given, path)
    except (
        KeyError,
        IndexError,
        ValueError,
    ) as error:  # a tensor that is missing, or has another number of axes
        raise UserError(
            f"{path} looks like {family.name}, but {error} is missing or of another shape"
        ) from error
    name = "ours" if "embed_dim" in config else family.name
    pixels = family.pixels | {key: config[key] for key in ("mean", "std") if key in config}
    return Found(
        name,
        weights,
        left,
        family.has_our_decoder,
        made,
        resized,
        sizes,
        config,
        pixels,
        heads_from,
    )


def resample_positions(
    name: str, value: Tensor, model: VideoEncoder, old_steps: int | None = None
) -> Tensor:
    """Position embeddings (1, N, D) for the model's grid: bicubic in space, linear in time (Dosovitskiy et al. 2020, 3.2).

    old_steps: t' of joint positions, where it is known; else that or the size of the frames has to be the model's.
    Raises ValueError when the positions fit no square grid.
    """
    steps, h, w = model.grid
    if name == "pos_embed_temporal":
        return F.interpolate(
            value.transpose(1, 2), size=steps, mode="linear", align_corners=False
        ).transpose(1, 2)
    joint = name == "pos_embed"
    rows = int(joint and model.cls_embed)
    head, value = value[:, :rows], value[:, rows:]
    count = value.shape[1]
    if not joint:
        old_steps = 1
    elif old_steps is None:
        old_steps = steps if steps * math.isqrt(count // steps) ** 2 == count else count / (h * w)
    if old_steps != int(old_steps) or math.isqrt(count // int(old_steps)) ** 2 * old_steps != count:
        raise ValueError(
            f"{count} positions: neither their frames nor their number of frames are the model's"
        )
    old_steps, side = int(old_steps), math.isqrt(count // int(old_steps))
    maps = (
        value.unflatten(1, (old_steps, side, side)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    )  # (t', D, h, w)
    if side != h:
        maps = F.interpolate(maps, size=(h, w), mode="bicubic", align_corners=False)
    if joint and old_steps != steps:
        maps = F.interpolate(
            maps.permute(2, 3, 1, 0).flatten(0, 1), size=steps, mode="linear", align_corners=False
        )  # (hw, D, t')
        maps = maps.unflatten(0, (h, w)).permute(3, 2, 0, 1)
    return torch.cat([head, maps.permute(0, 2, 3, 1).flatten(0, 2)[None]], dim=1)


def fill(model: VideoEncoder, found: Found, path: str | Path) -> None:
    """Load what was found, positions resampled to the model's grid, all else as it is; say what went where. Raises UserError."""
    target, weights, resized, config = (
        model.state_dict(),
        dict(found.weights),
        dict(found.resized),
        found.config,
    )
    decoder = {
        name: value
        for name, value in found.left.items()
        if name.startswith(("decoder_", "mask_token"))
    }
    if not (
        found.has_our_decoder
        and "decoder_pred.weight" in decoder
        and "decoder_pred.weight" in target
    ):
        decoder = {}
    weights |= decoder
    fresh = [name for name in target if name.startswith("head." if decoder else LEFT)]
    old_steps = (
        config["num_frames"] // found.sizes["t_patch_size"] if "num_frames" in config else None
    )
    faults = [f"{name} is missing" for name in target if name not in weights and name not in fresh]
    for name in list(weights):
        old, new = tuple(weights[name].shape), tuple(target[name].shape) if name in target else None
        if (
            "pos_embed" in name
            and new
            and old != new
            and len(old) == 3
            and old[0] == 1
            and old[1]
            and old[2] == new[2]
        ):
            try:
                weights[name] = resample_positions(
                    name.removeprefix("decoder_"), weights[name].float(), model, old_steps
                )
            except ValueError as error:
                raise UserError(f"{path}: {name}: {error}") from None
            resized[name] = f"{old} -> {new}"
        if new is None or tuple(weights[name].shape) != new:
            faults.append(
                f"{name} has no place" if new is None else f"{name} has shape {old}, not {new}"
            )
    if faults:
        raise UserError(
            f"{path} does not fit the model: {len(faults)} tensors, {'; '.join(faults[:3])}{' ...' if faults[3:] else ''}"
        )
    model.load_state_dict({name: target[name] for name in fresh} | weights)
    model.config |= found.pixels
    unused = Counter(name.split(".")[0] for name in found.left if name not in decoder)
    made = Counter(
        f"{re.sub(r'[.][0-9]+[.]', '.*.', name)}: {what}" for name, what in found.made.items()
    )
    print0(
        f"weights from {path} ({found.family}): {found.heads_from}; trained on pixels of mean {found.pixels['mean']}, std {found.pixels['std']}"
    )
    print0(f"  matched      {len(weights.keys() - resized.keys() - found.made.keys())} tensors")
    print0(
        f"  resized      {', '.join(f'{name} {shapes}' for name, shapes in sorted(resized.items())) or '-'}"
    )
    print0(
        f"  initialised  {', '.join(fresh + [f'{what} ({count})' for what, count in made.items()]) or '-'}"
    )
    print0(
        f"  unused       {', '.join(f'{name} ({count})' for name, count in unused.items()) or '-'}"
    )


def flags_for(names: list[str], sizes: dict) -> str:
    """The flags of the scripts that make a model of such sizes, as far as `names` go."""
    named = next(
        (
            name
            for name, size in SIZES.items()
            if size == (sizes["embed_dim"], sizes["depth"], sizes["num_heads"])
        ),
        None,
    )
    flags = (
        [f"--model vit_{named}_patch{14 if sizes['patch_size'] == 14 and named == 'huge' else 16}"]
        if named
        else ["num_heads in your own code"]
    )
    flags = flags if {"embed_dim", "depth", "num_heads"} & set(names) else []
    flags += [
        f"--{name} {sizes[name]}"
        for name in names
        if name in ("patch_size", "t_patch_size", "decoder_num_heads")
    ]
    flags += [
        f"--{'' if sizes[name] else 'no-'}{name}"
        for name in names
        if name in ("cls_embed", "sep_pos_embed", "global_pool")
    ]
    flags += (
        ["--no_qkv_bias" if sizes["no_qkv_bias"] else "no --no_qkv_bias"]
        if "no_qkv_bias" in names
        else []
    )
    return " ".join(flags)


def load_pretrained(path: str | Path, model: VideoEncoder) -> None:
    """Put the encoder of a checkpoint into a model (and the decoder, if both have one of ours); what else the model has stays fresh.

    The pixels' mean and std of the weights go into model.config. Raises UserError with what does not fit, and the flags that would.
    """
    found = read(read_file(path), model.config, path)
    sizes = found.sizes | {
        key: found.config[key]
        for key in ("global_pool", "decoder_num_heads")
        if key in found.config and key in model.config
    }
    differing = [
        key
        for key in sorted(sizes.keys() - {"img_size", "num_frames"})
        if sizes[key] != model.config[key]
    ]
    if differing:
        listing = "; ".join(f"{key} {sizes[key]}, not {model.config[key]}" for key in differing)
        raise UserError(
            f"{path} has {listing}: give the flags that fit it ({flags_for(differing, sizes)}), or another checkpoint"
        )
    fill(model, found, path)


def load_encoder(
    path: str | Path,
    *,
    num_heads: int | None = None,
    img_size: int | None = None,
    num_frames: int | None = None,
    t_patch_size: int | None = None,
) -> VideoEncoder:
    """The encoder of a checkpoint of any family for use in other code, in evaluation mode.

        encoder = load_encoder("run.pth")
        tokens = encoder(clips)  # (B, 3, T, H, W) float, normalised by encoder.config["mean"] and ["std"] -> (B, [1 +] L, D)

    The sizes are for files that do not say them: num_heads at an unusual width, num_frames and t_patch_size of image models,
    img_size and num_frames of VideoMAE's; where they differ from the file's, positions are resampled. Raises UserError.
    """
    asked = {
        "num_heads": num_heads,
        "img_size": img_size,
        "num_frames": num_frames,
        "t_patch_size": t_patch_size,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    found = read(read_file(path), asked, path)
    for key in asked.keys() & {"num_heads", "t_patch_size"}:
        if asked[key] != found.sizes[key]:
            raise UserError(f"{path} has {key} {found.sizes[key]}, not {asked[key]}")
    try:
        encoder = VideoEncoder(**found.sizes | asked)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    fill(encoder, found, path)
    return encoder.eval()
