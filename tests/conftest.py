"""Shared fixtures; puts the repository's root and the tests' own modules on the path."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from make_videos import write_folder
from nullgpu import build
from runs import write_images


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> str:
    """Return a folder of eight videos in class_0 and class_1: two updates of 2 x 2 an epoch."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Return a folder of twelve dark and bright images in two classes, one file nested."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory) -> Path:
    """Return the library of the null GPU; skip the test where it cannot be built or used."""
    obstacle = build.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    try:
        return build.build(tmp_path_factory.mktemp("nullgpu"))
    except RuntimeError as error:
        pytest.skip(f"the null GPU cannot be built: {error}")
