"""Decoder masking: which hidden tokens are predicted, and runs that use it."""

from importlib import import_module

import pytest
import torch
from launch import torchrun
from runs import log_records, pretrain_command, saved_weights
from tiny import clips_and_noise, tiny_mae

import pretrain
from models_mae import (
    DECODER_MASK_TYPES,
    MASK_TYPES,
    choose_predicted,
    index_mask,
    make_mask,
    unused_noise,
)

benchmark = import_module("benchmarks.decoder_masking")
GRID = (4, 4, 4)
TOKENS = 64
HALF = ["--decoder_mask_ratio", "0.5"]
# the rate is constant, since a shorter run has another schedule
CONSTANT = "--batch_size_per_gpu 2 --min_lr 0.001 --max_steps".split()


def predicted_tokens(
    noise: torch.Tensor, mask_type: str, ratio: float, decoder_mask_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks (B, L) of the hidden and of the predicted tokens, with 75 % hidden."""
    visible, hidden = make_mask(noise, GRID, 0.75, mask_type)
    noise = unused_noise(noise, visible, GRID, mask_type)
    predicted = choose_predicted(hidden, noise, GRID, ratio, decoder_mask_type)
    assert (predicted.diff(dim=1) > 0).all()  # in token order
    return index_mask(hidden, TOKENS), index_mask(predicted, TOKENS)


def running_cells(clips: int, grid: tuple[int, int, int], ratio: float) -> torch.Tensor:
    """Return which tokens (B, t', h, w) running cells predict if all tokens are hidden."""
    tokens = grid[0] * grid[1] * grid[2]
    noise = torch.rand(clips, tokens, generator=torch.Generator().manual_seed(0))
    predicted = choose_predicted(torch.arange(tokens).expand(clips, -1), noise, grid, ratio, "cell")
    return index_mask(predicted, tokens).view(clips, *grid)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("decoder_mask_type", DECODER_MASK_TYPES)
def test_every_hidden_token_is_predicted_equally_often(mask_type, decoder_mask_type):
    """Six standard deviations of a share of 10,000 clips are 0.03, or 0.035 of 75 % of them."""
    noise = torch.rand(10_000, TOKENS, generator=torch.Generator().manual_seed(0))
    hidden, predicted = predicted_tokens(noise, mask_type, 0.5, decoder_mask_type)
    assert not (predicted & ~hidden).any()
    assert (predicted.sum(1) == 24).all()  # half of 48, in every clip
    times_hidden = hidden.sum(0)
    times_predicted = predicted.sum(0)
    sometimes = times_hidden > 0
    shares = times_predicted[sometimes] / times_hidden[sometimes]
    assert (shares - 0.5).abs().max() < 0.035


@pytest.mark.parametrize("mask_type", ["random", "tube"])
def test_random_choices_are_independent_of_the_mask_and_each_other(mask_type):
    """Given two hidden tokens, both are predicted with the probability of a random subset."""
    noise = torch.rand(20_000, TOKENS, generator=torch.Generator().manual_seed(1))
    hidden, predicted = predicted_tokens(noise, mask_type, 0.5, "random")
    both_hidden = hidden.float().T @ hidden.float()
    both_predicted = predicted.float().T @ predicted.float()
    pairs = ~torch.eye(TOKENS, dtype=torch.bool)
    shares = (both_predicted / both_hidden)[pairs]
    assert (shares - (24 * 23) / (48 * 47)).abs().max() < 0.03  # six standard deviations


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_running_cells_visit_every_position_equally(ratio):
    chosen = running_cells(200, (8, 4, 6), ratio)
    assert (chosen.sum(1) == 8 * (1 - ratio)).all()  # of each position over time
    cells = chosen.unflatten(2, (2, 2)).unflatten(4, (3, 2))  # (B, t', 2, 2, 3, 2)
    assert (cells.sum(dim=(3, 5)) == 4 * (1 - ratio)).all()  # of each cell
    assert (cells == cells[:, :, :1, :, :1]).all()
    assert (chosen[:, 1:] != chosen[:, :-1]).flatten(2).any(2).all()  # it moves on
    assert torch.equal(chosen[:, 4:], chosen[:, :4])
    first_patterns = chosen[:, 0].flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(first_patterns) == 4 and first_patterns.min() > 25  # of 50


def test_running_cells_keep_any_share_of_odd_grids():
    for grid, ratio in (((3, 3, 5), 0.5), ((2, 7, 7), 0.4), ((1, 1, 3), 0.6)):
        tokens = grid[0] * grid[1] * grid[2]
        assert (running_cells(20, grid, ratio).flatten(1).sum(1) == int(tokens * (1 - ratio))).all()


@pytest.mark.parametrize("decoder_mask_type", DECODER_MASK_TYPES)
def test_a_clip_has_its_tokens_whatever_the_batch(decoder_mask_type):
    model = tiny_mae().eval()
    clips, noise = clips_and_noise(batch=4)
    options = (0.75, "random", noise, 0.5, decoder_mask_type)
    with torch.no_grad():
        _, pred, mask = model(clips, *options)
        for index in range(4):
            part = slice(index, index + 1)
            _, own_pred, own_mask = model(clips[part], 0.75, "random", noise[part], *options[3:])
            assert torch.equal(own_mask, mask[part])
            torch.testing.assert_close(own_pred, pred[part], rtol=1e-4, atol=1e-5)
        _, all_pred, all_hidden = model(clips, *options[:3])
    assert all_pred.shape[1] == 48 and (all_hidden.sum(1) == 48).all()


@pytest.mark.parametrize(
    ("mask_ratio", "ratio", "kind", "named"),
    [
        (0.75, 1.0, "cell", "decoder_mask_ratio 1.0 leaves none of 48"),
        (0.75, -0.1, "random", "decoder_mask_ratio -0.1"),
        (0.1, 0.9, "cell", "decoder_mask_ratio 0.9 leaves none of 7"),
        (0.75, 0.5, "tube", "unknown decoder mask type 'tube'"),
    ],
)
def test_impossible_decoder_masks_are_refused(mask_ratio, ratio, kind, named):
    clips, noise = clips_and_noise()
    with pytest.raises(ValueError, match=named):
        tiny_mae()(clips, mask_ratio, "random", noise, ratio, kind)


@pytest.mark.slow
def test_compiled_it_is_the_same_model():
    plain = tiny_mae()
    compiled = tiny_mae()
    compiled.compile_parts()
    clips, noise = clips_and_noise()
    losses = [model(clips, 0.75, "random", noise, 0.5)[0] for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def six_updates(videos, tmp_path_factory):
    """Return the folder of a run of six updates with decoder masking and a validation loss."""
    out = tmp_path_factory.mktemp("six")
    pretrain.main(pretrain_command(videos, out, *HALF, "--val_dirs", videos, *CONSTANT, "6"))
    return out


def test_a_run_resumes_exactly(videos, six_updates, tmp_path, capsys):
    flags = [*HALF, "--val_dirs", videos, "--num_workers", "2", *CONSTANT]
    pretrain.main(pretrain_command(videos, tmp_path, *flags, "3"))
    pretrain.main(pretrain_command(videos, tmp_path, *flags, "6"))
    weights = saved_weights(tmp_path)
    expected = saved_weights(six_updates)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert log_records(tmp_path)[-1]["val_loss"] == log_records(six_updates)[-1]["val_loss"]
    printed = capsys.readouterr().out
    assert "decoder masking (cell): training decodes and predicts 12 of 24 hidden" in printed


def test_two_processes_with_a_masked_decoder_equal_one(videos, tmp_path):
    # Adam turns the rounding of a tiny gradient into a share of the rate: it must be small
    flags = [*HALF, *"--decoder_mask_type random --epochs 2 --lr 0.0001".split()]
    one = pretrain_command(videos, tmp_path / "one", *flags, "--batch_size_per_gpu", "4")
    two = pretrain_command(videos, tmp_path / "two", *flags, "--batch_size_per_gpu", "2")
    pretrain.main(one)
    run = torchrun("pretrain.py", 2, two)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("decoder masking (random)") == 1  # only rank 0 prints
    weights = saved_weights(tmp_path / "two")
    for name, expected in saved_weights(tmp_path / "one").items():
        if not name.endswith("attn.k.bias"):  # its gradient is rounding alone
            assert (weights[name] - expected).abs().max() <= 1e-6, name


def test_only_the_training_loss_depends_on_the_decoder_mask(videos, tmp_path, capsys):
    """Compare runs whose weights do not change, for their rate is zero."""
    flags = ["--val_dirs", videos, *"--lr 0 --min_lr 0 --epochs 1 --batch_size_per_gpu 4".split()]
    arms = {
        "off": [],
        "without_effect": ["--decoder_mask_type", "random"],
        "cell": HALF,
        "random": [*HALF, "--decoder_mask_type", "random"],
    }
    for name, more in arms.items():
        pretrain.main(pretrain_command(videos, tmp_path / name, *flags, *more))
    records = {name: log_records(tmp_path / name)[-1] for name in arms}
    assert len({record["val_loss"] for record in records.values()}) == 1
    assert records["off"] == records["without_effect"]
    assert len({record["train_loss"] for record in records.values()}) == 3
    note = "note: --decoder_mask_type has no effect without --decoder_mask_ratio."
    assert capsys.readouterr().out.count(note) == 1


@pytest.mark.slow
def test_the_benchmark_compares_equal_updates_and_equal_flops(tmp_path):
    setting = benchmark.Setting(clips=(64, 16, 16), updates=8, labels=2, steps=4, seeds=2)
    threads = torch.get_num_threads()
    results = []
    for _ in range(2):  # the second call finds all runs in the file
        benchmark.measure_learning(setting, tmp_path, tmp_path)
        results.append((tmp_path / "decoder_masking.json").stat().st_mtime_ns)
    torch.set_num_threads(threads)
    assert results[0] == results[1]
    rows = (tmp_path / "decoder_masking.md").read_text().splitlines()[4:7]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [row[1] for row in cells] == ["8", "8", "10"]  # 1.24 times as many
    assert cells[0][6] == "+0.0 (+0.0 to +0.0)"
    assert len({row[4] for row in cells}) == 3  # validation losses
