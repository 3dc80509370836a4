"""What differs between PyAV 16 and 19, the versions that this project supports."""

import av
import numpy as np
from av.video.reformatter import ColorRange

VERSION = int(av.__version__.split(".")[0])
ON_ONE_THREAD = {"threads": 1} if VERSION >= 17 else {}  # for reformat(); PyAV 16 always uses one


def open_container(path: str):
    """Open a file, whatever the encoding of its metadata. Raises FFmpegError."""
    if VERSION >= 19:  # decodes metadata leniently, and has no argument for it
        return av.open(path)
    return av.open(path, metadata_errors="ignore")


def packet_table(stream) -> list:
    """Return the container's table of a stream's packets, where PyAV shows it (not PyAV 16)."""
    return list(getattr(stream, "index_entries", ()))


def to_rgb(reformatter, frame, width: int, height: int) -> np.ndarray:
    """Return a decoded frame as (height, width, 3) uint8 RGB, by its own color matrix and range.

    reformatter: a VideoReformatter; one for all frames of a size, since its tables take longer to make than a small frame
    to convert. Raises ValueError or OSError for what cannot be converted.
    """
    options = ON_ONE_THREAD
    limited = frame.color_range != ColorRange.JPEG
    if (
        VERSION < 17 and limited and not frame.format.is_rgb
    ):  # it takes BT.601 unless something is to change
        options = {
            "dst_color_range": "JPEG"
        }  # there is no such way for full range: it stays BT.601
    picture = reformatter.reformat(
        frame, width, height, format="rgb24", interpolation="BICUBIC", **options
    )
    return picture.to_ndarray()
