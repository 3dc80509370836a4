"""Faults in the data (T15, T16): files that cannot be read, that hang, and that kill the process which reads them."""

import csv
import os
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
from test_pretrain import command, weights

import data.loaders as loaders
import pretrain
from data.index import find_videos
from data.loaders import EpochSampler, Feed, read_quarantine
from util.dist import UserError


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
    return Feed(data, sampler, batch_size=2, num_workers=workers, pin_memory=False, seconds=seconds, quarantine=quarantine)


@pytest.mark.parametrize("fault", ["hang", "kill"])
def test_t16_a_file_that_hangs_or_kills_its_reader_is_set_aside(videos, tmp_path, faulty, fault):
    quarantine, before = tmp_path / "out" / "quarantine.csv", list(feed(dataset(videos), tmp_path / "none"))
    bad = videos[int(before[1]["index"][0])]  # in the second of four batches
    faulty[bad] = fault
    began, data = time.time(), dataset(videos)
    batches = list(feed(data, quarantine))
    assert time.time() - began < 2 + 5 + 10  # the time-out, its grace, and a guard for slow machines
    assert [batch["index"].tolist() for batch in batches] == [batch["index"].tolist() for batch in before]  # each once, in order
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
    flags = ["--epochs", "2", "--batch_size_per_gpu", "2", "--max_bad_frac", "0.2", "--read_timeout", "2"]
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "quarantine.csv").write_text(f"{videos[2]},known\n")
    pretrain.main(command(folder, tmp_path / "known", *flags))
    pretrain.main(command(folder, tmp_path / "hung", *flags, "--num_workers", "2"))
    known, hung = weights(tmp_path / "known"), weights(tmp_path / "hung")
    assert all(torch.equal(known[name], hung[name]) for name in known)
    assert videos[2] in (tmp_path / "hung" / "bad_videos.csv").read_text()
    with pytest.raises(UserError, match="1 files cannot be read, more than --max_bad_frac allows"):
        pretrain.main(command(folder, tmp_path / "strict", "--epochs", "2", "--max_bad_frac", "0.1", "--read_timeout", "2", "--num_workers", "1"))


def test_t16_a_worker_that_dies_of_no_file_is_an_error(videos, tmp_path):
    iterator = iter(feed(dataset(videos * 20), tmp_path / "q.csv"))
    next(iterator)
    import multiprocessing

    time.sleep(0.5)  # both workers have filled their queues and read nothing
    victims = multiprocessing.active_children()
    for child in victims:
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(iterator)
    assert not (tmp_path / "q.csv").exists()


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
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {"empty.mp4": "empty file", "random.mp4": "not a video", "truncated.mp4": "not a video", "folder.mp4": "not a regular file",
            "fifo.mp4": "not a regular file", "audio.mp4": "no video stream", "missing.mp4": "No such file"}  # fmt: skip


def test_t15_damaged_files_are_replaced_and_listed_once_on_two_processes(videos, tmp_path):
    faults = broken_files(tmp_path / "bad")
    single = write_video(tmp_path / "bad" / "single.mp4", frames=1)
    manifest = tmp_path / "all.csv"
    manifest.write_text("\n".join([*videos, *(str(tmp_path / "bad" / name) for name in faults), str(single)]) + "\n")
    flags = command("unused", tmp_path / "out", "--epochs", "2", "--batch_size_per_gpu", "2", "--max_bad_frac", "0.5", "--num_workers", "1")
    place = flags.index("--data_dirs")
    run = torchrun("pretrain.py", 2, [*flags[:place], "--data_csv", str(manifest), *flags[place + 2 :]])
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.load(tmp_path / "out" / "run.pth", weights_only=True)["step"] == 8  # both processes made all updates
    with open(tmp_path / "out" / "bad_videos.csv", newline="") as file:
        listed = [(Path(path).name, reason) for path, reason in list(csv.reader(file))[1:]]
    assert sorted(name for name, _ in listed) == sorted(faults)  # each once; the video of one frame is none of them
    assert all(faults[name] in reason for name, reason in listed)


def test_t15_a_manifest_without_a_readable_file_is_one_error(tmp_path):
    (tmp_path / "a.mp4").write_text("x")
    (tmp_path / "b.mp4").write_text("y")
    with pytest.raises(UserError, match=r"no readable file found in .* tries, for example .*not a video") as raised:
        pretrain.main(command(str(tmp_path), tmp_path / "out", "--epochs", "1", "--batch_size_per_gpu", "1", "--max_bad_frac", "1"))
    assert "\n" not in str(raised.value)
