"""Choosing the frames of a clip: index arithmetic, for constant and variable frame rates.

T is the number of frames of a clip, N that of a video. See `ClipSampling` for how long a clip
lasts, whatever the frame rate of the video is.

A span (start, end) is a part of a video, in seconds. It has the frames that are shown from its
start until its end, and clips are chosen from it as if it were a video of its own.
"""

import math
from typing import NamedTuple

import numpy as np

from data.input_files import ReadError
from data.video import VideoReader
from util.dist import UserError

Span = tuple[float, float]  # start and end in seconds

TIME_TOLERANCE = 1e-9  # seconds: a frame that starts at an instant counts as shown at it


class ClipSampling(NamedTuple):
    """Which frames a clip consists of: it lasts sampling_rate * num_frames / target_fps seconds."""

    num_frames: int  # T
    sampling_rate: int  # distance of two frames, in frames at target_fps
    target_fps: float = 30  # frames/s

    @property
    def seconds(self) -> float:
        """How long a clip lasts."""
        return self.sampling_rate * self.num_frames / self.target_fps


def clip_slack(available: float, fps: float, sampling: ClipSampling) -> float:
    """Return by how many frames a video of `available` frames is longer than a clip, at least 0."""
    return max(available - _clip_length(fps, sampling), 0)


def _clip_length(fps: float, sampling: ClipSampling) -> float:
    """Return the length of a clip in frames of a video with a rate of `fps`."""
    return sampling.sampling_rate * sampling.num_frames * fps / sampling.target_fps


def clip_positions(
    available: float, fps: float, sampling: ClipSampling, start: float
) -> np.ndarray:
    """Return the positions (T,) of a clip in a video of constant rate, in frames, not rounded.

    The clip lasts s = sampling_rate * num_frames * fps / target_fps frames of the video.
    It begins at start * max(available - s, 0), with `start` in [0, 1].
    The positions are evenly spread over the clip, ends included.
    """
    length = _clip_length(fps, sampling)
    first = start * max(available - length, 0)
    return np.linspace(first, first + length - 1, sampling.num_frames)


def frame_indices(available: int, fps: float, sampling: ClipSampling, start: float) -> np.ndarray:
    """Return the frame indices (T,) int64 of a clip of a video of constant rate.

    These are the frames at the positions that `clip_positions` returns. A short video repeats its
    last frame.
    """
    positions = clip_positions(available, fps, sampling, start)
    return positions.clip(0, available - 1).astype(np.int64)


def frame_duration(times: np.ndarray) -> float:
    """Return the median distance in seconds of frames shown at `times` (N,); 0 for one frame."""
    if len(times) < 2:
        return 0.0
    return float(np.median(np.diff(times)))


def frame_indices_by_time(
    times: np.ndarray, sampling: ClipSampling, start: float, span: Span | None = None
) -> np.ndarray:
    """Return the frame indices (T,) of a clip of a video whose frames are shown at `times` (N,).

    This is the formula of `frame_indices` in seconds. The clip lasts
    S = sampling_rate * num_frames / target_fps, of which the last frame takes d, the median
    distance of two frames. The video lasts D = its last time stamp + d. The clip begins at
    start * max(D - S, 0). The frame of each instant is the last one shown by then.

    span: within (0, D), which it replaces in the formula.
    """
    duration = frame_duration(times)
    last_index = len(times) - 1
    begin, end = 0.0, times[-1] + duration
    if span is not None:
        begin, end = span
        last_index = int(np.searchsorted(times, end - TIME_TOLERANCE, side="left")) - 1
    first = begin + start * max(end - begin - sampling.seconds, 0)
    last = first + max(sampling.seconds - duration, 0)
    instants = np.linspace(first, last, sampling.num_frames)
    indices = np.searchsorted(times, instants + TIME_TOLERANCE, side="right") - 1
    return indices.clip(0, last_index)


def video_duration(num_frames: int, fps: float, times: np.ndarray | None) -> float:
    """Return the duration of a video in seconds. Its last frame lasts as long as the median one.

    times: display times (num_frames,) in seconds, None if the frame rate is constant.
    """
    if times is None:
        return num_frames / fps
    return float(times[-1]) + frame_duration(times)


def span_in_video(video: VideoReader, span: Span) -> Span:
    """Return a span of an open video, cut off at the end of the video.

    Raises ReadError if the video ends before the span starts.
    """
    start, end = span
    duration = video_duration(video.num_frames, video.fps, video.times)
    if start + TIME_TOLERANCE >= duration:
        raise ReadError(f"the video ends at {duration:.3f} s, its part starts at {start:.3f} s")
    return start, min(end, duration)


def available_frames(video: VideoReader, span: Span | None) -> float:
    """Return the number of frames of an open video, or that of a span of it at the mean rate.

    Raises ReadError if the video ends before the span starts.
    """
    if span is None:
        return video.num_frames
    begin, end = span_in_video(video, span)
    return round((end - begin) * video.fps, 6)  # a difference of seconds is not exact


def clip_indices(
    video: VideoReader, sampling: ClipSampling, start: float, span: Span | None = None
) -> np.ndarray:
    """Return the frame indices (T,) of a clip of an open video, or of a span of it.

    Calls `frame_indices` for a constant frame rate, otherwise `frame_indices_by_time`. Raises
    ReadError if the video ends before the span starts.
    """
    if span is not None:
        span = span_in_video(video, span)
    if video.times is not None:
        return frame_indices_by_time(video.times, sampling, start, span)
    if span is None:
        return frame_indices(video.num_frames, video.fps, sampling, start)
    return _frame_indices_of_span(video, sampling, start, span)


def _frame_indices_of_span(
    video: VideoReader, sampling: ClipSampling, start: float, span: Span
) -> np.ndarray:
    """Return the frame indices (T,) of a clip of a span of an open video of constant rate."""
    begin, end = span
    fps = video.fps
    positions = clip_positions((end - begin) * fps, fps, sampling, start)
    first = int((begin + TIME_TOLERANCE) * fps)
    last = max(first, math.ceil((end - TIME_TOLERANCE) * fps) - 1)
    shown = positions + (begin + TIME_TOLERANCE) * fps
    return shown.clip(first, last).astype(np.int64)


def check_spans(spans: list[Span] | np.ndarray, count: int) -> np.ndarray:
    """Return the spans of `count` samples as an array (count, 2) float64, in seconds.

    The end may be infinite. Raises UserError for another number of spans, and for one without
    0 <= start < end.
    """
    table = np.array(spans, dtype=np.float64).reshape(-1, 2)
    if len(table) != count:
        raise UserError(f"{len(table)} spans for {count} samples: give one (start, end) per sample")
    start, end = table.T
    wrong = ~((start >= 0) & (start < end) & np.isfinite(start))  # also if one is not a number
    if wrong.any():
        index = int(wrong.argmax())
        raise UserError(
            f"span {index} is {start[index]:g} to {end[index]:g} s: give seconds with "
            "0 <= start < end"
        )
    return table


def view_start(slack: float, view: int, num_views: int) -> float:
    """Return the position of a view in the slack (see `clip_slack`), from 0 to 1.

    Views are evenly spread from the first to the last position. A single view is centered.
    """
    if not slack:
        return 0.0
    if num_views == 1:
        first = slack // 2
    else:
        first = view * (slack // (num_views - 1))
    return first / slack
