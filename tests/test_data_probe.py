"""The index of a manifest, and the data doctor that makes it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from make_videos import write_folder, write_video
from test_data_loaders import dataset

from data import probe
from data.decode import describe
from data.doctor import build_index
from data.index import find_videos, main, read_manifest, write_manifest
from util.dist import UserError


@pytest.fixture
def listed(tmp_path):
    """A manifest of four videos and a broken file, and its paths."""
    folder = write_folder(tmp_path / "videos", 4)
    (folder / "broken.mp4").write_text("no video")
    manifest = tmp_path / "list.csv"
    write_manifest(manifest, find_videos([str(folder)]))
    return manifest, read_manifest(manifest)[0]


def test_an_index_says_what_a_look_at_each_file_says(listed):
    manifest, paths = listed
    build_index(paths, probe.index_path(manifest), workers=2, seconds=30)
    rows = probe.load(manifest, paths)
    assert isinstance(rows, np.memmap)
    for path, row in zip(paths, rows, strict=True):
        if path.endswith("broken.mp4"):
            assert row["state"] == probe.UNREADABLE and b"not a video" in row["reason"]
        else:
            assert probe.info_of(row, path) == describe(path)
    assert describe(paths[1])[:6] == (20, 30.0, 96, 64, 0, 10.0)  # key frames 0 and 12


def test_samples_are_the_same_with_an_index_and_need_no_second_look(listed, monkeypatch):
    import data.decode as decode

    manifest, paths = listed
    build_index(paths, probe.index_path(manifest), workers=1, seconds=30)
    rows = probe.load(manifest, paths)
    for decoder in ("pyav", "decord") if decode.decord_installed() else ("pyav",):
        plain = [dataset(paths, decoder=decoder)[(0, index)] for index in range(5)]
        monkeypatch.setattr(decode, "describe", lambda path: pytest.fail(f"{path} was looked at again"))
        known = [dataset(paths, decoder=decoder, rows=rows)[(0, index)] for index in range(5)]
        monkeypatch.undo()
        for one, two in zip(plain, known, strict=True):
            assert torch.equal(one["clips"], two["clips"])
            assert [path for path, _ in one["bad"]] == [path for path, _ in two["bad"]]


def test_an_interrupted_index_goes_on_and_a_changed_file_is_looked_at_again(listed):
    manifest, paths = listed
    target = probe.index_path(manifest)
    rows = build_index(paths, None, workers=1, seconds=30)
    rows["frames"][1], rows["frames"][2], rows["state"][3] = 1000, 2000, probe.UNKNOWN  # marks: these rows are taken over, or not
    probe.save(target, rows)
    write_video(Path(paths[2]), frames=7)
    again = build_index(paths, target, workers=1, seconds=30)
    readable = [path for path in paths if not path.endswith("broken.mp4")]
    expected = {path: describe(path).frames for path in readable} | {paths[1]: 1000}
    assert {path: int(row["frames"]) for path, row in zip(paths, again, strict=True) if path in readable} == expected
    assert expected[paths[2]] == 7 and np.array_equal(np.load(target), again)


def test_an_index_of_other_files_is_not_used(listed, tmp_path):
    manifest, paths = listed
    build_index(paths, probe.index_path(manifest), workers=1, seconds=30)
    assert probe.load(manifest, paths[::-1]) is None
    assert probe.load(tmp_path / "other.csv", paths) is None
    probe.carry_over(manifest, tmp_path / "part.csv", paths[3:0:-1])  # another order and fewer files: found by their names
    assert np.array_equal(probe.load(tmp_path / "part.csv", paths[3:0:-1]), probe.load(manifest, paths)[3:0:-1])
    os.utime(paths[0], ns=(0, 0))
    probe.carry_over(manifest, tmp_path / "part.csv", paths[:2])
    assert probe.load(tmp_path / "part.csv", paths[:2])["state"].tolist() == [probe.UNKNOWN, probe.READABLE]
    write_video(Path(paths[1]), frames=9)
    assert probe.info_of(probe.load(manifest, paths)[1], paths[1]) is None  # grown since: to be looked at


def test_the_doctor_says_what_is_there(listed, tmp_path, capsys):
    manifest, paths = listed
    main([str(manifest), "--img_size", "32", "--workers", "1"])
    said = capsys.readouterr().out
    assert "4 of 5 readable" in said and "h264 4" in said and "64 px: 4" in said and "every 9 to 12 frames" in said
    assert "short       4 shorter than 16 frames at stride 4 (2.1 s)" in said  # they have 20 to 32 frames
    assert "broken.mp4: not a video" in said and "no need to re-encode" in said
    table = [line.split() for line in said.splitlines() if line.startswith(("pyav", "decord"))]
    for row in table:
        stages, total, rate = [float(word) for word in row[1:5]], float(row[5]), float(row[6].strip(","))
        assert abs(sum(stages) - total) < 0.3 and abs(1000 / total / rate - 1) < 0.1
    assert probe.load(manifest, paths) is not None
    folders = [str(tmp_path / "videos")]
    main([*folders, "--img_size", "32", "--write", str(tmp_path / "made.csv")])
    assert read_manifest(tmp_path / "made.csv")[0] == paths and probe.load(tmp_path / "made.csv", paths) is not None
    for bad in (["--write", str(tmp_path / "made.csv"), *folders], ["--write", "x.csv", str(manifest)], [str(tmp_path / "nowhere")]):
        with pytest.raises(UserError):
            main(bad)
