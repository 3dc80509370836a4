"""Small models of other projects, for the tests of their checkpoints."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models_vit import VideoEncoder

SIZE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_frames": 4,
    "t_patch_size": 2,
}
CLIPS = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(2))
INSTALL = "a development dependency: pip install -r requirements-dev.txt"


def randomized(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode, no parameter zero or one by accident."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Assert equality up to `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def fuse_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with q, k and v as one tensor, attn.qkv."""
    parts = (".attn.q.", ".attn.k.", ".attn.v.")
    fused = {name: value for name, value in weights.items() if not any(p in name for p in parts)}
    for name in [name for name in weights if ".attn.q." in name]:
        qkv = [weights[name.replace(".q.", f".{part}.")] for part in "qkv"]
        fused[name.replace(".q.", ".qkv.")] = torch.cat(qkv)
    return fused


def hugging_face_videomae(kind: str, **changes) -> nn.Module:
    """Return a random Hugging Face VideoMAE: for pretraining (norm over tokens) or classes."""
    transformers = pytest.importorskip("transformers", reason=INSTALL)
    pytest.importorskip("safetensors", reason=INSTALL)
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 4,
        "tubelet_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "decoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    }
    config = transformers.VideoMAEConfig(
        **sizes | changes,
        use_mean_pooling=kind == "VideoMAEForVideoClassification",
        attn_implementation="eager",
    )
    return randomized(getattr(transformers, kind)(config))


def timm_vit(**changes) -> nn.Module:
    """Return a random timm image model with the encoder's sizes of SIZE and 5 classes."""
    timm = pytest.importorskip("timm.models.vision_transformer", reason=INSTALL)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 5,
    }
    return randomized(timm.VisionTransformer(**arguments | changes))


def videomae_file(reference: VideoEncoder, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors that VideoMAE's own code stores for an encoder, under its names.

    Set what VideoMAE does not store to its fixed values in the reference: k bias and positions.
    """
    weights = reference.state_dict()
    tensors = {}
    for name, value in fuse_qkv(weights).items():
        if name != "pos_embed" and ".qkv.bias" not in name:
            tensors[f"{prefix}{name}"] = value
    for block in range(2):
        attn = f"blocks.{block}.attn"
        weights[f"{attn}.k.bias"].zero_()
        for part in "qv":
            tensors[f"{prefix}{attn}.{part}_bias"] = weights[f"{attn}.{part}.bias"]
    _, count, width = weights["pos_embed"].shape
    position = np.arange(count)[:, None]
    column = np.arange(width)[None]
    angle = position / np.power(10000, 2 * (column // 2) / width)
    sinusoids = np.where(column % 2, np.cos(angle), np.sin(angle))
    weights["pos_embed"].copy_(torch.from_numpy(sinusoids[None]))
    decoder = {
        "decoder.blocks.0.norm1.weight": torch.ones(16),
        "encoder_to_decoder.weight": torch.ones(16, 32),
        "mask_token": torch.ones(1, 1, 16),
    }
    return tensors | decoder
