"""Reconstructions by their rules, grids by their inverse, confusion matrices by counting."""

import numpy as np
import pytest
import torch
from tiny import tiny_mae

from models_mae import make_mask, unpatchify
from models_vit import normalize
from util import pictures
from util.pixels import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD, denormalize


def random_pixels(*shape: int) -> torch.Tensor:
    """Return uint8 pixels."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def grid_cells(picture: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """Return the cells (rows, columns, 3, side, side) of a grid, which are 2 pixels apart."""
    pitch = side + 2
    tiles = picture[:, -rows * pitch :, -columns * pitch :]
    cells = tiles.unflatten(2, (columns, pitch)).unflatten(1, (rows, pitch))
    return cells.permute(1, 3, 0, 2, 4)[..., :side, :side]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_masked_and_pasted_frames_follow_the_mask(norm_pix_loss):
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    clips = random_pixels(2, 3, 8, 32, 32)
    noise = torch.rand(2, 64)
    rows = pictures.reconstructions(model, clips, noise, 0.75, "random", torch.float32)
    visible, _ = make_mask(noise, model.grid, 0.75, "random")
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter_(1, visible, False)
    hidden = unpatchify(hidden[:, :, None].expand(2, 64, 2 * 8 * 8 * 3), model.grid, 2, 8)
    original, masked, *_, predicted, pasted = rows.values()
    gray = torch.tensor(round(255 * VIDEO_MEAN[0]), dtype=torch.uint8)
    assert torch.equal(original, clips)
    assert torch.equal(masked, clips.where(~hidden, gray))
    assert torch.equal(pasted, predicted.where(hidden, clips))


def test_labels_name_the_ground_truth_statistics():
    clips = random_pixels(1, 3, 8, 32, 32)
    noise = torch.rand(1, 64)
    labels = {}
    for norm_pix_loss in (False, True):
        model = tiny_mae(norm_pix_loss=norm_pix_loss)
        rows = pictures.reconstructions(model, clips, noise, 0.75, "tube", torch.float32)
        labels[norm_pix_loss] = list(rows)
    assert labels[False] == ["original", "tube mask\n75% hidden", "prediction", "pasted"]
    assert len(labels[True]) == 5
    assert sum("true mean" in label for label in labels[True]) == 2


def test_true_statistics_turn_one_prediction_into_the_other():
    model = tiny_mae(norm_pix_loss=True).eval()
    clips = random_pixels(2, 3, 8, 32, 32)
    noise = torch.rand(2, 64)
    rows = pictures.reconstructions(model, clips, noise, 0.75, "random", torch.float32)
    floats = normalize(clips, VIDEO_MEAN, VIDEO_STD)
    predictions = {}
    for true_statistics in (False, True):
        _, predicted, _ = model.reconstruct(
            floats, 0.75, "random", noise, true_statistics=true_statistics
        )
        predictions[true_statistics] = as_patches(predicted)
        label = list(rows)[2 + true_statistics]
        assert torch.equal(rows[label], denormalize(predicted, VIDEO_MEAN, VIDEO_STD))
    patches = as_patches(floats)
    mean = patches.mean(-1, keepdim=True)
    std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = predictions[False] * std + mean
    torch.testing.assert_close(predictions[True], expected, rtol=1e-4, atol=1e-4)


def test_pictures_have_the_pixel_statistics_of_the_model():
    model = tiny_mae()
    model.pixel_stats = (IMAGE_MEAN, IMAGE_STD)
    clips = random_pixels(1, 3, 8, 32, 32)
    noise = torch.rand(1, 64)
    rows = pictures.reconstructions(model, clips, noise, 0.75, "random", torch.float32)
    original, masked, predicted, _ = rows.values()
    assert torch.equal(original, clips)
    hidden = (masked != clips).any(1)
    gray = (torch.tensor(IMAGE_MEAN) * 255).round().byte()
    assert torch.equal(masked[0, :, hidden[0]], gray[:, None].expand(3, int(hidden.sum())))
    floats = normalize(clips, IMAGE_MEAN, IMAGE_STD)
    _, expected, _ = model.reconstruct(floats, 0.75, "random", noise)
    assert torch.equal(predicted, denormalize(expected, IMAGE_MEAN, IMAGE_STD))


def as_colors(frames: torch.Tensor) -> torch.Tensor:
    """Return frames (1, 3, 8, 32, 32) as tokens with colors last (1, L, 2 x 8 x 8, 3)."""
    return as_patches(frames).flatten(1, 3).unflatten(2, (3, -1)).transpose(2, 3)


def videomae_statistics(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std (1, L, 1, 3) of pixels in [0, 1] for each token and color."""
    patches = as_colors(clips / 255)
    return patches.mean(2, keepdim=True), patches.std(2, keepdim=True) + 1e-6


def videomae_model():
    """Return a model with the targets and the pixel statistics of VideoMAE's."""
    model = tiny_mae()
    model.pixel_stats = (IMAGE_MEAN, IMAGE_STD)
    model.config["targets"] = "videomae"
    return model


@pytest.mark.parametrize("as_float", [False, True])
def test_videomae_targets_are_normalized_by_color(as_float):
    model = videomae_model()
    clips = random_pixels(1, 3, 8, 32, 32)
    clips[:, :, :2, :8, :8] = 3  # a patch of such low contrast that the 1e-6 matters
    clips[:, :, 0, :8, :8] = 4
    mean, std = videomae_statistics(clips)
    patches = as_colors(clips / 255)
    given = normalize(clips, IMAGE_MEAN, IMAGE_STD) if as_float else clips
    targets, _, _ = model.patch_targets(given)
    expected = ((patches - mean) / std).flatten(2)
    torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[3, 40]])
    some, _, _ = model.patch_targets(given, ids)
    assert torch.equal(some, targets[:, ids[0]])


def test_pictures_undo_the_normalization_of_videomae():
    model = videomae_model()
    clips = random_pixels(1, 3, 8, 32, 32)
    noise = torch.rand(1, 64)
    rows = pictures.reconstructions(model, clips, noise, 0.75, "random", torch.float32)
    assert list(rows)[2:] == [
        "prediction\n(normalized)",
        "prediction\n+ true mean, std",
        "pasted\n+ true mean, std",
    ]
    floats = normalize(clips, IMAGE_MEAN, IMAGE_STD)
    _, normalized, _ = model.reconstruct(floats, 0.75, "random", noise, true_statistics=False)
    mean, std = videomae_statistics(clips)
    pred = as_colors(normalized)
    pixels = unpatchify((pred * std + mean).flatten(2), model.grid, 2, 8)
    expected = (255 * pixels).round().clamp(0, 255).byte()
    difference = rows["prediction\n+ true mean, std"].int() - expected.int()
    assert difference.abs().max() <= 1
    assert len(expected.unique()) > 100


def test_true_targets_of_videomae_give_the_frames_back():
    model = videomae_model()
    clips = random_pixels(1, 3, 8, 32, 32)
    clips[:, :, :2, :8, :8] = 77  # a patch of std 0
    targets, mean, std = model.patch_targets(clips)
    frames = unpatchify(targets * std + mean, model.grid, 2, 8)
    assert torch.equal(denormalize(frames, IMAGE_MEAN, IMAGE_STD), clips)


def as_patches(frames: torch.Tensor) -> torch.Tensor:
    """Return frames (B, 3, 8, 32, 32) as patches (B, t', h, w, 2 x 8 x 8 x 3)."""
    patches = frames.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)
    return patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


@pytest.mark.parametrize(("max_frames", "shown"), [(None, [0, 1, 2, 3, 4]), (3, [0, 2, 4])])
def test_a_contact_sheet_holds_exact_frames(max_frames, shown):
    rows = {f"row {index}": random_pixels(2, 3, 5, 32, 32) for index in range(3)}
    sheet = pictures.contact_sheet(rows, max_frames)
    cells = grid_cells(sheet, 6, len(shown), 64)[..., ::2, ::2]
    for clip in range(2):
        for row, frames in enumerate(rows.values()):
            expected = frames[clip, :, shown].transpose(0, 1)
            assert torch.equal(cells[clip * 3 + row], expected)


def test_an_animation_holds_exact_frames():
    rows = {f"row {index}": random_pixels(2, 3, 5, 32, 32) for index in range(3)}
    moving = pictures.animation(rows)
    assert len(moving) == 5
    for index, picture in enumerate(moving):
        cells = grid_cells(picture, 2, 3, 128)
        for column, frames in enumerate(rows.values()):
            assert torch.equal(cells[:, column, :, ::4, ::4], frames[:, :, index])
            assert torch.equal(cells[:, column, :, 3::4, 3::4], frames[:, :, index])


def test_labels_of_a_grid_stay_outside_its_cells():
    cells = torch.zeros(2, 2, 3, 16, 16, dtype=torch.uint8)
    picture = pictures.label_grid(cells, ["first", "second"], ["left", "right\nlower"], 64)
    margins = picture.clone()
    margins[:, -132:, -132:] = 255
    assert (margins < 128).any()
    for edge in (margins[:, 0], margins[:, -1], margins[:, :, 0], margins[:, :, -1]):
        assert (edge == 255).all()


def test_confusion_shares_equal_counts():
    labels = torch.tensor([0, 0, 0, 0, 2, 2])
    predictions = torch.tensor([0, 0, 1, 0, 2, 1])
    shares = pictures.confusion_shares(labels, predictions, 3)
    assert np.array_equal(shares, [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]])


def test_predictions_of_unnamed_classes_share_a_column():
    shares = pictures.confusion_shares(torch.tensor([0, 1, 1]), torch.tensor([0, 2, 7]), 2)
    assert np.array_equal(shares, [[1, 0, 0], [0, 0, 1]])


def test_a_confusion_figure_names_up_to_40_classes():
    classes = ["a $dollar$ sign", "a name of more than 24 characters"]
    labels = torch.tensor([0, 1, 1])
    figure = pictures.confusion_figure(labels, torch.tensor([0, 1, 5]), classes)
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "a $dollar$ sign 0",
        "a name of more than 24 c 1",
        "other",
    ]
    assert [text.get_text() for text in axes.texts] == ["100", "50", "50"]
    picture = pictures.figure_pixels(figure)
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3


def test_a_confusion_figure_of_many_classes_has_no_names():
    labels = torch.arange(41)
    figure = pictures.confusion_figure(labels, labels, [f"class {index}" for index in range(41)])
    assert not figure.axes[0].texts
    assert not any("class" in tick.get_text() for tick in figure.axes[0].get_yticklabels())
