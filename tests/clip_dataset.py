"""A small data set of training clips, shared by the tests of data/."""

from data.clips import ClipSampling
from data.datasets import ClipDataset
from data.transforms import train_transform

SEED = 3


def clip_dataset(paths: list[str], **changes) -> ClipDataset:
    """Return training clips of 4 frames of 32 x 32 pixels, 2 clips of each video."""
    transform = train_transform(32, (0.5, 1.0), (0.75, 1.3333), flip=True, color_jitter=0.0)
    arguments = {
        "paths": paths,
        "labels": None,
        "sampling": ClipSampling(4, 2),
        "repeat_aug": 2,
        "repeat_windows": 1,
        "transform": transform,
        "decoder": "pyav",
        "short_side": 64,
        "seed": SEED,
        "noise_tokens": 8,
    }
    return ClipDataset(**arguments | changes)
