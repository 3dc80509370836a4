"""Files with any name that the file system allows: trained on, listed, and printed in one line."""

import csv
import os
from pathlib import Path

import pandas as pd
import pytest
from make_videos import write_video
from runs import pretrain_command, video_command

import finetune
import pretrain
from data.manifest import read_manifest
from data.watchdog import add_to_quarantine, read_quarantine
from util.dist import UserError, escaped, print0, run_script

NAMES = ("a\tb", "c\rd", "e\nf", 'g"h', "i,j", "k\x1b[31m", " l ", os.fsdecode(b"m\xff"))
CLASSES = ("x\ny", os.fsdecode(b"z\xfe"))


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """Return a folder of two classes with the same videos, each under a name of NAMES."""
    folder = tmp_path_factory.mktemp("named")
    video = write_video(folder / "source.mp4", frames=12, size=(64, 48), codec="mpeg4", b_frames=0)
    for class_name in CLASSES:
        (folder / class_name).mkdir()
        for name in NAMES:
            os.link(video, folder / class_name / f"{name}.mp4")
    return folder


def test_f06_videos_of_any_name_are_trained_on_and_listed(named, tmp_path, capsys):
    finetune.main(video_command(named, tmp_path, "--epochs", "1", "--batch_size_per_gpu", "8"))
    paths, labels, *_ = read_manifest(tmp_path / "run_train.csv")
    assert sorted(Path(path).stem for path in paths) == sorted(NAMES * 2)
    assert set(labels) == set(CLASSES)
    table = pd.read_csv(tmp_path / "run_predictions.csv", encoding_errors="surrogateescape")
    assert table["path"].tolist() == paths
    assert "\x1b" not in capsys.readouterr().out


def test_f06_unreadable_files_of_any_name_are_listed_in_one_line(named, tmp_path):
    bad = tmp_path / "videos" / os.fsdecode(b"bad\n\xff.mp4")
    bad.parent.mkdir()
    bad.write_bytes(b"no video")
    os.link(named / CLASSES[0] / "i,j.mp4", tmp_path / "videos/good.mp4")
    with pytest.raises(UserError, match="1 files cannot be read"):
        limits = ("--batch_size_per_gpu", "1", "--max_bad_frac", "0.01")
        pretrain.main(pretrain_command(tmp_path / "videos", tmp_path, *limits))
    with open(tmp_path / "bad_videos.csv", errors="surrogateescape", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["path", str(bad)]


def test_f06_files_of_any_name_are_quarantined(tmp_path):
    for name in NAMES:
        add_to_quarantine(tmp_path / "quarantine.csv", name, "hung")
    assert list(read_quarantine(tmp_path / "quarantine.csv")) == list(NAMES)


def test_f06_names_are_printed_in_one_line(capfd):
    print0(*NAMES, "ü", "two\nlines")
    printed = capfd.readouterr().out
    assert printed.count("\n") == 3  # "e\nf" too: tables have several lines
    assert "a\\tb" in printed and "m\\udcff" in printed and "ü" in printed
    assert [escaped(name).isprintable() for name in NAMES] == [True] * len(NAMES)

    def fail():
        raise UserError("".join(NAMES))

    with pytest.raises(SystemExit):
        run_script(fail)
    assert capfd.readouterr().err == f"error: {escaped(''.join(NAMES))}\n"
