"""Show what a model does: its reconstructions, where it looks, and how well it reconstructs videos.

python -m tools.visualize CKPT --data_dirs UNSEEN --output_dir pictures
python -m tools.visualize CKPT --data_dirs UNSEEN --masks random:0.9 tube:0.75 --clips 4
python -m tools.visualize CKPT --data_dirs UNSEEN --attention --layers 6 12 --heads all
torchrun --nproc_per_node 8 -m tools.visualize CKPT --data_dirs UNSEEN --losses losses.csv

Reconstructions: original, masked input, prediction, prediction pasted in. CKPT must have a decoder.
The files are {save_prefix}_gallery_{mask}_{ratio}.png (all frames side by side) and .webp (4 frames
per second).

--attention: the attention weights over the frames, for a checkpoint of any family. The files are
{save_prefix}_attention_layer{N}.png and .webp.

--losses: the reconstruction loss of each video, a measure of surprise. Seed 0 has the masks of
pretraining's validation loss. Seeds do not change the masks temporal and boundary.

Model, frame spacing and mask are those of the checkpoint's run unless given.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data.datasets import ViewDataset
from data.frame_folder import check_frame_folders
from data.loader import collate_readable, eval_loader
from data.manifest import Samples, find_videos, read_manifest, unlabeled
from data.video_index import load_index
from models_mae import MASK_TYPES, MaskedAutoencoderViT
from models_vit import VideoEncoder
from tools.output_files import checkpoint_name, refuse_existing
from tools.reading import (
    CLIP_FLAGS,
    add_clip_flags,
    add_device_flags,
    add_loader_flags,
    add_size_flags,
    center_clips,
    clip_reading,
    given_sizes,
    parse_again,
    worker_settings,
)
from tools.reconstruction_losses import Masks, reconstruction_losses, save_losses
from util import dist
from util.attention_maps import attention_maps, draw_maps, label_maps
from util.cli import Parser, positive_int
from util.dist import DistEnv, UserError, escaped, print0
from util.files import atomic_write
from util.model_source import ModelSource, describe_checkpoint
from util.optim import amp_dtype
from util.pictures import animation, contact_sheet, reconstructions
from util.pretrained import load_autoencoder, load_encoder
from util.seeds import fixed_noise

MASK_FLAGS = ("mask_ratio", "mask_type")
# Flags that affect some of the outputs only, and which.
OUTPUTS_OF_FLAGS = {
    "clips": ("reconstructions", "attention"),
    "masks": ("reconstructions", "losses"),
    "layers": ("attention",),
    "heads": ("attention",),
    "query": ("attention",),
    "percentile": ("attention",),
    "mask_seeds": ("losses",),
}
DEFAULT_CLIPS = 4
MILLISECONDS_PER_FRAME = 250


def get_parser() -> Parser:
    """Return the flags of this tool."""
    parser = Parser(__doc__, prog="python -m tools.visualize")
    parser.add_argument("positional", metavar="CKPT", nargs="?", help="the same as --checkpoint")
    parser.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="a checkpoint of any family: a file, or a folder with model.safetensors",
    )
    parser.add_argument(
        "--data_dirs", nargs="+", default=[], help="folders of videos, searched recursively"
    )
    parser.add_argument(
        "--data_csv",
        default="",
        help="a manifest (path[,label[,start,end]] per line) instead of --data_dirs",
    )
    parser.add_argument(
        "--clips",
        type=positive_int,
        help=f"videos to draw, evenly spread (default: {DEFAULT_CLIPS})",
    )
    parser.add_argument(
        "--output_dir", default=".", help="folder of the pictures (default: the current one)"
    )
    parser.add_argument(
        "--save_prefix", default="", help="start of the file names (default: the checkpoint's name)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_mask_flags(parser)
    add_attention_flags(parser)
    add_size_flags(parser)
    parser.add_argument(
        "--decoder_num_heads",
        type=positive_int,
        help="attention heads of the decoder, for files that do not record them",
    )
    add_clip_flags(parser)
    add_loader_flags(parser)
    add_device_flags(parser)
    return parser


def add_mask_flags(parser: Parser) -> None:
    """Add the flags of reconstructions and their losses."""
    parser.add_argument(
        "--masks",
        nargs="+",
        metavar="TYPE:RATIO",
        help="masks to use (default: --mask_type:--mask_ratio)",
    )
    parser.add_argument(
        "--mask_type",
        choices=MASK_TYPES,
        default="random",
        help="(default: the run's, else random)",
    )
    parser.add_argument(
        "--mask_ratio",
        type=float,
        default=0.9,
        help="share of tokens hidden (default: the run's, else %(default)s)",
    )
    parser.add_argument(
        "--losses",
        metavar="FILE.csv",
        help="write the reconstruction loss of each video and mask, instead of pictures",
    )
    parser.add_argument(
        "--mask_seeds",
        type=positive_int,
        help="number of masks per video for --losses (default: 1)",
    )


def add_attention_flags(parser: Parser) -> None:
    """Add the flags of attention maps."""
    parser.add_argument(
        "--attention", action="store_true", help="draw attention weights instead of reconstructions"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="N",
        help='blocks to draw, from 1 on, or "all" (default: the last)',
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="N",
        help='heads to draw, from 1 on, or "all" (default: the mean of all heads)',
    )
    parser.add_argument(
        "--query",
        choices=("class", "mean"),
        help="whose attention: the class token's, or the mean over all patch tokens "
        "(default: class if the model has one)",
    )
    parser.add_argument(
        "--percentile",
        type=percentile,
        help="of a map's weights, drawn in the brightest color (default: 100, the maximum)",
    )


def percentile(text: str) -> float:
    """Return a number in (0, 100]. Raises ArgumentTypeError."""
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 100]")
    return value


def checkpoint_path(args: argparse.Namespace) -> str:
    """Return the checkpoint, which is given with or without its flag. Raises UserError."""
    given = [path for path in (args.positional, args.checkpoint) if path is not None]
    if len(given) != 1:
        raise UserError(
            f"{len(given)} checkpoints given. Pass one: python -m tools.visualize --checkpoint CKPT"
        )
    return given[0]


def chosen_output(args: argparse.Namespace) -> str:
    """Return "reconstructions", "attention" or "losses".

    Raises UserError for flags that have no effect on this output.
    """
    output = "reconstructions"
    if args.attention and args.losses is not None:
        raise UserError("--attention and --losses are two runs. Pass one of them.")
    if args.attention:
        output = "attention"
    if args.losses is not None:
        output = "losses"
    for name, outputs in OUTPUTS_OF_FLAGS.items():
        if output not in outputs and getattr(args, name) is not None:
            raise UserError(f"--{name} has no effect on {output}, only on {', '.join(outputs)}")
    return output


def given_flags(args: argparse.Namespace) -> dict:
    """Return the sizes of encoder and decoder that are given, by name."""
    given: dict = given_sizes(args)
    if args.decoder_num_heads is not None:
        given["decoder_num_heads"] = args.decoder_num_heads
    return given


def load_with_decoder(source: ModelSource, args: argparse.Namespace) -> MaskedAutoencoderViT:
    """Return the model of a pretraining checkpoint. Raises UserError for any other one."""
    if not source.decoder:
        raise UserError(
            f"{source.path} has no decoder that can be run: {source.family}, finetuned or without "
            "one. Pass a pretraining checkpoint, or draw where it looks with --attention."
        )
    return load_autoencoder(source.path, given=given_flags(args))


def chosen_masks(args: argparse.Namespace, model: MaskedAutoencoderViT) -> list[tuple[str, float]]:
    """Return the type and ratio of each mask. Raises UserError for one that does not suit."""
    masks = [(args.mask_type, args.mask_ratio)]
    if args.masks is not None:
        masks = [parse_mask(text) for text in dict.fromkeys(args.masks)]
    for mask_type, ratio in masks:
        try:
            model.check_mask(ratio, mask_type)
        except ValueError as error:
            raise UserError(f"--masks {mask_type}:{ratio}: {error}") from error
    return masks


def parse_mask(text: str) -> tuple[str, float]:
    """Return ("tube", 0.9) for "tube:0.9". Raises UserError."""
    mask_type, _, ratio = text.partition(":")
    try:
        return mask_type, float(ratio)
    except ValueError:
        raise UserError(
            f"--masks {text!r} is not of the form TYPE:RATIO, such as tube:0.9"
        ) from None


def parse_choice(texts: list[str], count: int, flag: str) -> list[int]:
    """Return the indices, from 0 on, of the numbers from 1 to `count` in a flag, sorted.

    "all" stands for all of them. Raises UserError.
    """
    if texts == ["all"]:
        return list(range(count))
    for text in texts:
        if not (text.isdecimal() and 1 <= int(text) <= count):
            raise UserError(
                f"--{flag} {text}: the encoder has {count} {flag}. Pass numbers from 1 to {count}, "
                'or "all".'
            )
    return sorted({int(text) - 1 for text in texts})


def picture_file(args: argparse.Namespace, content: str) -> Path:
    """Return the .png of some content; the .webp beside it has the same stem.

    Raises UserError if one of them exists and must not be overwritten.
    """
    prefix = args.save_prefix or checkpoint_name(checkpoint_path(args))
    still = Path(args.output_dir, f"{prefix}_{content}.png")
    for path in (still, still.with_suffix(".webp")):
        refuse_existing(path, args.overwrite, "--output_dir or --save_prefix")
    return still


def find_samples(args: argparse.Namespace) -> Samples:
    """Return the samples of a manifest, or the videos below the folders.

    Raises UserError for neither.
    """
    if args.data_csv:
        samples = read_manifest(args.data_csv)
    elif args.data_dirs:
        samples = unlabeled(find_videos(args.data_dirs, "--data_dirs", args.frames_fps is not None))
    else:
        raise UserError("no videos given: pass --data_dirs FOLDER [FOLDER ...] or --data_csv FILE")
    check_frame_folders(samples.paths, args.frames_fps)
    return samples


def evenly_spread(count: int, most: int) -> list[int]:
    """Return the indices of at most `most` of `count` items, ends included."""
    return torch.linspace(0, count - 1, min(most, count)).long().tolist()


def read_clips(dataset: ViewDataset, indices: list[int]) -> Tensor:
    """Return the center clips (B, 3, T, H, W) uint8 of some videos. Raises UserError."""
    clips = []
    for index in indices:
        sample = dataset[(0, index)]
        for name, reason in sample["bad"]:
            raise UserError(
                f"{name} cannot be read ({reason}). Repair it or remove it from the data."
            )
        clips.append(sample["clips"])
        print0(escaped(f"clip {len(clips)}: {dataset.name_of(index)}"))
    return torch.cat(clips)


def drawn_clips(args: argparse.Namespace, model: VideoEncoder) -> tuple[Tensor, list[int]]:
    """Return the clips to draw (B, 3, T, H, W) uint8, and the indices of their videos."""
    samples = find_samples(args)
    indices = evenly_spread(len(samples.paths), args.clips or DEFAULT_CLIPS)
    dataset = center_clips(samples.paths, model.config, clip_reading(args), spans=samples.spans)
    return read_clips(dataset, indices), indices


def save_pictures(rows: dict[str, Tensor], still: Path) -> None:
    """Write frames by label as a contact sheet and, beside it, as an animation that repeats.

    rows: {label: (B, 3, F, H, W) uint8}.
    """
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


def draw_reconstructions(args: argparse.Namespace, source: ModelSource, env: DistEnv) -> None:
    """Draw a gallery for each mask. Raises UserError for bad input, before anything is written."""
    model = load_with_decoder(source, args)
    masks = chosen_masks(args, model)
    files = [picture_file(args, f"gallery_{kind}_{ratio:g}") for kind, ratio in masks]
    clips, indices = drawn_clips(args, model)
    model.to(env.device)
    clips = clips.to(env.device)
    noise = fixed_noise(indices, model.num_tokens).to(env.device)
    amp = amp_dtype(args.amp, env.device)
    for (mask_type, ratio), file in zip(masks, files, strict=True):
        save_pictures(reconstructions(model, clips, noise, ratio, mask_type, amp), file)


def draw_attention(args: argparse.Namespace, source: ModelSource, env: DistEnv) -> None:
    """Draw attention maps. Raises UserError for bad input, before anything is written."""
    model = load_encoder(source.path, **given_sizes(args))
    class_query = args.query == "class" or (args.query is None and model.cls_embed)
    if class_query and not model.cls_embed:
        raise UserError("--query class: the model has no class token. Use --query mean.")
    depth = model.config["depth"]
    layers = parse_choice(args.layers or [str(depth)], depth, "layers")
    heads = None
    if args.heads is not None:
        heads = parse_choice(args.heads, model.config["num_heads"], "heads")
    file = picture_file(args, attention_name(layers, heads, args.query))
    clips, _ = drawn_clips(args, model)
    model.to(env.device)
    amp = amp_dtype(args.amp, env.device)
    maps = []
    for clip in clips.split(1):  # the weights of one clip can be large
        maps.append(attention_maps(model, clip.to(env.device), layers, class_query, amp).cpu())
    by_label = label_maps(torch.cat(maps), layers, heads)
    save_pictures(draw_maps(clips, by_label, args.percentile or 100), file)


def attention_name(layers: list[int], heads: list[int] | None, query: str | None) -> str:
    """Return the file name of attention maps, such as attention_layer6-12_head1-2."""
    name = "attention_layer" + "-".join(str(layer + 1) for layer in layers)
    if heads is not None:
        name += "_head" + "-".join(str(head + 1) for head in heads)
    if query is not None:
        name += f"_{query}"
    return name


def measure_losses(args: argparse.Namespace, source: ModelSource, env: DistEnv) -> None:
    """Write the reconstruction losses. Raises UserError for bad input. Call it on every rank."""
    output = Path(args.losses)
    if output.suffix != ".csv":
        raise UserError(f"--losses {output} does not end in .csv. Choose such a name.")
    dist.on_rank0(lambda: refuse_existing(output, args.overwrite, "--losses"))
    model = load_with_decoder(source, args)
    masks = Masks(chosen_masks(args, model), args.mask_seeds or 1)
    samples = dist.on_rank0(lambda: find_samples(args))
    known = load_index(args.data_csv, samples.paths)
    dataset = center_clips(samples.paths, model.config, clip_reading(args), known, samples.spans)
    workers = worker_settings(args)
    batches = eval_loader(dataset, args.batch_size_per_gpu, workers, env, collate_readable)()
    amp = amp_dtype(args.amp, env.device)
    model.to(env.device)
    found = reconstruction_losses(model, batches, args.batch_size_per_gpu, masks, amp)
    if env.rank == 0:
        save_losses(output, found, samples, masks)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input, before anything is written."""
    parser = get_parser()
    args = parser.parse_args(argv)
    output = chosen_output(args)
    source = describe_checkpoint(checkpoint_path(args), given_flags(args))
    args = parse_again(parser, argv, source.flags, CLIP_FLAGS + MASK_FLAGS)
    env = dist.setup(args.device)
    if output == "losses":
        measure_losses(args, source, env)
    elif env.rank > 0:
        return  # one process draws
    elif output == "attention":
        draw_attention(args, source, env)
    else:
        draw_reconstructions(args, source, env)


if __name__ == "__main__":
    dist.run_script(main)
