"""Small models of other projects, for the tests of their checkpoints."""

import pytest
import torch
from torch import Tensor, nn

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


def hugging_face_videomae(kind: str) -> nn.Module:
    """Return a random Hugging Face VideoMAE: for pretraining (norm over tokens) or classes."""
    transformers = pytest.importorskip("transformers", reason=INSTALL)
    pytest.importorskip("safetensors", reason=INSTALL)
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
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
