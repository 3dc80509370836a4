"""Steps of demo.py that are not one of the three scripts: make its files, draw what is predicted.

    python examples/demo_parts.py clips demo/clips --train 2400 --val 400 --part 0 --parts 2
    python examples/demo_parts.py images demo/images --train 1600 --val 400
    python examples/demo_parts.py picture demo/samples.pth demo/prediction.png VIDEO [VIDEO ...]

Every file is a function of its split and number alone, so parts can be made by several processes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import gallery
from benchmarks.learning import DIRECTIONS, Sprites, encode, moving_clip, pictures
from data.loaders import ViewDataset
from data.transforms import view_transform
from engine_eval import fixed_noise
from util.cli import natural, positive
from util.dist import print0, run_script

SPRITES = Sprites(count=5, radii=(5.0, 9.0), tint=0.25)
PATTERNS = ("across", "checks", "dots", "down", "falling", "grid", "rings", "rising")
SPLITS = ("train", "val")


def make_clips(out: Path, split: str, numbers: range) -> None:
    """Write motion clips {out}/{split}/{direction}/NUMBER.mp4."""
    photographs, grounds = pictures("train" if split == "train" else "test")
    for count, number in enumerate(numbers):
        direction = DIRECTIONS[number % len(DIRECTIONS)]
        draws = np.random.default_rng((SPLITS.index(split), number))
        frames = moving_clip(draws, photographs, grounds, int(direction), SPRITES)
        path = out / split / direction / f"{number:05d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, frames, codec="mpeg4")
        if count % 100 == 0:
            print0(f"file {count}/{len(numbers)}")


def waves(name: str, a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return a pattern's wave of two axes and the distance from a center, all in radians."""
    if name == "across":
        return np.sin(b)
    if name == "down":
        return np.sin(a)
    if name == "rising":
        return np.sin((a + b) / np.sqrt(2))
    if name == "falling":
        return np.sin((a - b) / np.sqrt(2))
    if name == "checks":
        return 3 * np.sin(a) * np.sin(b)
    if name == "dots":
        return np.sin(a) + np.sin(b) - 0.7
    if name == "grid":
        return np.maximum(np.sin(a), np.sin(b)) - 0.75
    return np.sin(distance)  # rings


def pattern(draws: np.random.Generator, name: str, size: int = 64) -> np.ndarray:
    """Return a pattern (size, size) in [0, 1] of random period, phase and tilt."""
    y, x = np.mgrid[:size, :size].astype(float)
    period = draws.uniform(10, 18)
    tilt = np.deg2rad(draws.uniform(-8, 8))
    across = x * np.cos(tilt) - y * np.sin(tilt)
    down = x * np.sin(tilt) + y * np.cos(tilt)
    a = 2 * np.pi * (across / period + draws.uniform())
    b = 2 * np.pi * (down / period + draws.uniform())
    center_x, center_y = draws.uniform(size * 0.3, size * 0.7, 2)
    distance = 2 * np.pi * np.hypot(across - center_x, down - center_y) / period
    return 1 / (1 + np.exp(-6 * waves(name, a, b, distance)))


def two_colors(draws: np.random.Generator) -> np.ndarray:
    """Return two random colors (2, 3) of different brightness."""
    while True:
        colors = draws.uniform(0, 255, (2, 3))
        if abs(colors[0].mean() - colors[1].mean()) > 60:
            return colors


def make_images(out: Path, split: str, numbers: range) -> None:
    """Write images {out}/{split}/{pattern}/NUMBER.png."""
    for number in numbers:
        name = PATTERNS[number % len(PATTERNS)]
        draws = np.random.default_rng((7, SPLITS.index(split), number))
        share = pattern(draws, name)[..., None]
        first, second = two_colors(draws)
        pixels = first * (1 - share) + second * share + draws.normal(0, 10, (*share.shape[:2], 3))
        path = out / split / name / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def draw_picture(checkpoint: str, path: Path, videos: list[str]) -> None:
    """Draw each video: original, what the encoder sees, the prediction pasted into that."""
    model, of_run = gallery.load_model(checkpoint)
    size = model.config["img_size"]
    dataset = ViewDataset(
        paths=videos,
        labels=[-1] * len(videos),
        num_frames=model.config["num_frames"],
        sampling_rate=of_run["sampling_rate"],
        target_fps=of_run["target_fps"],
        num_views=1,
        transform=view_transform(size, 1),
        decoder=of_run["decoder"],
        short_side=of_run["short_side"],
    )
    clips = torch.cat([dataset[(0, index)]["clips"] for index in range(len(videos))])
    noise = fixed_noise(torch.arange(len(videos)), model.num_tokens)
    rows = gallery.reconstructions(
        model, clips, noise, of_run["mask_ratio"], of_run["mask_type"], torch.float32
    )
    del rows["prediction"]  # of visible patches too, which the loss does not train
    gallery.sheet(rows).save(path, optimize=True)


def get_parser() -> argparse.ArgumentParser:
    """Return the flags of the three steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("clips", "images"):
        step = steps.add_parser(name)
        step.add_argument("out", type=Path)
        step.add_argument("--train", type=positive, required=True, help="files for training")
        step.add_argument("--val", type=positive, required=True, help="files for validation")
        step.add_argument("--part", type=natural, default=0, help="which part to make")
        step.add_argument("--parts", type=positive, default=1, help="parts in all")
    step = steps.add_parser("picture")
    step.add_argument("checkpoint")
    step.add_argument("path", type=Path)
    step.add_argument("videos", nargs="+")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a step."""
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)  # more are slower for such small pictures
    if args.step == "picture":
        draw_picture(args.checkpoint, args.path, args.videos)
        return
    make = make_clips if args.step == "clips" else make_images
    make(args.out, "train", range(args.part, args.train, args.parts))
    make(args.out, "val", range(args.part, args.val, args.parts))


if __name__ == "__main__":
    run_script(main)
