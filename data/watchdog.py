"""Worker processes of the loader: their watchdog, their signals, and the quarantine.

The watchdog records which file each worker reads, and kills a worker whose file takes too long.
The quarantine is a CSV file (path, reason) of the files that hung or killed a worker. Training also
lists them in bad_videos.csv: see util/bad_files.py.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from util.dist import print0
from util.files import append_rows, read_rows


class WorkerWatchdog:
    """Records which file each worker reads, and kills a worker whose file takes too long.

    seconds: that a file may take. slots: (num_workers, 2) in shared memory, so that they outlive a
    worker: its process id, and 1 + the index of the file that it reads (0: none).
    """

    def __init__(self, num_workers: int, seconds: float):
        self.seconds = seconds
        self.slots = torch.zeros(num_workers, 2, dtype=torch.int64).share_memory_()

    @contextlib.contextmanager
    def watch(self, index: int) -> Iterator[None]:
        """Watch a worker while it reads file `index`.

        Does nothing in the main process, which must not be killed. The alarm ends a worker in any
        code. faulthandler's timer could not: its lock hangs in a fork of a process that armed it.
        """
        worker = get_worker_info()
        if worker is None:
            yield
            return
        self.slots[worker.id] = torch.tensor([os.getpid(), index + 1])
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.slots[worker.id, 1] = 0

    def files_of_dead_workers(self) -> list[int]:
        """Return the indices of the files that dead workers were reading."""
        alive = {child.pid for child in multiprocessing.active_children()}
        return [slot - 1 for pid, slot in self.slots.tolist() if slot > 0 and pid not in alive]


def init_worker(_worker_id: int) -> None:
    """Prepare a worker process.

    Ignore stop signals, which schedulers and terminals send to all processes: the main process
    handles them and ends its workers. Let the watchdog's alarm end the process, even if the main
    process has a handler for it. Use one torch thread, since workers share the cores. Freeze the
    garbage collector, which keeps copy-on-write pages shared with the main process.
    """
    for stop_signal in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(stop_signal, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
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
