"""The reconstruction gallery: its rows by their rules, its layout by its inverse, and --visualize from a checkpoint alone."""

import numpy as np
import pytest
import torch
from make_videos import write_folder
from PIL import Image
from test_pretrain import command
from test_validation import plain_clip, saved_model
from tiny import tiny_mae

import gallery
import pretrain
from data.index import find_videos
from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize
from engine_eval import fixed_noise
from models_mae import split_tokens, untubelets
from util.dist import UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five videos."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 5))


@pytest.mark.parametrize("normed", [False, True])
def test_the_rows_keep_their_promises(normed):
    model, clips = (
        tiny_mae(norm_pix_loss=normed).eval(),
        torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8),
    )
    noise = torch.rand(2, 64)
    rows = gallery.reconstructions(model, clips, noise, 0.75, "random", torch.float32)
    assert len(rows) == (5 if normed else 4) and sum("true mean" in label for label in rows) == (
        2 if normed else 0
    )
    original, masked, *alone, predicted, pasted = rows.values()
    visible, _ = split_tokens(noise, model.grid, 0.75, "random")
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter_(1, visible, False)
    hidden = untubelets(hidden[:, :, None].expand(2, 64, 2 * 8 * 8 * 3), model.grid, 2, 8)
    assert torch.equal(original, clips)
    assert torch.equal(
        masked, clips.where(~hidden, torch.tensor(round(255 * VIDEO_MEAN[0]), dtype=torch.uint8))
    )
    assert torch.equal(pasted, predicted.where(hidden, clips))
    if normed:  # the true mean and deviation turn the one prediction into the other
        floats = normalize(clips, VIDEO_MEAN, VIDEO_STD)
        bare, told = (
            model.reconstruct(floats, 0.75, "random", noise, true_statistics=true)[1]
            for true in (False, True)
        )
        patches = (
            floats.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)
        )  # (B, C, t', h, w, u, p, p)
        mean = patches.mean((1, 5, 6, 7))[:, None, :, :, :, None, None, None].expand_as(patches)
        deviation = (patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).var(4) + 1e-6).sqrt()[
            :, None, :, :, :, None, None, None
        ]
        expected = bare.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8) * deviation + mean
        torch.testing.assert_close(
            told.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8), expected, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(alone[0], gallery.denormalize(bare, VIDEO_MEAN, VIDEO_STD))


def cells(picture: Image.Image, rows: int, columns: int, side: int) -> np.ndarray:
    """The pictures on a board, (rows, columns, side, side, 3): they stand at its right and lower edge, 2 pixels apart."""
    pixels = np.array(picture.convert("RGB"))[-rows * (side + 2) :, -columns * (side + 2) :]
    return pixels.reshape(rows, side + 2, columns, side + 2, 3).transpose(0, 2, 1, 3, 4)[
        :, :, :side, :side
    ]


def test_sheet_and_animation_hold_every_frame_in_its_place():
    rows = {
        f"row {number}": torch.randint(0, 256, (2, 3, 5, 32, 32), dtype=torch.uint8)
        for number in range(3)
    }
    shown = cells(gallery.sheet(rows), 6, 5, 64)
    few = cells(gallery.sheet(rows, most=3), 6, 3, 64)
    moving = [cells(picture, 2, 3, 128) for picture in gallery.animation(rows)]
    assert len(moving) == 5
    for clip in range(2):
        for place, frames in enumerate(rows.values()):
            for frame in range(5):
                expected = frames[clip, :, frame].permute(1, 2, 0).numpy()
                assert np.array_equal(shown[clip * 3 + place, frame][::2, ::2], expected)
                assert np.array_equal(moving[frame][clip, place][1::4, 1::4], expected)
            assert np.array_equal(
                few[clip * 3 + place, 1][::2, ::2], frames[clip, :, 2].permute(1, 2, 0).numpy()
            )


def test_visualize_needs_a_checkpoint_and_videos_only(videos, tmp_path):
    pretrain.main(
        command(
            videos, tmp_path, "--max_steps", "1", "--batch_size_per_gpu", "4", "--norm_pix_loss"
        )
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    asked = [
        "--visualize",
        str(tmp_path / "run.pth"),
        "--data_dirs",
        videos,
        "--output_dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    pretrain.main(
        [*asked, "--visualize_masks", "random:0.75", "tube:0.5", "--visualize_clips", "3"]
    )
    made = {
        f"run_gallery_{mask}.{kind}"
        for mask in ("random_0.75", "tube_0.5")
        for kind in ("png", "webp")
    }
    assert {path.name for path in tmp_path.iterdir()} == made | set(before)
    shown = cells(Image.open(tmp_path / "run_gallery_tube_0.5.png"), 15, 4, 64)
    moving = Image.open(tmp_path / "run_gallery_tube_0.5.webp")
    assert moving.n_frames == 4 and moving.is_animated
    model, paths = saved_model(tmp_path / "run.pth"), find_videos([videos])
    for clip, number in enumerate(
        (0, 2, 4)
    ):  # the run's frame spacing, size, and a mask by the video's number
        floats = plain_clip(paths[number])
        with torch.no_grad():
            original, predicted, hidden = model.reconstruct(
                floats, 0.5, "tube", fixed_noise(torch.tensor([number]), 32)
            )
        for row, frames in ((0, original), (4, predicted.where(hidden, original))):
            expected = (
                gallery.denormalize(frames, VIDEO_MEAN, VIDEO_STD)[0].permute(1, 2, 3, 0).numpy()
            )
            assert (
                abs(shown[clip * 5 + row][:, ::2, ::2].astype(int) - expected.astype(int)).max()
                <= 1
            )
    content = (tmp_path / "run_gallery_tube_0.5.png").read_bytes()
    with pytest.raises(UserError, match="run_gallery_tube_0.5.png exists"):
        pretrain.main([*asked, "--visualize_masks", "tube:0.5"])
    pretrain.main(
        [*asked, "--visualize_masks", "tube:0.5", "--overwrite", "--visualize_clips", "1"]
    )
    assert (tmp_path / "run_gallery_tube_0.5.png").read_bytes() != content
    pretrain.main([*asked, "--save_prefix", "other"])  # by default the run's own mask
    assert (tmp_path / "other_gallery_random_0.75.png").exists()


def test_bad_input_is_one_line(videos, tmp_path):
    pretrain.main(command(videos, tmp_path, "--max_steps", "1", "--batch_size_per_gpu", "4"))
    torch.save({"model": {}}, tmp_path / "bare.pth")
    (tmp_path / "text.mp4").write_text("no video")
    run = ["--visualize", str(tmp_path / "run.pth"), "--data_dirs", videos]
    cases = {
        "bare.pth is no checkpoint of a pretraining run": [
            "--visualize",
            str(tmp_path / "bare.pth"),
        ],
        "nowhere.pth not found": ["--visualize", str(tmp_path / "nowhere.pth")],
        "no videos given": run[:2],
        "not of the form TYPE:RATIO": [*run, "--visualize_masks", "tube"],
        "mask type 'tub'": [*run, "--visualize_masks", "tub:0.5"],
        "mask_ratio 2.0": [*run, "--visualize_masks", "tube:2"],
        "text.mp4 cannot be read": [*run[:2], "--data_dirs", str(tmp_path)],
    }
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message) as error:
            pretrain.main([*flags, "--device", "cpu", "--output_dir", str(tmp_path / "out")])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
