"""Clips as tensors: normalisation on the device, crops and flips on uint8, and the seeds of every random draw."""

import contextlib

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

VIDEO_MEAN, VIDEO_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 clips (..., C, T, H, W) -> float32 (x / 255 - mean) / std per colour. Waits for no device."""
    if len(set(mean)) == len(set(std)) == 1:  # one number for all colours: no small tensors to copy to the device
        return clips * (1 / (255 * std[0])) - mean[0] / std[0]
    channels = [clips[..., c, :, :, :] * (1 / (255 * std[c])) - mean[c] / std[c] for c in range(3)]
    return torch.stack(channels, dim=-4)


def denormalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalize`, rounded and clamped to uint8. clips (..., C, T, H, W)."""
    mean, std = (clips.new_tensor(values).view(3, 1, 1, 1) for values in (mean, std))
    return ((clips * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def sample_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed of several numbers, such as (seed, epoch, index, repeat)."""
    sequence = np.random.SeedSequence((len(numbers), *numbers))  # the length, since (1, 2) and (1, 2, 0) are one to it
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int):
    """Draw from torch's global CPU generator as if seeded with `seed`, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train_transform(img_size: int, area: tuple[float, float], aspect: tuple[float, float], flip: bool, color_jitter: float) -> v2.Transform:
    """Random crop by area and aspect (log-uniform), resized to img_size, and mirrored half of the time.

    For uint8 (T, C, H, W); one draw serves all frames. color_jitter: strength of brightness, contrast, saturation jitter.
    """
    steps = [v2.RandomResizedCrop(img_size, scale=tuple(area), ratio=tuple(aspect), antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if color_jitter:
        steps.append(v2.ColorJitter(brightness=color_jitter, contrast=color_jitter, saturation=color_jitter))
    return v2.Compose(steps)
