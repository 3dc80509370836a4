"""Write videos whose frames show their own number, in many codecs, containers and structures.

Only PyAV is needed. `write_case` makes the file of a `Case`; tests/video_matrix.py lists the cases.
"""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "1")  # errors only

COLUMNS = 8
BITS = 12
COLORS = (
    (220, 30, 30),
    (30, 200, 30),
    (30, 30, 220),
    (210, 210, 30),
    (210, 30, 210),
    (30, 200, 200),
)
LUMA = {  # weights of red and of blue
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}
TAGS = {"bt601": 6, "bt709": 1, "bt2020": 9}  # AVColorSpace; the same for primaries
JPEG_RANGE = 2  # AVColorRange of full range
ORIENTATIONS = {  # display matrix (a, b, c, d): a pixel (x, y) is shown at (ax + cy, bx + dy)
    "upright": (1, 0, 0, 1),
    "turned 90": (0, 1, -1, 0),  # clockwise
    "turned 180": (-1, 0, 0, -1),
    "turned 270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "flipped": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transversed": (0, -1, -1, 0),
}
FAST = {
    "libx264": {"preset": "veryfast", "x264-params": "scenecut=0:b-adapt=0:threads=1"},
    "libx265": {
        "preset": "veryfast",
        "x265-params": "scenecut=0:b-adapt=0:pools=none:log-level=none",
    },
    "libvpx": {"deadline": "good", "cpu-used": "5", "crf": "20", "b": "2M"},
    "libvpx-vp9": {"deadline": "good", "cpu-used": "6", "crf": "30", "b": "0"},
    "libaom-av1": {"cpu-used": "8", "crf": "30", "b": "0"},
    "libsvtav1": {"preset": "8", "crf": "20", "svtav1-params": "scd=0:lp=1"},
    "mpeg4": {"qmin": "3", "qmax": "5", "sc_threshold": "1000000000"},
    "mpeg2video": {"qmin": "3", "qmax": "5", "sc_threshold": "1000000000"},
    "h263": {"qmin": "3", "qmax": "5"},
    "mjpeg": {"qmin": "3", "qmax": "5"},
}
SAMPLE_RATE = 48000  # of the audio stream
SAMPLES_PER_FRAME = 1024


class NoEncoder(Exception):
    """This PyAV cannot write the case; the message is the reason."""


class Encoding(NamedTuple):
    """How frames are encoded. The frame with index i shows the number first + i."""

    encoder: str = "libx264"
    frames: int = 48
    size: tuple[int, int] = (96, 64)  # as stored: width, height
    rate: Fraction = Fraction(30)  # frames per second
    gop: int = 12
    b_frames: int = 2
    params: str = ""  # added to x264-params or x265-params
    options: tuple[tuple[str, str], ...] = ()  # of the encoder
    pix_fmt: str = "yuv420p"
    colors: str = ""  # bt601, bt709 or bt2020; if empty, bt601 without a tag
    full_range: bool = False
    aspect: Fraction = Fraction(1)  # of a pixel, width : height
    orientation: str = "upright"
    first: int = 0
    start: Fraction = Fraction(0)  # display time of the first frame, seconds
    times_ms: tuple[int, ...] = ()  # display times of a variable frame rate, milliseconds
    audio: bool = False  # add a tone as the first stream


class Case(NamedTuple):
    """One file: how it is made, and what a player shows of it."""

    name: str  # with the suffix of its container
    description: str  # its structure and what players do with it, one line
    encoding: Encoding = Encoding()
    make: Callable | None = None  # (case, path); None: encode straight into the container
    muxer: tuple[tuple[str, str], ...] = ()  # options of the container
    shown: tuple[int, ...] | None = None  # numbers in display order; None: all
    # Seconds after the first shown frame; None: evenly, by the rate.
    times: tuple[float, ...] | None = None
    has_times: bool = True  # the container stores display times

    @property
    def numbers(self) -> list[int]:
        """The numbers that the frames show, in display order."""
        if self.shown:
            return list(self.shown)
        first = self.encoding.first
        return list(range(first, first + self.encoding.frames))

    @property
    def seconds(self) -> list[float]:
        """The display time of each frame, after the first one."""
        if self.times is not None:
            return list(self.times)
        times_ms = self.encoding.times_ms
        if times_ms:
            return [(time - times_ms[0]) / 1000 for time in times_ms]
        return [index / float(self.encoding.rate) for index in range(len(self.numbers))]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as shown, with square pixels; no side grows."""
        width, height = self.encoding.size
        aspect = self.encoding.aspect
        width = round(width * min(aspect, 1))
        height = round(height / max(aspect, 1))
        if is_transposed(self.encoding.orientation):
            return height, width
        return width, height


def is_transposed(orientation: str) -> bool:
    """Return whether an orientation swaps width and height."""
    return ORIENTATIONS[orientation][0] == 0


# Frames that show their number


def _check_bits(number: int) -> int:
    """Return four bits that separate a number from a blend of two, all black and all white."""
    return (number ^ number >> 4 ^ number >> 8 ^ 0b1010) & 15


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """Draw (H, W, 3) float RGB: the number in 16 blocks, a moving gradient, six colors."""
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height) + 0.5) / height
    code = number | _check_bits(number) << BITS
    bits = np.array([code >> bit & 1 for bit in range(2 * COLUMNS)]).reshape(2, COLUMNS)
    picture = np.zeros((height, width, 3))
    picture[:] = ((np.arange(width) * 3 + number * 2) % 256)[None, :, None]
    columns = (x * COLUMNS).astype(int)
    for row in range(2):
        picture[(y * 4).astype(int) == row] = 255 * bits[row][columns][:, None]
    patches = (x * len(COLORS)).astype(int)
    picture[y >= 0.75] = np.array(COLORS)[patches]
    return picture


def block_means(picture: np.ndarray, top: float, bottom: float, columns: int) -> np.ndarray:
    """Return the mean colors (columns, 3) of the middles of blocks between two heights (0 to 1)."""
    height, width = picture.shape[:2]
    margin = (bottom - top) * 0.3
    first_row = round((top + margin) * height)
    end_row = max(round((bottom - margin) * height), 1)
    rows = picture[first_row:end_row]
    means = []
    for column in range(columns):
        left = round((column + 0.3) / columns * width)
        right = max(round((column + 0.7) / columns * width), left + 1)
        means.append(rows[:, left:right].mean((0, 1)))
    return np.stack(means)


def number_of(picture: np.ndarray) -> int | None:
    """Return the number that a (H, W, 3) picture shows; None if it shows none, or a blend."""
    rows = [block_means(picture, row / 4, (row + 1) / 4, COLUMNS) for row in range(2)]
    levels = np.concatenate(rows).mean(1)
    if ((levels > 80) & (levels < 175)).any():
        return None
    code = sum(1 << bit for bit, level in enumerate(levels) if level > 127)
    number = code & (1 << BITS) - 1
    if code >> BITS != _check_bits(number):
        return None
    return number


def colors_of(picture: np.ndarray) -> np.ndarray:
    """Return the mean colors (6, 3) of the patches of a picture."""
    return block_means(picture, 0.75, 1, len(COLORS))


def apply_matrix(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Return a stored picture as a display matrix shows it."""
    a, b, c, d = (int(np.sign(value)) for value in matrix)
    if a == 0:
        return picture.swapaxes(0, 1)[::b, ::c]
    return picture[::d, ::a]


def invert_orientation(picture: np.ndarray, orientation: str) -> np.ndarray:
    """Return the picture to store so that it is shown upright."""
    a, b, c, d = ORIENTATIONS[orientation]
    return apply_matrix(picture, (a, c, b, d))  # the inverse of an orthogonal matrix: transposed


def to_frame(picture: np.ndarray, encoding: Encoding) -> av.VideoFrame:
    """Convert (H, W, 3) RGB to a frame of the encoding's pixel format.

    Source of the formulas: BT.601, BT.709 and BT.2020.
    """
    red_weight, blue_weight = LUMA[encoding.colors or "bt601"]
    r, g, b = np.moveaxis(picture / 255, -1, 0)
    y = red_weight * r + (1 - red_weight - blue_weight) * g + blue_weight * b
    cb = (b - y) / (2 - 2 * blue_weight)
    cr = (r - y) / (2 - 2 * red_weight)
    if encoding.full_range:
        levels = [y * 255, cb * 255 + 128, cr * 255 + 128]
    else:
        levels = [y * 219 + 16, cb * 224 + 128, cr * 224 + 128]
    width, height = encoding.size
    frame = av.VideoFrame(width, height, encoding.pix_fmt)
    depth = frame.format.components[0].bits
    for plane, values in zip(frame.planes, levels, strict=True):
        _write_plane(plane, _subsample(values, plane.width, plane.height), depth)
    return frame


def _write_plane(plane, values: np.ndarray, depth: int) -> None:
    """Write 8-bit levels (H, W) into a plane of `depth` bits."""
    levels = np.clip(np.rint(values * 2 ** (depth - 8)), 0, 2**depth - 1)
    dtype = "<u2" if depth > 8 else "u1"
    level_bytes = np.ascontiguousarray(levels.astype(dtype)).view(np.uint8)
    rows = np.zeros((plane.height, plane.line_size), np.uint8)
    rows[:, : level_bytes.shape[1]] = level_bytes
    plane.update(rows.tobytes())


def _subsample(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average blocks so that (H, W) becomes (height, width); repeat the last row and column."""
    block_height = -(-values.shape[0] // height)
    block_width = -(-values.shape[1] // width)
    more_rows = height * block_height - values.shape[0]
    more_columns = width * block_width - values.shape[1]
    values = np.pad(values, ((0, more_rows), (0, more_columns)), mode="edge")
    return values.reshape(height, block_height, width, block_width).mean((1, 3))


# Encoding


def _encoder_options(encoding: Encoding) -> dict[str, str]:
    """Return the encoder's options: fast settings, those of the case, and private parameters."""
    options = {**FAST.get(encoding.encoder, {}), **dict(encoding.options)}
    if encoding.params:
        private = next(key for key in options if key.endswith("-params"))
        options[private] += ":" + encoding.params
    return options


def _add_stream(container, encoding: Encoding):
    """Add a video stream with the encoding's settings. Raises NoEncoder."""
    try:
        stream = container.add_stream(
            encoding.encoder, rate=encoding.rate, options=_encoder_options(encoding)
        )
    except (ValueError, av.FFmpegError) as error:
        raise NoEncoder(f"no encoder {encoding.encoder}: {error}") from None
    stream.width, stream.height = encoding.size
    stream.pix_fmt = encoding.pix_fmt
    context = stream.codec_context
    context.gop_size = encoding.gop
    context.max_b_frames = encoding.b_frames
    context.time_base = 1 / encoding.rate
    if encoding.times_ms:
        context.time_base = Fraction(1, 1000)
    if encoding.aspect != 1:
        context.sample_aspect_ratio = encoding.aspect
    if encoding.full_range:
        context.color_range = JPEG_RANGE
    if encoding.colors:
        context.colorspace = TAGS[encoding.colors]
        context.color_primaries = TAGS[encoding.colors]
        context.color_trc = 1
    return stream


def _frames(encoding: Encoding, time_base: Fraction):
    """Yield all frames of an encoding, with time stamps."""
    width, height = encoding.size
    if is_transposed(encoding.orientation):
        width, height = height, width
    for index in range(encoding.frames):
        picture = numbered_picture(encoding.first + index, width, height)
        frame = to_frame(invert_orientation(picture, encoding.orientation), encoding)
        time = index / encoding.rate
        if encoding.times_ms:
            time = Fraction(encoding.times_ms[index], 1000)
        frame.pts = round((time + encoding.start) / time_base)
        frame.time_base = time_base
        if encoding.full_range:
            frame.color_range = JPEG_RANGE
        if encoding.colors:
            frame.colorspace = TAGS[encoding.colors]
        yield frame


@contextlib.contextmanager
def kept_scheduling() -> Iterator[None]:
    """Restore how the system schedules this process: SVT-AV1 makes one of root real-time.

    Everything else on the machine would starve beside it.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy = os.sched_getscheduler(0)
    parameters = os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def encode(encoding: Encoding, path: Path, muxer: tuple[tuple[str, str], ...] = ()) -> None:
    """Encode numbered frames into a container. Raises NoEncoder."""
    try:
        with kept_scheduling(), av.open(str(path), "w", options=dict(muxer)) as container:
            tone = None
            if encoding.audio:
                tone = container.add_stream("aac", rate=SAMPLE_RATE)
            stream = _add_stream(container, encoding)
            if tone is not None:
                _write_tone(container, tone, encoding.frames / encoding.rate)
            for frame in _frames(encoding, stream.codec_context.time_base):
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise NoEncoder(f"{encoding.encoder} with {encoding.pix_fmt}: {error}") from None
    if encoding.orientation != "upright":
        _patch_matrix(path, ORIENTATIONS[encoding.orientation])


def _write_tone(container, stream, seconds: Fraction) -> None:
    """Write a tone to an audio stream; the container interleaves it with the video."""
    wave = np.sin(np.arange(SAMPLES_PER_FRAME) * 0.05)[None].astype(np.float32).repeat(2, 0)
    for index in range(int(seconds * SAMPLE_RATE / SAMPLES_PER_FRAME)):
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = index * SAMPLES_PER_FRAME
        frame.time_base = Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_case(case: Case, folder: Path) -> Path:
    """Write the file of a case into a folder, unless it exists. Raises NoEncoder."""
    path = Path(folder) / case.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if case.make:
            case.make(case, path)
        else:
            encode(case.encoding, path, case.muxer)
    return path


# Changes to the boxes of MP4


def _patch_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into the track header (tkhd) of an MP4 or MOV file."""
    a, b, c, d = (value << 16 for value in matrix)  # fixed point 16.16
    data = bytearray(path.read_bytes())
    offset = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    data[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_edited(case: Case, path: Path, edits: tuple[tuple[int, int], ...]) -> None:
    """Encode MP4 and replace its edit list: each edit (first, end) shows frames first to end - 1.

    The boxes are at the end of the file, so they may grow.
    """
    encode(case.encoding, path, case.muxer)
    data = bytearray(path.read_bytes())
    offset = data.index(b"elst") - 4
    (origin,) = struct.unpack(">i", data[offset + 20 : offset + 24])  # media time of frame 0
    with av.open(str(path)) as container:
        tick = container.streams.video[0].time_base
    entries = b""
    for first, end in edits:
        duration_ms = round((end - first) / case.encoding.rate * 1000)
        media_time = origin + round(first / case.encoding.rate / tick)
        entries += struct.pack(">iii", duration_ms, media_time, 1 << 16)
    for name in (b"elst", b"edts", b"trak", b"moov"):
        _grow_box(data, name, len(entries) - 12)
    data[offset + 12 : offset + 28] = struct.pack(">i", len(edits)) + entries
    path.write_bytes(data)


def _grow_box(data: bytearray, name: bytes, more: int) -> None:
    """Add to the size in the header of an MP4 box."""
    offset = data.index(name) - 4
    (size,) = struct.unpack(">i", data[offset : offset + 4])
    data[offset : offset + 4] = struct.pack(">i", size + more)


def write_without_key_table(case: Case, path: Path) -> None:
    """Encode MP4 and hide its table of keyframes (stss), so that each packet counts as one."""
    encode(case.encoding, path, case.muxer)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))


# Copies and cuts


class Part(NamedTuple):
    """Packets to copy: from one with index `skip` after a keyframe on, shifted in time."""

    source: Path
    keyframe: int = 0  # index among the keyframes
    skip: int = 0  # packets to leave out
    shift: Fraction = Fraction(0)  # seconds


def video_packets(container) -> list:
    """Return the packets of the first video stream, without empty ones."""
    return [packet for packet in container.demux(video=0) if packet.size]


def copy_packets(parts: list[Part], path: Path, muxer: tuple[tuple[str, str], ...] = ()) -> None:
    """Copy the video packets of files into one container, without encoding them again."""
    inputs = [av.open(str(part.source)) for part in parts]
    with av.open(str(path), "w", options=dict(muxer)) as output:
        stream = output.add_stream_from_template(inputs[0].streams.video[0], opaque=True)
        for part, source in zip(parts, inputs, strict=True):
            packets = video_packets(source)
            keyframes = [index for index, packet in enumerate(packets) if packet.is_keyframe]
            for packet in packets[keyframes[part.keyframe] + part.skip :]:
                shift = round(part.shift / packet.time_base)
                packet.pts += shift
                packet.dts += shift
                packet.stream = stream
                output.mux(packet)
    for source in inputs:
        source.close()


def write_cut(case: Case, path: Path, first: int, keyframe: int, suffix: str = ".mp4") -> None:
    """Copy from a keyframe on, with time 0 at frame `first`: `ffmpeg -ss X -i in -c copy out`."""
    whole = path.with_name("whole_" + path.stem + suffix)
    encode(case.encoding, whole)
    copy_packets([Part(whole, keyframe, shift=-first / case.encoding.rate)], path, case.muxer)
    whole.unlink()


def write_copied(case: Case, path: Path, suffix: str, skip: int = 0) -> None:
    """Copy the packets of a file of another container, all but the first `skip`."""
    whole = path.with_name("whole_" + path.stem + suffix)
    encode(case.encoding, whole)
    copy_packets([Part(whole, skip=skip)], path, case.muxer)
    whole.unlink()


def write_joined(case: Case, path: Path, size: tuple[int, int], suffix: str) -> None:
    """Copy two encodes into one file; the second is numbered from 1000.

    suffix: of the container in between.
    """
    encoding = case.encoding
    first = path.with_name(f"part_0_{path.stem}{suffix}")
    second = path.with_name(f"part_1_{path.stem}{suffix}")
    encode(encoding, first)
    encode(encoding._replace(size=size, first=1000), second)
    duration = encoding.frames / encoding.rate
    copy_packets([Part(first), Part(second, shift=duration)], path, case.muxer)
    first.unlink()
    second.unlink()


def write_bytes_joined(case: Case, path: Path) -> None:
    """Join the bytes of two files (`cat a.ts b.ts`): time stamps restart in the middle."""
    first = path.with_name(f"part_0_{path.name}")
    second = path.with_name(f"part_1_{path.name}")
    encode(case.encoding, first, case.muxer)
    encode(case.encoding._replace(first=1000), second, case.muxer)
    path.write_bytes(first.read_bytes() + second.read_bytes())
    first.unlink()
    second.unlink()


def write_without_start(case: Case, path: Path, packets: int) -> None:
    """Leave out the first packets of MPEG-TS, as in a recording that starts inside a GOP."""
    encode(case.encoding, path, case.muxer)
    with av.open(str(path)) as container:
        offsets = [packet.pos for packet in video_packets(container)]
    data = path.read_bytes()
    program_tables = data[: 188 * 3]
    path.write_bytes(program_tables + data[offsets[packets] :])


# Changes to the data of packets


def write_rewritten(case: Case, path: Path, change: Callable) -> None:
    """Encode, then change packets.

    change: maps the data of all packets, and the GOP length, to pairs (data, index of the packet
    whose time stamps it gets).
    """
    whole = path.with_name("whole_" + path.name)
    encode(case.encoding, whole)
    with av.open(str(whole)) as source, av.open(str(path), "w", options=dict(case.muxer)) as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = video_packets(source)
        for data, index in change([bytes(packet) for packet in packets], case.encoding.gop):
            original = packets[index]
            packet = av.Packet(data)
            packet.stream = stream
            packet.time_base = original.time_base
            packet.dts = original.dts
            packet.duration = original.duration
            packet.pts = original.pts
            if case.name.endswith(".avi"):
                packet.pts = original.dts
            packet.is_keyframe = _is_key(data, case.encoding.encoder)
            output.mux(packet)
    whole.unlink()


def _is_key(data: bytes, encoder: str) -> bool:
    """Return whether a packet of VP8, VP9 or MPEG-4 starts with a keyframe."""
    if encoder == "mpeg4":
        vop_header = data[data.index(b"\0\0\1\xb6") + 4]
        return vop_header >> 6 == 0
    inter_frame_bits = 1 if encoder == "libvpx" else 0b1100
    return not data[0] & inter_frame_bits


def hide_vp8(packets: list[bytes], gop: int) -> list[tuple[bytes, int]]:
    """Hide the fourth packet of each GOP, like an alternate reference (RFC 6386, 9.1)."""
    changed = []
    for index, data in enumerate(packets):
        if index % gop == 3:
            data = bytes([data[0] & ~16]) + data[1:]  # clears show_frame
        changed.append((data, index))
    return changed


def hide_vp9(
    packets: list[bytes], gop: int, joined: bool = False, later: int = 0
) -> list[tuple[bytes, int]]:
    """Clear the show bit of each keyframe but the first.

    joined: put each hidden frame into a superframe with the next frame (VP9 specification,
    annex B).
    later: show it after that many frames, which move up. A packet of one byte does this: it
    refers to reference 7, which libvpx's inter frames do not overwrite.
    """
    changed = []
    hidden = b""
    for index, data in enumerate(packets):
        after_keyframe = index % gop
        if index < gop:
            after_keyframe = gop  # the first GOP does not change
        if after_keyframe == 0:
            hidden = bytes([data[0] & ~2]) + data[1:]
            if not joined:
                changed.append((hidden, index))
            continue
        if joined and after_keyframe == 1:
            sizes = len(hidden).to_bytes(2, "little") + len(data).to_bytes(2, "little")
            data = hidden + data + b"\xc9" + sizes + b"\xc9"
        time_index = index
        if after_keyframe <= later:
            time_index = index - 1
        changed.append((data, time_index))
        if after_keyframe == later:
            show_existing_frame = bytes([0b10001111])
            changed.append((show_existing_frame, index))
    return changed


def pack_mpeg4(packets: list[bytes], gop: int) -> list[tuple[bytes, int]]:
    """Pack each B-frame into the packet before it, as DivX 5 did; an empty packet replaces it.

    User data announces this to decoders.
    """
    packed = []
    for index, data in enumerate(packets):
        offset = data.find(b"\0\0\1\xb2")
        if offset >= 0:
            end = data.index(b"\0\0\1", offset + 4)
            data = data[:offset] + b"\0\0\1\xb2DivX503b1393p" + data[end:]
        vop = data.index(b"\0\0\1\xb6") + 4
        is_b_frame = data[vop] >> 6 == 2
        if is_b_frame:
            packed[-1] = packed[-1][0] + data, index - 1
            packed.append((b"\0\0\1\xb6\x51\xfe\x10", index))
        else:
            packed.append((data, index))
    return packed
