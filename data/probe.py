"""The index of a manifest: what is in each of its video files, found out once (by `python -m data.index`) and kept beside it.

A table of one row per video in the order of the manifest, `NAME.index.npy` beside `NAME.csv`, that worker processes map into
memory. A row holds for as long as its file keeps its size and date; without an index each file is looked at when it is read.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from data.decode import VideoInfo

UNKNOWN, READABLE, UNREADABLE = 0, 1, 2
ROW = np.dtype([
    ("file", "u8"), ("bytes", "i8"), ("changed", "i8"), ("state", "u1"), ("rotation", "i2"), ("frames", "i4"), ("width", "i4"), ("height", "i4"),
    ("fps", "f8"), ("key_distance", "f8"), ("codec", "S12"), ("reason", "S64"),
])  # fmt: skip  file: hash of the path; changed: time of the last change, ns; reason: why it is unreadable


def index_path(manifest: str | Path) -> Path:
    """Where the index of a manifest lies: train.csv -> train.index.npy."""
    return Path(manifest).with_suffix(".index.npy")


def fingerprints(paths) -> np.ndarray:
    """A 64-bit hash of each path (n,)."""
    return np.array([int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little") for path in paths], dtype=np.uint64)


def load(manifest: str | Path, paths) -> np.ndarray | None:
    """The index (n,) ROW of a manifest's paths, mapped into memory, or None if there is none that fits."""
    try:
        rows = np.load(index_path(manifest), mmap_mode="r") if manifest else None
    except (OSError, ValueError):  # none, or not one
        rows = None
    if rows is None:
        return None
    fits = rows.dtype == ROW and len(rows) == len(paths) and np.array_equal(rows["file"], fingerprints(paths))
    return rows if fits else None


def start(paths, known: np.ndarray | None) -> np.ndarray:
    """A fresh index (n,) ROW of paths: what `known` has of files that have not changed since, UNKNOWN for all others."""
    rows = np.zeros(len(paths), dtype=ROW)
    rows["file"] = fingerprints(paths)
    for place, path in enumerate(paths):
        try:
            status = os.stat(path)
            rows["bytes"][place], rows["changed"][place] = status.st_size, status.st_mtime_ns
        except OSError:
            rows["bytes"][place] = -1
    if known is not None and known.dtype == ROW and len(known):
        order = np.argsort(known["file"], kind="stable")
        place = order[np.searchsorted(known["file"], rows["file"], sorter=order).clip(max=len(known) - 1)]
        same = np.logical_and.reduce([known[name][place] == rows[name] for name in ("file", "bytes", "changed")])
        rows[same] = known[place[same]]
    return rows


def save(target: Path, rows: np.ndarray) -> None:
    """Write an index by way of a temporary file."""
    temporary = target.with_name(target.name + ".tmp")
    with open(temporary, "wb") as file:
        np.save(file, rows)
    os.replace(temporary, target)


def carry_over(source: str | Path, target: str | Path, paths) -> None:
    """Give the manifest `target` of these paths what the index of the manifest `source` knows of them, if there is one."""
    try:
        known = np.load(index_path(source), mmap_mode="r") if source else None
    except (OSError, ValueError):
        return
    if known is None:
        return
    save(index_path(target), start(paths, known))


def info_of(row: np.void, path: str) -> VideoInfo | None:
    """What a row says, or None if it knows nothing or the file has another size by now."""
    if row["state"] != READABLE or os.stat(path).st_size != row["bytes"]:
        return None
    return VideoInfo(int(row["frames"]), float(row["fps"]), int(row["width"]), int(row["height"]), int(row["rotation"]),
                     float(row["key_distance"]), row["codec"].decode())  # fmt: skip


def fill(row: np.void, info: VideoInfo | None, reason: str) -> None:
    """Put into a row what `data.decode.describe` found: info, or the reason why there is none."""
    row["state"], row["reason"] = (READABLE, b"") if info else (UNREADABLE, reason.encode()[:64])
    if info:
        row["frames"], row["fps"], row["width"], row["height"], row["rotation"], row["key_distance"] = info[:6]
        row["codec"] = info.codec.encode()[:12]
