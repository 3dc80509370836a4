"""Loaders: from samples to batches on the device, with worker processes that may die.

Every batch holds clips (B, R, C, T, H, W) uint8: R clips of each of B videos; see `collate`. When a
worker dies, all workers are started again and continue with the next batch that is due. A file that
hangs, or kills its worker twice, is quarantined.
"""

import atexit
import gc
import multiprocessing
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, default_collate

from data.datasets import SampleDataset
from data.samplers import DistributedEvalSampler, EpochSampler, note_left_over
from data.watchdog import (
    STALL_SECONDS,
    WorkerWatchdog,
    add_to_quarantine,
    how_it_ended,
    ignore_dead_workers,
    init_worker,
    kill_workers,
    read_quarantine,
)
from data.worker_batches import BatchReader, PackedBatch, WorkerError
from data.worker_limits import LoaderNeeds, check_limits, exhausted
from util.dist import DistEnv, UserError, escaped, print_rank

PREFETCHED_BATCHES = 4  # per worker
MAX_RESTARTS = 5  # of the workers without a batch or a quarantined file between them
END_SECONDS = 2  # for a worker to end after its connection has broken


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


def _unchanged(batch: object) -> object:
    """Return a batch as it is, in place of the DataLoader's own conversion."""
    return batch


class FaultTolerantLoader:
    """A DataLoader that is rebuilt when a worker has died, and continues with the next batch.

    The file that a dead worker was reading is read once more. If it kills a worker again, or if it
    hung, it is quarantined. Workers live for the whole run. Nothing is drawn from the global random
    number generators.
    """

    unstarted: weakref.WeakSet = weakref.WeakSet()  # loaders whose workers have not been started

    def __init__(
        self,
        dataset: SampleDataset,
        sampler: EpochSampler | DistributedEvalSampler,
        batch_size: int,
        workers: WorkerSettings,
        collate_fn: Callable[[list[dict]], dict] = collate,
    ):
        """Raise UserError if the system does not allow the workers what they need."""
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.workers = workers
        self.collate_fn = collate_fn
        self.loader: DataLoader | None = None
        self.processes: list[BaseProcess] = []
        self.passes = 0  # that have begun
        self.restarts = 0  # since the last batch or quarantined file
        self.suspects: dict[str, int] = {}  # {file: sampler.skip up to which a second death counts}
        self.watchdog = WorkerWatchdog(workers.num_workers, workers.read_timeout)
        dataset.watchdog = self.watchdog
        if workers.quarantine is not None:
            dataset.quarantine = read_quarantine(workers.quarantine)
        self.unstarted.add(self)
        check_limits([loader.needs() for loader in self.unstarted])

    def needs(self) -> LoaderNeeds:
        """Return what the workers need from the system."""
        num_workers = self.workers.num_workers
        if num_workers == 0:
            return LoaderNeeds(0, 0, 0)
        batch_bytes = self.batch_size * self.dataset.sample_bytes()
        return LoaderNeeds(num_workers, PREFETCHED_BATCHES * num_workers, batch_bytes)

    def __iter__(self) -> Iterator[dict]:
        self.sampler.skip = 0
        self.suspects.clear()
        self.passes += 1
        this_pass = self.passes
        iterator = None
        try:
            while True:
                try:
                    if iterator is None:
                        iterator = self._start_pass()
                    batch = self._next_batch(iterator)
                except (RuntimeError, OSError, EOFError) as error:
                    iterator = None
                    self._restart(error)
                    continue
                if batch is None:
                    return
                self.sampler.skip += self.batch_size
                self.restarts = 0
                yield batch
        except BaseException:
            if this_pass == self.passes:
                self._end_workers()  # they would keep the batches of a pass that is not completed
            raise

    def _start_pass(self) -> Iterator[dict]:
        """Start a pass of the DataLoader, with fresh workers if there are none."""
        if self.loader is None:
            self.loader = self._make_loader()
            iterator = self._start_workers(self.loader)
        else:
            iterator = iter(self.loader)
        # Exit functions run in reverse order: register again, to run before torch's own.
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)
        if callable(signal.getsignal(signal.SIGCHLD)):  # torch has installed its handler
            signal.signal(signal.SIGCHLD, ignore_dead_workers)
        return iterator

    def _start_workers(self, loader: DataLoader) -> Iterator[dict]:
        """Start the first pass of a DataLoader, which starts its workers. Raises UserError."""
        self.unstarted.discard(self)
        # Collect garbage before forking: a worker would deadlock if it finalized a multi-threaded
        # decoder that this process has left behind.
        gc.collect()
        others = set(multiprocessing.active_children())
        try:
            iterator = iter(loader)
        except OSError as error:
            raise UserError(
                f"{self.workers.num_workers} loader workers cannot be started ({error.strerror}): "
                "lower --num_workers, or raise the limits of memory and processes (ulimit -u)",
                print_on_any_rank=True,
            ) from error
        finally:
            children = multiprocessing.active_children()
            self.processes = [child for child in children if child not in others]
        if self.processes:
            self.watchdog.start(self.processes)
        return iterator

    def _next_batch(self, iterator: Iterator) -> dict | None:
        """Return the next batch of a DataLoader, None at its end.

        Raises RuntimeError, OSError or EOFError if a worker is dead, and UserError if a worker has
        reported that the run must end.
        """
        self.watchdog.waiting = True
        try:
            batch = next(iterator, None)
            if isinstance(batch, PackedBatch):
                batch = batch.unpack()
        finally:
            self.watchdog.waiting = False
        if isinstance(batch, WorkerError):
            raise UserError(batch.message, print_on_any_rank=True)
        return batch

    def _restart(self, error: Exception) -> None:
        """End all workers after an error, so that they are started again.

        Quarantines files and prints what happened. Raises UserError if a limit of the system is the
        reason or the workers die again and again, and the error itself if no worker is dead.
        """
        dead = self._wait_for_dead_workers()
        if not dead:
            reason = exhausted(error)
            if reason and self.processes:
                raise UserError(reason, print_on_any_rank=True) from error
            raise error
        ends = [self._how_a_worker_ended(worker) for worker in dead]
        self._end_workers()
        self.restarts += 1
        for worker, end in zip(dead, ends, strict=True):
            self._find_fault(worker, end)
        if self.restarts > MAX_RESTARTS:
            raise UserError(
                f"loader workers died {self.restarts} times in a row before a batch was read "
                f"(the last: {ends[-1]}): lower --num_workers, or give the job more memory and "
                "more /dev/shm (docker run --shm-size)",
                print_on_any_rank=True,
            )

    def _wait_for_dead_workers(self) -> list[BaseProcess]:
        """Return the workers that are dead, or about to end: a broken connection comes first."""
        if not self.processes:
            return []
        sentinels = [worker.sentinel for worker in self.processes]
        ended = connection.wait(sentinels, END_SECONDS)
        dead = [worker for worker in self.processes if worker.sentinel in ended]
        for worker in dead:
            worker.join()
        return dead

    def _how_a_worker_ended(self, worker: BaseProcess) -> str:
        if self.watchdog.stalled:
            return f"did nothing for {STALL_SECONDS} s"
        return how_it_ended(worker.exitcode)

    def _find_fault(self, worker: BaseProcess, end: str) -> None:
        """Quarantine the file that a dead worker was reading, or remember it for the second time.

        end: how the worker ended.
        """
        index = self.watchdog.file_of(worker.pid)
        if index is None:
            print_rank(f"note: a loader worker died ({end}): the workers are started again")
            return
        path = self.dataset.paths[index]
        if worker.pid in self.watchdog.timed_out:
            self._quarantine(path, f"hung for {self.workers.read_timeout:g} s")
        elif self.suspects.get(path, -1) >= self.sampler.skip:
            self._quarantine(path, f"killed its reader twice ({end})")
        else:
            ahead = PREFETCHED_BATCHES * self.workers.num_workers
            self.suspects[path] = self.sampler.skip + ahead * self.batch_size
            print_rank(
                f"note: a loader worker died ({end}) while it read {escaped(path)}: the file is "
                "read again"
            )

    def _end_workers(self) -> None:
        """Kill the workers; the next batch is read by fresh ones."""
        for worker in self.processes:
            worker.kill()
        for worker in self.processes:
            worker.join()
        self.processes = []
        self.loader = None

    def _make_loader(self) -> DataLoader:
        """Return a DataLoader without workers yet."""
        options: dict = {}
        if self.workers.num_workers > 0:
            options = {
                "persistent_workers": True,
                "prefetch_factor": PREFETCHED_BATCHES,
                "worker_init_fn": init_worker,
                "multiprocessing_context": "fork",  # no longer the default in Python 3.14
            }
        drop_last = isinstance(self.sampler, EpochSampler)
        return DataLoader(
            BatchReader(self.dataset, self.collate_fn),
            batch_size=None,  # the reader gets the keys of a whole batch
            sampler=BatchSampler(self.sampler, self.batch_size, drop_last),
            collate_fn=_unchanged,
            num_workers=self.workers.num_workers,
            pin_memory=self.workers.pin_memory,
            generator=torch.Generator(),
            **options,
        )

    def _quarantine(self, path: str, reason: str) -> None:
        """Put a file into the quarantine and print a line about it."""
        self.restarts = 0
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
