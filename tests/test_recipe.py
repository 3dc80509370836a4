"""The finetuning recipe and evaluation views against rules: mixing, erasing, RandAugment, crops, position resampling."""

import argparse

import numpy as np
import pytest
import torch
from golden_files import golden
from make_videos import write_video
from tiny import tiny_vit

from data.loaders import ViewDataset
from data.transforms import erase, mixer, rand_augment, view_transform
from engine_finetune import Recipe
from util.dist import UserError
from util.importer import resample_positions


def marked_clips(videos: int) -> torch.Tensor:
    """Clips (B, 3, 4, 16, 16) that are everywhere equal to their number."""
    return (
        torch.arange(videos, dtype=torch.float32)
        .view(-1, 1, 1, 1, 1)
        .expand(-1, 3, 4, 16, 16)
        .contiguous()
    )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_weights_pixels_like_labels_with_the_neighbour_before(mixup, cutmix):
    torch.manual_seed(0)
    clips, targets = mixer(mixup, cutmix, 1.0, 4)(marked_clips(4), torch.arange(4))
    for number in range(4):
        partner = (number - 1) % 4
        own = targets[number, number].item()
        assert targets[number, partner].item() == pytest.approx(1 - own) and targets[
            number
        ].sum().item() == pytest.approx(1)
        assert clips[number].mean().item() == pytest.approx(
            own * number + (1 - own) * partner, abs=1e-4
        )
    frames = clips.transpose(1, 2)  # one box, one weight for all frames
    assert torch.equal(frames, frames[:, :1].expand_as(frames))
    if cutmix:
        assert set(clips.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_mixing_is_applied_to_its_share_of_batches_and_off_without_parameters():
    torch.manual_seed(0)
    mix = mixer(0.8, 1.0, 0.3, 4)
    mixed = [
        bool((mix(marked_clips(4), torch.arange(4))[1].max(1).values < 1).any()) for _ in range(300)
    ]
    assert 0.22 < sum(mixed) / 300 < 0.38
    clips, targets = mixer(0, 0, 1.0, 4)(marked_clips(4), torch.arange(4))
    assert torch.equal(clips, marked_clips(4)) and torch.equal(targets, torch.eye(4))


def test_a_clip_is_never_mixed_with_one_of_its_own_video():
    config = {"num_classes": 4, "mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
    args = argparse.Namespace(mixup=0.8, cutmix=0.0, mixup_prob=1.0, rand_aug=False)
    clips = (
        torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1, 1, 1).expand(4, 3, 3, 1, 8, 8)
    )  # four videos, three clips each
    torch.manual_seed(0)
    mixed, targets = Recipe(args, config, still_frames=6)(
        {"clips": clips, "labels": torch.arange(4)}
    )
    assert mixed.shape == (12, 3, 6, 8, 8)
    assert ((targets > 0).sum(1) == 2).all()
    torch.testing.assert_close(
        mixed.mean((1, 2, 3, 4)), targets @ torch.arange(4.0), atol=1e-4, rtol=0
    )
    alone, targets = Recipe(args, config, still_frames=1)(
        {"clips": clips[2:3], "labels": torch.tensor([2])}
    )
    assert targets.max(1).values.eq(1).all() and alone.eq(2).all()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_fills_one_box_for_all_frames(mode):
    torch.manual_seed(0)
    clips = torch.full((40, 3, 4, 32, 32), 7.0)
    erase(clips, 0.5, mode, 1)
    changed = (clips != 7).any(1)  # (B, T, H, W)
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    erased = [clip for clip in range(40) if changed[clip].any()]
    assert 10 < len(erased) < 30
    for number in erased:
        rows, columns = changed[number, 0].any(1).nonzero(), changed[number, 0].any(0).nonzero()
        box = clips[number, :, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert changed[number, 0].sum() == box[0, 0].numel()  # a full rectangle
        assert 0.01 < box[0, 0].numel() / 32**2 < 0.36
        distinct = box.unique().numel()
        lowest = {"const": 1, "rand": 3, "pixel": 0.99 * box.numel()}[mode]
        assert lowest <= distinct <= {"const": 1, "rand": 3, "pixel": box.numel()}[mode]


def test_erasing_several_boxes_shares_the_area():
    torch.manual_seed(0)
    clips = torch.full((60, 3, 1, 32, 32), 7.0)
    erase(clips, 1.0, "const", 3)
    assert (clips[:, 0] == 0).float().mean() < 0.2


def test_rand_augment_reads_the_policy_and_treats_all_frames_alike():
    policy = rand_augment("rand-m7-n4-mstd0.5-inc1")
    assert (policy.num_ops, policy.magnitude, policy.num_magnitude_bins) == (4, 21, 31)
    assert rand_augment("rand-m9").num_ops == 2
    frames = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8).expand(5, -1, -1, -1)
    for seed in range(20):
        torch.manual_seed(seed)
        out = policy(frames)
        assert out.dtype == torch.uint8 and torch.equal(out, out[:1].expand_as(out))
    for wrong in ("rand", "rand-m11", "auto", "rand-m7-x3", "rand-m7-n0"):
        with pytest.raises(UserError, match="--aa"):
            rand_augment(wrong)


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_three_crops_cover_the_long_side_and_one_is_the_centre(size):
    ramp = torch.arange(64, dtype=torch.uint8)
    frame = (ramp.expand(32, 64) if size == (32, 64) else ramp[:, None].expand(64, 32)).expand(
        2, 3, *size
    )
    left, middle, right = view_transform(32, 3)(frame)
    assert left.shape == (2, 3, 32, 32)
    assert (
        (left.min(), left.max()) == (0, 31)
        and (middle.min(), middle.max()) == (16, 47)
        and (right.min(), right.max()) == (32, 63)
    )
    (centre,) = view_transform(28, 1)(frame)
    assert centre.shape == (2, 3, 28, 28) and (centre.min(), centre.max()) == (18, 45)


def test_views_of_a_video_are_those_read_one_by_one(tmp_path):
    """Overlapping windows, decoded in one pass, equal each window decoded alone."""
    path = str(write_video(tmp_path / "v.mp4", frames=40, size=(96, 64)))
    arguments = {
        "paths": [path],
        "labels": [3],
        "num_frames": 4,
        "sampling_rate": 4,
        "target_fps": 30,
        "decoder": "pyav",
        "short_side": 64,
    }
    sample = ViewDataset(**arguments, num_views=5, transform=view_transform(32, 3))[(0, 0)]
    assert sample["clips"].shape == (15, 3, 4, 32, 32) and sample["label"] == 3
    from data.decode import open_video

    for view in range(5):
        start = view * (24 // 4)  # slack 40 - 16, four steps
        wanted = np.linspace(start, start + 15, 4).astype(int)
        with open_video(path, "pyav", 64) as video:
            frames = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)
        expected = view_transform(32, 3)(frames).transpose(1, 2)
        assert torch.equal(sample["clips"][3 * view : 3 * view + 3], expected)


def test_positions_are_resampled_like_the_ancestor():
    file = golden("pos_embed_interp.npz")
    before, after = torch.from_numpy(file["before"]), torch.from_numpy(file["after"])
    model = tiny_vit(img_size=72, patch_size=8)  # 9 x 9
    torch.testing.assert_close(
        resample_positions("pos_embed_spatial", before, model), after, rtol=1e-4, atol=1e-5
    )


def test_joint_and_temporal_positions_are_resampled_along_their_axes():
    joint = tiny_vit(img_size=72, num_frames=12, sep_pos_embed=False)  # 6 x 9 x 9
    space, time = torch.randn(36, 64), torch.linspace(0, 1, 4)
    row = torch.randn(1, 1, 64)
    value = torch.cat([row, (time[:, None, None] + space).flatten(0, 1)[None]], 1)
    resampled = resample_positions("pos_embed", value, joint, old_steps=4)
    assert resampled.shape == (1, 1 + 6 * 81, 64) and torch.equal(resampled[:, :1], row)
    with pytest.raises(ValueError, match="144 positions"):
        resample_positions("pos_embed", value, joint)
    alone = resample_positions("pos_embed_spatial", space[None], joint)
    steps = torch.nn.functional.interpolate(
        time[None, None], size=6, mode="linear", align_corners=False
    )[0, 0]
    torch.testing.assert_close(
        resampled[0, 1:], (steps[:, None, None] + alone[0]).flatten(0, 1), rtol=1e-4, atol=1e-4
    )
    separate = resample_positions("pos_embed_temporal", time[None, :, None].expand(1, 4, 64), joint)
    torch.testing.assert_close(separate[0, :, 0], steps)
