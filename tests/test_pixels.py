"""Normalization against its formula, and seeded draws against torch.manual_seed."""

import pytest
import torch

from models_vit import normalize
from util.pixels import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD, denormalize
from util.seeds import derive_seed, fork_rng

SEED = 2**62 + 11


@pytest.mark.parametrize(("mean", "std"), [(VIDEO_MEAN, VIDEO_STD), (IMAGE_MEAN, IMAGE_STD)])
def test_denormalize_inverts_normalize(mean, std):
    clips = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    mean_of_color = torch.tensor(mean).view(3, 1, 1, 1)
    std_of_color = torch.tensor(std).view(3, 1, 1, 1)
    expected = (clips / 255 - mean_of_color) / std_of_color
    normalized = normalize(clips, mean, std)
    torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(denormalize(normalized, mean, std), clips)


def test_seeds_depend_on_each_value_and_their_number():
    seeds = [derive_seed(0, 1), derive_seed(1, 0), derive_seed(0, 1, 0), derive_seed(1)]
    assert len(set(seeds)) == 4


def test_fork_rng_draws_as_manual_seed_and_restores_the_state():
    def draw() -> list[torch.Tensor]:
        return [torch.rand(5), torch.randint(0, 1000, (5,)), torch.randperm(5)]

    torch.manual_seed(SEED)
    expected = draw()
    torch.manual_seed(7)
    torch.rand(3)
    state = torch.get_rng_state()
    with fork_rng(SEED):
        drawn = draw()
    assert all(torch.equal(a, b) for a, b in zip(expected, drawn, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
