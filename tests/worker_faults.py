"""Loaders on files that hang, kill or suspend their reader, or that cannot be read."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from clip_dataset import SEED

from data import open_videos
from data.datasets import ClipDataset
from data.decode import open_video
from data.loader import FaultTolerantLoader, WorkerSettings
from data.samplers import EpochSampler
from util.dist import DistEnv

READ_TIMEOUT = 2.0  # seconds
CHECK_INTERVAL = 5  # seconds in which a DataLoader notices a dead worker
GUARD = 30  # seconds more on a slow machine
ONE_PROCESS = DistEnv(torch.device("cpu"))


def inject_faults(monkeypatch, folder: Path) -> dict:
    """Return a dict {path: fault} that says what happens where a file is opened.

    A fault is "hang", or a signal that the reader sends itself ("KILL"; "KILL once" for the first
    time only), or an error to raise. folder: keeps which files have been opened once.
    """
    faults: dict = {}

    def open_faulty(path, *rest):
        fault = faults.get(path, "")
        if isinstance(fault, Exception):
            raise fault
        if fault == "hang":
            time.sleep(1000)
        name, _, once = fault.partition(" ")
        if name and (not once or is_first_time(folder / f"opened_{Path(path).stem}")):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        return open_video(path, *rest)

    monkeypatch.setattr(open_videos, "open_video", open_faulty)
    return faults


def is_first_time(marker: Path) -> bool:
    """Return whether no process has called this before, with the same path."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def make_loader(data: ClipDataset, quarantine: Path) -> FaultTolerantLoader:
    """Return a loader of one epoch in batches of two, on two workers."""
    sampler = EpochSampler(len(data), 2, 1, ONE_PROCESS, SEED)
    workers = WorkerSettings(2, False, READ_TIMEOUT, quarantine)
    return FaultTolerantLoader(data, sampler, 2, workers)


def end_children() -> None:
    """Kill the child processes of this process."""
    for worker in multiprocessing.active_children():
        worker.kill()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise AssertionError after some seconds, and kill the workers then.

    It is no TimeoutError, which a loader would take for that of a connection.
    """

    def interrupt(_signum: int, _frame) -> None:
        raise AssertionError(f"not finished after {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except AssertionError:
        end_children()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def assert_only_these_files_differ(expected, batches, bad: list[str], data: ClipDataset) -> None:
    """Assert that batches have the same order, and the same clips but those of bad files."""
    for undisturbed, batch in zip(expected, batches, strict=True):
        assert undisturbed["index"].tolist() == batch["index"].tolist()
        for row, index in enumerate(batch["index"].tolist()):
            same = torch.equal(undisturbed["clips"][row], batch["clips"][row])
            assert same == (data.paths[index] not in bad)


def bad_files(batches) -> dict[str, str]:
    """Return the unreadable files {path: reason} of some batches."""
    return dict(entry for batch in batches for entry in batch["bad"])


def indices_of(batches) -> list[int]:
    """Return the sample indices of some batches, in order."""
    return [index for batch in batches for index in batch["index"].tolist()]
