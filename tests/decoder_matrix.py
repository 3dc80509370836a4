"""Writes docs/decoders.md: what each backend makes of each test video. Needs STMAE_TEST_DATA and decord.

STMAE_TEST_DATA=... python tests/decoder_matrix.py
"""

import os
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from video_checks import matrix_table

from data.decode import (
    PyAVVideo,
    ReadError,
    VideoInfo,
    checked_path,
    clip_indices,
    describe,
    open_video,
)

PAGE = ROOT / "docs" / "decoders.md"
WHY = {
    "exoplayer__roadtrip-vp92-10bit.webm": "its first frames refer to what was cut off",
    "made__bytes_flipped.mp4": "damaged: what is skipped changes how the decoder conceals it",
}
HEAD = f"""# What the two backends make of ordinary and odd files

Made by `tests/decoder_matrix.py` with PyAV {av.__version__}, held by `tests/test_data_decode.py` and `tests/test_video_matrix.py`.

`--decoder auto`, the default, is PyAV. `--decoder decord` reads by decord what decord is known to read rightly: H.264, HEVC,
VP8 and VP9 in MP4, MOV, MKV and WebM with closed groups of pictures, square pixels, and no frame hidden by an edit list. Everything else
it hands to PyAV, and so it does with a file that it cannot open or finish.

## Videos made for the purpose

Each frame of these carries its own number and colored patches. Every frame is read alone and in clips of 16, with and without an
index, and compared with the sequential decode. "exact": every number is right and colors differ by at most 3 levels (6 where pictures are scaled).

"""


def frames_of(path: str, decoder: str, info: VideoInfo) -> np.ndarray | str:
    """Eight frames spread over the video as a backend reads them, at native size, or its reason."""
    try:
        with open_video(path, decoder, info=info) as video:
            if decoder == "decord" and isinstance(video, PyAVVideo):
                return "handed to PyAV"
            return video.read(clip_indices(video, num_frames=8, sampling_rate=4, start=0.6))
    except ReadError as error:
        return str(error)


def row(path: Path) -> str:
    """One line of the table of real files."""
    try:
        info = describe(checked_path(str(path)))
    except ReadError as error:
        return (
            f"| {path.name} | - | unreadable: {error} | | the run puts another video in its place |"
        )
    pyav, decord = (
        frames_of(checked_path(str(path)), decoder, info) for decoder in ("pyav", "decord")
    )
    what = f"{info.codec}, {info.width}x{info.height}, {info.frames} frames" + (
        f", turned {info.rotation}°" if info.rotation else ""
    )
    what += ", unsteady rate" if info.times is not None else ""
    said = [found if isinstance(found, str) else "reads" for found in (pyav, decord)]
    outcome = WHY.get(path.name, "")
    if not isinstance(pyav, str) and not isinstance(decord, str):
        far = (
            np.abs(pyav.astype(int) - decord).reshape(len(pyav), -1).max(1)
            if pyav.shape == decord.shape
            else None
        )
        outcome = f"sizes differ: {pyav.shape} and {decord.shape}" if far is None else "equal"
        if far is not None and far.any():
            outcome = f"{int((far > 0).sum())} of 8 frames differ, by up to {far.max()} levels"
    return f"| {path.name} | {what} | {said[0]} | {said[1]} | {outcome} |"


def real_files() -> str:
    """The part of the page about real files: eight frames of each at native size."""
    lines = []
    for kind, title in (("videos", "Real files"), ("odd", "Broken and unusual files")):
        lines += [
            "",
            f"## {title}",
            "",
            "| file | what it is | pyav | decord | frames |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            row(path)
            for path in sorted(Path(os.environ["STMAE_TEST_DATA"], "data", kind).glob("*"))
        ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        return HEAD + matrix_table(Path(folder)) + real_files()


if __name__ == "__main__":
    PAGE.write_text(page())
