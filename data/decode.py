"""Reading frames of video files, and images. The only file that knows a decoder: decord, or PyAV where decord cannot; Pillow.

    with open_video(path, decoder="decord", short_side=256) as video:
        frames = video.read(frame_indices(video.num_frames, video.fps, num_frames=16, sampling_rate=4, start=0.5))

Frames are numbered in the order of display; `num_frames` counts the video packets in the file, for both decoders alike.
"""

import os
import stat

import numpy as np
from PIL import Image

os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")  # read when decord is imported; its own 10240 tries long on broken files

HIGHEST_FPS = 240  # some containers claim 1000; a rate above this, or none, is taken for 30


class ReadError(Exception):
    """A video or image that cannot be read; the message is one line of reason."""


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


def open_video(path: str, decoder: str = "decord", short_side: int | None = None) -> "DecordVideo | PyAVVideo":
    """Open a video file for `read`. What decord cannot open goes to PyAV.

    short_side: frames are reduced to it (pixels), never enlarged. Raises ReadError for anything that is no readable video.
    """
    path = checked_path(path)
    if decoder == "decord" and decord_installed():
        try:
            return DecordVideo(path, short_side)
        except ReadError:
            pass  # PyAV reads more formats, and gives the reason if it cannot either
    return PyAVVideo(path, short_side)


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


def _sane_fps(fps: float | None) -> float:
    """The rate that the container claims, or 30 if that cannot be."""
    return float(fps) if fps and 0 < fps <= HIGHEST_FPS else 30.0


def _one_line(error: Exception) -> str:
    """A library's message without its stack, place and path."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rpartition("] ")[2][:160] or type(error).__name__


class DecordVideo:
    """A video read by decord, which decodes from the last key frame before the wanted frames up to them."""

    def __init__(self, path: str, short_side: int | None):
        import decord

        decord.logging.set_level(decord.logging.FATAL)
        self.path, self.short_side = path, short_side
        try:
            size = scaled_size(*_display_size(path), short_side) if short_side else None
            width, height = size or (-1, -1)
            self.reader = decord.VideoReader(path, ctx=decord.cpu(0), width=width, height=height, num_threads=1)
            self.num_frames, self.fps = len(self.reader), _sane_fps(self.reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError) as error:
            raise ReadError(_one_line(error)) from None
        if not self.num_frames:
            raise ReadError("no frames")

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of non-decreasing frame numbers (T,). Raises ReadError."""
        import decord

        try:
            return self.reader.get_batch(np.clip(indices, 0, self.num_frames - 1).tolist()).asnumpy()
        except (decord.DECORDError, RuntimeError):  # damaged, or a width that decord pads and then refuses
            with PyAVVideo(self.path, self.short_side) as video:
                return video.read(indices)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self.reader


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


def _display_size(path: str) -> tuple[int, int]:
    """Width and height of a video as shown, which rotation metadata may swap. Decodes one frame."""
    import av

    container, stream = _open_container(path)
    with container:
        try:
            frame = next(container.decode(stream))
        except (av.FFmpegError, StopIteration) as error:
            raise ReadError(f"no frame can be decoded: {_one_line(error)}") from None
        size = frame.width, frame.height
        return size[::-1] if frame.rotation % 180 else size


class PyAVVideo:
    """A video read by PyAV: only the wanted frames, and what these depend on, are decoded.

    Packets are read without decoding them; each group of pictures (key frame to key frame) that holds no wanted frame is
    left out, and of the others the frames that no other frame refers to are skipped unless wanted. Files without usable
    time stamps are decoded from the start and counted.
    """

    def __init__(self, path: str, short_side: int | None):
        import av

        self.path, self.short_side = path, short_side
        self.container, self.stream = _open_container(path)
        try:
            self.packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        except av.FFmpegError as error:
            if not getattr(self, "packets", None):
                raise ReadError(_one_line(error)) from None
        self.num_frames, self.fps = len(self.packets), _sane_fps(self.stream.average_rate)
        if not self.packets:
            raise ReadError("no frames")
        stamps = [packet.pts for packet in self.packets]
        reordered_avi = self.container.format.name == "avi" and self.stream.codec_context.has_b_frames  # AVI stores no such stamps
        self.timed = None not in stamps and len(set(stamps)) == len(stamps) and not reordered_avi
        self.decoded = 0  # frames that came out of the decoder, for tests and benchmarks

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of non-decreasing frame numbers (T,). Raises ReadError.

        A frame that cannot be decoded is replaced by the nearest one before it, or else after it.
        """
        wanted = sorted({int(index) for index in np.clip(indices, 0, self.num_frames - 1)})
        found = self._selected(wanted) if self.timed else self._counted(wanted)
        if not found:
            raise ReadError("none of the wanted frames can be decoded")
        have = np.array(sorted(found))
        nearest = have[np.maximum(np.searchsorted(have, np.clip(indices, 0, self.num_frames - 1), side="right") - 1, 0)]
        return np.stack([found[int(index)] for index in nearest])

    def _selected(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decode by time stamps: {frame number: picture}."""
        order = np.argsort([packet.pts for packet in self.packets], kind="stable")  # display order -> place in the file
        number = {self.packets[order[index]].pts: index for index in wanted}
        places = sorted(int(order[index]) for index in wanted)
        found, last, codec = {}, -1, self.stream.codec_context
        for begin, end in self._runs(places):
            if begin != last + 1:
                codec.flush_buffers()
            for packet in self.packets[begin : end + 1]:
                codec.skip_frame = "DEFAULT" if packet.pts in number else "NONREF"
                self._keep(packet, number, found)
            codec.skip_frame = "DEFAULT"
            self._keep(None, number, found)  # drain
            codec.flush_buffers()
            last = end
        return found

    def _runs(self, places: list[int]) -> list[tuple[int, int]]:
        """Packet ranges (first, last) to decode: from a key frame to the last wanted packet of its group of pictures."""
        keys = [place for place, packet in enumerate(self.packets) if packet.is_keyframe] or [0]
        runs: list[tuple[int, int]] = []
        for place in places:
            group = max(np.searchsorted(keys, place, side="right") - 1, 0)
            if self.packets[place].pts < self.packets[keys[group]].pts:  # shown before its key frame: needs the group before
                group = max(group - 1, 0)
            begin = keys[group]
            if runs and begin <= runs[-1][1]:
                runs[-1] = (runs[-1][0], place)
            else:
                runs.append((begin, place))
        return runs

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
        found, count, targets = {}, 0, set(wanted)
        import av

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
        picture = frame.reformat(width, height, format="rgb24", interpolation="BICUBIC").to_ndarray()
        return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()
