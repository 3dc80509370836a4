"""Save without a stall: copy a checkpoint to host memory, and write the copy in a thread.

A thread suffices: torch.save holds Python's lock between the tensors, but not while it writes one.
Training is as fast beside it as beside a process (benchmarks/results/saving.md), which would need
shared memory.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from util.checkpoint import SYSTEM_ERROR
from util.checkpoint_schema import all_tensors


class HostCopy:
    """Copies of checkpoints in host memory; each overwrites the one before.

    The memory stays allocated: it does not grow from save to save, and only the first copy waits
    for the system to provide it.
    """

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self.step = -1  # of the copy
        # data_ptr: (source, its copy). Holding the source keeps its address from being used again.
        self.buffers: dict[int, tuple[UntypedStorage, Tensor]] = {}
        self.copied: set[int] = set()  # data_ptr of the sources copied at `step`

    def invalidate(self) -> None:
        """Copy all tensors at the next save: some have changed without an update."""
        self.step = -1

    def missing_bytes(self, contents: dict) -> int:
        """Return how many bytes a copy of these contents has to allocate."""
        sources = {}
        for tensor in all_tensors(contents):
            source = tensor.untyped_storage()
            if not self._has_buffer(source):
                sources[source.data_ptr()] = allocated_bytes(source)
        return sum(sources.values())

    def take(self, contents: dict, step: int) -> dict:
        """Return a copy of a checkpoint's contents, with all tensors on the host.

        step: number of updates done. Tensors that were copied at this step are not copied again,
        unless `invalidate` was called: updates change them. What shares memory does so in the copy,
        so torch.save writes the same bytes. Raises MemoryError.
        """
        if step != self.step:
            self.step = step
            self.copied = set()
        tensors = list(all_tensors(contents))
        for tensor in tensors:
            self._copy_storage(tensor.untyped_storage())
        self.buffers = {key: self.buffers[key] for key in self.copied}
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()  # once, for all tensors
        return copy.deepcopy(contents, {id(tensor): self._on_host(tensor) for tensor in tensors})

    def _has_buffer(self, source: UntypedStorage) -> bool:
        """Return whether there is memory for a copy of this storage."""
        _, buffer = self.buffers.get(source.data_ptr(), (None, None))
        return buffer is not None and buffer.numel() == source.nbytes()

    def _copy_storage(self, source: UntypedStorage) -> None:
        """Start copying a storage, unless it was copied at this step."""
        key = source.data_ptr()
        if key in self.copied:
            return
        if not self._has_buffer(source):
            self.buffers[key] = (source, new_buffer(source))
        _, buffer = self.buffers[key]
        content = torch.empty(0, dtype=torch.uint8, device=source.device).set_(source)
        buffer.copy_(content, non_blocking=True)
        self.copied.add(key)

    def _on_host(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor, with its shape and strides."""
        _, buffer = self.buffers[tensor.untyped_storage().data_ptr()]
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(
            buffer.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def allocated_bytes(source: UntypedStorage) -> int:
    """Return the memory that `new_buffer` takes: torch rounds pinned memory to a power of two."""
    size = source.nbytes()
    return 2 ** (size - 1).bit_length() if source.device.type == "cuda" else size


def new_buffer(source: UntypedStorage) -> Tensor:
    """Return host memory of the size of a storage (N,) uint8, pinned for one on a GPU.

    Raises MemoryError.
    """
    try:
        return torch.empty(
            source.nbytes(), dtype=torch.uint8, pin_memory=source.device.type == "cuda"
        )
    except RuntimeError as error:
        if SYSTEM_ERROR.search(str(error)) is None:
            raise
        raise MemoryError(str(error)) from error


class Write(NamedTuple):
    """A checkpoint file being written."""

    path: Path
    step: int
    problem: Future  # the warning that it could not be written, "" if it was


class Outcome(NamedTuple):
    """A checkpoint file that was written, or could not be."""

    path: Path
    step: int
    written: bool


class BackgroundWriter:
    """Writes files in a thread, one after the other. The process does not exit before their end."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writes: list[Write] = []  # those that `finish` has not returned
        self.reported = 0  # number of these that `new_problems` has considered

    def start(self, path: Path, step: int, write: Callable[[], str]) -> None:
        """Call `write()` in the thread; it returns a warning if it fails, else ""."""
        self.writes.append(Write(path, step, self.thread.submit(write)))

    def is_busy(self) -> bool:
        """Return whether a file is being written."""
        return not all(write.problem.done() for write in self.writes)

    def new_problems(self) -> list[str]:
        """Return the warnings of failures since the last call, without waiting."""
        problems = []
        for write in self.writes[self.reported :]:
            if not write.problem.done():
                break
            self.reported += 1
            if write.problem.result():
                problems.append(write.problem.result())
        return problems

    def wait(self, seconds: float) -> bool:
        """Wait at most some seconds for all files. Return whether none is left."""
        return not wait([write.problem for write in self.writes], seconds).not_done

    def finish(self) -> list[Outcome]:
        """Return what became of all files, in order, and forget them. They are not busy."""
        outcomes = []
        for write in self.writes:
            outcomes.append(Outcome(write.path, write.step, not write.problem.result()))
        self.writes = []
        self.reported = 0
        return outcomes
