"""Worker processes of the loader: their watchdog, their signals, and the quarantine.

The watchdog records which file each worker reads, and kills a worker whose file takes too long.
The quarantine is a CSV file (path, reason) of the files that hung, or killed a worker twice.
Training also lists them in bad_videos.csv: see util/bad_files.py.
"""

import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from util.dist import print0
from util.files import append_rows, read_rows

TICK = 0.25  # seconds between two looks at the workers
STALL_SECONDS = 60  # that workers may do nothing while a batch is awaited
PROCESS, FILE, READS = range(3)  # columns of the watchdog's slots
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal to send when the parent ends


class WorkerWatchdog:
    """Records which file each worker reads, and kills a worker whose file takes too long.

    A thread of the main process counts the seconds of each file in short ticks. Time in which the
    job, or the worker, is suspended does not count: a late tick counts as one that is in time. A
    worker's own timer would count it, and its own thread cannot run while a library hangs.

    seconds: that a file may take.

    Attributes:
        slots: (num_workers, 3) int64 in shared memory, so that they outlive a worker: its process
            id, 1 + the index of the file that it reads (0: none), and its number of reads so far.
        waiting: Whether the main process waits for a batch.
        timed_out: Ids of the workers that were killed because of their file.
        stalled: Whether the workers were killed because they did nothing.
    """

    def __init__(self, num_workers: int, seconds: float):
        self.seconds = seconds
        memory = mmap.mmap(-1, max(1, num_workers) * 3 * 8)
        self.slots = np.frombuffer(memory, np.int64).reshape(-1, 3)[:num_workers]
        self.waiting = False
        self.timed_out: set[int] = set()
        self.stalled = False

    @contextlib.contextmanager
    def watch(self, index: int) -> Iterator[None]:
        """Watch a worker while it reads file `index`.

        Does nothing in the main process, which must not be killed.
        """
        worker = get_worker_info()
        if worker is None:
            yield
            return
        slot = self.slots[worker.id]
        slot[:] = (os.getpid(), index + 1, slot[READS] + 1)
        try:
            yield
        finally:
            slot[FILE] = 0

    def start(self, workers: list[BaseProcess]) -> None:
        """Watch worker processes until they have ended, in a thread."""
        self.timed_out = set()
        self.stalled = False
        processes = [worker.pid for worker in workers if worker.pid is not None]
        threading.Thread(target=self._watch_workers, args=(processes,), daemon=True).start()

    def file_of(self, process: int | None) -> int | None:
        """Return the index of the file that a worker reads, or read when it died, or None."""
        for worker, file, _ in self.slots.tolist():
            if worker == process and file > 0:
                return file - 1
        return None

    def _watch_workers(self, workers: list[int]) -> None:
        """Kill workers that take too long, until all have ended. workers: process ids."""
        timers = [ReadTimer() for _ in workers]
        idle_seconds = 0.0
        last_look = time.monotonic()
        while True:
            time.sleep(TICK)
            now = time.monotonic()
            seconds = min(now - last_look, 2 * TICK)
            last_look = now
            states = {worker: child_state(worker) for worker in workers}
            if set(states.values()) == {"ended"}:
                return
            idle = self.waiting and set(states.values()) == {"running"}
            for timer, (worker, file, reads) in zip(timers, self.slots.tolist(), strict=True):
                if file == 0 or worker not in states:
                    continue
                idle = False
                if states[worker] == "running" and timer.add(reads, seconds) > self.seconds:
                    self.timed_out.add(worker)
                    kill(worker)
            idle_seconds = idle * (idle_seconds + seconds)
            if idle_seconds > STALL_SECONDS:
                self.stalled = True
                for worker in workers:
                    kill(worker)


class ReadTimer:
    """Counts the seconds that a worker has spent on its present read."""

    def __init__(self):
        self.reads = 0
        self.seconds = 0.0

    def add(self, reads: int, seconds: float) -> float:
        """Add seconds; return those of read number `reads` since it was first seen."""
        if reads == self.reads:
            self.seconds += seconds
        else:
            self.reads = reads
            self.seconds = 0.0
        return self.seconds


def child_state(process: int) -> str:
    """Return "running", "suspended" or "ended" for a child process. Its exit code stays unread."""
    try:
        options = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        result = os.waitid(os.P_PID, process, options)
    except ChildProcessError:  # another thread has read its exit code
        return "ended"
    if result is None:
        return "running"
    if result.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED):
        return "suspended"
    return "ended"


def kill(process: int) -> None:
    """Kill a process, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def init_worker(_worker_id: int) -> None:
    """Prepare a worker process.

    Ignore stop signals, which schedulers and terminals send to all processes: the main process
    handles them and ends its workers. End with the main process, even while a file hangs. Use one
    torch thread, since workers share the cores. Freeze the garbage collector, which keeps
    copy-on-write pages shared with the main process.
    """
    for stop_signal in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(stop_signal, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    gc.freeze()


def ignore_dead_workers(_signum: int, _frame: object) -> None:
    """Ignore SIGCHLD, in place of torch's own handler.

    That one raises at an arbitrary line, for a dead worker of any loader, and could interrupt an
    update. A loader that waits for a batch checks its own workers every five seconds.
    """


def kill_workers() -> None:
    """Kill all workers at the end of the process: they ignore the SIGTERM that torch would send."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def how_it_ended(exit_code: int | None) -> str:
    """Return how a process ended, such as "SIGKILL" or "exit code 1"."""
    if exit_code is None:
        return "still running"
    if exit_code < 0:
        names = {item.value: item.name for item in signal.Signals}
        return names.get(-exit_code, f"signal {-exit_code}")
    return f"exit code {exit_code}"


def read_quarantine(path: Path) -> dict[str, str]:
    """Return the quarantined files {path: reason} of this run and earlier ones.

    Prints a warning if some lines are something else.
    """
    rows, problem = read_rows(path)
    if problem:
        print0(
            f"warning: {path} is damaged ({problem}): files in it are tried again. "
            "Remove these lines or the file."
        )
    return dict(rows)  # type: ignore[arg-type]


def add_to_quarantine(quarantine: Path, path: str, reason: str) -> None:
    """Add a file to the quarantine, for this run and later ones. Raises OSError.

    Safe on several processes at once.
    """
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    append_rows(quarantine, [(path, reason)])
