"""Paths of a run's files, and files that are written completely or not at all."""

import hashlib
from pathlib import Path

import pytest

from util.files import RunFiles, atomic_write, fsync_path, sha256_of


def test_a_run_has_its_prefix_in_all_file_names():
    files = RunFiles(Path("out"), "a")
    paths = [files.checkpoint, files.best, files.log, files.marker, files.lock]
    names = [str(path) for path in paths]
    assert names == [
        "out/a.pth",
        "out/a_best.pth",
        "out/a_log.txt",
        "out/a.PREEMPTED",
        "out/.a.lock",
    ]


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".csv"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_names_have_temporary_files_of_their_own(tmp_path):
    paths = [tmp_path / (250 * "x" + start + ".csv") for start in "ab"]
    with atomic_write(paths[0]) as one, atomic_write(paths[1]) as other:
        one.write_text("a")
        other.write_text("b")
    assert [path.read_text() for path in paths] == ["a", "b"]
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_before_writing_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), atomic_write(tmp_path / "table.csv"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_cannot_be_flushed(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        fsync_path(path)
    path.write_text("content")
    fsync_path(path)
    fsync_path(tmp_path)


def test_the_hash_is_sha256_over_all_blocks(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 10_000  # three blocks of 1 MiB
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
