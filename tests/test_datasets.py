"""Samples depend on (seed, epoch, index, repeat) alone; unreadable files are replaced."""

import math

import av
import numpy as np
import pytest
import torch
from clip_dataset import SEED, clip_dataset
from make_videos import write_folder, write_video
from video_matrix import H264, IRREGULAR, QUICK
from video_writer import Case, NoEncoder, number_of, write_case

from data import open_videos
from data.clips import ClipSampling, frame_indices
from data.datasets import PackedPaths, ViewDataset
from data.decode import open_video
from data.manifest import find_videos
from data.open_videos import OpenVideos
from data.transforms import view_transform
from util.dist import UserError
from util.seeds import derive_seed, fork_rng


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return the paths of six videos."""
    folder = write_folder(tmp_path_factory.mktemp("videos"), 6)
    return find_videos([str(folder)], "--data_dirs")


def read_window(path: str, indices: np.ndarray) -> torch.Tensor:
    """Return frames (T, C, H, W) of a video, read alone."""
    with open_video(path, "pyav", 64) as video:
        return video.read_tensor(indices)


def test_a_sample_has_the_documented_shapes(videos):
    labels = [5, 4, 3, 2, 1, 0]
    sample = clip_dataset(videos, labels=labels)[(1, 2)]
    assert sample["clips"].shape == (2, 3, 4, 32, 32)
    assert sample["clips"].dtype == torch.uint8
    assert sample["noise"].shape == (2, 8)
    assert sample["noise"].dtype == torch.float32
    assert (sample["index"], sample["label"], sample["path"]) == (2, 3, videos[2])
    assert sample["bad"] == []


def test_draws_differ_between_epochs_repeats_and_seeds(videos):
    data = clip_dataset(videos)
    sample = data[(0, 3)]
    assert torch.equal(sample["clips"], data[(0, 3)]["clips"])
    assert not torch.equal(sample["clips"][0], sample["clips"][1])
    assert not torch.equal(sample["clips"], data[(1, 3)]["clips"])
    assert not torch.equal(sample["noise"], data[(1, 3)]["noise"])
    other_seed = clip_dataset(videos, seed=SEED + 1)
    assert not torch.equal(sample["noise"], other_seed[(0, 3)]["noise"])


def test_repeats_of_a_window_share_one_decode(videos, monkeypatch):
    reads = []

    def open_counting_reads(*arguments):
        video = open_video(*arguments)
        read = video.read
        video.read = lambda indices: reads.append(indices) or read(indices)
        return video

    monkeypatch.setattr(open_videos, "open_video", open_counting_reads)
    clip_dataset(videos, repeat_aug=4)[(0, 0)]
    assert len(reads) == 1
    reads.clear()
    clip_dataset(videos, repeat_aug=4, repeat_windows=2)[(0, 5)]
    assert len(reads) == 2
    assert reads[0][0] != reads[1][0]


def test_windows_that_do_not_divide_the_repeats_are_an_error(videos):
    with pytest.raises(UserError, match="--repeat_windows 3"):
        clip_dataset(videos, repeat_aug=4, repeat_windows=3)


def test_a_video_is_closed_before_its_first_crop(videos, monkeypatch):
    events = []

    def open_recording_close(*arguments):
        video = open_video(*arguments)
        close = video.close
        video.close = lambda: events.append("close") or close()
        return video

    monkeypatch.setattr(open_videos, "open_video", open_recording_close)
    data = clip_dataset(videos, repeat_aug=4, repeat_windows=2)
    crop = data.transform
    data.transform = lambda window: events.append("crop") or crop(window)
    data[(0, 0)]
    assert events == ["close"] + ["crop"] * 4


def test_a_clip_draws_its_start_and_then_its_crop(videos):
    data = clip_dataset(videos, repeat_aug=4, repeat_windows=2)
    clips = data[(1, 5)]["clips"]
    for repeat in range(4):
        first_of_window = repeat - repeat % 2
        with fork_rng(derive_seed(SEED, 1, 5, first_of_window)):
            start = torch.rand(()).item()
        with open_video(videos[5], "pyav", 64) as video:
            num_frames, fps = video.num_frames, video.fps
        indices = frame_indices(num_frames, fps, ClipSampling(4, 2), start=start)
        window = read_window(videos[5], indices)
        with fork_rng(derive_seed(SEED, 1, 5, repeat)):
            torch.rand(())
            assert torch.equal(clips[repeat], data.transform(window).transpose(0, 1))


def test_clips_are_channels_last_in_memory(videos):
    clips = clip_dataset(videos)[(0, 0)]["clips"]
    assert clips.movedim(1, -1).is_contiguous()


def test_unreadable_videos_are_replaced_and_reported(videos, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    data = clip_dataset([*videos, str(bad)])
    sample = data[(0, 6)]
    (path, reason), *_ = sample["bad"]
    assert path == str(bad)
    assert "not a video" in reason
    assert sample["path"] in videos
    assert torch.equal(sample["clips"], data[(0, 6)]["clips"])  # the same substitute again
    assert clip_dataset([str(bad)])[(0, 0)]["clips"] is None


def test_a_video_of_one_frame_repeats_it(tmp_path):
    path = write_video(tmp_path / "one.mp4", frames=1)
    clips = clip_dataset([str(path)])[(0, 0)]["clips"]
    assert (clips == clips[:, :, :1]).all()


def test_views_of_a_video_are_those_read_one_by_one(tmp_path):
    path = str(write_video(tmp_path / "v.mp4", frames=40, size=(96, 64)))
    transform = view_transform(32, 3)
    data = ViewDataset(
        paths=[path],
        labels=[3],
        sampling=ClipSampling(4, 4),
        decoder="pyav",
        short_side=64,
        num_views=5,
        transform=transform,
    )
    sample = data[(0, 0)]
    assert data.videos.videos == {}
    assert sample["clips"].shape == (15, 3, 4, 32, 32)
    assert sample["label"] == 3
    for view in range(5):
        start = view * (24 // 4)  # 40 - 16 frames in four steps
        indices = np.linspace(start, start + 15, 4).astype(int)
        expected = transform(read_window(path, indices)).transpose(1, 2)
        assert torch.equal(sample["clips"][3 * view : 3 * view + 3], expected)


LONG = Case("long.mp4", "120 frames at 30 frames/s", H264._replace(frames=120))
UNEVEN = Case("uneven.mkv", "7 to 56 ms between frames", H264._replace(times_ms=IRREGULAR))


def shown_numbers(clips: torch.Tensor) -> list[list[int]]:
    """Return the numbers that the frames of clips (R, C, T, H, W) show, clip by clip."""
    frames = clips.permute(0, 2, 3, 4, 1).numpy()
    return [[number_of(frame) for frame in clip] for clip in frames]


def spans_dataset(path: str, spans, decoder: str, num_views: int = 1) -> ViewDataset:
    """Return uncropped clips of 4 frames, 2 frames apart at 30 frames/s, of spans of one file."""
    return ViewDataset(
        paths=[path] * len(spans),
        labels=[-1] * len(spans),
        sampling=ClipSampling(4, 2),
        decoder=decoder,
        short_side=64,
        num_views=num_views,
        transform=lambda frames: frames[None],
        spans=spans,
    )


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_samples_are_spans_of_one_file(tmp_path, decoder):
    path = str(write_case(LONG, tmp_path))
    spans = [(0, 8 / 30), (1, 1 + 8 / 30), (112 / 30, 4), (3.9, 9), (1, 3), (0, math.inf), (4, 5)]
    data = spans_dataset(path, spans, decoder)
    samples = [data[(0, index)] for index in range(len(spans))]
    numbers = [shown_numbers(sample["clips"])[0] for sample in samples[:-1]]
    offsets = np.linspace(0, 7, 4).astype(int)
    assert numbers == [
        offsets.tolist(),
        (30 + offsets).tolist(),
        (112 + offsets).tolist(),
        [117, 119, 119, 119],  # shorter than a clip
        (30 + (60 - 8) // 2 + offsets).tolist(),  # its center
        ((120 - 8) // 2 + offsets).tolist(),
    ]
    assert samples[-1]["clips"] is None
    ((name, reason),) = samples[-1]["bad"]
    assert (name, reason) == (
        f"{path}#t=4,5",
        "the video ends at 4.000 s, its part starts at 4.000 s",
    )


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_spans_of_a_variable_rate_go_by_time(tmp_path, decoder):
    path = str(write_case(UNEVEN, tmp_path))
    times = np.array(UNEVEN.seconds)
    spans = [(times[first] - 0.002, times[first] + 0.3) for first in (1, 20, 36)]
    data = spans_dataset(path, spans, decoder)
    distance = np.median(np.diff(times))
    for index, (begin, _) in enumerate(spans):
        ((first, *others),) = shown_numbers(data[(0, index)]["clips"])
        assert first in (sum(times <= begin) - 1, sum(times <= begin + 0.04) - 1)
        assert others[-1] == pytest.approx(sum(times <= begin + 8 / 30 - distance) - 1, abs=1)


def test_the_views_of_a_span_are_spread_over_it(tmp_path):
    path = str(write_case(LONG, tmp_path))
    data = spans_dataset(path, [(1, 2), (2, 2.2)], "pyav", num_views=3)
    firsts = [[clip[0] for clip in shown_numbers(data[(0, index)]["clips"])] for index in (0, 1)]
    assert firsts == [[30, 30 + 22 // 2, 30 + 22], [60, 60, 60]]


def test_a_span_costs_no_more_than_its_frames(tmp_path, monkeypatch):
    path = str(write_case(LONG, tmp_path))
    opened = []

    def open_and_keep(*arguments):
        opened.append(open_video(*arguments))
        return opened[-1]

    monkeypatch.setattr(open_videos, "open_video", open_and_keep)
    data = spans_dataset(path, [(3, 3 + 8 / 30)], "pyav")
    assert data[(0, 0)]["clips"] is not None
    assert opened[0].decoded < 24  # of 120: two GOPs


def corrupt_video(path) -> str:
    """Return a video of which each GOP has a corrupt packet."""
    write_video(path, frames=120)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets[4::12]:
        content[position + size // 2 : position + size] = bytes(size - size // 2)
    path.write_bytes(content)
    return str(path)


def video_of_case(name: str, folder) -> str:
    """Return a video of the matrix, or a corrupt one. Skip the test where PyAV cannot write it."""
    if name == "corrupt.mp4":
        return corrupt_video(folder / name)
    (case,) = [case for case in QUICK if case.name == name]
    try:
        return str(write_case(case, folder))
    except NoEncoder as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["corrupt.mp4", *(case.name for case in QUICK)])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_file_that_stays_open_reads_the_same(tmp_path, name, decoder):
    path = video_of_case(name, tmp_path)
    order = np.random.default_rng(0).permutation(8)
    spans = [(start / 10, start / 10 + 8 / 30) for start in order]
    kept = spans_dataset(path, spans, decoder)
    for index, span in enumerate(spans):
        sample = kept[(0, index)]
        alone = spans_dataset(path, [span], decoder)[(0, 0)]
        assert sample["bad"] == alone["bad"]
        assert sample["replaced"] == alone["replaced"]
        if alone["clips"] is not None:
            assert torch.equal(sample["clips"], alone["clips"])


def test_spans_of_one_file_open_it_once(tmp_path, monkeypatch):
    paths = [str(write_video(tmp_path / name, frames=60)) for name in ("a.mp4", "b.mp4")]
    opened = []
    closed = []

    def open_and_record(path, *arguments):
        opened.append(path)
        video = open_video(path, *arguments)
        close = video.close
        video.close = lambda: closed.append(path) or close()
        return video

    monkeypatch.setattr(open_videos, "open_video", open_and_record)
    data = spans_dataset(paths[0], [(0, 1), (1, 2), (9, 10), (0, 1), (0, 1)], "pyav")
    data.paths = PackedPaths([*paths[:1] * 4, paths[1]])
    samples = [data[(0, index)] for index in range(5)]
    assert [sample["clips"] is None for sample in samples] == [False, False, True, False, False]
    assert opened == [paths[0], paths[0], paths[1]]  # again after the error
    assert closed == [paths[0]]
    assert list(data.videos.videos) == paths


def test_the_files_read_last_stay_open_within_limits(tmp_path, monkeypatch):
    paths = [str(write_video(tmp_path / f"{index}.mp4", frames=30)) for index in range(4)]
    videos = OpenVideos("pyav", 64)

    def read(index: int) -> list[int]:
        with videos.open(paths[index], None, keep=True):
            pass
        return [paths.index(path) for path in videos.videos]

    monkeypatch.setattr(open_videos, "MAX_FILES", 3)
    assert [read(index) for index in (0, 1, 2, 1, 3)][-1] == [2, 1, 3]
    monkeypatch.setattr(open_videos, "MAX_PIXELS", 2 * 96 * 64)
    assert read(2) == [3, 2]
    monkeypatch.undo()
    assert read(1) == [3, 2, 1]
    monkeypatch.setattr(open_videos, "MAX_FRAMES", 60)
    assert read(0) == [1, 0]
    monkeypatch.setattr(open_videos, "MAX_FRAMES", 1)
    assert read(2) == [2]
    with videos.open(paths[1], None, keep=False):
        pass
    assert list(videos.videos) == [paths[2]]
    parent = videos.videos[paths[2]]
    monkeypatch.setattr(open_videos.os, "getpid", lambda: 1)  # as after a fork
    with videos.open(paths[2], None, keep=True) as video:
        assert video is not parent
    assert parent.read(np.array([3])).shape == (1, 64, 96, 3)  # it was not closed


def test_packed_paths_are_a_list_of_paths_that_keeps_each_once():
    names = ["/a/b.mp4", "", "/ü/ö.mkv", "x" * 300, "", "/a/b.mp4", "/ü/ö.mkv"]
    packed = PackedPaths(names)
    assert len(packed) == 7
    assert [packed[index] for index in range(7)] == names
    assert packed.files.tolist() == [0, 1, 2, 3, 1, 0, 2]
    assert len(packed.bytes) == sum(len(name.encode()) for name in set(names))


def test_training_clips_stay_in_their_span(tmp_path):
    path = str(write_case(LONG, tmp_path))
    spans = [(0, 0.5), (1.5, 2.5), (3.5, math.inf), (9, 10)]
    data = clip_dataset(
        [path] * 4,
        labels=[0, 1, 2, 3],
        spans=spans,
        transform=lambda frames: frames,
        repeat_windows=2,
    )
    bounds = [(0, 14), (45, 74), (105, 119)]
    starts = set()
    for epoch in range(6):
        for index, (first, last) in enumerate(bounds):
            sample = data[(epoch, index)]
            assert sample["label"] == index
            for numbers in shown_numbers(sample["clips"]):
                assert first <= min(numbers) <= max(numbers) <= last
                assert np.diff(numbers).max() == 3  # 4 frames of 8, ends included
                starts.add((index, numbers[0]))
    assert len(starts) > 20
    sample = data[(0, 3)]  # the video is 4 s long
    reason = "the video ends at 4.000 s, its part starts at 9.000 s"
    assert sample["bad"][0] == (f"{path}#t=9,10", reason)
    assert sample["label"] in (0, 1, 2)
    numbers = shown_numbers(sample["clips"])[0]
    first, last = bounds[sample["label"]]
    assert first <= numbers[0] <= numbers[-1] <= last
