"""How much memory the machine has left for this process."""

from pathlib import Path
from typing import NamedTuple

SYSTEM = Path("/")  # where the system's files are


class CgroupFiles(NamedTuple):
    """Names of a control group's files, and of the line that counts cached files."""

    limit: str
    used: str
    cached: str


VERSION_2 = CgroupFiles("memory.max", "memory.current", "inactive_file")
VERSION_1 = CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(system: Path = SYSTEM) -> int | None:
    """Return the bytes of host memory that are left to this process; None if that is unknown.

    It is the least of what the machine has and what the process's control groups allow (containers
    and SLURM set them). Memory that caches files counts as left. system: the root folder.
    """
    left = []
    free = _numbers(system / "proc/meminfo").get("MemAvailable:")
    if free is not None:
        left.append(free * 1024)
    for folder, files in _own_cgroups(system):
        limit = _number(folder / files.limit)
        used = _number(folder / files.used)
        if limit is not None and used is not None:
            cached = _numbers(folder / "memory.stat").get(files.cached, 0)
            left.append(limit - used + cached)
    return min(left, default=None)


def _own_cgroups(system: Path) -> list[tuple[Path, CgroupFiles]]:
    """Return the folders of this process's control groups and of those around them."""
    found = []
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        root = system / "sys/fs/cgroup"
        files = VERSION_2
        if "memory" in controllers.split(","):
            root = root / "memory"
            files = VERSION_1
        elif controllers:
            continue
        group = root / path.lstrip("/")
        around = [folder for folder in group.parents if folder.is_relative_to(root)]
        found += [(folder, files) for folder in (group, *around)]
    return found


def _text(path: Path) -> str:
    """Return the content of a file of the system, "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """Return the number in a file of the system, None if there is none, as in "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers in a file of the system with lines of a name and a number."""
    words = [line.split() for line in _text(path).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
