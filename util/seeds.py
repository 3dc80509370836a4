"""The seeds of all random draws, each a function of where in the run the draw is made.

So neither the number of workers or ranks nor an interruption changes a draw, and checkpoints need
no state of a random generator. A stream is the last of the numbers that a seed is derived from; it
keeps draws at the same position apart.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

MASK_NOISE_STREAM = 1  # training masks
SUBSTITUTE_STREAM = 2  # videos that replace unreadable ones
ORDER_STREAM = 3  # order of the samples of an epoch
DROPOUT_STREAM = 4  # dropout, drop path, MixUp and erasing
VALIDATION_NOISE_STREAM = 5  # masks of the validation loss
GROUP_STREAM = 6  # order of the samples of a class or source


def derive_seed(*values: int) -> int:
    """Return a well-mixed 63-bit seed of several integers, such as (seed, epoch, index, repeat)."""
    # SeedSequence pads with zeros: without the length, (1, 2) and (1, 2, 0) would give one seed.
    sequence = np.random.SeedSequence((len(values), *values))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def fork_rng(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator with `seed`, and restore its state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mask_noise(seeds: Iterable[int], tokens: int) -> Tensor:
    """Return mask noise (n, L) float32, a row for each of n seeds."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(tokens, generator=generator))
    return torch.stack(rows)


def fixed_noise(indices: Iterable[int], tokens: int, draw: int = 0) -> Tensor:
    """Return mask noise (n, L) for the validation of n samples, the same in every run.

    draw: 0 is the validation's own noise; every other number gives another one.
    """
    stream: tuple[int, ...] = (VALIDATION_NOISE_STREAM,)
    if draw > 0:
        stream = (draw, VALIDATION_NOISE_STREAM)
    seeds = [derive_seed(index, *stream) for index in indices]
    return mask_noise(seeds, tokens)
