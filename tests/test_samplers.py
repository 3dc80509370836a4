"""Samplers: updates see the same samples on any number of processes."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.samplers import DistributedEvalSampler, EpochSampler, SampleGroups, note_left_over
from util.dist import DistEnv, UserError
from util.seeds import ORDER_STREAM, derive_seed

CPU = torch.device("cpu")
GROUP_OF = np.array([0] * 40 + [1] * 3 + [2] + [0] * 5)  # 45, 3 and 1 of 49 samples
WEIGHTS = np.array([3.0, 2.0, 1.5])


def epochs_of(sampler: EpochSampler, count: int) -> list[list[tuple[int, int]]]:
    """Return what a sampler yields in each of the first epochs."""
    epochs = []
    for epoch in range(count):
        first = epoch * sampler.updates_per_epoch
        sampler.set_updates(first, first + sampler.updates_per_epoch)
        epochs.append(list(sampler))
    return epochs


def grouped(group_of: np.ndarray, weights: np.ndarray, env: DistEnv, batch_size: int):
    """Return a sampler of samples in groups."""
    groups = SampleGroups(group_of, weights)
    return EpochSampler(len(group_of), batch_size, 1, env, seed=3, groups=groups)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accum_iter"),
    [(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)],
)
def test_updates_do_not_depend_on_how_they_are_split(world_size, batch_size, accum_iter):
    one_process = EpochSampler(19, 4, 1, DistEnv(CPU), seed=5)
    one_process.set_updates(8, 12)  # the four updates of epoch 2
    order = [index for _, index in one_process]
    assert len(set(order)) == 16

    samples_of_updates = [set() for _ in range(4)]
    for rank in range(world_size):
        sampler = EpochSampler(19, batch_size, accum_iter, DistEnv(CPU, rank, world_size), seed=5)
        sampler.set_updates(8, 12)
        drawn = list(sampler)
        assert {epoch for epoch, _ in drawn} == {2}
        assert len(drawn) == len(sampler) == 16 // world_size
        per_update = batch_size * accum_iter
        for position, (_, index) in enumerate(drawn):
            samples_of_updates[position // per_update].add(index)
    assert samples_of_updates == [set(order[4 * update : 4 * update + 4]) for update in range(4)]


def test_a_pass_can_start_at_any_update_and_sample():
    sampler = EpochSampler(20, 2, 2, DistEnv(CPU, rank=1, world_size=2), seed=0)
    assert sampler.updates_per_epoch == 2
    sampler.set_updates(6, 8)
    epoch = list(sampler)
    sampler.set_updates(7, 8)
    assert list(sampler) == epoch[4:]
    assert len(sampler) == len(epoch) - 4
    sampler.set_updates(7, 11)
    sampler.skip = 2
    assert list(sampler)[:2] == epoch[6:]
    assert len(sampler) == len(list(sampler)) == 14


def test_epochs_have_different_orders():
    sampler = EpochSampler(20, 2, 2, DistEnv(CPU), seed=0)
    orders = [[index for _, index in epoch] for epoch in epochs_of(sampler, 2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    for epoch, order in enumerate(orders):
        generator = torch.Generator().manual_seed(derive_seed(0, epoch, ORDER_STREAM))
        assert order == torch.randperm(20, generator=generator).tolist()


def test_groups_share_each_epoch_and_are_used_evenly():
    epochs = epochs_of(grouped(GROUP_OF, WEIGHTS, DistEnv(CPU), 4), 20)
    used = Counter()
    for number, epoch in enumerate(epochs, start=1):
        assert len(epoch) == 48  # as without groups
        used.update(epoch)
        for group, share in enumerate(WEIGHTS / WEIGHTS.sum()):
            taken = sum(used[key] for key in used if GROUP_OF[key[1]] == group)
            assert abs(taken - share * 48 * number) < 1
    assert max(used.values()) == 1  # no use of a sample has the draws of another
    for group in range(3):
        members = np.flatnonzero(np.equal(GROUP_OF, group)).tolist()
        stream = [key for epoch in epochs for key in epoch if key[1] in members]
        passes = [
            stream[start : start + len(members)] for start in range(0, len(stream), len(members))
        ]
        for number, each_once in enumerate(passes[:-1]):
            assert sorted(each_once) == [(number, index) for index in members]
    orders = {tuple(index for _, index in epoch if index >= 44) for epoch in epochs}
    assert len(orders) > 10
    assert GROUP_OF[[index for _, index in epochs[0]]].tolist() != sorted(GROUP_OF)


def test_groups_have_one_order_for_any_split_and_start():
    whole = [
        key for epoch in epochs_of(grouped(GROUP_OF, WEIGHTS, DistEnv(CPU), 4), 3) for key in epoch
    ]
    parts = [grouped(GROUP_OF, WEIGHTS, DistEnv(CPU, rank, 2), 2) for rank in range(2)]
    for rank, sampler in enumerate(parts):
        sampler.set_updates(0, 36)
        assert list(sampler) == whole[rank::2]
        sampler.set_updates(17, 36)
        sampler.skip = 1
        assert list(sampler) == whole[rank::2][2 * 17 + 1 :]


def test_equal_weights_use_groups_equally_often_if_there_are_many():
    sampler = grouped(np.arange(13) % 11, np.ones(11), DistEnv(CPU), 6)
    used = Counter()
    for epoch in epochs_of(sampler, 9):
        used.update(index % 11 for _, index in epoch)
        assert len(epoch) == 12
        assert max(used.values()) - min(used.values()) <= 1
    assert used.total() == 9 * 12


def test_fewer_samples_than_an_update_takes_are_an_error():
    with pytest.raises(UserError, match="3 samples are fewer than one update takes, 4 ="):
        EpochSampler(3, 2, 2, DistEnv(CPU), seed=0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_covers_each_sample_once_over_all_ranks(world_size):
    drawn = []
    for rank in range(world_size):
        sampler = DistributedEvalSampler(10, rank, world_size)
        samples = list(sampler)
        assert len(samples) == len(sampler)
        drawn += samples
        sampler.skip = 2
        assert list(sampler) == samples[2:]
        assert len(sampler) == len(samples) - 2
    assert sorted(drawn) == [(0, index) for index in range(10)]


@pytest.mark.parametrize(
    ("samples", "accum_iter", "groups", "expected"),
    [
        (17, 2, None, "note: 1 of 17 samples are left over in each epoch"),
        (15, 2, None, "note: 7 of 15 samples are left over in each epoch"),
        (16, 2, None, ""),
        (17, 2, SampleGroups(np.zeros(17, dtype=np.int64), np.ones(1)), ""),
    ],
)
def test_f20_samples_left_over_are_counted_once(samples, accum_iter, groups, expected, capsys):
    env = DistEnv(torch.device("cpu"), 0, 2)  # an update takes 2 x 2 x 2
    sampler = EpochSampler(
        samples, batch_size=2, accum_iter=accum_iter, env=env, seed=0, groups=groups
    )
    for epoch in range(3):
        sampler.micro_batches(epoch, 0)
    note_left_over(sampler)
    printed = capsys.readouterr().out
    assert printed.startswith(expected)
    assert printed.count("\n") == int(expected != "")
