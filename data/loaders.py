"""Datasets, samplers and loaders. Every loader yields clips (B, R, C, T, H, W) uint8: R clips of each of B videos.

A sample is a function of (seed, epoch, index, repeat) and nothing else, so neither workers nor ranks change it. A file that
hangs or kills the worker that reads it is set aside, and the pass goes on where it was.
"""

import atexit
import contextlib
import csv
import faulthandler
import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from data.decode import (
    ReadError,
    VideoInfo,
    clip_indices,
    one_line,
    open_video,
    read_image,
    say_if_absent,
    view_start,
)
from data.probe import VideoIndex
from data.transforms import sample_seed, seeded
from util.dist import Place, UserError, print_here

SUBSTITUTES = 32  # other videos to try in place of one that cannot be read
DAMAGED = 0.1  # a file of which more of a sample's frames cannot be decoded is listed


class Reading(NamedTuple):
    """What was read of a file for a sample."""

    clips: Tensor  # (R, C, T, H, W) uint8
    frames: int = 0  # how many were to be decoded
    replaced: int = 0  # how many of these could not be, and are a neighbor's picture


class Paths:
    """A list of strings in two flat arrays: worker processes share its memory, which a list of str would slowly copy."""

    def __init__(self, paths: list[str]):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([0] + [len(path) for path in encoded])
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return (
            self.bytes[self.ends[index] : self.ends[index + 1]]
            .tobytes()
            .decode("utf-8", "surrogateescape")
        )


def stack(clips: list[Tensor]) -> Tensor:
    """Return torch.stack of uint8 (..., C, T, H, W), in a worker in the shared memory that hands it over.

    The colors of a pixel stay side by side, as decoders and crops deliver them: to separate them costs as much as a crop.
    """
    return default_collate([clip.movedim(-4, -1) for clip in clips]).movedim(-1, -4)


class Watch:
    """Tells which file a worker process was reading when it died, and ends a worker that reads one file for too long."""

    def __init__(self, num_workers: int, seconds: float):
        self.seconds = seconds
        self.slots = torch.zeros(
            num_workers, 2, dtype=torch.int64
        ).share_memory_()  # per worker: its process, and 1 + what it reads, or 0

    @contextlib.contextmanager
    def reading(self, item: int):
        """Around the reading of file number `item`. Does nothing in the main process, which cannot be replaced."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        self.slots[worker.id] = torch.tensor([os.getpid(), item + 1])
        with open(os.devnull, "w") as nowhere:  # the main process says what happened, in one line
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=nowhere)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                self.slots[worker.id, 1] = 0

    def victims(self) -> list[int]:
        """The files that dead workers were reading."""
        alive = {child.pid for child in multiprocessing.active_children()}
        return [item - 1 for process, item in self.slots.tolist() if item and process not in alive]


class Samples(Dataset):
    """What all datasets share: `dataset[(epoch, index)]` reads sample `index` with the random draws of that epoch.

    paths, labels: one per sample, labels as class numbers or None. substitutes: how many others to try in place of one that
    cannot be read. known: the manifest's index or None. A subclass has `read_clips`. A `Feed` adds `watch`, and to
    `quarantine` the files {path: reason} that are not to be touched any more.
    """

    def __init__(
        self,
        paths: list[str],
        labels: list[int] | None,
        seed: int,
        substitutes: int,
        known: VideoIndex | None = None,
    ):
        self.paths, self.labels = Paths(paths), None if labels is None else np.array(labels)
        self.seed, self.substitutes, self.known = seed, substitutes, known
        self.watch, self.quarantine = Watch(0, 0), {}

    def __len__(self) -> int:
        return len(self.paths)

    def read_clips(self, epoch: int, index: int, path: str, info: VideoInfo | None) -> Reading:
        """The clips (R, C, T, H, W) uint8 of a file, with the draws of sample (epoch, index). Raises ReadError."""
        raise NotImplementedError

    def _read(self, epoch: int, index: int, candidate: int) -> Reading:
        """`read_clips` of file number `candidate`, unless it is known to be of no use.

        Raises ReadError, also for what any library raises over this file: one file ends no run.
        """
        path = self.paths[candidate]
        reason = self.quarantine.get(path) or (self.known and self.known.reason(candidate, path))
        if reason:
            raise ReadError(reason)
        try:
            with self.watch.reading(candidate):
                return self.read_clips(
                    epoch, index, path, self.known and self.known.info(candidate, path)
                )
        except (ReadError, UserError, ImportError):  # a missing package is no file's fault
            raise
        except Exception as error:
            raise ReadError(f"{type(error).__name__}: {one_line(error)}") from error

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """clips (R, C, T, H, W) uint8, label, index, path: the file read, bad: [(path, reason)] of files that could not be
        read, replaced: how many frames could not be decoded, damaged: [(path, reason)] if these are many.

        An unreadable file is replaced by another one, chosen by (seed, epoch, index); clips is None if too many are.
        """
        epoch, index = key
        sample = {
            "clips": None,
            "label": -1,
            "index": index,
            "path": "",
            "bad": [],
            "replaced": 0,
            "damaged": [],
        }
        draws = np.random.default_rng(sample_seed(self.seed, epoch, index, 0, 2))
        candidates = [index, *draws.integers(len(self), size=self.substitutes).tolist()]
        for candidate in candidates:
            try:
                sample["clips"], frames, sample["replaced"] = self._read(epoch, index, candidate)
            except ReadError as error:
                sample["bad"].append((self.paths[candidate], str(error)))
                continue
            if sample["replaced"] > DAMAGED * frames:
                reason = f"{sample['replaced']} of {frames} frames cannot be decoded"
                sample["damaged"].append((self.paths[candidate], reason))
            sample["path"] = self.paths[candidate]
            if self.labels is not None:
                sample["label"] = int(self.labels[candidate])
            break
        return sample


class ClipDataset(Samples):
    """Training clips of videos: repeat_aug of them from repeat_windows time windows, one decode each.

    noise_tokens: L of the mask noise, 0 for none. transform: uint8 (T, C, H, W) -> the same, drawing from torch's global
    generator.
    """

    def __init__(
        self,
        *,
        paths: list[str],
        labels: list[int] | None,
        num_frames: int,
        sampling_rate: int,
        target_fps: float,
        repeat_aug: int,
        repeat_windows: int,
        transform: Callable[[Tensor], Tensor],
        decoder: str,
        short_side: int,
        seed: int,
        noise_tokens: int,
        known: VideoIndex | None = None,
    ):
        super().__init__(paths, labels, seed, SUBSTITUTES, known)
        say_if_absent(decoder)
        if repeat_aug % repeat_windows:
            raise UserError(
                f"--repeat_aug {repeat_aug} is not divisible by --repeat_windows {repeat_windows}"
            )
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.repeat_aug, self.repeat_windows = repeat_aug, repeat_windows
        self.transform, self.decoder, self.short_side, self.noise_tokens = (
            transform,
            decoder,
            short_side,
            noise_tokens,
        )

    def read_clips(self, epoch: int, index: int, path: str, info: VideoInfo | None) -> Reading:
        """The clips (R, C, T, H, W) uint8 of a video, with the draws of sample (epoch, index). Raises ReadError."""
        seeds = [sample_seed(self.seed, epoch, index, repeat) for repeat in range(self.repeat_aug)]
        repeats = self.repeat_aug // self.repeat_windows  # clips of a window
        windows, replaced = self._read_windows(path, info, seeds[::repeats])
        clips = None
        for repeat, seed in enumerate(seeds):
            with seeded(seed):
                torch.rand(())  # where the window starts, drawn by the first of its clips
                clip = self.transform(windows[repeat // repeats])  # (T, C, H, W)
            clip = clip.permute(0, 2, 3, 1)
            if clips is None:
                clips = clip.new_empty(self.repeat_aug, *clip.shape)  # (R, T, H, W, C)
            clips[repeat] = clip  # at once, so that the next crop finds this one's memory free
        return Reading(clips.permute(0, 4, 1, 2, 3), len(windows) * self.num_frames, replaced)

    def _read_windows(
        self, path: str, info: VideoInfo | None, seeds: list[int]
    ) -> tuple[list[Tensor], int]:
        """Return a window (T, C, H, W) uint8, channels last, for each seed, and how many frames were replaced.

        The video is closed before the first crop: decord's threads would go on to decode beside it.
        """
        windows = []
        with open_video(path, self.decoder, self.short_side, info) as video:
            for seed in seeds:
                with seeded(seed):
                    start = torch.rand(()).item()
                wanted = clip_indices(
                    video,
                    num_frames=self.num_frames,
                    start=start,
                    sampling_rate=self.sampling_rate,
                    target_fps=self.target_fps,
                )
                windows.append(torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2))
            return windows, video.replaced

    def noise(self, epoch: int, index: int) -> Tensor:
        """Mask noise (R, L) float32 of a sample."""
        seeds = (
            sample_seed(self.seed, epoch, index, repeat, 1) for repeat in range(self.repeat_aug)
        )
        return torch.stack(
            [
                torch.rand(self.noise_tokens, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """As `Samples`, and in pretraining noise (R, L)."""
        return super().__getitem__(key) | ({"noise": self.noise(*key)} if self.noise_tokens else {})


class ViewDataset(Samples):
    """Evaluation views of videos: num_views time windows, evenly spread, times the crops that `transform` makes of each.

    R = num_views * crops; all windows are decoded in one pass. transform: uint8 (T, C, H, W) -> (crops, T, C, S, S).
    """

    def __init__(
        self,
        *,
        paths: list[str],
        labels: list[int],
        num_frames: int,
        sampling_rate: int,
        target_fps: float,
        num_views: int,
        transform: Callable[[Tensor], Tensor],
        decoder: str,
        short_side: int,
        known: VideoIndex | None = None,
    ):
        super().__init__(paths, labels, seed=0, substitutes=0, known=known)
        say_if_absent(decoder)
        self.spacing = {
            "num_frames": num_frames,
            "sampling_rate": sampling_rate,
            "target_fps": target_fps,
        }
        self.num_views, self.transform, self.decoder, self.short_side = (
            num_views,
            transform,
            decoder,
            short_side,
        )

    def read_clips(self, epoch: int, index: int, path: str, info: VideoInfo | None) -> Reading:
        """The views (R, C, T, S, S) uint8 of a video, windows in order of time. Raises ReadError."""
        with open_video(path, self.decoder, self.short_side, info) as video:
            shape = {"available": video.num_frames, "fps": video.fps}
            starts = [
                view_start(**shape, **self.spacing, view=view, views=self.num_views)
                for view in range(self.num_views)
            ]
            windows = np.stack(
                [clip_indices(video, **self.spacing, start=start) for start in starts]
            )  # (views, T)
            wanted, place = np.unique(windows, return_inverse=True)
            frames = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)
            replaced = video.replaced
        views = [
            self.transform(frames[torch.from_numpy(window)])
            for window in place.reshape(windows.shape)
        ]
        return Reading(torch.cat(views).transpose(1, 2), len(wanted), replaced)


class ImageDataset(Samples):
    """Images as clips of one frame (1, C, 1, S, S). transform: a PIL image -> uint8 (C, S, S), drawing from the global generator."""

    def __init__(
        self,
        *,
        paths: list[str],
        labels: list[int],
        transform: Callable,
        seed: int,
        substitutes: int,
    ):
        super().__init__(paths, labels, seed, substitutes)
        self.transform = transform

    def read_clips(self, epoch: int, index: int, path: str, info: VideoInfo | None) -> Reading:
        """The image as (1, C, 1, S, S) uint8. Raises ReadError."""
        with seeded(sample_seed(self.seed, epoch, index)):
            return Reading(self.transform(read_image(path))[None, :, None])


class EpochSampler(Sampler):
    """Yield (epoch, index) for a range of a run's updates; the order of an epoch depends on (seed, epoch) alone.

    Update u of an epoch uses places u * G to (u + 1) * G of the order, G = batch size * accumulation * processes,
    whatever the number of processes; an incomplete last update is dropped.
    skip: how many of this process's first samples to leave out.
    """

    def __init__(
        self, n: int, batch_size: int, accum_iter: int, rank: int, world_size: int, seed: int
    ):
        self.n, self.rank, self.world_size, self.seed = n, rank, world_size, seed
        self.share = batch_size * accum_iter  # this process's samples of an update
        self.per_update = self.share * world_size
        self.updates_per_epoch = n // self.per_update
        self.first = self.skip = 0
        self.last = self.updates_per_epoch
        if not self.updates_per_epoch:
            raise UserError(
                f"{n} samples are fewer than one update takes, {self.per_update} = {batch_size} per process x {accum_iter} "
                f"accum_iter x {world_size} processes: lower --batch_size_per_gpu or --accum_iter, or add data"
            )

    def set_updates(self, first: int, last: int) -> None:
        """Let the next pass yield the samples of updates first to last - 1, counted over the run."""
        self.first, self.last = first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.share - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, done = divmod(self.first, self.updates_per_epoch)
        start = done * self.share + self.skip
        whole_epochs = (self._epoch(number) for number in count(epoch))
        return islice(chain.from_iterable(whole_epochs), start, start + len(self))

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Return this process's samples of an epoch."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, 3))
        order = torch.randperm(self.n, generator=generator)
        used = order[: self.updates_per_epoch * self.per_update]
        return [(epoch, index) for index in used[self.rank :: self.world_size].tolist()]


class ShareSampler(Sampler):
    """Every `world_size`-th sample from `rank` on, each exactly once over all ranks: for evaluation. skip: as in EpochSampler."""

    def __init__(self, n: int, rank: int, world_size: int):
        self.share, self.skip = range(rank, n, world_size), 0

    def __len__(self) -> int:
        return len(self.share) - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in islice(self.share, self.skip, None):
            yield 0, index


def collate(samples: list[dict]) -> dict:
    """Samples to a batch: clips (B, R, C, T, H, W) or None, labels (B,), index (B,), replaced (B,), paths, bad, damaged; in
    pretraining noise (B, R, L)."""
    missing = any(sample["clips"] is None for sample in samples)
    batch = {
        "clips": None if missing else stack([sample["clips"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "replaced": torch.tensor([sample["replaced"] for sample in samples]),
        "paths": [sample["path"] for sample in samples],
        "bad": [entry for sample in samples for entry in sample["bad"]],
        "damaged": [entry for sample in samples for entry in sample["damaged"]],
    }
    return batch | (
        {"noise": torch.stack([sample["noise"] for sample in samples])}
        if "noise" in samples[0]
        else {}
    )


def settle(_worker: int) -> None:
    """A worker process's start: one torch thread, since workers share the cores; no hands on what it shares with the main process; no ear
    for the signals that ask a run to stop, which a scheduler or a terminal sends to all processes: the main process ends its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    gc.freeze()


def ignore_dead_workers(_number: int, _frame) -> None:
    """Ignore SIGCHLD, for which torch's own handler raises wherever the program is, for the workers of any loader.

    A loader that waits for a batch looks for its own dead workers every five seconds, so that no update is torn.
    """


def end_workers() -> None:
    """At the end of the process: workers do not hear its SIGTERM, which torch would send them now."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def wait_for_batch(iterator: Iterator[dict]) -> dict | None:
    """Return the next batch of a DataLoader, None at its end. Raises RuntimeError if a worker is dead."""
    while True:
        try:
            return next(iterator, None)
        except (ConnectionError, EOFError):
            continue  # a worker died while it handed over a batch, and the next wait finds it dead


def read_quarantine(path: Path) -> dict[str, str]:
    """The files {path: reason} that earlier runs or this one set aside."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) == 2}


def add_to_quarantine(path: Path, file: str, reason: str) -> None:
    """Set a file aside for this run and later ones; safe on several processes at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as listing:
        csv.writer(listing).writerow((file, reason))


class Feed:
    """A DataLoader that is rebuilt when a file has killed a worker: the file goes into the quarantine, the pass continues.

    Its workers live for the whole run, and it draws nothing from the global generators. seconds: how long one file may take.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: EpochSampler | ShareSampler,
        *,
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
        seconds: float,
        quarantine: Path,
        collate_fn: Callable = collate,
    ):
        self.dataset, self.sampler, self.quarantine = dataset, sampler, quarantine
        self.options = {
            "batch_size": batch_size,
            "sampler": sampler,
            "num_workers": num_workers,
            "collate_fn": collate_fn,
            "pin_memory": pin_memory,
            "drop_last": isinstance(sampler, EpochSampler),
            "persistent_workers": num_workers > 0,
            "prefetch_factor": 4 if num_workers else None,
            "worker_init_fn": settle,
            "multiprocessing_context": "fork"
            if num_workers
            else None,  # no longer the default from Python 3.14 on
        }
        dataset.watch, dataset.quarantine = Watch(num_workers, seconds), read_quarantine(quarantine)
        self.loader = None

    def __iter__(self) -> Iterator[dict]:
        self.sampler.skip = 0
        while True:
            self.loader = self.loader or DataLoader(
                self.dataset, generator=torch.Generator(), **self.options
            )
            try:
                iterator = self._start()
                while (batch := wait_for_batch(iterator)) is not None:
                    self.sampler.skip += self.options["batch_size"]
                    yield batch
                return
            except RuntimeError:
                victims = self.dataset.watch.victims()
                if not victims:
                    raise  # a worker died, but not of a file
                self.loader = None
                for item in victims:
                    self._set_aside(self.dataset.paths[item])

    def _start(self) -> Iterator[dict]:
        """Start a pass of the DataLoader. A dead worker raises RuntimeError only while one of its batches is waited for."""
        gc.collect()  # a forked worker that collected the parent's decoder would wait forever for that decoder's threads
        iterator = iter(self.loader)
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # after torch's own, so that it comes before them
        if callable(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, ignore_dead_workers)
        return iterator

    def _set_aside(self, file: str) -> None:
        """Put a file into the quarantine and say so."""
        reason = f"hung for {self.dataset.watch.seconds:g} s or killed its reader"
        self.dataset.quarantine[file] = reason
        add_to_quarantine(self.quarantine, file, reason)
        print_here(
            f"set aside: {file} {reason}; listed in {self.quarantine} (delete its line to try it again)"
        )


def one_ahead(items: Iterable) -> Iterator:
    """Yield the items in order, each once the next one has been drawn."""
    drawn = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) == 2:
            yield drawn.popleft()
    yield from drawn


def on_device(loader: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Yield the loader's batches on the device. On CUDA a side stream copies the next batch, also that of the next epoch,
    while the device works on what it was given before."""
    if device.type != "cuda":
        yield from loader
        return
    stream = torch.cuda.Stream(device)

    def copied(batch: dict) -> tuple[dict, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            moved = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
        return moved, stream.record_event()

    def usable(copy: tuple[dict, torch.cuda.Event]) -> dict:
        batch, end_of_copy = copy
        current = torch.cuda.current_stream(device)
        current.wait_event(end_of_copy)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(current)  # its memory is reused only after this stream's work
        return batch

    yield from map(usable, one_ahead(map(copied, loader)))  # keeps no batch that is in use


def _feed(dataset: Samples, sampler, batch_size: int, args, place: Place) -> Feed:
    """The loader that the flags describe."""
    return Feed(
        dataset,
        sampler,
        batch_size=batch_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and place.device.type == "cuda",
        seconds=args.read_timeout,
        quarantine=Path(args.output_dir, "quarantine.csv"),
    )


def train_feed(
    dataset: Samples, args, place: Place
) -> tuple[int, Callable[[int, int], Iterator[dict]]]:
    """Return the updates per epoch, and (epoch, updates already done in it) -> the rest of the epoch's batches on the device.

    The epochs of a run are slices of one pass, so that the workers read the next epoch's first batches
    during the last updates of this one and its validation.
    """
    sampler = EpochSampler(
        len(dataset),
        args.batch_size_per_gpu,
        args.accum_iter,
        place.rank,
        place.world_size,
        args.seed,
    )
    feed = _feed(dataset, sampler, args.batch_size_per_gpu, args, place)
    per_epoch = sampler.updates_per_epoch
    total_steps = args.max_steps or args.epochs * per_epoch
    whole_run, following = (
        iter(()),
        None,
    )  # the pass, and the update at which it stands between two epochs

    def batches(epoch: int, done: int) -> Iterator[dict]:
        nonlocal whole_run, following
        first, end = epoch * per_epoch + done, min((epoch + 1) * per_epoch, total_steps)
        if first != following:
            sampler.set_updates(first, total_steps)
            whole_run = on_device(feed, place.device)
        following = end
        return islice(whole_run, max(end - first, 0) * args.accum_iter)

    return per_epoch, batches


def eval_feed(
    dataset: Samples, batch_size: int, args, place: Place
) -> Callable[[], Iterator[dict]]:
    """() -> this rank's share of the samples, in batches on the device."""
    feed = _feed(
        dataset, ShareSampler(len(dataset), place.rank, place.world_size), batch_size, args, place
    )
    return lambda: on_device(feed, place.device)
