"""Reference values of the ancestor.

STMAE_TEST_DATA names a folder with all cases; without it only the small ones in tests/golden exist.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest


def golden_path(name: str) -> Path:
    """Return the path of a golden file; skip the test if there is none."""
    folders = [Path(__file__).parent / "golden"]
    if "STMAE_TEST_DATA" in os.environ:
        folders.insert(0, Path(os.environ["STMAE_TEST_DATA"], "golden"))
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in tests/golden. Set STMAE_TEST_DATA to a folder that has it.")


def golden(name: str):
    """Load a golden .npz or .json file; skip the test if there is none."""
    path = golden_path(name)
    if name.endswith(".json"):
        return json.loads(path.read_text())
    return np.load(path)
