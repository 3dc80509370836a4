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
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_masked_autoencoder_counts_as_torch_does(changes, ratio):
    model = tiny_mae(**changes, attn="math")
    clips, noise = clips_and_noise()
    with FlopCounterMode(display=False) as counter:
        model(clips, ratio, noise=noise)[0].backward()
    assert counter.get_total_flops() == len(clips) * model.flops_per_clip(ratio, "random")


def test_classifier_counts_as_torch_does():
    model = tiny_vit(attn="math")
    clips, _ = clips_and_noise()
    with FlopCounterMode(display=False) as counter:
        model(clips).sum().backward()
    assert counter.get_total_flops() == len(clips) * model.flops_per_clip()


def test_published_model():
    with torch.device("meta"):
        model = MaskedAutoencoderViT(
            **named_size("mae_vit_huge_patch14"),
            img_size=224,
            num_frames=16,
            t_patch_size=2,
            decoder_embed_dim=512,
            decoder_depth=4,
            decoder_num_heads=16,
            pred_t_dim=16,
        )
    assert model.flops_per_clip(0.9, "random") / 1e9 == pytest.approx(1061.1, abs=0.1)
