"""Samples depend on (seed, epoch, index, repeat) alone; updates see the same videos on any number of processes."""

from pathlib import Path

import pytest
import torch
from make_videos import write_folder, write_video

from data.index import find_videos
from data.loaders import ClipDataset, EpochSampler, Feed, Paths, on_device
from data.transforms import VIDEO_MEAN, VIDEO_STD, denormalize, normalize, sample_seed, seeded, train_transform
from util.dist import UserError

CPU = torch.device("cpu")


def dataset(paths, **changes):
    """Training clips of 4 frames at 32 pixels."""
    arguments = {
        "paths": paths, "labels": None, "num_frames": 4, "sampling_rate": 2, "target_fps": 30, "repeat_aug": 2, "repeat_windows": 1,
        "transform": train_transform(32, (0.5, 1.0), (0.75, 1.3333), True, 0.0), "decoder": "pyav", "short_side": 64, "seed": 3,
        "noise_tokens": 8,
    }  # fmt: skip
    return ClipDataset(**arguments | changes)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Paths of six videos."""
    return find_videos([str(write_folder(tmp_path_factory.mktemp("videos"), 6))])


def batches(data, workers, batch_size=2, epoch=1):
    """One epoch of batches."""
    sampler = EpochSampler(len(data), batch_size, 1, 0, 1, seed=3)
    sampler.set_position(epoch, 0)
    feed = Feed(data, sampler, batch_size=batch_size, num_workers=workers, pin_memory=False, seconds=30, quarantine=Path("none"))
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
    import data.loaders as loaders

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


@pytest.mark.parametrize(("world", "batch", "accum"), [(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)])
def test_every_split_of_the_same_global_batch_sees_the_same_videos_per_update(world, batch, accum):
    ranks = [EpochSampler(19, batch, accum, rank, world, seed=5) for rank in range(world)]
    updates = []
    for sampler in ranks:
        sampler.set_position(2, 0)
        drawn = list(sampler)
        assert {epoch for epoch, _ in drawn} == {2} and len(drawn) == len(sampler) == 16 // world
        updates.append([{index for _, index in drawn[u * batch * accum : (u + 1) * batch * accum]} for u in range(4)])
    together = [set().union(*(rank[u] for rank in updates)) for u in range(4)]
    whole = EpochSampler(19, 4, 1, 0, 1, seed=5)
    whole.set_position(2, 0)
    order = [index for _, index in whole]
    assert together == [set(order[4 * u : 4 * u + 4]) for u in range(4)]
    assert len(set(order)) == 16


def test_a_sampler_goes_on_where_an_epoch_was_left():
    sampler = EpochSampler(20, 2, 2, 1, 2, seed=0)
    sampler.set_position(3, 0)
    whole = list(sampler)
    sampler.set_position(3, 1)
    assert list(sampler) == whole[4:] and len(sampler) == len(whole) - 4
    sampler.set_position(4, 0)
    assert [index for _, index in sampler] != [index for _, index in whole]


def test_a_batch_larger_than_the_dataset_is_named():
    with pytest.raises(UserError, match="3 samples are fewer than one update takes, 4 ="):
        EpochSampler(3, 2, 2, 0, 1, 0)


def test_flat_paths():
    names = ["/a/b.mp4", "", "/ü/ö.mkv", "x" * 300]
    assert [Paths(names)[i] for i in range(4)] == names and len(Paths(names)) == 4


def test_normalisation_and_back():
    clips = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    for mean, std in ((VIDEO_MEAN, VIDEO_STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        expected = (clips / 255 - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
        torch.testing.assert_close(normalize(clips, mean, std), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(denormalize(normalize(clips, mean, std), mean, std), clips)
