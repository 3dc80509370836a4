"""Cutting videos into spans: how long each one lasts, and the spans (start, end) in seconds."""

import math

import numpy as np

from data.clips import TIME_TOLERANCE, Span, video_duration
from data.video_index import READABLE, VideoIndex


def index_durations(index: VideoIndex) -> np.ndarray:
    """Return the duration (n,) in seconds of each video of an index, NaN if it is not readable."""
    durations = np.full(len(index), np.nan)
    for row in np.flatnonzero(index.rows["state"] == READABLE).tolist():
        info = index.row_to_info(row)
        if info is not None:
            durations[row] = video_duration(info.frames, info.fps, info.times)
    return durations


def split_duration(duration: float, length: float) -> list[Span]:
    """Return the segments of `length` seconds of a video of `duration` seconds.

    The last segment ends with the video: it is half to one and a half times as long. A shorter
    video is one segment.
    """
    count = max(1, math.floor(duration / length + 0.5))
    bounds = [index * length for index in range(count)] + [duration]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def cut_into_spans(
    durations: np.ndarray, length: float, stride: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the video (m,) int64 and the span (m, 2) of each clip along videos, in order.

    The clips of a video start at k * stride, for all k at which it is shown; the last ones may
    extend beyond its end. durations: (n,) seconds; a video of NaN has no clips. length: seconds
    of a clip.
    """
    counts = np.ceil((durations - TIME_TOLERANCE) / stride)
    counts = np.nan_to_num(counts.clip(min=1), nan=0).astype(np.int64)
    videos = np.repeat(np.arange(len(durations)), counts)
    firsts = np.cumsum(counts) - counts  # row of the first clip of each video
    starts = (np.arange(len(videos)) - firsts[videos]) * stride
    return videos, np.stack([starts, starts + length], axis=1)
