"""Samplers: which samples a rank reads, and in what order.

G = batch size x accumulation steps x world size is the number of samples of an update.
"""

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from util.dist import DistEnv, UserError
from util.seeds import ORDER_STREAM, derive_seed


class EpochSampler(Sampler):
    """Yield (epoch, index) for a range of a run's updates.

    The order of an epoch depends on (seed, epoch) alone. Update u of an epoch takes elements u * G
    to (u + 1) * G - 1 of that order, for any world size. An incomplete last update is dropped.

    Attributes:
        batch_size: Samples of a micro-batch on this rank.
        accum_iter: Micro-batches of an update.
        updates_per_epoch: Complete updates in an epoch.
        skip: Number of this rank's first samples to leave out of the next pass.
    """

    def __init__(self, n: int, batch_size: int, accum_iter: int, env: DistEnv, seed: int):
        """Take all updates of the first epoch. Raises UserError if n samples do not fill one."""
        self.n = n
        self.batch_size = batch_size
        self.accum_iter = accum_iter
        self.env = env
        self.seed = seed
        self.rank_samples_per_update = batch_size * accum_iter
        self.samples_per_update = self.rank_samples_per_update * env.world_size
        self.updates_per_epoch = n // self.samples_per_update
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

    def _rank_samples(self, epoch: int) -> list[tuple[int, int]]:
        """Return this rank's samples of an epoch, in order."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, ORDER_STREAM))
        order = torch.randperm(self.n, generator=generator)
        used = order[: self.updates_per_epoch * self.samples_per_update]
        indices = used[self.env.rank :: self.env.world_size]
        return [(epoch, index) for index in indices.tolist()]


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
