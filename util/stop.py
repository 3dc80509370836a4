"""Stopping in good order: a signal only leaves word, all ranks agree, and the run stops between two updates.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for it, and so does the death of torchrun, which would leave its processes alone.
"""

import os
import signal
import time

import torch
import torch.distributed as dist

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
_word = {"from": "", "at": 0.0, "launcher": 0}  # who asked this process to stop, when it did, the launcher's process (0: none)


class Stopped(Exception):
    """Raised on all ranks alike, between two updates or two batches of a validation, once any of them was asked to stop."""


def listen() -> None:
    """From here on the signals leave word instead of ending the process. A Ctrl-C more than a second after the first ends it at once."""
    _word.update({"from": "", "at": 0.0, "launcher": os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0})
    for name in NAMES:
        signal.signal(getattr(signal, name), _leave_word)


def deafen() -> None:
    """The signals end the process again."""
    for name in NAMES:
        if signal.getsignal(getattr(signal, name)) is _leave_word:
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def _leave_word(number: int, _frame) -> None:
    now = time.monotonic()
    if number == signal.SIGINT and _word["from"] and now - _word["at"] > 1:  # torchrun passes one on within a moment of the terminal's own
        raise KeyboardInterrupt
    if not _word["from"]:
        _word.update({"from": signal.Signals(number).name, "at": now})


def asked_by() -> str:
    """Who asked this process to stop: a signal's name, or "" for nobody."""
    if _word["launcher"] and os.getppid() != _word["launcher"] and not _word["from"]:
        _word["from"] = "the end of its launcher"
    return _word["from"]


class Ballot:
    """Questions in which any rank's yes is everybody's. They travel between the hosts (gloo): no device is waited for."""

    def __init__(self):
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # a collective call
        self.under_way = None

    def any(self, *wishes: bool) -> list[bool]:
        """Wait for all ranks' wishes; which of them any rank has."""
        if self.group is None:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.uint8)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        return [vote == 1 for vote in votes.tolist()]

    def later(self, *wishes: bool) -> list[bool]:
        """Hand in wishes; the answer is that to the call before (at first: no), which has long come in: nobody waits."""
        if self.group is None:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.uint8)
        before, self.under_way = self.under_way, (dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group, async_op=True), votes)
        if before is None:
            return [False] * len(wishes)
        before[0].wait()
        return [vote == 1 for vote in before[1].tolist()]

    def close(self) -> None:
        """Wait for what is under way."""
        if self.under_way is not None:
            self.under_way[0].wait()
            self.under_way = None
