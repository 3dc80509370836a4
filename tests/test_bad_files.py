"""Files that a run could not read: the limit, and the list in bad_videos.csv."""

import csv

import pytest
import torch

from util.bad_files import BadFiles
from util.dist import UserError


def batch_with(bad=(), damaged=(), clips=True) -> dict:
    """Return a batch with these (path, reason) pairs. clips: whether anything was read."""
    return {
        "clips": torch.zeros(1) if clips else None,
        "bad": list(bad),
        "damaged": list(damaged),
    }


def listed(bad_files: BadFiles) -> list[list[str]]:
    """Return the rows of bad_videos.csv."""
    with open(bad_files.path, newline="") as file:
        return list(csv.reader(file))


def test_as_many_bad_files_as_the_limit_are_accepted(tmp_path):
    bad_files = BadFiles(tmp_path, limit=2)
    bad_files.add_batch(batch_with([("a", "empty"), ("b", "empty")]))
    bad_files.add_batch(batch_with([("a", "empty")]))  # the same file again
    assert bad_files.gather() == 2
    with pytest.raises(UserError, match="^3 files cannot be read, more than --max_bad_frac"):
        bad_files.add_batch(batch_with([("c", "empty")]))


def test_too_many_bad_files_are_one_line_and_a_list(tmp_path):
    bad_files = BadFiles(tmp_path, limit=0)
    with pytest.raises(UserError, match="for example a: no such file; all in") as raised:
        bad_files.add_batch(batch_with([("a", "no such file")]))
    assert "\n" not in str(raised.value)
    assert raised.value.print_on_any_rank
    assert listed(bad_files) == [["path", "reason"], ["a", "no such file"]]


def test_a_batch_without_any_readable_file_is_an_error(tmp_path):
    bad_files = BadFiles(tmp_path, limit=100)
    with pytest.raises(UserError, match="^no readable file found in 2 tries"):
        bad_files.add_batch(batch_with([("a", "empty"), ("b", "empty")], clips=False))
    assert len(listed(bad_files)) == 3


def test_each_file_is_listed_once(tmp_path):
    bad_files = BadFiles(tmp_path, limit=10)
    bad_files.add_batch(batch_with([("b", "empty")], [("a", "3 of 4 frames, replaced")]))
    bad_files.gather()
    bad_files.gather()
    bad_files.add_batch(batch_with([("b", "empty"), ("c", "empty")]))
    assert bad_files.gather() == 2  # damaged files were read
    again = BadFiles(tmp_path, limit=10)  # a resumed run
    again.add_batch(batch_with([("c", "empty")]))
    again.gather()
    rows = [["a", "3 of 4 frames, replaced"], ["b", "empty"], ["c", "empty"]]
    assert listed(bad_files) == [["path", "reason"], *rows]


def test_no_list_is_written_without_bad_files(tmp_path):
    bad_files = BadFiles(tmp_path, limit=0)
    bad_files.add_batch(batch_with())
    assert bad_files.gather() == 0
    assert not bad_files.path.exists()


def test_a_list_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    bad_files = BadFiles(tmp_path / "missing", limit=10)
    bad_files.add_batch(batch_with([("a", "empty")]))
    assert bad_files.gather() == 1
    assert "warning: could not write bad_videos.csv" in capsys.readouterr().out
