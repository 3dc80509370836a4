"""The index of a manifest: what is in each of its video files, found out once (by `python -m data.index`) and kept beside it.

A table of one row per video in the order of the manifest, `NAME.index.npy` beside `NAME.csv`, and the display times of videos of
unsteady rate in `NAME.times.npy`; worker processes map both into memory. A row holds for as long as its file keeps its size
and date; without an index each file is looked at when it is read.
"""

import hashlib
import os
from importlib import metadata
from pathlib import Path

import numpy as np

from data.decode import VideoInfo

VERSION = 200 + int(
    metadata.version("av").split(".")[0]
)  # rows of another version, or another PyAV's, are found out anew
UNKNOWN, READABLE, UNREADABLE = 0, 1, 2
ROW = np.dtype(
    [
        ("file", "u8"),  # hash of the path
        ("bytes", "i8"),
        ("changed", "i8"),  # time of the last change, ns
        ("version", "u2"),
        ("state", "u1"),
        ("decord_reads", "u1"),
        ("rotation", "i2"),
        ("frames", "i4"),
        ("unseen", "i4"),
        ("width", "i4"),
        ("height", "i4"),
        ("fps", "f8"),
        ("key_distance", "f8"),
        ("times_at", "i8"),  # where the times of its frames begin, -1: at a steady rate
        ("times_sum", "f8"),  # tells whether the times there are its own
        ("codec", "S12"),
        ("reason", "S64"),  # why it is unreadable
    ]
)


class VideoIndex:
    """The rows (n,) ROW of a manifest's videos, and the times (m,) of the frames of those of unsteady rate, in seconds."""

    def __init__(self, rows: np.ndarray, times: np.ndarray):
        """Take rows and times, as loaded or as `start` makes them."""
        self.rows, self.times = rows, times
        self.added: list[np.ndarray] = []  # times that came since
        self.length = len(times)

    def __len__(self) -> int:
        return len(self.rows)

    def all_times(self) -> np.ndarray:
        """Return the times with those that were added."""
        if self.added:
            self.times, self.added = np.concatenate([self.times, *self.added]), []
        return self.times

    def reason(self, place: int, path: str) -> str | None:
        """Return why a video cannot be read, or None."""
        row = self.rows[place]
        known = row["state"] == UNREADABLE and unchanged(row, path)
        return row["reason"].decode(errors="replace") if known else None

    def info(self, place: int, path: str) -> VideoInfo | None:
        """Return what is known of a video, or None if nothing is or the file has changed since."""
        row = self.rows[place]
        if row["state"] != READABLE or not unchanged(row, path):
            return None
        times, begin, end = None, int(row["times_at"]), int(row["times_at"] + row["frames"])
        if begin >= 0:
            if end > self.length:  # its file is gone, or of before
                return None
            times = np.array(self.all_times()[begin:end])
            if times.sum() != row["times_sum"]:  # of an index that was not written to its end
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
        )

    def fill(self, place: int, info: VideoInfo | None, reason: str = "") -> None:
        """Put into a row what `data.decode.describe` found: info, or the reason why there is none."""
        row = self.rows[place]
        row["state"], row["reason"] = (
            (READABLE, b"") if info else (UNREADABLE, reason.encode()[:64])
        )
        row["version"], row["times_at"] = VERSION, -1
        if info:
            for name in (
                "frames",
                "fps",
                "width",
                "height",
                "rotation",
                "key_distance",
                "unseen",
                "decord_reads",
            ):
                row[name] = getattr(info, name)
            row["codec"] = info.codec.encode()[:12]
        if info and info.times is not None:
            row["times_at"], row["times_sum"] = self.length, np.sum(info.times, dtype=np.float64)
            self.added.append(np.asarray(info.times, dtype=np.float64))
            self.length += len(info.times)


def unchanged(row: np.void, path: str) -> bool:
    """Return whether a file has the size and the date that its row says."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (row["bytes"], row["changed"])


def index_path(manifest: str | Path) -> Path:
    """Where the index of a manifest lies: train.csv -> train.index.npy."""
    return Path(manifest).with_suffix(".index.npy")


def times_path(index: str | Path) -> Path:
    """Where the times beside an index lie: train.index.npy -> train.times.npy."""
    return Path(index).with_suffix("").with_suffix(".times.npy")


def fingerprints(paths) -> np.ndarray:
    """A 64-bit hash of each path (n,)."""
    digests = (hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths)
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def open_index(target: str | Path) -> VideoIndex | None:
    """Map an index file into memory, or None if it is none of this version."""
    try:
        rows = np.load(target, mmap_mode="r")
    except (OSError, ValueError):  # none, or not one
        return None
    if rows.dtype != ROW or rows.ndim != 1:
        return None
    try:
        times = np.load(times_path(target), mmap_mode="r")
    except (OSError, ValueError):
        times = np.zeros(0)
    return VideoIndex(rows, times)


def load(manifest: str | Path, paths) -> VideoIndex | None:
    """The index of a manifest's paths, mapped into memory, or None if there is none that fits."""
    found = open_index(index_path(manifest)) if manifest else None
    if found is None or len(found) != len(paths):
        return None
    current = (found.rows["state"] == UNKNOWN) | (found.rows["version"] == VERSION)
    return (
        found if current.all() and np.array_equal(found.rows["file"], fingerprints(paths)) else None
    )


def start(paths, known: VideoIndex | None) -> VideoIndex:
    """A fresh index of paths: what `known` has of files that have not changed since, UNKNOWN for all others."""
    rows = np.zeros(len(paths), dtype=ROW)
    rows["file"] = fingerprints(paths)
    for place, path in enumerate(paths):
        try:
            status = os.stat(path)
            rows["bytes"][place], rows["changed"][place] = status.st_size, status.st_mtime_ns
        except OSError:
            rows["bytes"][place] = -1
    fresh = VideoIndex(rows, np.zeros(0))
    if known is None or not len(known):
        return fresh
    order = np.argsort(known.rows["file"], kind="stable")
    place = order[
        np.searchsorted(known.rows["file"], rows["file"], sorter=order).clip(max=len(known) - 1)
    ]
    same = np.logical_and.reduce(
        [known.rows[name][place] == rows[name] for name in ("file", "bytes", "changed")]
    )
    same &= known.rows["version"][place] == VERSION
    rows[same] = known.rows[place[same]]
    for number in np.flatnonzero(same & (rows["times_at"] >= 0)).tolist():
        info = known.info(int(place[number]), paths[number])
        if info is None:
            rows["state"][number] = UNKNOWN
        else:
            fresh.fill(number, info)
    return fresh


def save(target: Path, index: VideoIndex) -> None:
    """Write an index by way of temporary files; the times first, since the rows count on them."""
    times = index.all_times()
    if len(times):
        _write(times_path(target), times)
    _write(target, index.rows)


def _write(target: Path, values: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, values)
    os.replace(temporary, target)


def carry_over(source: str | Path, target: str | Path, paths) -> None:
    """Give the manifest `target` of these paths what the index of the manifest `source` knows of them, if there is one."""
    known = open_index(index_path(source)) if source else None
    if known is not None:
        save(index_path(target), start(paths, known))
