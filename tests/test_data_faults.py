"""Faults in the data (T15, T16): unreadable files, and files that hang or kill their reader."""

import csv
import faulthandler
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clip_dataset import SEED, clip_dataset
from launch import torchrun
from make_videos import write_folder, write_video
from runs import log_records, pretrain_command, saved_weights
from worker_faults import (
    CHECK_INTERVAL,
    GUARD,
    ONE_PROCESS,
    READ_TIMEOUT,
    assert_only_these_files_differ,
    bad_files,
    indices_of,
    inject_faults,
    make_loader,
    time_limit,
)

import pretrain
from data import open_videos
from data.datasets import ClipDataset
from data.decode import open_video
from data.loader import FaultTolerantLoader, WorkerSettings, train_loader
from data.manifest import find_videos
from data.pyav_video import PyAVVideo
from data.samplers import DistributedEvalSampler, EpochSampler
from data.watchdog import read_quarantine
from util.dist import UserError
from util.seeds import derive_seed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """Return the paths of eight videos."""
    folder = write_folder(tmp_path_factory.mktemp("videos"), 8)
    return find_videos([str(folder)], "--data_dirs")


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """Return a dict {path: fault}, see `inject_faults`."""
    return inject_faults(monkeypatch, tmp_path)


def start_run(data: ClipDataset, folder: Path) -> Callable:
    """Return the train_loader of two epochs of two batches of three, on two workers."""
    sampler = EpochSampler(len(data), 3, 1, ONE_PROCESS, SEED)
    workers = WorkerSettings(2, False, READ_TIMEOUT, folder / "quarantine.csv")
    return train_loader(data, sampler, 2 * sampler.updates_per_epoch, workers, CPU)


def run_pretraining(folder: Path | str, out: Path, *flags: str) -> None:
    """Run two epochs of pretraining in batches of two."""
    shared = ["--epochs", "2", "--batch_size_per_gpu", "2", "--read_timeout", str(READ_TIMEOUT)]
    pretrain.main(pretrain_command(str(folder), out, *shared, *flags))


@pytest.mark.parametrize("fault", ["hang", "KILL"])
def test_t16_a_file_that_hangs_or_kills_is_quarantined(videos, tmp_path, faulty, fault):
    undisturbed = list(make_loader(clip_dataset(videos), tmp_path / "none"))
    bad = videos[int(undisturbed[1]["index"][0])]  # in the second of four batches
    faulty[bad] = fault
    quarantine = tmp_path / "out" / "quarantine.csv"
    data = clip_dataset(videos)
    with time_limit(2 * (READ_TIMEOUT + CHECK_INTERVAL) + GUARD):
        batches = list(make_loader(data, quarantine))
    assert_only_these_files_differ(undisturbed, batches, [bad], data)
    reasons = {"hang": "hung for 2 s", "KILL": "killed its reader twice (SIGKILL)"}
    assert bad_files(batches) == {bad: reasons[fault]}
    assert list(read_quarantine(quarantine)) == [bad]

    start = time.time()
    later_run = list(make_loader(clip_dataset(videos), quarantine))  # does not open the file
    assert time.time() - start < READ_TIMEOUT + GUARD
    for one, other in zip(batches, later_run, strict=True):
        assert torch.equal(one["clips"], other["clips"])
        assert torch.equal(one["noise"], other["noise"])


def test_t16_workers_read_while_a_traceback_timer_is_armed(videos, tmp_path):
    faulthandler.dump_traceback_later(1000)  # workers inherit its lock, but not its thread
    try:
        with time_limit(2 * GUARD):
            batches = list(make_loader(clip_dataset(videos), tmp_path / "none"))
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert len(batches) == 4
    assert not bad_files(batches)


def test_t16_a_hang_changes_nothing_but_the_file(videos, tmp_path, faulty):
    folder = Path(videos[0]).parent.parent
    faulty[videos[2]] = "hang"
    known = tmp_path / "known"
    known.mkdir()
    (known / "quarantine.csv").write_text(f"{videos[2]},known\n")
    run_pretraining(folder, known, "--max_bad_frac", "0.2")
    hung = tmp_path / "hung"
    run_pretraining(folder, hung, "--max_bad_frac", "0.2", "--num_workers", "2")
    expected = saved_weights(known)
    for name, tensor in saved_weights(hung).items():
        assert torch.equal(tensor, expected[name])
    assert videos[2] in (hung / "bad_videos.csv").read_text()


def test_t16_too_many_hanging_files_stop_a_run(videos, tmp_path, faulty):
    folder = Path(videos[0]).parent.parent
    faulty[videos[2]] = "hang"
    with pytest.raises(UserError, match="1 files cannot be read, more than --max_bad_frac allows"):
        run_pretraining(folder, tmp_path, "--max_bad_frac", "0.1", "--num_workers", "1")


def file_of_second_epoch_only(videos: list[str], used: int = 6) -> str:
    """Return a file that the first epoch leaves out and the second one uses."""
    orders = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(derive_seed(SEED, epoch, 3))
        orders.append(torch.randperm(len(videos), generator=generator)[:used].tolist())
    return videos[next(index for index in orders[1] if index not in orders[0])]


@pytest.fixture
def undisturbed_epochs(videos, tmp_path):
    """Return the batches of both epochs of a run without faults."""
    epoch_batches = start_run(clip_dataset(videos), tmp_path / "undisturbed")
    return [list(epoch_batches(epoch, 0)) for epoch in range(2)]


def test_t16_a_prefetched_file_of_the_next_epoch_kills(
    undisturbed_epochs, videos, tmp_path, faulty
):
    bad = file_of_second_epoch_only(videos)
    faulty[bad] = "KILL"
    data = clip_dataset(videos)
    epoch_batches = start_run(data, tmp_path)
    first_epoch = list(epoch_batches(0, 0))
    for undisturbed, batch in zip(undisturbed_epochs[0], first_epoch, strict=True):
        assert torch.equal(undisturbed["clips"], batch["clips"])
    assert bad_files(first_epoch) == {}
    second_epoch = list(epoch_batches(1, 0))
    assert_only_these_files_differ(undisturbed_epochs[1], second_epoch, [bad], data)
    assert list(bad_files(second_epoch)) == [bad]
    assert list(read_quarantine(tmp_path / "quarantine.csv")) == [bad]


def test_t16_a_worker_that_dies_during_validation_is_found(
    undisturbed_epochs, videos, tmp_path, faulty, monkeypatch
):
    bad = file_of_second_epoch_only(videos)
    faulty[bad] = "hang"  # killed after two seconds, during the validation
    data = clip_dataset(videos)
    epoch_batches = start_run(data, tmp_path / "faulty")
    assert len(list(epoch_batches(0, 0))) == 2

    faulty.pop(bad)  # in this process, from which the validation's workers are forked
    slow = clip_dataset(videos)
    read_clips = slow.read_clips
    monkeypatch.setattr(slow, "read_clips", lambda *key: time.sleep(0.9) or read_clips(*key))
    workers = WorkerSettings(2, False, 30, tmp_path / "validation.csv")
    validation = FaultTolerantLoader(slow, DistributedEvalSampler(8, 0, 1), 2, workers)
    assert indices_of(validation) == list(range(8))
    assert not (tmp_path / "faulty" / "quarantine.csv").exists()
    assert len(data.watchdog.timed_out) == 1

    second_epoch = list(epoch_batches(1, 0))
    assert_only_these_files_differ(undisturbed_epochs[1], second_epoch, [bad], data)
    assert list(bad_files(second_epoch)) == [bad]
    assert indices_of(validation) == list(range(8))


def write_audio(path: Path) -> None:
    """Write an MP4 file without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        samples = np.zeros((1, 1024), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_broken_files(folder: Path) -> dict[str, str]:
    """Write one file of each kind of damage; return {name: part of the reason}."""
    whole = write_video(folder / "whole.mp4", frames=40)
    content = whole.read_bytes()
    whole.unlink()
    (folder / "empty.mp4").touch()
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    write_audio(folder / "audio.mp4")
    return {
        "empty.mp4": "empty file",
        "random.mp4": "not a video",
        "truncated.mp4": "not a video",
        "folder.mp4": "a folder: pass --frames_fps",
        "fifo.mp4": "not a regular file",
        "audio.mp4": "no video stream",
        "missing.mp4": "No such file",
    }


def read_listed(out: Path) -> list[tuple[str, str]]:
    """Return the name and reason of each file in a run's bad_videos.csv."""
    with open(out / "bad_videos.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "reason"]
    return [(Path(path).name, reason) for path, reason in rows]


def test_t15_bad_files_are_replaced_and_listed_once_by_two_ranks(videos, tmp_path):
    reasons = write_broken_files(tmp_path / "bad")
    one_frame = write_video(tmp_path / "bad" / "one_frame.mp4", frames=1)
    paths = [*videos, *(str(tmp_path / "bad" / name) for name in reasons), str(one_frame)]
    manifest = tmp_path / "all.csv"
    manifest.write_text("\n".join(paths) + "\n")
    out = tmp_path / "out"
    flags = pretrain_command(
        "unused",
        out,
        "--epochs",
        "2",
        "--batch_size_per_gpu",
        "2",
        "--max_bad_frac",
        "0.5",
        "--num_workers",
        "1",
    )
    source = flags.index("--data_dirs")
    flags[source : source + 2] = ["--data_csv", str(manifest)]
    run = torchrun("pretrain.py", 2, flags)
    assert run.returncode == 0, run.stderr[-2000:]
    checkpoint = torch.load(out / "run.pth", weights_only=True)
    assert checkpoint["step"] == 8  # no rank skipped an update
    listed = read_listed(out)
    assert sorted(name for name, _ in listed) == sorted(reasons)
    for name, reason in listed:
        assert reasons[name] in reason


def test_t15_a_manifest_without_a_readable_file_is_one_error(tmp_path):
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "b.mp4").write_text("y")
    message = r"no readable file found in .* tries, for example .*not a video"
    with pytest.raises(UserError, match=message) as raised:
        run_pretraining(tmp_path, tmp_path / "out", "--max_bad_frac", "1")
    assert "\n" not in str(raised.value)


def spoil_frames(path: Path, frames: range) -> None:
    """Overwrite the packets of some frames of an MP4 file whose frames are all key frames."""
    content = bytearray(path.read_bytes())
    with PyAVVideo(str(path), None) as video:
        for frame in frames:
            for packet in video.gops.packets(frame):
                content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(content)


def write_spoiled(path: Path) -> Path:
    """Write a video of which every second frame cannot be decoded."""
    write_video(path, frames=40, gop=1, b_frames=0)
    spoil_frames(path, range(1, 40, 2))
    return path


def test_undecodable_frames_are_counted(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", frames=40, gop=1, b_frames=0)
    sample = clip_dataset([str(whole)], repeat_aug=1)[(0, 0)]
    assert (sample["replaced"], sample["damaged"]) == (0, [])
    spoiled = str(write_spoiled(tmp_path / "spoiled.mp4"))
    sample = clip_dataset([spoiled], repeat_aug=1)[(0, 0)]
    assert 0 < sample["replaced"] <= 4
    assert sample["bad"] == []
    reason = f"{sample['replaced']} of 4 frames cannot be decoded"
    assert sample["damaged"] == [(spoiled, reason)]


def test_replaced_frames_are_logged_and_their_file_listed(tmp_path, capsys):
    folder = Path(write_folder(tmp_path / "videos", 7))
    write_spoiled(folder / "spoiled.mp4")
    out = tmp_path / "out"
    run_pretraining(folder, out)
    log = log_records(out)
    for record in log:
        assert record["replaced_frames"] > 0
        assert record["unreadable_videos"] == 0
    [(name, reason)] = read_listed(out)
    assert name == "spoiled.mp4"
    assert "frames cannot be decoded" in reason
    shown = re.findall(r"replaced (\d+)", capsys.readouterr().out)
    assert sum(map(int, shown)) == sum(record["replaced_frames"] for record in log)


@pytest.mark.parametrize(
    "error",
    [KeyError("width"), MemoryError(), RuntimeError("odd\nfile"), ValueError("embedded null byte")],
    ids=lambda error: type(error).__name__,
)
def test_any_error_of_a_library_is_the_fault_of_the_file(tmp_path, monkeypatch, error):
    paths = [str(write_video(tmp_path / f"{number}.mp4", frames=20)) for number in range(3)]

    def open_or_raise(path, *rest):
        if path == paths[1]:
            raise error
        return open_video(path, *rest)

    monkeypatch.setattr(open_videos, "open_video", open_or_raise)
    sample = clip_dataset(paths)[(0, 1)]
    assert sample["path"] in (paths[0], paths[2])
    reason = dict(sample["bad"])[paths[1]]
    assert reason.startswith(type(error).__name__)
    assert "\n" not in reason


def test_an_error_of_the_user_is_not_the_fault_of_a_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("the cure")

    monkeypatch.setattr(open_videos, "open_video", refuse)
    with pytest.raises(UserError):
        clip_dataset([str(write_video(tmp_path / "v.mp4", frames=4))])[(0, 0)]
