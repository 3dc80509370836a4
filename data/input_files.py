"""Checks on a video or image file before a library opens it, and the error for bad files."""

import os
import stat

MAX_REASON = 160  # characters


class ReadError(Exception):
    """A video or image cannot be read; the message is the reason, in one line."""


def check_path(path: str) -> str:
    """Return the absolute path of a regular, non-empty file. Raises ReadError for anything else."""
    # FFmpeg can mistake neither an absolute path for an option nor "concat:a|b" for a protocol.
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise ReadError(error.strerror or "cannot be opened") from None
    except ValueError as error:  # a NUL character in the path
        raise ReadError(f"invalid path: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ReadError("not a regular file")  # opening a FIFO would block
    if not status.st_size:
        raise ReadError("empty file")
    return path


def error_summary(error: Exception) -> str:
    """Return the first line of a library's message, without a prefix such as "[Errno 2] "."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    message = lines[0].rpartition("] ")[2]
    return message[:MAX_REASON] or type(error).__name__
