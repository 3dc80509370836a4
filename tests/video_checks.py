"""Decode the videos of the matrix in sequence, and compare what a reader gives with that."""

import struct
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from video_matrix import CASES
from video_writer import COLORS, Case, NoEncoder, colors_of, number_of, oriented, write_case

from data.decode import ReadError, open_video
from data.pyav import to_rgb


class Reference(NamedTuple):
    """What a sequential decode shows."""

    numbers: list[int | None]  # None: no number can be read
    times: list[float | None]  # as stamped, seconds
    pictures: list[np.ndarray]  # (H, W, 3) uint8 RGB each, upright; pixels as stored


def shown_picture(frame: av.VideoFrame) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB and apply its display matrix."""
    picture = to_rgb(VideoReformatter(), frame, frame.width, frame.height)
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is not None:
        a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
        picture = oriented(picture, (a, b, c, d))
    return picture


def decode_in_sequence(path: Path) -> Reference:
    """Decode a file from its start to its end, as a player does."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [(frame.time, shown_picture(frame)) for frame in container.decode(video=0)]
    times, pictures = zip(*frames, strict=True)
    return Reference([number_of(picture) for picture in pictures], list(times), list(pictures))


def proof_faults(case: Case, reference: Reference) -> list[str]:
    """Compare a sequential decode with what the case says, and with the colors drawn."""
    faults = []
    if reference.numbers != case.numbers:
        faults.append(f"shows {reference.numbers}, not {case.numbers}")
    if case.has_times:
        apart = [
            time - reference.times[0] - wanted
            for time, wanted in zip(reference.times, case.seconds, strict=False)
        ]
        if max(map(abs, apart)) > 0.0015:  # MKV and WebM round to milliseconds
            faults.append(f"times are up to {max(map(abs, apart)):.3f} s off")
    off = max(np.abs(colors_of(picture) - COLORS).max() for picture in reference.pictures)
    if off > 12:
        faults.append(f"colors are up to {off:.0f} levels off")
    return faults


def count_faults(case: Case, video) -> list[str]:
    """Check the number of frames of an open video."""
    wanted = len(case.numbers)
    return [] if video.num_frames == wanted else [f"{video.num_frames} frames instead of {wanted}"]


def single_faults(case: Case, video, order: np.ndarray) -> list[str]:
    """Read each frame of `order` alone, and check what it shows."""
    seen, sizes = [], set()
    for index in order:
        try:
            frame = video.read(np.array([index]))[0]
        except (ReadError, ValueError) as error:
            seen.append(f"'{error}'")
            continue
        seen.append(number_of(frame))
        sizes.add((frame.shape[1], frame.shape[0]))
    faults = _wrong_numbers("alone", [case.numbers[i] for i in order], seen)
    return faults + _wrong_sizes(case, sizes)


def _wrong_numbers(how: str, wanted: list[int], seen: list[int | str | None]) -> list[str]:
    """Return how many frames show a wrong number, with the first few."""
    wrong = {a: "garbage" if b is None else b for a, b in zip(wanted, seen, strict=True) if a != b}
    count = sum(a != b for a, b in zip(wanted, seen, strict=True))
    first = ", ".join(f"{a} shows {wrong[a]}" for a in sorted(wrong)[:4])
    return [f"{how}: {count} of {len(wanted)} wrong ({first})"] if wrong else []


def _wrong_sizes(case: Case, sizes: set[tuple[int, int]]) -> list[str]:
    """Check that all frames have one size, in the proportions of the case."""
    if len(sizes) > 1:
        return [f"sizes vary: {sorted(sizes)}"]
    right_width, right_height = case.size
    width, height = next(iter(sizes), case.size)
    if abs(width / height * right_height / right_width - 1) > 0.03:
        return [f"size {width}x{height}, which is not as {right_width}x{right_height}"]
    return []


def clip_indices(frames: int) -> list[np.ndarray]:
    """Return clips (16,) at strides 1, 2, 4 and 7, at the start, amid and at the end.

    A short video repeats its last frame.
    """
    clips = []
    for stride in (1, 2, 4, 7):
        spare = max(frames - 16 * stride, 0)
        clips += [np.arange(16) * stride + first for first in sorted({spare // 3, spare, 0})]
    return [clip.clip(0, frames - 1) for clip in clips[1:] + clips[:1]]  # the first is not at 0


def clip_faults(case: Case, video, reference: Reference) -> list[str]:
    """Compare clips with the sequential decode: numbers exactly, colors to 3 levels (6 where pictures are scaled)."""
    wanted, seen, off, sizes = [], [], 0.0, set()
    for indices in clip_indices(len(case.numbers)):
        for index, frame in zip(indices, video.read(indices), strict=True):
            wanted.append(reference.numbers[index])
            seen.append(number_of(frame))
            off = max(off, np.abs(colors_of(frame) - colors_of(reference.pictures[index])).max())
            sizes.add((frame.shape[1], frame.shape[0]))
    faults = _wrong_numbers("in clips", wanted, seen) + _wrong_sizes(case, sizes)
    scaled = sizes != {picture.shape[1::-1] for picture in reference.pictures}
    if off > (6 if scaled else 3):
        faults.append(f"colors up to {off:.0f} levels off in clips")
    return faults


def reading_faults(
    case: Case, path: str, reference: Reference, decoder: str
) -> tuple[str, list[str]]:
    """Read a file in all ways: the name of the class that did, and what was wrong."""
    order = np.random.default_rng(len(case.name)).permutation(len(case.numbers))
    try:
        with open_video(path, decoder) as video:
            faults = count_faults(case, video) + single_faults(case, video, order)
            return type(video).__name__, faults + clip_faults(case, video, reference)
    except (ReadError, ValueError) as error:
        return "", [str(error)]


def matrix_row(case: Case, folder: Path, decoders: tuple[str, ...]) -> str:
    """Write one line of the table: the case, what it is, and what each decoder makes of it."""
    cells = [case.name, case.what]
    try:
        path = str(write_case(case, folder))
    except NoEncoder as error:
        return f"| {' | '.join(cells)} |" + f" not written: {error} |" * len(decoders)
    reference = decode_in_sequence(path)
    for decoder in decoders:
        reader, faults = reading_faults(case, path, reference, decoder)
        handed = "handed to PyAV" if decoder == "decord" and reader == "PyAVVideo" else "exact"
        cells.append(faults[0] if faults else handed)
    return f"| {' | '.join(cells)} |"


def matrix_table(folder: Path, cases: tuple[Case, ...] | None = None) -> str:
    """Make a Markdown table of what each decoder makes of each case; write files to a folder."""
    lines = ["| case | what it is | pyav | decord |", "| --- | --- | --- | --- |"]
    lines += [matrix_row(case, folder, ("pyav", "decord")) for case in cases or CASES]
    return "\n".join(lines) + "\n"


class Skipping(NamedTuple):
    """What `skip_frame = "NONREF"` for all packets but a wanted one does."""

    runs: int  # one for each shown frame, from the start of the file
    missing: int  # runs in which the wanted frame did not come out
    wrong: int  # runs in which the wanted frame came out with another picture, or number
    spoiled: int  # frames of any run with a picture that is not that of a full decode
    skipped: float  # mean part of the frames that were not decoded: what skipping saves


def _decoded(path: str, decoder: str, wanted: int | None) -> dict[int, np.ndarray]:
    """Decode a file to {time stamp: picture}; all packets but `wanted` may be skipped."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        codec = av.CodecContext.create(decoder, "r")
        codec.extradata, codec.thread_count = stream.codec_context.extradata, 1
        codec.width, codec.height = stream.width, stream.height
        frames = []
        for packet in container.demux(stream):
            if packet.size:
                keep = wanted is None or packet.pts == wanted
                codec.skip_frame = "DEFAULT" if keep else "NONREF"
                frames += codec.decode(packet)
        codec.skip_frame = "DEFAULT"
        frames += codec.decode(None)
    return {frame.pts: frame.to_ndarray(format="rgb24") for frame in frames}


def skipping_evidence(path: str, decoder: str) -> Skipping:
    """Want each frame in turn while others may be skipped; compare with the full decode."""
    full = _decoded(path, decoder, None)
    missing = wrong = spoiled = skipped = 0
    for stamp, picture in full.items():
        found = _decoded(path, decoder, stamp)
        if stamp not in found:
            missing += 1
        elif not np.array_equal(found[stamp], picture):
            wrong += 1
        spoiled += sum(not np.array_equal(frame, full.get(at)) for at, frame in found.items())
        skipped += 1 - len(found) / len(full)
    return Skipping(len(full), missing, wrong, spoiled, skipped / len(full))
