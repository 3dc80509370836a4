"""Video vision transformer: tubelet embedding, attention, blocks, the encoder, and a classifier.

Shapes: B clips, C colors (3), T frames, H = W pixels; t, p = tubelet length (frames) and patch side
(pixels); t' = T/t, h = H/p, w = W/p; L = t' * h * w tokens (time, then rows, then columns),
N tokens in a sequence, D width, A attention heads, K = D/A.

    encoder = VideoEncoder(
        img_size=224, num_frames=16, t_patch_size=2, **named_size("vit_large_patch16")
    )
    tokens = encoder.encode(clips)  # (B, 1 + L, D)

Feichtenhofer et al. 2022, "Masked Autoencoders As Spatiotemporal Learners", arXiv 2205.09113.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

try:  # optional: needs CUDA to build
    from flash_attn import flash_attn_qkvpacked_func
except ImportError:
    flash_attn_qkvpacked_func = None

SIZES = {  # name: (width, depth, heads); weights are only valid with their number of heads
    "micro": (64, 2, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
}
MLP_RATIOS = {"giant": 48 / 11}  # hidden width / width, of all other sizes 4
PATCH_SIZES = {"huge": (14, 16), "giant": (14,)}  # in the models' names, of all other sizes 16

SDPA_BACKENDS = {  # --attn: the kernels that PyTorch may use, in order of priority
    "sdpa": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "math": [SDPBackend.MATH],
}

# --attn auto: (compute capability, dtype): the fastest key of SDPA_BACKENDS. Others take "sdpa".
# 9.0: benchmarks/results/attention_cuda.json, where all head widths and lengths agree.
# 10.0: PyTorch's own default, check_prefer_cudnn_attention in its sdp_utils.cpp.
# cuDNN is not faster on 8.0, 8.6, 8.9 and 12.0,
# https://github.com/huggingface/transformers/pull/48163.
FASTEST_ATTENTION = {
    ((9, 0), torch.bfloat16): "cudnn",
    ((10, 0), torch.bfloat16): "cudnn",
}


PixelStats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each color


def model_names() -> list[str]:
    """Return the names of all models, without the prefix mae_."""
    names = []
    for size in SIZES:
        names += [f"vit_{size}_patch{patch_size}" for patch_size in PATCH_SIZES.get(size, (16,))]
    return names


def named_size(name: str, patch_size: int | None = None) -> dict[str, Any]:
    """Return the constructor arguments of a model name such as "vit_large_patch16".

    "mae_vit_large_patch16" gives the same. patch_size overrides the one in the name. Raises
    ValueError, with the known names, for an unknown one.
    """
    known = model_names()
    if name.removeprefix("mae_") not in known:
        raise ValueError(
            f"unknown model {name!r}. Choose one of {', '.join(known)} "
            "(with the prefix mae_ for pretraining)."
        )
    _, size, patch = name.removeprefix("mae_").split("_")
    embed_dim, depth, num_heads = SIZES[size]
    return {
        "patch_size": patch_size or int(patch.removeprefix("patch")),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": MLP_RATIOS.get(size, 4.0),
    }


def flash_attn_obstacle(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the flash-attn package cannot run for such tensors, or None if it can."""
    if flash_attn_qkvpacked_func is None:
        return "the flash-attn package is not installed"
    if device_type != "cuda":
        return f"the flash-attn package needs CUDA, not {device_type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the flash-attn package needs float16 or bfloat16, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"the flash-attn package needs head widths up to 256 in steps of 8, not {head_dim}"
    return None


def cudnn_obstacle(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why cuDNN's attention cannot train on such tensors, or None if it can.

    Tries it once, because cuDNN itself decides what it supports.
    """
    if device_type != "cuda":
        return f"cuDNN's attention needs CUDA, not {device_type}"
    if torch.are_deterministic_algorithms_enabled():
        return "cuDNN's attention is not deterministic"
    if not (torch.backends.cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled()):
        return "cuDNN is switched off"
    try:
        size = (1, 1, 65, head_dim)
        x = torch.ones(size, device=device_type, dtype=dtype, requires_grad=True)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(x, x, x).sum().backward()
    except RuntimeError as error:
        return f"cuDNN's attention does not run here: {str(error).partition(chr(10))[0]}"
    return None


def attention_obstacle(
    kernel: str, device_type: str, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Return why a kernel cannot run for such tensors, or None if it can."""
    if kernel == "flash_attn":
        return flash_attn_obstacle(device_type, dtype, head_dim)
    if kernel == "cudnn":
        return cudnn_obstacle(device_type, dtype, head_dim)
    return None


def fastest_attention(device_type: str, dtype: torch.dtype) -> str:
    """Return the entry of FASTEST_ATTENTION for this GPU, or "sdpa" if there is none."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return "sdpa"
    return FASTEST_ATTENTION.get((torch.cuda.get_device_capability(), dtype), "sdpa")


def choose_attention(
    attn: str, device_type: str, dtype: torch.dtype, head_dim: int
) -> tuple[str, str]:
    """Return the attention kernel for such tensors, and the reason for the choice.

    The kernel is "flash_attn" (the flash-attn package) or a key of SDPA_BACKENDS. Raises
    ValueError for an unknown name, and for a requested kernel that cannot run.
    """
    if attn not in ("auto", "flash_attn", *SDPA_BACKENDS):
        known = ", ".join(SDPA_BACKENDS)
        raise ValueError(f"unknown attention {attn!r}. Choose one of auto, flash_attn, {known}.")
    kernels = [attn]
    reason = "as requested"
    if attn == "auto":
        kernels = ["flash_attn", "sdpa"]
        reason = "the first choice for such tensors"
        fastest = fastest_attention(device_type, dtype)
        if fastest != "sdpa":
            kernels.insert(0, fastest)
    obstacles: list[str] = []
    for kernel in kernels:
        obstacle = attention_obstacle(kernel, device_type, dtype, head_dim)
        if obstacle is None:
            return kernel, "; ".join(obstacles) or reason
        obstacles.append(obstacle)
    cure = "Use --attn auto or sdpa."
    if attn == "flash_attn" and flash_attn_qkvpacked_func is None:
        install = "pip install --no-build-isolation -r requirements-flash.txt"
        cure = f"Install it ({install}), or use --attn auto or sdpa."
    raise ValueError(f"attention {attn!r} cannot run: {obstacles[0]}. {cure}")


def describe_kernel(kernel: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return what runs for such tensors: PyTorch takes the first of SDPA_BACKENDS that can.

    The answer is that of PyTorch's own dispatcher, since the public checks cover CUDA only.
    """
    if kernel == "flash_attn":
        return "the flash-attn package"
    size = (1, 1, 65, head_dim)
    x = torch.empty(size, device=device_type, dtype=dtype, requires_grad=True)
    with sdpa_kernel(SDPA_BACKENDS[kernel], set_priority=True):
        backend = SDPBackend(torch._fused_sdp_choice(x, x, x))
    return f"PyTorch's {backend.name.lower().replace('_', ' ')}"


def attend(qkv: Tensor, kernel: str) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v: qkv (B, N, 3, A, K) -> (B, N, A, K).

    kernel: as `choose_attention` returns it.
    """
    if kernel == "flash_attn":
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_qkvpacked_func(qkv, deterministic=deterministic)
    heads = qkv.shape[3:]
    # Split along D: torch.compile joins the gradients and sums them for the bias in one kernel.
    parts = qkv.flatten(2).chunk(3, dim=2)  # each (B, N, D)
    q, k, v = (part.unflatten(2, heads).transpose(1, 2) for part in parts)  # each (B, A, N, K)
    with sdpa_kernel(SDPA_BACKENDS[kernel], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class LinearFunction(torch.autograd.Function):
    """F.linear of tokens (B, N, D), with a backward pass that moves fewer bytes when compiled.

    The bias gradient is summed over the tokens of each clip, and then over the clips: torch.compile
    computes the first sum in the kernel that writes the gradient. On CUDA the product for the
    weight gradient returns float32 instead of a lower precision that is then converted.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return (B, N, E) for tokens (B, N, D), weight (E, D) and bias (E,), computed in dtype."""
        x = x.to(dtype)
        weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias for that of the output (B, N, E)."""
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = product_in_float32(grad.flatten(0, 1).t(), x.flatten(0, 1))
        if ctx.needs_input_grad[2]:
            sum_dtype = torch.promote_types(grad.dtype, torch.float32)
            grad_bias = grad.sum(1, dtype=sum_dtype).sum(0)
        return grad_x, grad_weight, grad_bias, None


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product a @ b: on CUDA in float32 or wider, else in the inputs' dtype."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear of tokens (B, N, D); compiled, with `LinearFunction`."""
    if not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return LinearFunction.apply(x, weight, bias, dtype)


class Linear(nn.Linear):
    """nn.Linear for tokens, see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, E) for tokens (B, N, D)."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention.

    One matrix product computes q, k and v. Their parameters stay separate, as in the checkpoints.
    """

    def __init__(self, width: int, num_heads: int, qkv_bias: bool, attn: str):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.attn = attn
        self.kernel = attn
        if attn == "auto":
            self.kernel = "sdpa"  # suits all tensors; set_attention may find a better one
        elif attn != "cudnn":  # which can only be tried on a GPU
            # Device and dtype are unknown here. Raise early what would be an error with any.
            choose_attention(attn, "cuda", torch.bfloat16, self.head_dim)
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D) for tokens (B, N, D)."""
        parts = (self.q, self.k, self.v)
        weight = torch.cat([part.weight for part in parts])  # (3 D, D)
        bias = None
        if self.q.bias is not None:
            bias = torch.cat([part.bias for part in parts])
        qkv = linear(x, weight, bias).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, A, K)
        return self.proj(attend(qkv, self.kernel).flatten(2))


class Mlp(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D) for tokens (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


def mlp_hidden(width: int, mlp_ratio: float) -> int:
    """Return the hidden width of an MLP: width * mlp_ratio, truncated.

    Rounding first keeps a ratio that was computed as hidden / width from losing one by truncation.
    """
    return int(round(width * mlp_ratio, 6))


class Block(nn.Module):
    """Pre-norm transformer block.

    It takes and returns the residual stream in two parts, `x` and `delta`: the stream is their sum.
    The next block's first kernel adds them, which saves a pass over the tokens.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, attn: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, qkv_bias, attn)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_hidden(width, mlp_ratio))

    def forward(
        self, x: Tensor, delta: Tensor, branch_scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x and delta, each (B, N, D), after this block; delta is its last branch.

        branch_scales: factors (2, B, 1, 1) of the two branches, see `drop_path_scales`.
        """
        x = x + delta
        branch = self.attn(self.norm1(x))
        if branch_scales is not None:
            branch = branch * branch_scales[0].to(branch.dtype)
        x = x + branch
        delta = self.mlp(self.norm2(x))
        if branch_scales is not None:
            delta = delta * branch_scales[1].to(delta.dtype)
        return x, delta


class AttentivePool(nn.Module):
    """Pooling by attention: a learned query reads all tokens of a clip.

    q = query + attention(query, norm1(tokens)), and the result is q + mlp(norm2(q)). This is the
    attentive probe of CAE (arXiv 2202.03026) and V-JEPA (arXiv 2404.08471).

    The query is the same for all clips, so the key map is applied to the query instead of to each
    token, and the value map to the attended mean of the tokens: same function, for 4 A D FLOPs per
    token instead of 4 D^2.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # the softmax would cancel a bias
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_hidden(width, mlp_ratio))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the pooled features (B, D) of tokens (B, N, D)."""
        heads = (self.num_heads, -1)
        tokens = self.norm1(tokens)
        q = self.q(self.query).unflatten(2, heads)[0, 0]  # (A, K)
        keys = self.k.weight.unflatten(0, heads)  # (A, K, D)
        directions = (q[:, None] @ keys)[:, 0] * q.shape[1] ** -0.5  # (A, D)
        weights = (tokens @ directions.t()).softmax(dim=1)  # (B, N, A)
        attended = weights.transpose(1, 2) @ tokens  # (B, A, D)
        value_maps = self.v.weight.unflatten(0, heads).transpose(1, 2)  # (A, D, K)
        values = attended.transpose(0, 1) @ value_maps  # (A, B, K)
        values = values.transpose(0, 1).flatten(1)[:, None] + self.v.bias  # (B, 1, D)
        pooled = self.query + self.proj(values)
        return (pooled + self.mlp(self.norm2(pooled)))[:, 0]


def linear_keep_probs(drop_path_rate: float, depth: int) -> Tensor:
    """Return the keep probability (depth,) of each block: from 1 down to 1 - drop_path_rate.

    Raises ValueError for a rate that is no probability, or that drops the last block always.
    """
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate {drop_path_rate} is not a rate: choose 0 <= rate < 1.")
    return torch.tensor([1.0 - drop_path_rate * i / max(depth - 1, 1) for i in range(depth)])


def drop_path_scales(keep_probs: Tensor, batch_size: int) -> Tensor:
    """Draw the factors (depth, 2, B, 1, 1) of the two branches of each block: stochastic depth.

    A branch of a clip is dropped (0) or kept (1 / keep probability). keep_probs: (depth,), of which
    the first is 1: nothing is drawn for the first block.
    Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv 1603.09382.
    """
    keep = keep_probs[1:, None, None, None, None]
    draws = torch.rand(len(keep), 2, batch_size, 1, 1, device=keep.device)
    scales = (draws < keep) / keep
    return torch.cat([draws.new_ones(1, 2, batch_size, 1, 1), scales])


def normalize(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (x / 255 - mean) / std per color, as float32, of uint8 clips (..., C, T, H, W).

    No tensors are copied from the host, so that it does not wait for the device.
    """
    if len(set(mean)) == 1 and len(set(std)) == 1:
        return clips * (1 / (255 * std[0])) - mean[0] / std[0]
    colors = []
    for c in range(3):
        color = clips[..., c, :, :, :]  # (..., T, H, W)
        colors.append(color * (1 / (255 * std[c])) - mean[c] / std[c])
    return torch.stack(colors, dim=-4)


class TubeletEmbed(nn.Module):
    """Linear map of a tubelet's pixels to a token.

    The weight has the shape of a 3-d convolution's, as in the checkpoints.
    """

    def __init__(self, width: int, t_patch_size: int, patch_size: int):
        super().__init__()
        kernel = (t_patch_size, patch_size, patch_size)
        # only holds the parameters and is never called
        self.proj = nn.Conv3d(3, width, kernel_size=kernel, stride=kernel)

    def forward(self, tubelets: Tensor) -> Tensor:
        """Return tokens (B, N, D) of tubelets (B, N, C, t, p, p)."""
        return linear(tubelets.flatten(2), self.proj.weight.flatten(1), self.proj.bias)

    def embed_static(self, patches: Tensor) -> Tensor:
        """Return tokens (B, N, D) of patches (B, N, C, 1, p, p) that are repeated for t frames.

        Summing the weights over time gives the same tokens as repeating the pixels.
        """
        weight = self.proj.weight.sum(dim=2)  # (D, C, p, p)
        return linear(patches.flatten(2), weight.flatten(1), self.proj.bias)


def patchify(frames: Tensor, t: int, p: int, ids: Tensor | None = None) -> Tensor:
    """Cut frames (B, C, T, H, W) into tubelets (B, N, C, t, p, p).

    ids: indices (B, N) of the tokens to cut; None: all L in token order.
    """
    b, c, num_frames, height, width = frames.shape
    h = height // p
    w = width // p
    grid = frames.view(b, c, num_frames // t, t, h, p, w, p)
    if ids is None:
        return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)
    clip = torch.arange(b, device=frames.device)[:, None]
    # reads only the pixels of these tokens
    return grid[clip, :, ids // (h * w), :, ids // w % h, :, ids % w]


def token_grid(
    img_size: int, patch_size: int, num_frames: int, t_patch_size: int
) -> tuple[int, int, int]:
    """Return the numbers of tokens (t', h, w) of a clip. Raises ValueError for a remainder."""
    if img_size % patch_size:
        raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
    if num_frames % t_patch_size:
        raise ValueError(f"num_frames {num_frames} is not divisible by t_patch_size {t_patch_size}")
    side = img_size // patch_size
    return num_frames // t_patch_size, side, side


def prepend_token(token: Tensor, x: Tensor) -> Tensor:
    """Return tokens (B, 1 + N, D): the token (1, 1, D) in front of x (B, N, D) of each clip."""
    return torch.cat([token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)


def pad_tokens(x: Tensor, before: int, after: int = 0) -> Tensor:
    """Return tokens (B, before + N + after, D): x (B, N, D) with zeros around it."""
    zero = x.new_zeros(1, 1, 1)
    width = x.shape[2]
    return torch.cat(
        [zero.expand(len(x), before, width), x, zero.expand(len(x), after, width)], dim=1
    )


def block_flops(tokens: int, width: int, depth: int, mlp_ratio: float) -> float:
    """Return the FLOPs of forward and backward of `depth` blocks per sequence of N tokens."""
    weights = 4 * width**2 + 2 * width * mlp_hidden(width, mlp_ratio)
    weight_products = 6 * tokens * weights
    attention_products = 12 * tokens**2 * width  # q k^T and its product with v
    return depth * (weight_products + attention_products)


@torch.no_grad()
def init_parameters(module: nn.Module, trunc_init: bool = False) -> None:
    """Initialize every parameter of a model, or of a head.

    | parameter                          | default               | trunc_init            |
    | ---------------------------------- | --------------------- | --------------------- |
    | linear weights                     | Xavier uniform        | truncated normal 0.02 |
    | tubelet embedding, as (D, C t p p) | Xavier uniform        | truncated normal 1.0  |
    | biases                             | 0                     | 0                     |
    | LayerNorm weight, bias             | 1, 0                  | 1, 0                  |
    | class token, position embeddings,  | truncated normal 0.02 | truncated normal 0.02 |
    | query of the attentive pool        |                       |                       |
    | mask_token                         | normal 0.02           | truncated normal 0.02 |
    | decoder_cls_token                  | 0                     | 0                     |
    | head.weight (classifier)           | normal 0.02           | normal 0.02           |

    Truncation is at +-2, torch's default. Source: arXiv 2205.09113, appendix, and the
    released configurations.
    """
    for name, parameter in module.named_parameters():
        if name == "head.weight" or (name == "mask_token" and not trunc_init):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(".bias") or name == "decoder_cls_token":
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:  # LayerNorm
            nn.init.ones_(parameter)
        elif name == "patch_embed.proj.weight" and trunc_init:
            nn.init.trunc_normal_(parameter, std=1.0)
        elif name == "patch_embed.proj.weight":
            nn.init.xavier_uniform_(parameter.flatten(1))
        elif parameter.ndim == 2 and not trunc_init:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)


class VideoEncoder(nn.Module):
    """Tubelet embedding, class token, positions, blocks and the final norm.

    Raises ValueError for sizes that do not fit each other. `config` holds the arguments of the
    constructor that define the function of the weights.
    """

    keep_probs: Tensor | None  # a buffer (depth,)

    # Settings that are not part of the weights' function
    activation_checkpointing = False  # recompute blocks in the backward pass, to save memory
    pixel_stats: PixelStats | None = None  # (mean, std) of uint8 clips
    residual_dtype: torch.dtype | None = None  # of the tokens between blocks; None: the parameters'

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
        self.config: dict[str, Any] = {
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
        self.t_patch_size = t_patch_size
        self.patch_size = patch_size
        self.sep_pos_embed = sep_pos_embed
        self.cls_embed = cls_embed
        self.grid = token_grid(img_size, patch_size, num_frames, t_patch_size)  # (t', h, w)

        if cls_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.add_positions("", embed_dim)
        self.patch_embed = TubeletEmbed(embed_dim, t_patch_size, patch_size)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, not no_qkv_bias, attn) for _ in range(depth)
        )
        keep_probs = None
        if drop_path_rate:
            keep_probs = linear_keep_probs(drop_path_rate, depth)
        self.register_buffer("keep_probs", keep_probs, persistent=False)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    @property
    def num_tokens(self) -> int:
        """The number of patch tokens L of a clip."""
        steps, h, w = self.grid
        return steps * h * w

    def add_positions(self, prefix: str, width: int) -> None:
        """Register position embeddings with this name prefix; `positions` returns them."""
        steps, h, w = self.grid
        shapes = {}
        if self.sep_pos_embed:
            shapes["pos_embed_spatial"] = (h * w, width)
            shapes["pos_embed_temporal"] = (steps, width)
            if self.cls_embed:
                shapes["pos_embed_class"] = (1, width)
        else:
            shapes["pos_embed"] = (int(self.cls_embed) + self.num_tokens, width)
        for name, shape in shapes.items():
            self.register_parameter(prefix + name, nn.Parameter(torch.zeros(1, *shape)))

    def positions(self, prefix: str = "") -> tuple[Tensor, Tensor | None]:
        """Return the positions of the tokens (L, D) and of the class token (1, 1, D).

        The latter is None without a class token.
        """
        if self.sep_pos_embed:
            space = getattr(self, prefix + "pos_embed_spatial")  # (1, h w, D)
            time = getattr(self, prefix + "pos_embed_temporal")  # (1, t', D)
            tokens = (time[0][:, None] + space).flatten(0, 1)  # (t', 1, D) + (1, h w, D) -> (L, D)
            return tokens, getattr(self, prefix + "pos_embed_class", None)
        joint = getattr(self, prefix + "pos_embed")  # (1, [1 +] L, D)
        if self.cls_embed:
            return joint[0, 1:], joint[:, :1]
        return joint[0], None

    def embed(self, clips: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the positions and the embedded tubelets of clips, each (B, [1 +] N, D).

        Their sum is the input of the first block, which adds them. clips: (B, C, T, H, W) float, or
        uint8, which is normalized after the gathering. ids: indices (B, N) of the tokens; None:
        all. Clips of one frame (B, C, 1, H, W) are static clips of T equal frames: same tokens, for
        1/T of the work. Raises ValueError for other shapes.
        """
        num_frames = self.config["num_frames"]
        side = self.config["img_size"]
        expected_shape = (3, num_frames, side, side)
        is_static = clips.shape[2] == 1 < num_frames and ids is None
        if is_static:
            expected_shape = (3, 1, side, side)
        if clips.shape[1:] != expected_shape:
            raise ValueError(
                f"clips of shape {tuple(clips.shape)}: "
                f"this model takes (B, 3, {num_frames}, {side}, {side})"
            )
        dtype = self.patch_embed.proj.weight.dtype
        if is_static:
            patches = self.normalize(patchify(clips, 1, self.patch_size))
            frame_tokens = self.patch_embed.embed_static(patches.to(dtype))  # (B, h w, D)
            tokens = frame_tokens.repeat(1, self.grid[0], 1)  # (B, L, D)
        else:
            tubelets = self.normalize(patchify(clips, self.t_patch_size, self.patch_size, ids))
            tokens = self.patch_embed(tubelets.to(dtype))
        positions, class_position = self.positions()
        if ids is None:
            x = positions.repeat(len(clips), 1, 1)
        else:
            x = positions[ids]
        if class_position is not None:
            x = prepend_token(self.cls_token + class_position, x)
            tokens = pad_tokens(tokens, 1)
        return self.start_residual(x), tokens

    def start_residual(self, x: Tensor) -> Tensor:
        """Return tokens in the dtype of the residual stream."""
        return x.to(self.residual_dtype or x.dtype)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels (..., C, t, p, p) as floats, by `pixel_stats`; floats as they are."""
        if pixels.dtype != torch.uint8:
            return pixels
        if self.pixel_stats is None:
            raise ValueError("uint8 clips need pixel_stats: set the model's (mean, std) per color.")
        return normalize(pixels, *self.pixel_stats)

    def encode(self, clips: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the tokens after the blocks, before the norm: (B, [1 +] N, D)."""
        x, delta = self.run_blocks(self.blocks, *self.embed(clips, ids))
        return x + delta

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the blocks to tokens x + delta, see `Block`.

        In training, with a drop path rate, each branch is dropped for some clips. With
        activation_checkpointing the backward pass recomputes each block.
        """
        scales: list | Tensor = [None] * len(blocks)
        if self.keep_probs is not None and self.training:
            scales = drop_path_scales(self.keep_probs, len(x))
        recompute = self.activation_checkpointing and self.training
        for block, branch_scales in zip(blocks, scales, strict=True):
            if recompute:
                x, delta = checkpoint(block, x, delta, branch_scales, use_reentrant=False)
            else:
                x, delta = block(x, delta, branch_scales)
        return x, delta

    def forward(self, clips: Tensor) -> Tensor:
        """Return the tokens after the norm (B, [1 +] L, D) of clips, see `embed`."""
        return self.norm(self.encode(clips))

    def set_attention(self, device_type: str, dtype: torch.dtype) -> list[str]:
        """Choose the attention kernels for this device and (autocast) dtype, and describe them.

        Call it once after building the model; without it "auto" is "sdpa". Returns one line per
        head width, with the reason. Raises ValueError where the requested kernel cannot run.
        """
        kernels = {}  # by head width
        lines = []
        for module in self.modules():
            if not isinstance(module, Attention):
                continue
            width = module.head_dim
            if width not in kernels:
                tensors = (device_type, dtype, width)
                kernels[width], reason = choose_attention(module.attn, *tensors)
                name = describe_kernel(kernels[width], *tensors)
                lines.append(f"attention with head width {width}: {name} ({reason})")
            module.kernel = kernels[width]
        return lines

    def training_flops(self, tokens: int) -> float:
        """Return the FLOPs of forward and backward per clip, of embedding and blocks.

        tokens: patch tokens in the sequence. Counts matrix products, attention included, without
        recomputation: 2 per multiplication. The backward pass has two products for each one of the
        forward pass. For the embedding it has one, since pixels need no gradient.
        """
        c = self.config
        pixels = 3 * self.t_patch_size * self.patch_size**2
        embedding = 4 * tokens * pixels * c["embed_dim"]
        sequence = tokens + int(self.cls_embed)
        return embedding + block_flops(sequence, c["embed_dim"], c["depth"], c["mlp_ratio"])

    def compile_parts(self) -> None:
        """Compile the embedding and the blocks, one graph per width. State dict names stay."""
        self.compile_method("embed")
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(fullgraph=True, dynamic=False)

    def compile_method(self, name: str) -> None:
        """Replace a method of this object by its compiled form."""
        setattr(self, name, torch.compile(getattr(self, name), fullgraph=True, dynamic=False))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy gets: not the compiled methods, which use this object's weights."""
        state = super().__getstate__()
        compiled = [name for name in state if callable(getattr(type(self), name, None))]
        for name in compiled:
            del state[name]
        return state

    def init_weights(self, trunc_init: bool = False) -> None:
        """Initialize every parameter, see `init_parameters`."""
        init_parameters(self, trunc_init)


class VisionTransformer(VideoEncoder):
    """Classifier: mean of the patch tokens or class token -> norm -> dropout -> head.

    global_pool: use the mean of the patch tokens. attentive_pool: norm -> `AttentivePool` of all
    tokens -> dropout -> head instead.
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
        num_classes: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        dropout: float = 0.3,
        global_pool: bool = True,
        sep_pos_embed: bool = True,
        cls_embed: bool = True,
        no_qkv_bias: bool = False,
        attentive_pool: bool = False,
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
                "reading out the class token needs a class token. Use global_pool or cls_embed."
            )
        self.config |= {"num_classes": num_classes, "global_pool": global_pool}
        self.global_pool = global_pool
        self.attentive_pool: AttentivePool | None = None
        if attentive_pool:
            self.config["attentive_pool"] = True
            self.attentive_pool = AttentivePool(embed_dim, num_heads, mlp_ratio)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        self.init_weights()

    def forward_features(self, clips: Tensor) -> Tensor:
        """Return the pooled features (B, D) before dropout and head of clips (B, C, T, H, W)."""
        return self.pool(*self.run_blocks(self.blocks, *self.embed(clips)))

    def pool(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return the pooled features (B, D) of tokens x + delta (B, [1 +] L, D)."""
        x = x + delta
        if self.attentive_pool is not None:
            return self.attentive_pool(self.norm(x))
        if self.global_pool:
            pooled = x[:, int(self.cls_embed) :].mean(dim=1)
        else:
            pooled = x[:, 0]
        return self.norm(pooled)

    def compile_parts(self) -> None:
        """Compile the embedding, the blocks and the pooling in place."""
        super().compile_parts()
        self.compile_method("pool")

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits (B, classes) of clips, see `embed`."""
        return self.head(self.dropout(self.forward_features(clips)))

    def flops_per_clip(self) -> float:
        """Return the FLOPs of a training step per clip, see `training_flops`."""
        return self.training_flops(self.num_tokens) + 6 * self.head.weight.numel()
