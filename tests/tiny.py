"""Tiny models for the tests, and a comparison of checkpoints."""

import torch

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, named_size
from util.pixels import VIDEO_MEAN, VIDEO_STD


def tiny_mae(**changes) -> MaskedAutoencoderViT:
    """Return a masked autoencoder: 4 x 4 x 4 = 64 tokens, two encoder and two decoder blocks."""
    arguments = named_size("mae_vit_micro_patch16", 8) | {
        "img_size": 32,
        "num_frames": 8,
        "t_patch_size": 2,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
        "pred_t_dim": 8,
    }
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**arguments | changes)
    model.pixel_stats = (VIDEO_MEAN, VIDEO_STD)
    return model


def tiny_vit(**changes) -> VisionTransformer:
    """Return a classifier with the encoder of `tiny_mae`."""
    arguments = named_size("vit_micro_patch16", 8) | {
        "img_size": 32,
        "num_frames": 8,
        "t_patch_size": 2,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    return VisionTransformer(**arguments | changes)


def clips_and_noise(
    batch: int = 2, dtype: torch.dtype = torch.float32, tokens: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random input of tiny_mae: clips (B, 3, 8, 32, 32) and noise (B, L)."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(batch, 3, 8, 32, 32, generator=generator, dtype=dtype)
    noise = torch.rand(batch, tokens, generator=generator)
    return clips, noise


def same(one, other) -> bool:
    """Return whether plain data and tensors are equal, bit for bit."""
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return False
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other
