"""The log of a run: progress lines, TensorBoard, and writing through a full disk (T06, T20)."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from launch import ROOT, clean_environment, script_command
from make_videos import write_folder
from runs import log_records, pretrain_command, video_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune
import pretrain
from util import dist, logger
from util.files import RunFiles
from util.logger import RunLogger

TWO_UPDATES = "--max_steps 2 --batch_size_per_gpu 4".split()


def printed_progress(printed: str) -> tuple[list[int], list[int]]:
    """Return the updates that have a progress line, and the epochs whose results are printed."""
    updates = re.findall(r"^epoch .*update (\d+)/", printed, re.M)
    epochs = re.findall(r"^epoch (\d+): ", printed, re.M)
    return [int(update) for update in updates], [int(epoch) for epoch in epochs]


def test_short_epochs_print_no_lines_of_their_own(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logger, "LONG_SECONDS", 1000)
    flags = f"--batch_size_per_gpu 2 --epochs 4 --log_every 6 --val_dirs {videos}".split()
    pretrain.main(pretrain_command(videos, tmp_path, *flags))  # 4 updates an epoch
    assert printed_progress(capsys.readouterr().out) == ([6, 12, 16], [3])


def test_long_epochs_print_a_line_each(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logger, "LONG_SECONDS", 0)
    flags = f"--batch_size_per_gpu 2 --epochs 3 --log_every 100 --val_dirs {videos}".split()
    pretrain.main(pretrain_command(videos, tmp_path, *flags))
    assert printed_progress(capsys.readouterr().out) == ([4, 8, 12], [0, 1, 2])


def test_finetuning_prints_as_few_lines(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logger, "LONG_SECONDS", 1000)
    flags = "--batch_size_per_gpu 4 --epochs 3 --log_every 100".split()
    finetune.main(video_command(videos, tmp_path, *flags))
    assert printed_progress(capsys.readouterr().out) == ([6], [2])


def test_what_follows_a_progress_line_begins_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    dist.show_progress("1 of 2")
    dist.show_progress("2 of 2")
    dist.print0("done")
    dist.end_progress()
    assert capsys.readouterr().out == "\r\033[K1 of 2\r\033[K2 of 2\ndone\n"


def test_t20_a_piped_log_has_one_line_per_update(videos, tmp_path):
    command = script_command("pretrain.py", pretrain_command(videos, tmp_path, *TWO_UPDATES))
    done = subprocess.run(command, capture_output=True, env=clean_environment(), timeout=120)
    assert b"\r" not in done.stdout and b"\033" not in done.stdout
    assert done.stdout.count(b"update ") == 2


def read_terminal(reader: int) -> bytes:
    """Return what is written to a terminal until its last process closes it."""
    shown = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:  # closed
            return shown
        if not part:
            return shown
        shown += part


def test_t20_a_terminal_has_one_line_that_is_overwritten(videos, tmp_path):
    command = script_command("pretrain.py", pretrain_command(videos, tmp_path, *TWO_UPDATES))
    reader, terminal = pty.openpty()
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=clean_environment())
    os.close(terminal)
    shown = read_terminal(reader)
    assert process.wait() == 0
    assert shown.count(b"\r\033[Kepoch") == 2


class FullDiskWriter:
    """A TensorBoard writer on a disk without room."""

    def add_scalar(self, *_):
        """Raise the error of a full disk."""
        raise OSError(28, "No space left on device")


def logged_steps(lines: list[str]) -> list[int]:
    """Return the steps of lines of the log."""
    return [json.loads(line)["step"] for line in lines]


def test_t06_log_and_tensorboard_continue_when_there_is_room_again(tmp_path, capsys):
    files = RunFiles(tmp_path, "run")
    run = RunLogger(files)
    run.open({}, step=0)
    run.log_epoch({"epoch": 0, "step": 1, "train_loss": 0.5})
    with open(files.log, "a") as log:
        log.write('{"epoch": 1, "st')  # there was no room for the rest
    run.writer = FullDiskWriter()
    run.log_epoch({"epoch": 2, "step": 3, "train_loss": 0.3})
    warning = "could not write to TensorBoard (No space left on device); the run continues"
    assert warning in capsys.readouterr().out
    run.log_epoch({"epoch": 3, "step": 4, "train_loss": 0.2})
    run.close()
    lines = files.log.read_text().splitlines()
    assert len(lines) == 4
    assert logged_steps([lines[0], *lines[2:]]) == [1, 3, 4]
    events = EventAccumulator(str(tmp_path / "tb/run"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/train_loss")] == [0, 3]
    RunLogger(files).open({}, step=4)
    assert logged_steps(files.log.read_text().splitlines()) == [1, 3, 4]


def documented_tags() -> set[str]:
    """Return the scalars that docs/outputs.md lists, without those written in some runs only."""
    text = (ROOT / "docs/outputs.md").read_text().split("## TensorBoard")[1]
    assert "`recon`" in text
    tags = set(re.findall(r"`((?:train|epoch)/\w+)`", text))
    return tags - {"train/skipped", "train/mfu"}


def test_tensorboard_has_the_documented_tags(videos, tmp_path):
    labeled = tmp_path / "labeled"
    write_folder(labeled / "train", 13)
    write_folder(labeled / "val", 11, size=(64, 64))
    validation = f"--val_dirs {labeled / 'val'} --probe_dir {labeled} --recon_every 1".split()
    pretrain.main(pretrain_command(videos, tmp_path, *validation, *TWO_UPDATES))
    events = EventAccumulator(str(tmp_path / "tb/run"))
    events.Reload()
    tags = documented_tags()
    assert tags == set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["recon"]
    (record,) = log_records(tmp_path)
    logged = {f"epoch/{name}" for name in record if name != "epoch"}
    assert logged == {tag for tag in tags if tag.startswith("epoch/")}
    assert events.Scalars("epoch/val_loss")[0].value == pytest.approx(record["val_loss"])
    assert json.loads((tmp_path / "run_args.json").read_text())["probe_dir"] == str(labeled)
