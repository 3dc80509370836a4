"""How tools read videos and images: flags, the data set of center clips, unreadable files."""

import argparse
from pathlib import Path

import numpy as np

from data.clips import ClipSampling
from data.datasets import ViewDataset
from data.loader import WorkerSettings
from data.transforms import decode_short_side, view_transform
from data.video_index import VideoIndex
from util.args import SAMPLING_METHODS, add_frames_fps, check_sampling, given_flags
from util.cli import Parser, nonnegative_int, positive_float, positive_int
from util.dist import UserError, default_workers, escaped, print0
from util.model_flags import spaced

CLIP_FLAGS = ("sampling", "sampling_rate", "target_fps", "short_side", "decoder")
MAX_LISTED = 20  # unreadable files that are printed


def add_size_flags(parser: Parser) -> None:
    """Add the flags for sizes of the model."""
    parser.add_argument(
        "--img_size", type=positive_int, help="frame side in pixels (default: the checkpoint's)"
    )
    parser.add_argument(
        "--num_frames", type=positive_int, help="frames per clip (default: the checkpoint's)"
    )
    parser.add_argument(
        "--t_patch_size", type=positive_int, help="frames per tubelet, for image models"
    )
    parser.add_argument(
        "--num_heads", type=positive_int, help="attention heads, for files that do not record them"
    )


def given_sizes(args: argparse.Namespace) -> dict[str, int]:
    """Return the sizes of the model that are given as flags, by name.

    These are keywords of `load_encoder`, and the argument `given` of `describe_checkpoint`,
    `load_classifier` and `load_autoencoder`.
    """
    sizes = {
        "num_heads": args.num_heads,
        "img_size": args.img_size,
        "num_frames": args.num_frames,
        "t_patch_size": args.t_patch_size,
    }
    return {name: size for name, size in sizes.items() if size is not None}


def add_clip_flags(parser: Parser) -> None:
    """Add the flags that choose frames of videos: CLIP_FLAGS, and --frames_fps of the data."""
    parser.add_argument(
        "--sampling",
        choices=SAMPLING_METHODS,
        default="dense",
        help="dense: frames at --sampling_rate; uniform: one from each of equal parts of the video "
        "(default: the run's, else %(default)s)",
    )
    parser.add_argument(
        "--sampling_rate",
        type=positive_int,
        default=4,
        help="distance of frames at --target_fps (default: the run's, else %(default)s)",
    )
    parser.add_argument(
        "--target_fps",
        type=positive_float,
        default=30,
        help="rate at which videos are read (default: the run's, else %(default)s)",
    )
    parser.add_argument(
        "--short_side",
        type=positive_int,
        help="short side of decoded frames in pixels (default: the run's, else from the crop)",
    )
    parser.add_argument(
        "--decoder",
        choices=("auto", "pyav", "decord"),
        default="auto",
        help="video reader (default: the run's, else %(default)s)",
    )
    add_frames_fps(parser)


def parse_again(
    parser: Parser, argv: list[str] | None, recorded: dict, names: tuple[str, ...]
) -> argparse.Namespace:
    """Parse a command line with recorded flags of a run as defaults.

    recorded: `ModelSource.flags`. names: the flags to take from there. Several sampling rates, of
    the sources of a mixture, are no default, and a note names the one in use.
    Raises UserError for flags without effect on the sampling.
    """
    defaults = {name: recorded[name] for name in names if name in recorded}
    rates = defaults.get("sampling_rate")
    if isinstance(rates, list):
        del defaults["sampling_rate"]
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    check_sampling(args, given_flags(parser, argv))
    if isinstance(rates, list):
        print0(
            f"note: the checkpoint's run had --sampling_rate {spaced(rates)}, videos are read here "
            f"at {args.sampling_rate}"
        )
    return args


def check_seconds(flag: str, seconds: float | None, target_fps: float) -> None:
    """Raise UserError if the parts that a flag cuts videos into are shorter than half a frame.

    There would be more of them than frames, and a file could exhaust the memory.
    """
    if seconds is not None and seconds * target_fps < 0.5:
        raise UserError(
            f"--{flag} {seconds:g} is too short: at --target_fps {target_fps:g} a frame lasts "
            f"{1 / target_fps:.3g} s. Pass at least half of that."
        )


def clip_reading(args: argparse.Namespace) -> dict:
    """Return the values of the flags of `add_clip_flags` by name."""
    return {
        "sampling": args.sampling,
        "sampling_rate": args.sampling_rate,
        "target_fps": args.target_fps,
        "short_side": args.short_side,
        "decoder": args.decoder,
        "frames_fps": args.frames_fps,
    }


def add_loader_flags(parser: Parser) -> None:
    """Add the flags about batches and the processes that read them."""
    parser.add_argument(
        "--batch_size_per_gpu",
        type=positive_int,
        default=16,
        help="clips per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=nonnegative_int,
        default=default_workers(),
        help="loader processes (default: cores / processes, at most 16; here %(default)s)",
    )
    parser.add_argument(
        "--read_timeout",
        type=float,
        default=60,
        help="seconds that a file may take before it is quarantined (default: %(default)s)",
    )


def worker_settings(args: argparse.Namespace, quarantine: Path | None = None) -> WorkerSettings:
    """Return how loader workers read files, from the flags of `add_loader_flags`.

    quarantine: CSV file that lists quarantined files, None for no file.
    """
    return WorkerSettings(
        num_workers=args.num_workers,
        pin_memory=True,
        read_timeout=args.read_timeout,
        quarantine=quarantine,
    )


def add_device_flags(parser: Parser) -> None:
    """Add the flags about the device and its precision."""
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 if the GPU has it, else fp16; CPU: fp32",
    )


def center_clips(
    paths: list[str],
    config: dict,
    reading: dict,
    known: VideoIndex | None = None,
    spans: np.ndarray | None = None,
) -> ViewDataset:
    """Return the data set of each video's center clip and crop, at the size of a model.

    config: the model's. reading: see `clip_reading`; a short_side of None is that of the crop.
    known: the index of the files. spans: parts of the videos, see `ViewDataset`.
    """
    img_size = config["img_size"]
    return ViewDataset(
        paths=paths,
        labels=[-1] * len(paths),
        num_views=1,
        transform=view_transform(img_size, 1),
        sampling=ClipSampling(
            config["num_frames"],
            reading["sampling_rate"],
            reading["target_fps"],
            reading["sampling"],
        ),
        decoder=reading["decoder"],
        frames_fps=reading["frames_fps"],
        short_side=reading["short_side"] or decode_short_side(img_size),
        known=known,
        spans=spans,
    )


def print_unreadable(unreadable: dict[str, str], total: int, most: int = MAX_LISTED) -> None:
    """Print the first `most` unreadable files of `total` files, nothing if there are none.

    unreadable: {path: reason}.
    """
    if not unreadable:
        return
    print0(f"{len(unreadable)} of {total} files cannot be read:")
    for path, reason in list(unreadable.items())[:most]:
        print0(escaped(f"  {path}: {reason}"))
    if len(unreadable) > most:
        print0(f"  ... and {len(unreadable) - most} more")


def nothing_readable(unreadable: dict[str, str], total: int) -> UserError:
    """Return the error to raise if none of `total` files can be read.

    unreadable: {path: reason}.
    """
    path, reason = next(iter(unreadable.items()))
    return UserError(
        f"none of the {total} files can be read (first: {path}: {reason}). "
        "Pass files that can be read."
    )
