"""Differences between PyAV 16 and 19, the oldest and the newest version that are supported."""

from collections.abc import Iterable

import av
import numpy as np
from av.video.reformatter import ColorRange

VERSION = int(av.__version__.split(".")[0])
ON_ONE_THREAD = {"threads": 1} if VERSION >= 17 else {}  # for reformat(); PyAV 16 always uses one


def open_container(path: str):
    """Open a file even if the encoding of its metadata is invalid. Raises FFmpegError."""
    if VERSION >= 19:  # has no such argument, and always ignores encoding errors
        return av.open(path)
    return av.open(path, metadata_errors="ignore")


def packet_table(stream) -> Iterable:
    """Return the entries of the container's table of a stream's packets. PyAV 16 shows none."""
    return getattr(stream, "index_entries", ())


def to_rgb(reformatter, frame, width: int, height: int) -> np.ndarray:
    """Return a decoded frame as (height, width, 3) uint8 RGB, by its own color matrix and range.

    reformatter: a VideoReformatter, shared by all frames of a size. Building its tables takes
    longer than converting a small frame. Raises ValueError or OSError if conversion fails.
    """
    output_range = None
    limited_range = frame.color_range != ColorRange.JPEG
    if VERSION < 17 and limited_range and not frame.format.is_rgb:
        # PyAV 16 assumes BT.601 unless the range changes too. Full-range frames remain BT.601.
        output_range = "JPEG"
    rgb_frame = reformatter.reformat(
        frame,
        width,
        height,
        format="rgb24",
        interpolation="BICUBIC",
        dst_color_range=output_range,
        **ON_ONE_THREAD,
    )
    return rgb_frame.to_ndarray()
