"""What a run prints while it works: few lines in a file, one that is overwritten on a terminal."""

import re
import sys
import time

import pytest
import torch
from test_finetune import video_command
from test_pretrain import command, videos  # noqa: F401 (a fixture)

import finetune
import pretrain
from util import dist, tracking
from util.tracking import StallClock


def lines_of(printed: str) -> tuple[list[int], list[int]]:
    """Return the updates that progress lines report, and the epochs whose results are printed."""
    updates = [int(number) for number in re.findall(r"^epoch .*update (\d+)/", printed, re.M)]
    return updates, [int(number) for number in re.findall(r"^epoch (\d+): ", printed, re.M)]


def test_short_epochs_print_no_lines_of_their_own(videos, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tracking, "LONG_SECONDS", 1000)
    flags = ["--batch_size_per_gpu", "2", "--epochs", "4", "--log_every", "6", "--val_dirs", videos]
    pretrain.main(command(videos, tmp_path, *flags))  # 4 updates an epoch
    assert lines_of(capsys.readouterr().out) == ([6, 12, 16], [3])


def test_long_epochs_print_a_line_each(videos, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tracking, "LONG_SECONDS", 0)
    flags = [
        "--batch_size_per_gpu",
        "2",
        "--epochs",
        "3",
        "--log_every",
        "100",
        "--val_dirs",
        videos,
    ]
    pretrain.main(command(videos, tmp_path, *flags))
    assert lines_of(capsys.readouterr().out) == ([4, 8, 12], [0, 1, 2])


def test_finetuning_prints_as_few(videos, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tracking, "LONG_SECONDS", 1000)
    flags = [
        "--num_classes",
        "2",
        "--batch_size_per_gpu",
        "4",
        "--epochs",
        "3",
        "--log_every",
        "100",
    ]
    finetune.main(video_command(videos, tmp_path, *flags))
    assert lines_of(capsys.readouterr().out) == ([6], [2])


def test_the_clock_leaves_out_what_is_between_epochs(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StallClock(torch.device("cpu"))

    def spend(seconds: float) -> None:
        now[0] += seconds

    for _ in range(2):
        clock.resume()
        for wait, work in ((1, 3), (0, 4)):
            spend(wait)
            clock.start()
            spend(work)
            clock.stop()
        clock.pause()
        spend(1000)  # a validation
    clock.resume()
    spend(4)
    clock.start()
    assert clock.read() == (pytest.approx(20), pytest.approx(6 / 20))


def test_what_follows_a_progress_line_begins_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    dist.show_progress("1 of 2")
    dist.show_progress("2 of 2")
    dist.print0("done")
    dist.end_progress()
    assert capsys.readouterr().out == "\r\033[K1 of 2\r\033[K2 of 2\ndone\n"
