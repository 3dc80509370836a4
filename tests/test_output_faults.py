"""Folders that cannot be written, that vanish during a run, or whose lists hold garbage (F08)."""

import builtins
import errno
import shutil
import subprocess
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from launch import script_command, torchrun
from make_videos import write_folder
from runs import log_records, pretrain_command, saved_state, video_command
from tiny import same

import finetune
import pretrain
from util import dist, train_loop
from util.files import RunFiles, append_rows, read_rows
from util.logger import RunLogger, report_thread_error

TWO_UPDATES = "--batch_size_per_gpu 4 --max_steps 2 --log_every 1".split()
FULL = "cannot be used (No space left on device). Make room, or give another path."


def error_line(main, flags: list[str], capsys) -> str:
    """Return the only line on stderr of a script that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        dist.run_script(lambda: main(flags))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def fill_disk(path: Path) -> None:
    """Let writing of `path` fail as on a full disk: its temporary file is a device without room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.stem}.tmp{path.suffix}").symlink_to("/dev/full")


@pytest.mark.parametrize("name", ["run_train.csv", "run_val.csv", "run_classes.json"])
def test_f08_a_full_disk_at_the_start_is_one_line(name, videos, tmp_path, capsys):
    commands = {finetune.main: video_command(videos, tmp_path, *TWO_UPDATES)}
    if name != "run_classes.json":
        more = ["--val_dirs", videos, *TWO_UPDATES]
        commands[pretrain.main] = pretrain_command(videos, tmp_path, *more)
    for main, command in commands.items():
        fill_disk(tmp_path / name)
        assert error_line(main, command, capsys) == f"error: {tmp_path / name} {FULL}"


def test_f08_a_full_disk_ends_both_ranks(videos, tmp_path):
    fill_disk(tmp_path / "run_train.csv")
    failed = torchrun("pretrain.py", 2, pretrain_command(videos, tmp_path, *TWO_UPDATES))
    assert failed.returncode != 0
    assert failed.stderr.count(FULL) == 1
    assert 'pretrain.py", line' not in failed.stderr  # of a traceback that is not torchrun's own


def test_f08_a_read_only_folder_is_one_line(videos, tmp_path, capsys, monkeypatch):
    real_open = builtins.open

    def open_to_read(path, mode="r", *rest, **options):
        if mode != "r" and mode != "rb" and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, mode, *rest, **options)

    monkeypatch.setattr(builtins, "open", open_to_read)
    command = pretrain_command(videos, tmp_path, *TWO_UPDATES)
    line = error_line(pretrain.main, command, capsys)
    assert line.startswith(f"error: {tmp_path}/.run.lock cannot be used (Read-only file system).")
    monkeypatch.undo()
    (tmp_path / "file").touch()
    lists = tmp_path / "file" / "lists"
    line = error_line(pretrain.main, [*command, "--datafile_dir", str(lists)], capsys)
    assert line.startswith(f"error: {lists} cannot be used (Not a directory). Check the path")


def replace_folder(folder: Path, by: str) -> None:
    """Remove a folder; by "file", put a file in its place."""
    shutil.rmtree(folder)
    if by == "file":
        folder.write_text("not a folder")


@pytest.mark.parametrize("by", ["nothing", "file"])
def test_f08_a_run_survives_the_loss_of_its_folder(by, videos, tmp_path, capfd, monkeypatch):
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    flags = [*TWO_UPDATES, "--recon_every", "1", "--val_dirs", videos]
    pretrain.main(pretrain_command(videos, whole, *flags))
    finish_update = train_loop.finish_update

    def lose_folder(checkpointer, *rest):
        if checkpointer.state.step == 0:
            replace_folder(out, by)
        finish_update(checkpointer, *rest)

    monkeypatch.setattr(train_loop, "finish_update", lose_folder)
    command = pretrain_command(videos, out, *flags, "--datafile_dir", str(tmp_path))
    if by == "file":
        line = error_line(pretrain.main, command, capfd)
        assert f"make room in {out}, which must be a folder" in line
        return
    pretrain.main(command)
    assert same(saved_state(out), saved_state(whole))
    assert log_records(out) == log_records(whole)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "garbage",
    [np.random.default_rng(0).bytes(4000), b"x" * 200_000, b"a.mp4,hung\nonly one fie"],
    ids=["random", "a long line", "torn"],
)
def test_f08_garbage_in_lists_of_files_is_a_warning(garbage, tmp_path, capsys):
    folder = write_folder(tmp_path / "videos", 8)
    (folder / "class_0/text.mp4").write_text("no video")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("bad_videos.csv", "quarantine.csv"):
        (out / name).write_bytes(garbage)
    pretrain.main(pretrain_command(folder, out, *TWO_UPDATES, "--max_bad_frac", "0.5"))
    printed = capsys.readouterr().out
    assert printed.count(f"warning: {out / 'quarantine.csv'} is damaged") == 1
    assert printed.count(f"warning: {out / 'bad_videos.csv'} is damaged") <= 1
    assert log_records(out)[-1]["step"] == 2


def test_f08_rows_after_a_torn_line_are_kept(tmp_path):
    path = tmp_path / "quarantine.csv"
    append_rows(path, [("a.mp4", "hung")])
    with open(path, "a") as file:
        file.write("b.m")
    append_rows(path, [("c.mp4", "hung")])
    rows, problem = read_rows(path)
    assert rows == [["a.mp4", "hung"], ["c.mp4", "hung"]]
    assert problem == "lines that are not path,reason: 1"
    path.unlink()
    assert read_rows(path) == ([], "")
    path.mkdir()
    assert "Is a directory" in read_rows(path)[1]


def test_f08_a_full_disk_below_stdout_costs_lines_only(videos, tmp_path):
    """Its log is on the disk: printing must not end the run, nor its exit."""
    command = script_command("pretrain.py", pretrain_command(videos, tmp_path, *TWO_UPDATES))
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert saved_state(tmp_path)["step"] == 2


def test_f08_an_error_on_a_full_disk_keeps_its_exit_code(tmp_path):
    command = script_command("pretrain.py", ["--data_dirs", str(tmp_path / "absent")])
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=full, timeout=100, cwd=tmp_path)
    assert ended.returncode == 2


def test_f08_a_log_that_is_no_text_loses_its_odd_lines(videos, tmp_path):
    pretrain.main(pretrain_command(videos, tmp_path, *TWO_UPDATES))
    with open(tmp_path / "run_log.txt", "ab") as log:
        log.write(b"\xe9\x00\n")
    more = "--batch_size_per_gpu 4 --max_steps 4 --log_every 1".split()
    pretrain.main(pretrain_command(videos, tmp_path, *more))
    assert [record["step"] for record in log_records(tmp_path)][-1] == 4


def test_f08_a_failure_of_tensorboard_is_one_warning(tmp_path, capsys, monkeypatch):
    """However many lines cannot be written, until one can."""
    logger = RunLogger(RunFiles(tmp_path, "run"))
    logger.open({})
    full = OSError(errno.ENOSPC, "No space left on device")
    broken = Mock(add_scalar=Mock(side_effect=full))
    for writer in (broken, broken, Mock(), broken):
        monkeypatch.setattr(logger, "_take_writer", lambda writer=writer: writer)
        with logger.warn_on_oserror("to TensorBoard"):
            logger._take_writer().add_scalar("loss", 1.0, 1)
    assert capsys.readouterr().out.count("could not write to TensorBoard") == 2


def test_f08_a_thread_of_tensorboard_prints_no_traceback(capfd):
    class Writer(threading.Thread):
        def run(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    previous = threading.excepthook
    threading.excepthook = report_thread_error
    try:
        for module in ("tensorboard.summary.writer.event_file_writer", "another"):
            Writer.__module__ = module
            thread = Writer()
            thread.start()
            thread.join()
    finally:
        threading.excepthook = previous
    assert capfd.readouterr().err.count("Traceback") == 1
