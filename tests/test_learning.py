"""The learning benchmark's smallest setting: pretraining helps, and what it learned is motion."""

import importlib.util
import statistics

import pytest
import torch
from launch import ROOT


@pytest.mark.slow
def test_pretraining_beats_scratch_and_frames_out_of_order_are_chance(tmp_path):
    """Minutes: real H.264 files, pretraining, finetuning by the scripts themselves; 400 test clips that no choice was made on."""
    spec = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks/learning.py")
    learning = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(learning)
    threads = torch.get_num_threads()
    result = learning.main(
        ["--setting", "small", "--work", str(tmp_path), "--out", str(tmp_path)]
    )  # with one
    torch.set_num_threads(threads)
    arms = (("ordered", "pretrained"), ("ordered", "scratch"), ("shuffled", "pretrained"))
    scores = {
        (*arm, score): learning.test_scores(result["runs"], *arm, 8, score)
        for arm in arms
        for score in ("acc", "pairs")
    }
    assert all(len(values) == 2 for values in scores.values())
    assert min(scores["ordered", "pretrained", "acc"]) > max(scores["ordered", "scratch", "acc"])
    assert min(scores["ordered", "pretrained", "pairs"]) > max(
        scores["ordered", "scratch", "pairs"]
    )
    assert (
        abs(statistics.mean(scores["shuffled", "pretrained", "pairs"]) - 50) < 6
    )  # 800 clips: a deviation of 1.8
    assert (tmp_path / "learning_small.md").read_text().count("|") > 20 and (
        tmp_path / "learning_small.png"
    ).stat().st_size > 2000
