"""Pixel statistics, and the inverse of the models' normalization."""

import torch
from torch import Tensor

VIDEO_MEAN = (0.45, 0.45, 0.45)
VIDEO_STD = (0.225, 0.225, 0.225)
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's
IMAGE_STD = (0.229, 0.224, 0.225)


def denormalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return the inverse of `models_vit.normalize`, rounded and clamped to uint8.

    clips: (..., C, T, H, W).
    """
    mean_of_color = clips.new_tensor(mean).view(3, 1, 1, 1)
    std_of_color = clips.new_tensor(std).view(3, 1, 1, 1)
    values = (clips * std_of_color + mean_of_color) * 255
    return values.round().clamp(0, 255).to(torch.uint8)
