"""The video index: it equals what a file itself contains, and stale rows are not used."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_dataset import clip_dataset
from make_videos import write_folder, write_video
from video_matrix import CASES
from video_writer import write_case

from data import decode, video_index
from data.decode import describe
from data.manifest import Samples, find_videos, read_manifest, unlabeled, write_manifest
from data.video import VideoInfo
from data.video_index import READABLE, UNKNOWN, VideoIndex, index_path, load_index
from tools.data_doctor import build_index

VARIABLE_RATE = ("irregular_h264.mp4", "pause_h264.mkv")


@pytest.fixture
def listed(tmp_path):
    """Return a manifest of four videos and a broken file, and its paths."""
    folder = write_folder(tmp_path / "videos", 4)
    (folder / "broken.mp4").write_text("no video")
    return list_folder(tmp_path / "list.csv", folder)


@pytest.fixture
def variable_rate(tmp_path):
    """Return a manifest of one video of constant and two of variable frame rate, and its paths."""
    for case in CASES:
        if case.name in ("h264.mp4", *VARIABLE_RATE):
            write_case(case, tmp_path)
    return list_folder(tmp_path / "list.csv", tmp_path)


def list_folder(manifest: Path, folder: Path) -> tuple[Path, list[str]]:
    """Write a manifest of a folder's videos; return it and its paths."""
    write_manifest(manifest, unlabeled(find_videos([str(folder)], "--data_dirs")))
    return manifest, read_manifest(manifest)[0]


def write_index(manifest: Path, paths: list[str]) -> VideoIndex:
    """Write the index of a manifest and return it as it was written."""
    return build_index(paths, index_path(manifest), workers=1, seconds=30)


def find(paths: list[str], name: str) -> int:
    """Return the index of the path with this file name."""
    return [Path(path).name for path in paths].index(name)


def assert_same_info(info: VideoInfo, expected: VideoInfo) -> None:
    """Assert that all fields are equal, times included."""
    assert info._replace(times=None) == expected._replace(times=None)
    if expected.times is None:
        assert info.times is None
    else:
        assert np.array_equal(info.times, expected.times)
        assert len(info.times) == info.frames


def test_rows_equal_what_the_files_contain(listed):
    manifest, paths = listed
    build_index(paths, index_path(manifest), workers=2, seconds=30)
    index = load_index(manifest, paths)
    assert isinstance(index.rows, np.memmap)
    broken = find(paths, "broken.mp4")
    assert index.info(broken, paths[broken]) is None
    assert "not a video" in index.reason(broken, paths[broken])
    for row, path in enumerate(paths):
        if row != broken:
            assert_same_info(index.info(row, path), describe(path))
            assert index.reason(row, path) is None
    first_fields = describe(paths[1])[:6]
    assert first_fields == (20, 30.0, 96, 64, 0, 10.0)  # key frames 0 and 12 of 20 frames


def test_times_of_videos_of_variable_rate_are_kept(variable_rate, tmp_path):
    manifest, paths = variable_rate
    write_index(manifest, paths)
    reordered = tmp_path / "part.csv"
    video_index.copy_index(manifest, reordered, paths[::-1])
    joined = tmp_path / "joined.csv"
    for path in paths:  # each by a manifest of its own
        write_manifest(Path(f"{path}.csv"), unlabeled([path]))
        write_index(Path(f"{path}.csv"), [path])
    sources = [tmp_path / "without.csv", *(f"{path}.csv" for path in paths)]
    video_index.copy_indices(sources, joined, paths)
    for order, source in ((paths, manifest), (paths[::-1], reordered), (paths, joined)):
        index = load_index(source, order)
        for row, path in enumerate(order):
            info = index.info(row, path)
            assert_same_info(info, describe(path))
            assert (info.times is not None) == (Path(path).name in VARIABLE_RATE)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_samples_are_the_same_with_an_index(listed, monkeypatch, decoder):
    if decoder == "decord" and not decode.decord_installed():
        pytest.skip("decord is not installed")
    manifest, paths = listed
    write_index(manifest, paths)
    index = load_index(manifest, paths)
    without = clip_dataset(paths, decoder=decoder)
    samples = [without[(0, sample)] for sample in range(5)]
    monkeypatch.setattr(decode, "describe", lambda path: pytest.fail(f"{path} was examined again"))
    with_index = clip_dataset(paths, decoder=decoder, known=index)
    for sample, expected in enumerate(samples):
        found = with_index[(0, sample)]
        assert torch.equal(found["clips"], expected["clips"])
        assert [path for path, _ in found["bad"]] == [path for path, _ in expected["bad"]]


def test_an_interrupted_index_is_completed_and_updated(listed):
    manifest, paths = listed
    index = write_index(manifest, paths)
    index.rows["frames"][1] = 1000  # a mark: this row is reused
    index.rows["frames"][2] = 2000  # this one is not, since its file changes
    index.rows["state"][3] = UNKNOWN
    video_index.save_index(index_path(manifest), index)
    write_video(Path(paths[2]), frames=7)
    rows = write_index(manifest, paths).rows
    assert np.array_equal(np.load(index_path(manifest)), rows)
    assert rows["frames"][1:3].tolist() == [1000, 7]
    for row, path in enumerate(paths):
        if row not in (1, find(paths, "broken.mp4")):
            assert rows["frames"][row] == describe(path).frames


def test_an_index_of_other_paths_is_not_used(listed, tmp_path):
    manifest, paths = listed
    write_index(manifest, paths)
    assert load_index(manifest, paths[::-1]) is None
    assert load_index(manifest, paths[1:]) is None
    assert load_index(tmp_path / "other.csv", paths) is None
    assert load_index("", paths) is None


def test_rows_are_copied_to_another_manifest_by_path(listed, tmp_path):
    manifest, paths = listed
    write_index(manifest, paths)
    part = tmp_path / "part.csv"
    video_index.copy_index(manifest, part, paths[3:0:-1])
    copied = load_index(part, paths[3:0:-1])
    assert np.array_equal(copied.rows, load_index(manifest, paths).rows[3:0:-1])


def test_rows_of_changed_files_are_not_copied(listed, tmp_path):
    manifest, paths = listed
    write_index(manifest, paths)
    broken = find(paths, "broken.mp4")
    first, second = [path for path in paths if path != paths[broken]][:2]
    os.utime(first, ns=(0, 0))
    part = tmp_path / "part.csv"
    video_index.copy_index(manifest, part, [first, second])
    assert load_index(part, [first, second]).rows["state"].tolist() == [UNKNOWN, READABLE]


def test_rows_of_changed_files_are_not_used(listed):
    manifest, paths = listed
    write_index(manifest, paths)
    index = load_index(manifest, paths)
    broken = find(paths, "broken.mp4")
    of_same_size, grown = [row for row in range(len(paths)) if row != broken][:2]
    Path(paths[broken]).write_bytes(Path(paths[of_same_size]).read_bytes())
    os.utime(paths[of_same_size], ns=(0, 0))
    write_video(Path(paths[grown]), frames=90)
    assert index.reason(broken, paths[broken]) is None
    assert index.info(of_same_size, paths[of_same_size]) is None
    assert index.info(grown, paths[grown]) is None
    assert clip_dataset(paths, known=index)[(0, broken)]["bad"] == []


def test_rows_without_their_times_are_not_used(variable_rate):
    manifest, paths = variable_rate
    write_index(manifest, paths)
    video_index.times_path(index_path(manifest)).unlink()
    index = load_index(manifest, paths)
    usable = [row for row, path in enumerate(paths) if index.info(row, path)]
    assert usable == [find(paths, "h264.mp4")]


def test_an_index_of_another_version_is_not_used(variable_rate, monkeypatch):
    manifest, paths = variable_rate
    index = write_index(manifest, paths)
    monkeypatch.setattr(video_index, "VERSION", video_index.VERSION + 1)
    assert load_index(manifest, paths) is None
    assert (video_index.new_index(paths, index).rows["state"] == UNKNOWN).all()


def test_times_newer_than_their_rows_are_not_used(variable_rate):
    manifest, paths = variable_rate
    write_index(manifest, paths)
    irregular, pause = (find(paths, name) for name in VARIABLE_RATE)
    newer = video_index.new_index(paths, None)
    info = describe(paths[irregular])
    newer.set_row(irregular, info._replace(frames=5, times=np.array([0, 1.0, 2, 4, 8])))
    newer.set_row(pause, describe(paths[pause]))
    times = newer.all_times()
    np.save(video_index.times_path(index_path(manifest)), times)  # and the rows were never written
    assert load_index(manifest, paths).info(pause, paths[pause]) is None


def test_parts_of_a_video_share_its_row(listed, tmp_path):
    manifest, paths = listed
    whole = write_index(manifest, paths)
    order = [2, 0, 2, 1, 0, 2]
    spans = np.array([[second, second + 1] for second in range(6)], dtype=float)
    samples = Samples([paths[i] for i in order], ["x"] * 6, spans)
    write_manifest(tmp_path / "parts.csv", samples)
    video_index.copy_index(manifest, tmp_path / "parts.csv", samples.paths)
    index = load_index(tmp_path / "parts.csv", samples.paths)
    assert np.array_equal(index.rows, whole.rows[[2, 0, 1]])
    assert np.array_equal(whole.of_files(samples.paths).rows, index.rows)
    dataset = clip_dataset(samples.paths, known=index)
    assert [dataset.paths.files[i] for i in range(6)] == [0, 1, 0, 2, 1, 0]
    broken = find(paths, "broken.mp4")
    assert dataset._unreadable_reason(order.index(broken), paths[broken]) or broken not in order


def test_f06_reasons_that_hold_any_name_are_kept(tmp_path):
    path = str(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    index = video_index.new_index([path], None)
    for reason, kept in (("\udcff\n", "\\udcff\n"), ("x" * 63 + "é", "x" * 63), ("é", "é")):
        index.set_row(0, None, reason)
        assert index.reason(0, path) == kept
