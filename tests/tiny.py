"""Tiny models for the tests, and equality of what they save."""

import torch

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, named_size


def tiny_mae(**changes) -> MaskedAutoencoderViT:
    """A masked autoencoder with 4 x 4 x 4 = 64 tokens and two blocks on either side."""
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
    return MaskedAutoencoderViT(**arguments | changes)


def tiny_vit(**changes) -> VisionTransformer:
    """A classifier whose encoder is tiny_mae's."""
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
    """Random input of tiny_mae: (B, 3, 8, 32, 32) and (B, L)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 32, 32, generator=generator, dtype=dtype), torch.rand(
        batch, tokens, generator=generator
    )


def same(one, other) -> bool:
    """Equal plain data and tensors, bit for bit."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
