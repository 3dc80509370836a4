"""Transforms against their rules: crops, RandAugment, random erasing, MixUp and CutMix."""

import argparse

import pytest
import torch

from data.transforms import (
    decode_short_side,
    image_transform,
    make_mixup,
    rand_augment,
    random_erasing_,
    train_transform,
    view_transform,
)
from engine_finetune import BatchTransform
from util.dist import UserError
from util.seeds import fork_rng

NUM_CLASSES = 4


def numbered_clips(videos: int) -> torch.Tensor:
    """Return clips (B, 3, 4, 16, 16) whose pixels all equal the clip's index."""
    numbers = torch.arange(videos, dtype=torch.float32)
    return numbers.view(-1, 1, 1, 1, 1).expand(-1, 3, 4, 16, 16).contiguous()


def still_clip(frames: int, height: int, width: int) -> torch.Tensor:
    """Return a clip (T, C, H, W) of equal frames of noise."""
    frame = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    return frame.expand(frames, -1, -1, -1)


def value_range(view: torch.Tensor) -> tuple[int, int]:
    """Return the smallest and the largest value."""
    return view.min().item(), view.max().item()


def test_videos_are_decoded_a_little_larger_than_their_crops():
    assert decode_short_side(64) == 256
    assert decode_short_side(224) == 256
    assert decode_short_side(336) == 384
    assert decode_short_side(337) == 386  # 385.1, rounded up


def test_one_crop_and_flip_serves_all_frames_of_a_clip():
    transform = train_transform(32, (0.5, 1.0), (0.75, 1.3333), flip=True, color_jitter=0.4)
    with fork_rng(1):
        clip = transform(still_clip(5, 40, 60))
    assert clip.shape == (5, 3, 32, 32)
    assert clip.dtype == torch.uint8
    assert (clip == clip[:1]).all()


@pytest.mark.parametrize("train", [False, True])
def test_images_become_uint8_tensors(train):
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("RGB", (80, 60), (10, 20, 30))
    pixels = image_transform(32, train)(image)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert pixels.flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]


@pytest.mark.parametrize("size", [(32, 64), (64, 32)], ids=["wide", "tall"])
def test_three_views_cover_the_long_side_and_one_the_center(size):
    ramp = torch.arange(64, dtype=torch.uint8)
    if size == (64, 32):
        ramp = ramp[:, None]
    frames = ramp.expand(2, 3, *size)
    views = view_transform(32, 3)(frames)
    assert views.shape == (3, 2, 3, 32, 32)
    assert [value_range(view) for view in views] == [(0, 31), (16, 47), (32, 63)]
    center = view_transform(28, 1)(frames)
    assert center.shape == (1, 2, 3, 28, 28)
    assert value_range(center) == (18, 45)


def test_rand_augment_reads_its_policy():
    augment = rand_augment("rand-m7-n4-mstd0.5-inc1")
    assert (augment.num_ops, augment.magnitude, augment.num_magnitude_bins) == (4, 21, 31)
    assert rand_augment("rand-m9").num_ops == 2


@pytest.mark.parametrize("policy", ["rand", "rand-m11", "auto", "rand-m7-x3", "rand-m7-n0"])
def test_rand_augment_refuses_other_policies(policy):
    with pytest.raises(UserError, match=f"--aa '{policy}'"):
        rand_augment(policy)


@pytest.mark.parametrize("seed", range(20))
def test_rand_augment_treats_all_frames_alike(seed):
    frames = still_clip(5, 24, 24)
    torch.manual_seed(seed)
    augmented = rand_augment("rand-m7-n4")(frames)
    assert augmented.dtype == torch.uint8
    assert torch.equal(augmented, augmented[:1].expand_as(augmented))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_fills_one_box_for_all_frames(mode):
    torch.manual_seed(0)
    clips = torch.full((40, 3, 4, 32, 32), 7.0)
    random_erasing_(clips, 0.5, mode, 1)
    changed = (clips != 7).any(1)  # (B, T, H, W)
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    erased = [clip for clip in range(40) if changed[clip].any()]
    assert 10 < len(erased) < 30
    for clip in erased:
        mask = changed[clip, 0]  # (H, W)
        rows = mask.any(1).nonzero()
        columns = mask.any(0).nonzero()
        box = clips[clip, :, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        area = box[0, 0].numel()
        assert mask.sum() == area  # the whole rectangle
        assert 0.01 < area / 32**2 < 0.36
        distinct = box.unique().numel()
        if mode == "const":
            assert distinct == 1
        elif mode == "rand":
            assert distinct == 3  # one value per color
        else:
            assert distinct >= 0.99 * box.numel()


def test_several_boxes_share_the_erased_area():
    torch.manual_seed(0)
    clips = torch.full((60, 3, 1, 32, 32), 7.0)
    random_erasing_(clips, 1.0, "const", 3)
    assert (clips[:, 0] == 0).float().mean() < 0.2


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_mixing_weights_pixels_like_labels(mixup, cutmix):
    torch.manual_seed(0)
    mix = make_mixup(mixup, cutmix, 1.0, NUM_CLASSES)
    clips, targets = mix(numbered_clips(4), torch.arange(4))
    for index in range(4):
        partner = (index - 1) % 4
        weight = targets[index, index].item()
        assert targets[index, partner].item() == pytest.approx(1 - weight)
        assert targets[index].sum().item() == pytest.approx(1)
        expected = weight * index + (1 - weight) * partner
        assert clips[index].mean().item() == pytest.approx(expected, abs=1e-4)
    frames = clips.transpose(1, 2)  # (B, T, C, H, W): one box and weight for all frames
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    if cutmix:
        assert set(clips.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_mixing_is_applied_to_its_share_of_batches():
    torch.manual_seed(0)
    mix = make_mixup(0.8, 1.0, 0.3, NUM_CLASSES)
    mixed = 0
    for _ in range(300):
        _, targets = mix(numbered_clips(4), torch.arange(4))
        mixed += bool((targets.max(1).values < 1).any())
    assert 0.22 < mixed / 300 < 0.38


def test_without_parameters_nothing_is_mixed():
    mix = make_mixup(0, 0, 1.0, NUM_CLASSES)
    clips, targets = mix(numbered_clips(4), torch.arange(4))
    assert torch.equal(clips, numbered_clips(4))
    assert torch.equal(targets, torch.eye(4))


def test_a_clip_is_never_mixed_with_one_of_its_own_video():
    config = {"num_classes": NUM_CLASSES, "mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
    args = argparse.Namespace(
        mixup=0.8,
        cutmix=0.0,
        mixup_prob=1.0,
        rand_aug=False,
        reprob=0.25,
        remode="pixel",
        recount=1,
    )
    numbers = torch.arange(4, dtype=torch.uint8)
    clips = numbers.view(4, 1, 1, 1, 1, 1).expand(4, 3, 3, 1, 8, 8)  # three clips of each video
    torch.manual_seed(0)
    batch = {"clips": clips, "labels": torch.arange(4)}
    mixed, targets = BatchTransform(args, config, still_frames=6)(batch)
    assert mixed.shape == (12, 3, 6, 8, 8)
    assert ((targets > 0).sum(1) == 2).all()
    expected = targets @ torch.arange(4.0)
    torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), expected, atol=1e-4, rtol=0)

    batch = {"clips": clips[2:3], "labels": torch.tensor([2])}
    alone, targets = BatchTransform(args, config, still_frames=1)(batch)
    assert targets.max(1).values.eq(1).all()
    assert alone.eq(2).all()
