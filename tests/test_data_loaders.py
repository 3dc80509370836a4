"""Samples depend on (seed, epoch, index, repeat) alone; updates see the same videos on any number of processes."""

import argparse
import time
from pathlib import Path

import pytest
import torch
from make_videos import write_folder, write_video

import data.loaders as loaders
from data.decode import frame_indices, open_video
from data.index import find_videos
from data.loaders import (
    ClipDataset,
    EpochSampler,
    Feed,
    Paths,
    Reading,
    Samples,
    on_device,
    one_ahead,
    train_feed,
)
from data.transforms import (
    VIDEO_MEAN,
    VIDEO_STD,
    denormalize,
    normalize,
    sample_seed,
    seeded,
    train_transform,
)
from util.dist import Place, UserError

CPU = torch.device("cpu")
ONE = Place(CPU)


def dataset(paths, **changes):
    """Training clips of 4 frames at 32 pixels."""
    arguments = {
        "paths": paths,
        "labels": None,
        "num_frames": 4,
        "sampling_rate": 2,
        "target_fps": 30,
        "repeat_aug": 2,
        "repeat_windows": 1,
        "transform": train_transform(32, (0.5, 1.0), (0.75, 1.3333), True, 0.0),
        "decoder": "pyav",
        "short_side": 64,
        "seed": 3,
        "noise_tokens": 8,
    }
    return ClipDataset(**arguments | changes)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Paths of six videos."""
    return find_videos([str(write_folder(tmp_path_factory.mktemp("videos"), 6))])


def batches(data, workers, batch_size=2, epoch=1):
    """One epoch of batches."""
    sampler = EpochSampler(len(data), batch_size, 1, 0, 1, seed=3)
    sampler.set_updates(epoch * sampler.updates_per_epoch, (epoch + 1) * sampler.updates_per_epoch)
    feed = Feed(
        data,
        sampler,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=False,
        seconds=30,
        quarantine=Path("none"),
    )
    return list(on_device(feed, CPU))


def test_shapes_and_types(videos):
    batch = batches(dataset(videos, labels=[0, 1, 2, 3, 4, 5]), 0)[0]
    assert batch["clips"].shape == (2, 2, 3, 4, 32, 32) and batch["clips"].dtype == torch.uint8
    assert batch["noise"].shape == (2, 2, 8) and batch["noise"].dtype == torch.float32
    assert batch["labels"].tolist() == batch["index"].tolist()
    assert batch["bad"] == []


def test_workers_do_not_change_samples_nor_global_randomness(videos):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, two = batches(dataset(videos), 0), batches(dataset(videos), 2)
    assert torch.equal(torch.rand(3), expected)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("clips", "noise", "index"))


def test_draws_differ_between_epochs_repeats_and_seeds(videos):
    data = dataset(videos)
    sample = data[(0, 3)]
    assert torch.equal(sample["clips"], data[(0, 3)]["clips"])
    assert not torch.equal(sample["clips"][0], sample["clips"][1])
    assert not torch.equal(sample["clips"], data[(1, 3)]["clips"])
    assert not torch.equal(sample["noise"], data[(1, 3)]["noise"])
    assert not torch.equal(sample["noise"], dataset(videos, seed=4)[(0, 3)]["noise"])
    assert len({sample_seed(0, 1), sample_seed(1, 0), sample_seed(0, 1, 0), sample_seed(1)}) == 4


def test_repeats_of_a_window_share_one_decode(videos, monkeypatch):
    reads = []
    opened = loaders.open_video

    def counting(*arguments):
        video = opened(*arguments)
        read = video.read
        video.read = lambda indices: reads.append(indices) or read(indices)
        return video

    monkeypatch.setattr(loaders, "open_video", counting)
    dataset(videos, repeat_aug=4)[(0, 0)]
    assert len(reads) == 1
    reads.clear()
    dataset(videos, repeat_aug=4, repeat_windows=2)[(0, 5)]
    assert len(reads) == 2 and reads[0][0] != reads[1][0]
    with pytest.raises(UserError, match="--repeat_windows 3"):
        dataset(videos, repeat_aug=4, repeat_windows=3)


def test_a_video_is_closed_before_its_first_crop(videos, monkeypatch):
    events, opened = [], loaders.open_video

    def recorded(*arguments):
        video = opened(*arguments)
        close = type(video).__exit__
        monkeypatch.setattr(
            type(video), "__exit__", lambda *rest: events.append("close") or close(*rest)
        )
        return video

    monkeypatch.setattr(loaders, "open_video", recorded)
    data = dataset(videos, repeat_aug=4, repeat_windows=2)
    crop = data.transform
    data.transform = lambda window: events.append("crop") or crop(window)
    data[(0, 0)]
    assert events == ["close"] + ["crop"] * 4


def test_a_clip_has_the_start_and_then_the_crop_of_its_own_seed(videos):
    data = dataset(videos, repeat_aug=4, repeat_windows=2)
    clips = data[(1, 5)]["clips"]
    for repeat in range(4):
        first = repeat - repeat % 2  # of its window
        with open_video(videos[5], "pyav", 64) as video:
            with seeded(sample_seed(3, 1, 5, first)):
                start = torch.rand(()).item()
            wanted = frame_indices(
                video.num_frames, video.fps, num_frames=4, sampling_rate=2, start=start
            )
            window = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)
        with seeded(sample_seed(3, 1, 5, repeat)):
            torch.rand(())
            assert torch.equal(clips[repeat], data.transform(window).transpose(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_colors_of_a_pixel_stay_side_by_side(videos, workers):
    data = dataset(videos)
    assert data[(0, 0)]["clips"].movedim(1, -1).is_contiguous()
    clips = batches(data, workers)[0]["clips"]
    assert clips.movedim(2, -1).is_contiguous() and clips.is_shared() == (workers > 0)


def test_seeded_draws_as_after_manual_seed_and_restores_the_generator():
    torch.manual_seed(2**62 + 11)
    expected = torch.rand(5), torch.randint(0, 1000, (5,)), torch.randperm(5)
    torch.manual_seed(7)
    torch.rand(3)
    before = torch.get_rng_state()
    with seeded(2**62 + 11):
        drawn = torch.rand(5), torch.randint(0, 1000, (5,)), torch.randperm(5)
    assert all(torch.equal(one, two) for one, two in zip(expected, drawn, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_crop_and_flip_for_all_frames_of_a_clip():
    frame = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8)
    transform = train_transform(32, (0.5, 1.0), (0.75, 1.3333), True, 0.4)
    with seeded(1):
        clip = transform(frame.expand(5, -1, -1, -1))
    assert clip.shape == (5, 3, 32, 32) and clip.dtype == torch.uint8
    assert (clip == clip[:1]).all()


def test_unreadable_videos_are_replaced_and_reported(videos, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    data = dataset([*videos, str(tmp_path / "bad.mp4")])
    sample = data[(0, 6)]
    assert sample["bad"][0][0].endswith("bad.mp4") and "not a video" in sample["bad"][0][1]
    assert torch.equal(sample["clips"], data[(0, 6)]["clips"])  # the same substitute again
    alone = dataset([str(tmp_path / "bad.mp4")])
    assert batches(alone, 0, batch_size=1)[0]["clips"] is None


def test_one_frame_video_repeats_it(tmp_path):
    path = write_video(tmp_path / "one.mp4", frames=1)
    clips = dataset([str(path)])[(0, 0)]["clips"]
    assert (clips == clips[:, :, :1]).all()


@pytest.mark.parametrize(
    ("world", "batch", "accum"), [(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)]
)
def test_every_split_of_the_same_global_batch_sees_the_same_videos_per_update(world, batch, accum):
    ranks = [EpochSampler(19, batch, accum, rank, world, seed=5) for rank in range(world)]
    updates = []
    for sampler in ranks:
        sampler.set_updates(8, 12)
        drawn = list(sampler)
        assert {epoch for epoch, _ in drawn} == {2} and len(drawn) == len(sampler) == 16 // world
        updates.append(
            [
                {index for _, index in drawn[u * batch * accum : (u + 1) * batch * accum]}
                for u in range(4)
            ]
        )
    together = [set().union(*(rank[u] for rank in updates)) for u in range(4)]
    whole = EpochSampler(19, 4, 1, 0, 1, seed=5)
    whole.set_updates(8, 12)
    order = [index for _, index in whole]
    assert together == [set(order[4 * u : 4 * u + 4]) for u in range(4)]
    assert len(set(order)) == 16


def test_a_sampler_goes_on_where_an_epoch_was_left():
    sampler = EpochSampler(20, 2, 2, 1, 2, seed=0)  # two updates an epoch
    sampler.set_updates(6, 8)
    whole = list(sampler)
    sampler.set_updates(7, 8)
    assert list(sampler) == whole[4:] and len(sampler) == len(whole) - 4
    sampler.set_updates(7, 11)
    sampler.skip = 2
    assert list(sampler)[:2] == whole[6:] and len(sampler) == len(list(sampler)) == 14
    sampler.skip = 0
    sampler.set_updates(8, 10)
    assert [index for _, index in sampler] != [index for _, index in whole]


def run_args(out, **changes) -> argparse.Namespace:
    """The flags that a training feed reads, for a run of three epochs in batches of two."""
    values = {
        "batch_size_per_gpu": 2,
        "accum_iter": 1,
        "seed": 3,
        "num_workers": 0,
        "pin_mem": False,
        "read_timeout": 30,
        "output_dir": str(out),
        "max_steps": 0,
        "epochs": 3,
    }
    return argparse.Namespace(**values | changes)


def order_of(epoch: int, samples: int, used: int, seed: int = 3) -> list[int]:
    """The first `used` indices of an epoch's order, by the definition."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, 3))
    return torch.randperm(samples, generator=generator)[:used].tolist()


def indices(epoch_batches) -> list[int]:
    """The sample indices of some batches, in order."""
    return [index for batch in epoch_batches for index in batch["index"].tolist()]


class LoggedReads(Samples):
    """Samples of zeros; appends `epoch index` to a file for each one read, in whatever process."""

    def __init__(self, samples: int, log: Path):
        super().__init__([f"{number}" for number in range(samples)], None, 3, 0)
        self.log = log

    def __getitem__(self, key: tuple[int, int]) -> dict:
        with open(self.log, "a") as file:
            file.write(f"{key[0]} {key[1]}\n")
        return super().__getitem__(key)

    def read_clips(self, epoch, index, path, info):
        return Reading(torch.zeros(1, 3, 1, 2, 2, dtype=torch.uint8))

    def epochs_read(self) -> list[int]:
        """The epoch of each read so far."""
        return [int(line.split()[0]) for line in self.log.read_text().splitlines()]

    def wait_for_reads(self, count: int, seconds: float = 10) -> None:
        """Wait until so many samples have been read. Fails if they have not been in time."""
        deadline = time.monotonic() + seconds
        while len(self.epochs_read()) < count:
            assert time.monotonic() < deadline, f"{len(self.epochs_read())} of {count} reads"
            time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_yields_the_order_of_each_epoch_in_turn(videos, tmp_path, workers):
    data = dataset(videos[:5])  # two updates of two an epoch, one sample left over
    updates, epoch_batches = train_feed(data, run_args(tmp_path, num_workers=workers), ONE)
    assert updates == 2
    for epoch in range(3):
        drawn = list(epoch_batches(epoch, 0))
        assert indices(drawn) == order_of(epoch, samples=5, used=4)
        for batch in drawn:
            for row, index in enumerate(batch["index"].tolist()):
                assert torch.equal(batch["clips"][row], data[(epoch, index)]["clips"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_anywhere_yields_what_the_whole_one_does(videos, tmp_path, workers):
    args = run_args(tmp_path, num_workers=workers, batch_size_per_gpu=1, accum_iter=2)
    whole = [order_of(epoch, samples=6, used=6) for epoch in range(3)]
    for epoch, done in ((0, 1), (1, 0), (1, 2), (1, 3), (2, 3)):
        _, epoch_batches = train_feed(dataset(videos), args, ONE)
        assert indices(epoch_batches(epoch, done)) == whole[epoch][2 * done :]
        for later in range(epoch + 1, 3):
            assert indices(epoch_batches(later, 0)) == whole[later]


def test_a_feed_asked_for_another_position_goes_there(videos, tmp_path):
    for workers in (0, 1):
        _, epoch_batches = train_feed(dataset(videos), run_args(tmp_path, num_workers=workers), ONE)
        assert indices(epoch_batches(0, 0)) == order_of(0, 6, 6)
        assert indices(epoch_batches(2, 1)) == order_of(2, 6, 6)[2:]
        assert indices(epoch_batches(1, 0)) == order_of(1, 6, 6)


def test_workers_read_the_next_epoch_while_this_one_is_trained_on(tmp_path):
    data = LoggedReads(8, tmp_path / "reads")
    _, epoch_batches = train_feed(data, run_args(tmp_path, num_workers=1), ONE)
    this_epoch = epoch_batches(0, 0)
    next(this_epoch)
    data.wait_for_reads(10)  # the batch in use, and four more ahead of it
    assert data.epochs_read() == [0] * 8 + [1] * 2
    assert indices(this_epoch) == order_of(0, 8, 8)[2:]
    data.wait_for_reads(16)  # nothing was asked of the second epoch so far, as in a validation
    assert data.epochs_read() == [0] * 8 + [1] * 8
    assert indices(epoch_batches(1, 0)) == order_of(1, 8, 8)


def test_one_ahead_draws_an_item_before_it_yields_the_one_before():
    drawn = []
    ahead = one_ahead(drawn.append(number) or number for number in range(3))
    assert [(item, len(drawn)) for item in ahead] == [(0, 2), (1, 3), (2, 3)]
    assert list(one_ahead([])) == [] and list(one_ahead("a")) == ["a"]


@pytest.mark.parametrize(("length", "reads"), [({"epochs": 2}, 16), ({"max_steps": 3}, 6)])
def test_nothing_is_read_beyond_the_last_update_of_a_run(tmp_path, length, reads):
    data = LoggedReads(8, tmp_path / "reads")
    _, epoch_batches = train_feed(data, run_args(tmp_path, num_workers=2, **length), ONE)
    drawn = [index for epoch in range(2) for index in indices(epoch_batches(epoch, 0))]
    time.sleep(0.3)
    assert len(drawn) == len(data.epochs_read()) == reads


def test_a_batch_larger_than_the_dataset_is_named():
    with pytest.raises(UserError, match="3 samples are fewer than one update takes, 4 ="):
        EpochSampler(3, 2, 2, 0, 1, 0)


def test_flat_paths():
    names = ["/a/b.mp4", "", "/ü/ö.mkv", "x" * 300]
    assert [Paths(names)[i] for i in range(4)] == names and len(Paths(names)) == 4


def test_normalisation_and_back():
    clips = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    for mean, std in ((VIDEO_MEAN, VIDEO_STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        expected = (clips / 255 - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(
            3, 1, 1, 1
        )
        torch.testing.assert_close(normalize(clips, mean, std), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(denormalize(normalize(clips, mean, std), mean, std), clips)
