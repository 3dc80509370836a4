"""System limits that loader workers run into: open files, shared memory, memory, processes.

A batch travels from a worker to the main process in shared memory, which Linux keeps in /dev/shm.
Files that cannot be opened for lack of descriptors are not bad files: the run ends instead.
"""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from util.dist import NO_FILES_ERRORS, UserError, local_world_size, open_files_problem

SHARED_MEMORY = Path("/dev/shm")
OPEN_FILES = Path("/proc/self/fd")  # one entry for each file that this process has open
FILES_PER_WORKER = 4  # that the main process keeps open: pipes and the handle of the process
FILES_IN_RESERVE = 64  # of a worker: videos, prefetched batches; of the main process: output
USUAL_LIMIT = 1024  # of open files
PROBE_FILES = 8  # a library may need several files at once
NO_ROOM_LEFT = "No space left on device"  # torch raises RuntimeError without a number
NO_MEMORY_LEFT = "can't allocate memory"


class LoaderNeeds(NamedTuple):
    """What the workers of a loader need from the system."""

    num_workers: int
    batches: int  # prefetched by all workers
    batch_bytes: int  # of a batch, in shared memory


def check_limits(loaders: Sequence[LoaderNeeds]) -> None:
    """Raise UserError if the workers of some loaders would reach a limit of the system.

    loaders: all those of this process whose workers are still to be started.
    """
    loaders = [needs for needs in loaders if needs.num_workers > 0]
    if not loaders:
        return
    _reserve_open_files(sum(needs.num_workers for needs in loaders))
    _check_shared_memory(loaders)


def _reserve_open_files(num_workers: int) -> None:
    """Raise the limit of open files if `num_workers` workers need more, or raise UserError."""
    if not OPEN_FILES.exists():
        return
    open_now = len(os.listdir(OPEN_FILES))
    needed = open_now + FILES_PER_WORKER * num_workers + FILES_IN_RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _suffices(soft, needed):
        return
    if _suffices(hard, needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return
    raise UserError(
        f"{hard} open files are allowed (ulimit -n), {needed} are needed with {num_workers} "
        f"loader workers: raise the limit (ulimit -n {max(needed, USUAL_LIMIT)}) or lower "
        "--num_workers",
        print_on_any_rank=True,
    )


def _suffices(limit: int, needed: int) -> bool:
    """Return whether a resource limit allows what is needed."""
    return limit == resource.RLIM_INFINITY or limit >= needed


def _check_shared_memory(loaders: Sequence[LoaderNeeds]) -> None:
    """Raise UserError if the prefetched batches of some loaders exceed the free shared memory.

    The processes of this machine share it, and each of them has the same loaders.
    """
    if not SHARED_MEMORY.exists():
        return
    processes = local_world_size()
    needed = processes * sum(needs.batches * needs.batch_bytes for needs in loaders)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return
    parts = [f"{needs.batches} batches of {megabytes(needs.batch_bytes)}" for needs in loaders]
    detail = " and ".join(parts)
    if processes > 1:
        detail += f", in each of {processes} processes"
    raise UserError(
        f"{SHARED_MEMORY} has {megabytes(free)} free, the batches that loader workers prefetch "
        f"take {megabytes(needed)} ({detail}): lower --num_workers or --batch_size_per_gpu, or "
        f"enlarge it (docker run --shm-size={needed // 10**9 + 1}g)",
        print_on_any_rank=True,
    )


def megabytes(size: int) -> str:
    """Return a number of bytes in MB."""
    return f"{size / 1e6:.3g} MB"


def out_of_files() -> str:
    """Return why this process cannot open files, with the cure; "" if it can.

    The error of a library does not always have the system's number: try to open some files.
    """
    opened: list[int] = []
    try:
        for _ in range(PROBE_FILES):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno in NO_FILES_ERRORS:
            return open_files_problem(error)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return ""


def check_open_files() -> None:
    """Raise UserError if this process can open no more files."""
    reason = out_of_files()
    if reason:
        raise UserError(reason, print_on_any_rank=True)


def exhausted(error: Exception) -> str:
    """Return which limit of the system an error is about, with the cure; "" for another error."""
    if isinstance(error, MemoryError) or NO_MEMORY_LEFT in str(error):
        return "a loader worker has no memory left: lower --num_workers or --batch_size_per_gpu"
    if NO_ROOM_LEFT in str(error) and SHARED_MEMORY.exists():
        free = shutil.disk_usage(SHARED_MEMORY).free
        return (
            f"a loader worker has no room for a batch in {SHARED_MEMORY} ({megabytes(free)} free): "
            "lower --num_workers or --batch_size_per_gpu, or enlarge it (docker run --shm-size=8g)"
        )
    return out_of_files()
