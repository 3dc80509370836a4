"""Graceful shutdown: signal handlers only set a flag, and all ranks stop after the same update.

A stop is requested by SIGTERM, SIGUSR1 or SIGINT (Ctrl-C), and by the death of torchrun. Then:

1. `_handle_signal` sets the flag of one process;
2. after the next update `Checkpointer.save_or_stop_if_due` combines the flags of all ranks
   (between two batches of a validation it is `stop_between_batches`) and raises `Stopped`;
3. `Checkpointer.graceful_shutdown` saves and writes the .PREEMPTED marker;
4. the script ends with exit code 0, or 2 if the checkpoint could not be written.

Before the first update Ctrl-C exits at once; the other signals wait for that update.
"""

import os
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 120  # time to save and exit after the launcher dies
POLL_SECONDS = 0.5  # how often to check that the launcher is alive
GROUP_TIMEOUT = timedelta(minutes=30)


@dataclass
class StopRequest:
    """Reason and time of the stop request; whether training has started."""

    reason: str = ""  # a signal's name, or "launcher died"
    time: float = 0.0  # of the signal, on the monotonic clock
    training: bool = False  # before the first update Ctrl-C exits at once


_request = StopRequest()


class Stopped(Exception):
    """Raised on every rank after the same update or validation batch, when any rank must stop."""


def install_signal_handlers() -> None:
    """Make the stop signals set a flag; before training starts, Ctrl-C still exits at once."""
    global _request
    _request = StopRequest()
    for signum in STOP_SIGNALS:
        signal.signal(signum, _handle_signal)


def restore_signal_handlers() -> None:
    """Make the stop signals end the process again."""
    _request.training = False
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not _handle_signal:
            continue
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
        else:
            signal.signal(signum, signal.SIG_DFL)


def mark_training_started() -> None:
    """From now on let Ctrl-C request a stop too: exiting at once would lose updates."""
    _request.training = True


def stop_reason() -> str:
    """Return what asked this process to stop: a signal's name, "launcher died", or ""."""
    return _request.reason


def _handle_signal(signum: int, _frame) -> None:
    # a second SIGINT within 1 s is torchrun forwarding the first Ctrl-C
    repeated = _request.reason and time.monotonic() - _request.time > 1
    if signum == signal.SIGINT and (repeated or not _request.training):
        raise KeyboardInterrupt
    if not _request.reason:
        _request.reason = signal.Signals(signum).name
        _request.time = time.monotonic()


def start_launcher_watchdog() -> None:
    """Under torchrun, stop this process when the launcher dies; without torchrun, do nothing.

    Before training starts, the process exits at once.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher_pid = os.getppid()
    threading.Thread(target=_watch_parent, args=(launcher_pid,), daemon=True).start()


def _watch_parent(launcher_pid: int) -> None:
    """Wait until the parent process changes, request a stop, and exit after the grace period."""
    while os.getppid() == launcher_pid:
        time.sleep(POLL_SECONDS)
    if _request.training:
        _request.reason = _request.reason or "launcher died"
        time.sleep(GRACE_SECONDS)
    os._exit(1)  # the main thread may be blocked in a collective with dead peers


class AnyRank:
    """Logical OR of flags over all ranks, on a gloo group, so that no GPU sync is needed.

    The constructor and all methods are collective (call on every rank). Without a process group,
    the flags of this process are the result.
    """

    def __init__(self):
        """Create the gloo group."""
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        self.pending = None  # (work, flags) of the all-reduce that `deferred` started last

    def now(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        if self.group is None:
            return list(flags)
        return self._wait(self._all_reduce(flags))

    def deferred(self, *flags: bool) -> list[bool]:
        """Start the all-reduce of these flags and return the result of the previous call.

        The result is False for each flag at first. So the all-reduce overlaps with one step.
        Without a process group, these flags themselves are returned.
        """
        if self.group is None:
            return list(flags)
        previous = self.pending
        self.pending = self._all_reduce(flags)
        if previous is None:
            return [False] * len(flags)
        return self._wait(previous)

    def drain(self) -> None:
        """Wait for the all-reduce that `deferred` started last, and discard its result."""
        if self.pending is not None:
            self._wait(self.pending)
            self.pending = None

    def _all_reduce(self, flags: tuple[bool, ...]) -> tuple:
        """Start the all-reduce; return the handle to wait for and the tensor of the result."""
        values = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return work, values

    @staticmethod
    def _wait(pending: tuple) -> list[bool]:
        """Wait for an all-reduce and return its result."""
        work, values = pending
        work.wait()
        return [value == 1 for value in values.tolist()]
