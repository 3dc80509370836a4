"""Training steps and evaluations read no tensor value on the host, so never wait for the GPU."""

import argparse
import itertools
from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_mae, tiny_vit
from torch import Tensor

import engine_finetune
from engine_finetune import BatchTransform
from engine_pretrain import micro_step
from models_mae import MASK_TYPES
from models_vit import normalize
from util.ema import WeightAverage
from util.evaluation import evaluate, evaluate_heads, mean_features, validation_loss
from util.frozen_features import FrozenEncoder
from util.metrics import MetricSums
from util.optim import (
    finetune_param_groups,
    make_optimizer,
    pretrain_param_groups,
    set_learning_rate,
    update,
)
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.probe_heads import ProbeHeads, probe_param_groups

READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__index__")


def forbid_reads(monkeypatch) -> None:
    """Make Tensor.item and the like raise."""

    def refuse(*_, **__):
        raise AssertionError("the step read a tensor's value")

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with pytest.raises(AssertionError):
        torch.ones(()).item()


def test_pretraining_step(monkeypatch):
    model = tiny_mae()
    groups = pretrain_param_groups(model, 0.05)
    optimizer = make_optimizer(groups, model.parameters(), (0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = {
        "clips": torch.randint(0, 256, (2, 2, 3, 8, 32, 32), dtype=torch.uint8),
        "noise": torch.rand(2, 2, 64),
    }
    forbid_reads(monkeypatch)
    for mask_type, decoder_mask_ratio in itertools.product(MASK_TYPES, (0, 0.5)):
        args = argparse.Namespace(
            mask_ratio=0.75,
            mask_type=mask_type,
            decoder_mask_ratio=decoder_mask_ratio,
            decoder_mask_type="cell",
            accum_iter=1,
        )
        set_learning_rate(optimizer, 1e-3)
        micro_step(model, batch, args, scaler, torch.float32)
        norm, skipped = update(optimizer, scaler, 1.0)
    monkeypatch.undo()
    assert norm.item() > 0 and skipped.item() == 0


def test_finetuning_step(monkeypatch):
    model = tiny_vit().train()
    optimizer = make_optimizer(
        finetune_param_groups(model, 2, 0.05, 0.8), model.parameters(), (0.9, 0.999)
    )
    args = argparse.Namespace(
        mixup=0.0,
        cutmix=0.0,
        mixup_prob=1.0,
        rand_aug=False,
        reprob=0.25,
        remode="pixel",
        recount=1,
        smoothing=0.1,
        accum_iter=1,
    )
    transform = BatchTransform(
        args, model.config | {"mean": (0.45,) * 3, "std": (0.225,) * 3}, still_frames=1
    )
    batch = {
        "clips": torch.randint(0, 256, (2, 2, 3, 8, 32, 32), dtype=torch.uint8),
        "labels": torch.tensor([0, 3]),
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = WeightAverage(model, 0.5)
    sums_of_updates = MetricSums(engine_finetune.METRICS, torch.device("cpu"), max_bad_steps=50)
    forbid_reads(monkeypatch)
    clips, targets = transform(batch)
    sums = engine_finetune.micro_step(model, clips, targets, args, scaler, torch.float32)
    norm, skipped = update(optimizer, scaler, 1.0)
    ema.update(skipped)
    sums_of_updates.add(torch.cat([sums, norm[None]]), skipped, torch.zeros(()), ["a.mp4"])
    monkeypatch.undo()
    assert norm.item() > 0 and skipped.item() == 0


@pytest.mark.parametrize("attentive_pool", [False, True])
def test_step_and_validation_of_a_probe(attentive_pool, monkeypatch):
    model = tiny_vit(attentive_pool=attentive_pool)
    encoder = FrozenEncoder(model.eval(), prepare_clips, 8, torch.float32)
    heads = ProbeHeads(model, 2)
    optimizer = make_optimizer(
        probe_param_groups(heads, [0.1, 0.01], 0.05), heads.parameters(), (0.9, 0.999)
    )
    args = argparse.Namespace(smoothing=0.1, accum_iter=1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    targets = torch.eye(5)[:4]
    forbid_reads(monkeypatch)
    clips = prepare_clips(torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8))
    features = encoder.features(clips)
    engine_finetune.heads_micro_step(heads, features, targets, args, scaler, torch.float32)
    norm, skipped = update(optimizer, scaler, None)
    monkeypatch.undo()
    assert norm.item() > 0 and skipped.item() == 0
    batches = encoder.encode(batches_without_reads(monkeypatch))
    by_head = evaluate_heads(heads, batches, 8, torch.float32)
    assert [scores.labels.tolist() for scores in by_head] == 2 * [3 * [0, 1, 2, 3]]


def prepare_clips(clips: Tensor) -> Tensor:
    """Return normalized clips."""
    return normalize(clips, VIDEO_MEAN, VIDEO_STD)


def batches_without_reads(monkeypatch) -> Iterator[dict]:
    """Yield three batches of four samples; no value may be read until the last one is evaluated."""
    forbid_reads(monkeypatch)
    for first in (0, 4, 8):
        yield {
            "clips": torch.randint(0, 256, (4, 1, 3, 8, 32, 32), dtype=torch.uint8),
            "noise": torch.rand(4, 1, 64),
            "labels": torch.tensor([0, 1, 2, 3]),
            "index": torch.arange(first, first + 4),
            "bad": [],
        }
    monkeypatch.undo()


@pytest.mark.parametrize("mask_type", ["random", "tube", "temporal", "boundary"])
def test_validation_between_batches(mask_type, monkeypatch):
    batches = batches_without_reads(monkeypatch)
    assert validation_loss(tiny_mae(), batches, 0.75, mask_type, torch.float32) > 0


def test_evaluation_between_batches(monkeypatch):
    batches = batches_without_reads(monkeypatch)
    scores = evaluate(tiny_vit(), batches, 8, prepare_clips, torch.float32)
    assert scores.labels.tolist() == 3 * [0, 1, 2, 3]


def test_features_between_batches(monkeypatch):
    features = mean_features(tiny_mae(), batches_without_reads(monkeypatch), torch.float32)
    assert len(features) == 12
