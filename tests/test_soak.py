"""A small part of the campaign of tests/soak.py: kinds that need no rights, and full disks."""

from pathlib import Path

import pytest
import soak
import torch
from disturbances import KINDS, flipped_bit

from util.checkpoint import CorruptCheckpoint, load

KINDS_HERE = ["kill-rank", "term-twice", "usr1", "flip", "suspend-rank", "full-disk"]


@pytest.mark.slow
def test_a_run_disturbed_six_times_ends_like_an_undisturbed_one(tmp_path):
    kinds = soak.possible_kinds(KINDS_HERE)
    assert soak.campaign("finetuning", kinds, len(KINDS_HERE), 2, tmp_path) == []


def test_disturbances_are_reproducible_and_of_all_kinds():
    drawn = soak.draw_disturbances(list(KINDS), 30, seed=1)
    assert drawn == soak.draw_disturbances(list(KINDS), 30, seed=1)
    assert drawn != soak.draw_disturbances(list(KINDS), 30, seed=2)
    counts = [sum(each.kind == kind for each in drawn) for kind in KINDS]
    assert min(counts) >= 2
    assert max(counts) <= 3
    assert all(KINDS[each.kind].in_starts for each in drawn if each.in_start)


def write_run(folder: Path, weight: float = 1, best: float = 2, loss: float = 3) -> Path:
    """Write what `soak.differences` compares of a run; return its folder."""
    folder.mkdir()
    for name, value in (("run.pth", weight), ("run_best.pth", best)):
        torch.save({"model": {"weight": torch.full((100,), float(value))}}, folder / name)
    (folder / "run_log.txt").write_text(f'{{"train_loss": {loss}}}\n')
    return folder


def test_every_difference_of_two_runs_is_found(tmp_path):
    whole = write_run(tmp_path / "whole")
    assert soak.differences("finetuning", write_run(tmp_path / "same"), whole) == []
    others = {
        "weights, optimizer, EMA or position": {"weight": 1.5},
        "best checkpoint": {"best": 1.5},
        "log": {"loss": 1.5},
    }
    for difference, changes in others.items():
        other = write_run(tmp_path / difference, **changes)
        assert soak.differences("finetuning", other, whole) == [difference]
    (other / "quarantine.csv").write_text("video.mp4,hung\n")
    assert soak.differences("finetuning", other, whole) == ["log", "quarantine.csv"]


@pytest.mark.parametrize("dice", [0, 0.5, 0.999])
def test_a_flipped_bit_is_in_a_tensor(dice, tmp_path):
    path = write_run(tmp_path / "run") / "run.pth"
    data = path.read_bytes()
    path.write_bytes(flipped_bit(data, dice))
    changed = [index for index, byte in enumerate(path.read_bytes()) if byte != data[index]]
    tensor = data.index(torch.ones(100).numpy().tobytes())
    assert len(changed) == 1
    assert tensor <= changed[0] < tensor + 400
    with pytest.raises(CorruptCheckpoint):
        load(path)
