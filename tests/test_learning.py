"""The learning benchmark's smallest setting: pretraining helps, and it learns motion."""

import importlib.util
import statistics

import pytest
import torch
from launch import ROOT

LABELS_PER_CLASS = 8


@pytest.fixture(scope="module")
def learning():
    """Return the module benchmarks/learning.py; it changes torch's number of threads."""
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks/learning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_pretraining_beats_scratch_and_shuffled_frames_are_chance(learning, tmp_path):
    """Pretrain and finetune with the scripts on real H.264 files, which takes minutes.

    No choice was made on the 400 test clips.
    """
    flags = f"--setting small --work {tmp_path} --out {tmp_path}".split()
    runs = learning.main(flags)["runs"]

    def scores(frames: str, arm: str, score: str) -> list[float]:
        values = learning.test_scores(runs, frames, arm, LABELS_PER_CLASS, score)
        assert len(values) == 2
        return values

    for score in ("acc", "pairs"):
        pretrained = scores("ordered", "pretrained", score)
        scratch = scores("ordered", "scratch", score)
        assert min(pretrained) > max(scratch)
        assert len(scores("shuffled", "pretrained", score)) == 2
    chance = statistics.mean(scores("shuffled", "pretrained", "pairs"))
    assert abs(chance - 50) < 6  # of 800 clips, with a standard deviation of 1.8
    assert (tmp_path / "learning_small.md").read_text().count("|") > 20
    assert (tmp_path / "learning_small.png").stat().st_size > 2000
