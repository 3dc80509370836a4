"""What a checkpoint records of its model: architecture, read-out, classes, flags of its run."""

from pathlib import Path
from typing import NamedTuple

from models_vit import SIZES, model_names
from util.checkpoint import load
from util.checkpoint_formats import ImportedModel, is_attentive, parse_checkpoint
from util.dist import UserError

IMAGE_CLIP = {"num_frames": 2, "t_patch_size": 2}  # one tubelet: the tokens of the image itself


class ModelSource(NamedTuple):
    """The description of a checkpoint of any family, without its tensors."""

    path: str
    family: str
    sizes: dict  # VideoEncoder's arguments
    decoder: dict  # MaskedAutoencoderViT's further arguments, {} without a decoder
    targets: str  # what the decoder predicts: "pixels" like ours, or "videomae"
    num_classes: int | None  # None: no head
    global_pool: bool | None  # read-out, None: unknown
    classes: list[str] | None  # their names, None if the file does not record them
    flags: dict  # of the run that wrote the file, {} if it has none
    mean_std: dict  # "mean" and "std" of the pixels that it was trained on
    name: str  # for --model
    attentive: bool  # the head reads all tokens by `AttentivePool`
    head_is_trained: bool  # see `has_trained_head` in util/checkpoint_formats.py


def describe_checkpoint(
    path: str | Path, given: dict, image_clip: dict = IMAGE_CLIP
) -> ModelSource:
    """Return what a checkpoint of any family records of its model.

    given: sizes by name that it may not record. image_clip: see `parse_checkpoint`. Tensors are
    not read and checksums not compared. Raises UserError.
    """
    found = parse_checkpoint(load(path, check=False, lazily=True), given, path, image_clip)
    return describe(found, path)


def describe(found: ImportedModel, path: str | Path) -> ModelSource:
    """Return the description of a model that was read from `path`."""
    num_classes = len(found.head["head.weight"]) if found.head else None
    classes = found.config.get("classes")
    if not isinstance(classes, list) or num_classes is None or len(classes) > num_classes:
        classes = None
    else:
        classes = [str(name) for name in classes]
    recorded_name = found.config.get("model")
    if not isinstance(recorded_name, str):
        recorded_name = model_name(found.sizes)
    return ModelSource(
        path=str(path),
        family=found.family,
        sizes=found.sizes,
        decoder=found.decoder_sizes,
        targets=found.targets,
        num_classes=num_classes,
        global_pool=found.global_pool,
        classes=classes,
        flags=found.flags,
        mean_std={key: found.pixel_stats[key] for key in ("mean", "std")},
        name=recorded_name.removeprefix("mae_"),
        attentive=is_attentive(found.head),
        head_is_trained=found.head_is_trained,
    )


def decoder_for_clips(decoder: dict, sizes: dict, num_frames: int) -> dict:
    """Return the arguments of a checkpoint's decoder for clips of `num_frames`.

    The number of predicted frames per tubelet stays. sizes: the checkpoint's.
    """
    t_patch_size = sizes["t_patch_size"]
    frames_per_tubelet = decoder["pred_t_dim"] * t_patch_size // sizes["num_frames"]
    return decoder | {"pred_t_dim": frames_per_tubelet * num_frames // t_patch_size}


def model_name(sizes: dict) -> str:
    """Return the name of a model of these sizes, such as vit_large_patch16.

    If no named model of this size has this patch, the name has another patch.
    """
    wanted = (sizes["embed_dim"], sizes["depth"], sizes["num_heads"])
    for name, size in SIZES.items():
        if size == wanted:
            model = f"vit_{name}_patch{sizes['patch_size']}"
            if model in model_names():
                return model
            return next(known for known in model_names() if known.startswith(f"vit_{name}_"))
    return f"vit_{wanted[0]}x{wanted[1]}x{wanted[2]}_patch{sizes['patch_size']}"


def require_head(source: ModelSource) -> int:
    """Return the number of classes. Raises UserError for a checkpoint without a classifier."""
    if not source.head_is_trained:
        raise UserError(
            f"{source.path} has no classifier yet: it is a probe before its first validation, "
            "which chooses the head. Resume that run."
        )
    if source.num_classes is None:
        kind = "a pretraining checkpoint" if source.decoder else "an encoder alone"
        raise UserError(
            f"{source.path} has no classifier: it is {kind}. "
            "Finetune it with finetune.py, or pass a finetuned checkpoint."
        )
    return source.num_classes


def require_read_out(source: ModelSource, given: bool | None) -> bool:
    """Return whether the classifier reads the mean of the patch tokens, else the class token.

    given: --global_pool or --cls_token, None if neither is given. Raises UserError if the
    read-out is unknown, if it contradicts `given`, and for one that our classifier does not have.
    """
    if source.global_pool is not None:
        if given not in (None, source.global_pool):
            recorded = read_out_name(source.global_pool)
            raise UserError(
                f"{source.path} classifies the {recorded}, not the {read_out_name(given)}. "
                "Drop the flag."
            )
        return source.global_pool
    if not source.sizes["cls_embed"]:
        raise UserError(
            f"{source.path} has no fc_norm and no class token: its classifier reads tokens in a "
            "way that is not supported. Finetune its encoder with --finetune instead."
        )
    if given is None:
        raise UserError(
            f"{source.path} does not record whether it classifies the mean of the patch tokens or "
            "the class token, and both fit its tensors. Pass --global_pool or --cls_token."
        )
    return given


def read_out_name(global_pool: bool) -> str:
    """Return the words for a read-out."""
    return "mean of the patch tokens" if global_pool else "class token"
