"""Two gloo processes: gradients as in one, one all-reduce per update, no gradient copies."""

import json

import pytest
import torch
from launch import torchrun
from tiny import tiny_mae


@pytest.mark.parametrize("accum", [1, 4])
def test_two_processes_sum_once_per_update(accum, tmp_path):
    run = torchrun("tests/ddp_probe.py", 2, [str(accum), str(tmp_path / "grads.pth")])
    assert run.returncode == 0, run.stderr[-2000:]
    if (
        accum == 1
    ):  # DDP warns of gradients with other strides than their parameters: it copies them
        assert "bucket view strides" not in run.stderr
    report = json.loads(run.stdout.strip().splitlines()[-1])
    # one bucket holds the tiny model: one all-reduce per update
    assert report["counts"][0] == 1
    assert report["counts"][-1] == 1
    assert report["inside"]
    assert report["optimize_ddp"] is False
    generator = torch.Generator().manual_seed(3)
    clips = torch.randn(8, 3, 8, 32, 32, generator=generator)
    noise = torch.rand(8, 64, generator=generator)
    model = tiny_mae()
    model(clips, 0.75, noise=noise)[0].backward()
    ours = torch.load(tmp_path / "grads.pth", weights_only=True)
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert (ours[name] - parameter.grad).abs().max() <= 1e-6 * largest, name
