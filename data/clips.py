"""Choosing the frames of a clip: index arithmetic, for constant and variable frame rates.

T is the number of frames of a clip, N that of a video. See `ClipSampling` for how long a clip
lasts, whatever the frame rate of the video is.

A span (start, end) is a part of a video, in seconds. It has the frames that are shown from its
start until its end. Clips are chosen from it as if it were a video of its own.

Dense sampling takes T frames at a distance. Uniform sampling takes one frame from each of T equal
parts of the video (Temporal Segment Networks, Wang et al. 2016, arXiv 1608.00859, section 3.1).
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
    """Which frames a clip consists of.

    A dense clip lasts sampling_rate * num_frames / target_fps seconds, a uniform one the video.
    """

    num_frames: int  # T
    sampling_rate: int  # distance of two frames, in frames at target_fps
    target_fps: float = 30  # frames/s
    method: str = "dense"  # or "uniform", which needs neither rate

    @property
    def seconds(self) -> float:
        """How long a dense clip lasts."""
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
    begin, end = span or (0.0, times[-1] + duration)
    first = begin + start * max(end - begin - sampling.seconds, 0)
    last = first + max(sampling.seconds - duration, 0)
    instants = np.linspace(first, last, sampling.num_frames)
    return frames_shown_at(instants, times, end)


def frames_shown_at(instants: np.ndarray, times: np.ndarray, end: float) -> np.ndarray:
    """Return the index of the last frame shown by each instant (T,), but before `end`.

    times: of all frames (N,). All are seconds.
    """
    indices = np.searchsorted(times, instants + TIME_TOLERANCE, side="right") - 1
    last_index = int(np.searchsorted(times, end - TIME_TOLERANCE, side="left")) - 1
    return indices.clip(0, last_index)


def uniform_indices(available: int, num_frames: int, position: float | np.ndarray) -> np.ndarray:
    """Return the frame indices (T,) int64 of a uniform clip of a video of n = `available` frames.

    position: within each part. A number p in [0, 1), for a view: frame int((i + p) n / T) of part
    i = 0, ..., T - 1. That is the middle of the part for p = 1/2, as in TSN. Random numbers u (T,)
    in [0, 1), for training: frame i a + int(u_i a), where a = n // T, or int(i n / T) if n < T. A
    short video repeats frames.
    """
    part = np.arange(num_frames)
    if isinstance(position, float):
        # The distance of a fraction from a whole number is 0 or far above the tolerance.
        return ((part + position) * available / num_frames + TIME_TOLERANCE).astype(np.int64)
    length = available // num_frames
    if length == 0:
        return part * available // num_frames
    return part * length + (position * length).astype(np.int64)


def uniform_indices_by_time(
    times: np.ndarray, num_frames: int, position: float | np.ndarray, span: Span
) -> np.ndarray:
    """Return the frame indices (T,) of a uniform clip of a span of a video of variable rate.

    The parts have equal durations. The frames are those shown at begin + (i + p_i) D / T, where
    D = end - begin and p = `position`, see `uniform_indices`. times: (N,) seconds.
    """
    begin, end = span
    instants = begin + (np.arange(num_frames) + position) * (end - begin) / num_frames
    return frames_shown_at(instants, times, end)


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
    video: VideoReader,
    sampling: ClipSampling,
    start: float | np.ndarray,
    span: Span | None = None,
) -> np.ndarray:
    """Return the frame indices (T,) of a clip of an open video, or of a span of it.

    start: of a dense clip, from 0 to 1; of a uniform one the position in each part, see
    `uniform_indices`. Dense clips are those of `frame_indices` for a constant frame rate, otherwise
    of `frame_indices_by_time`. Raises ReadError if the video ends before the span starts.
    """
    if span is not None:
        span = span_in_video(video, span)
    if sampling.method == "uniform":
        return _uniform_indices_of_span(video, sampling.num_frames, start, span)
    start = float(start)
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
    shown = positions + (begin + TIME_TOLERANCE) * fps
    return shown.clip(*_ends_of_span(fps, span)).astype(np.int64)


def _ends_of_span(fps: float, span: Span) -> tuple[int, int]:
    """Return the indices of the first and the last frame of a span of a video of constant rate."""
    begin, end = span
    first = int((begin + TIME_TOLERANCE) * fps)
    return first, max(first, math.ceil((end - TIME_TOLERANCE) * fps) - 1)


def _uniform_indices_of_span(
    video: VideoReader, num_frames: int, position: float | np.ndarray, span: Span | None
) -> np.ndarray:
    """Return the frame indices (T,) of a uniform clip of an open video, or of a span of it."""
    if video.times is not None:
        whole = 0.0, video_duration(video.num_frames, video.fps, video.times)
        return uniform_indices_by_time(video.times, num_frames, position, span or whole)
    first, last = 0, video.num_frames - 1
    if span is not None:
        first, last = _ends_of_span(video.fps, span)
    return first + uniform_indices(last - first + 1, num_frames, position)


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


def view_starts(
    video: VideoReader, sampling: ClipSampling, num_views: int, span: Span | None
) -> list[float]:
    """Return where each evaluation view of an open video starts, for `clip_indices`.

    Dense views are spread over the video, see `view_start`. View k of K uniform ones takes the
    frames k / K of a part after its start (VideoMAE has K = 2); a single view takes their middles.
    Raises ReadError if the video ends before the span starts.
    """
    if sampling.method == "uniform":
        if num_views == 1:
            return [0.5]
        return [view / num_views for view in range(num_views)]
    slack = clip_slack(available_frames(video, span), video.fps, sampling)
    return [view_start(slack, view, num_views) for view in range(num_views)]


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
