"""Draw what a pretrained model predicts: original, masked input, prediction, prediction pasted in.

python -m tools.visualize CKPT --data_dirs UNSEEN --output_dir pictures
python -m tools.visualize CKPT --data_dirs UNSEEN --masks random:0.9 tube:0.75 --clips 4

Model, frame spacing and mask are those of the checkpoint's run unless given. The tool writes
{save_prefix}_gallery_{mask}_{ratio}.png (all frames side by side) and .webp (4 frames per second).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data.datasets import ViewDataset
from data.manifest import find_videos, read_manifest
from models_mae import MASK_TYPES, MaskedAutoencoderViT
from tools.reading import (
    CLIP_FLAGS,
    add_clip_flags,
    add_device_flags,
    center_clips,
    clip_reading,
)
from util import checkpoint, dist
from util.cli import Parser, positive_int
from util.dist import UserError, print0
from util.files import atomic_write
from util.optim import amp_dtype
from util.pictures import animation, contact_sheet, reconstructions
from util.seeds import fixed_noise

MASK_FLAGS = ("mask_ratio", "mask_type")
MILLISECONDS_PER_FRAME = 250


def get_parser() -> Parser:
    """Return the flags of this tool."""
    parser = Parser(__doc__, prog="python -m tools.visualize")
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of a pretraining run")
    parser.add_argument(
        "--data_dirs", nargs="+", default=[], help="folders of videos, searched recursively"
    )
    parser.add_argument(
        "--data_csv", default="", help="a manifest (path[,label] per line) instead of --data_dirs"
    )
    parser.add_argument(
        "--masks",
        nargs="+",
        default=[],
        metavar="TYPE:RATIO",
        help="masks to draw (default: --mask_type:--mask_ratio)",
    )
    parser.add_argument(
        "--mask_type", choices=MASK_TYPES, default="random", help="(default: the run's)"
    )
    parser.add_argument(
        "--mask_ratio",
        type=float,
        default=0.9,
        help="share of tokens hidden (default: the run's)",
    )
    parser.add_argument(
        "--clips",
        type=positive_int,
        default=4,
        help="videos to draw, evenly spread (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir", default=".", help="folder of the pictures (default: the current one)"
    )
    parser.add_argument(
        "--save_prefix", default="", help="start of the file names (default: the checkpoint's name)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing pictures")
    add_clip_flags(parser)
    add_device_flags(parser)
    return parser


def run_flags(state: dict, names: tuple[str, ...]) -> dict:
    """Return those of the named flags that a checkpoint's run recorded."""
    args = state.get("args")
    if isinstance(args, argparse.Namespace):  # of the ancestors
        args = vars(args)
    if not isinstance(args, dict):
        return {}
    return {name: args[name] for name in names if name in args}


def load_model(path: str) -> tuple[MaskedAutoencoderViT, dict]:
    """Return the model of a pretraining checkpoint and the flags of its run that a gallery uses.

    Raises UserError for a file that is not a checkpoint of a pretraining run.
    """
    state = checkpoint.load(path)
    parts = [state.get(key) for key in ("config", "args", "model")]
    complete = all(isinstance(part, dict) for part in parts)
    if not complete or "decoder_embed_dim" not in state["config"]:
        raise UserError(
            f"{path} is not a pretraining checkpoint (no config with a decoder, or no args). "
            "Pass a checkpoint that pretrain.py wrote."
        )
    config = state["config"]
    checkpoint.check_config_sizes(path, config, state["model"])
    arguments = {key: config[key] for key in config if key not in ("model", "mean", "std")}
    try:
        model = MaskedAutoencoderViT(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} has a config that does not describe a model ({checkpoint.first_line(error)})"
        ) from None
    checkpoint.load_weights(path, model, state["model"])
    return model, run_flags(state, CLIP_FLAGS + MASK_FLAGS)


def parse_mask(text: str) -> tuple[str, float]:
    """Return ("tube", 0.9) for "tube:0.9". Raises UserError."""
    mask_type, _, ratio = text.partition(":")
    try:
        return mask_type, float(ratio)
    except ValueError:
        raise UserError(
            f"--masks {text!r} is not of the form TYPE:RATIO, such as tube:0.9"
        ) from None


def check_masks(model: MaskedAutoencoderViT, masks: list[tuple[str, float]]) -> None:
    """Raise UserError for a mask that the model does not support."""
    for mask_type, ratio in masks:
        try:
            model.check_mask(ratio, mask_type)
        except ValueError as error:
            raise UserError(f"--masks {mask_type}:{ratio}: {error}") from error


def gallery_files(folder: Path, prefix: str, masks: list[tuple[str, float]]) -> list[Path]:
    """Return the .png of each mask; the .webp beside it has the same stem."""
    return [folder / f"{prefix}_gallery_{mask_type}_{ratio:g}.png" for mask_type, ratio in masks]


def check_absent(files: list[Path]) -> None:
    """Raise UserError if a gallery exists."""
    for file in files:
        for path in (file, file.with_suffix(".webp")):
            if path.exists():
                raise UserError(
                    f"{path} exists. Choose another --output_dir or --save_prefix, "
                    "or pass --overwrite."
                )


def find_paths(folders: list[str], csv: str) -> list[str]:
    """Return the videos of a manifest, or those below the folders. Raises UserError for neither."""
    if csv:
        paths, _ = read_manifest(csv)
        return paths
    if not folders:
        raise UserError("no videos given: pass --data_dirs FOLDER [FOLDER ...] or --data_csv FILE")
    return find_videos(folders, "--data_dirs")


def evenly_spread(count: int, most: int) -> Tensor:
    """Return the indices of at most `most` of `count` items, ends included."""
    return torch.linspace(0, count - 1, min(most, count)).long()


def read_clips(dataset: ViewDataset, indices: list[int]) -> Tensor:
    """Return the center clips (B, 3, T, H, W) uint8 of some videos. Raises UserError."""
    clips = []
    for index in indices:
        sample = dataset[(0, index)]
        for path, reason in sample["bad"]:
            raise UserError(
                f"{path} cannot be read ({reason}). Repair it or remove it from the data."
            )
        clips.append(sample["clips"])
        print0(f"clip {len(clips)}: {sample['path']}")
    return torch.cat(clips)


def save_gallery(rows: dict[str, Tensor], still: Path) -> None:
    """Write `reconstructions` as a contact sheet and, beside it, as an animation that repeats."""
    from torchvision.transforms.functional import to_pil_image

    still.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(still) as temporary:
        to_pil_image(contact_sheet(rows)).save(temporary, optimize=True)
    print0(f"wrote {still}")
    moving = still.with_suffix(".webp")
    first, *others = [to_pil_image(picture) for picture in animation(rows)]
    with atomic_write(moving) as temporary:
        first.save(
            temporary,
            save_all=True,
            append_images=others,
            duration=MILLISECONDS_PER_FRAME,
            loop=0,
            quality=90,
        )
    print0(f"wrote {moving}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input, before anything is written."""
    parser = get_parser()
    args = parser.parse_args(argv)
    path = args.checkpoint
    model, defaults = load_model(path)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)

    masks = [parse_mask(text) for text in args.masks] or [(args.mask_type, args.mask_ratio)]
    check_masks(model, masks)
    prefix = args.save_prefix or Path(path).stem
    files = gallery_files(Path(args.output_dir), prefix, masks)
    if not args.overwrite:
        check_absent(files)

    env = dist.setup(args.device)
    paths = find_paths(args.data_dirs, args.data_csv)
    indices = evenly_spread(len(paths), args.clips).tolist()
    dataset = center_clips(paths, model.config, clip_reading(args))
    clips = read_clips(dataset, indices).to(env.device)
    noise = fixed_noise(indices, model.num_tokens).to(env.device)
    model.to(env.device)
    if env.rank == 0:
        amp = amp_dtype(args.amp, env.device)
        for (mask_type, ratio), file in zip(masks, files, strict=True):
            save_gallery(reconstructions(model, clips, noise, ratio, mask_type, amp), file)


if __name__ == "__main__":
    dist.run_script(main)
