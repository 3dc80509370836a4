"""Writes docs/decoders.md: what each backend makes of each test video. Needs STMAE_TEST_DATA and decord.

    STMAE_TEST_DATA=... python tests/decoder_matrix.py
"""

import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from data.decode import DecordVideo, PyAVVideo, ReadError, VideoInfo, checked_path, describe, frame_indices

WHY = {
    "exoplayer__dolbyVision-hdr.MOV": "10 bit to 8: the two round differently",
    "exoplayer__roadtrip-vp92-10bit.webm": "80 packets show 72 pictures: the two number those after a hidden one differently",
    "exoplayer__sample.avi": "MPEG-4 part 2: the two decoders round differently",
    "exoplayer__sample_with_color_info.mp4": "10 bit to 8: the two round differently",
    "exoplayer__bear-vp9-odd-dimensions.webm": "odd size: the colour planes are enlarged differently",
    "imageio__cockatoo.mp4": "4:4:4 by an old x264: after a seek decord decodes it wrongly, PyAV as from the start",
    "made__bytes_flipped.mp4": "damaged: what is skipped changes how the decoder conceals it",
}


UNSTEADY = {"made__h264_no_pts.avi": "AVI stores no order of display; what decord gives differs from one reading to the next"}


def frames_of(kind: type, path: str, info: VideoInfo) -> np.ndarray | str:
    """Eight frames spread over the video as a backend alone reads them, at native size, or its reason."""
    wanted = frame_indices(info.frames, info.fps, num_frames=8, sampling_rate=4, start=0.6)
    try:
        video = kind(path, None, info)
        if kind is DecordVideo:  # without the help of PyAV
            import decord

            try:
                return video.reader.get_batch(np.clip(wanted, 0, len(video.reader) - 1).tolist()).asnumpy()
            except (decord.DECORDError, RuntimeError):
                return "opens, then fails (PyAV takes over)"
        return video.read(wanted)
    except ReadError as error:
        return str(error)


def row(path: Path) -> str:
    """One line of the table."""
    try:
        info = describe(checked_path(str(path)))
    except ReadError as error:
        return f"| {path.name} | - | unreadable: {error} | unreadable | the run puts another video in its place |"
    pyav, decord = (frames_of(kind, checked_path(str(path)), info) for kind in (PyAVVideo, DecordVideo))
    what = f"{info.codec}, {info.width}x{info.height}, {info.frames} frames" + (f", turned {info.rotation}°" if info.rotation else "")
    said = ["reads" if isinstance(found, np.ndarray) else "fails" for found in (pyav, decord)]
    outcome = "equal"
    if isinstance(decord, str):
        said[1], outcome = decord if decord.startswith("opens") else "cannot open", "PyAV reads it instead"
    elif isinstance(pyav, str):
        outcome = pyav
    elif pyav.shape != decord.shape:
        outcome = f"sizes differ: {pyav.shape[2]}x{pyav.shape[1]} and {decord.shape[2]}x{decord.shape[1]}"
    elif not np.array_equal(pyav, decord):
        far = np.abs(pyav.astype(int) - decord).reshape(len(pyav), -1).max(1)
        outcome = f"{int((far > 0).sum())} of 8 frames differ, by up to {far.max()} levels"
    if outcome != "equal" and not isinstance(decord, str):
        outcome += f": {WHY.get(path.name, 'not explained')}"
    outcome = UNSTEADY.get(path.name, outcome)
    return f"| {path.name} | {what} | {said[0]} | {said[1]} | {outcome} |"


def table() -> str:
    """The whole page."""
    lines = ["# What the two backends make of ordinary and odd files", "",
             "Made by `tests/decoder_matrix.py` (held by `tests/test_data_decode.py`): eight frames of each file at native size, by PyAV and decord",
             "alone. In use, what decord cannot open or finish goes to PyAV."]  # fmt: skip
    for kind in ("videos", "odd"):
        lines += ["", f"## {kind}", "", "| file | what it is | pyav | decord | frames |", "| --- | --- | --- | --- | --- |"]
        lines += [row(path) for path in sorted(Path(os.environ["STMAE_TEST_DATA"], "data", kind).glob("*"))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "decoders.md").write_text(table())
