"""FLOP counts of the models against torch's counter, and the count of the published model."""

import pytest
import torch
from tiny import clips_and_noise, tiny_mae, tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from models_mae import MaskedAutoencoderViT
from models_vit import named_size


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pred_t_dim": 4},
        {"cls_embed": False, "sep_pos_embed": False},
        {"mlp_ratio": 2.0},
        {"mlp_ratio": 48 / 11},
    ],
)
@pytest.mark.parametrize(("ratio", "decoder_ratio"), [(0.5, 0.0), (0.9, 0.0), (0.75, 0.5)])
def test_masked_autoencoder_counts_as_torch_does(changes, ratio, decoder_ratio):
    model = tiny_mae(**changes, attn="math")
    clips, noise = clips_and_noise()
    with FlopCounterMode(display=False) as counter:
        model(clips, ratio, "random", noise, decoder_ratio)[0].backward()
    expected = len(clips) * model.flops_per_clip(ratio, "random", decoder_ratio)
    assert counter.get_total_flops() == expected


def test_classifier_counts_as_torch_does():
    model = tiny_vit(attn="math")
    clips, _ = clips_and_noise()
    with FlopCounterMode(display=False) as counter:
        model(clips).sum().backward()
    assert counter.get_total_flops() == len(clips) * model.flops_per_clip()


def published_model(name: str, decoder_depth: int) -> MaskedAutoencoderViT:
    """Return a named model for 16 frames of 224 pixels, without storage."""
    with torch.device("meta"):
        return MaskedAutoencoderViT(
            **named_size(name),
            img_size=224,
            num_frames=16,
            t_patch_size=2,
            decoder_embed_dim=512,
            decoder_depth=decoder_depth,
            decoder_num_heads=16,
            pred_t_dim=16,
        )


def test_published_model():
    model = published_model("mae_vit_huge_patch14", decoder_depth=4)
    assert model.flops_per_clip(0.9, "random") / 1e9 == pytest.approx(1061.1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "decoder_depth", "saved"),
    [
        ("mae_vit_huge_patch14", 4, 1.16),
        ("mae_vit_huge_patch14", 8, 1.28),
        ("mae_vit_large_patch16", 8, 1.42),
    ],
)
def test_flops_that_decoder_masking_saves(name, decoder_depth, saved):
    model = published_model(name, decoder_depth)
    flops = [model.flops_per_clip(0.9, "random", ratio) for ratio in (0, 0.5)]
    assert flops[0] / flops[1] == pytest.approx(saved, abs=0.005)
