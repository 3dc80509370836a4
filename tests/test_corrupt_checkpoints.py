"""Checkpoints that are damaged at random: see tests/corrupt_checkpoints.py (T19, fault 9)."""

import corrupt_checkpoints
import pytest
from corrupt_checkpoints import GOOD


@pytest.mark.parametrize(
    ("mutants", "seed"), [(8, 1), pytest.param(30, 2, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_f09_damaged_checkpoints_fool_no_program(mutants, seed, tmp_path):
    outcomes = list(corrupt_checkpoints.campaign(mutants, seed, tmp_path))
    assert [str(each) for each in outcomes if each.outcome not in GOOD] == []
    assert len(outcomes) == mutants * 4
    refused = [each for each in outcomes if each.outcome in ("refused", "fell back")]
    assert len(refused) > len(outcomes) / 2
