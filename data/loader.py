"""Loaders: from samples to batches on the device, with worker processes that may die.

Every batch holds clips (B, R, C, T, H, W) uint8: R clips of each of B videos; see `collate`. A file
that hangs or kills its worker is quarantined, and the loader continues with the next batch.
"""

import atexit
import gc
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from data.datasets import SampleDataset
from data.samplers import DistributedEvalSampler, EpochSampler, note_left_over
from data.watchdog import (
    WorkerWatchdog,
    add_to_quarantine,
    ignore_dead_workers,
    init_worker,
    kill_workers,
    read_quarantine,
)
from util.dist import DistEnv, escaped, print_rank

PREFETCHED_BATCHES = 4  # per worker


class WorkerSettings(NamedTuple):
    """Settings of the worker processes that read files."""

    num_workers: int  # 0: the main process reads
    pin_memory: bool
    read_timeout: float  # seconds that a file may take
    quarantine: Path | None  # CSV file of quarantined files, path and reason; None: keep no file


def stack_clips(clips: list[Tensor]) -> Tensor:
    """Stack uint8 clips (..., C, T, H, W); in a worker, directly into shared memory.

    The memory format stays channels-last, as decoders and crops deliver it: making the clips
    contiguous would cost as much as the crop.
    """
    channels_last = [clip.movedim(-4, -1) for clip in clips]
    return default_collate(channels_last).movedim(-1, -4)


def collate(samples: list[dict]) -> dict:
    """Return a batch of the samples of a `SampleDataset`.

    Its keys: clips (B, R, C, T, H, W) or None if a sample has none, labels (B,), index (B,),
    replaced (B,), paths (one per sample), bad and damaged (of all samples together), and noise
    (B, R, L) in pretraining and its validation loss.
    """
    clips = [sample["clips"] for sample in samples]
    incomplete = any(clip is None for clip in clips)
    batch = {
        "clips": None if incomplete else stack_clips(clips),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "replaced": torch.tensor([sample["replaced"] for sample in samples]),
        "paths": [sample["path"] for sample in samples],
        "bad": [entry for sample in samples for entry in sample["bad"]],
        "damaged": [entry for sample in samples for entry in sample["damaged"]],
    }
    if "noise" in samples[0]:
        batch["noise"] = torch.stack([sample["noise"] for sample in samples])
    return batch


def collate_readable(samples: list[dict]) -> dict:
    """Return the batch of `collate` without the unreadable samples. clips is None if all are.

    Two keys differ: unreadable is {index: reason} of the samples left out, and bad lists the files
    of all samples.
    """
    readable = [sample for sample in samples if sample["clips"] is not None]
    batch = collate(readable or samples)
    unreadable = {}
    for sample in samples:
        if sample["clips"] is None:
            _, unreadable[sample["index"]] = sample["bad"][0]
    batch["unreadable"] = unreadable
    batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
    return batch


def _start_pass(loader: DataLoader) -> Iterator[dict]:
    """Start a pass of the DataLoader.

    A dead worker raises RuntimeError only while its batch is awaited.
    """
    # Collect garbage before forking: a worker would deadlock if it finalized a multi-threaded
    # decoder that this process has left behind.
    gc.collect()
    iterator = iter(loader)
    # Exit functions run in reverse order: register again, to run before torch's own.
    atexit.unregister(kill_workers)
    atexit.register(kill_workers)
    if callable(signal.getsignal(signal.SIGCHLD)):  # torch has installed its handler
        signal.signal(signal.SIGCHLD, ignore_dead_workers)
    return iterator


def _wait_for_batch(iterator: Iterator[dict]) -> dict | None:
    """Return the next batch of a DataLoader, None at its end.

    Raises RuntimeError if a worker is dead.
    """
    while True:
        try:
            return next(iterator, None)
        except (ConnectionError, EOFError):
            continue  # a worker died while it sent a batch; the next wait raises RuntimeError


class FaultTolerantLoader:
    """A DataLoader that is rebuilt when a file has killed a worker.

    The file is quarantined and the loader continues with the next batch. Workers live for the whole
    run. Nothing is drawn from the global random number generators.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        sampler: EpochSampler | DistributedEvalSampler,
        batch_size: int,
        workers: WorkerSettings,
        collate_fn: Callable[[list[dict]], dict] = collate,
    ):
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.workers = workers
        self.collate_fn = collate_fn
        self.loader: DataLoader | None = None
        dataset.watchdog = WorkerWatchdog(workers.num_workers, workers.read_timeout)
        if workers.quarantine is not None:
            dataset.quarantine = read_quarantine(workers.quarantine)

    def __iter__(self) -> Iterator[dict]:
        self.sampler.skip = 0
        while True:
            if self.loader is None:
                self.loader = self._make_loader()
            try:
                iterator = _start_pass(self.loader)
                while (batch := _wait_for_batch(iterator)) is not None:
                    self.sampler.skip += self.batch_size
                    yield batch
                return
            except RuntimeError:
                indices = self.dataset.watchdog.files_of_dead_workers()
                if not indices:
                    raise  # a worker died while it read no file
                self.loader = None
                for index in indices:
                    self._quarantine(self.dataset.paths[index])

    def _make_loader(self) -> DataLoader:
        """Return a DataLoader with fresh workers."""
        options: dict = {}
        if self.workers.num_workers > 0:
            options = {
                "persistent_workers": True,
                "prefetch_factor": PREFETCHED_BATCHES,
                "worker_init_fn": init_worker,
                "multiprocessing_context": "fork",  # no longer the default in Python 3.14
            }
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            sampler=self.sampler,
            num_workers=self.workers.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.workers.pin_memory,
            drop_last=isinstance(self.sampler, EpochSampler),
            generator=torch.Generator(),
            **options,
        )

    def _quarantine(self, path: str) -> None:
        """Put a file into the quarantine and print a line about it."""
        reason = f"hung for {self.workers.read_timeout:g} s or killed its reader"
        self.dataset.quarantine[path] = reason
        if self.workers.quarantine is None:
            print_rank(f"quarantined: {escaped(path)} {reason}")
            return
        try:
            add_to_quarantine(self.workers.quarantine, path, reason)
        except OSError as error:
            print_rank(
                f"quarantined: {escaped(path)} {reason}; {self.workers.quarantine} could not be "
                f"written ({error.strerror}), so later runs try the file again"
            )
            return
        print_rank(
            f"quarantined: {escaped(path)} {reason}; listed in {self.workers.quarantine} "
            "(delete its line to try the file again)"
        )


def one_ahead(items: Iterable) -> Iterator:
    """Yield the items in order, each after the next one has been drawn."""
    drawn: deque = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) == 2:
            yield drawn.popleft()
    yield from drawn


def on_device(loader: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Yield the loader's batches on the device.

    On CUDA a side stream copies the next batch, including the next epoch's first, while the device
    computes.
    """
    if device.type == "cuda":
        yield from _prefetch_to_cuda(loader, device)
    else:
        yield from loader


def _prefetch_to_cuda(loader: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Yield the loader's batches on a CUDA device, each copied while the one before is in use."""
    stream = torch.cuda.Stream(device)

    def start_copy(batch: dict) -> tuple[dict, torch.cuda.Event]:
        moved = dict(batch)
        with torch.cuda.stream(stream):
            for key, value in batch.items():
                if isinstance(value, Tensor):
                    moved[key] = value.to(device, non_blocking=True)
        return moved, stream.record_event()

    def finish_copy(copy: tuple[dict, torch.cuda.Event]) -> dict:
        batch, copied = copy
        current_stream = torch.cuda.current_stream(device)
        current_stream.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                # its memory is reused only after this stream's work
                value.record_stream(current_stream)
        return batch

    # map, not a loop: a loop variable would keep a batch alive that is in use
    yield from map(finish_copy, one_ahead(map(start_copy, loader)))


def _for_device(workers: WorkerSettings, device: torch.device) -> WorkerSettings:
    """Return the settings without pinned memory where the device is not CUDA."""
    return workers._replace(pin_memory=workers.pin_memory and device.type == "cuda")


def train_loader(
    dataset: SampleDataset,
    sampler: EpochSampler,
    total_steps: int,
    workers: WorkerSettings,
    device: torch.device,
) -> Callable[[int, int], Iterator[dict]]:
    """Return a function (epoch, updates done) -> the rest of the epoch's batches.

    The batches are on the device. The epochs of a run of total_steps updates are slices of one
    pass: workers read the next epoch's first batches during the last updates and the validation of
    an epoch.
    """
    note_left_over(sampler)
    loader = FaultTolerantLoader(dataset, sampler, sampler.batch_size, _for_device(workers, device))
    run_pass: Iterator[dict] = iter(())
    next_update = None  # where the pass is between two epochs

    def epoch_batches(epoch: int, updates_done: int) -> Iterator[dict]:
        nonlocal run_pass, next_update
        first = epoch * sampler.updates_per_epoch + updates_done
        end = min((epoch + 1) * sampler.updates_per_epoch, total_steps)
        if first != next_update:
            sampler.set_updates(first, total_steps)
            run_pass = on_device(loader, device)
        next_update = end
        num_updates = max(end - first, 0)
        return islice(run_pass, num_updates * sampler.accum_iter)

    return epoch_batches


def eval_loader(
    dataset: SampleDataset,
    batch_size: int,
    workers: WorkerSettings,
    env: DistEnv,
    collate_fn: Callable[[list[dict]], dict] = collate,
) -> Callable[[], Iterator[dict]]:
    """Return a function that starts a pass over this rank's samples, in batches on the device.

    collate_fn: `collate_readable` leaves out unreadable samples.
    """
    sampler = DistributedEvalSampler(len(dataset), env.rank, env.world_size)
    for_device = _for_device(workers, env.device)
    loader = FaultTolerantLoader(dataset, sampler, batch_size, for_device, collate_fn)
    return lambda: on_device(loader, env.device)
