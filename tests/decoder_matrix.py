"""Write docs/decoders.md: what each decoder makes of each test video.

    STMAE_TEST_DATA=... python tests/decoder_matrix.py

Needs decord, and the real files in the folder STMAE_TEST_DATA.
"""

import os
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from video_checks import DECODERS, matrix_table

from data.clips import ClipSampling, clip_indices
from data.decode import describe, open_video
from data.input_files import ReadError
from data.pyav_video import PyAVVideo
from data.video import VideoInfo

PAGE = ROOT / "docs" / "decoders.md"
KNOWN_DIFFERENCES = {
    "exoplayer__roadtrip-vp92-10bit.webm": "the references of its first frames were cut off",
    "made__bytes_flipped.mp4": "corrupt: skipping frames changes how the decoder conceals it",
}
NUM_FRAMES = 8  # that are compared of each real file
HEAD = f"""# What the two decoders make of ordinary and unusual files

Made by `tests/decoder_matrix.py` with PyAV {av.__version__}. `tests/test_data_decode.py` and
`tests/test_video_matrix.py` check that the page is up to date.

`--decoder auto`, the default, is PyAV. `--decoder decord` uses decord for the files that decord is
known to read exactly: H.264, HEVC, VP8 and VP9 in MP4, MOV, MKV and WebM with closed GOPs, square
pixels, and no frame hidden by an edit list. PyAV reads all other files, and those that decord
cannot open or finish.

## Videos made for the tests

Each frame of these shows its own number and colored patches. Every frame is read alone and in clips
of 16 frames, with and without an index, and compared with the sequential decode. "exact": every
number is right and colors differ by at most 3 levels (6 where frames are scaled).

"""


def read_frames(path: Path, decoder: str, info: VideoInfo) -> np.ndarray | str:
    """Return frames (8, H, W, 3) spread over a video at native size, or why they are not read."""
    try:
        with open_video(str(path), decoder, info=info) as video:
            if decoder == "decord" and isinstance(video, PyAVVideo):
                return "handed to PyAV"
            indices = clip_indices(video, ClipSampling(NUM_FRAMES, 4), start=0.6)
            return video.read(indices)
    except ReadError as error:
        return str(error)


def describe_file(info: VideoInfo) -> str:
    """Return codec, size and length of a video in words."""
    text = f"{info.codec}, {info.width}x{info.height}, {info.frames} frames"
    if info.rotation:
        text += f", rotated {info.rotation}°"
    if info.times is not None:
        text += ", variable rate"
    return text


def compare_frames(one: np.ndarray, other: np.ndarray) -> str:
    """Return in words how the frames (8, H, W, 3) of two decoders differ."""
    if one.shape != other.shape:
        return f"sizes differ: {one.shape} and {other.shape}"
    differences = np.abs(one.astype(int) - other).reshape(len(one), -1).max(1)
    if not differences.any():
        return "equal"
    num_different = int((differences > 0).sum())
    largest = differences.max()
    return f"{num_different} of {NUM_FRAMES} frames differ, by up to {largest} levels"


def file_row(path: Path) -> str:
    """Return one line of the table of real files."""
    try:
        info = describe(str(path))
    except ReadError as error:
        return f"| {path.name} | - | unreadable: {error} | | another video replaces it |"
    results = [read_frames(path, decoder, info) for decoder in DECODERS]
    cells = [path.name, describe_file(info)]
    for result in results:
        cells.append(result if isinstance(result, str) else "reads")
    pyav_frames, decord_frames = results
    if isinstance(pyav_frames, str) or isinstance(decord_frames, str):
        cells.append(KNOWN_DIFFERENCES.get(path.name, ""))
    else:
        cells.append(compare_frames(pyav_frames, decord_frames))
    return f"| {' | '.join(cells)} |"


def real_files() -> str:
    """Return the part of the page about real files: eight frames of each at native size."""
    lines = []
    for kind, title in (("videos", "Real files"), ("odd", "Corrupt and unusual files")):
        lines += ["", f"## {title}", ""]
        lines += [
            "| file | description | pyav | decord | frames |",
            "| --- | --- | --- | --- | --- |",
        ]
        folder = Path(os.environ["STMAE_TEST_DATA"], "data", kind)
        lines += [file_row(path) for path in sorted(folder.glob("*"))]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    with tempfile.TemporaryDirectory() as folder:
        return HEAD + matrix_table(Path(folder)) + real_files()


if __name__ == "__main__":
    PAGE.write_text(page())
