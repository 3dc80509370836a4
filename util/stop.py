"""Stopping in good order: a signal only leaves word, all ranks agree, and the run stops between two updates.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for it, and so does the death of torchrun, which would leave its processes alone.
"""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
PATIENCE = 120  # seconds that a process has to stop in good order once its launcher is gone
_word = {
    "from": "",
    "at": 0.0,
    "training": False,
}  # who asked this process to stop, when, and whether there is anything to lose yet


class Stopped(Exception):
    """Raised on all ranks alike, between two updates or two batches of a validation, once any of them was asked to stop."""


def follow_launcher() -> None:
    """Under torchrun: from here on this process stops when its launcher has died, at once while nothing is trained yet."""
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    if _word["training"]:
        _word["from"] = _word["from"] or "the end of its launcher"
        time.sleep(PATIENCE)
    os._exit(1)  # it may hang in a rendezvous with processes that are gone


def listen() -> None:
    """From here on the signals leave word instead of ending the process; Ctrl-C does so once training has begun."""
    _word.update({"from": "", "at": 0.0, "training": False})
    for name in NAMES:
        signal.signal(getattr(signal, name), _leave_word)


def begin_training() -> None:
    """From here on there is something to lose."""
    _word["training"] = True


def deafen() -> None:
    """The signals end the process again."""
    _word["training"] = False
    for name in NAMES:
        if signal.getsignal(getattr(signal, name)) is _leave_word:
            signal.signal(
                getattr(signal, name),
                signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL,
            )


def _leave_word(number: int, _frame) -> None:
    again = (
        _word["from"] and time.monotonic() - _word["at"] > 1
    )  # torchrun passes one on within a moment of the terminal's own
    if number == signal.SIGINT and (again or not _word["training"]):
        raise KeyboardInterrupt
    if not _word["from"]:
        _word.update({"from": signal.Signals(number).name, "at": time.monotonic()})


def asked_by() -> str:
    """Who asked this process to stop: a signal's name, "the end of its launcher", or "" for nobody."""
    return _word["from"]


class Ballot:
    """Questions in which any rank's yes is everybody's. They travel between the hosts (gloo): no device is waited for."""

    def __init__(self):
        self.group = (
            dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
            if dist.is_initialized()
            else None
        )  # a collective call
        self.under_way = None

    def any(self, *wishes: bool) -> list[bool]:
        """Wait for all ranks' wishes; which of them any rank has."""
        return list(wishes) if self.group is None else self._count(self._hand_in(wishes))

    def later(self, *wishes: bool) -> list[bool]:
        """Hand in wishes; the answer is that to the call before (at first: no), which has long come in: nobody waits."""
        if self.group is None:
            return list(wishes)
        before, self.under_way = self.under_way, self._hand_in(wishes)
        return [False] * len(wishes) if before is None else self._count(before)

    def close(self) -> None:
        """Wait for what is under way."""
        if self.under_way is not None:
            self._count(self.under_way)
            self.under_way = None

    def _hand_in(self, wishes: tuple[bool, ...]) -> tuple:
        """Votes on their way to all ranks, and where their sum will be."""
        votes = torch.tensor(wishes, dtype=torch.uint8)
        return dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group, async_op=True), votes

    @staticmethod
    def _count(handed_in: tuple) -> list[bool]:
        """The answer to what was handed in, once it is there."""
        work, votes = handed_in
        work.wait()
        return [vote == 1 for vote in votes.tolist()]
