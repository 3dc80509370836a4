"""Pictures: reconstructions of a pretrained model, grids of frames, and confusion matrices.

A picture is a tensor (3, H', W') uint8. Other shapes as in models_mae.py; F predicted frames,
M x N cells of a grid. matplotlib is imported where it is used, which keeps --help fast.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from models_mae import MaskedAutoencoderViT
from util.dist import escaped
from util.optim import autocast
from util.pixels import denormalize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 128  # a power of two: a width of n pixels is exactly n / DPI inches
TEXT_POINTS = 7
TEXT_MARGIN = 8  # pixels around labels
CELL_GAP = 2  # white pixels at the right and below each cell of a grid
MAX_NAMED_CLASSES = 40


@torch.no_grad()
def reconstructions(
    model: MaskedAutoencoderViT,
    clips: Tensor,
    noise: Tensor,
    mask_ratio: float,
    mask_type: str,
    amp: torch.dtype,
) -> dict[str, Tensor]:
    """Return frames (B, 3, F, H, W) uint8 on the CPU by label: original, masked, predicted, pasted.

    model: without DDP, with `pixel_stats`. clips (B, 3, T, H, W) uint8 and noise (B, L) are on its
    device. A model of normalized targets predicts patches of mean 0 and std 1. They are shown as
    they are, on a fixed scale, and with the true mean and std (ground-truth statistics).
    """
    model.eval()
    clips = model.normalize(clips)
    assert model.pixel_stats is not None  # else `normalize` has raised
    mean, std = model.pixel_stats
    rows = {}
    with autocast(clips.device, amp), torch.compiler.set_stance("force_eager"):
        original, predicted, hidden = model.reconstruct(clips, mask_ratio, mask_type, noise)
        rows["original"] = original
        masked = original.where(~hidden, torch.zeros_like(original))
        rows[f"{mask_type} mask\n{mask_ratio:.0%} hidden"] = masked
        statistics = ""
        if model.normalizes_targets:
            statistics = "\n+ true mean, std"
            _, normalized, _ = model.reconstruct(
                clips, mask_ratio, mask_type, noise, true_statistics=False
            )
            rows["prediction\n(normalized)"] = normalized
    rows["prediction" + statistics] = predicted
    rows["pasted" + statistics] = predicted.where(hidden, original)
    return {label: denormalize(frames, mean, std).cpu() for label, frames in rows.items()}


def contact_sheet(rows: dict[str, Tensor], max_frames: int | None = None) -> Tensor:
    """Return one picture of `reconstructions`: a row for each clip and label, frames side by side.

    max_frames: show at most this many frames, evenly spread.
    """
    frames = torch.stack(list(rows.values()), dim=1).transpose(2, 3)  # (B, rows, F, 3, H, W)
    num_frames = frames.shape[2]
    num_shown = min(num_frames, max_frames or num_frames)
    shown = torch.linspace(0, num_frames - 1, num_shown).long()
    cells = frames[:, :, shown].flatten(0, 1)
    row_labels = len(frames) * list(rows)
    column_labels = [f"frame {index + 1}" for index in shown.tolist()]
    return label_grid(cells, row_labels, column_labels, min_side=64)


def animation(rows: dict[str, Tensor]) -> list[Tensor]:
    """Return a picture for each frame of `reconstructions`: a row per clip, a column per label."""
    frames = torch.stack(list(rows.values()), dim=1)  # (B, rows, 3, F, H, W)
    row_labels = [str(index + 1) for index in range(len(frames))]
    return [
        label_grid(cells, row_labels, list(rows), min_side=128) for cells in frames.unbind(dim=3)
    ]


def training_picture(
    model: MaskedAutoencoderViT, dataset, mask_ratio: float, mask_type: str, amp: torch.dtype
) -> Tensor | None:
    """Return reconstructions of four training clips, evenly spread, with fixed masks.

    dataset: a ClipDataset with mask noise. Return None if no clip is readable.
    """
    num_clips = min(4, len(dataset))
    indices = torch.linspace(0, len(dataset) - 1, num_clips).long()
    samples = [dataset[(0, index)] for index in indices.tolist()]
    readable = [sample for sample in samples if sample["clips"] is not None]
    if not readable:
        return None
    clips = torch.stack([sample["clips"][0] for sample in readable])
    noise = torch.stack([sample["noise"][0] for sample in readable])
    device = next(model.parameters()).device
    clips = clips.to(device)
    noise = noise.to(device)
    rows = reconstructions(model, clips, noise, mask_ratio, mask_type, amp)
    return contact_sheet(rows, max_frames=8)


def label_grid(
    cells: Tensor, row_labels: list[str], column_labels: list[str], min_side: int
) -> Tensor:
    """Return a picture of cells (M, N, 3, H, W) uint8 with labels at the left and at the top.

    Cells narrower than `min_side` pixels are enlarged by a whole factor. matplotlib draws the
    labels only: the pixels of the cells stay exact.
    """
    from matplotlib.figure import Figure

    scale = math.ceil(min_side / cells.shape[-1])
    enlarged = cells.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    spaced = pad(enlarged, (0, CELL_GAP, 0, CELL_GAP), value=255)
    tiles = (
        spaced.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    )  # (3, M (H + gap), N (W + gap))
    cell_height, cell_width = spaced.shape[-2:]
    left, _ = text_size(row_labels)
    _, top = text_size(column_labels)
    height = top + tiles.shape[1]
    width = left + tiles.shape[2]

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for row, label in enumerate(row_labels):
        middle = top + (row + 0.5) * cell_height
        write_label(figure, label, left - TEXT_MARGIN, middle, align="right")
    for column, label in enumerate(column_labels):
        middle = left + (column + 0.5) * cell_width
        write_label(figure, label, middle, top / 2, align="center")
    picture = figure_pixels(figure)
    picture[:, top:, left:] = tiles
    return picture


def write_label(figure: Figure, label: str, x: float, y: float, align: str) -> None:
    """Write a label at a point, in pixels from the upper left corner."""
    width, height = figure.bbox.size
    figure.text(
        x / width,
        1 - y / height,
        label,
        fontsize=TEXT_POINTS,
        horizontalalignment=align,
        verticalalignment="center",
    )


def text_size(labels: list[str]) -> tuple[int, int]:
    """Return the width and height in pixels that the largest label needs, margins included."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=DPI)
    FigureCanvasAgg(figure)
    texts = [figure.text(0, 0, label, fontsize=TEXT_POINTS) for label in labels]
    boxes = [text.get_window_extent() for text in texts]
    width = math.ceil(max(box.width for box in boxes))
    height = math.ceil(max(box.height for box in boxes))
    return width + 2 * TEXT_MARGIN, height + 2 * TEXT_MARGIN


def figure_pixels(figure: Figure) -> Tensor:
    """Draw a matplotlib figure without a display. Return its picture (3, H', W') uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())  # (H', W', 4)
    return torch.from_numpy(pixels).permute(2, 0, 1)[:3]


def confusion_figure(labels: Tensor, predictions: Tensor, classes: list[str]) -> Figure:
    """Return the confusion matrix, normalized by row; up to 40 classes are named and annotated.

    labels (n,) and predictions (n,) are class indices. A head may have more classes than the
    training set: predictions of unnamed classes share one extra column, "other".
    """
    from matplotlib.figure import Figure

    shares = confusion_shares(labels, predictions, len(classes))
    named = len(classes) <= MAX_NAMED_CLASSES
    side = 4 + 0.26 * len(classes) if named else 10  # inches
    figure = Figure(figsize=(side + 1, side), dpi=DPI, layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.6)
    if named:
        names = [f"{escaped(name)[:24]} {index}" for index, name in enumerate(classes)]
        columns = [*names, "other"][: shares.shape[1]]
        name_ticks(axes.xaxis, columns, rotation=90)
        name_ticks(axes.yaxis, names, rotation=0)
        annotate_shares(axes, shares)
    return figure


def confusion_shares(labels: Tensor, predictions: Tensor, num_classes: int) -> np.ndarray:
    """Return the share of each prediction by true class, (K, K) or (K, K + 1).

    The wider form is for predictions beyond the K named classes: its last column counts them.
    """
    counts = np.zeros((num_classes, num_classes + 1))
    columns = predictions.clamp(max=num_classes)
    np.add.at(counts, (labels.numpy(), columns.numpy()), 1)
    if not counts[:, -1].any():
        counts = counts[:, :-1]
    return counts / counts.sum(axis=1, keepdims=True).clip(min=1)


def name_ticks(axis, names: list[str], rotation: float) -> None:
    """Put a name at each row or column of an axis. A "$" in a name is not parsed as mathematics."""
    axis.set_ticks(range(len(names)), names, fontsize=8, rotation=rotation, parse_math=False)


def annotate_shares(axes, shares: np.ndarray) -> None:
    """Write each share that is not zero into its cell, in percent."""
    for (row, column), share in np.ndenumerate(shares):
        if share == 0:
            continue
        color = "black"
        if share > 0.5:
            color = "white"
        percent = f"{100 * share:.0f}"
        axes.text(column, row, percent, ha="center", va="center", fontsize=7, color=color)
