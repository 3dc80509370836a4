"""The attentive probe of pretraining, against a plain one."""

import pytest
import torch
from plain_probe import PlainPool, trained_plainly
from tiny import tiny_mae

from util import evaluation
from util.attentive_probe import (
    attentive_accuracy,
    features_and_tokens,
    new_head,
    tokens_fit,
)


def test_the_probe_of_pretraining_equals_a_plain_one():
    """One token of 20 holds the class, which their mean hides."""
    train_size = 90
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (train_size + 60,), generator=generator)
    tokens = torch.randn(len(labels), 20, 64, generator=generator)
    places = torch.randint(20, labels.shape, generator=generator)
    tokens[range(len(labels)), places] += 15 * (torch.eye(64)[labels] + torch.eye(64)[9])
    accuracy = attentive_accuracy(tiny_mae(), tokens, labels.tolist(), train_size, torch.float32)
    model = tiny_mae()
    torch.manual_seed(0)
    start = new_head(model, 3)
    batches = [torch.randperm(train_size)[:64] for _ in range(300)]
    plain = trained_plainly(PlainPool(start.pool, start.head), tokens, labels, 1e-3, batches)
    with torch.no_grad():
        correct = plain(tokens[train_size:]).argmax(1) == labels[train_size:]
    assert accuracy == pytest.approx(100 * correct.double().mean().item(), abs=2)
    assert accuracy > 70


def test_tokens_of_the_pretraining_probe_are_normalized_ones(capsys):
    model = tiny_mae()
    clips = torch.randint(0, 256, (11, 1, 3, 8, 32, 32), dtype=torch.uint8)
    index = torch.randperm(11)
    batches = [{"clips": clips[part], "index": part, "bad": []} for part in index.split(9)]
    features, tokens = features_and_tokens(model, batches, 11, torch.float32)
    expected = evaluation.mean_features(model, batches, torch.float32)
    assert torch.equal(features, expected)
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.eval().norm(model.encode(clips[:, 0])))
    assert tokens_fit(model, 500_000, torch.bfloat16)
    assert not tokens_fit(model, 600_000, torch.float32)
    assert "need 9.3 GiB, more than 8" in capsys.readouterr().out
