"""A run of two processes that is disturbed, watched, and started again when it has ended."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from launch import Job
from network_link import LinkedJob, NetworkLink
from small_disk import SmallDisk

QUIET_SECONDS = 240  # without an update or an end, on a busy machine: then the run hangs
END_SECONDS = 120  # in which a run must end when it has to: torchrun alone may take 30


class Command(NamedTuple):
    """A script with its flags."""

    script: str
    flags: list[str]
    updates_per_epoch: int
    updates: int  # in all


class DisturbedRun:
    """A run in a folder; `job` is the current start, None between two starts."""

    def __init__(
        self, command: Command, out: Path, disk: SmallDisk | None, link: NetworkLink | None
    ):
        """Start nothing yet. out: the run's own folder must lie in it.

        disk: where the run writes, to be filled. link: for starts without torchrun.
        """
        self.command = command
        self.out = out
        self.disk = disk
        self.link = link
        self.job: Job | None = None
        self.printed_before = 0  # bytes that earlier starts have printed
        self.faults: list[str] = []  # what must not happen
        self.leftovers = 0  # processes that had to be killed
        self.expected_update: int | None = None  # where the next start must resume

    # What the current start has printed

    def text(self) -> str:
        """Return what the current start has printed."""
        with open(self.running().printed, "rb") as file:
            file.seek(self.printed_before)
            return file.read().decode(errors="replace")

    def resumed_at(self) -> int | None:
        """Return the update at which the current start has resumed, None if it has not."""
        matches = re.findall(r"resumed from .* at update (\d+)", self.text())
        return int(matches[-1]) if matches else None

    def last_update(self) -> int | None:
        """Return the last update that the current start has printed, None before the first."""
        matches = re.findall(rf"update (\d+)/{self.command.updates}\b", self.text())
        return int(matches[-1]) if matches else None

    def position(self) -> str:
        """Return where the current start has resumed and which update it has printed last."""
        resumed = self.resumed_at()
        last = self.last_update()
        resumed_text = "-" if resumed is None else resumed
        return f"resumed at {resumed_text:>3}, last seen at {'-' if last is None else last:>3}"

    # Starting, waiting, ending

    def running(self) -> Job:
        """Return the current start."""
        assert self.job is not None
        return self.job

    def is_running(self) -> bool:
        """Return whether there is a current start whose launcher has not ended."""
        return self.job is not None and self.job.process.poll() is None

    def start(self, linked: bool = False) -> None:
        """Start the run, or start it again. linked: across the link, not under torchrun."""
        command = self.command
        if linked:
            assert self.link is not None
            self.job = LinkedJob(self.out, command.script, command.flags, self.link)
        else:
            self.job = Job(self.out, command.script, command.flags)
        self.printed_before = self.job.printed.stat().st_size

    def wait_until(self, is_reached: Callable[[], bool]) -> bool:
        """Wait for something that the run does; return False if it ends or hangs before."""
        last = None
        deadline = time.monotonic() + QUIET_SECONDS
        while not is_reached():
            if not self.is_running():
                return is_reached()
            if self.last_update() != last:
                last = self.last_update()
                deadline = time.monotonic() + QUIET_SECONDS
            if time.monotonic() > deadline:
                self.faults.append(f"no update for {QUIET_SECONDS} s")
                self.kill_all()
                return False
            time.sleep(0.02)
        return True

    def wait_for_updates(self, number: int) -> bool:
        """Wait for further updates; return False if the run ends or hangs before them."""
        if not self.wait_until(lambda: self.last_update() is not None):
            return False
        target = (self.last_update() or 0) + number
        return self.wait_until(lambda: (self.last_update() or 0) >= target)

    def wait_in_start(self, seconds: float) -> bool:
        """Wait for a time; return False if the run ends before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.is_running():
            time.sleep(0.02)
        return self.is_running()

    def wait_until_gone(self) -> None:
        """Wait for the end of all processes of the current start; count a fault if some stay."""
        deadline = time.monotonic() + END_SECONDS
        job = self.running()
        while job.process.poll() is None or job.processes():
            if time.monotonic() > deadline:
                self.faults.append(f"not ended {END_SECONDS} s after it had to")
                self.kill_all()
                return
            time.sleep(0.05)

    def close(self) -> int:
        """Forget the current start, whose launcher has ended. Return its exit code."""
        code = self.running().process.wait()
        resumed = self.resumed_at()
        if resumed is not None and self.expected_update is not None:
            if resumed != self.expected_update:
                fault = f"resumed at {resumed}, not at {self.expected_update}"
                self.faults.append(fault)
            self.expected_update = None
        if self.last_update() is not None:  # those that could end have left the run to this start
            self.kill_leftovers()
        self.job = None
        return code

    def last_error(self) -> str:
        """Return the last error that the current start has printed, "" if there is none."""
        lines = re.findall(r"^(?:\[rank\d\]: )?(\w*[Ee]rror: .*)$", self.text(), re.MULTILINE)
        return lines[-1] if lines else ""

    # Signals

    def workers(self) -> list[int]:
        """Return the ids of the ranks' loader workers."""
        pids = []
        for pid in self.running().rank_pids():
            try:
                children = psutil.Process(pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            pids += [child.pid for child in children]
        return pids

    def kill_all(self) -> None:
        """Kill all processes of the current start."""
        job = self.running()
        while job.process.poll() is None or job.processes():
            send([job.process.pid, *job.processes()], signal.SIGKILL)
            time.sleep(0.05)

    def kill_leftovers(self) -> None:
        """Kill and count the processes of starts before the current one that still wait."""
        left = self.running().leftovers()
        send(left, signal.SIGKILL)
        self.leftovers += len(left)


def send(pids: list[int], signum: int) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue
