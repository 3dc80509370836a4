"""The same models written in the plainest way: the oracle of the tests and the opponent in the benchmark.

3-d convolution over all patches, three linears for q, k and v, tokens put back in place, every token predicted, softmax
attention written out (or SDPA). Parameters have the names of models_mae.py and models_vit.py, so state dicts fit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Softmax attention, heads split by hand."""

    def __init__(self, width: int, heads: int, bias: bool, sdpa: bool):
        super().__init__()
        self.heads, self.sdpa = heads, sdpa
        self.q, self.k, self.v = (
            nn.Linear(width, width, bias),
            nn.Linear(width, width, bias),
            nn.Linear(width, width, bias),
        )
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        q, k, v = (
            part(x).reshape(b, n, self.heads, d // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(2, 3)) * (d // self.heads) ** -0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class PlainMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class PlainBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, bias: bool, sdpa: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = (
            PlainAttention(width, heads, bias, sdpa),
            PlainMlp(width, int(width * mlp_ratio)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainEmbed(nn.Module):
    """A 3-d convolution over all patches."""

    def __init__(self, width: int, t: int, p: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (t, p, p), (t, p, p))

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, L, D)."""
        return self.proj(clips).flatten(2).transpose(1, 2)


class PlainEncoder(nn.Module):
    """What PlainMAE and PlainViT share. config: that of the model it stands for."""

    def __init__(self, config: dict, sdpa: bool = False):
        super().__init__()
        self.c, self.sdpa = config, sdpa
        self.t, self.p, width = config["t_patch_size"], config["patch_size"], config["embed_dim"]
        self.steps, self.side = config["num_frames"] // self.t, config["img_size"] // self.p
        if config["cls_embed"]:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.add_positions("", width)
        self.patch_embed = PlainEmbed(width, self.t, self.p)
        self.blocks = self.make_blocks(width, config["depth"], config["num_heads"])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def make_blocks(self, width: int, depth: int, heads: int) -> nn.ModuleList:
        """A stack of blocks."""
        c = self.c
        return nn.ModuleList(
            PlainBlock(width, heads, c["mlp_ratio"], not c["no_qkv_bias"], self.sdpa)
            for _ in range(depth)
        )

    def add_positions(self, prefix: str, width: int) -> None:
        """Position embeddings of encoder ("") or decoder ("decoder_")."""
        space, extra = self.side**2, int(self.c["cls_embed"])
        if not self.c["sep_pos_embed"]:
            setattr(
                self,
                prefix + "pos_embed",
                nn.Parameter(torch.zeros(1, extra + self.steps * space, width)),
            )
            return
        setattr(self, prefix + "pos_embed_spatial", nn.Parameter(torch.zeros(1, space, width)))
        setattr(
            self, prefix + "pos_embed_temporal", nn.Parameter(torch.zeros(1, self.steps, width))
        )
        if extra:
            setattr(self, prefix + "pos_embed_class", nn.Parameter(torch.zeros(1, 1, width)))

    def positions(self, prefix: str) -> Tensor:
        """All positions, class token first if there is one: (1, [1 +] L, D)."""
        if not self.c["sep_pos_embed"]:
            return getattr(self, prefix + "pos_embed")
        space, time = (
            getattr(self, prefix + "pos_embed_spatial"),
            getattr(self, prefix + "pos_embed_temporal"),
        )
        tokens = space.repeat(1, self.steps, 1) + torch.repeat_interleave(time, self.side**2, dim=1)
        return (
            torch.cat([getattr(self, prefix + "pos_embed_class"), tokens], 1)
            if self.c["cls_embed"]
            else tokens
        )

    def encode(self, clips: Tensor, keep: Tensor | None) -> Tensor:
        """Encoder tokens before the norm; keep (B, V): the tokens that stay, None for all."""
        x, positions, extra = self.patch_embed(clips), self.positions(""), int(self.c["cls_embed"])
        x = x + positions[:, extra:]
        if keep is not None:
            x = torch.gather(x, 1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        if extra:
            x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


class PlainMAE(PlainEncoder):
    """Masked autoencoder with random masks."""

    def __init__(self, config: dict, sdpa: bool = False):
        super().__init__(config, sdpa)
        width = config["decoder_embed_dim"]
        self.u = self.t * config["pred_t_dim"] // config["num_frames"]
        if config["cls_embed"]:
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.add_positions("decoder_", width)
        self.decoder_embed = nn.Linear(config["embed_dim"], width)
        self.decoder_blocks = self.make_blocks(
            width, config["decoder_depth"], config["decoder_num_heads"]
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, self.u * self.p**2 * 3)

    def forward(self, clips: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
        """The loss of clips (B, 3, T, H, W) with mask noise (B, L)."""
        b, length, extra = len(clips), noise.shape[1], int(self.c["cls_embed"])
        visible = int(length * (1 - mask_ratio))
        order = noise.argsort(dim=1, stable=True)
        latent = self.norm(self.encode(clips, order[:, :visible]))
        x = self.decoder_embed(latent)[:, extra:]
        x = torch.cat([x, self.mask_token.expand(b, length - visible, -1)], 1)
        x = torch.gather(
            x, 1, order.argsort(1)[:, :, None].expand(-1, -1, x.shape[2])
        )  # back in place
        if extra:
            x = torch.cat([self.decoder_cls_token.expand(b, -1, -1), x], 1)
        x = x + self.positions("decoder_")
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, extra:]

        index = (
            torch.linspace(0, clips.shape[2] - 1, self.c["pred_t_dim"], dtype=torch.float64)
            .long()
            .to(clips.device)
        )
        frames = clips.index_select(2, index).reshape(
            b, 3, self.steps, self.u, self.side, self.p, self.side, self.p
        )
        target = frames.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, length, -1)
        if self.c["norm_pix_loss"]:
            target = (target - target.mean(-1, keepdim=True)) / (
                target.var(-1, keepdim=True) + 1e-6
            ) ** 0.5
        mask = torch.ones_like(noise, dtype=pred.dtype).scatter(1, order[:, :visible], 0.0)
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


class PlainViT(PlainEncoder):
    """The classifier, without drop path and dropout."""

    def __init__(self, config: dict, sdpa: bool = False):
        super().__init__(config, sdpa)
        self.head = nn.Linear(config["embed_dim"], config["num_classes"])

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, classes)."""
        x, extra = self.encode(clips, None), int(self.c["cls_embed"])
        return self.head(self.norm(x[:, extra:].mean(1) if self.c["global_pool"] else x[:, 0]))
