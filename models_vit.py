"""Video vision transformer: tubelet embedding, attention, blocks, the encoder trunk, and the classifier on top of it.

Shapes: B clips, C colours (3), T frames, H = W pixels; t, p = tubelet length (frames) and patch side (pixels);
L = T/t * H/p * W/p tokens (time, then rows, then columns), N tokens in a sequence, D width, A attention heads, K = D/A.

    encoder = VideoEncoder(img_size=224, num_frames=16, t_patch_size=2, **named_size("vit_large_patch16"))
    tokens = encoder.encode(clips)  # (B, 1 + L, D)

Feichtenhofer et al. 2022, "Masked Autoencoders As Spatiotemporal Learners", arXiv 2205.09113.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

try:  # optional: needs CUDA to build
    from flash_attn import flash_attn_qkvpacked_func
except ImportError:
    flash_attn_qkvpacked_func = None

SIZES = {  # name: (width, depth, heads); the head counts are part of the weights' meaning
    "micro": (64, 2, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

ATTENTION = {  # --attn: which kernels PyTorch may use, first choice first
    "sdpa": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "math": [SDPBackend.MATH],
}


def named_size(name: str, patch_size: int | None = None) -> dict[str, int]:
    """Constructor arguments of a model name such as "vit_large_patch16" or "mae_vit_tiny_patch16".

    patch_size overrides the one in the name. Raises ValueError, with the known names, for an unknown one.
    """
    match = re.fullmatch(rf"(?:mae_)?vit_({'|'.join(SIZES)})_patch(14|16)", name)
    if not match or (match[2] == "14" and match[1] != "huge"):
        known = [f"vit_{size}_patch16" for size in SIZES] + ["vit_huge_patch14"]
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(known)} (with mae_ in front for pretraining)"
        )
    embed_dim, depth, num_heads = SIZES[match[1]]
    return {
        "patch_size": patch_size or int(match[2]),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }


def choose_attention(attn: str, device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Which attention runs for tensors of this kind, and why: ("flash_attn" or a key of ATTENTION, reason).

    Raises ValueError for an unknown name, or for "flash_attn" where the package or the tensors do not allow it.
    """
    if attn not in ("auto", "flash_attn", *ATTENTION):
        raise ValueError(
            f"unknown attention {attn!r}: choose one of auto, flash_attn, {', '.join(ATTENTION)}"
        )
    if attn in ATTENTION:
        return attn, "as asked"
    obstacle = (
        "the flash-attn package is not installed"
        if flash_attn_qkvpacked_func is None
        else f"the flash-attn package needs CUDA, not {device}"
        if device != "cuda"
        else f"the flash-attn package needs float16 or bfloat16, not {dtype}"
        if dtype not in (torch.float16, torch.bfloat16)
        else f"the flash-attn package takes head widths up to 256 in steps of 8, not {head_dim}"
        if head_dim > 256 or head_dim % 8
        else None
    )
    if obstacle is None:
        return "flash_attn", "the flash-attn package is installed and takes these tensors"
    if attn == "flash_attn":
        cure = (
            "pip install --no-build-isolation -r requirements-flash.txt, or "
            if flash_attn_qkvpacked_func is None
            else ""
        )
        raise ValueError(
            f"attention 'flash_attn' cannot run: {obstacle}; {cure}use --attn auto or sdpa"
        )
    return "sdpa", f"PyTorch's own FlashAttention-2: {obstacle}"


def attend(qkv: Tensor, attn: str) -> Tensor:
    """softmax(q k^T / sqrt(K)) v. qkv (B, N, 3, A, K) -> (B, N, A, K)."""
    kernel, _ = choose_attention(attn, qkv.device.type, qkv.dtype, qkv.shape[-1])
    if kernel == "flash_attn":
        return flash_attn_qkvpacked_func(
            qkv, deterministic=torch.are_deterministic_algorithms_enabled()
        )
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, A, N, K)
    with sdpa_kernel(ATTENTION[kernel], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention. One product makes q, k and v; their parameters stay three, as in the checkpoints."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool, attn: str):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} attention heads")
        self.num_heads, self.attn = num_heads, attn
        self.q, self.k, self.v = (nn.Linear(width, width, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        parts = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([part.bias for part in parts])
        qkv = F.linear(x, torch.cat([part.weight for part in parts]), bias)  # (B, N, 3 D)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, A, K)
        return self.proj(attend(qkv, self.attn).flatten(2))


class Mlp(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; in training each branch of a clip is dropped with probability `drop_path`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attn: str,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, qkv_bias, attn)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        # a tensor and not a number, so that blocks with different rates share one compiled graph; never saved
        self.register_buffer(
            "keep_prob", torch.tensor(1.0 - drop_path) if drop_path else None, persistent=False
        )

    def drop_path(self, branch: Tensor) -> Tensor:
        """Zero the branch for some clips and divide the others by the probability to keep (Huang et al. 2016)."""
        if self.keep_prob is None or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < self.keep_prob  # (B, 1, 1)
        return branch * (kept / self.keep_prob).to(branch.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TubeletEmbed(nn.Module):
    """The linear map of a tubelet's pixels to a token; its weight is stored in the shape of a 3-d convolution's."""

    def __init__(self, width: int, t_patch_size: int, patch_size: int):
        super().__init__()
        kernel = (t_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(
            3, width, kernel_size=kernel, stride=kernel
        )  # holds the parameters, is never called

    def forward(self, tubelets: Tensor) -> Tensor:
        """(B, N, C, t, p, p) -> (B, N, D)."""
        return F.linear(tubelets.flatten(2), self.proj.weight.flatten(1), self.proj.bias)

    def static(self, patches: Tensor) -> Tensor:
        """Patches (B, N, C, 1, p, p) that stand for t equal frames -> (B, N, D): the weights summed over time."""
        return F.linear(patches.flatten(2), self.proj.weight.sum(dim=2).flatten(1), self.proj.bias)


def tubelets(frames: Tensor, t: int, p: int, ids: Tensor | None = None) -> Tensor:
    """Cut (B, C, T, H, W) into tubelets (B, N, C, t, p, p): the tokens `ids` (B, N), or all L in token order."""
    b, c, frames_count, height, width = frames.shape
    h, w = height // p, width // p
    grid = frames.view(b, c, frames_count // t, t, h, p, w, p)
    if ids is None:
        return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)
    clip = torch.arange(b, device=frames.device)[:, None]
    return grid[
        clip, :, ids // (h * w), :, ids // w % h, :, ids % w
    ]  # reads the wanted pixels only


def block_flops(tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    """FLOPs of forward and backward of `depth` blocks per sequence of N tokens: products with weights, and with N x N."""
    return depth * (6 * tokens * width**2 * (4 + 2 * mlp_ratio) + 12 * tokens**2 * width)


class VideoEncoder(nn.Module):
    """The trunk: tubelet embedding, class token, positions, blocks and the final norm. See the file's legend for shapes.

    Raises ValueError for sizes that do not fit each other. `config` holds the constructor's arguments.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_frames: int,
        t_patch_size: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        sep_pos_embed: bool = True,
        cls_embed: bool = True,
        no_qkv_bias: bool = False,
        attn: str = "auto",
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        if num_frames % t_patch_size:
            raise ValueError(
                f"num_frames {num_frames} is not divisible by t_patch_size {t_patch_size}"
            )
        self.config = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "num_frames": num_frames,
            "t_patch_size": t_patch_size,
            "mlp_ratio": mlp_ratio,
            "sep_pos_embed": sep_pos_embed,
            "cls_embed": cls_embed,
            "no_qkv_bias": no_qkv_bias,
        }
        self.t_patch_size, self.patch_size = t_patch_size, patch_size
        self.activation_checkpointing = False  # set it to save memory
        self.grid = (
            num_frames // t_patch_size,
            img_size // patch_size,
            img_size // patch_size,
        )  # t', h, w
        self.num_tokens = self.grid[0] * self.grid[1] * self.grid[2]
        self.sep_pos_embed, self.cls_embed = sep_pos_embed, cls_embed

        if cls_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.add_positions("", embed_dim)
        self.patch_embed = TubeletEmbed(embed_dim, t_patch_size, patch_size)
        rates = [
            drop_path_rate * i / max(depth - 1, 1) for i in range(depth)
        ]  # growing linearly from 0
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, not no_qkv_bias, attn, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def add_positions(self, prefix: str, width: int) -> None:
        """Register a set of position embeddings; `positions` reads it."""
        shapes = {"pos_embed": (int(self.cls_embed) + self.num_tokens, width)}
        if self.sep_pos_embed:
            shapes = {
                "pos_embed_spatial": (self.grid[1] * self.grid[2], width),
                "pos_embed_temporal": (self.grid[0], width),
            }
            if self.cls_embed:
                shapes["pos_embed_class"] = (1, width)
        for name, shape in shapes.items():
            self.register_parameter(prefix + name, nn.Parameter(torch.zeros(1, *shape)))

    def positions(self, prefix: str = "") -> tuple[Tensor, Tensor | None]:
        """Positions of the tokens (L, D) and of the class token (1, 1, D), or None without one."""
        if self.sep_pos_embed:
            space = getattr(self, prefix + "pos_embed_spatial")  # (1, hw, D)
            time = getattr(self, prefix + "pos_embed_temporal")  # (1, t', D)
            patches = (time[0][:, None] + space).flatten(0, 1)  # (t', 1, D) + (1, hw, D) -> (L, D)
            return patches, getattr(self, prefix + "pos_embed_class") if self.cls_embed else None
        joint = getattr(self, prefix + "pos_embed")
        return (joint[0, 1:], joint[:, :1]) if self.cls_embed else (joint[0], None)

    def embed(self, clips: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens before the blocks: clips (B, C, T, H, W) float, ids (B, N) or None for all -> (B, [1 +] N, D).

        Clips of one frame (B, C, 1, H, W) stand for T equal frames: same tokens, for 1/T of the work.
        """
        frames, side = self.config["num_frames"], self.config["img_size"]
        static = clips.shape[2] == 1 < frames and ids is None
        if clips.shape[1:] != (3, 1 if static else frames, side, side):
            raise ValueError(
                f"clips of shape {tuple(clips.shape)}: this model takes (B, 3, {frames}, {side}, {side})"
            )
        positions, class_position = self.positions()
        if static:
            x = self.patch_embed.static(tubelets(clips, 1, self.patch_size)).repeat(
                1, self.grid[0], 1
            )  # (B, hw, D) -> (B, L, D)
        else:
            x = self.patch_embed(tubelets(clips, self.t_patch_size, self.patch_size, ids))
        x = x + (positions if ids is None else positions[ids])
        if self.cls_embed:
            x = torch.cat(
                [(self.cls_token + class_position).expand(len(x), -1, -1).to(x.dtype), x], dim=1
            )
        return x

    def encode(self, clips: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens after the blocks, before the norm: (B, [1 +] N, D)."""
        x = self.embed(clips, ids)
        return self.through(self.blocks, x)

    def through(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """(B, N, D) through the blocks; with activation_checkpointing each is computed again in the backward pass."""
        for block in blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.activation_checkpointing and self.training
                else block(x)
            )
        return x

    def forward(self, clips: Tensor) -> Tensor:
        """Normed tokens (B, [1 +] L, D) of clips (B, C, T, H, W) float."""
        return self.norm(self.encode(clips))

    def training_flops(self, tokens: int) -> float:
        """FLOPs of forward and backward of embedding and blocks per clip, for so many patch tokens in the sequence.

        Counted are matrix products, attention included, without recomputation; 2 per multiplication, and the backward pass
        makes two products for each of the forward pass (one for the embedding: pixels need no gradient).
        """
        c = self.config
        embedding = 4 * tokens * 3 * self.t_patch_size * self.patch_size**2 * c["embed_dim"]
        return embedding + block_flops(
            tokens + int(self.cls_embed), c["embed_dim"], c["depth"], c["mlp_ratio"]
        )

    def compile_parts(self) -> None:
        """torch.compile in place: one graph for all blocks of a width. State dict names do not change."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def init_weights(self, trunc_init: bool = False) -> None:
        """Initialise every parameter.

        | parameter                                  | default               | trunc_init               |
        | ------------------------------------------ | --------------------- | ------------------------ |
        | linear weights                             | Xavier uniform        | truncated normal 0.02    |
        | tubelet embedding, as (D, C t p p)         | Xavier uniform        | truncated normal 1.0     |
        | biases                                     | 0                     | 0                        |
        | LayerNorm weight, bias                     | 1, 0                  | 1, 0                     |
        | class token, position embeddings           | truncated normal 0.02 | truncated normal 0.02    |
        | mask_token                                 | normal 0.02           | truncated normal 0.02    |
        | decoder_cls_token                          | 0                     | 0                        |
        | head.weight (classifier)                   | normal 0.02           | normal 0.02              |

        Truncation is at +-2, torch's default. Source: arXiv 2205.09113, appendix, and the released configurations.
        """
        for name, parameter in self.named_parameters():
            if name == "head.weight" or (name == "mask_token" and not trunc_init):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias") or name == "decoder_cls_token":
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:  # LayerNorm
                nn.init.ones_(parameter)
            elif name == "patch_embed.proj.weight":
                nn.init.trunc_normal_(
                    parameter, std=1.0
                ) if trunc_init else nn.init.xavier_uniform_(parameter.flatten(1))
            elif parameter.ndim == 2 and not trunc_init:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)


class VisionTransformer(VideoEncoder):
    """The encoder as a classifier: mean of the patch tokens (`global_pool`) or class token -> norm -> dropout -> head."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_frames: int,
        t_patch_size: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        dropout: float = 0.3,
        global_pool: bool = True,
        sep_pos_embed: bool = True,
        cls_embed: bool = True,
        no_qkv_bias: bool = False,
        attn: str = "auto",
    ):
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_frames=num_frames,
            t_patch_size=t_patch_size,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            sep_pos_embed=sep_pos_embed,
            cls_embed=cls_embed,
            no_qkv_bias=no_qkv_bias,
            attn=attn,
        )
        if not (global_pool or cls_embed):
            raise ValueError(
                "the class-token read-out needs a class token: use global_pool, or cls_embed"
            )
        self.config |= {"num_classes": num_classes, "global_pool": global_pool}
        self.global_pool = global_pool
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        self.init_weights()

    def forward_features(self, clips: Tensor) -> Tensor:
        """Pooled, normed features (B, D) of clips (B, C, T, H, W) float: what enters dropout and head."""
        x = self.encode(clips)
        pooled = x[:, int(self.cls_embed) :].mean(dim=1) if self.global_pool else x[:, 0]
        return self.norm(pooled)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, C, T, H, W) float."""
        return self.head(self.dropout(self.forward_features(clips)))

    def flops_per_clip(self) -> float:
        """FLOPs of a training step per clip, see `training_flops`."""
        return self.training_flops(self.num_tokens) + 6 * self.head.weight.numel()
