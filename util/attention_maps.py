"""Attention maps: where the blocks of an encoder look, and how that is drawn over the frames.

Shapes as in models_vit.py. A map (t', h, w) holds the weights that a query gives to the patch
tokens. The query is the class token, or all patch tokens, whose weights are averaged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models_vit import Attention, Block, VideoEncoder
from util.optim import autocast

COLORMAP = "inferno"  # its brightness grows with the value
COLOR_SHARE = 0.5  # share of the colormap in a pixel; the frame has the rest
QUERIES_AT_ONCE = 256  # limits the memory for the weights


def attention_weights(
    attention: Attention, x: Tensor, num_patches: int, class_query: bool
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) for the patch tokens, averaged over the queries: (B, A, L).

    x: normalized tokens (B, [1 +] L, D), the input of `attention`. Its fused kernels do not return
    the weights, so they are computed here, in float32. class_query: the class token is the only
    query, else all patch tokens are. With a class token the L weights sum to less than 1, because
    it is a key too.
    """
    first_patch = x.shape[1] - num_patches
    queries = x[:, first_patch:]
    if class_query:
        queries = x[:, :1]
    heads = (attention.num_heads, attention.head_dim)
    with torch.autocast(x.device.type, enabled=False):
        q = attention.q(queries).unflatten(2, heads).transpose(1, 2)  # (B, A, queries, K)
        k = attention.k(x).unflatten(2, heads).permute(0, 2, 3, 1)  # (B, A, K, N)
        weights = q.new_zeros(len(x), attention.num_heads, x.shape[1])
        for part in q.split(QUERIES_AT_ONCE, dim=2):
            scores = part @ k / attention.head_dim**0.5
            weights += scores.softmax(dim=3).sum(dim=2)
    return weights[:, :, first_patch:] / q.shape[2]


@torch.no_grad()
def attention_maps(
    model: VideoEncoder, clips: Tensor, layers: list[int], class_query: bool, amp: torch.dtype
) -> Tensor:
    """Return the maps (B, layers, A, t', h, w) of some blocks, on the device.

    layers: indices of blocks, ascending. clips: (B, C, T, H, W), see `VideoEncoder.embed`.
    class_query: see `attention_weights`.
    """
    model.eval()
    maps = []
    with autocast(clips.device, amp):
        x, delta = model.embed(clips)
        for index, block in enumerate(model.blocks[: layers[-1] + 1]):
            assert isinstance(block, Block)
            if index in layers:
                tokens = block.norm1(x + delta)
                maps.append(attention_weights(block.attn, tokens, model.num_tokens, class_query))
            x, delta = block(x, delta)
    return torch.stack(maps, dim=1).unflatten(3, model.grid)


def label_maps(maps: Tensor, layers: list[int], heads: list[int] | None) -> dict[str, Tensor]:
    """Return maps (B, t', h, w) by label: of each layer the given heads, or the mean of all heads.

    maps: see `attention_maps`. layers, heads: indices; heads None: the mean.
    """
    rows = {}
    for layer, maps_of_heads in zip(layers, maps.unbind(dim=1), strict=True):
        if heads is None:
            rows[f"layer {layer + 1}\nmean of heads"] = maps_of_heads.mean(dim=1)
            continue
        for head in heads:
            rows[f"layer {layer + 1}\nhead {head + 1}"] = maps_of_heads[:, head]
    return rows


def scale_maps(maps: Tensor, percentile: float) -> Tensor:
    """Return maps (B, t', h, w) divided by a percentile of each, clamped to [0, 1].

    percentile: 100 is the maximum. The maximum also replaces a percentile that is zero.
    """
    values = maps.flatten(1)
    top = values.quantile(percentile / 100, dim=1)
    top = torch.where(top > 0, top, values.amax(dim=1))
    return (maps / top[:, None, None, None]).clamp(max=1)


def overlay(frames: Tensor, maps: Tensor, percentile: float) -> Tensor:
    """Return frames (B, 3, T, H, W) uint8 with maps (B, t', h, w) drawn over them. On the CPU.

    Each map has its own scale, the same for all of its frames (`scale_maps`). It is enlarged to the
    pixels of its patches bilinearly, and repeated for the frames of its tubelets.
    """
    from matplotlib import colormaps

    num_frames, height, width = frames.shape[2:]
    scaled = scale_maps(maps, percentile)
    scaled = F.interpolate(scaled, size=(height, width), mode="bilinear")  # (B, t', H, W)
    scaled = scaled.repeat_interleave(num_frames // maps.shape[1], dim=1)  # (B, T, H, W)
    colors = torch.from_numpy(colormaps[COLORMAP](scaled.numpy()))[..., :3]  # (B, T, H, W, 3)
    colors = 255 * colors.permute(0, 4, 1, 2, 3)
    blended = frames + COLOR_SHARE * (colors - frames)
    return blended.round().to(torch.uint8)


def draw_maps(clips: Tensor, maps: dict[str, Tensor], percentile: float) -> dict[str, Tensor]:
    """Return frames (B, 3, T, H, W) uint8 by label: the original clips, and each map over them.

    clips: uint8, on the CPU. See `label_maps` and `overlay`.
    """
    rows = {"original": clips}
    for label, values in maps.items():
        rows[label] = overlay(clips, values, percentile)
    return rows
