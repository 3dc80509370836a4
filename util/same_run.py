"""Check that all processes of a run train the same thing, before they wait for one another."""

import functools
import hashlib
import json
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

from util.checkpoint import truncate
from util.dist import UserError, all_gather_object
from util.logger import installed_version

PACKAGES = ("torch", "torchvision", "numpy", "av", "decord", "flash-attn", "triton")
LOCAL_FLAGS = ("num_workers", "pin_mem", "read_timeout", "device", "output_dir", "datafile_dir")
MOST_DIFFERENCES = 5  # that a message names
ABSENT = "(absent)"


def compare_commands(flags: dict[str, object]) -> None:
    """Raise UserError unless all processes have the same flags, code and packages.

    Call on every rank, before anything that depends on the flags. Flags that cannot change the
    result may differ, such as the number of workers.
    """
    facts = {f"--{name}": value for name, value in flags.items() if name not in LOCAL_FLAGS}
    facts["the code"] = code_digest()
    facts["Python"] = ".".join(platform.python_version_tuple()[:2])
    for package in PACKAGES:
        facts[package] = installed_version(package)
    compare(facts, "Start all processes with the same command, code and packages.")


def compare_data(facts: dict[str, object]) -> None:
    """Raise UserError unless all processes have the same data and the same position in the run.

    Call on every rank. facts: by name, such as fingerprints of data sets.
    """
    cure = "--output_dir and --datafile_dir must be folders that all machines share."
    compare(facts, cure)


def compare(facts: dict[str, object], cure: str) -> None:
    """Raise UserError, alike on every rank, unless these facts are equal on all ranks.

    facts: {name: value}, compared as text. cure: the end of the message. One collective, of a hash
    per rank, unless there are differences.
    """
    texts = {name: str(value) for name, value in facts.items()}
    encoded = json.dumps(texts, sort_keys=True).encode("utf-8", "surrogateescape")
    digests = all_gather_object(hashlib.sha256(encoded).digest())
    if len(set(digests)) == 1:
        return
    first, *others = all_gather_object((socket.gethostname(), texts))
    for rank, (host, other) in enumerate(others, start=1):
        differences = list(differing(first[1], other))
        if differences:
            described = "; ".join(differences[:MOST_DIFFERENCES])
            more = len(differences) - MOST_DIFFERENCES
            if more > 0:
                described += f"; and {more} more"
            raise UserError(
                f"rank {rank} on {host} differs from rank 0 on {first[0]}: {described}. {cure}"
            )


def differing(first: dict[str, str], other: dict[str, str]) -> Iterator[str]:
    """Yield in words what another rank has instead of rank 0's facts."""
    for name in sorted(first | other):
        expected = first.get(name, ABSENT)
        found = other.get(name, ABSENT)
        if expected != found:
            yield f"{name} {truncate(found)} instead of {truncate(expected)}"


@functools.cache
def code_digest() -> str:
    """Return a hash of the repository's own source files."""
    root = Path(__file__).parent.parent
    total = hashlib.sha256()
    for pattern in ("*.py", "util/*.py", "data/*.py", "tools/*.py"):
        for path in sorted(root.glob(pattern)):
            total.update(f"{path.relative_to(root)}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:12]
