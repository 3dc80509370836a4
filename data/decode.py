"""Reading frames of video files, and images. The only file that knows a decoder: decord, or PyAV; Pillow for images.

    with open_video(path, decoder="decord", short_side=256) as video:
        frames = video.read(frame_indices(video.num_frames, video.fps, num_frames=16, sampling_rate=4, start=0.5))

A backend is a class with num_frames, fps, seek and read. Frames are numbered in the order of display; their number and rate
come from `describe`, for both backends alike: what the file's own table lists, or else the video packets in it.
"""

import functools
import importlib.util
import os
import stat
from itertools import dropwhile, islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.dist import print0

os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")  # read when decord is imported; its own 10240 tries long on broken files

HIGHEST_FPS = 240  # some containers claim 1000; a rate above this, or none, is taken for 30


class ReadError(Exception):
    """A video or image that cannot be read; the message is one line of reason."""


class VideoInfo(NamedTuple):
    """What is known of a video file without decoding more than its first frame."""

    frames: int
    fps: float  # mean rate; 30 where the container's cannot be
    width: int  # of the picture as shown, pixels
    height: int
    rotation: int  # degrees, already in width and height
    key_distance: float  # mean distance of key frames, frames
    codec: str


def frame_indices(available: int, fps: float, *, num_frames: int, sampling_rate: int, start: float, target_fps: float = 30) -> np.ndarray:
    """Frame numbers (T,) of a clip of num_frames frames.

    The clip spans s = sampling_rate * num_frames * fps / target_fps source frames and begins at start * max(available - s, 0),
    `start` in [0, 1]; frames are evenly spread over the span, ends included. A short video repeats its last frame.
    """
    span = sampling_rate * num_frames * fps / target_fps
    first = start * max(available - span, 0)
    return np.linspace(first, first + span - 1, num_frames).clip(0, available - 1).astype(np.int64)


def view_start(available: int, fps: float, *, num_frames: int, sampling_rate: int, view: int, views: int, target_fps: float = 30) -> float:
    """Where in the slack (0 to 1) view `view` of `views` begins: evenly from the first to the last, one alone in the middle."""
    slack = max(available - sampling_rate * num_frames * fps / target_fps, 0)
    first = slack // 2 if views == 1 else view * (slack // (views - 1))
    return first / slack if slack else 0.0


def scaled_size(width: int, height: int, short_side: int | None) -> tuple[int, int] | None:
    """Width and height with the short side reduced to `short_side` pixels, or None if nothing is to be reduced."""
    if short_side is None or min(width, height) <= short_side:
        return None
    scale = short_side / min(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def checked_path(path: str) -> str:
    """The absolute path of a regular, non-empty file. Raises ReadError for anything else."""
    path = os.path.abspath(path)  # neither "-name" nor "concat:a|b" means anything special any more
    try:
        status = os.stat(path)
    except OSError as error:
        raise ReadError(error.strerror or "cannot be opened") from None
    if not stat.S_ISREG(status.st_mode):
        raise ReadError("not a regular file")  # opening a FIFO would wait for ever
    if not status.st_size:
        raise ReadError("empty file")
    return path


def open_video(path: str, decoder: str = "decord", short_side: int | None = None, info: VideoInfo | None = None) -> "DecordVideo | PyAVVideo":
    """Open a video file for `read`. What decord cannot open goes to PyAV.

    short_side: frames are reduced to it (pixels), never enlarged. info: what `describe` said of this file, if it was asked
    before. Raises ReadError for anything that is no readable video.
    """
    path = checked_path(path)
    if decoder == "decord" and decord_installed():
        try:
            return DecordVideo(path, short_side, info)
        except ReadError:
            pass  # PyAV reads more formats, and gives the reason if it cannot either
    return PyAVVideo(path, short_side, info)


def describe(path: str) -> VideoInfo:
    """Look at a video file: opens it, decodes one frame, and sees whether its end is there. Raises ReadError."""
    with PyAVVideo(checked_path(path), None) as video:
        picture = video.read(np.zeros(1, dtype=int))[0]
        context = video.stream.codec_context
        groups = ((video.keys[group], len(video._group(group))) for group in reversed(range(len(video.keys))))
        frames = next((first + there for first, there in groups if there), 0)  # fewer than the table lists in a file that was cut short
        return VideoInfo(frames, video.fps, picture.shape[1], picture.shape[0], video.rotation,
                         frames / len(video.keys), context.name)  # fmt: skip


def read_image(path: str) -> Image.Image:
    """An image in RGB. Raises ReadError for anything that is no readable image."""
    try:
        with Image.open(checked_path(path)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for broken files
        raise ReadError(f"not an image: {_one_line(error).partition(': ')[0]}") from None


def decord_installed() -> bool:
    """Is there a decord on this machine? (It has no wheel for ARM.)"""
    try:
        import decord  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def say_if_absent(decoder: str) -> None:
    """Say once in a process that PyAV steps in for a decord that is not there."""
    if decoder == "decord" and importlib.util.find_spec("decord") is None:
        print0("note: decord is not installed, PyAV reads the videos (pip install decord, or --decoder pyav)")


def _sane_fps(fps: float | None) -> float:
    """The rate that the container claims, or 30 if that cannot be."""
    return float(fps) if fps and 0 < fps <= HIGHEST_FPS else 30.0


def _one_line(error: Exception) -> str:
    """A library's message without its stack, place and path."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rpartition("] ")[2][:160] or type(error).__name__


def _open_container(path: str):
    """A PyAV container and its first video stream, decoding on one thread. Raises ReadError."""
    import av

    try:
        container = av.open(path, metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        raise ReadError(f"not a video: {getattr(error, 'strerror', None) or _one_line(error)}") from None
    if not container.streams.video:
        container.close()
        raise ReadError("no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise ReadError("no decoder for its codec")
    stream.codec_context.thread_count = 1
    return container, stream


class DecordVideo:
    """A video read by decord, which decodes from the last key frame before the wanted frames up to them."""

    def __init__(self, path: str, short_side: int | None, info: VideoInfo | None):
        import decord

        decord.logging.set_level(decord.logging.FATAL)
        self.path, self.short_side, self.info = path, short_side, info or describe(path)
        self.num_frames, self.fps = self.info.frames, self.info.fps
        width, height = scaled_size(self.info.width, self.info.height, short_side) or (-1, -1)
        try:
            self.reader = decord.VideoReader(path, ctx=decord.cpu(0), width=width, height=height, num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise ReadError(_one_line(error)) from None
        if not len(self.reader):
            raise ReadError("no frames")

    def seek(self, index: int) -> None:
        """Go to the key frame before a frame; `read` does it by itself."""
        self.reader.seek(index)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of non-decreasing frame numbers (T,). Raises ReadError."""
        import decord

        try:
            return self.reader.get_batch(np.clip(indices, 0, len(self.reader) - 1).tolist()).asnumpy()
        except (decord.DECORDError, RuntimeError):  # damaged, or a width that decord pads and then refuses
            with PyAVVideo(self.path, self.short_side, self.info) as video:
                return video.read(indices)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self.reader


class PyAVVideo:
    """A video read by PyAV: only the wanted frames, and what these depend on, are decoded.

    A group of pictures (key frame to key frame) without a wanted frame is not even read where the file has a table of its
    packets (MP4, MOV); elsewhere the packets are all read, once, without decoding. In the other groups the frames that no other
    frame refers to are skipped unless wanted. Files without usable time stamps are decoded from the start and counted.
    """

    def __init__(self, path: str, short_side: int | None, info: VideoInfo | None = None):
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()  # one for all frames: its tables take longer to make than a small frame to convert
        self.short_side, self.rotation, self.decoded = short_side, 0, 0  # decoded: frames that came out, for tests and benchmarks
        self.container, self.stream = _open_container(path)
        entries = self.stream.index_entries
        self.packets, self.groups = None, {}  # all packets, where they had to be read; the packets of each group, once read
        self.place, self.reader = -1, None  # the packet that the reader would give next
        if self.container.format.name.startswith("mov") and len(entries) == self.stream.frames > 0:
            table = [(entry.is_keyframe, entry.timestamp) for entry in entries]
            self.keys = [place for place, (is_key, _) in enumerate(table) if is_key] or [0]  # places of key frames in the file
            self.stamps = [table[place][1] for place in self.keys]
            count = len(table)
        else:
            count = self._read_all()
        if not count:
            self.container.close()
            raise ReadError("no frames")
        self.ends = [*self.keys[1:], count]
        self.num_frames, self.fps = (info.frames, info.fps) if info else (count, _sane_fps(self.stream.average_rate))

    def _read_all(self) -> int:
        """Read all packets, without decoding them; says how many there are. Damage ends the video there."""
        import av

        if self.groups:
            self.container.seek(self.stamps[0], stream=self.stream)
        self.packets, packets = [], self.container.demux(self.stream)
        try:
            self.packets.extend(packet for packet in packets if packet.size)
        except av.FFmpegError as error:
            if not self.packets:
                raise ReadError(_one_line(error)) from None
        self.keys = [place for place, packet in enumerate(self.packets) if packet.is_keyframe] or [0]
        return len(self.packets)

    def _group(self, number: int) -> list:
        """The packets of a group of pictures, in the order of the file; fewer where the file ends early."""
        first, end = self.keys[number], self.ends[number]
        if self.packets is None and number not in self.groups:
            import av

            try:
                if self.place != first:
                    stamp = self.stamps[number]  # not self in the lambda: a cycle would keep the file open until the collector comes by
                    self.container.seek(stamp, stream=self.stream)  # arrives at this key frame or at the one before
                    packets = (packet for packet in self.container.demux(self.stream) if packet.size)
                    self.reader = dropwhile(lambda packet: packet.dts is not None and packet.dts < stamp, packets)
                self.groups[number] = list(islice(self.reader, end - first))
                self.place = end
            except av.FFmpegError:
                self.groups[number] = []
            if self.groups[number] and self.groups[number][0].dts != self.stamps[number]:  # the table is not to be trusted
                self._read_all()
                self.ends = [*self.keys[1:], len(self.packets)]
                return self._group(min(number, len(self.keys) - 1))
        return self.groups[number] if self.packets is None else self.packets[first:end]

    def _group_of(self, index: int) -> int:
        """The number of the group that shows frame `index`: groups follow each other in the file as on the screen."""
        return max(int(np.searchsorted(self.keys, index, side="right")) - 1, 0)

    def seek(self, index: int) -> None:
        """Read the packets of a frame's group of pictures; `read` does it by itself."""
        self._group(self._group_of(index))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of non-decreasing frame numbers (T,). Raises ReadError.

        A frame that cannot be decoded is replaced by the nearest one before it, or else after it.
        """
        indices = np.clip(indices, 0, self.num_frames - 1)
        wanted = sorted({int(index) for index in indices})
        found = self._selected(wanted)
        found = self._counted(wanted) if found is None else found
        if not found:
            raise ReadError("none of the wanted frames can be decoded")
        have = np.array(sorted(found))
        nearest = have[np.maximum(np.searchsorted(have, indices, side="right") - 1, 0)]
        return np.stack([found[int(index)] for index in nearest])

    def _selected(self, wanted: list[int]) -> dict[int, np.ndarray] | None:
        """Decode by time stamps: {frame number: picture}, or None if the stamps are of no use."""
        if self.container.format.name == "avi" and self.stream.codec_context.has_b_frames:  # AVI does not store when to show them
            return None
        found: dict[int, np.ndarray] = {}
        codec = self.stream.codec_context
        if codec.pix_fmt == "yuv444p" and codec.name == "h264":  # of an old x264: decoded rightly only after its signature
            self._keep(self._group(0)[0], {}, found)
            codec.flush_buffers()
        for group in sorted({self._group_of(index) for index in wanted}):
            packets, first = self._group(group), self.keys[group]
            stamps = [packet.pts for packet in packets]
            if None in stamps or len(set(stamps)) < len(stamps):
                return None
            shown = sorted(stamps)
            number = {shown[index - first]: index for index in wanted if first <= index < first + len(shown)}
            if not number:
                continue
            if group and any(stamp < stamps[0] for stamp in number):  # shown before its key frame: needs the group before
                packets = self._group(group - 1) + packets
            last = max(place for place, packet in enumerate(packets) if packet.pts in number)
            for packet in packets[: last + 1]:
                codec.skip_frame = "DEFAULT" if packet.pts in number else "NONREF"
                self._keep(packet, number, found)
            codec.skip_frame = "DEFAULT"
            self._keep(None, number, found)  # drain
            codec.flush_buffers()
        return found

    def _keep(self, packet, number: dict[int, int], found: dict[int, np.ndarray]) -> None:
        """Decode one packet (None: what the decoder still holds) and keep the wanted pictures."""
        import av

        try:
            for frame in self.stream.codec_context.decode(packet):
                self.decoded += 1
                if frame.pts in number:
                    found[number[frame.pts]] = self._picture(frame)
        except (av.FFmpegError, ValueError):
            return  # a damaged picture: `read` puts a neighbour in its place, or reports the file if there is none

    def _counted(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decode from the start and count: {frame number: picture}."""
        import av

        if self.packets is None:
            self._read_all()
        found, count, targets = {}, 0, set(wanted)
        for packet in [*self.packets, None]:
            try:
                for frame in self.stream.codec_context.decode(packet):
                    self.decoded += 1
                    if count in targets:
                        found[count] = self._picture(frame)
                    count += 1
            except (av.FFmpegError, ValueError):
                continue  # as in _keep
            if count > wanted[-1]:
                break
        self.stream.codec_context.flush_buffers()
        return found

    def _picture(self, frame) -> np.ndarray:
        """A decoded frame as (H, W, 3) uint8 RGB, reduced and upright."""
        width, height = scaled_size(frame.width, frame.height, self.short_side) or (frame.width, frame.height)
        picture = self.reformatter.reformat(frame, width, height, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
        self.rotation = frame.rotation
        return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()
