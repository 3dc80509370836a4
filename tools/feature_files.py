"""Files of features: one table for all clips, or a folder with a file per video.

A table (.npz) holds features (m, ...) float32 of m clips. A folder has FILE.npy (windows, ...)
float32 for each FILE, written as soon as it is complete. Its features.json records the settings:
calls with other settings are refused, and files that exist are not computed again.
"""

import contextlib
import fcntl
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from data.input_files import ReadError
from util.dist import UserError
from util.files import MAX_NAME, atomic_write, save_csv

SETTINGS = "features.json"
LIST = "index.csv"
UNREADABLE = "unreadable.csv"
LOCK = ".lock"
_locks: list[TextIO] = []  # held until this process ends


class ClipRows(NamedTuple):
    """The features of clips of all files, sorted by file and clip."""

    file: np.ndarray  # (m,) int64 index of the file of each clip
    clip: np.ndarray  # (m,) int64 index of the clip in its file
    features: np.ndarray  # (m, ...) float32


def save_table(
    path: Path,
    rows: ClipRows,
    samples: dict[str, list],
    unreadable: dict[str, str],
    spans: np.ndarray | None,
) -> None:
    """Write the features of all clips to an .npz file.

    samples: paths and labels of all files, of which those with clips are written, and classes.
    unreadable: {path: reason}. spans: (m, 2) start and end of the clips in seconds, None for a clip
    of each whole file.
    """
    kept, video = np.unique(rows.file, return_inverse=True)
    arrays = {
        "features": rows.features,
        "labels": np.array(samples["labels"], np.int64)[kept],
        "paths": np.array(samples["paths"])[kept],
        "classes": np.array(samples["classes"], str),
        "unreadable": np.array(list(unreadable), str),
        "reasons": np.array(list(unreadable.values()), str),
    }
    if spans is not None:
        arrays |= {"video": video, "start": spans[:, 0], "end": spans[:, 1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)


def lock_folder(folder: Path) -> None:
    """Lock a folder of features until this process ends.

    Raises UserError if another process writes it. Does nothing on file systems without locks.
    """
    file = open(folder / LOCK, "a")  # noqa: SIM115 (stays open until the process ends)
    _locks.append(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"another process writes {folder}. Wait for its end, or choose another --output."
        ) from None
    except OSError:
        return


def open_folder(folder: Path, settings: dict, informative: tuple[str, ...]) -> None:
    """Create and lock a folder of features, or one with the same settings, to continue it.

    informative: names of settings that may differ. Raises UserError for other settings, and for a
    folder of other things.
    """
    record = folder / SETTINGS
    if folder.is_dir() and not record.exists() and _holds_other_files(folder):
        raise UserError(
            f"--output {folder} is not empty, and has no {SETTINGS}. Choose a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    if record.exists():
        check_settings(record, settings, informative)
        return
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _holds_other_files(folder: Path) -> bool:
    """Return whether a folder holds more than what an interrupted start of this tool leaves."""
    own = (LOCK, "features.tmp.json")
    return any(entry.name not in own for entry in folder.iterdir())


def check_settings(record: Path, settings: dict, informative: tuple[str, ...]) -> None:
    """Raise UserError if the features of a folder have other settings, or none are readable."""
    try:
        recorded = json.loads(record.read_text())
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(f"{record} cannot be read. Choose another --output.")
    differing = [
        f"{name}: {recorded.get(name)} there, {settings[name]} now"
        for name in settings
        if name not in informative and recorded.get(name) != settings[name]
    ]
    if differing:
        raise UserError(
            f"{record.parent} has features of other settings ({'; '.join(differing)}). "
            "Choose another --output, or use the settings of that folder."
        )


def file_names(paths: list[str], folder: str) -> list[str]:
    """Return the name of each file's features: its path below a folder, or below their common one.

    "/data/a/x.mp4" and "/data/b/y.mp4" give "a/x.mp4.npy" and "b/y.mp4.npy". folder: where the
    paths were found, "" if they come from a manifest. Raises UserError if a name is too long.
    """
    root = common_folder(paths, folder)
    names = [os.path.relpath(path, root) + ".npy" for path in paths]
    for path, name in zip(paths, names, strict=True):
        if len(os.fsencode(os.path.basename(name))) > MAX_NAME:
            raise UserError(
                f"{path}: the file of its features would have more than {MAX_NAME} bytes in its "
                "name. Rename the video, or write an .npz."
            )
    return names


def common_folder(paths: list[str], folder: str) -> str:
    """Return the absolute path of a folder, or of the common one of all paths if it is ""."""
    if folder:
        return os.path.abspath(folder)
    return os.path.commonpath({os.path.dirname(os.path.abspath(path)) for path in paths})


def count_clips(path: Path, shape: tuple[int, ...]) -> int:
    """Return the number of clips in a file of features; 0 if it is not complete.

    shape: of the features of a clip.
    """
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return 0
    if table.shape[1:] != shape or table.dtype != np.float32:
        return 0
    return len(table)


def write_files(
    rows: Iterable[tuple[int, np.ndarray]], counts: dict[int, int], targets: dict[int, Path]
) -> None:
    """Write the features of each file when they are complete.

    rows: (file, features of a clip) in order. counts: number of clips of each file. A file of
    which clips are missing is not written. Raises UserError if writing fails.
    """
    for file, clips in itertools.groupby(rows, key=lambda row: row[0]):
        target = targets[file]
        target.parent.mkdir(parents=True, exist_ok=True)
        features = (features for _, features in clips)
        # otherwise the loader has given the reason
        with contextlib.suppress(ReadError), atomic_write(target) as temporary:
            write_array(temporary, counts[file], features)


def write_array(path: Path, count: int, rows: Iterator[np.ndarray]) -> None:
    """Write `count` rows (...) as an .npy file (count, ...) float32, one at a time.

    Raises ReadError for fewer rows, and UserError if writing fails.
    """
    written = 0
    with open(path, "wb") as file:
        for row in rows:
            content = np.ascontiguousarray(row, "<f4").tobytes()
            if written == 0:
                content = _header((count, *row.shape)) + content
            _write(file, content)
            written += 1
    if written < count:
        raise ReadError(f"{count - written} of {count} clips are missing")


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the start of an .npy file of an array float32."""
    header = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _write(file: BinaryIO, content: bytes) -> None:
    """Write bytes to a file. Raises UserError, for example if the disk is full."""
    try:
        file.write(content)
        file.flush()
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be written ({error.strerror}). "
            "Run the same command again to continue.",
            print_on_any_rank=True,
        ) from error


def write_lists(
    folder: Path, samples: list[tuple[str, str, str]], shape: tuple[int, ...], unreadable: dict
) -> int:
    """Write the list of the files in a folder of features, and that of the unreadable ones.

    samples: (path, file, label) each. shape: of the features of a clip. unreadable:
    {path: reason}. Returns the number of files that have features.
    """
    import pandas as pd

    table = pd.DataFrame(samples, columns=["path", "file", "label"])
    table["windows"] = [count_clips(folder / file, shape) for file in table["file"]]
    table = table[table["windows"] > 0]
    save_csv(table, folder / LIST)
    (folder / UNREADABLE).unlink(missing_ok=True)
    if unreadable:
        reasons = pd.DataFrame(unreadable.items(), columns=["path", "reason"])
        save_csv(reasons, folder / UNREADABLE)
    return len(table)
