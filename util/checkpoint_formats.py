"""Layouts of video and image encoders in other projects' checkpoints, as a table, and their parser.

| family                              | conversion to our layout                                   |
| ----------------------------------- | ---------------------------------------------------------- |
| ours, optimized-stmae,              | names are ours (q, k, v may be fused);                     |
| mae_st, SlowFast                    | our kind of decoder is kept                                |
| image MAE, timm ViT                 | embedding repeated over t frames and divided by t;         |
|                                     | positions split into class and space, zero in time         |
| VideoMAE, VideoMAE v2, Hugging Face | renamed; k bias zero; positions, which are not stored, are |
|                                     | the fixed 1-d sinusoid over all tokens                     |

Letters as in models_vit.py. Sizes come from the tensors' shapes, except the number of heads: see
`find_num_heads`.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models_vit import SIZES
from util.dist import UserError
from util.pixels import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD

PATCH_EMBED = "patch_embed.proj.weight"
# Name prefixes of decoders and classifiers: tensors that are not part of an encoder.
NON_ENCODER: tuple[str, ...] = (
    "decoder",
    "mask_token",
    "encoder_to_decoder",
    "pred_head.",
    "head.",
    "classifier.",
)
USUAL_NUM_HEADS = {embed_dim: num_heads for embed_dim, _, num_heads in SIZES.values()}
USUAL_NUM_HEADS[1408] = 16  # VideoMAE v2's giant
VIDEO_PIXELS = {"mean": VIDEO_MEAN, "std": VIDEO_STD}
IMAGENET_PIXELS = {"mean": IMAGE_MEAN, "std": IMAGE_STD}


class ImportedEncoder(NamedTuple):
    """An encoder read from a checkpoint of any family."""

    family: str
    weights: dict[str, Tensor]  # under our names
    unused: dict[str, Tensor]  # decoder and head
    has_our_decoder: bool
    synthesized: dict[str, str]  # weights created because the file lacks them: name -> what
    resized: dict[str, str]  # weights of another shape in the file: name -> both shapes
    sizes: dict  # VideoEncoder's arguments
    config: dict  # the file's own, {} if it has none
    pixel_stats: dict  # mean and std of the pixels that the encoder was trained on
    num_heads_source: str


class Family(NamedTuple):
    """A layout of checkpoints, and what it takes to convert one to ours."""

    name: str
    signature: tuple[tuple[str, int], ...]  # (end of a name, number of axes) of its tensors
    renames: tuple[tuple[str, str], ...]  # (regular expression, replacement) of names
    # Adds tensors to the weights, given the known sizes; returns `synthesized` and `resized`.
    fill_missing: Callable[[dict[str, Tensor], dict], tuple[dict, dict]]
    required_sizes: tuple[str, ...]  # sizes that no tensor's shape contains
    pixel_stats: dict
    has_our_decoder: bool


def sinusoid(count: int, embed_dim: int) -> Tensor:
    """Return fixed positions (1, count, D), sine in even columns (Vaswani et al. 2017, 3.5)."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    column = torch.arange(embed_dim)
    angle = position / 10000 ** (column // 2 * 2 / embed_dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()[None]


def fill_missing_videomae(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """Add zero biases of k, and the positions for the known img_size and num_frames."""
    synthesized = {}
    query_biases = [name for name in weights if name.endswith(".attn.q.bias")]
    for query_bias in query_biases:
        key_bias = query_bias.replace(".q.", ".k.")
        if key_bias not in weights:
            weights[key_bias] = torch.zeros_like(weights[query_bias])
            synthesized[key_bias] = "zero"
    if "pos_embed" not in weights:
        embed_dim, _, t, p, _ = weights[PATCH_EMBED].shape
        steps = known["num_frames"] // t
        side = known["img_size"] // p
        weights["pos_embed"] = sinusoid(steps * side * side, embed_dim)
        synthesized["pos_embed"] = f"sinusoid over {steps} x {side} x {side} tokens"
    return synthesized, {}


def fill_missing_image(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """Extend an image model's embedding (D, C, p, p) and positions (1, [1 +] hw, D) to clips."""
    t = known["t_patch_size"]
    steps = known["num_frames"] // t
    image_embed = weights[PATCH_EMBED].float()
    positions = weights.pop("pos_embed")
    clip_embed = image_embed[:, :, None].expand(-1, -1, t, -1, -1) / t
    weights[PATCH_EMBED] = clip_embed
    count = positions.shape[1]
    has_class_position = math.isqrt(count) ** 2 != count  # else one position per patch
    weights["pos_embed_spatial"] = positions[:, int(has_class_position) :]
    weights["pos_embed_temporal"] = positions.new_zeros(1, steps, positions.shape[2])
    synthesized = {"pos_embed_temporal": "zero"}
    if "cls_token" in weights:
        weights["pos_embed_class"] = positions[:, :1]
        if not has_class_position:
            weights["pos_embed_class"] = torch.zeros_like(positions[:, :1])
            synthesized["pos_embed_class"] = "zero"
    resized = {PATCH_EMBED: f"{tuple(image_embed.shape)} -> {tuple(clip_embed.shape)}"}
    return synthesized, resized


def fill_nothing(weights: dict[str, Tensor], known: dict) -> tuple[dict, dict]:
    """Add no tensor: the family stores them all."""
    return {}, {}


COMMON_RENAMES = (
    (r"\bfc_norm\.", "norm."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
)
HUGGING_FACE_RENAMES = (
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
# The first family whose signature a file has is the file's.
FAMILIES = (
    Family(
        name="Hugging Face VideoMAE",
        signature=(("patch_embeddings.projection.weight", 5),),
        renames=HUGGING_FACE_RENAMES,
        fill_missing=fill_missing_videomae,
        required_sizes=("img_size", "num_frames"),
        pixel_stats=IMAGENET_PIXELS,
        has_our_decoder=False,
    ),
    Family(
        name="image MAE or timm ViT",
        signature=((PATCH_EMBED, 4),),
        renames=(),
        fill_missing=fill_missing_image,
        required_sizes=("num_frames", "t_patch_size"),
        pixel_stats=IMAGENET_PIXELS,
        has_our_decoder=False,
    ),
    Family(
        name="VideoMAE",
        signature=((PATCH_EMBED, 5), (".attn.q_bias", 1)),
        renames=((r"^(encoder|backbone)\.", ""),),
        fill_missing=fill_missing_videomae,
        required_sizes=("img_size", "num_frames"),
        pixel_stats=IMAGENET_PIXELS,
        has_our_decoder=False,
    ),
    Family(
        name="mae_st, optimized-stmae or SlowFast",
        signature=((PATCH_EMBED, 5),),
        renames=(),
        fill_missing=fill_nothing,
        required_sizes=(),
        pixel_stats=VIDEO_PIXELS,
        has_our_decoder=True,
    ),
)


def given_sizes(
    num_heads: int | None, img_size: int | None, num_frames: int | None, t_patch_size: int | None
) -> dict[str, int]:
    """Return the sizes that are not None, by name: the caller's, for what a file lacks."""
    sizes = {
        "num_heads": num_heads,
        "img_size": img_size,
        "num_frames": num_frames,
        "t_patch_size": t_patch_size,
    }
    return {name: size for name, size in sizes.items() if size is not None}


def parse_checkpoint(checkpoint: dict, given: dict, path: str | Path) -> ImportedEncoder:
    """Return the encoder in a checkpoint of any family.

    checkpoint: what `util.checkpoint.load` read from `path`. given: sizes by name, for those that
    the file does not record. Raises UserError, which names `path`.
    """
    config = _config_of(checkpoint)
    weights = _tensors_of(checkpoint)
    family = _recognize_family(weights, path)
    weights = rename_keys(weights, family.renames, path)
    unused = {name: value for name, value in weights.items() if name.startswith(NON_ENCODER)}
    weights = {name: value for name, value in weights.items() if name not in unused}
    recorded = [key for key in ("num_heads", "img_size", "num_frames") if key in config]
    try:
        require_sizes(config, recorded, path)
        known = require_sizes(given | config, family.required_sizes, path)
        synthesized, resized = family.fill_missing(weights, known)
        num_heads, source = find_num_heads(weights, config, given, path)
        sizes = sizes_of(weights, known, path) | {"num_heads": num_heads}
    except (KeyError, IndexError, ValueError) as error:  # a tensor is missing or has other axes
        raise UserError(
            f"{path} looks like {family.name}, but {error} is missing or of another shape"
        ) from error
    name = family.name
    if "embed_dim" in config:
        name = "ours"
    recorded_pixels = {key: config[key] for key in ("mean", "std") if key in config}
    return ImportedEncoder(
        family=name,
        weights=weights,
        unused=unused,
        has_our_decoder=family.has_our_decoder,
        synthesized=synthesized,
        resized=resized,
        sizes=sizes,
        config=config,
        pixel_stats=family.pixel_stats | recorded_pixels,
        num_heads_source=f"{num_heads} attention heads ({source})",
    )


def _config_of(checkpoint: dict) -> dict:
    """Return a checkpoint's config, {} if it has none."""
    config = checkpoint.get("config")
    if isinstance(config, dict):
        return config
    return {}


def _tensors_of(checkpoint: dict) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, without the name prefixes of DDP and torch.compile."""
    state_dict = checkpoint
    for key in ("model", "model_state", "module"):
        if isinstance(checkpoint.get(key), dict):
            state_dict = checkpoint[key]
            break
    tensors = {}
    for name, value in state_dict.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            name = name.replace("_orig_mod.", "")
            tensors[re.sub(r"^((module|model)\.)+", "", name)] = value
    return tensors


def _recognize_family(weights: dict[str, Tensor], path: str | Path) -> Family:
    """Return the family whose signature the tensors have. Raises UserError if there is none."""
    for family in FAMILIES:
        if all(has_tensor(weights, ending, axes) for ending, axes in family.signature):
            return family
    raise UserError(
        f"{path} contains no video encoder (no {PATCH_EMBED} with 5 axes). "
        "Pass a checkpoint of a supported family."
    )


def has_tensor(weights: dict[str, Tensor], ending: str, axes: int) -> bool:
    """Return whether a tensor of this number of axes has a name with this ending."""
    return any(name.endswith(ending) and value.ndim == axes for name, value in weights.items())


def rename_keys(
    weights: dict[str, Tensor], renames: tuple[tuple[str, str], ...], path: str | Path
) -> dict[str, Tensor]:
    """Return the tensors under our names, q, k and v apart. Raises UserError for a name twice."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in (*renames, *COMMON_RENAMES):
            name = re.sub(pattern, replacement, name)
        for new_name, part in split_qkv(name, value, path).items():
            if new_name in renamed:
                raise UserError(
                    f"{path} contains {new_name} twice after renaming. "
                    "This variant of the model is not supported."
                )
            renamed[new_name] = part
    return renamed


def split_qkv(name: str, value: Tensor, path: str | Path) -> dict[str, Tensor]:
    """Return q, k and v of a fused tensor, or any other tensor as it is, by name."""
    if ".attn.qkv." not in name:
        return {name: value}
    if value.ndim == 0 or len(value) == 0 or len(value) % 3:
        raise UserError(f"{path}: {name} has shape {tuple(value.shape)}, which is not q, k and v")
    parts = zip("qkv", value.chunk(3), strict=True)
    return {name.replace("qkv", letter): part for letter, part in parts}


def find_num_heads(
    weights: dict[str, Tensor], config: dict, given: dict, path: str | Path
) -> tuple[int, str]:
    """Return the number of heads, which no shape contains, and where it comes from.

    The file's config is preferred to `given`, and that to the usual number for the width. Raise
    UserError if none of them has it.
    """
    embed_dim = weights[PATCH_EMBED].shape[0]
    if config.get("num_heads"):
        return config["num_heads"], "its config"
    if given.get("num_heads"):
        return given["num_heads"], "from --model or num_heads"
    if embed_dim in USUAL_NUM_HEADS:
        return USUAL_NUM_HEADS[embed_dim], "usual for its width"
    raise UserError(
        f"{path} does not record its number of attention heads, and width {embed_dim} is none of "
        f"{sorted(USUAL_NUM_HEADS)}. Pass num_heads."
    )


def sizes_of(weights: dict[str, Tensor], known: dict, path: str | Path) -> dict:
    """Return VideoEncoder's arguments, except num_heads, from the shapes of the weights.

    known: img_size and num_frames, which joint positions require. Raises UserError without them.
    """
    embed_dim, _, t, p, _ = weights[PATCH_EMBED].shape
    block_indices = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    separate = "pos_embed_spatial" in weights or "pos_embed_temporal" in weights
    if separate:
        side = math.isqrt(weights["pos_embed_spatial"].shape[1])
        steps = weights["pos_embed_temporal"].shape[1]
    else:
        require_sizes(known, ("img_size", "num_frames"), path)
        side = known["img_size"] // p
        steps = known["num_frames"] // t
    return {
        "img_size": side * p,
        "patch_size": p,
        "embed_dim": embed_dim,
        "depth": len(block_indices),
        "num_frames": steps * t,
        "t_patch_size": t,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "sep_pos_embed": separate,
        "cls_embed": "cls_token" in weights,
        "no_qkv_bias": "blocks.0.attn.q.bias" not in weights,
    }


def require_sizes(known: dict, names: Iterable[str], path: str | Path) -> dict:
    """Return `known` if it has a positive integer for each name, else raise UserError."""
    missing = [name for name in names if not isinstance(known.get(name), int) or known[name] < 1]
    if missing:
        raise UserError(
            f"{path} does not record its {' and '.join(missing)}. Pass {', '.join(missing)}."
        )
    return known
