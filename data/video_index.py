"""The video index of a manifest: what its files contain, found once and kept beside the manifest.

`python -m tools.data_doctor` makes it. NAME.csv has NAME.index.npy, a table of one row per video,
and NAME.times.npy, the display times of videos of variable frame rate. Videos are in the order of
their first rows in the manifest; a video of which several rows are parts has one row in the table.
Worker processes map both into memory. A row is valid while its file, or its folder of frames, keeps
its size and date. A folder's frames are not listed again, and its rate is that of --frames_fps.
Without a valid row, a file is examined whenever it is read.
"""

import hashlib
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from data.frame_folder import FRAME_FOLDER
from data.video import VideoInfo
from util.files import atomic_write

# Rows of another version of this format, or of another PyAV, are not used.
VERSION = 200 + int(metadata.version("av").split(".")[0])
UNKNOWN = 0
READABLE = 1
UNREADABLE = 2
ROW = np.dtype(
    [
        ("file", "u8"),  # hash of the path
        ("bytes", "i8"),  # file size
        ("changed", "i8"),  # time of the last change, ns
        ("version", "u2"),
        ("state", "u1"),  # UNKNOWN, READABLE or UNREADABLE
        ("decord_reads", "u1"),
        ("rotation", "i2"),
        ("frames", "i4"),
        ("unseen", "i4"),
        ("width", "i4"),
        ("height", "i4"),
        ("fps", "f8"),
        ("key_distance", "f8"),
        ("times_at", "i8"),  # index of its first frame's time, -1 at a constant frame rate
        ("times_sum", "f8"),  # sum of its times, to check that they belong to this row
        ("codec", "S12"),
        ("reason", "S64"),  # why it is unreadable
        ("first_frame", "S64"),  # of a folder: name of the first frame
    ]
)
MAX_REASON = 64  # bytes
MAX_CODEC = 12  # bytes
MAX_FRAME_NAME = 64  # bytes; of a longer name the folder is listed whenever it is read
INFO_FIELDS = (  # fields that a row and a VideoInfo have in common
    "frames",
    "fps",
    "width",
    "height",
    "rotation",
    "key_distance",
    "unseen",
    "decord_reads",
)
NO_TIMES = np.zeros(0)


class VideoIndex:
    """The index of n videos.

    rows: (n,) of dtype ROW. times: (m,) display times in seconds of all frames of the videos of
    variable frame rate.
    """

    def __init__(self, rows: np.ndarray, times: np.ndarray):
        self.rows = rows
        self.times = times
        self.num_times = len(times)
        self.added_times: list[np.ndarray] = []  # not yet part of `times`

    def __len__(self) -> int:
        return len(self.rows)

    def all_times(self) -> np.ndarray:
        """Return the times, added ones included."""
        if self.added_times:
            self.times = np.concatenate([self.times, *self.added_times])
            self.added_times = []
        return self.times

    def of_files(self, paths: Sequence[str]) -> "VideoIndex":
        """Return the rows of these paths, each path's once. All must be in this index."""
        order = np.argsort(self.rows["file"], kind="stable")
        found = np.searchsorted(self.rows["file"], hash_paths(distinct(paths)), sorter=order)
        return VideoIndex(self.rows[order[found]], self.all_times())

    def reason(self, index: int, path: str) -> str | None:
        """Return why video `index` cannot be read, or None."""
        row = self.rows[index]
        if row["state"] == UNREADABLE and unchanged(row, path):
            return row["reason"].decode(errors="ignore")
        return None

    def info(self, index: int, path: str) -> VideoInfo | None:
        """Return the info of video `index`, or None if the row has none or the file has changed."""
        row = self.rows[index]
        if row["state"] != READABLE or not unchanged(row, path):
            return None
        return self.row_to_info(index)

    def row_to_info(self, index: int) -> VideoInfo | None:
        """Return the info in a row, or None if its times are not those of this index."""
        row = self.rows[index]
        times = None
        if row["times_at"] >= 0:
            times = self._frame_times(row)
            if times is None:
                return None
        return VideoInfo(
            frames=int(row["frames"]),
            fps=float(row["fps"]),
            width=int(row["width"]),
            height=int(row["height"]),
            rotation=int(row["rotation"]),
            key_distance=float(row["key_distance"]),
            codec=row["codec"].decode(),
            unseen=int(row["unseen"]),
            decord_reads=bool(row["decord_reads"]),
            times=times,
            first_frame=os.fsdecode(row["first_frame"]),
        )

    def _frame_times(self, row: np.void) -> np.ndarray | None:
        """Return the display times (frames,) of a row's video, or None if they do not belong to it.

        The file of times may be absent or older than the rows, if writing was interrupted.
        """
        begin = int(row["times_at"])
        end = begin + int(row["frames"])
        if end > self.num_times:
            return None
        times = np.array(self.all_times()[begin:end])
        if times.sum() != row["times_sum"]:
            return None
        return times

    def set_row(self, index: int, info: VideoInfo | None, reason: str = "") -> None:
        """Set a row to the result of `data.decode.describe`.

        info: None for an unreadable video. reason: why it is unreadable.
        """
        row = self.rows[index]
        row["version"] = VERSION
        row["times_at"] = -1
        if info is None:
            row["state"] = UNREADABLE
            row["reason"] = reason.encode(errors="backslashreplace")[:MAX_REASON]
            return
        row["state"] = READABLE
        row["reason"] = b""
        row["codec"] = info.codec.encode()[:MAX_CODEC]
        row["first_frame"] = b""
        first_frame = os.fsencode(info.first_frame)
        if len(first_frame) <= MAX_FRAME_NAME:
            row["first_frame"] = first_frame
        for name in INFO_FIELDS:
            row[name] = getattr(info, name)
        if info.times is not None:
            times = np.asarray(info.times, dtype=np.float64)
            row["times_at"] = self.num_times
            row["times_sum"] = times.sum()
            self.added_times.append(times)
            self.num_times += len(times)


def unchanged(row: np.void, path: str) -> bool:
    """Return whether a file still has the size and the date in its row."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_size == row["bytes"] and status.st_mtime_ns == row["changed"]


def index_path(manifest: str | Path) -> Path:
    """Return the path of a manifest's index: train.csv -> train.index.npy."""
    return Path(manifest).with_suffix(".index.npy")


def times_path(index: str | Path) -> Path:
    """Return the path of the times that belong to an index: train.index.npy -> train.times.npy."""
    return Path(index).with_suffix("").with_suffix(".times.npy")


def distinct(paths: Sequence[str]) -> list[str]:
    """Return the distinct paths, in the order of their first occurrences."""
    return list(dict.fromkeys(paths))


def hash_paths(paths: Sequence[str]) -> np.ndarray:
    """Return a 64-bit hash of each path (n,)."""
    digests = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths]
    hashes = [int.from_bytes(digest, "little") for digest in digests]
    return np.array(hashes, dtype=np.uint64)


def open_index(target: str | Path) -> VideoIndex | None:
    """Map an index file into memory. Return None if there is none or its format is another one."""
    try:
        rows = np.load(target, mmap_mode="r")
    except (OSError, ValueError):
        return None
    if rows.dtype != ROW or rows.ndim != 1:
        return None
    try:
        times = np.load(times_path(target), mmap_mode="r")
    except (OSError, ValueError):
        times = NO_TIMES
    return VideoIndex(rows, times)


def load_index(manifest: str | Path, paths: Sequence[str]) -> VideoIndex | None:
    """Map the index of a manifest into memory. Return None if there is none of these paths.

    paths: of the manifest's samples.
    """
    if not manifest:
        return None
    files = distinct(paths)
    index = open_index(index_path(manifest))
    if index is None or len(index) != len(files):
        return None
    usable = (index.rows["state"] == UNKNOWN) | (index.rows["version"] == VERSION)
    if not usable.all() or not np.array_equal(index.rows["file"], hash_paths(files)):
        return None
    return index


def new_index(
    paths: Sequence[str], known: VideoIndex | None, frames_fps: float | None = None
) -> VideoIndex:
    """Return an index of the distinct paths, with the rows of `known` for unchanged files.

    All other rows are UNKNOWN. frames_fps: the rate of folders of frames, if it is known.
    """
    paths = distinct(paths)
    rows = _unknown_rows(paths)
    index = VideoIndex(rows, NO_TIMES)
    if known is None or len(known) == 0:
        return index
    order = np.argsort(known.rows["file"], kind="stable")
    found = np.searchsorted(known.rows["file"], rows["file"], sorter=order)
    source = order[found.clip(max=len(known) - 1)]  # row in `known` of each path, if it has one
    same = known.rows["version"][source] == VERSION
    for name in ("file", "bytes", "changed"):
        same &= known.rows[name][source] == rows[name]
    rows[same] = known.rows[source[same]]
    if frames_fps is not None:
        rows["fps"][rows["codec"] == FRAME_FOLDER.encode()] = frames_fps
    for row in np.flatnonzero(same & (rows["times_at"] >= 0)).tolist():
        info = known.info(int(source[row]), paths[row])
        if info is None:
            rows["state"][row] = UNKNOWN
        else:
            index.set_row(row, info)  # its times begin elsewhere in this index
    return index


def _unknown_rows(paths: Sequence[str]) -> np.ndarray:
    """Return UNKNOWN rows (n,) of dtype ROW, with the files' present sizes and dates."""
    rows = np.zeros(len(paths), dtype=ROW)
    rows["file"] = hash_paths(paths)
    for index, path in enumerate(paths):
        try:
            status = os.stat(path)
        except OSError:
            rows["bytes"][index] = -1
            continue
        rows["bytes"][index] = status.st_size
        rows["changed"][index] = status.st_mtime_ns
    return rows


def save_index(target: Path, index: VideoIndex) -> None:
    """Write an index and its times; the times first, since the rows refer to them."""
    times = index.all_times()
    if len(times) > 0:
        _save_array(times_path(target), times)
    _save_array(target, index.rows)


def _save_array(target: Path, values: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    with atomic_write(target) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def copy_index(source: str | Path, target: str | Path, paths: Sequence[str]) -> None:
    """Copy the rows of these paths from the index of one manifest to that of another.

    Do nothing if `source` has no index.
    """
    if source:
        copy_indices([source], target, paths)


def copy_indices(sources: Sequence[str | Path], target: str | Path, paths: Sequence[str]) -> None:
    """Copy the rows of these paths from the indices of several manifests to that of another.

    Do nothing if none has an index.
    """
    found = [open_index(index_path(source)) for source in sources]
    known = [index for index in found if index is not None]
    if known:
        save_index(index_path(target), new_index(paths, _join(known)))


def _join(indices: list[VideoIndex]) -> VideoIndex:
    """Return one index with the rows of several."""
    begins = np.cumsum([0, *(index.num_times for index in indices)]).tolist()
    tables = []
    for index, begin in zip(indices, begins, strict=False):
        rows = np.array(index.rows)
        rows["times_at"][rows["times_at"] >= 0] += begin
        tables.append(rows)
    times = [index.all_times() for index in indices]
    return VideoIndex(np.concatenate(tables), np.concatenate(times))
