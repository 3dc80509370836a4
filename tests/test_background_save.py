"""Checkpoints are written while training continues: same files, no stall, no loss."""

import io
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import check_ranks, run_ranks
from runs import assert_same_run, image_command, log_records, pretrain_command, saved_state
from slow_disk import SlowDisk
from tiny import clips_and_noise, same, tiny_mae

import finetune_on_image
import pretrain
from util import checkpoint, checkpointer
from util.background_save import HostCopy
from util.checkpoint import load
from util.ema import WeightAverage
from util.host_memory import available_memory
from util.logger import RunLogger

TWO_EPOCHS = "--batch_size_per_gpu 2 --epochs 2 --checkpoint_every_steps 2 --keep 9".split()
EVERY_UPDATE = "--batch_size_per_gpu 2 --epochs 1 --checkpoint_every_steps 1 --keep 9".split()
SYNC = "--sync_save"


class TrainedModel:
    """A tiny autoencoder with its optimizer and EMA, and a checkpoint of them."""

    def __init__(self):
        """Do one update, so that there are moments."""
        self.model = tiny_mae()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.ema = WeightAverage(self.model, 0.5)
        self.update()

    def update(self) -> None:
        """Change the weights, the moments and the average in place."""
        clips, noise = clips_and_noise()
        self.model(clips, 0.75, "random", noise)[0].backward()
        self.optimizer.step()
        self.ema.update(torch.zeros(()))

    def contents(self) -> dict:
        """Return what a checkpoint contains: tensors shared by its parts, views, plain data."""
        table = torch.arange(12.0).reshape(3, 4)
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "views": [table, table.T, table[1:, ::2], torch.tensor(1), torch.ones(2).bfloat16()],
            "config": {"mean": (0.45, 0.45), "names": ["a", "b"]},
        }


def file_bytes(contents: dict) -> bytes:
    """Return the file that torch.save writes."""
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def test_a_copy_is_written_as_the_same_bytes_and_stays():
    trained = TrainedModel()
    host_copy = HostCopy()
    for step in (1, 2):
        contents = trained.contents()
        before = file_bytes(contents)
        copied = host_copy.take(contents, step)
        contents["config"]["names"].append("c")
        trained.update()
        assert file_bytes(copied) == before
        assert file_bytes(trained.contents()) != before


def test_copies_use_the_same_memory_again():
    trained = TrainedModel()
    host_copy = HostCopy()
    needed = host_copy.missing_bytes(trained.contents())
    weights = sum(each.numel() * 4 for each in trained.model.parameters())
    assert 4 * weights < needed < 4.1 * weights  # weights, average and two moments
    first = host_copy.take(trained.contents(), 1)["model"]["norm.weight"]
    trained.update()
    assert host_copy.missing_bytes(trained.model.state_dict()) == 0
    second = host_copy.take(trained.contents(), 2)["model"]["norm.weight"]
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, trained.model.norm.weight)
    of_update_2 = second.clone()
    trained.update()
    again = host_copy.take(trained.contents(), 2)["model"]["norm.weight"]
    assert torch.equal(again, of_update_2)  # a file of this copy may be under way


def check_same_files(out: Path, other: Path) -> None:
    """Check that two runs left the same checkpoints and log, flags in the files excepted."""
    names = sorted(path.name for path in out.glob("*.pth"))
    assert names == sorted(path.name for path in other.glob("*.pth"))
    assert all(same(saved_state(out, name), saved_state(other, name)) for name in names)
    assert_same_run(out, other)


def test_updates_during_a_write_do_not_reach_the_file(videos, tmp_path, monkeypatch):
    """The first file of an epoch's end has the metrics, and the second is logged already."""
    flags = [*TWO_EPOCHS, "--ema", "0.9", "--log_every", "3"]
    pretrain.main(pretrain_command(videos, tmp_path / "sync", *flags, SYNC))
    disk = SlowDisk(monkeypatch, total_steps=8)
    pretrain.main(pretrain_command(videos, tmp_path / "late", *flags))
    steps = [2, 4, 4, 6, 8, 8]
    assert [step for _, step, _ in disk.writes] == steps
    assert all(updates_done > step for _, step, updates_done in disk.writes[:4])
    check_same_files(tmp_path / "sync", tmp_path / "late")
    kept = [load(path)["step"] for path in (tmp_path / "late").glob("run*.pth")]
    assert sorted(kept) == steps


def test_best_and_newest_are_written_from_one_copy(images, tmp_path, monkeypatch):
    flags = "--epochs 3 --batch_size_per_gpu 6 --dropout 0 --min_lr 0.001 --ema 0.5".split()
    finetune_on_image.main(image_command(images, tmp_path / "sync", *flags, SYNC))
    disk = SlowDisk(monkeypatch, total_steps=6)
    finetune_on_image.main(image_command(images, tmp_path / "late", *flags))
    (best, best_step, best_done), (newest, newest_step, newest_done) = disk.writes[:2]
    assert (best, best_step, newest, newest_step) == ("run_best.pth", 2, "run.pth", 2)
    assert 2 < best_done <= newest_done
    check_same_files(tmp_path / "sync", tmp_path / "late")


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_head_chosen_after_a_save_is_in_the_next_one(probe, images, tmp_path):
    """The save of an epoch's last update comes before the validation that chooses the head."""
    flags = f"--probe {probe} --epochs 3 --batch_size_per_gpu 2 --checkpoint_every_steps 1".split()
    for name, more in (("background", []), ("foreground", [SYNC])):
        command = image_command(images, tmp_path / name, *flags, *more)
        at = command.index("--lr")  # probes have several
        finetune_on_image.main(command[:at] + command[at + 2 :])
    check_same_files(tmp_path / "background", tmp_path / "foreground")


@pytest.mark.parametrize("sync", [[], [SYNC]], ids=["background", "foreground"])
def test_a_best_checkpoint_that_is_lost_does_not_count(sync, images, tmp_path, monkeypatch):
    """The newest checkpoint, which is written after it, has the accuracy of the file before."""
    flags = "--epochs 2 --batch_size_per_gpu 6 --dropout 0 --min_lr 0.001 --keep 9".split()
    disk = SlowDisk(monkeypatch, total_steps=1 if sync else 4)
    disk.failing = {"run_best.pth"}
    finetune_on_image.main(image_command(images, tmp_path, *flags, *sync))
    first, second = log_records(tmp_path)
    states = [load(tmp_path / name) for name in ("run_previous1.pth", "run.pth", "run_best.pth")]
    assert [state["epoch"] for state in states] == [0, 1, 1]
    assert [state["best_acc1"] for state in states] == [
        -1,
        second["test_acc1"],
        second["test_acc1"],
    ]
    assert "test_acc1" in first


def test_a_failed_write_is_a_warning_after_the_next_update(videos, tmp_path, capsys, monkeypatch):
    """It does not wait for the next save, which comes at update 6."""
    disk = SlowDisk(monkeypatch, total_steps=8)
    disk.failing = {"run.pth"}

    def update_slowly(state, *rest):
        if state.step == 4:
            time.sleep(0.5)  # for the write of update 3, which begins after update 4
        disk.apply_and_notify(state, *rest)

    monkeypatch.setattr("util.train_loop.apply_update", update_slowly)
    flags = "--batch_size_per_gpu 2 --epochs 2 --checkpoint_every_steps 3 --checkpoint_period 9"
    pretrain.main(pretrain_command(videos, tmp_path, *flags.split()))
    printed = capsys.readouterr().out
    warning = f"warning: could not save {tmp_path / 'run.pth'} at update 3 (No space left"
    assert printed.count("warning") == printed.count(warning) == 1
    assert printed.index("update 4/8") < printed.index(warning) < printed.index("update 6/8")
    assert load(tmp_path / "run.pth")["step"] == 8


def test_a_stop_waits_for_the_write_and_saves_its_update(videos, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, total_steps=2)  # the write of update 2 does not wait
    marked = []
    mark_preempted = RunLogger.mark_preempted

    def mark_and_look(self, step):
        marked.append((step, load(self.files.checkpoint)["step"], list(disk.writes)))
        mark_preempted(self, step)

    def stop_in_update(state, *rest):
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        disk.apply_and_notify(state, *rest)

    monkeypatch.setattr(RunLogger, "mark_preempted", mark_and_look)
    monkeypatch.setattr("util.train_loop.apply_update", stop_in_update)
    pretrain.main(pretrain_command(videos, tmp_path, *EVERY_UPDATE))
    assert marked == [(2, 2, [("run.pth", 1, 2), ("run.pth", 2, 2)])]
    assert load(tmp_path / "run_previous1.pth")["step"] == 1


def test_saves_by_the_update_wait_for_a_slow_disk(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpointer, "SLOW_SECONDS", 0)
    disk = SlowDisk(monkeypatch, total_steps=4)
    pretrain.main(pretrain_command(videos, tmp_path, *EVERY_UPDATE))
    assert [step for _, step, _ in disk.writes] == [1, 2, 3, 4, 4]
    notes = re.findall(r"update \d waited 0 s for the checkpoint.*", capsys.readouterr().out)
    assert [note[:8] for note in notes] == ["update 2"]


def test_saves_by_the_minute_come_later_on_a_slow_disk(videos, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, total_steps=8)
    disk.lag = 3
    flags = "--batch_size_per_gpu 2 --epochs 2 --checkpoint_every_minutes 1e-9".split()
    pretrain.main(pretrain_command(videos, tmp_path, *flags, "--checkpoint_period", "9"))
    (_, first_step, first_done), (_, second_step, _) = disk.writes[:2]
    assert first_step == 2
    assert first_done >= 5
    assert second_step >= 5
    assert load(tmp_path / "run.pth")["step"] == 8


def test_the_ranks_meet_while_a_write_takes_long(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer, "WAIT_SECONDS", 0.01)
    meetings = []
    collect = checkpointer.Checkpointer._wait_for_writes
    released = threading.Event()
    original = checkpoint.save

    def wait_and_count(self):
        meetings.append(self.state.step)
        if len(meetings) == 3:
            released.set()
        return collect(self)

    def save_when_released(*arguments):
        assert released.wait(60)
        original(*arguments)

    monkeypatch.setattr(checkpointer.Checkpointer, "_wait_for_writes", wait_and_count)
    monkeypatch.setattr(checkpoint, "save", save_when_released)
    flags = "--max_steps 1 --batch_size_per_gpu 2".split()
    pretrain.main(pretrain_command(videos, tmp_path, *flags))
    assert len(meetings) >= 3
    assert load(tmp_path / "run.pth")["step"] == 1


def test_without_memory_for_a_copy_training_waits(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpointer, "available_memory", lambda: checkpointer.MEMORY_RESERVE)
    disk = SlowDisk(monkeypatch, total_steps=1)  # no write waits for an update
    pretrain.main(pretrain_command(videos, tmp_path, *EVERY_UPDATE))
    assert [(step, done) for _, step, done in disk.writes] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (4, 4),
    ]
    note = r"note: saving in the foreground: .* needs 0.0 GiB of memory besides 1.0 GiB to spare"
    assert len(re.findall(note, capsys.readouterr().out)) == 1


@pytest.mark.slow
def test_t05_a_kill_amid_a_background_write_keeps_the_file_before(videos, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    check_ranks(2, pretrain_command(videos, whole, *EVERY_UPDATE))
    command = pretrain_command(videos, parts, *EVERY_UPDATE)
    run_ranks(2, command, [{"do": "die amid save", "rank": 0, "step": 2}])
    assert (parts / "run.pth.tmp").stat().st_size > 1000
    assert load(parts / "run.pth")["step"] == 1
    check_ranks(2, command)
    assert same(saved_state(parts), saved_state(whole))


@pytest.mark.slow
def test_t13_an_error_in_training_ends_the_write_first(videos, tmp_path):
    faults = [{"do": "save slowly", "seconds": 2}, {"do": "raise", "at": 2}]
    codes, printed = run_ranks(1, pretrain_command(videos, tmp_path, *EVERY_UPDATE), faults)
    assert codes == [1]
    assert "injected: this rank fails" in printed
    assert load(tmp_path / "run.pth")["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


GIB = 2**30


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 8388608 kB\n",
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "1000\n",
                "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 8388608 kB\n",
                "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 7\n",
            },
            GIB + 7,
        ),
    ],
    ids=["unknown", "machine", "control group 2", "control group 1"],
)
def test_available_memory_is_the_least_of_all_limits(files, expected, tmp_path):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory(tmp_path) == expected
