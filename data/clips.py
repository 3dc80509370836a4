"""Choosing the frames of a clip: index arithmetic, for constant and variable frame rates.

T is the number of frames of a clip, N that of a video. A clip spans sampling_rate * num_frames
frames at target_fps, whatever the frame rate of the video is.
"""

import numpy as np

from data.video import VideoReader

TIME_TOLERANCE = 1e-9  # seconds: a frame that starts at an instant counts as shown at it


def clip_span(fps: float, *, num_frames: int, sampling_rate: int, target_fps: float = 30) -> float:
    """Return the length of a clip in frames of a video with a rate of `fps`."""
    return sampling_rate * num_frames * fps / target_fps


def clip_slack(
    available: int, fps: float, *, num_frames: int, sampling_rate: int, target_fps: float = 30
) -> float:
    """Return by how many frames a video of `available` frames is longer than a clip, at least 0."""
    span = clip_span(fps, num_frames=num_frames, sampling_rate=sampling_rate, target_fps=target_fps)
    return max(available - span, 0)


def frame_indices(
    available: int,
    fps: float,
    *,
    num_frames: int,
    sampling_rate: int,
    start: float,
    target_fps: float = 30,
) -> np.ndarray:
    """Return the frame indices (T,) int64 of a clip of a video of constant rate.

    The clip spans s = sampling_rate * num_frames * fps / target_fps source frames.
    It begins at start * max(available - s, 0), with `start` in [0, 1].
    The frames are evenly spread over the span, ends included. A short video repeats its last frame.
    """
    span = clip_span(fps, num_frames=num_frames, sampling_rate=sampling_rate, target_fps=target_fps)
    first = start * max(available - span, 0)
    positions = np.linspace(first, first + span - 1, num_frames)
    return positions.clip(0, available - 1).astype(np.int64)


def frame_indices_by_time(
    times: np.ndarray, *, num_frames: int, sampling_rate: int, start: float, target_fps: float = 30
) -> np.ndarray:
    """Return the frame indices (T,) of a clip of a video whose frames are shown at `times` (N,).

    This is the formula of `frame_indices` in seconds. The clip lasts
    S = sampling_rate * num_frames / target_fps, of which the last frame takes d, the median
    distance of two frames. The video lasts D = its last time stamp + d. The clip begins at
    start * max(D - S, 0). The frame of each instant is the last one shown by then.
    """
    frame_duration = 0.0
    if len(times) > 1:
        frame_duration = float(np.median(np.diff(times)))
    clip_duration = sampling_rate * num_frames / target_fps
    first = start * max(times[-1] + frame_duration - clip_duration, 0)
    last = first + max(clip_duration - frame_duration, 0)
    instants = np.linspace(first, last, num_frames)
    indices = np.searchsorted(times, instants + TIME_TOLERANCE, side="right") - 1
    return indices.clip(0, len(times) - 1)


def clip_indices(
    video: VideoReader,
    *,
    num_frames: int,
    sampling_rate: int,
    start: float,
    target_fps: float = 30,
) -> np.ndarray:
    """Return the frame indices (T,) of a clip of an open video.

    Calls `frame_indices` for a constant frame rate, otherwise `frame_indices_by_time`.
    """
    if video.times is None:
        return frame_indices(
            video.num_frames,
            video.fps,
            num_frames=num_frames,
            sampling_rate=sampling_rate,
            start=start,
            target_fps=target_fps,
        )
    return frame_indices_by_time(
        video.times,
        num_frames=num_frames,
        sampling_rate=sampling_rate,
        start=start,
        target_fps=target_fps,
    )


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
