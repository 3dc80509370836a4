"""Reading frames with decord, and which files it reads exactly."""

import os

import numpy as np

from data.frame_geometry import UPRIGHT, scaled_size
from data.input_files import ReadError, error_summary
from data.pyav_compat import VERSION
from data.pyav_video import PyAVVideo
from data.video import VideoInfo, VideoReader

EXACT_CODECS = ("h264", "hevc", "vp8", "vp9")
EXACT_CONTAINERS = ("mov", "matroska")
# decord rotates, but does not mirror.
DECORD_ORIENTATIONS = (UPRIGHT, (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))
MAX_EOF_RETRIES = "2048"  # decord's default, 10240, takes long on corrupt files


def import_decord():
    """Import decord and return the module. Raises ImportError."""
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", MAX_EOF_RETRIES)  # decord reads it once
    import decord

    return decord


def decord_is_exact(video: PyAVVideo) -> bool:
    """Return whether decord reads the right frames of a file, as far as is known.

    docs/decoders.md lists the evidence.
    """
    container_name = video.container.format.name
    if VERSION < 17 and container_name.startswith("mov"):
        return False  # PyAV 16 does not show a table of packets that would mislead decord
    if video.stream is not video.container.streams.video[0]:
        return False  # the first stream is cover art, which decord may read
    if video.codec.name not in EXACT_CODECS:
        return False
    if container_name.split(",")[0] not in EXACT_CONTAINERS:
        return False
    return _frames_are_found(video) and _frames_look_right(video) and video.gops.are_closed()


def _frames_are_found(video: PyAVVideo) -> bool:
    """Return whether decord counts the frames of a file as a player does."""
    gops = video.gops
    if video.is_sequential or gops.table_misleads or gops.unseen:
        return False
    num_packets = gops.gop_ends[-1]
    return bool(gops.num_shown == num_packets)


def _frames_look_right(video: PyAVVideo) -> bool:
    """Return whether decord shows frames with the right colors, size and orientation."""
    stored_size = (video.codec.width, video.codec.height)
    if video.codec.pix_fmt == "yuv444p" or stored_size != video.size:
        return False
    if video.orientation not in DECORD_ORIENTATIONS:
        return False
    in_matroska = video.container.format.name.startswith("matroska")
    return video.orientation == UPRIGHT or not in_matroska


class DecordVideo(VideoReader):
    """A video read by decord, which decodes every frame from the last keyframe on."""

    def __init__(self, path: str, short_side: int | None, info: VideoInfo):
        """Open the file. Raises ReadError."""
        self.decord = import_decord()
        self.decord.logging.set_level(self.decord.logging.FATAL)
        self.path = path
        self.short_side = short_side
        self.info = info
        self.num_frames = info.frames
        self.frame_pixels = info.width * info.height
        self.fps = info.fps
        self.times = info.times
        self.replaced = 0
        width, height = scaled_size(info.width, info.height, short_side) or (-1, -1)
        try:
            self.reader = self.decord.VideoReader(
                path, ctx=self.decord.cpu(0), width=width, height=height, num_threads=1
            )
        except (self.decord.DECORDError, RuntimeError) as error:
            raise ReadError(error_summary(error)) from None
        if not len(self.reader):
            raise ReadError("no frames")

    def seek(self, index: int) -> None:
        """Move to the keyframe before a frame. `read` does this by itself."""
        self.reader.seek(index)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the frames (T, H, W, 3) uint8 RGB of non-decreasing indices (T,).

        If decord fails, PyAV reads them. Raises ReadError.
        """
        clipped = np.clip(indices, 0, len(self.reader) - 1)
        try:
            return self.reader.get_batch(clipped.tolist()).asnumpy()
        except (self.decord.DECORDError, RuntimeError):
            # The file is corrupt, or has a width that decord pads and then rejects.
            return self._read_with_pyav(indices)

    def _read_with_pyav(self, indices: np.ndarray) -> np.ndarray:
        """Return the frames (T, H, W, 3) uint8 RGB as PyAV reads them. Raises ReadError."""
        with PyAVVideo(self.path, self.short_side, self.info) as video:
            frames = video.read(indices)
            self.replaced += video.replaced
            return frames

    def restart(self) -> bool:
        """Return to the state of a file just opened."""
        self.replaced = 0
        return True

    def close(self) -> None:
        """Release the reader and its threads."""
        self.reader = None
