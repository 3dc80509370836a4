"""Hostile and corrupt checkpoint files."""

import os
from pathlib import Path

import numpy as np


class Payload:
    """Runs a command when it is unpickled without weights_only."""

    def __init__(self, marker: Path):
        """marker: the file that the command creates."""
        self.marker = marker

    def __reduce__(self):
        """Return what pickle calls to rebuild the object."""
        return os.system, (f"touch {self.marker}",)


def corrupted(content: bytes, flips: int) -> list[bytes]:
    """Return 6 truncated or foreign versions of a file, then `flips` with one bit flipped."""
    versions = [b"", content[:1], content[: len(content) // 2], content[:-1], content[1:]]
    versions.append(b"x" * 1000)
    draw = np.random.default_rng(0)
    for offset in draw.integers(0, len(content), flips):
        flipped = bytes([content[offset] ^ (1 << draw.integers(8))])
        versions.append(content[:offset] + flipped + content[offset + 1 :])
    return versions
