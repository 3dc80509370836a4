"""Loaders: workers change nothing, and a run's batches do not depend on where it was resumed."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_dataset import SEED, clip_dataset
from make_videos import write_folder

from data.datasets import ReadClips, SampleDataset
from data.loader import (
    FaultTolerantLoader,
    WorkerSettings,
    eval_loader,
    on_device,
    one_ahead,
    train_loader,
)
from data.manifest import find_videos
from data.samplers import EpochSampler
from util.dist import DistEnv
from util.seeds import derive_seed

CPU = torch.device("cpu")
ONE_PROCESS = DistEnv(CPU)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return the paths of six videos."""
    folder = write_folder(tmp_path_factory.mktemp("videos"), 6)
    return find_videos([str(folder)], "--data_dirs")


def worker_settings(num_workers: int, folder: Path) -> WorkerSettings:
    """Return settings whose quarantine is in a folder."""
    return WorkerSettings(num_workers, False, 30, folder / "quarantine.csv")


def load_epoch(data: SampleDataset, num_workers: int, folder: Path) -> list[dict]:
    """Return the batches of two of epoch 1."""
    sampler = EpochSampler(len(data), 2, 1, ONE_PROCESS, SEED)
    sampler.set_updates(sampler.updates_per_epoch, 2 * sampler.updates_per_epoch)
    loader = FaultTolerantLoader(data, sampler, 2, worker_settings(num_workers, folder))
    return list(on_device(loader, CPU))


def start_run(
    data: SampleDataset,
    num_workers: int,
    folder: Path,
    batch_size: int = 2,
    accum_iter: int = 1,
    total_steps: int | None = None,
) -> Callable:
    """Return the train_loader of a run, of three epochs by default."""
    sampler = EpochSampler(len(data), batch_size, accum_iter, ONE_PROCESS, SEED)
    if total_steps is None:
        total_steps = 3 * sampler.updates_per_epoch
    return train_loader(data, sampler, total_steps, worker_settings(num_workers, folder), CPU)


def order_of(epoch: int, samples: int, used: int) -> list[int]:
    """Return the first `used` indices of an epoch's order, by its definition."""
    generator = torch.Generator().manual_seed(derive_seed(SEED, epoch, 3))
    return torch.randperm(samples, generator=generator)[:used].tolist()


def indices_of(batches) -> list[int]:
    """Return the sample indices of some batches, in order."""
    return [index for batch in batches for index in batch["index"].tolist()]


class LoggedReads(SampleDataset):
    """Samples of zeros; appends `epoch index` to a file for each read, in whatever process."""

    def __init__(self, samples: int, log: Path):
        super().__init__([str(index) for index in range(samples)], None, SEED, 0)
        self.log = log

    def __getitem__(self, key: tuple[int, int]) -> dict:
        with open(self.log, "a") as file:
            file.write(f"{key[0]} {key[1]}\n")
        return super().__getitem__(key)

    def read_clips(self, key, path, span, info):
        """Return a black clip."""
        return ReadClips(torch.zeros(1, 3, 1, 2, 2, dtype=torch.uint8))

    def epochs_read(self) -> list[int]:
        """Return the epoch of each read so far."""
        return [int(line.split()[0]) for line in self.log.read_text().splitlines()]

    def wait_for_reads(self, count: int, seconds: float = 10) -> None:
        """Wait until `count` samples have been read. Fail after some seconds."""
        deadline = time.monotonic() + seconds
        while len(self.epochs_read()) < count:
            assert time.monotonic() < deadline, f"{len(self.epochs_read())} of {count} reads"
            time.sleep(0.01)


def test_a_batch_has_the_documented_shapes(videos, tmp_path):
    batch = load_epoch(clip_dataset(videos, labels=[0, 1, 2, 3, 4, 5]), 0, tmp_path)[0]
    assert batch["clips"].shape == (2, 2, 3, 4, 32, 32)
    assert batch["clips"].dtype == torch.uint8
    assert batch["noise"].shape == (2, 2, 8)
    assert batch["noise"].dtype == torch.float32
    assert batch["labels"].tolist() == batch["index"].tolist()
    assert batch["bad"] == []


def test_a_batch_with_an_unreadable_sample_has_no_clips(tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    data = clip_dataset([str(tmp_path / "bad.mp4")] * 2)
    assert load_epoch(data, 0, tmp_path)[0]["clips"] is None


def test_workers_change_neither_samples_nor_global_draws(videos, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    without = load_epoch(clip_dataset(videos), 0, tmp_path)
    with_two = load_epoch(clip_dataset(videos), 2, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert len(without) == len(with_two) == 3
    for one, other in zip(without, with_two, strict=True):
        for key in ("clips", "noise", "index"):
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_channels_last_and_in_shared_memory(videos, tmp_path, num_workers):
    clips = load_epoch(clip_dataset(videos), num_workers, tmp_path)[0]["clips"]
    assert clips.movedim(2, -1).is_contiguous()
    assert clips.is_shared() == (num_workers > 0)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_run_yields_the_order_of_each_epoch_in_turn(videos, tmp_path, num_workers):
    data = clip_dataset(videos[:5])  # two updates of two samples, and one sample left over
    epoch_batches = start_run(data, num_workers, tmp_path)
    for epoch in range(3):
        batches = list(epoch_batches(epoch, 0))
        assert indices_of(batches) == order_of(epoch, samples=5, used=4)
        for batch in batches:
            for row, index in enumerate(batch["index"].tolist()):
                assert torch.equal(batch["clips"][row], data[(epoch, index)]["clips"])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("epoch", "updates_done"), [(0, 1), (1, 0), (1, 2), (1, 3), (2, 3)], ids=str
)
def test_a_resumed_run_yields_the_rest_of_the_whole_one(
    videos, tmp_path, num_workers, epoch, updates_done
):
    data = clip_dataset(videos)
    epoch_batches = start_run(data, num_workers, tmp_path, batch_size=1, accum_iter=2)
    whole = order_of(epoch, samples=6, used=6)
    assert indices_of(epoch_batches(epoch, updates_done)) == whole[2 * updates_done :]
    for later in range(epoch + 1, 3):
        assert indices_of(epoch_batches(later, 0)) == order_of(later, samples=6, used=6)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_epochs_can_be_asked_for_in_any_order(videos, tmp_path, num_workers):
    epoch_batches = start_run(clip_dataset(videos), num_workers, tmp_path)
    assert indices_of(epoch_batches(0, 0)) == order_of(0, 6, 6)
    assert indices_of(epoch_batches(2, 1)) == order_of(2, 6, 6)[2:]
    assert indices_of(epoch_batches(1, 0)) == order_of(1, 6, 6)


def test_workers_read_the_next_epoch_during_this_one(tmp_path):
    data = LoggedReads(8, tmp_path / "reads")
    epoch_batches = start_run(data, 1, tmp_path)
    this_epoch = epoch_batches(0, 0)
    next(this_epoch)
    data.wait_for_reads(10)  # the batch in use and four prefetched ones
    assert data.epochs_read() == [0] * 8 + [1] * 2
    assert indices_of(this_epoch) == order_of(0, 8, 8)[2:]
    data.wait_for_reads(16)  # epoch 1 has not been asked for, as during a validation
    assert data.epochs_read() == [0] * 8 + [1] * 8
    assert indices_of(epoch_batches(1, 0)) == order_of(1, 8, 8)


@pytest.mark.parametrize(("total_steps", "reads"), [(8, 16), (3, 6)])
def test_nothing_is_read_beyond_the_last_update(tmp_path, total_steps, reads):
    data = LoggedReads(8, tmp_path / "reads")
    epoch_batches = start_run(data, 2, tmp_path, total_steps=total_steps)
    drawn = []
    for epoch in range(2):
        drawn += indices_of(epoch_batches(epoch, 0))
    time.sleep(0.3)
    assert len(drawn) == len(data.epochs_read()) == reads


def test_an_evaluation_can_be_repeated(videos, tmp_path):
    env = DistEnv(CPU, rank=1, world_size=2)
    start_pass = eval_loader(clip_dataset(videos), 2, worker_settings(1, tmp_path), env)
    for _ in range(2):
        assert indices_of(start_pass()) == [1, 3, 5]


def test_memory_is_pinned_only_for_cuda(videos, tmp_path):
    settings = worker_settings(0, tmp_path)._replace(pin_memory=True)
    start_pass = eval_loader(clip_dataset(videos), 2, settings, ONE_PROCESS)
    assert not next(start_pass())["clips"].is_pinned()


def test_one_ahead_draws_an_item_before_it_yields_the_last():
    drawn = []
    items = one_ahead(drawn.append(number) or number for number in range(3))
    assert [(item, len(drawn)) for item in items] == [(0, 2), (1, 3), (2, 3)]
    assert list(one_ahead([])) == []
    assert list(one_ahead("a")) == ["a"]
