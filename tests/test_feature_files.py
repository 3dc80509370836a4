"""Files of features: complete or not there at all, with the settings that made them."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from launch import ROOT, clean_environment

from tools import feature_files
from tools.feature_files import (
    count_clips,
    file_names,
    open_folder,
    write_array,
    write_files,
    write_lists,
)
from util.dist import UserError

SETTINGS = {"checkpoint": "a.pth", "weights": "abc", "layer": 3, "stride_seconds": None}


def open_same(folder, **changes) -> None:
    """Open a folder of features with SETTINGS."""
    open_folder(folder, SETTINGS | changes, ("checkpoint",))


def names_in(folder) -> list[str]:
    """Return the files below a folder."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix == ".npy"
    )


def test_files_are_written_as_numpy_does(tmp_path):
    table = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    write_array(tmp_path / "a.npy", 5, iter(table))
    plain = io.BytesIO()
    np.save(plain, table)
    assert (tmp_path / "a.npy").read_bytes() == plain.getvalue()


def test_a_file_is_there_once_all_its_clips_are(tmp_path):
    targets = {file: tmp_path / f"sub/{file}.npy" for file in range(3)}
    seen = []

    def rows():
        for file, count in ((0, 2), (1, 1), (2, 3)):
            for clip in range(count):
                yield file, np.full(4, 10 * file + clip, np.float32)
                seen.append(names_in(tmp_path))

    write_files(rows(), {0: 2, 1: 2, 2: 3}, targets)  # a clip of file 1 is missing
    assert names_in(tmp_path) == ["sub/0.npy", "sub/2.npy"]
    assert np.load(targets[2])[:, 0].tolist() == [20, 21, 22]
    assert seen[0] == ["sub/0.tmp.npy"]
    assert seen[-1] == ["sub/0.npy", "sub/2.tmp.npy"]


def test_an_interruption_leaves_complete_files_only(tmp_path):
    def rows():
        yield 0, np.zeros(4, np.float32)
        yield 1, np.zeros(4, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files(rows(), {0: 1, 1: 2}, {file: tmp_path / f"{file}.npy" for file in (0, 1)})
    assert names_in(tmp_path) == ["0.npy"]


def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb", buffering=0) as disk:
        message = "/dev/full cannot be written .No space left on device"
        with pytest.raises(UserError, match=message):
            feature_files._write(disk, b"1234")


def test_only_complete_files_of_the_right_shape_count(tmp_path):
    path = tmp_path / "a.npy"
    assert count_clips(path, (4,)) == 0
    np.save(path, np.zeros((3, 4), np.float32))
    assert count_clips(path, (4,)) == 3
    assert count_clips(path, (5,)) == 0
    assert count_clips(path, (1, 4)) == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert count_clips(path, (4,)) == 0
    path.write_bytes(b"")
    assert count_clips(path, (4,)) == 0
    np.save(path, np.zeros((3, 4)))  # float64
    assert count_clips(path, (4,)) == 0


def test_names_are_paths_below_the_folder():
    paths = ["/data/a/x.mp4", "/data/a/x.mkv", "/data/b/c/x.mp4"]
    assert file_names(paths, "/data/") == ["a/x.mp4.npy", "a/x.mkv.npy", "b/c/x.mp4.npy"]
    assert file_names(paths, "") == file_names(paths, "/data")
    assert file_names(paths[:2], "") == ["x.mp4.npy", "x.mkv.npy"]
    assert file_names(["/v.mp4", "/data/v.mp4"], "") == ["v.mp4.npy", "data/v.mp4.npy"]


def test_a_name_that_is_too_long_with_its_ending_is_one_line(tmp_path):
    longest = "/data/" + 247 * "x" + ".mp4"
    assert len(file_names([longest], "/data")[0]) == 255
    with pytest.raises(UserError, match="Rename the video"):
        file_names(["/data/short.mp4", "/data/x" + 247 * "x" + ".mp4"], "/data")


def test_lists_hold_names_that_are_no_text(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.float32))
    name = os.fsdecode(b"/one\xff.mp4")
    assert write_lists(tmp_path, [(name, "a.npy", "")], (4,), {name: "empty file"}) == 1
    for file in ("index.csv", "unreadable.csv"):
        table = pd.read_csv(tmp_path / file, encoding_errors="surrogateescape")
        assert table["path"].tolist() == [name]


def test_a_folder_keeps_its_settings(tmp_path):
    folder = tmp_path / "deep/features"
    open_same(folder)
    assert json.loads((folder / "features.json").read_text()) == SETTINGS
    open_same(folder, checkpoint="moved.pth")
    with pytest.raises(UserError, match=r"layer: 3 there, 2 now; stride_seconds: None there, 0.5"):
        open_same(folder, layer=2, stride_seconds=0.5)
    assert json.loads((folder / "features.json").read_text()) == SETTINGS


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        open_same(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_an_interrupted_start_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "features.tmp.json").write_text("")
    (tmp_path / ".lock").write_text("")
    open_same(tmp_path)
    assert (tmp_path / "features.json").exists()


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_unreadable_settings_are_one_line(text, tmp_path):
    (tmp_path / "features.json").write_text(text)
    with pytest.raises(UserError, match="features.json cannot be read"):
        open_same(tmp_path)


def test_two_processes_do_not_write_one_folder(tmp_path):
    open_same(tmp_path)
    code = (
        f"from tools.feature_files import lock_folder, Path; lock_folder(Path({str(tmp_path)!r}))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert "another process writes" in process.stderr


def test_the_lists_name_what_is_there(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.float32))
    samples = [("/a", "a.npy", "cat"), ("/b", "b.npy", "")]
    assert write_lists(tmp_path, samples, (4,), {"/b": "empty file"}) == 1
    table = pd.read_csv(tmp_path / "index.csv")
    assert table.to_dict("records") == [
        {"path": "/a", "file": "a.npy", "label": "cat", "windows": 3}
    ]
    reasons = pd.read_csv(tmp_path / "unreadable.csv")
    assert reasons.to_dict("records") == [{"path": "/b", "reason": "empty file"}]
    write_lists(tmp_path, samples, (4,), {})
    assert not (tmp_path / "unreadable.csv").exists()
