"""Write videos each frame of which shows its own number, in many codecs, containers and structures.

Only PyAV is needed. `write_case` makes the file of a `Case`; tests/video_matrix.py lists the cases.
"""

import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "1")  # errors only

COLUMNS, BITS = 8, 12
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


class NoEncoder(Exception):
    """This PyAV cannot write the case; the message is the reason."""


class Encoding(NamedTuple):
    """How frames are encoded. The frame at position i shows the number first + i."""

    encoder: str = "libx264"
    frames: int = 48
    size: tuple[int, int] = (96, 64)  # as stored: width, height
    rate: Fraction = Fraction(30)  # frames a second
    gop: int = 12
    b_frames: int = 2
    params: str = ""  # added to x264-params or x265-params
    options: tuple[tuple[str, str], ...] = ()  # of the encoder
    pix_fmt: str = "yuv420p"
    colors: str = ""  # bt601, bt709 or bt2020; untagged bt601 if empty
    full_range: bool = False
    aspect: Fraction = Fraction(1)  # of a pixel, width : height
    orientation: str = "upright"
    first: int = 0
    start: Fraction = Fraction(0)  # time stamp of the first frame, seconds
    stamps: tuple[int, ...] = ()  # of irregular frames, milliseconds
    audio: bool = False  # a tone beside it, as the first stream


class Case(NamedTuple):
    """One file: how it is made, and what a player shows of it."""

    name: str  # with the suffix of its container
    what: str  # its structure and what players do with it, one line
    encoding: Encoding = Encoding()
    make: Callable | None = None  # (case, path); None: encode straight into the container
    muxer: tuple[tuple[str, str], ...] = ()  # options of the container
    shown: tuple[int, ...] | None = None  # numbers in the order of display; None: all
    times: tuple[float, ...] | None = (
        None  # seconds from the first shown frame; None: evenly, by the rate
    )
    has_times: bool = True  # the container stores when each frame is shown
    shown_size: tuple[int, int] | None = (
        None  # None: of the encoding, turned and with square pixels
    )

    @property
    def numbers(self) -> list[int]:
        """The numbers that the frames show, in the order of display."""
        first = self.encoding.first
        return list(self.shown or range(first, first + self.encoding.frames))

    @property
    def seconds(self) -> list[float]:
        """When each frame is shown, from the first one on."""
        if self.times is None and self.encoding.stamps:
            return [(stamp - self.encoding.stamps[0]) / 1000 for stamp in self.encoding.stamps]
        return list(self.times or (i / float(self.encoding.rate) for i in range(len(self.numbers))))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as shown; the longer side of a pixel that is not square is shrunk."""
        width, height = self.shown_size or self.encoding.size
        aspect = self.encoding.aspect
        size = round(width * min(aspect, 1)), round(height / max(aspect, 1))
        return size[::-1] if ORIENTATIONS[self.encoding.orientation][0] == 0 else size


def _check_bits(number: int) -> int:
    """Four bits that tell a number from a blend of two, and from all black or all white."""
    return (number ^ number >> 4 ^ number >> 8 ^ 0b1010) & 15


def numbered_picture(number: int, width: int, height: int) -> np.ndarray:
    """Draw (H, W, 3) float RGB: the number in 16 blocks, a moving gradient, six colors."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    code = number | _check_bits(number) << BITS
    bits = np.array([code >> bit & 1 for bit in range(2 * COLUMNS)]).reshape(2, COLUMNS)
    picture = np.zeros((height, width, 3))
    picture[:] = ((np.arange(width) * 3 + number * 2) % 256)[None, :, None]
    columns = (x * COLUMNS).astype(int)
    for row in range(2):
        picture[(y * 4).astype(int) == row] = 255 * bits[row][columns][:, None]
    picture[y >= 0.75] = np.array(COLORS)[(x * len(COLORS)).astype(int)]
    return picture


def block_means(picture: np.ndarray, top: float, bottom: float, columns: int) -> np.ndarray:
    """Mean colors (columns, 3) of the middles of the blocks between two heights (0 to 1)."""
    height, width = picture.shape[:2]
    margin = (bottom - top) * 0.3
    rows = picture[round((top + margin) * height) : max(round((bottom - margin) * height), 1)]
    edges = [
        (round((i + 0.3) / columns * width), round((i + 0.7) / columns * width))
        for i in range(columns)
    ]
    return np.stack([rows[:, left : max(right, left + 1)].mean((0, 1)) for left, right in edges])


def number_of(picture: np.ndarray) -> int | None:
    """Read the number that a (H, W, 3) picture shows; None if it shows none, or a blend."""
    blocks = np.concatenate(
        [block_means(picture, row / 4, (row + 1) / 4, COLUMNS) for row in range(2)]
    )
    levels = blocks.mean(1)
    if ((levels > 80) & (levels < 175)).any():
        return None
    code = sum(1 << bit for bit, level in enumerate(levels) if level > 127)
    number = code & (1 << BITS) - 1
    return number if code >> BITS == _check_bits(number) else None


def colors_of(picture: np.ndarray) -> np.ndarray:
    """Mean colors (6, 3) of the patches of a picture."""
    return block_means(picture, 0.75, 1, len(COLORS))


def oriented(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Show a stored picture as a display matrix says."""
    a, b, c, d = (int(np.sign(value)) for value in matrix)
    if a == 0:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::d, ::a]


def stored(picture: np.ndarray, orientation: str) -> np.ndarray:
    """The picture to store so that it is shown upright: the inverse of `oriented`."""
    a, b, c, d = ORIENTATIONS[orientation]
    return oriented(picture, (a, c, b, d))  # of orthogonal matrices the inverse is the transpose


def to_frame(picture: np.ndarray, encoding: Encoding) -> av.VideoFrame:
    """Convert (H, W, 3) RGB to a frame of the encoding's pixel format.

    The formulas are those of BT.601, BT.709 and BT.2020, not of a library.
    """
    red, blue = LUMA[encoding.colors or "bt601"]
    r, g, b = np.moveaxis(picture / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    frame = av.VideoFrame(encoding.size[0], encoding.size[1], encoding.pix_fmt)
    depth = frame.format.components[0].bits
    scales = (255, 255, 0) if encoding.full_range else (219, 224, 16)
    planes = [y * scales[0] + scales[2], *(plane * scales[1] + 128 for plane in chroma)]
    for plane, values in zip(frame.planes, planes, strict=True):
        _fill(plane, _subsampled(values, plane.width, plane.height), depth)
    return frame


def _fill(plane, values: np.ndarray, depth: int) -> None:
    """Write 8-bit levels (H, W) into a plane of `depth` bits."""
    values = np.clip(np.rint(values * 2 ** (depth - 8)), 0, 2**depth - 1)
    values = np.ascontiguousarray(values.astype("<u2" if depth > 8 else "u1")).view(np.uint8)
    rows = np.zeros((plane.height, plane.line_size), np.uint8)
    rows[:, : values.shape[1]] = values
    plane.update(rows.tobytes())


def _subsampled(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average blocks so that (H, W) becomes (height, width); repeat the last row and column."""
    down, across = -(-values.shape[0] // height), -(-values.shape[1] // width)
    spare = height * down - values.shape[0], width * across - values.shape[1]
    values = np.pad(values, ((0, spare[0]), (0, spare[1])), mode="edge")
    return values.reshape(height, down, width, across).mean((1, 3))


def _encoder_options(encoding: Encoding) -> dict[str, str]:
    """Options of the encoder: fast settings, those of the case, and private parameters joined."""
    options = {**FAST.get(encoding.encoder, {}), **dict(encoding.options)}
    private = next((key for key in options if key.endswith("-params")), None)
    if encoding.params:
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
    context = stream.codec_context
    stream.width, stream.height, stream.pix_fmt = *encoding.size, encoding.pix_fmt
    context.gop_size, context.max_b_frames = encoding.gop, encoding.b_frames
    context.time_base = Fraction(1, 1000) if encoding.stamps else 1 / encoding.rate
    if encoding.aspect != 1:
        context.sample_aspect_ratio = encoding.aspect
    if encoding.full_range:
        context.color_range = 2
    if encoding.colors:
        tag = TAGS[encoding.colors]
        context.colorspace, context.color_primaries, context.color_trc = tag, tag, 1
    return stream


def _frames(encoding: Encoding, time_base: Fraction):
    """All frames of an encoding, stamped."""
    transposed = ORIENTATIONS[encoding.orientation][0] == 0
    width, height = encoding.size[::-1] if transposed else encoding.size
    for i in range(encoding.frames):
        picture = numbered_picture(encoding.first + i, width, height)
        frame = to_frame(stored(picture, encoding.orientation), encoding)
        at = Fraction(encoding.stamps[i], 1000) if encoding.stamps else i / encoding.rate
        frame.pts, frame.time_base = round((at + encoding.start) / time_base), time_base
        if encoding.full_range:
            frame.color_range = 2
        if encoding.colors:
            frame.colorspace = TAGS[encoding.colors]
        yield frame


def encode(encoding: Encoding, path: Path, muxer: tuple[tuple[str, str], ...] = ()) -> None:
    """Encode numbered frames into a container. Raises NoEncoder."""
    try:
        with av.open(str(path), "w", options=dict(muxer)) as container:
            tone = container.add_stream("aac", rate=48000) if encoding.audio else None
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
    for i in range(int(seconds * 48000 / 1024)):
        wave = np.sin(np.arange(1024) * 0.05)[None].astype(np.float32).repeat(2, 0)
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, i * 1024, Fraction(1, 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _patch_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into the track header (tkhd) of an MP4 or MOV file."""
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_edited(case: Case, path: Path, edits: tuple[tuple[int, int], ...]) -> None:
    """Encode MP4 and replace its edit list: each edit shows frames `first` up to `end`."""
    encode(case.encoding, path, case.muxer)
    data = bytearray(path.read_bytes())  # the tables are at its end, so they may grow
    at = data.index(b"elst") - 4
    (origin,) = struct.unpack(">i", data[at + 20 : at + 24])  # media time of the first frame
    with av.open(str(path)) as container:
        tick = container.streams.video[0].time_base
    entries = b""
    for first, end in edits:
        shown = round(
            (end - first) / case.encoding.rate * 1000
        )  # of the movie's clock: milliseconds
        entries += struct.pack(
            ">iii", shown, origin + round(first / case.encoding.rate / tick), 1 << 16
        )
    for name in (b"elst", b"edts", b"trak", b"moov"):
        _grow(data, name, len(entries) - 12)
    data[at + 12 : at + 28] = struct.pack(">i", len(edits)) + entries
    path.write_bytes(data)


def _grow(data: bytearray, name: bytes, more: int) -> None:
    """Add to the size that the header of an MP4 box says."""
    at = data.index(name) - 4
    data[at : at + 4] = struct.pack(">i", struct.unpack(">i", data[at : at + 4])[0] + more)


def write_without_key_table(case: Case, path: Path) -> None:
    """Encode MP4 and hide its table of key frames (stss), so that each packet counts as one."""
    encode(case.encoding, path, case.muxer)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))


class Part(NamedTuple):
    """Packets to copy: from key packet number `key` on, all time stamps moved by `shift`."""

    source: Path
    key: int = 0
    amid: int = 0  # leave out so many packets more
    shift: Fraction = Fraction(0)  # seconds


def copy_packets(parts: list[Part], path: Path, muxer: tuple[tuple[str, str], ...] = ()) -> None:
    """Copy the video packets of files into one container, without encoding them anew."""
    inputs = [av.open(str(part.source)) for part in parts]
    with av.open(str(path), "w", options=dict(muxer)) as output:
        stream = output.add_stream_from_template(inputs[0].streams.video[0], opaque=True)
        for part, source in zip(parts, inputs, strict=True):
            packets = [packet for packet in source.demux(video=0) if packet.size]
            keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
            for packet in packets[keys[part.key] + part.amid :]:
                shift = round(part.shift / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = stream
                output.mux(packet)
    for source in inputs:
        source.close()


def write_cut(case: Case, path: Path, at: int, key: int, keep: str = ".mp4") -> None:
    """Copy from a key frame on, with time 0 at frame `at`: `ffmpeg -ss X -i in -c copy out`."""
    whole = path.with_name("whole_" + path.stem + keep)
    encode(case.encoding, whole)
    copy_packets([Part(whole, key, 0, -at / case.encoding.rate)], path, case.muxer)
    whole.unlink()


def write_joined(case: Case, path: Path, size: tuple[int, int], raw: str) -> None:
    """Copy two encodes into one file; the second is numbered from 1000.

    raw: the suffix of the container in between.
    """
    encoding = case.encoding
    parts = [path.with_name(f"part_{i}_{path.stem}{raw}") for i in range(2)]
    encode(encoding, parts[0])
    encode(encoding._replace(size=size, first=1000), parts[1])
    copy_packets(
        [Part(parts[0]), Part(parts[1], shift=encoding.frames / encoding.rate)], path, case.muxer
    )
    for part in parts:
        part.unlink()


def write_bytes_joined(case: Case, path: Path) -> None:
    """Join the bytes of two files (`cat a.ts b.ts`): time stamps begin again in the middle."""
    parts = [path.with_name(f"part_{i}_{path.name}") for i in range(2)]
    encode(case.encoding, parts[0], case.muxer)
    encode(case.encoding._replace(first=1000), parts[1], case.muxer)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def write_without_start(case: Case, path: Path, packets: int) -> None:
    """Leave out the first packets of MPEG-TS, as of a recording begun amid a group."""
    encode(case.encoding, path, case.muxer)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    path.write_bytes(data[: 188 * 3] + data[places[packets] :])  # after the tables of the programs


def write_case(case: Case, folder: Path) -> Path:
    """Write the file of a case into a folder, unless it is there. Raises NoEncoder."""
    path = Path(folder) / case.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if case.make:
            case.make(case, path)
        else:
            encode(case.encoding, path, case.muxer)
    return path


def write_copied(case: Case, path: Path, keep: str, amid: int = 0) -> None:
    """Copy the packets of a file of another container, all but the first `amid`."""
    whole = path.with_name("whole_" + path.stem + keep)
    encode(case.encoding, whole)
    copy_packets([Part(whole, amid=amid)], path, case.muxer)
    whole.unlink()


def write_rewritten(case: Case, path: Path, change: Callable) -> None:
    """Encode, then change packets.

    change: maps the data of all packets to pairs of data and the index of the packet that gives
    the time.
    """
    whole = path.with_name("whole_" + path.name)
    encode(case.encoding, whole)
    with av.open(str(whole)) as source, av.open(str(path), "w", options=dict(case.muxer)) as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for data, place in change([bytes(packet) for packet in packets], case.encoding.gop):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, packets[place].time_base
            packet.dts, packet.duration = packets[place].dts, packets[place].duration
            packet.pts = packet.dts if case.name.endswith(".avi") else packets[place].pts
            packet.is_keyframe = _is_key(data, case.encoding.encoder)
            output.mux(packet)
    whole.unlink()


def _is_key(data: bytes, encoder: str) -> bool:
    """Tell whether a packet of VP8, VP9 or MPEG-4 starts with a key frame."""
    if encoder == "mpeg4":
        return data[data.index(b"\0\0\1\xb6") + 4] >> 6 == 0
    return not data[0] & (1 if encoder == "libvpx" else 0b1100)


def hide_vp8(packets: list[bytes], gop: int) -> list[tuple[bytes, int]]:
    """Hide the fourth packet of each group, like an alternate reference (RFC 6386, 9.1)."""
    changed = [
        bytes([data[0] & ~16]) + data[1:] if i % gop == 3 else data
        for i, data in enumerate(packets)
    ]
    return [(data, i) for i, data in enumerate(changed)]


def hide_vp9(
    packets: list[bytes], gop: int, joined: bool = False, later: int = 0
) -> list[tuple[bytes, int]]:
    """Clear the show bit of each key frame but the first.

    joined: put each hidden frame into a superframe with the frame after it (VP9 specification,
    annex B). later: show it after that many frames, which move up. A packet of one byte does
    this: it points at reference 7, which libvpx's inter frames leave alone.
    """
    changed, hidden = [], b""
    for i, data in enumerate(packets):
        after = i % gop if i >= gop else gop
        if after == 0:
            hidden = bytes([data[0] & ~2]) + data[1:]
            if not joined:
                changed.append((hidden, i))
            continue
        if joined and after == 1:
            sizes = len(hidden).to_bytes(2, "little") + len(data).to_bytes(2, "little")
            data = hidden + data + b"\xc9" + sizes + b"\xc9"
        changed.append((data, i - 1 if after <= later else i))
        if after == later:
            changed.append((bytes([0b10001111]), i))
    return changed


def pack_mpeg4(packets: list[bytes], gop: int) -> list[tuple[bytes, int]]:
    """Pack each B frame into the packet before it, as DivX 5 did; an empty one takes its place.

    The user data tells decoders about it.
    """
    packed = []
    for i, data in enumerate(packets):
        at = data.find(b"\0\0\1\xb2")
        if at >= 0:
            end = data.index(b"\0\0\1", at + 4)
            data = data[:at] + b"\0\0\1\xb2DivX503b1393p" + data[end:]
        vop = data.index(b"\0\0\1\xb6") + 4
        if data[vop] >> 6 == 2:  # a B frame
            packed[-1] = packed[-1][0] + data, i - 1
            packed.append((b"\0\0\1\xb6\x51\xfe\x10", i))
        else:
            packed.append((data, i))
    return packed
