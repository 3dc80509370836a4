"""Decode the videos of the matrix sequentially, and compare the frames of a reader with that.

The functions `check_*` return a list of faults, one line each, empty if all is right.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from video_matrix import CASES
from video_writer import COLORS, Case, NoEncoder, apply_matrix, colors_of, number_of, write_case

from data.decode import open_video
from data.input_files import ReadError
from data.pyav_compat import to_rgb

CLIP_FRAMES = 16
TIME_TOLERANCE = 0.0015  # seconds: MKV and WebM round to milliseconds
DRAWN_TOLERANCE = 12  # color levels, after lossy encoding
DECODED_TOLERANCE = 3  # color levels, to the sequential decode
SCALED_TOLERANCE = 6  # the same where frames are scaled
DECODERS = ("pyav", "decord")


class Reference(NamedTuple):
    """The result of a sequential decode."""

    numbers: list[int | None]  # None: no number is readable
    times: list[float | None]  # as stamped, seconds
    pictures: list[np.ndarray]  # (H, W, 3) uint8 RGB each, upright; pixels as stored


def shown_picture(frame: av.VideoFrame) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB and apply its display matrix."""
    picture = to_rgb(VideoReformatter(), frame, frame.width, frame.height)
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is not None:
        a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
        picture = apply_matrix(picture, (a, b, c, d))
    return picture


def decode_sequentially(path: Path) -> Reference:
    """Decode a file from its start to its end, as a player does."""
    numbers = []
    times = []
    pictures = []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            picture = shown_picture(frame)
            numbers.append(number_of(picture))
            times.append(frame.time)
            pictures.append(picture)
    return Reference(numbers, times, pictures)


def check_reference(case: Case, reference: Reference) -> list[str]:
    """Compare a sequential decode with the case, and with the colors drawn."""
    faults = []
    if reference.numbers != case.numbers:
        faults.append(f"shows {reference.numbers}, not {case.numbers}")
    if case.has_times:
        first = reference.times[0]
        pairs = zip(reference.times, case.seconds, strict=False)
        largest = max(abs(time - first - expected) for time, expected in pairs)
        if largest > TIME_TOLERANCE:
            faults.append(f"times are up to {largest:.3f} s off")
    differences = [np.abs(colors_of(picture) - COLORS).max() for picture in reference.pictures]
    if max(differences) > DRAWN_TOLERANCE:
        faults.append(f"colors are up to {max(differences):.0f} levels off")
    return faults


def check_count(case: Case, video) -> list[str]:
    """Compare the number of frames of an open video with the case."""
    expected = len(case.numbers)
    if video.num_frames == expected:
        return []
    return [f"{video.num_frames} frames instead of {expected}"]


def check_single_frames(case: Case, video, order: np.ndarray) -> list[str]:
    """Read the frame of each index of `order` on its own, and compare its number with the case."""
    seen = []
    sizes = set()
    for index in order:
        try:
            frame = video.read(np.array([index]))[0]
        except (ReadError, ValueError) as error:
            seen.append(f"'{error}'")
            continue
        seen.append(number_of(frame))
        sizes.add(_size_of(frame))
    expected = [case.numbers[index] for index in order]
    return _number_faults("alone", expected, seen) + _size_faults(case, sizes)


def _size_of(picture: np.ndarray) -> tuple[int, int]:
    """Return width and height of a picture (H, W, 3)."""
    height, width, _ = picture.shape
    return width, height


def _number_faults(how: str, expected: list[int], seen: list[int | str | None]) -> list[str]:
    """Return how many frames show a wrong number, with the first few."""
    wrong = {}
    count = 0
    for expected_number, number in zip(expected, seen, strict=True):
        if expected_number != number:
            count += 1
            wrong[expected_number] = "garbage" if number is None else number
    if not wrong:
        return []
    examples = ", ".join(f"{number} shows {wrong[number]}" for number in sorted(wrong)[:4])
    return [f"{how}: {count} of {len(expected)} wrong ({examples})"]


def _size_faults(case: Case, sizes: set[tuple[int, int]]) -> list[str]:
    """Check that all frames have one size, in the proportions of the case."""
    if len(sizes) > 1:
        return [f"sizes vary: {sorted(sizes)}"]
    expected_width, expected_height = case.size
    width, height = next(iter(sizes), case.size)
    proportion = width / height * expected_height / expected_width
    if abs(proportion - 1) > 0.03:
        return [f"size {width}x{height}, not in proportion to {expected_width}x{expected_height}"]
    return []


def matrix_clips(num_frames: int) -> list[np.ndarray]:
    """Return clips (16,) at strides 1, 2, 4 and 7, at the start, inside and at the end.

    A short video repeats its last frame. The first clip does not start at 0, if possible.
    """
    clips = []
    for stride in (1, 2, 4, 7):
        slack = max(num_frames - CLIP_FRAMES * stride, 0)
        for first in sorted({slack // 3, slack, 0}):
            clip = np.arange(CLIP_FRAMES) * stride + first
            clips.append(clip.clip(0, num_frames - 1))
    return clips[1:] + clips[:1]


def check_clips(case: Case, video, reference: Reference) -> list[str]:
    """Compare clips with the sequential decode: equal numbers, equal colors but for rounding."""
    expected = []
    seen = []
    sizes = set()
    largest = 0.0
    for indices in matrix_clips(len(case.numbers)):
        for index, frame in zip(indices, video.read(indices), strict=True):
            expected.append(reference.numbers[index])
            seen.append(number_of(frame))
            sizes.add(_size_of(frame))
            differences = colors_of(frame) - colors_of(reference.pictures[index])
            largest = max(largest, np.abs(differences).max())
    faults = _number_faults("in clips", expected, seen) + _size_faults(case, sizes)
    is_scaled = sizes != {_size_of(picture) for picture in reference.pictures}
    if largest > (SCALED_TOLERANCE if is_scaled else DECODED_TOLERANCE):
        faults.append(f"colors up to {largest:.0f} levels off in clips")
    return faults


def random_order(case: Case) -> np.ndarray:
    """Return all frame indices of a case in a fixed random order."""
    return np.random.default_rng(len(case.name)).permutation(len(case.numbers))


def check_reader(
    case: Case, path: str, reference: Reference, decoder: str
) -> tuple[str, list[str]]:
    """Read a file in all ways. Returns the name of the reader's class, and the faults."""
    try:
        with open_video(path, decoder) as video:
            faults = check_count(case, video)
            faults += check_single_frames(case, video, random_order(case))
            faults += check_clips(case, video, reference)
            return type(video).__name__, faults
    except (ReadError, ValueError) as error:
        return "", [str(error)]


def matrix_row(case: Case, folder: Path) -> str:
    """Return one line of the table: the case, its description, and the result of each decoder."""
    cells = [case.name, case.description]
    try:
        path = write_case(case, folder)
    except NoEncoder as error:
        cells += [f"not written: {error}"] * len(DECODERS)
        return f"| {' | '.join(cells)} |"
    reference = decode_sequentially(path)
    for decoder in DECODERS:
        reader, faults = check_reader(case, str(path), reference, decoder)
        if faults:
            cells.append(faults[0])
        elif decoder == "decord" and reader == "PyAVVideo":
            cells.append("handed to PyAV")
        else:
            cells.append("exact")
    return f"| {' | '.join(cells)} |"


def matrix_table(folder: Path, cases: tuple[Case, ...] = CASES) -> str:
    """Return a Markdown table with the results of all cases; writes their files into a folder."""
    lines = ["| case | description | pyav | decord |", "| --- | --- | --- | --- |"]
    lines += [matrix_row(case, folder) for case in cases]
    return "\n".join(lines) + "\n"


class Skipping(NamedTuple):
    """The effect of `skip_frame = "NONREF"` for all packets but a wanted one."""

    runs: int  # one for each shown frame, from the start of the file
    missing: int  # runs in which the wanted frame did not come out
    wrong: int  # runs in which the wanted frame differed from a full decode
    corrupt: int  # frames of any run that differed from a full decode
    skipped: float  # mean share of the frames that were not decoded: the gain


def _decode_skipping(path: str, decoder: str, wanted: int | None) -> dict[int, np.ndarray]:
    """Decode a file to {PTS: picture}; packets but `wanted` may be skipped (None: none may)."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        codec = av.CodecContext.create(decoder, "r")
        codec.extradata = stream.codec_context.extradata
        codec.thread_count = 1
        codec.width = stream.width
        codec.height = stream.height
        frames = []
        for packet in container.demux(stream):
            if packet.size:
                needed = wanted is None or packet.pts == wanted
                codec.skip_frame = "DEFAULT" if needed else "NONREF"
                frames += codec.decode(packet)
        codec.skip_frame = "DEFAULT"
        frames += codec.decode(None)
    return {frame.pts: frame.to_ndarray(format="rgb24") for frame in frames}


def measure_skipping(path: str, decoder: str) -> Skipping:
    """Want each frame in turn while others may be skipped; compare with the full decode."""
    full = _decode_skipping(path, decoder, None)
    missing = 0
    wrong = 0
    corrupt = 0
    skipped = 0.0
    for pts, picture in full.items():
        found = _decode_skipping(path, decoder, pts)
        if pts not in found:
            missing += 1
        elif not np.array_equal(found[pts], picture):
            wrong += 1
        for found_pts, found_picture in found.items():
            if not np.array_equal(found_picture, full.get(found_pts)):
                corrupt += 1
        skipped += 1 - len(found) / len(full)
    return Skipping(len(full), missing, wrong, corrupt, skipped / len(full))
