"""Augmentation and evaluation crops: crops and flips on uint8, erasing and mixing on float clips.

B clips, C colors (3), T frames, H and W pixels, S = img_size. All draws come from torch's global
generator.

torchvision is imported where it is used, since its import takes longer than all others that --help
needs.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from util.dist import UserError

RAND_AUGMENT_POLICY = re.compile(r"rand((?:-(?:m\d+|n\d+|mstd[\d.]+|inc[01]))+)")
RAND_AUGMENT_BINS = 31  # torchvision's magnitude bins; magnitude m of 0 to 10 is bin 3 m
ERASED_AREA = (0.02, 0.33)  # smallest and largest part of a frame that is erased


def decode_short_side(img_size: int) -> int:
    """Return the short side in pixels at which videos are decoded for crops of img_size pixels."""
    ceil_of_scaled = -(-img_size * 256 // 224)
    return max(256, ceil_of_scaled)


def train_transform(
    img_size: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flip: bool,
    color_jitter: float,
    policy: str = "",
) -> Callable[[Tensor], Tensor]:
    """Return the augmentation of training clips, uint8 (T, C, H, W) -> (T, C, S, S).

    One draw serves all frames of a clip.

    Args:
        img_size: S in pixels.
        area: Smallest and largest part of the frame that is cropped.
        aspect: Smallest and largest width / height of the crop, drawn log-uniformly.
        flip: Mirror half of the clips.
        color_jitter: Strength of brightness, contrast and saturation jitter, 0 for none.
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
    """Return the transform of images, PIL image -> uint8 (C, S, S).

    In training: a random crop by area (8 to 100 %), flip and RandAugment (policy). In evaluation:
    the center of the image at short side S + 32 (bicubic).
    """
    from torchvision.transforms import v2

    if train:
        steps = [v2.RandomResizedCrop(img_size, antialias=True)]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if policy:
            steps.append(rand_augment(policy))
    else:
        bicubic = v2.InterpolationMode.BICUBIC
        steps = [v2.Resize(img_size + 32, interpolation=bicubic), v2.CenterCrop(img_size)]
    return v2.Compose([*steps, v2.PILToTensor()])


def view_transform(img_size: int, crops: int) -> Callable[[Tensor], Tensor]:
    """Return the evaluation crops, uint8 (T, C, H, W) -> (crops, T, C, S, S).

    One crop: the center at short side S * 256 / 224. Three crops: left, center and right (or top,
    center and bottom) of the long side at short side S.
    """
    from torchvision.transforms import v2

    if crops == 1:
        resize = v2.Resize(round(img_size * 256 / 224), antialias=True)
        center_crop = v2.CenterCrop(img_size)
        return lambda frames: center_crop(resize(frames))[None]
    resize = v2.Resize(img_size, antialias=True)

    def crop_along_long_side(frames: Tensor) -> Tensor:
        frames = resize(frames)
        height, width = frames.shape[-2:]
        views = []
        for part in torch.linspace(0, 1, crops).tolist():
            top = round((height - img_size) * part)
            left = round((width - img_size) * part)
            views.append(frames[..., top : top + img_size, left : left + img_size])
        return torch.stack(views)

    return crop_along_long_side


def rand_augment(policy: str) -> Callable:
    """Return RandAugment (arXiv 1909.13719) of a policy such as rand-m7-n4-mstd0.5-inc1.

    m: magnitude, 0 to 10. n: number of operations, 2 if absent. mstd is not supported, and inc1 is
    what torchvision does anyway. Raises UserError for anything else.
    """
    from torchvision.transforms import v2

    match = RAND_AUGMENT_POLICY.fullmatch(policy)
    settings = {}
    if match:
        settings = dict(re.findall(r"-(mstd|m|n|inc)([\d.]+)", match[1]))
    magnitude = int(settings.get("m", -1))
    num_ops = int(settings.get("n", 2))
    if not 0 <= magnitude <= 10 or num_ops < 1:
        raise UserError(
            f"--aa {policy!r} is not of the form rand-m7-n2-mstd0.5-inc1 with m from 0 to 10"
        )
    return v2.RandAugment(num_ops, 3 * magnitude, num_magnitude_bins=RAND_AUGMENT_BINS)


def random_erasing_(clips: Tensor, probability: float, mode: str, count: int) -> None:
    """Erase random boxes of float clips (B, C, T, H, W) in place (arXiv 1708.04896).

    A box is the same in all frames of a clip.

    Args:
        clips: Normalized pixels.
        probability: Part of the clips that are erased.
        mode: What fills a box: 0 ("const"), a random color ("rand") or noise ("pixel").
        count: Boxes of an erased clip, which share the erased area.
    """
    from torchvision.transforms import v2

    smallest, largest = ERASED_AREA
    eraser = v2.RandomErasing(p=1.0, scale=(smallest / count, largest / count))
    for clip in clips:
        if torch.rand(()) >= probability:
            continue
        for _ in range(count):
            box = eraser.make_params([clip[:, 0]])
            if box["v"] is None:  # no box was found that fits
                continue
            rows = slice(box["i"], box["i"] + box["h"])
            columns = slice(box["j"], box["j"] + box["w"])
            area = clip[..., rows, columns]  # (C, T, h, w)
            if mode == "const":
                area.zero_()
            elif mode == "rand":
                area.copy_(torch.randn(len(clip), 1, 1, 1, device=clip.device))
            else:
                area.copy_(torch.randn(area.shape, device=clip.device))


def make_mixup(
    mixup: float, cutmix: float, probability: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of batches.

    One of the two is chosen at random for each batch.
    The result takes clips (B, C, T, H, W) and labels (B,), and returns clips and targets
    (B, num_classes). It mixes clip i with clip i - 1, with one weight or box for the whole batch
    and all frames.

    Args:
        mixup, cutmix: Parameters of their Beta distributions, 0 for none.
        probability: Part of the batches that are mixed.
        num_classes: Length of the targets.
    """
    from torchvision.transforms import v2

    choices = []
    if mixup > 0:
        choices.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        choices.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    mix = None
    if choices:
        mix = v2.RandomApply([v2.RandomChoice(choices)], p=probability)

    def mix_batch(clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = clips.flatten(1, 2)  # (B, C T, H, W)
        targets = labels
        if mix is not None:
            images, targets = mix(images, labels)
        if targets.ndim == 1:  # not mixed
            targets = one_hot(labels, num_classes).to(clips.dtype)
        return images.view_as(clips), targets

    return mix_batch
