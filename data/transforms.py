"""Clips as tensors: normalisation on the device, crops and flips on uint8, and the seeds of every random draw.

torchvision is imported where it is used: it takes longer than all that --help needs.
"""

import contextlib
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from util.dist import UserError

VIDEO_MEAN, VIDEO_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def normalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 clips (..., C, T, H, W) -> float32 (x / 255 - mean) / std per colour. Waits for no device."""
    if (
        len(set(mean)) == len(set(std)) == 1
    ):  # one number for all colours: no small tensors to copy to the device
        return clips * (1 / (255 * std[0])) - mean[0] / std[0]
    channels = [clips[..., c, :, :, :] * (1 / (255 * std[c])) - mean[c] / std[c] for c in range(3)]
    return torch.stack(channels, dim=-4)


def denormalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalize`, rounded and clamped to uint8. clips (..., C, T, H, W)."""
    mean, std = (clips.new_tensor(values).view(3, 1, 1, 1) for values in (mean, std))
    return ((clips * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def sample_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed of several numbers, such as (seed, epoch, index, repeat)."""
    sequence = np.random.SeedSequence(
        (len(numbers), *numbers)
    )  # the length, since (1, 2) and (1, 2, 0) are one to it
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int):
    """Draw from torch's global CPU generator as if seeded with `seed`, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def train_transform(
    img_size: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: bool,
    color_jitter: float,
    policy: str = "",
) -> Callable[[Tensor], Tensor]:
    """Random crop by area and aspect (log-uniform), resized to img_size, and mirrored half of the time.

    For uint8 (T, C, H, W); one draw serves all frames. color_jitter: strength of brightness, contrast, saturation jitter.
    policy: RandAugment, see `rand_augment`; "" for none.
    """
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(img_size, scale=tuple(area), ratio=tuple(aspect), antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if color_jitter:
        steps.append(
            v2.ColorJitter(brightness=color_jitter, contrast=color_jitter, saturation=color_jitter)
        )
    if policy:
        steps.append(rand_augment(policy))
    return v2.Compose(steps)


def image_transform(img_size: int, train: bool, flip: bool = True, policy: str = "") -> Callable:
    """PIL image -> uint8 (C, S, S): random crop by area (8 to 100 %), flip and RandAugment (policy) for training, else the centre
    of the image at short side S + 32 (bicubic)."""
    from torchvision.transforms import v2

    if train:
        steps = [v2.RandomResizedCrop(img_size, antialias=True)]
        steps += [v2.RandomHorizontalFlip()] if flip else []
        steps += [rand_augment(policy)] if policy else []
    else:
        steps = [
            v2.Resize(img_size + 32, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(img_size),
        ]
    return v2.Compose([*steps, v2.PILToTensor()])


def view_transform(img_size: int, crops: int) -> Callable[[Tensor], Tensor]:
    """The evaluation crops of uint8 frames (T, C, H, W) -> (crops, T, C, S, S), S = img_size.

    1: short side to S * 256 / 224, centre. 3: short side to S, then left, centre, right (or top, centre, bottom) of the long side.
    """
    from torchvision.transforms import v2

    resize = v2.Resize(img_size if crops > 1 else round(img_size * 256 / 224), antialias=True)

    def views(frames: Tensor) -> Tensor:
        frames = resize(frames)
        if crops == 1:
            return v2.functional.center_crop(frames, [img_size, img_size])[None]
        height, width = frames.shape[-2:]
        places = [
            (round((height - img_size) * part), round((width - img_size) * part))
            for part in torch.linspace(0, 1, crops).tolist()
        ]
        return torch.stack([frames[..., y : y + img_size, x : x + img_size] for y, x in places])

    return views


def rand_augment(policy: str) -> Callable:
    """RandAugment of a string such as rand-m7-n4-mstd0.5-inc1: magnitude m (0 to 10), n operations (2 if absent).

    Magnitude m is bin 3 m of torchvision's 31; mstd is not supported, and inc1 is what torchvision does anyway.
    Raises UserError for anything else.
    """
    from torchvision.transforms import v2

    parts = re.fullmatch(r"rand((?:-(?:m\d+|n\d+|mstd[\d.]+|inc[01]))+)", policy)
    settings = dict(re.findall(r"-(mstd|m|n|inc)([\d.]+)", parts[1])) if parts else {}
    if "m" not in settings or int(settings["m"]) > 10 or int(settings.get("n", 2)) < 1:
        raise UserError(
            f"--aa {policy!r} is not of the form rand-m7-n2-mstd0.5-inc1 with m from 0 to 10"
        )
    return v2.RandAugment(int(settings.get("n", 2)), 3 * int(settings["m"]), num_magnitude_bins=31)


def erase(clips: Tensor, probability: float, mode: str, count: int) -> None:
    """Random erasing, in place, of float clips (B, C, T, H, W): one box for all frames of a clip (Zhong et al. 2017).

    mode: what fills the box, 0 ("const"), a random colour ("rand") or noise ("pixel"), in units of the normalised pixels.
    count: boxes per erased clip, which share the area of 2 to 33 % of the frame.
    """
    from torchvision.transforms import v2

    box = v2.RandomErasing(p=1.0, scale=(0.02 / count, 0.33 / count))
    for clip in clips:
        if torch.rand(()) >= probability:
            continue
        for _ in range(count):
            place = box.make_params([clip[:, 0]])
            if place["v"] is None:  # found no box that fits
                continue
            area = clip[
                ..., place["i"] : place["i"] + place["h"], place["j"] : place["j"] + place["w"]
            ]  # (C, T, h, w)
            shape = {"const": None, "rand": (len(clip), 1, 1, 1), "pixel": area.shape}[mode]
            area.copy_(
                torch.zeros_like(area) if shape is None else torch.randn(shape, device=clip.device)
            )


def mixer(
    mixup: float, cutmix: float, probability: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MixUp and CutMix of clips, by their Beta parameters (0 = off); of the two, one at random (arXiv 1710.09412, 1905.04899).

    The result takes clips (B, C, T, H, W) and labels (B,) and mixes clip i with clip i - 1, with one weight or box for the
    whole batch and all frames; it returns clips and targets (B, num_classes).
    """
    from torchvision.transforms import v2

    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha > 0
    ]
    mix = v2.RandomApply([v2.RandomChoice(kinds)], p=probability) if kinds else None

    def mixed(clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pictures, labels = (
            (clips.flatten(1, 2), labels) if mix is None else mix(clips.flatten(1, 2), labels)
        )  # (B, C T, H, W)
        return pictures.view_as(clips), labels if labels.ndim == 2 else one_hot(
            labels, num_classes
        ).to(clips.dtype)

    return mixed
