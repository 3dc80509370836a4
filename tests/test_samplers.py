"""Samplers: updates see the same samples on any number of processes."""

import pytest
import torch

from data.samplers import DistributedEvalSampler, EpochSampler
from util.dist import DistEnv, UserError

CPU = torch.device("cpu")


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
    orders = []
    for epoch in range(2):
        first = epoch * sampler.updates_per_epoch
        sampler.set_updates(first, first + sampler.updates_per_epoch)
        orders.append([index for _, index in sampler])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


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
