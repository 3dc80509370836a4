"""Tables of predictions: the CSV file of tools.predict, and what it prints."""

import math
import os
import shutil
import unicodedata
from typing import NamedTuple

import pandas as pd

from data.clips import Span
from util.checkpoint import truncate
from util.dist import escaped

MAX_SHOWN = 20  # samples in the printed table
FILE_WIDTH = 40  # characters of a file's name in the printed table
CLASS_WIDTH = 30  # characters of a class name in the printed table
DEFAULT_WIDTH = 160  # characters of a line where the output is not a terminal


class Sample(NamedTuple):
    """A file to classify, or a segment of a video."""

    path: str
    span: Span | None = None


class Prediction(NamedTuple):
    """The best classes of a sample, or the reason why there are none."""

    classes: list[str]  # best first
    scores: list[float]  # probabilities
    reason: str = ""  # why the file cannot be read


def prediction_table(samples: list[Sample], predictions: list[Prediction]) -> pd.DataFrame:
    """Return the table to write; an unreadable sample has a path and a reason only.

    It has the columns start and end (seconds) if there are segments.
    """
    rows = []
    for sample, prediction in zip(samples, predictions, strict=True):
        row = {"path": sample.path, "reason": prediction.reason}
        if sample.span:
            row["start"], row["end"] = [
                f"{seconds:.3f}" if math.isfinite(seconds) else "" for seconds in sample.span
            ]
        best = zip(prediction.classes, prediction.scores, strict=True)
        for rank, (name, score) in enumerate(best, 1):
            row[f"top{rank}"] = name
            row[f"score{rank}"] = f"{score:.6f}"
        rows.append(row)
    columns = ["path"]
    if any(sample.span for sample in samples):
        columns += ["start", "end"]
    num_classes = max(len(prediction.classes) for prediction in predictions)
    for rank in range(1, num_classes + 1):
        columns += [f"top{rank}", f"score{rank}"]
    return pd.DataFrame(rows, columns=[*columns, "reason"])


def width_of(text: str) -> int:
    """Return the number of columns that a text takes in a terminal: Chinese letters take two."""
    columns = 0
    for letter in text:
        if unicodedata.combining(letter):
            continue
        columns += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return columns


def short_name(sample: Sample, folder: str) -> str:
    """Return the name of a sample's file below `folder`, its end if it is long, and its segment."""
    name = escaped(os.path.relpath(sample.path, folder))
    if width_of(name) > FILE_WIDTH:
        name = name[-FILE_WIDTH:]
        while width_of(name) > FILE_WIDTH - 3:
            name = name[1:]
        name = "..." + name
    if sample.span:
        start, end = sample.span
        name += f" {round(start, 2):g}-"
        if math.isfinite(end):
            name += f"{round(end, 2):g} s"
    return name


def align(rows: list[list[str]], width: int) -> list[str]:
    """Return rows of cells as lines with aligned columns: two, and more as far as they fit."""
    lines = [""] * len(rows)
    for index, cells in enumerate(zip(*rows, strict=True)):
        cell_width = max(width_of(cell) for cell in cells)
        if index >= 2 and width_of(lines[0]) + cell_width > width:
            break
        pairs = zip(lines, cells, strict=True)
        lines = [line + cell + " " * (cell_width + 2 - width_of(cell)) for line, cell in pairs]
    return [line.rstrip() for line in lines]


def table_lines(samples: list[Sample], predictions: list[Prediction]) -> list[str]:
    """Return the printed table of the first readable samples, as wide as the terminal."""
    folder = os.path.commonpath([os.path.dirname(sample.path) for sample in samples])
    pairs = zip(samples, predictions, strict=True)
    readable = [pair for pair in pairs if pair[1].classes]
    rows = [["file", *(f"top {rank}" for rank in range(1, len(readable[0][1].classes) + 1))]]
    for sample, prediction in readable[:MAX_SHOWN]:
        row = [short_name(sample, folder)]
        for name, score in zip(prediction.classes, prediction.scores, strict=True):
            row.append(f"{truncate(escaped(name), CLASS_WIDTH)} {score:.1%}")
        rows.append(row)
    width = shutil.get_terminal_size((DEFAULT_WIDTH, 0)).columns
    lines = align(rows, width)
    if len(readable) > MAX_SHOWN:
        lines.append(f"... {len(readable) - MAX_SHOWN} more (--output FILE.csv writes all)")
    return lines


def unreadable_files(samples: list[Sample], predictions: list[Prediction]) -> dict[str, str]:
    """Return {path: reason} of the files that cannot be read, or not in all of their segments."""
    reasons = {}
    for sample, prediction in zip(samples, predictions, strict=True):
        if prediction.reason:
            reasons[sample.path] = prediction.reason
    return reasons
