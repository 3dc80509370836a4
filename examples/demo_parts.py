"""Steps of demo.py that are not one of the three scripts: make files, draw predictions.

    python examples/demo_parts.py clips demo/clips --train 2400 --val 400 --part 0 --parts 2
    python examples/demo_parts.py images demo/images --train 1600 --val 400
    python examples/demo_parts.py picture demo/samples.pth demo/prediction.png VIDEO [VIDEO ...]

Every file is a function of its split and index alone, so several processes can share the work.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.learning import DIRECTIONS, Sprites, encode, moving_clip, pictures
from tools.reading import center_clips
from util import pictures as recon_pictures
from util.cli import nonnegative_int, positive_int
from util.dist import print0, run_script
from util.model_source import describe_checkpoint
from util.pretrained import load_autoencoder
from util.seeds import fixed_noise

SPRITES = Sprites(count=5, radii=(5.0, 9.0), tint=0.25)
PATTERNS = ("across", "checks", "dots", "down", "falling", "grid", "rings", "rising")
SPLITS = ("train", "val")


def make_clips(out: Path, split: str, indices: range) -> None:
    """Write motion clips {out}/{split}/{direction}/{index}.mp4."""
    photograph_split = "test"  # benchmarks.learning keeps its own "val" for tuning
    if split == "train":
        photograph_split = "train"
    photographs, grounds = pictures(photograph_split)
    for count, index in enumerate(indices):
        direction = DIRECTIONS[index % len(DIRECTIONS)]
        rng = np.random.default_rng((SPLITS.index(split), index))
        frames = moving_clip(rng, photographs, grounds, int(direction), SPRITES)
        path = out / split / direction / f"{index:05d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, frames, codec="mpeg4")
        if count % 100 == 0:
            print0(f"file {count}/{len(indices)}")


def waves(name: str, a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the wave of a pattern, given two axes and the distance from a center in radians."""
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


def pattern(rng: np.random.Generator, name: str, size: int = 64) -> np.ndarray:
    """Return a pattern (size, size) in [0, 1] with random period, phase and tilt."""
    y, x = np.mgrid[:size, :size].astype(float)
    period = rng.uniform(10, 18)
    tilt = np.deg2rad(rng.uniform(-8, 8))
    across = x * np.cos(tilt) - y * np.sin(tilt)
    down = x * np.sin(tilt) + y * np.cos(tilt)
    a = 2 * np.pi * (across / period + rng.uniform())
    b = 2 * np.pi * (down / period + rng.uniform())
    center_x, center_y = rng.uniform(size * 0.3, size * 0.7, 2)
    distance = 2 * np.pi * np.hypot(across - center_x, down - center_y) / period
    return 1 / (1 + np.exp(-6 * waves(name, a, b, distance)))


def two_colors(rng: np.random.Generator) -> np.ndarray:
    """Return two random colors (2, 3) in [0, 255] of different brightness."""
    while True:
        colors = rng.uniform(0, 255, (2, 3))
        if abs(colors[0].mean() - colors[1].mean()) > 60:
            return colors


def make_images(out: Path, split: str, indices: range) -> None:
    """Write images {out}/{split}/{pattern}/{index}.png."""
    for index in indices:
        name = PATTERNS[index % len(PATTERNS)]
        rng = np.random.default_rng((7, SPLITS.index(split), index))
        share = pattern(rng, name)[..., None]
        background, foreground = two_colors(rng)
        noise = rng.normal(0, 10, (*share.shape[:2], 3))
        pixels = background * (1 - share) + foreground * share + noise
        path = out / split / name / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def draw_picture(checkpoint: str, path: Path, videos: list[str]) -> None:
    """Draw for each video the original, the visible patches, and the prediction among them."""
    of_run = describe_checkpoint(checkpoint, {}).flags
    model = load_autoencoder(checkpoint)
    dataset = center_clips(videos, model.config, of_run)
    clips = torch.cat([dataset[(0, index)]["clips"] for index in range(len(videos))])
    noise = fixed_noise(range(len(videos)), model.num_tokens)
    rows = recon_pictures.reconstructions(
        model, clips, noise, of_run["mask_ratio"], of_run["mask_type"], torch.float32
    )
    del rows["prediction"]  # includes visible patches, which are not in the loss
    to_pil_image(recon_pictures.contact_sheet(rows)).save(path, optimize=True)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the three steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("clips", "images"):
        step = steps.add_parser(name)
        step.add_argument("out", type=Path)
        step.add_argument("--train", type=positive_int, required=True, help="files for training")
        step.add_argument("--val", type=positive_int, required=True, help="files for validation")
        step.add_argument(
            "--part", type=nonnegative_int, default=0, help="index of the part to make"
        )
        step.add_argument("--parts", type=positive_int, default=1, help="number of parts")
    step = steps.add_parser("picture")
    step.add_argument("checkpoint")
    step.add_argument("path", type=Path)
    step.add_argument("videos", nargs="+")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a step."""
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)  # more are slower for pictures this small
    if args.step == "picture":
        draw_picture(args.checkpoint, args.path, args.videos)
        return
    counts = {"train": args.train, "val": args.val}
    for split, count in counts.items():
        indices = range(args.part, count, args.parts)
        if args.step == "clips":
            make_clips(args.out, split, indices)
        else:
            make_images(args.out, split, indices)


if __name__ == "__main__":
    run_script(main)
