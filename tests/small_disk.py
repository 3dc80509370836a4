"""A small disk that a test fills and frees: a tmpfs, which needs the right to mount."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEBIBYTES = 64


class SmallDisk:
    """A file system of a few MiB at `folder`."""

    def __init__(self, folder: Path):
        """Take a folder that is such a disk: see `small_disk`."""
        self.folder = folder
        self.filler = folder / "filler"

    def fill(self) -> None:
        """Leave no byte free."""
        with open(self.filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))

    def free(self) -> None:
        """Free what `fill` took."""
        self.filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk | None]:
    """Mount a small disk at a folder for the block; None if this process may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount(folder):
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    """Return whether this process may mount a small disk."""
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder)) as disk:
        return disk is not None


def _mount(folder: Path) -> bool:
    if shutil.which("mount") is None:
        return False
    options = f"size={MEBIBYTES}m"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0
