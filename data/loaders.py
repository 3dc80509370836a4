"""Datasets, samplers and loaders. Every loader yields clips (B, R, C, T, H, W) uint8: R clips of each of B videos.

A sample is a function of (seed, epoch, index, repeat) and nothing else, so neither workers nor ranks change it.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.decode import VideoError, frame_indices, open_video
from data.transforms import sample_seed, seeded
from util.dist import UserError

SUBSTITUTES = 32  # other videos to try in place of one that cannot be read


class Paths:
    """A list of strings in two flat arrays: worker processes share its memory, which a list of str would slowly copy."""

    def __init__(self, paths: list[str]):
        encoded = [path.encode() for path in paths]
        self.ends = np.cumsum([0] + [len(path) for path in encoded])
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode()


class ClipDataset(Dataset):
    """Training clips of videos. `dataset[(epoch, index)]` reads video `index` and draws its clips for that epoch.

    repeat_aug clips come from repeat_windows time windows, one decode each. noise_tokens: L of the mask noise, 0 for none.
    labels: class numbers, or None. transform: uint8 (T, C, H, W) -> the same, drawing from torch's global generator.
    """

    def __init__(self, *, paths: list[str], labels: list[int] | None, num_frames: int, sampling_rate: int, target_fps: float,
                 repeat_aug: int, repeat_windows: int, transform: Callable[[Tensor], Tensor], decoder: str, short_side: int,
                 seed: int, noise_tokens: int):  # fmt: skip
        if repeat_aug % repeat_windows:
            raise UserError(f"--repeat_aug {repeat_aug} is not divisible by --repeat_windows {repeat_windows}")
        self.paths, self.labels = Paths(paths), None if labels is None else np.array(labels)
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.repeat_aug, self.repeat_windows = repeat_aug, repeat_windows
        self.transform, self.decoder, self.short_side = transform, decoder, short_side
        self.seed, self.noise_tokens = seed, noise_tokens

    def __len__(self) -> int:
        return len(self.paths)

    def read_clips(self, epoch: int, index: int, path: str) -> Tensor:
        """The clips (R, C, T, H, W) uint8 of a video, with the draws of sample (epoch, index). Raises VideoError."""
        clips = []
        with open_video(path, self.decoder, self.short_side) as video:
            for repeat in range(self.repeat_aug):
                with seeded(sample_seed(self.seed, epoch, index, repeat)):
                    start = torch.rand(()).item()  # used by the first clip of a window
                    if repeat % (self.repeat_aug // self.repeat_windows) == 0:
                        wanted = frame_indices(video.num_frames, video.fps, num_frames=self.num_frames, start=start,
                                               sampling_rate=self.sampling_rate, target_fps=self.target_fps)  # fmt: skip
                        window = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)  # (T, C, H, W), channels last
                    clips.append(self.transform(window).transpose(0, 1))  # (C, T, H, W)
        return torch.stack(clips)

    def noise(self, epoch: int, index: int) -> Tensor:
        """Mask noise (R, L) float32 of a sample."""
        seeds = (sample_seed(self.seed, epoch, index, repeat, 1) for repeat in range(self.repeat_aug))
        return torch.stack([torch.rand(self.noise_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """clips (R, C, T, H, W) uint8, label, noise (R, L), index, bad: [(path, reason)] of videos that could not be read.

        An unreadable video is replaced by another one, chosen by (seed, epoch, index); clips is None if too many are.
        """
        epoch, index = key
        sample = {"clips": None, "label": -1, "noise": self.noise(epoch, index), "index": index, "bad": []}
        draws = np.random.default_rng(sample_seed(self.seed, epoch, index, 0, 2))
        candidates = [index, *draws.integers(len(self), size=SUBSTITUTES).tolist()]
        for candidate in candidates:
            try:
                sample["clips"] = self.read_clips(epoch, index, self.paths[candidate])
            except VideoError as error:
                sample["bad"].append((self.paths[candidate], str(error)))
                continue
            if self.labels is not None:
                sample["label"] = int(self.labels[candidate])
            return sample
        return sample


class EpochSampler(Sampler):
    """Yields (epoch, index) in an order that depends on (seed, epoch) alone.

    Update u of an epoch uses places u * G to (u + 1) * G of the order, G = batch size * accumulation * processes, whatever
    the number of processes; an incomplete last update is dropped.
    """

    def __init__(self, n: int, batch_size: int, accum_iter: int, rank: int, world_size: int, seed: int):
        self.n, self.rank, self.world_size, self.seed = n, rank, world_size, seed
        self.per_update = batch_size * accum_iter * world_size
        self.updates_per_epoch = n // self.per_update
        self.epoch = self.done = 0
        if not self.updates_per_epoch:
            raise UserError(
                f"{n} videos are fewer than one update takes, {self.per_update} = {batch_size} per process x {accum_iter} "
                f"accum_iter x {world_size} processes: lower --batch_size_per_gpu or --accum_iter, or add videos"
            )

    def set_position(self, epoch: int, updates_done: int) -> None:
        """The next pass yields the rest of this epoch, after so many updates of it."""
        self.epoch, self.done = epoch, updates_done

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.done) * self.per_update // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, 3))
        order = torch.randperm(self.n, generator=generator)
        rest = order[self.done * self.per_update : self.updates_per_epoch * self.per_update]
        for index in rest[self.rank :: self.world_size].tolist():
            yield self.epoch, index


def collate(samples: list[dict]) -> dict:
    """Samples to a batch: clips (B, R, C, T, H, W) or None, labels (B,), noise (B, R, L), index (B,), bad."""
    missing = any(sample["clips"] is None for sample in samples)
    return {
        "clips": None if missing else torch.stack([sample["clips"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "noise": torch.stack([sample["noise"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "bad": [entry for sample in samples for entry in sample["bad"]],
    }


def one_thread(_worker: int) -> None:
    """Worker processes share the cores: one torch thread each."""
    torch.set_num_threads(1)


def make_loader(dataset: Dataset, sampler: Sampler, batch_size: int, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader whose workers live for the whole run. It draws nothing from the global generators."""
    return DataLoader(
        dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate, pin_memory=pin_memory,
        drop_last=True, persistent_workers=num_workers > 0, prefetch_factor=4 if num_workers else None, worker_init_fn=one_thread,
        generator=torch.Generator(),
    )  # fmt: skip


def on_device(loader: DataLoader, device: torch.device) -> Iterator[dict]:
    """The loader's batches on the device. On CUDA a side stream copies each while the step before it is still running:
    nothing in the training loop makes the host wait, so it gets here early."""
    if device.type != "cuda":
        yield from loader
        return
    stream = torch.cuda.Stream(device)
    for batch in loader:
        with torch.cuda.stream(stream):
            moved = {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for value in moved.values():
            if isinstance(value, Tensor):
                value.record_stream(current)  # not to be handed out again before the current stream is done with it
        yield moved
