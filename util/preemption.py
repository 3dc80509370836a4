"""Graceful shutdown: signal handlers only set a flag, and all ranks stop after the same update.

A stop is requested by SIGTERM, SIGUSR1 or SIGINT (Ctrl-C), and by the death of torchrun. Then:

1. `_handle_signal` sets the flag of one process;
2. after the next update `Checkpointer.save_or_stop_if_due` combines the flags of all ranks
   (between two batches of a validation it is `stop_between_batches`) and raises `Stopped`;
3. `Checkpointer.graceful_shutdown` saves and writes the .PREEMPTED marker;
4. the script ends with exit code 0, or 2 if the checkpoint could not be written.

Before the training loop Ctrl-C exits at once; in it, signals wait for the first update.

A process that cannot stop so, because it waits for another one, is ended by a second SIGTERM, or
when nothing has been done for a while after a signal: see `_watch_signals`.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 120  # time to save and exit after the launcher dies
POLL_SECONDS = 0.5  # how often to check that the launcher is alive, and a stop is under way
SECOND_SIGNAL_SECONDS = 10.0  # closer ones are the launcher's and the scheduler's
STOP_SECONDS = 60.0  # after a signal: longest time without progress
STOP_UPDATES = 5  # likewise, in times of the longest update
SLOW_SECONDS = 600.0  # likewise before the first update, and in `slow_work`
GROUP_TIMEOUT = timedelta(minutes=30)


@dataclass
class StopRequest:
    """Reason and time of the stop request; whether training has started."""

    reason: str = ""  # a signal's name, or "launcher died"
    time: float = 0.0  # of the signal, on the monotonic clock
    training: bool = False  # before the training loop Ctrl-C exits at once


@dataclass
class Progress:
    """What the main thread has done: updates, batches of validations, checkpoints."""

    events: int = 0
    updates: int = 0
    last_time: float = 0.0  # of an event, on the monotonic clock
    longest: float = 0.0  # seconds from one event to the next update
    in_slow_work: bool = False

    def seconds_allowed(self) -> float:
        """Return how long a stop may take from one event to the next."""
        if self.in_slow_work or self.updates == 0:
            return SLOW_SECONDS
        return max(STOP_SECONDS, STOP_UPDATES * self.longest)


@dataclass
class StopTimer:
    """Decides when a process that does not stop after a signal must be ended.

    Used by the thread of `_watch_signals`, which gets a signal even while the main thread waits.
    """

    first_signal: str = ""
    first_time: float = 0.0  # of SIGTERM or Ctrl-C, on the monotonic clock
    last_call: float = 0.0  # of `reason_to_end`, likewise
    events: int = 0  # of `Progress`, at the last call
    seconds: float = 0.0  # since the last of these events, or since the first signal
    run_has_ended: bool = False

    def reason_to_end(self, received: bytes) -> str:
        """Return why the process must end, "" for no reason.

        received: numbers of the signals since the last call. The reasons are a second SIGTERM or
        Ctrl-C, and no progress for the time that `Progress` allows.
        """
        reason = ""
        for number in received:
            if number in STOP_SIGNALS and not reason:
                reason = self._note_signal(signal.Signals(number))
        return reason or self._note_time()

    def _note_signal(self, received: signal.Signals) -> str:
        """Note a stop signal; return the reason to end if it is the second one."""
        now = time.monotonic()
        if not self.first_signal:
            self.first_signal = received.name
            self.last_call = now
        if received == signal.SIGUSR1:
            return ""
        if self.first_time and now - self.first_time >= SECOND_SIGNAL_SECONDS:
            return f"ended by a second {received.name}, without another checkpoint"
        self.first_time = self.first_time or now
        return ""

    def _note_time(self) -> str:
        """Note that time has passed; return the reason to end if it is too much.

        Time in which the process is suspended does not count: a call adds two polls at most.
        """
        if not self.first_signal:
            return ""
        now = time.monotonic()
        self.seconds += min(now - self.last_call, 2 * POLL_SECONDS)
        self.last_call = now
        if self.events != _progress.events:
            self.events = _progress.events
            self.seconds = 0.0
        if self.seconds <= _progress.seconds_allowed():
            return ""
        return (
            f"ended {self.seconds:.0f} s after {self.first_signal} or the last update after it: "
            "it waits for another process or for its files, and could not save"
        )


_request = StopRequest()
_progress = Progress()
_timer = StopTimer()
_end: Callable[[str, int], None] | None = None  # see `start_watchdogs`
_signal_pipe: tuple[int, int] | None = None  # of this process, read by `_watch_signals`


class Stopped(Exception):
    """Raised on every rank after the same update or validation batch, when any rank must stop."""


def install_signal_handlers() -> None:
    """Make the stop signals set a flag; before training starts, Ctrl-C still exits at once."""
    global _request, _progress, _timer
    _request = StopRequest()
    _progress = Progress()
    _timer = StopTimer()
    for signum in STOP_SIGNALS:
        signal.signal(signum, _handle_signal)
    signal.set_wakeup_fd(_signal_writer(), warn_on_full_buffer=False)


def restore_signal_handlers() -> None:
    """Make the stop signals end the process again."""
    _request.training = False
    _timer.run_has_ended = True
    signal.set_wakeup_fd(-1)
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


def mark_progress(update: bool = False) -> None:
    """Note that an update (or a batch of a validation, or a checkpoint) has been done."""
    now = time.monotonic()
    if update and _progress.events > 0:
        _progress.longest = max(_progress.longest, now - _progress.last_time)
    _progress.updates += int(update)
    _progress.last_time = now
    _progress.events += 1


@contextlib.contextmanager
def slow_work() -> Iterator[None]:
    """Wrap work that may take longer than an update: a checkpoint is written, a probe trained."""
    _progress.in_slow_work = True
    try:
        yield
    finally:
        _progress.in_slow_work = False
        mark_progress()


def start_watchdogs(end: Callable[[str, int], None]) -> None:
    """Prepare to end this process when its launcher dies, or when it does not stop after a signal.

    end: (reason, exit code); ends this process, from any thread.
    """
    global _end
    _end = end
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher_pid = os.getppid()
        threading.Thread(target=_watch_parent, args=(launcher_pid,), daemon=True).start()


def _watch_parent(launcher_pid: int) -> None:
    """Wait until the parent process changes, request a stop, and exit after the grace period.

    Before training starts, the process exits at once.
    """
    while os.getppid() == launcher_pid:
        time.sleep(POLL_SECONDS)
    if _request.training:
        _request.reason = _request.reason or "launcher died"
        time.sleep(GRACE_SECONDS)
    os._exit(1)  # the main thread may be blocked in a collective with dead peers


def _signal_writer() -> int:
    """Return the file to which the interpreter writes each signal's number, even while it waits.

    The first call starts the thread that reads them. A forked process must not write there.
    """
    global _signal_pipe
    if _signal_pipe is None:
        _signal_pipe = os.pipe()
        os.set_blocking(_signal_pipe[1], False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=_watch_signals, args=(_signal_pipe[0],), daemon=True).start()
    return _signal_pipe[1]


def _watch_signals(reader: int) -> None:
    """End the process if it does not stop after a signal. reader: receives the signals' numbers.

    A signal's handler runs only in the main thread, which may wait in a collective.
    """
    while True:
        ready, _, _ = select.select([reader], [], [], POLL_SECONDS)
        received = os.read(reader, 4096) if ready else b""
        timer = _timer
        reason = timer.reason_to_end(received)
        if reason and not timer.run_has_ended and _end is not None:
            _end(reason, 128 + signal.SIGTERM)


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
