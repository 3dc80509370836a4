"""The names of files that tools write, and the checks before the work begins."""

import os
from pathlib import Path

import pytest

from tools.output_files import check_writable, checkpoint_name, refuse_existing
from util.dist import UserError


def test_files_are_named_after_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path.name
    for path, name in {
        "a/b.pth": "b",
        "a/b.v1.5.pth": "b.v1.5",
        "a/model.v2/": "model.v2",
        "a/b.safetensors": "b",
        ".": here,
        "a/..": here,
        "hf:owner/name-1.5": "name-1.5",
        "hf:owner/name/deep/b.pth": "b",
    }.items():
        assert checkpoint_name(path) == name


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new/deep/out.csv", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file. Choose another --output"):
        check_writable(tmp_path / "file/deep/out.csv", "--output")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write
    with pytest.raises(UserError, match="is read-only. Choose another --output"):
        check_writable(tmp_path / "new/out.csv", "--output")


def test_existing_files_are_replaced_on_request_and_folders_never(tmp_path):
    path = tmp_path / "out.csv"
    refuse_existing(path, False, "--output")
    path.write_text("")
    with pytest.raises(UserError, match="exists. Choose another --output, or pass --overwrite"):
        refuse_existing(path, False, "--output")
    refuse_existing(path, True, "--output")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a folder. Choose another --output"):
            refuse_existing(tmp_path, overwrite, "--output")
