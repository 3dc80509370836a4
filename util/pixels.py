"""Pixel statistics, and normalization on the device."""

import torch
from torch import Tensor

VIDEO_MEAN = (0.45, 0.45, 0.45)
VIDEO_STD = (0.225, 0.225, 0.225)
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's
IMAGE_STD = (0.229, 0.224, 0.225)


def normalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (x / 255 - mean) / std per color, as float32, of uint8 clips (..., C, T, H, W).

    No tensors are copied from the host, so that it does not wait for the device.
    """
    if len(set(mean)) == 1 and len(set(std)) == 1:
        return clips * (1 / (255 * std[0])) - mean[0] / std[0]
    colors = []
    for c in range(3):
        color = clips[..., c, :, :, :]  # (..., T, H, W)
        colors.append(color * (1 / (255 * std[c])) - mean[c] / std[c])
    return torch.stack(colors, dim=-4)


def denormalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return the inverse of `normalize`, rounded and clamped to uint8. clips: (..., C, T, H, W)."""
    mean_of_color = clips.new_tensor(mean).view(3, 1, 1, 1)
    std_of_color = clips.new_tensor(std).view(3, 1, 1, 1)
    values = (clips * std_of_color + mean_of_color) * 255
    return values.round().clamp(0, 255).to(torch.uint8)
