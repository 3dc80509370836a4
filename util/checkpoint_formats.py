"""Layouts of video and image models in other projects' checkpoints, as a table, and their parser.

| family                              | conversion to our layout                                   |
| ----------------------------------- | ---------------------------------------------------------- |
| ours, optimized-stmae,              | names are ours (q, k, v may be fused);                     |
| mae_st, SlowFast                    | our kind of decoder is kept                                |
| image MAE, timm ViT                 | embedding repeated over t frames and divided by t;         |
|                                     | positions split into class and space, zero in time         |
| VideoMAE, VideoMAE v2, Hugging Face | renamed; k bias zero; positions, which are not stored, are |
|                                     | the fixed 1-d sinusoid over all tokens                     |

`read_layout` finds encoder, decoder and head by their names; `parse_checkpoint` adds the sizes.
Letters as in models_vit.py. Sizes come from the tensors' shapes, except the numbers of heads: see
`find_num_heads` and `decoder_sizes_of`.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models_vit import SIZES
from util.checkpoint import truncate
from util.dist import UserError
from util.pixels import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD

PATCH_EMBED = "patch_embed.proj.weight"
# Name prefixes of decoders and classifiers: tensors that are not part of an encoder.
NON_ENCODER: tuple[str, ...] = (
    "decoder",
    "mask_token",
    "pred_head.",
    "head.",
    "attentive_pool.",
    "probe_heads.",
)
HEAD = ("head.", "attentive_pool.")  # of a classifier that our model can express
DECODER = ("decoder_", "mask_token")  # of a decoder that our model can express
IMAGE_FAMILY = "image MAE or timm ViT"
VJEPA_KEYS = ("encoder", "target_encoder", "ema_encoder")
OPTIMIZED_STMAE_FLAGS = {"save_prefix", "datafile_dir"}  # which mae_st does not have
USUAL_NUM_HEADS = {embed_dim: num_heads for embed_dim, _, num_heads in SIZES.values()}
USUAL_DECODER_HEADS = {512: 16}  # by width, of mae_st and optimized-stmae
VIDEOMAE_DECODER_HEAD_WIDTH = 64
VIDEO_PIXELS = {"mean": VIDEO_MEAN, "std": VIDEO_STD}
IMAGENET_PIXELS = {"mean": IMAGE_MEAN, "std": IMAGE_STD}


class Layout(NamedTuple):
    """The tensors of a checkpoint under our names, sorted by what they belong to."""

    family: "Family"
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]  # {} if there is none that our model can express
    head: dict[str, Tensor]  # head.weight (K, D), head.bias (K,), attentive_pool.*; {} for none
    unused: dict[str, Tensor]  # the others
    config: dict  # the file's own, {} if it has none
    flags: dict  # of the run that wrote the file, {} if it has none
    global_pool: bool | None  # read-out of the classifier, None: unknown
    head_is_trained: bool  # see `has_trained_head`


class ImportedModel(NamedTuple):
    """An encoder, and what comes with it, read from a checkpoint of any family."""

    family: str
    weights: dict[str, Tensor]  # of the encoder, under our names
    decoder: dict[str, Tensor]  # likewise, {} if there is none that our model can express
    head: dict[str, Tensor]  # head.weight (K, D), head.bias (K,), attentive_pool.*; {} for none
    unused: dict[str, Tensor]
    synthesized: dict[str, str]  # weights created because the file lacks them: name -> what
    resized: dict[str, str]  # weights of another shape in the file: name -> both shapes
    sizes: dict  # VideoEncoder's arguments
    decoder_sizes: dict  # MaskedAutoencoderViT's further arguments, {} without a decoder
    config: dict  # the file's own, {} if it has none
    flags: dict  # of the run that wrote the file, {} if it has none
    global_pool: bool | None  # read-out of the classifier, None: unknown
    head_is_trained: bool  # see `has_trained_head`
    pixel_stats: dict  # mean and std of the pixels that the encoder was trained on
    targets: str  # what the decoder predicts: "videomae", or "pixels" as our own models
    num_heads_source: str  # where the number of heads comes from


class Family(NamedTuple):
    """A layout of checkpoints, and what it takes to convert one to ours."""

    name: str
    signature: tuple[tuple[str, int], ...]  # (end of a name, number of axes) of its tensors
    renames: tuple[tuple[str, str], ...]  # (regular expression, replacement) of names
    # Adds tensors to encoder and decoder, given the known sizes; returns `synthesized`, `resized`.
    fill_missing: Callable[[Layout, dict], tuple[dict, dict]]
    required_sizes: tuple[str, ...]  # sizes that no tensor's shape contains
    pixel_stats: dict
    reads_decoder: bool = True  # whether our model can express its decoder
    targets: str = "pixels"


def sinusoid(count: int, embed_dim: int) -> Tensor:
    """Return fixed positions (1, count, D), sine in even columns (Vaswani et al. 2017, 3.5)."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    column = torch.arange(embed_dim)
    angle = position / 10000 ** (column // 2 * 2 / embed_dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()[None]


def fill_missing_videomae(layout: Layout, known: dict) -> tuple[dict, dict]:
    """Add what VideoMAE does not store: zero biases, fixed positions, and a norm that it left out.

    known: img_size and num_frames, which the positions require.
    """
    weights = layout.encoder
    synthesized = {}
    for part in (weights, layout.decoder):
        for query_bias in [name for name in part if name.endswith(".attn.q.bias")]:
            key_bias = query_bias.replace(".q.", ".k.")
            if key_bias not in part:
                part[key_bias] = torch.zeros_like(part[query_bias])
                synthesized[key_bias] = "zero"
    embed_dim, _, t, p, _ = weights[PATCH_EMBED].shape
    if "norm.weight" not in weights and "norm.bias" not in weights:
        weights["norm.weight"] = torch.ones(embed_dim)
        weights["norm.bias"] = torch.zeros(embed_dim)
        synthesized |= {"norm.weight": "one", "norm.bias": "zero"}
    steps = known["num_frames"] // t
    side = known["img_size"] // p
    grid = f"sinusoid over {steps} x {side} x {side} tokens"
    if "pos_embed" not in weights:
        weights["pos_embed"] = sinusoid(steps * side * side, embed_dim)
        synthesized["pos_embed"] = grid
    if layout.decoder:
        width = len(layout.decoder["decoder_embed.weight"])
        layout.decoder["decoder_embed.bias"] = torch.zeros(width)
        layout.decoder["decoder_pos_embed"] = sinusoid(steps * side * side, width)
        synthesized |= {"decoder_embed.bias": "zero", "decoder_pos_embed": grid}
    return synthesized, {}


def fill_missing_image(layout: Layout, known: dict) -> tuple[dict, dict]:
    """Extend an image model's embedding (D, C, p, p) and positions (1, [1 +] hw, D) to clips."""
    weights = layout.encoder
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


def fill_nothing(layout: Layout, known: dict) -> tuple[dict, dict]:
    """Add no tensor: the family stores them all."""
    return {}, {}


COMMON_RENAMES = (
    (r"\bfc_norm\.", "norm."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"^head\.projection\.", "head."),
)
VIDEOMAE_DECODER_RENAMES = (
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"^decoder\.(blocks|norm)\.", r"decoder_\1."),
    (r"^decoder\.head\.", "decoder_pred."),
)
HUGGING_FACE_RENAMES = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    *VIDEOMAE_DECODER_RENAMES,
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
        targets="videomae",
    ),
    Family(
        name=IMAGE_FAMILY,
        signature=((PATCH_EMBED, 4),),
        renames=(),
        fill_missing=fill_missing_image,
        required_sizes=("num_frames", "t_patch_size"),
        pixel_stats=IMAGENET_PIXELS,
        reads_decoder=False,
    ),
    Family(
        name="VideoMAE",
        signature=((PATCH_EMBED, 5), (".attn.q_bias", 1)),
        renames=((r"^(encoder|backbone)\.", ""), *VIDEOMAE_DECODER_RENAMES),
        fill_missing=fill_missing_videomae,
        required_sizes=("img_size", "num_frames"),
        pixel_stats=IMAGENET_PIXELS,
        targets="videomae",
    ),
    Family(
        name="mae_st, optimized-stmae or SlowFast",
        signature=((PATCH_EMBED, 5),),
        renames=(),
        fill_missing=fill_nothing,
        required_sizes=(),
        pixel_stats=VIDEO_PIXELS,
    ),
)


def parse_checkpoint(
    checkpoint: dict, given: dict, path: str | Path, image_clip: dict | None = None
) -> ImportedModel:
    """Return the model in a checkpoint of any family.

    checkpoint: what `util.checkpoint.load` read from `path`. given: sizes by name, for those that
    the file does not record. image_clip: num_frames and t_patch_size of the clips of an image
    model, unless given. Raises UserError, which names `path`.
    """
    layout = read_layout(checkpoint, path)
    family = layout.family
    config = layout.config
    if family.name == IMAGE_FAMILY:
        given = (image_clip or {}) | given
    try:
        known = known_sizes(layout, given, path)
        synthesized, resized = family.fill_missing(layout, known)
        num_heads, num_heads_source = find_num_heads(layout.encoder, config, given, path)
        sizes = sizes_of(layout.encoder, known, path) | {"num_heads": num_heads}
        decoder_sizes = decoder_sizes_of(layout, sizes, given)
    except (KeyError, IndexError, ValueError) as error:  # a tensor is missing or has other axes
        raise UserError(
            f"{path} looks like {family.name}, but {error} is missing or of another shape"
        ) from error
    if is_ours(config):
        check_config_sizes(config, sizes | decoder_sizes, path)
    return ImportedModel(
        family="ours" if is_ours(config) else family.name,
        weights=layout.encoder,
        decoder=layout.decoder,
        head=layout.head,
        unused=layout.unused,
        synthesized=synthesized,
        resized=resized,
        sizes=sizes,
        decoder_sizes=decoder_sizes,
        config=config,
        flags=layout.flags,
        global_pool=layout.global_pool,
        head_is_trained=layout.head_is_trained,
        pixel_stats={key: config.get(key, family.pixel_stats[key]) for key in ("mean", "std")},
        targets=config.get("targets", family.targets),
        num_heads_source=num_heads_source,
    )


def read_layout(checkpoint: dict, path: str | Path) -> Layout:
    """Return the tensors of a checkpoint under our names, without knowing all sizes.

    Raises UserError, which names `path`, if they are no model that ours can express.
    """
    refuse_vjepa(checkpoint, path)
    tensors = _tensors_of(checkpoint)
    family = _recognize_family(tensors, path)
    weights = rename_keys(tensors, family.renames, path)
    others = {name: value for name, value in weights.items() if name.startswith(NON_ENCODER)}
    encoder = {name: value for name, value in weights.items() if name not in others}
    decoder = {name: value for name, value in others.items() if name.startswith(DECODER)}
    if not family.reads_decoder or "decoder_pred.weight" not in decoder:
        decoder = {}
    head = {name: value for name, value in others.items() if name.startswith(HEAD)}
    linear = {name for name in head if name.startswith("head.")}
    if linear != {"head.weight", "head.bias"} or head["head.weight"].ndim != 2:
        head = {}
    unused = {n: v for n, v in others.items() if n not in decoder and n not in head}
    return Layout(
        family=family,
        encoder=encoder,
        decoder=decoder,
        head=head,
        unused=unused | _average_of(checkpoint),
        config=_dictionary(checkpoint.get("config")),
        flags=_dictionary(checkpoint.get("args")),
        global_pool=find_read_out(checkpoint, tensors, family) if head else None,
        head_is_trained=has_trained_head(checkpoint),
    )


def _average_of(checkpoint: dict) -> dict[str, Tensor]:
    """Return the EMA beside the weights of our checkpoint, with ema. before the names."""
    if not is_ours(_dictionary(checkpoint.get("config"))):
        return {}
    return {f"ema.{name}": value for name, value in _dictionary(checkpoint.get("ema")).items()}


def refuse_vjepa(checkpoint: dict, path: str | Path) -> None:
    """Raise UserError for a checkpoint of V-JEPA 2, also if it stores fixed positions."""
    for key in VJEPA_KEYS:
        if any(
            str(name).startswith("module.backbone.") for name in _dictionary(checkpoint.get(key))
        ):
            raise UserError(f"{path}: V-JEPA 2: rotary positions are not supported")


def has_trained_head(checkpoint: dict) -> bool:
    """Return whether the head, if there is one, is trained.

    That of a probe is not until its first validation, which chooses the head.
    """
    is_probe = bool(_dictionary(checkpoint.get("config")).get("probe"))
    return not is_probe or checkpoint.get("best_acc1", 0) >= 0


def is_attentive(head: dict[str, Tensor]) -> bool:
    """Return whether a classifier's head, see `Layout`, reads the tokens by `AttentivePool`."""
    return any(name.startswith("attentive_pool.") for name in head)


def find_read_out(checkpoint: dict, tensors: dict[str, Tensor], family: Family) -> bool | None:
    """Return whether a classifier reads the mean of the patch tokens (True) or the class token.

    The tensors of mae_st, SlowFast and optimized-stmae are alike: the other entries of their files
    distinguish them. Return None if the read-out is unknown.
    """
    config = _dictionary(checkpoint.get("config"))
    flags = _dictionary(checkpoint.get("args"))
    if isinstance(config.get("global_pool"), bool):
        return config["global_pool"]
    if any(re.search(r"\bfc_norm\.", name) for name in tensors):
        return True
    if family.name == IMAGE_FAMILY:
        return False if "cls_token" in tensors else None
    if family.targets == "videomae":
        return None  # the first patch token, which ours does not read
    if flags.keys() & OPTIMIZED_STMAE_FLAGS:
        return False
    if flags or "model_state" in checkpoint or "head.projection.weight" in tensors:
        return True  # mae_st, SlowFast
    return None


def _dictionary(value: object) -> dict:
    """Return a dictionary or the contents of a Namespace, {} for any other value."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def known_sizes(layout: Layout, given: dict, path: str | Path) -> dict:
    """Return the sizes that a file records beside its tensors, completed by those that are given.

    VideoMAE's files record them as flags of their run. Raises UserError without those that the
    family requires.
    """
    names = ("num_heads", "img_size", "num_frames")
    recorded = {name: layout.config[name] for name in names if name in layout.config}
    if layout.family.name == "VideoMAE":
        for name, flag in (("img_size", "input_size"), ("num_frames", "num_frames")):
            if flag in layout.flags:
                recorded.setdefault(name, layout.flags[flag])
    require_sizes(recorded, recorded.keys(), path)
    return require_sizes(given | recorded, layout.family.required_sizes, path)


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
    usual = USUAL_NUM_HEADS.get(embed_dim)
    if given.get("num_heads") not in (None, usual):
        return given["num_heads"], "from --model or num_heads"
    if usual:
        return usual, "usual for its width"
    raise UserError(
        f"{path} does not record its number of attention heads, and width {embed_dim} is none of "
        f"{sorted(USUAL_NUM_HEADS)}. Pass --num_heads, for a script to "
        "python -m tools.convert_checkpoint --to native."
    )


def describe_num_heads(found: ImportedModel) -> str:
    """Return the number of heads and where it comes from, as text."""
    return f"{found.sizes['num_heads']} attention heads ({found.num_heads_source})"


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


def decoder_sizes_of(layout: Layout, sizes: dict, given: dict) -> dict:
    """Return MaskedAutoencoderViT's arguments beyond those of VideoEncoder, {} without a decoder.

    decoder_num_heads is left out if it is neither recorded nor given nor usual for the width.
    """
    decoder = layout.decoder
    if not decoder:
        return {}
    width = decoder["decoder_embed.weight"].shape[0]
    num_values = decoder["decoder_pred.weight"].shape[0]  # P
    frames_per_tubelet = num_values // (3 * sizes["patch_size"] ** 2)  # u
    depth = len({name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")})
    found = {
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "pred_t_dim": frames_per_tubelet * sizes["num_frames"] // sizes["t_patch_size"],
        "norm_pix_loss": bool(_recorded(layout, "norm_pix_loss")),
    }
    num_heads = _recorded(layout, "decoder_num_heads") or given.get("decoder_num_heads")
    if not num_heads and layout.family.targets == "videomae":
        num_heads = width // VIDEOMAE_DECODER_HEAD_WIDTH
    num_heads = num_heads or USUAL_DECODER_HEADS.get(width)
    if num_heads:
        found["decoder_num_heads"] = num_heads
    return found


def is_ours(config: dict) -> bool:
    """Return whether a checkpoint with this config was written by this repository."""
    return "embed_dim" in config


def check_config_sizes(config: dict, sizes: dict, path: str | Path) -> None:
    """Raise UserError if a size in a file's config is not that of its weights."""
    for name, size in sizes.items():
        if name in config and config[name] != size:
            raise UserError(
                f"{path} has {name} {truncate(config[name])} in its config, but {size} in its "
                "weights: corrupt or not one of ours"
            )


def _recorded(layout: Layout, name: str):
    """Return an entry of a file's config, else of its run's flags, else None."""
    return layout.config.get(name, layout.flags.get(name))


def require_sizes(known: dict, names: Iterable[str], path: str | Path) -> dict:
    """Return `known` if it has a positive integer for each name, else raise UserError."""
    missing = [name for name in names if not isinstance(known.get(name), int) or known[name] < 1]
    if missing:
        raise UserError(
            f"{path} does not record its {' and '.join(missing)}. "
            f"Pass {' and '.join('--' + name for name in missing)}."
        )
    return known
