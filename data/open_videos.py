"""Video files that stay open from one sample to the next.

Opening a file takes time in proportion to its length: for ten hours of video, as long as reading
about fifteen clips. Samples that are parts of long files therefore share open files.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from data.decode import open_video
from data.video import VideoInfo, VideoReader

MAX_FILES = 32
MAX_FRAMES = 4_000_000  # of all open files, which keep 84 bytes (PyAV) or 117 (decord) of each
MAX_PIXELS = 16_000_000  # of a frame of all open files, whose decoders keep 16 bytes of each


class OpenVideos:
    """The files that a process has read last, still open.

    decoder, short_side, frames_fps: see `open_video`.
    """

    def __init__(self, decoder: str, short_side: int, frames_fps: float | None = None):
        self.decoder = decoder
        self.short_side = short_side
        self.frames_fps = frames_fps
        self.videos: dict[str, VideoReader] = {}  # by path, the one read last at the end
        self.process = os.getpid()
        self.inherited: list[dict[str, VideoReader]] = []

    @contextlib.contextmanager
    def open(self, path: str, info: VideoInfo | None, keep: bool) -> Iterator[VideoReader]:
        """Yield the open video of a file.

        info: see `open_video`. keep: leave the file open unless reading it fails. Raises ReadError.
        """
        self._leave_to_parent()
        video = self.videos.pop(path, None)
        if video is None:
            video = open_video(path, self.decoder, self.short_side, info, self.frames_fps)
        try:
            yield video
        except BaseException:
            video.close()
            raise
        if keep and video.restart():
            self.videos[path] = video
            self._close_oldest()
        else:
            video.close()

    def dummy_frames(self, num_frames: int) -> Tensor:
        """Return frames (T, C, H, W) uint8 of the size of decoded ones, all zero."""
        return torch.zeros(num_frames, 3, self.short_side, self.short_side, dtype=torch.uint8)

    def _leave_to_parent(self) -> None:
        """Forget the files that this process has inherited: their positions are shared.

        They are not closed, because a decoder's threads do not exist after a fork.
        """
        if self.process != os.getpid():
            self.process = os.getpid()
            self.inherited.append(self.videos)
            self.videos = {}

    def _close_oldest(self) -> None:
        """Close files until the others are within the limits. The last one always stays open."""
        frames = sum(video.num_frames for video in self.videos.values())
        pixels = sum(video.frame_pixels for video in self.videos.values())
        for path in list(self.videos)[:-1]:
            within = frames <= MAX_FRAMES and pixels <= MAX_PIXELS
            if within and len(self.videos) <= MAX_FILES:
                return
            video = self.videos.pop(path)
            frames -= video.num_frames
            pixels -= video.frame_pixels
            video.close()
