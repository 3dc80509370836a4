"""Opening videos: selects the reader of a file or of a folder of frames, and describes them.

    with open_video(path, short_side=256) as video:
        indices = clip_indices(video, ClipSampling(num_frames=16, sampling_rate=4), start=0.5)
        frames = video.read(indices)

Both decoders give the frames of a file the same indices and the same frame rate.
PyAV and decord are imported at the first use, since they take long to load.
"""

import functools
import importlib.util
import os

import numpy as np

from data.frame_folder import NO_RATE, FrameFolder, describe_frames
from data.input_files import ReadError, check_path
from data.video import VideoInfo, VideoReader
from util.dist import print0

DECODERS = ("auto", "pyav", "decord")
TRIED_FRAMES = 8  # to find the size of a video whose first frame is damaged


def open_video(
    path: str,
    decoder: str = "auto",
    short_side: int | None = None,
    info: VideoInfo | None = None,
    frames_fps: float | None = None,
) -> VideoReader:
    """Open a video for reading: a file, or a folder of numbered frames.

    decoder: "auto" and "pyav" select PyAV. "decord" selects decord, but PyAV for files that decord
        cannot open or is known to read wrongly.
    short_side: reduce frames to this short side, in pixels; they are never enlarged.
    info: result of `describe` for this file, if known; saves the time to describe it again.
    frames_fps: frame rate of a folder of frames; files state their own.
    Raises ReadError for anything that is not a readable video.
    """
    from data.pyav_video import PyAVVideo

    if os.path.isdir(path):
        return FrameFolder(path, short_side, required_rate(frames_fps), info)
    path = check_path(path)
    if decoder == "decord" and decord_installed():
        info = info or describe(path)
        video = _open_with_decord(path, short_side, info)
        if video is not None:
            return video
    return PyAVVideo(path, short_side, info)


def _open_with_decord(path: str, short_side: int | None, info: VideoInfo) -> VideoReader | None:
    """Open a file with decord, or return None if decord cannot read it exactly."""
    from data.decord_video import DecordVideo

    if not info.decord_reads:
        return None
    try:
        return DecordVideo(path, short_side, info)
    except ReadError:
        return None  # PyAV reads more formats; if it cannot open the file, it gives the reason


def required_rate(frames_fps: float | None) -> float:
    """Return the frame rate for folders of frames. Raises ReadError if there is none."""
    if frames_fps is None:
        raise ReadError(NO_RATE)
    return frames_fps


def describe(path: str, frames_fps: float | None = None) -> VideoInfo:
    """Return the properties of a video. Opens it and decodes the first frame of a file, if it can.

    frames_fps: see `open_video`. Raises ReadError for anything that is not a readable video.
    """
    from data.decord_video import decord_is_exact
    from data.pyav_video import PyAVVideo

    if os.path.isdir(path):
        return describe_frames(path, required_rate(frames_fps))
    with PyAVVideo(check_path(path), None) as video:
        try:
            frame = video.read(np.zeros(1, dtype=int))[0]
            starts_damaged = False
        except ReadError:
            frame = video.read(_other_frames(video))[0]
            starts_damaged = True
        height, width, _ = frame.shape
        num_frames = video.frames_in_file()
        times = video.times
        if times is not None:
            times = times[:num_frames]
        return VideoInfo(
            frames=num_frames,
            fps=video.fps,
            width=width,
            height=height,
            rotation=video.rotation,
            key_distance=num_frames / len(video.gops),
            codec=video.codec.name,
            unseen=video.gops.unseen,
            decord_reads=not starts_damaged and decord_is_exact(video),
            times=times,
        )


def _other_frames(video: VideoReader) -> np.ndarray:
    """Return the indices of a few frames, of which one may be readable if the first one is not."""
    return np.unique(np.linspace(0, video.num_frames - 1, TRIED_FRAMES).astype(int))


def decord_installed() -> bool:
    """Return whether decord can be imported. It has no wheel for ARM."""
    from data.decord_video import import_decord

    try:
        import_decord()
    except ImportError:
        return False
    return True


@functools.cache
def warn_if_decord_missing(decoder: str) -> None:
    """Print once per process that PyAV replaces decord, if decord is selected but missing."""
    if decoder == "decord" and importlib.util.find_spec("decord") is None:
        print0(
            "note: decord is not installed; PyAV reads the videos. "
            "Run pip install decord, or pass --decoder pyav."
        )
