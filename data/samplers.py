"""Samplers: which samples a rank reads, and in what order.

G = batch size x accumulation steps x world size is the number of samples of an update. Groups of
samples with weights, such as classes or the sources of a mixture, share the samples of an epoch.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from util.dist import DistEnv, UserError, print0
from util.seeds import GROUP_STREAM, ORDER_STREAM, derive_seed

MIN_BLOCK = 64  # samples that are drawn at once: a group of one sample has a million passes


class SampleGroups(NamedTuple):
    """The groups of n samples. Each has at least one sample."""

    of_sample: np.ndarray  # (n,) index of each sample's group
    weights: np.ndarray  # (number of groups,) positive; a group's share is its part of their sum

    def totals(self, count: int) -> np.ndarray:
        """Return how many of the run's first `count` samples each group has, as integers.

        They are the groups' shares, rounded by the method of largest remainders: the sum is
        `count`, and none is off by a whole sample. Equal remainders are rounded up in order.
        """
        shares = count * (self.weights / self.weights.sum())
        totals = np.floor(shares).astype(np.int64)
        by_remainder = np.argsort(totals - shares, kind="stable")
        totals[by_remainder[: count - totals.sum()]] += 1
        return totals


def class_groups(labels: list[int], balanced: bool) -> SampleGroups | None:
    """Return the classes as groups of equal weight (--balanced) and print a line; or None.

    labels: class index of each sample. Classes without samples are left out.
    """
    if not balanced:
        return None
    classes, of_sample, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    print0(
        f"--balanced: {len(classes)} classes of {sizes.min()} to {sizes.max()} samples, each of "
        f"them {100 / len(classes):.3g} % of an epoch"
    )
    return SampleGroups(of_sample, np.ones(len(classes)))


class GroupOrder:
    """The order of samples that belong to groups: a function of (seed, epoch) alone.

    Each group is an endless stream of passes over its samples. A pass has each of them once, in an
    order of its own. An epoch takes the next samples of each stream, as many as the group's share.
    """

    def __init__(self, groups: SampleGroups, seed: int):
        self.groups = groups
        self.seed = seed
        by_group = torch.from_numpy(np.argsort(groups.of_sample, kind="stable"))
        sizes = np.bincount(groups.of_sample, minlength=len(groups.weights))
        self.members = by_group.split(sizes.tolist())  # indices of each group's samples

    def epoch(self, epoch: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the passes (count,) and indices (count,) of an epoch's samples, in order.

        count: samples of every epoch. generator: draws how the groups alternate.
        """
        begin = self.groups.totals(epoch * count)
        end = self.groups.totals((epoch + 1) * count)
        counts = torch.from_numpy(end - begin)
        taken = [
            self._draw(group, int(begin[group]), int(end[group]))
            for group in counts.nonzero().flatten().tolist()
        ]
        passes = torch.cat([group_passes for group_passes, _ in taken])
        indices = torch.cat([group_indices for _, group_indices in taken])
        group_of_slot = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
        group_of_slot = group_of_slot[torch.randperm(count, generator=generator)]
        slots = group_of_slot.argsort(stable=True)  # by group, those of a group in order
        order = torch.empty_like(slots)
        order[slots] = torch.arange(count)
        return passes[order], indices[order]

    def _draw(self, group: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return passes and indices of elements begin to end - 1 of a group's stream."""
        members = self.members[group]
        size = len(members)
        passes_per_block = max(1, MIN_BLOCK // size)
        block_size = passes_per_block * size
        first_block = begin // block_size
        orders = []
        for block in range(first_block, (end - 1) // block_size + 1):
            seed = derive_seed(self.seed, group, block, 0, GROUP_STREAM)
            generator = torch.Generator().manual_seed(seed)
            if passes_per_block == 1:
                orders.append(torch.randperm(size, generator=generator))
            else:
                keys = torch.rand(passes_per_block, size, generator=generator)
                orders.append(keys.argsort(dim=1, stable=True).flatten())
        offset = first_block * block_size
        order = torch.cat(orders)[begin - offset : end - offset]
        return torch.arange(begin, end) // size, members[order]


class EpochSampler(Sampler):
    """Yield (epoch, index) for a range of a run's updates.

    The order of an epoch depends on (seed, epoch) alone. Update u of an epoch takes elements u * G
    to (u + 1) * G - 1 of that order, for any world size. An incomplete last update is dropped.

    With groups an epoch has as many samples, but the same one may occur several times. The yield is
    (pass, index) then, where pass counts the earlier uses of the sample: no two uses are the same.

    Attributes:
        batch_size: Samples of a micro-batch on this rank.
        accum_iter: Micro-batches of an update.
        updates_per_epoch: Complete updates in an epoch.
        samples_per_epoch: Samples of these updates, over all ranks.
        skip: Number of this rank's first samples to leave out of the next pass.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        accum_iter: int,
        env: DistEnv,
        seed: int,
        groups: SampleGroups | None = None,
    ):
        """Take all updates of the first epoch. Raises UserError if n samples do not fill one."""
        self.n = n
        self.batch_size = batch_size
        self.accum_iter = accum_iter
        self.env = env
        self.seed = seed
        self.group_order = None
        if groups is not None:
            self.group_order = GroupOrder(groups, seed)
        self.rank_samples_per_update = batch_size * accum_iter
        self.samples_per_update = self.rank_samples_per_update * env.world_size
        self.updates_per_epoch = n // self.samples_per_update
        self.samples_per_epoch = self.updates_per_epoch * self.samples_per_update
        self.first_update = 0
        self.end_update = self.updates_per_epoch
        self.skip = 0
        if self.updates_per_epoch == 0:
            raise UserError(
                f"{n} samples are fewer than one update takes, {self.samples_per_update} = "
                f"{batch_size} per process x {accum_iter} accum_iter x {env.world_size} processes: "
                "lower --batch_size_per_gpu or --accum_iter, or add data"
            )

    def set_updates(self, first: int, end: int) -> None:
        """Set the range of the next pass: updates first to end - 1, counted over the run."""
        self.first_update = first
        self.end_update = end

    def __len__(self) -> int:
        num_updates = self.end_update - self.first_update
        return num_updates * self.rank_samples_per_update - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, updates_done = divmod(self.first_update, self.updates_per_epoch)
        start = updates_done * self.rank_samples_per_update + self.skip
        epochs = map(self._rank_samples, itertools.count(epoch))
        samples = itertools.chain.from_iterable(epochs)
        return itertools.islice(samples, start, start + len(self))

    def micro_batches(self, epoch: int, updates_done: int) -> list[list[int]]:
        """Return the indices of this rank's micro-batches in the rest of an epoch."""
        indices = [index for _, index in self._rank_samples(epoch)]
        starts = range(updates_done * self.rank_samples_per_update, len(indices), self.batch_size)
        return [indices[start : start + self.batch_size] for start in starts]

    def _rank_samples(self, epoch: int) -> list[tuple[int, int]]:
        """Return this rank's samples of an epoch, in order."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, ORDER_STREAM))
        ranks_part = slice(self.env.rank, None, self.env.world_size)
        if self.group_order is None:
            order = torch.randperm(self.n, generator=generator)
            indices = order[: self.samples_per_epoch][ranks_part]
            return [(epoch, index) for index in indices.tolist()]
        passes, indices = self.group_order.epoch(epoch, self.samples_per_epoch, generator)
        passes = passes[ranks_part]
        indices = indices[ranks_part]
        return list(zip(passes.tolist(), indices.tolist(), strict=True))


def note_left_over(sampler: EpochSampler) -> None:
    """Print how many samples of an epoch do not fill an update, if there are any.

    Groups have none: their samples are drawn in turn, over the epochs.
    """
    left_over = sampler.n - sampler.samples_per_epoch
    if left_over > 0 and sampler.group_order is None:
        print0(
            f"note: {left_over} of {sampler.n} samples are left over in each epoch, others each "
            f"time: an update takes {sampler.samples_per_update}"
        )


class DistributedEvalSampler(Sampler):
    """Yield (0, index) for every `world_size`-th sample from `rank` on.

    Over all ranks every sample occurs exactly once. skip: as in EpochSampler.
    """

    def __init__(self, n: int, rank: int, world_size: int):
        self.indices = range(rank, n, world_size)
        self.skip = 0

    def __len__(self) -> int:
        return len(self.indices) - self.skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.indices[self.skip :]:
            yield 0, index
