"""When one process of a run fails, all of them end, within seconds and with one message.

A process that fails writes why into the store of the process group, the key-value server through
which the processes have found each other. In each process a thread looks there every second and
ends its process if another one has failed: the main thread may wait in a collective for a process
that is gone, and nothing else would end that.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch.distributed import Store

POLL_SECONDS = 1.0
WAIT_FOR_RANK0 = 5.0  # seconds that a failing rank waits for rank 0 to fail with the same error
WAIT_FOR_OTHERS = 5.0  # seconds that the store's process stays after its failure
WAIT_FOR_END = 60.0  # likewise after a run that has succeeded
ANSWER_SECONDS = 10.0  # that the store may take, on the other side of a network that is cut
FAILURE = "stmae/failure"  # keys in the store
GONE = "stmae/gone"
Answer = TypeVar("Answer")


class Failure(NamedTuple):
    """What the first process that failed has told the others."""

    rank: int
    host: str
    code: int  # exit code, also of the others
    reason: str  # one line


def end_process(code: int) -> None:
    """End this process at once, its loader workers included, from any thread.

    Nothing is waited for, unlike at the interpreter's own exit: no collective, and no thread.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def answer_in_time(ask: Callable[[], Answer], seconds: float | None = None) -> Answer | None:
    """Return what `ask` gets from the store, None if that takes longer or the store has ended.

    A store that cannot be reached answers never, and no time-out of its own ends such a call.
    seconds: None for ANSWER_SECONDS.
    """
    answers: list[Answer] = []

    def wait() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS if seconds is None else seconds)
    return answers[0] if answers else None


class FailureWatch:
    """Tells the other processes of a run that this one fails, and ends it if another one does."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        outlives_ranks: bool,
        report: Callable[[Failure], None],
    ):
        """Start the thread.

        outlives_ranks: the store is in the launcher, not in rank 0. report: prints that another
        process has failed.
        """
        self.server = store  # rank 0's process serves it as long as it has it
        self.store = store.clone()  # with a connection of its own
        self.rank = rank
        self.world_size = world_size
        self.outlives_ranks = outlives_ranks
        self.report = report
        self.failed = threading.Event()  # this process has announced a failure
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def announce(self, reason: str, code: int, at_once: bool) -> Failure:
        """Tell all processes that this one fails. Return the failure that was announced first.

        at_once: do not wait for rank 0, which may be about to fail with the same error.
        """
        own = Failure(self.rank, socket.gethostname(), code, reason)
        self.failed.set()
        return answer_in_time(lambda: self._exchange(own, at_once)) or own

    def _exchange(self, own: Failure, at_once: bool) -> Failure:
        """Announce this process's failure; return the first one. Raises RuntimeError."""
        deadline = time.monotonic() + WAIT_FOR_RANK0
        while not at_once and self.rank > 0 and time.monotonic() < deadline:
            if self.store.check([FAILURE]):
                break
            time.sleep(0.2)
        return Failure(*json.loads(self.store.compare_set(FAILURE, "", json.dumps(own))))

    def leave(self) -> None:
        """Stop watching, at the end of the process. The store's process waits for the others."""
        self.leaving.set()
        self.thread.join(ANSWER_SECONDS)
        patience = WAIT_FOR_OTHERS if self.failed.is_set() else WAIT_FOR_END
        answer_in_time(lambda: self._wait_for_others(patience), patience + ANSWER_SECONDS)

    def _wait_for_others(self, patience: float) -> None:
        """Count this process as gone, and the store's process waits for the others' end.

        patience: seconds that it waits. Raises RuntimeError.
        """
        deadline = time.monotonic() + patience
        gone = self.store.add(GONE, 1)
        hosts_store = self.rank == 0 and not self.outlives_ranks
        while hosts_store and gone < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = self.store.add(GONE, 0)

    def _watch(self) -> None:
        """End the process if another one has failed."""
        while not self.leaving.wait(POLL_SECONDS):
            if self.failed.is_set():
                return
            try:
                failure = self._announced()
            except RuntimeError:
                if self.outlives_ranks:
                    return  # the launcher has died: see util/preemption.py
                if self.leaving.wait(WAIT_FOR_OTHERS):
                    return
                failure = Failure(0, "its host", 1, "")
            if failure is not None and not self.failed.is_set():
                self._end_for(failure)

    def _announced(self) -> Failure | None:
        """Return the failure of another process, if there is one. Raises RuntimeError."""
        if not self.store.check([FAILURE]):
            return None
        return Failure(*json.loads(self.store.get(FAILURE)))

    def _end_for(self, failure: Failure) -> None:
        """End this process because of another one's failure."""
        self.report(failure)
        answer_in_time(lambda: self.store.add(GONE, 1))
        end_process(failure.code)
