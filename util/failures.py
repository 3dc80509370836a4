"""When one process of a run fails, all of them end, within seconds and with one message.

The processes share a key-value store: the server through which they have found each other, in
torchrun or in rank 0.

1. A process that fails writes its `Failure` there (`announce`); the first one counts.
2. A thread of each process reads the entry every second and ends its process. The main thread may
   wait in a collective for a process that is gone, which nothing else would end.
3. Each process adds itself to NUM_LEFT when it leaves. Rank 0 waits for the others if it has the
   store.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TypeVar

from torch.distributed import Store

POLL_SECONDS = 1.0
WAIT_FOR_RANK0 = 5.0  # seconds that a failing rank waits for rank 0 to fail with the same error
WAIT_FOR_OTHERS = 5.0  # seconds that the store's process stays after its failure
WAIT_FOR_END = 60.0  # likewise after a run that has succeeded
CALL_SECONDS = 10.0  # that a call of the store may take: on a cut network it never returns
FAILURE = "stmae/failure"  # keys in the store
NUM_LEFT = "stmae/num_left"
Result = TypeVar("Result")


class Failure(NamedTuple):
    """The entry of the first process that failed."""

    rank: int
    host: str
    code: int  # exit code, also of the others
    reason: str  # one line
    time: float  # seconds since the epoch; makes each failure another one


def end_process(code: int) -> NoReturn:
    """End this process at once, its loader workers included, from any thread.

    Nothing is waited for, unlike at the interpreter's own exit: no collective, and no thread.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def call_with_timeout(call: Callable[[], Result], seconds: float | None = None) -> Result | None:
    """Return `call()`, or None if it takes longer or its other end has closed.

    seconds: None for CALL_SECONDS.
    """
    results: list[Result] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            results.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CALL_SECONDS if seconds is None else seconds)
    return results[0] if results else None


class FailureWatch:
    """Announces that this process of a run fails, and ends it if another one does."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        store_in_launcher: bool,
        report: Callable[[Failure], None],
    ):
        """Start the thread.

        store_in_launcher: the store is not in rank 0. Then it also serves the next start of the
        processes, after a failure: that entry is kept and ignored. report: prints that another
        process has failed.
        """
        self.kept_alive = store  # rank 0's process serves it as long as it has it
        self.store = store.clone()  # with a connection of its own
        self.rank = rank
        self.world_size = world_size
        self.store_in_launcher = store_in_launcher
        self.report = report
        self.earlier_entry = self._entry() if store_in_launcher else ""
        self.failed = threading.Event()  # this process has announced a failure
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def announce(self, reason: str, code: int, at_once: bool) -> Failure:
        """Tell all processes that this one fails. Return the failure that was announced first.

        at_once: do not wait for rank 0, which may be about to fail with the same error.
        """
        own = Failure(self.rank, socket.gethostname(), code, reason, time.time())
        self.failed.set()
        return call_with_timeout(lambda: self._exchange(own, at_once)) or own

    def _exchange(self, own: Failure, at_once: bool) -> Failure:
        """Announce this process's failure; return the first one. Raises RuntimeError."""
        deadline = time.monotonic() + WAIT_FOR_RANK0
        while not at_once and self.rank > 0 and time.monotonic() < deadline:
            if self._announced() is not None:
                break
            time.sleep(0.2)
        first = self.store.compare_set(FAILURE, self.earlier_entry, json.dumps(own))
        return Failure(*json.loads(first))

    def leave(self) -> None:
        """Stop watching, at the end of the process. The store's process waits for the others."""
        self.leaving.set()
        self.thread.join(CALL_SECONDS)
        seconds = WAIT_FOR_OTHERS if self.failed.is_set() else WAIT_FOR_END
        call_with_timeout(lambda: self._wait_for_others(seconds), seconds + CALL_SECONDS)

    def _wait_for_others(self, seconds: float) -> None:
        """Count this process as gone, and wait for the others' end if this process has the store.

        Raises RuntimeError.
        """
        deadline = time.monotonic() + seconds
        num_left = self.store.add(NUM_LEFT, 1)
        has_store = self.rank == 0 and not self.store_in_launcher
        while has_store and num_left < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            num_left = self.store.add(NUM_LEFT, 0)

    def _watch(self) -> None:
        """End the process if another one has failed."""
        while not self.leaving.wait(POLL_SECONDS):
            if self.failed.is_set():
                return
            try:
                failure = self._announced()
            except RuntimeError:
                if self.store_in_launcher:
                    return  # the launcher has died: see util/preemption.py
                if self.leaving.wait(WAIT_FOR_OTHERS):
                    return
                failure = Failure(0, "an unknown host", 1, "", 0.0)
            if failure is not None and not self.failed.is_set():
                self._end_for(failure)

    def _entry(self) -> str:
        """Return the failure in the store as text, "" if there is none. Raises RuntimeError."""
        return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else ""

    def _announced(self) -> Failure | None:
        """Return the failure that was announced, if there is one. Raises RuntimeError."""
        entry = self._entry()
        return None if entry == self.earlier_entry else Failure(*json.loads(entry))

    def _end_for(self, failure: Failure) -> None:
        """End this process because of another one's failure."""
        call_with_timeout(lambda: self.report(failure))  # the terminal may be gone
        call_with_timeout(lambda: self.store.add(NUM_LEFT, 1))
        end_process(failure.code)
