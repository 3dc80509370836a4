"""Reading frames of video files, and images. The only file that knows a decoder: decord, or PyAV; Pillow for images.

    with open_video(path, short_side=256) as video:
        frames = video.read(clip_indices(video, num_frames=16, sampling_rate=4, start=0.5))

A backend is a class with num_frames, fps, times, replaced, seek, read and close. Frames are numbered in the order of display, and only
those that a player shows; their number and rate are the same for both backends.
"""

import functools
import importlib.util
import os
import stat
import sys
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.dist import print0

os.environ.setdefault(
    "DECORD_EOF_RETRY_MAX", "2048"
)  # read when decord is imported; its own 10240 tries long on broken files

DECODERS = ("auto", "pyav", "decord")
HIGHEST_FPS = 240  # a container without time stamps may claim 1000; a rate above this, or none, is taken for 30
MOST_PACKETS = 1024  # how far back a frame that does not come out is tried from
SKIPS_EXACTLY = frozenset(  # decoders that leave out just the frames that nothing refers to (tests/test_video_matrix.py)
    ("h264", "hevc", "vp8", "libvpx", "mpeg4", "mpeg2video", "h263", "mjpeg", "prores")
)
YCGCO = 8  # a color space that FFmpeg does not convert (ITU-T H.273, table 4)
UPRIGHT = (1, 0, 0, 1)  # see `orientation`
UPRIGHT_BY_DECORD = (
    UPRIGHT,
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
)  # it turns, but does not mirror


class ReadError(Exception):
    """A video or image that cannot be read; the message is one line of reason."""


class VideoInfo(NamedTuple):
    """What is known of a video file without decoding more than its first frames."""

    frames: int  # that a player shows
    fps: float  # mean rate
    width: int  # of the picture as shown: upright, with square pixels
    height: int
    rotation: int  # degrees, already in width and height
    key_distance: float  # mean distance of key frames, frames
    codec: str
    unseen: int = 0  # frames at the start that cannot be decoded and are not counted
    decord_reads: bool = False  # whether decord gives the right frames
    times: np.ndarray | None = (
        None  # of an unsteady rate: when each frame is shown, seconds (frames,)
    )


def frame_indices(
    available: int,
    fps: float,
    *,
    num_frames: int,
    sampling_rate: int,
    start: float,
    target_fps: float = 30,
) -> np.ndarray:
    """Frame numbers (T,) of a clip of num_frames frames, of a video of constant rate.

    The clip spans s = sampling_rate * num_frames * fps / target_fps source frames and begins at start * max(available - s, 0),
    `start` in [0, 1]; frames are evenly spread over the span, ends included. A short video repeats its last frame.
    """
    span = sampling_rate * num_frames * fps / target_fps
    first = start * max(available - span, 0)
    return np.linspace(first, first + span - 1, num_frames).clip(0, available - 1).astype(np.int64)


def frames_at(
    times: np.ndarray, *, num_frames: int, sampling_rate: int, start: float, target_fps: float = 30
) -> np.ndarray:
    """Frame numbers (T,) of a clip of num_frames instants, of a video whose frames are shown at `times` (seconds).

    The formula of `frame_indices` in seconds: the clip lasts S = sampling_rate * num_frames / target_fps, of which the last
    frame takes the usual (median) distance d of two frames, and the video D = its last time stamp + d. The clip begins at
    start * max(D - S, 0); at each instant the frame is the last one shown by then.
    """
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    duration = sampling_rate * num_frames / target_fps
    first = start * max(times[-1] + usual - duration, 0)
    instants = np.linspace(first, first + max(duration - usual, 0), num_frames)
    return (np.searchsorted(times, instants + 1e-9, side="right") - 1).clip(0, len(times) - 1)


def clip_indices(
    video: "DecordVideo | PyAVVideo",
    *,
    num_frames: int,
    sampling_rate: int,
    start: float,
    target_fps: float = 30,
) -> np.ndarray:
    """Frame numbers (T,) of a clip of an open video: `frame_indices`, or `frames_at` where the rate is not constant."""
    clip = {
        "num_frames": num_frames,
        "sampling_rate": sampling_rate,
        "start": start,
        "target_fps": target_fps,
    }
    if video.times is None:
        return frame_indices(video.num_frames, video.fps, **clip)
    return frames_at(video.times, **clip)


def view_start(
    available: int,
    fps: float,
    *,
    num_frames: int,
    sampling_rate: int,
    view: int,
    views: int,
    target_fps: float = 30,
) -> float:
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


def square_size(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Width and height with square pixels; nothing is enlarged."""
    if not pixel_aspect or not 0.25 <= pixel_aspect <= 4:  # others are mistakes
        return width, height
    return max(round(width * min(pixel_aspect, 1)), 1), max(round(height / max(pixel_aspect, 1)), 1)


def checked_path(path: str) -> str:
    """The absolute path of a regular, non-empty file. Raises ReadError for anything else."""
    path = os.path.abspath(path)  # neither "-name" nor "concat:a|b" means anything special any more
    try:
        status = os.stat(path)
    except OSError as error:
        raise ReadError(error.strerror or "cannot be opened") from None
    except ValueError as error:  # a NUL in it
        raise ReadError(f"no path: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ReadError("not a regular file")  # opening a FIFO would wait for ever
    if not status.st_size:
        raise ReadError("empty file")
    return path


def open_video(
    path: str, decoder: str = "auto", short_side: int | None = None, info: VideoInfo | None = None
) -> "DecordVideo | PyAVVideo":
    """Open a video file for `read`.

    decoder: "auto" is PyAV. "decord" goes to PyAV for a file that it cannot open or is known to read wrongly.
    short_side: frames are reduced to it (pixels), never enlarged. info: what `describe` said of this file, if it was asked
    before. Raises ReadError for anything that is no readable video.
    """
    path = checked_path(path)
    if decoder == "decord" and decord_installed():
        info = info or describe(path)
        if info.decord_reads:
            try:
                return DecordVideo(path, short_side, info)
            except ReadError:
                pass  # PyAV reads more formats, and gives the reason if it cannot either
    return PyAVVideo(path, short_side, info)


def describe(path: str) -> VideoInfo:
    """Look at a video file: opens it, decodes its first frame, and sees whether its end is there. Raises ReadError."""
    with PyAVVideo(checked_path(path), None) as video:
        picture = video.read(np.zeros(1, dtype=int))[0]
        frames, times = video.frames_in_file(), video.times
        return VideoInfo(
            frames=frames,
            fps=video.fps,
            width=picture.shape[1],
            height=picture.shape[0],
            rotation=video.rotation,
            key_distance=frames / len(video.packets),
            codec=video.stream.codec_context.name,
            unseen=video.packets.unseen,
            decord_reads=video.decord_reads(),
            times=None if times is None else times[:frames],
        )


def read_image(path: str) -> Image.Image:
    """An image in RGB. Raises ReadError for anything that is no readable image."""
    try:
        with Image.open(checked_path(path)) as image:
            return image.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow raises for broken files
        raise ReadError(f"not an image: {one_line(error).partition(': ')[0]}") from None


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
        print0(
            "note: decord is not installed, PyAV reads the videos (pip install decord, or --decoder pyav)"
        )


def one_line(error: Exception) -> str:
    """A library's message without its stack, place and path."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rpartition("] ")[2][:160] or type(error).__name__


def _open_stream(path: str):
    """A PyAV container and its first video stream, decoding on one thread. Raises ReadError."""
    import av
    from av.stream import Disposition

    from data.pyav import open_container

    try:
        container = open_container(path)
    except (av.FFmpegError, ValueError) as error:
        raise ReadError(
            f"not a video: {getattr(error, 'strerror', None) or one_line(error)}"
        ) from None
    moving = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not moving:  # none, or the cover of a piece of music
        container.close()
        raise ReadError("no video stream")
    stream = moving[0]
    if stream.codec_context is None:
        container.close()
        raise ReadError("no decoder for its codec")
    stream.codec_context.thread_count = 1
    return container, stream


class DecordVideo:
    """A video read by decord, which decodes from the last key frame before the wanted frames up to them."""

    def __init__(self, path: str, short_side: int | None, info: VideoInfo):
        """Open the file. Raises ReadError."""
        import decord

        decord.logging.set_level(decord.logging.FATAL)
        self.path, self.short_side, self.info, self.replaced = path, short_side, info, 0
        self.num_frames, self.fps, self.times = info.frames, info.fps, info.times
        width, height = scaled_size(info.width, info.height, short_side) or (-1, -1)
        try:
            self.reader = decord.VideoReader(
                path, ctx=decord.cpu(0), width=width, height=height, num_threads=1
            )
        except (decord.DECORDError, RuntimeError) as error:
            raise ReadError(one_line(error)) from None
        if not len(self.reader):
            raise ReadError("no frames")

    def seek(self, index: int) -> None:
        """Go to the key frame before a frame; `read` does it by itself."""
        self.reader.seek(index)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of non-decreasing frame numbers (T,). Raises ReadError."""
        import decord

        try:
            return self.reader.get_batch(
                np.clip(indices, 0, len(self.reader) - 1).tolist()
            ).asnumpy()
        except (
            decord.DECORDError,
            RuntimeError,
        ):  # damaged, or a width that decord pads and then refuses
            with PyAVVideo(self.path, self.short_side, self.info) as video:
                frames = video.read(indices)
                self.replaced += video.replaced
                return frames

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the reader and its threads."""
        self.reader = None


class PyAVVideo:
    """A video read by PyAV: only the wanted frames, and what these depend on, are decoded.

    A group of pictures (key frame to key frame) without a wanted frame is not even read where the file has a table of its
    packets (MP4, MOV). In the other groups the frames that no other frame refers to are skipped unless wanted, where the
    decoder does that rightly. Files without usable time stamps are decoded from the start and counted.

    num_frames: frames that a player shows; fps: their mean rate; times (num_frames,): when they are shown, in seconds, where
    the rate is not constant; replaced: frames so far that could not be decoded and are another one's picture; decoded: frames
    that came out of the decoder, for tests and benchmarks.
    """

    def __init__(self, path: str, short_side: int | None, info: VideoInfo | None = None):
        """Open the file. Raises ReadError."""
        from av.video.reformatter import VideoReformatter

        from data.packets import NoPackets, Packets
        from data.pyav import to_rgb

        self.to_rgb, self.reformatter = to_rgb, VideoReformatter()
        self.short_side, self.rotation, self.decoded, self.replaced = short_side, 0, 0, 0
        self.reason, self.spare = (
            "",
            MOST_PACKETS,
        )  # why a picture could not be converted; packets to spend on further tries
        self.container, self.stream = _open_stream(path)
        context = self.stream.codec_context
        self.size = square_size(
            context.width, context.height, self.stream.sample_aspect_ratio
        )  # before it is turned upright
        try:
            self.packets = Packets(self.container, self.stream)
            self.by_count = self.packets.count_from_the_start()
            if info:
                self.packets.unseen, self.num_frames, self.fps, self.times = (
                    info.unseen,
                    info.frames,
                    info.fps,
                    info.times,
                )
            else:
                self._survey()
        except NoPackets:
            self.container.close()
            raise ReadError("no frames") from None
        except BaseException:
            self.container.close()
            raise

    def _survey(self) -> None:
        """Find out what the file shows, and when."""
        packets = self.packets
        if not self.by_count and not packets.starts_clean():
            packets.unseen = self._unseen_frames()
        self.num_frames = self._count_all() if self.by_count else packets.num_frames
        self.fps, self.times = self._rate()

    def _rate(self) -> tuple[float, np.ndarray | None]:
        """The mean rate, and when each frame is shown if that is not steady.

        Of a file with a table the stamps of decoding are looked at first: if they are steady, so are those of display.
        """
        claimed = float(self.stream.average_rate or 0)
        tick, packets = float(self.stream.time_base), self.packets
        if self.by_count and self.stream.duration:
            mean = self.num_frames / (self.stream.duration * tick)
            claimed = (
                claimed if abs(claimed / mean - 1) < 0.01 else mean
            )  # AVI may claim the rate of empty packets
        likely = claimed if 0 < claimed <= HIGHEST_FPS else 30.0
        if self.by_count or self.num_frames < 3:
            return likely, None
        times = None
        if packets.all is not None or not is_steady(packets.stamps * tick, tick):
            times = packets.times()
        stamps = packets.stamps * tick if times is None else times
        if not stamps[-1] > stamps[0]:
            return likely, None
        fps = float((len(stamps) - 1) / (stamps[-1] - stamps[0]))
        if abs(claimed / fps - 1) < 0.01:  # says the same, without the rounding of the stamps
            fps = claimed
        return fps, None if times is None or is_steady(times, tick) else times

    def _unseen_frames(self) -> int:
        """How many of the first frames do not come out of the decoder, since they refer to what was cut off."""
        fed = 0
        for group in range(len(self.packets)):
            number = self.packets.numbers(group)
            if number is None or fed > MOST_PACKETS:
                break
            out = []
            for packet in [*self.packets.group(group), None]:
                frames, _ = self._frames(packet)
                out += [
                    number[frame.pts]
                    for frame in frames
                    if frame.pts in number and not frame.is_corrupt
                ]
                fed += 1
                if (
                    out
                    and packet is not None
                    and packet.pts is not None
                    and number.get(packet.pts, -1) > min(out)
                ):
                    break
            self.stream.codec_context.flush_buffers()
            if out:
                return min(out)
        return 0

    def frames_in_file(self) -> int:
        """How many frames the file really holds: fewer than its table lists where it was cut short."""
        if self.by_count or self.packets.all is not None:
            return self.num_frames
        for group in reversed(range(len(self.packets))):
            number = self.packets.numbers(group)
            if number:
                return max(number.values()) + 1
            if number is None:
                break
        return self.num_frames

    def decord_reads(self) -> bool:
        """Whether decord gives the right frames of this file, as far as is known: see docs/decoders.md."""
        from data.pyav import VERSION

        packets, context = self.packets, self.stream.codec_context
        familiar = context.name in (
            "h264",
            "hevc",
            "vp8",
            "vp9",
        ) and self.container.format.name.split(",")[0] in ("mov", "matroska")
        if VERSION < 17 and self.container.format.name.startswith("mov"):
            return False  # PyAV 16 does not show a table of packets that would mislead decord
        if self.stream is not self.container.streams.video[0]:
            return False  # the first is a cover, which decord may take
        if (
            not familiar
            or self.by_count
            or packets.table_misleads
            or packets.unseen
            or packets.shown < packets.ends[-1]
        ):
            return False
        if (
            context.pix_fmt == "yuv444p"
            or (context.width, context.height) != self.size
            or self.orientation not in UPRIGHT_BY_DECORD
        ):
            return False
        if self.orientation != UPRIGHT and self.container.format.name.startswith("matroska"):
            return False
        return packets.groups_are_closed()

    def seek(self, index: int) -> None:
        """Read the packets of a frame's group of pictures; `read` does it by itself."""
        self.packets.group(self.packets.group_of(index))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of non-decreasing frame numbers (T,). Raises ReadError.

        A frame that cannot be decoded is replaced by the nearest one before it, or else after it, and counted in `replaced`.
        """
        indices = np.clip(indices, 0, self.num_frames - 1)
        wanted = sorted({int(index) for index in indices})
        found = None if self.by_count else self._selected(wanted)
        found = self._counted(wanted) if found is None else found
        if not found:
            raise ReadError(self.reason or "none of the wanted frames can be decoded")
        self.replaced += sum(int(index) not in found for index in indices)
        have = np.array(sorted(found))
        nearest = have[np.maximum(np.searchsorted(have, indices, side="right") - 1, 0)]
        return np.stack([found[int(index)] for index in nearest])

    def _selected(self, wanted: list[int]) -> dict[int, np.ndarray] | None:
        """Decode by time stamps: {frame number: picture}, or None if the stamps are of no use."""
        found: dict[int, np.ndarray] = {}
        codec = self.stream.codec_context
        if (
            codec.pix_fmt == "yuv444p" and codec.name == "h264"
        ):  # of an old x264: decoded rightly only after its signature
            self._frames(self.packets.group(0)[0])
            codec.flush_buffers()
        for group in sorted({self.packets.group_of(index) for index in wanted}):
            number = self.packets.numbers(group)
            if number is None:
                return None
            self._read_group(
                group, {stamp: index for stamp, index in number.items() if index in wanted}, found
            )
        return found

    def _read_group(self, group: int, number: dict[int, int], found: dict[int, np.ndarray]) -> None:
        """Decode the wanted frames {time stamp: frame number} of a group.

        What does not come out, or incomplete, is tried again from earlier key frames: it may be shown before its own (open
        groups), or what is called a key frame only begins a refresh. What is incomplete then is damaged, and taken as it is.
        """
        packets = self.packets.group(group)
        back, skip = 0, self.stream.codec_context.name in SKIPS_EXACTLY
        if group and any(stamp < (packets[0].pts or 0) for stamp in number):
            packets, back = self.packets.group(group - 1) + packets, 1
        while number:
            last = back == group or self.spare <= 0
            self._run(packets, number, skip, found, incomplete=last)
            number = {stamp: index for stamp, index in number.items() if index not in found}
            if not number or last or self.reason:
                return
            for further in range(back + 1, min(max(4 * back, 1), group) + 1):
                packets, back = self.packets.group(group - further) + packets, further
                if len(packets) >= self.spare:
                    break
            self.spare -= len(packets)
            skip = False

    def _run(
        self,
        packets: list,
        number: dict[int, int],
        skip: bool,
        found: dict[int, np.ndarray],
        incomplete: bool,
    ) -> None:
        """Decode packets up to the last one that is wanted, and keep the wanted pictures.

        skip: leave out what nothing refers to. incomplete: keep pictures too of which parts are missing.
        """
        codec, whole = (
            self.stream.codec_context,
            True,
        )  # whole: nothing decoded so far was damaged, or refers to what was
        last = max(
            (place for place, packet in enumerate(packets) if packet.pts in number), default=-1
        )
        for packet in [*packets[: last + 1], None]:  # None: drain
            if skip:
                codec.skip_frame = "DEFAULT" if packet is None or packet.pts in number else "NONREF"
            frames, intact = self._frames(packet)
            for frame in frames:
                whole = whole and not frame.is_corrupt
                if frame.pts in number and (whole or incomplete):
                    self._convert(frame, number[frame.pts], found)
            whole = whole and intact
        codec.flush_buffers()

    def _frames(self, packet) -> tuple[list, bool]:
        """What comes out of the decoder for a packet (None: what it still holds), and whether the packet was intact."""
        import av

        try:
            frames = self.stream.codec_context.decode(packet)
        except (av.FFmpegError, ValueError):
            return [], False
        self.decoded += len(frames)
        return frames, True

    def _convert(self, frame, index: int, found: dict[int, np.ndarray]) -> None:
        """Keep a decoded frame as picture `index`, or the reason why it cannot be converted."""
        try:
            found[index] = self._picture(frame)
        except (OSError, ValueError) as error:  # FFmpeg's errors are both
            self.reason = f"its pictures ({frame.format.name}, color space {int(frame.colorspace)}) cannot be converted to RGB: {one_line(error)}"

    def _counted(self, wanted: list[int]) -> dict[int, np.ndarray]:
        """Decode from the start and count: {frame number: picture}."""
        found, count, targets = {}, -self.packets.unseen, set(wanted)
        for packet in self._all_packets():
            for frame in self._frames(packet)[0]:
                if count in targets:
                    self._convert(frame, count, found)
                count += 1
            if count > wanted[-1]:
                break
        self.stream.codec_context.flush_buffers()
        return found

    def _count_all(self) -> int:
        """How many frames come out of the decoder."""
        count = sum(len(self._frames(packet)[0]) for packet in self._all_packets())
        self.stream.codec_context.flush_buffers()
        return count

    def _all_packets(self) -> list:
        """Every packet of the file, and None."""
        return [
            packet for group in range(len(self.packets)) for packet in self.packets.group(group)
        ] + [None]

    def _picture(self, frame) -> np.ndarray:
        """A decoded frame as (H, W, 3) uint8 RGB: upright, with square pixels, reduced; all of the size of the file's first."""
        if int(frame.colorspace) == YCGCO:
            raise ValueError("YCgCo is not supported")  # PyAV 16 would take it for another
        width, height = scaled_size(*self.size, self.short_side) or self.size
        picture = self.to_rgb(self.reformatter, frame, width, height)
        self.rotation = frame.rotation
        self.orientation = orientation(frame)
        return upright(picture, self.orientation)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.container.close()


def is_steady(times: np.ndarray, tick: float) -> bool:
    """Whether times (seconds) lie within a tick of a regular grid."""
    if len(times) < 3:
        return True
    grid = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - grid).max() <= tick * 1.001)


def orientation(frame) -> tuple[int, int, int, int]:
    """The signs (a, b, c, d) of a frame's display matrix, by which a pixel (x, y) is shown at (a x + c y, b x + d y).

    Multiples of 90 degrees and mirrored ones are meant; others count as the nearest of these.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    matrix = np.frombuffer(bytes(data), dtype="<i4" if sys.byteorder == "little" else ">i4")
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def upright(picture: np.ndarray, signs: tuple[int, int, int, int]) -> np.ndarray:
    """A picture (H, W, 3) as its display matrix shows it, see `orientation`."""
    a, b, c, d = signs
    if b:  # x becomes y
        picture, across, down = picture.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return picture[::down, ::across]
