"""The ancestor's numbers: the whole set where STMAE_TEST_DATA points to it, else the small cases kept in tests/golden."""

import json
import os
from pathlib import Path

import numpy as np
import pytest


def golden_path(name: str) -> Path:
    """Where a golden file lies; skips the test if it is not here."""
    places = [Path(__file__).parent / "golden"]
    if "STMAE_TEST_DATA" in os.environ:
        places.insert(0, Path(os.environ["STMAE_TEST_DATA"], "golden"))
    for place in places:
        if (place / name).exists():
            return place / name
    pytest.skip(
        f"{name} is not among the small cases in tests/golden, and STMAE_TEST_DATA is not set"
    )


def golden(name: str):
    """A golden .npz or .json file, opened; skips the test if it is not here."""
    path = golden_path(name)
    return json.loads(path.read_text()) if name.endswith(".json") else np.load(path)
