"""The index of a manifest, and the data doctor that makes it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from make_videos import write_folder, write_video
from test_data_loaders import dataset
from video_matrix import CASES
from video_writer import write_case

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
    index = probe.load(manifest, paths)
    assert isinstance(index.rows, np.memmap)
    for place, path in enumerate(paths):
        if path.endswith("broken.mp4"):
            assert index.info(place, path) is None and "not a video" in index.reason(place, path)
        else:
            assert index.info(place, path) == describe(path) and index.reason(place, path) is None
    assert describe(paths[1])[:6] == (20, 30.0, 96, 64, 0, 10.0)  # key frames 0 and 12


def test_samples_are_the_same_with_an_index_and_need_no_second_look(listed, monkeypatch):
    import data.decode as decode

    manifest, paths = listed
    build_index(paths, probe.index_path(manifest), workers=1, seconds=30)
    index_read = probe.load(manifest, paths)
    for decoder in ("pyav", "decord") if decode.decord_installed() else ("pyav",):
        plain = [dataset(paths, decoder=decoder)[(0, index)] for index in range(5)]
        monkeypatch.setattr(
            decode, "describe", lambda path: pytest.fail(f"{path} was looked at again")
        )
        known = [
            dataset(paths, decoder=decoder, known=index_read)[(0, index)] for index in range(5)
        ]
        monkeypatch.undo()
        for one, two in zip(plain, known, strict=True):
            assert torch.equal(one["clips"], two["clips"])
            assert [path for path, _ in one["bad"]] == [path for path, _ in two["bad"]]


def test_an_interrupted_index_goes_on_and_a_changed_file_is_looked_at_again(listed):
    manifest, paths = listed
    target = probe.index_path(manifest)
    index = build_index(paths, None, workers=1, seconds=30)
    rows = index.rows
    rows["frames"][1], rows["frames"][2], rows["state"][3] = (
        1000,
        2000,
        probe.UNKNOWN,
    )  # marks: these rows are taken over, or not
    probe.save(target, index)
    write_video(Path(paths[2]), frames=7)
    again = build_index(paths, target, workers=1, seconds=30).rows
    readable = [path for path in paths if not path.endswith("broken.mp4")]
    expected = {path: describe(path).frames for path in readable} | {paths[1]: 1000}
    assert {
        path: int(row["frames"]) for path, row in zip(paths, again, strict=True) if path in readable
    } == expected
    assert expected[paths[2]] == 7 and np.array_equal(np.load(target), again)


def test_an_index_of_other_files_is_not_used(listed, tmp_path):
    manifest, paths = listed
    build_index(paths, probe.index_path(manifest), workers=1, seconds=30)
    assert probe.load(manifest, paths[::-1]) is None
    assert probe.load(tmp_path / "other.csv", paths) is None
    probe.carry_over(
        manifest, tmp_path / "part.csv", paths[3:0:-1]
    )  # another order and fewer files: found by their names
    assert np.array_equal(
        probe.load(tmp_path / "part.csv", paths[3:0:-1]).rows,
        probe.load(manifest, paths).rows[3:0:-1],
    )
    os.utime(paths[0], ns=(0, 0))
    probe.carry_over(manifest, tmp_path / "part.csv", paths[:2])
    assert probe.load(tmp_path / "part.csv", paths[:2]).rows["state"].tolist() == [
        probe.UNKNOWN,
        probe.READABLE,
    ]
    write_video(Path(paths[1]), frames=9)
    assert probe.load(manifest, paths).info(1, paths[1]) is None  # grown since: to be looked at


def test_the_doctor_says_what_is_there(listed, tmp_path, capsys):
    manifest, paths = listed
    main([str(manifest), "--img_size", "32", "--workers", "1"])
    said = capsys.readouterr().out
    assert (
        "4 of 5 readable" in said
        and "h264 4" in said
        and "64 px: 4" in said
        and "every 9 to 12 frames" in said
    )
    assert (
        "short       4 shorter than 16 frames at stride 4 (2.1 s)" in said
    )  # they have 20 to 32 frames
    assert "broken.mp4: not a video" in said and "no need to re-encode" in said
    table = [line.split() for line in said.splitlines() if line.startswith(("pyav", "decord"))]
    for row in table:
        stages, total, rate = (
            [float(word) for word in row[1:5]],
            float(row[5]),
            float(row[6].strip(",")),
        )
        assert abs(sum(stages) - total) < 0.3 and abs(1000 / total / rate - 1) < 0.1
    assert probe.load(manifest, paths) is not None
    folders = [str(tmp_path / "videos")]
    main([*folders, "--img_size", "32", "--write", str(tmp_path / "made.csv")])
    assert (
        read_manifest(tmp_path / "made.csv")[0] == paths
        and probe.load(tmp_path / "made.csv", paths) is not None
    )
    for bad in (
        ["--write", str(tmp_path / "made.csv"), *folders],
        ["--write", "x.csv", str(manifest)],
        [str(tmp_path / "nowhere")],
    ):
        with pytest.raises(UserError):
            main(bad)


@pytest.fixture
def unsteady(tmp_path):
    """A manifest of a steady video and two of changing rate, and its paths."""
    for name in ("h264.mp4", "irregular_h264.mp4", "pause_h264.mkv"):
        write_case(next(case for case in CASES if case.name == name), tmp_path)
    manifest = tmp_path / "list.csv"
    write_manifest(manifest, find_videos([str(tmp_path)]))
    return manifest, read_manifest(manifest)[0]


def test_times_of_unsteady_videos_are_kept(unsteady, tmp_path):
    manifest, paths = unsteady
    build_index(paths, probe.index_path(manifest), workers=1, seconds=30)
    probe.carry_over(manifest, tmp_path / "part.csv", paths[::-1])
    for order, source in ((paths, manifest), (paths[::-1], tmp_path / "part.csv")):
        index = probe.load(source, order)
        for place, path in enumerate(order):
            found, looked = index.info(place, path), describe(path)
            assert found._replace(times=None) == looked._replace(times=None)
            assert (found.times is None) == ("/h264" in path) == (looked.times is None)
            if looked.times is not None:
                assert (
                    np.array_equal(found.times, looked.times) and len(found.times) == found.frames
                )


def test_an_index_without_its_times_or_of_another_version_is_not_believed(unsteady, monkeypatch):
    manifest, paths = unsteady
    target = probe.index_path(manifest)
    build_index(paths, target, workers=1, seconds=30)
    steady = [place for place, path in enumerate(paths) if "/h264" in path]
    probe.times_path(target).unlink()
    index = probe.load(manifest, paths)
    assert [place for place in range(3) if index.info(place, paths[place])] == steady
    monkeypatch.setattr(probe, "VERSION", probe.VERSION + 1)
    assert probe.load(manifest, paths) is None
    assert (probe.start(paths, index).rows["state"] == probe.UNKNOWN).all()


def test_the_doctor_counts_unsteady_videos(unsteady, capsys):
    manifest, _ = unsteady
    main([str(manifest), "--img_size", "32", "--workers", "1"])
    assert "unsteady    2 of changing rate" in capsys.readouterr().out


def test_rows_of_files_that_have_changed_are_not_believed(listed):
    manifest, paths = listed
    build_index(paths, probe.index_path(manifest), workers=1, seconds=30)
    index = probe.load(manifest, paths)
    broken = next(place for place, path in enumerate(paths) if path.endswith("broken.mp4"))
    readable = (broken + 1) % len(paths)
    Path(paths[broken]).write_bytes(Path(paths[readable]).read_bytes())
    os.utime(paths[readable], ns=(0, 0))  # as large as before
    assert index.reason(broken, paths[broken]) is None
    assert index.info(readable, paths[readable]) is None
    assert dataset(paths, known=index)[(0, broken)]["bad"] == []


def test_an_index_whose_writing_was_interrupted_is_not_believed(unsteady, monkeypatch):
    manifest, paths = unsteady
    target = probe.index_path(manifest)
    index = build_index(paths, target, workers=1, seconds=30)
    first = next(place for place, path in enumerate(paths) if "irregular" in path)
    other = next(place for place, path in enumerate(paths) if "pause" in path)
    fewer = describe(paths[first])._replace(frames=5, times=np.array([0, 1.0, 2, 4, 8]))
    changed = probe.start(paths, index)
    changed.rows["state"][:] = probe.UNKNOWN
    changed = probe.VideoIndex(changed.rows, np.zeros(0))
    changed.fill(first, fewer)
    changed.fill(other, describe(paths[other]))
    probe._write(probe.times_path(target), changed.all_times())  # and then the power fails
    assert probe.load(manifest, paths).info(other, paths[other]) is None
