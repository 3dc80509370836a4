"""The same models in the simplest form: reference of the tests and baseline of the benchmark.

3-d convolution over all patches, three linears for q, k and v, tokens restored to their order, all
tokens predicted, softmax attention written out (or SDPA). Parameters have the names of
models_mae.py and models_vit.py, so state dicts fit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Softmax attention, heads split by hand."""

    def __init__(self, width: int, heads: int, bias: bool, sdpa: bool):
        super().__init__()
        self.heads = heads
        self.sdpa = sdpa
        self.q = nn.Linear(width, width, bias)
        self.k = nn.Linear(width, width, bias)
        self.v = nn.Linear(width, width, bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D) for tokens (B, N, D)."""
        b, n, d = x.shape
        q, k, v = (
            part(x).reshape(b, n, self.heads, d // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q @ k.transpose(2, 3)) * (d // self.heads) ** -0.5
            out = scores.softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class PlainMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D) for tokens (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, bias: bool, sdpa: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = PlainAttention(width, heads, bias, sdpa)
        self.mlp = PlainMlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D) for tokens (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainEmbed(nn.Module):
    """A 3-d convolution over all patches."""

    def __init__(self, width: int, t: int, p: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (t, p, p), (t, p, p))

    def forward(self, clips: Tensor) -> Tensor:
        """Return tokens (B, L, D) of clips (B, 3, T, H, W)."""
        return self.proj(clips).flatten(2).transpose(1, 2)


class PlainEncoder(nn.Module):
    """The common part of PlainMAE and PlainViT. config: that of the compared model."""

    def __init__(self, config: dict, sdpa: bool = False):
        super().__init__()
        self.c = config
        self.sdpa = sdpa
        self.t = config["t_patch_size"]
        self.p = config["patch_size"]
        self.steps = config["num_frames"] // self.t
        self.side = config["img_size"] // self.p
        width = config["embed_dim"]
        if config["cls_embed"]:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.add_positions("", width)
        self.patch_embed = PlainEmbed(width, self.t, self.p)
        self.blocks = self.make_blocks(width, config["depth"], config["num_heads"])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def make_blocks(self, width: int, depth: int, heads: int) -> nn.ModuleList:
        """Return a stack of blocks."""
        c = self.c
        return nn.ModuleList(
            PlainBlock(width, heads, c["mlp_ratio"], not c["no_qkv_bias"], self.sdpa)
            for _ in range(depth)
        )

    def add_positions(self, prefix: str, width: int) -> None:
        """Register position embeddings of the encoder ("") or the decoder ("decoder_")."""
        space = self.side**2
        extra = int(self.c["cls_embed"])
        lengths = {"pos_embed_spatial": space, "pos_embed_temporal": self.steps}
        if not self.c["sep_pos_embed"]:
            lengths = {"pos_embed": extra + self.steps * space}
        elif extra:
            lengths["pos_embed_class"] = 1
        for name, length in lengths.items():
            setattr(self, prefix + name, nn.Parameter(torch.zeros(1, length, width)))

    def positions(self, prefix: str) -> Tensor:
        """Return all positions (1, [1 +] L, D), that of the class token first if there is one."""
        if not self.c["sep_pos_embed"]:
            return getattr(self, prefix + "pos_embed")
        space = getattr(self, prefix + "pos_embed_spatial")
        time = getattr(self, prefix + "pos_embed_temporal")
        tokens = space.repeat(1, self.steps, 1) + torch.repeat_interleave(time, self.side**2, dim=1)
        if not self.c["cls_embed"]:
            return tokens
        return torch.cat([getattr(self, prefix + "pos_embed_class"), tokens], 1)

    def encode(self, clips: Tensor, keep: Tensor | None) -> Tensor:
        """Return the tokens before the norm. keep: indices (B, V) of visible tokens; None: all."""
        positions = self.positions("")
        extra = int(self.c["cls_embed"])
        x = self.patch_embed(clips) + positions[:, extra:]
        if keep is not None:
            x = torch.gather(x, 1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        if extra:
            x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


class PlainMAE(PlainEncoder):
    """The masked autoencoder with random masks."""

    def __init__(self, config: dict, sdpa: bool = False):
        super().__init__(config, sdpa)
        width = config["decoder_embed_dim"]
        self.pred_frames_per_tubelet = self.t * config["pred_t_dim"] // config["num_frames"]
        if config["cls_embed"]:
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.add_positions("decoder_", width)
        self.decoder_embed = nn.Linear(config["embed_dim"], width)
        self.decoder_blocks = self.make_blocks(
            width, config["decoder_depth"], config["decoder_num_heads"]
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, self.pred_frames_per_tubelet * self.p**2 * 3)

    def forward(self, clips: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
        """Return the loss of clips (B, 3, T, H, W) with mask noise (B, L)."""
        b, length = noise.shape
        extra = int(self.c["cls_embed"])
        visible = int(length * (1 - mask_ratio))
        order = noise.argsort(dim=1, stable=True)
        latent = self.norm(self.encode(clips, order[:, :visible]))
        x = self.decoder_embed(latent)[:, extra:]
        x = torch.cat([x, self.mask_token.expand(b, length - visible, -1)], 1)
        token_order = order.argsort(1)[:, :, None].expand(-1, -1, x.shape[2])
        x = torch.gather(x, 1, token_order)
        if extra:
            x = torch.cat([self.decoder_cls_token.expand(b, -1, -1), x], 1)
        x = x + self.positions("decoder_")
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, extra:]
        mask = torch.ones_like(noise, dtype=pred.dtype).scatter(1, order[:, :visible], 0.0)
        errors = ((pred - self.targets(clips)) ** 2).mean(-1)  # (B, L)
        return (errors * mask).sum() / mask.sum()

    def decoder_masked_loss(self, clips: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
        """Return the loss of a decoder that gets visible (B, V) and predicted (B, M) tokens alone.

        Clip by clip, with the tokens in their order. visible, predicted: indices.
        """
        extra = int(self.c["cls_embed"])
        positions = self.positions("decoder_")[0]  # ([1 +] L, E)
        errors = []
        for index, clip in enumerate(clips):
            seen, masked = visible[index].tolist(), predicted[index].tolist()
            latent = self.norm(self.encode(clip[None], visible[index : index + 1]))[0, extra:]
            embedded = dict(zip(seen, self.decoder_embed(latent), strict=True))
            tokens = sorted(seen + masked)
            rows = [embedded.get(i, self.mask_token[0, 0]) + positions[extra + i] for i in tokens]
            if extra:
                rows.insert(0, self.decoder_cls_token[0, 0] + positions[0])
            x = torch.stack(rows)[None]
            for block in self.decoder_blocks:
                x = block(x)
            pred = self.decoder_pred(self.decoder_norm(x))[0, extra:]
            target = self.targets(clip[None])[0]
            errors += [((pred[tokens.index(i)] - target[i]) ** 2).mean() for i in masked]
        return torch.stack(errors).mean()

    def targets(self, clips: Tensor) -> Tensor:
        """Return the pixels to predict (B, L, P) of clips (B, 3, T, H, W)."""
        last = clips.shape[2] - 1
        index = torch.linspace(0, last, self.c["pred_t_dim"], dtype=torch.float64).long()
        u = self.pred_frames_per_tubelet
        grid = (self.steps, u, self.side, self.p, self.side, self.p)
        frames = clips.index_select(2, index.to(clips.device)).reshape(len(clips), 3, *grid)
        target = frames.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(1, 3).flatten(2)
        if self.c["norm_pix_loss"]:
            mean = target.mean(-1, keepdim=True)
            std = (target.var(-1, keepdim=True) + 1e-6) ** 0.5
            target = (target - mean) / std
        return target


class PlainViT(PlainEncoder):
    """The classifier without drop path and dropout."""

    def __init__(self, config: dict, sdpa: bool = False):
        super().__init__(config, sdpa)
        self.head = nn.Linear(config["embed_dim"], config["num_classes"])

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        x = self.encode(clips, None)
        pooled = x[:, 0]
        if self.c["global_pool"]:
            pooled = x[:, int(self.c["cls_embed"]) :].mean(1)
        return self.head(self.norm(pooled))
