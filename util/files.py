"""Files of a run, and helpers to write files completely or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

MAX_NAME = 255  # bytes of a file's name, on most file systems


class RunFiles(NamedTuple):
    """Paths of a run's files, all in one folder and with one prefix."""

    folder: Path  # --output_dir
    prefix: str  # --save_prefix

    def path(self, suffix: str) -> Path:
        """Return {folder}/{prefix}{suffix}."""
        return self.folder / f"{self.prefix}{suffix}"

    @property
    def checkpoint(self) -> Path:
        """Return the path of the newest checkpoint."""
        return self.path(".pth")

    @property
    def best(self) -> Path:
        """Return the path of the checkpoint with the best validation accuracy (finetuning)."""
        return self.path("_best.pth")

    @property
    def log(self) -> Path:
        """Return the path of the log, one JSON line per epoch."""
        return self.path("_log.txt")

    @property
    def marker(self) -> Path:
        """Return the path of the file that marks a preempted run, to be started again."""
        return self.path(".PREEMPTED")

    @property
    def lock(self) -> Path:
        """Return the path of the file that a process locks while it writes the run."""
        return self.folder / f".{self.prefix}.lock"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it replaces `path` at the end.

    If the block raises, the temporary file is removed and `path` stays as it was. The error of a
    full disk names `path`. The suffix stays last, since numpy and Pillow choose the format by it.
    """
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    if len(os.fsencode(temporary.name)) > MAX_NAME:
        digest = hashlib.sha256(os.fsencode(path.stem)).hexdigest()
        temporary = path.with_name(f"{digest}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # such as NotADirectoryError
            temporary.unlink(missing_ok=True)
        if type(error) is OSError and error.filename is None:
            # a write that fails does not name its file, and numpy's gives no number either
            reason = error.strerror or str(error)
            raise OSError(error.errno or errno.EIO, reason, str(path)) from error
        raise


def append_lines(path: Path, lines: bytes) -> None:
    """Append lines to a file; if its last line is incomplete, end it first. Raises OSError."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(lines)


def append_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    """Append rows (path, reason) to a CSV file. Raises OSError."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    append_lines(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_rows(path: Path) -> tuple[list[list[str]], str]:
    """Return the rows (path, reason) of a CSV file, and its problem, "" if all lines are valid.

    A file that does not exist has no rows.
    """
    rows = []
    other_lines = 0
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.reader(file):
                if len(row) == 2:
                    rows.append(row)
                elif row:
                    other_lines += 1
    except FileNotFoundError:
        return [], ""
    except (OSError, csv.Error) as error:
        return rows, str(error)
    if other_lines:
        return rows, f"lines that are not path,reason: {other_lines}"
    return rows, ""


def save_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV. Names of any bytes are kept."""
    quoting: Literal[0, 2] = csv.QUOTE_MINIMAL
    texts = table.select_dtypes(exclude="number")
    if any("\r" in str(text) for name in texts for text in texts[name]):
        quoting = csv.QUOTE_NONNUMERIC  # the csv module does not quote a carriage return by itself
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, quoting=quoting, errors="surrogateescape")


def span_columns(spans: np.ndarray) -> dict[str, list[str]]:
    """Return the columns start and end of a table, in seconds that are read back equal.

    spans: (n, 2) seconds; an infinite one, the end of the file, is "".
    """

    def column(times: np.ndarray) -> list[str]:
        return ["" if time == math.inf else repr(time) for time in times.tolist()]

    start, end = spans.T
    return {"start": column(start), "end": column(end)}


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk. Raises OSError, also where folders cannot be flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
