"""Faults in the data (T15, T16): files that cannot be read, that hang, and that kill the process which reads them."""

import argparse
import csv
import os
import re
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from launch import torchrun
from make_videos import write_folder, write_video
from test_data_loaders import dataset
from test_pretrain import command, records, weights

import data.loaders as loaders
import pretrain
from data.decode import PyAVVideo, open_video
from data.index import find_videos
from data.loaders import EpochSampler, Feed, ShareSampler, read_quarantine, train_feed
from data.transforms import sample_seed
from util.dist import Place, UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Paths of eight videos."""
    return find_videos([str(write_folder(tmp_path_factory.mktemp("videos"), 8))])


@pytest.fixture
def faulty(monkeypatch):
    """Makes the reading of some files hang or kill its process: a dict {path: "hang" or "kill"} to fill."""
    faults, opened = {}, loaders.open_video

    def open_video(path, *more):
        if faults.get(path) == "hang":
            time.sleep(1000)
        if faults.get(path) == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(path, *more)

    monkeypatch.setattr(loaders, "open_video", open_video)
    return faults


def feed(data, quarantine, workers=2, seconds=2.0) -> Feed:
    """Batches of two."""
    sampler = EpochSampler(len(data), 2, 1, 0, 1, seed=3)
    return Feed(
        data,
        sampler,
        batch_size=2,
        num_workers=workers,
        pin_memory=False,
        seconds=seconds,
        quarantine=quarantine,
    )


@pytest.mark.parametrize("fault", ["hang", "kill"])
def test_t16_a_file_that_hangs_or_kills_its_reader_is_set_aside(videos, tmp_path, faulty, fault):
    quarantine, before = (
        tmp_path / "out" / "quarantine.csv",
        list(feed(dataset(videos), tmp_path / "none")),
    )
    bad = videos[int(before[1]["index"][0])]  # in the second of four batches
    faulty[bad] = fault
    began, data = time.time(), dataset(videos)
    batches = list(feed(data, quarantine))
    assert (
        time.time() - began < 2 + 5 + 10
    )  # the time-out, its grace, and a guard for slow machines
    assert [batch["index"].tolist() for batch in batches] == [
        batch["index"].tolist() for batch in before
    ]  # each once, in order
    said = [(path, reason) for batch in batches for path, reason in batch["bad"]]
    assert {path for path, _ in said} == {bad} and "hung for 2 s or killed" in said[0][1]
    assert list(read_quarantine(quarantine)) == [bad]
    began = time.time()
    again = list(feed(dataset(videos), quarantine))  # another run: nothing is tried any more
    assert time.time() - began < 2 + 10
    for old, one, two in zip(before, batches, again, strict=True):
        assert torch.equal(one["clips"], two["clips"]) and torch.equal(one["noise"], two["noise"])
        for place, index in enumerate(old["index"].tolist()):
            assert torch.equal(old["clips"][place], one["clips"][place]) == (videos[index] != bad)


def test_t16_a_hang_changes_nothing_but_the_file(videos, tmp_path, faulty):
    """A run over a hanging file ends with the weights of a run that knew the file to be bad; afterwards it resumes."""
    folder = str(Path(videos[0]).parent.parent)
    faulty[videos[2]] = "hang"
    flags = [
        "--epochs",
        "2",
        "--batch_size_per_gpu",
        "2",
        "--max_bad_frac",
        "0.2",
        "--read_timeout",
        "2",
    ]
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "quarantine.csv").write_text(f"{videos[2]},known\n")
    pretrain.main(command(folder, tmp_path / "known", *flags))
    pretrain.main(command(folder, tmp_path / "hung", *flags, "--num_workers", "2"))
    known, hung = weights(tmp_path / "known"), weights(tmp_path / "hung")
    assert all(torch.equal(known[name], hung[name]) for name in known)
    assert videos[2] in (tmp_path / "hung" / "bad_videos.csv").read_text()
    with pytest.raises(UserError, match="1 files cannot be read, more than --max_bad_frac allows"):
        pretrain.main(
            command(
                folder,
                tmp_path / "strict",
                "--epochs",
                "2",
                "--max_bad_frac",
                "0.1",
                "--read_timeout",
                "2",
                "--num_workers",
                "1",
            )
        )


def test_t16_a_worker_that_dies_of_no_file_is_an_error(videos, tmp_path):
    import multiprocessing

    data = dataset(videos * 20)
    iterator = iter(feed(data, tmp_path / "q.csv"))
    next(iterator)
    quiet = 0
    while (
        quiet < 10
    ):  # until both workers have filled their queues and read nothing for half a second
        time.sleep(0.05)
        quiet = 0 if data.watch.slots[:, 1].any() else quiet + 1
    victims = multiprocessing.active_children()
    for child in victims:
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(iterator)
    assert not (tmp_path / "q.csv").exists()


def run_feed(data, out, seconds: float = 2.0):
    """The training feed of a run of two epochs in batches of three, on two workers."""
    args = argparse.Namespace(
        batch_size_per_gpu=3,
        accum_iter=1,
        seed=3,
        num_workers=2,
        pin_mem=False,
        read_timeout=seconds,
        output_dir=str(out),
        max_steps=0,
        epochs=2,
    )
    return train_feed(data, args, Place(torch.device("cpu")))[1]


def only_in_the_second_epoch(samples: int, used: int) -> int:
    """A sample that the first epoch leaves out and the second one uses."""
    orders = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(sample_seed(3, epoch, 3))
        orders.append(torch.randperm(samples, generator=generator)[:used].tolist())
    return next(index for index in orders[1] if index not in orders[0])


def check_second_epoch(honest, batches, bad: str, data) -> None:
    """The same order as in an honest run, and the same clips but for those of the bad file."""
    for expected, batch in zip(honest, batches, strict=True):
        assert expected["index"].tolist() == batch["index"].tolist()
        for row, index in enumerate(batch["index"].tolist()):
            same = torch.equal(expected["clips"][row], batch["clips"][row])
            assert same == (data.paths[index] != bad)
    assert {path for batch in batches for path, _ in batch["bad"]} == {bad}


def test_t16_a_file_of_the_next_epoch_that_kills_its_reader(videos, tmp_path, faulty):
    honest = run_feed(dataset(videos), tmp_path / "honest")
    expected = [list(honest(epoch, 0)) for epoch in range(2)]
    data = dataset(videos)
    bad = videos[only_in_the_second_epoch(samples=8, used=6)]
    faulty[bad] = "kill"
    batches = run_feed(data, tmp_path / "faulty")
    for one, two in zip(expected[0], batches(0, 0), strict=True):
        assert torch.equal(one["clips"], two["clips"]) and two["bad"] == []
    check_second_epoch(expected[1], list(batches(1, 0)), bad, data)
    assert list(read_quarantine(tmp_path / "faulty" / "quarantine.csv")) == [bad]


def test_t16_a_reader_that_dies_during_a_validation_is_found_after_it(
    videos, tmp_path, faulty, monkeypatch
):
    honest = run_feed(dataset(videos), tmp_path / "honest")
    expected = [list(honest(epoch, 0)) for epoch in range(2)]
    data, slow = dataset(videos), dataset(videos)
    bad = videos[only_in_the_second_epoch(samples=8, used=6)]
    faulty[bad] = "hang"  # ended after two seconds, when the validation is under way
    batches = run_feed(data, tmp_path / "faulty")
    assert len(list(batches(0, 0))) == 2
    read_clips = slow.read_clips
    monkeypatch.setattr(slow, "read_clips", lambda *key: time.sleep(0.9) or read_clips(*key))
    faulty.pop(bad)  # in this process, from which the workers of the validation are forked
    validation = Feed(
        slow,
        ShareSampler(8, 0, 1),
        batch_size=2,
        num_workers=2,
        pin_memory=False,
        seconds=30,
        quarantine=tmp_path / "validation.csv",
    )
    assert [index for batch in validation for index in batch["index"].tolist()] == list(range(8))
    assert not (tmp_path / "faulty" / "quarantine.csv").exists()
    assert data.watch.victims() == [videos.index(bad)]  # its reader is dead already
    check_second_epoch(expected[1], list(batches(1, 0)), bad, data)
    assert [index for batch in validation for index in batch["index"].tolist()] == list(range(8))


def broken_files(folder: Path) -> dict[str, str]:
    """One file of each kind of damage in a folder: {name: what its reason must say}."""
    whole = write_video(folder / "whole.mp4", frames=40).read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "empty.mp4").touch()
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "empty.mp4": "empty file",
        "random.mp4": "not a video",
        "truncated.mp4": "not a video",
        "folder.mp4": "not a regular file",
        "fifo.mp4": "not a regular file",
        "audio.mp4": "no video stream",
        "missing.mp4": "No such file",
    }


def test_t15_damaged_files_are_replaced_and_listed_once_on_two_processes(videos, tmp_path):
    faults = broken_files(tmp_path / "bad")
    single = write_video(tmp_path / "bad" / "single.mp4", frames=1)
    manifest = tmp_path / "all.csv"
    manifest.write_text(
        "\n".join([*videos, *(str(tmp_path / "bad" / name) for name in faults), str(single)]) + "\n"
    )
    flags = command(
        "unused",
        tmp_path / "out",
        "--epochs",
        "2",
        "--batch_size_per_gpu",
        "2",
        "--max_bad_frac",
        "0.5",
        "--num_workers",
        "1",
    )
    place = flags.index("--data_dirs")
    run = torchrun(
        "pretrain.py", 2, [*flags[:place], "--data_csv", str(manifest), *flags[place + 2 :]]
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (
        torch.load(tmp_path / "out" / "run.pth", weights_only=True)["step"] == 8
    )  # both processes made all updates
    with open(tmp_path / "out" / "bad_videos.csv", newline="") as file:
        listed = [(Path(path).name, reason) for path, reason in list(csv.reader(file))[1:]]
    assert sorted(name for name, _ in listed) == sorted(
        faults
    )  # each once; the video of one frame is none of them
    assert all(faults[name] in reason for name, reason in listed)


def test_t15_a_manifest_without_a_readable_file_is_one_error(tmp_path):
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "b.mp4").write_text("y")
    with pytest.raises(
        UserError, match=r"no readable file found in .* tries, for example .*not a video"
    ) as raised:
        pretrain.main(
            command(
                str(tmp_path),
                tmp_path / "out",
                "--epochs",
                "1",
                "--batch_size_per_gpu",
                "1",
                "--max_bad_frac",
                "1",
            )
        )
    assert "\n" not in str(raised.value)


def spoil(path: Path, frames: range) -> None:
    """Overwrite the packets of some frames of an MP4 file whose every frame is a key frame."""
    data = bytearray(path.read_bytes())
    with PyAVVideo(str(path), None) as video:
        for packet in (packet for group in frames for packet in video.packets.group(group)):
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)


def test_frames_that_cannot_be_decoded_are_counted(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=40, gop=1, b_frames=0)
    whole = dataset([str(path)], repeat_aug=1)[(0, 0)]
    assert whole["replaced"] == 0 and whole["damaged"] == []
    spoil(path, range(1, 40, 2))
    sample = dataset([str(path)], repeat_aug=1)[(0, 0)]
    assert 0 < sample["replaced"] <= 4 and sample["bad"] == []
    assert sample["damaged"] == [(str(path), f"{sample['replaced']} of 4 frames cannot be decoded")]


def test_replaced_frames_stand_in_the_log_and_the_list(tmp_path, capsys):
    folder = Path(write_folder(tmp_path / "videos", 7))
    write_video(folder / "spoiled.mp4", frames=40, gop=1, b_frames=0)
    spoil(folder / "spoiled.mp4", range(1, 40, 2))
    pretrain.main(
        command(str(folder), tmp_path / "out", "--batch_size_per_gpu", "2", "--epochs", "2")
    )
    log = records(tmp_path / "out")
    assert all(record["replaced_frames"] > 0 and record["unreadable_videos"] == 0 for record in log)
    listed = (tmp_path / "out/bad_videos.csv").read_text().splitlines()
    assert (
        listed[0] == "path,reason"
        and len(listed) == 2
        and "spoiled.mp4" in listed[1]
        and "frames cannot be decoded" in listed[1]
    )
    shown = [int(number) for number in re.findall(r"replaced (\d+)", capsys.readouterr().out)]
    assert sum(shown) == sum(record["replaced_frames"] for record in log)


@pytest.mark.parametrize(
    "error",
    [KeyError("width"), MemoryError(), RuntimeError("odd\nfile"), ValueError("embedded null byte")],
)
def test_any_error_of_a_library_is_the_fault_of_the_file(tmp_path, monkeypatch, error):
    paths = [str(write_video(tmp_path / f"{number}.mp4", frames=20)) for number in range(3)]

    def opened(path, *rest):
        if path == paths[1]:
            raise error
        return open_video(path, *rest)

    monkeypatch.setattr(loaders, "open_video", opened)
    sample = dataset(paths)[(0, 1)]
    assert sample["path"] in (paths[0], paths[2])
    reason = dict(sample["bad"])[paths[1]]
    assert reason.startswith(type(error).__name__) and "\n" not in reason


def test_an_error_of_the_user_is_not_taken_for_one_of_a_file(tmp_path, monkeypatch):
    def opened(*_):
        raise UserError("the cure")

    monkeypatch.setattr(loaders, "open_video", opened)
    with pytest.raises(UserError):
        dataset([str(write_video(tmp_path / "v.mp4", frames=4))])[(0, 0)]
