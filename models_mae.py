"""Spatiotemporal masked autoencoder: the encoder sees few tubelets of a clip, a small decoder predicts the hidden ones.

Shapes as in models_vit.py, and: V visible and K hidden tokens (V + K = L), E decoder width, u = t * pred_t_dim / T
predicted frames per tubelet, P = u * p * p * C values per token, ordered (frame, row, column, colour).

Feichtenhofer et al. 2022, arXiv 2205.09113; He et al. 2021, arXiv 2111.06377.
"""

import torch
from torch import Tensor, nn

from models_vit import Block, VideoEncoder, block_flops, tubelets

MASK_TYPES = ("random", "tube", "temporal", "boundary")


def split_tokens(
    noise: Tensor, grid: tuple[int, int, int], mask_ratio: float, mask_type: str
) -> tuple[Tensor, Tensor]:
    """Which tokens stay and which are hidden: token numbers (B, V) and (B, K), each in token order.

    noise (B, L) float32 decides for `random`: the smallest stay. `tube` sorts its first h*w columns and keeps the same
    places in every tubelet; `temporal` keeps the earliest tokens, `boundary` the first and the last ones.
    int(n * (1 - mask_ratio)) of n stay. Raises ValueError if that is none, or for an unknown type.
    """
    b, n = noise.shape
    t, space = grid[0], grid[1] * grid[2]
    order = torch.arange(n, device=noise.device)
    if mask_type == "tube":
        n, noise = space, noise[:, :space]
    elif mask_type == "temporal":
        noise = order.expand(b, n)
    elif mask_type == "boundary":
        noise = torch.minimum(order, n - 1 - order).expand(b, n)
    elif mask_type != "random":
        raise ValueError(f"unknown mask type {mask_type!r}: choose one of {', '.join(MASK_TYPES)}")
    keep = int(n * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or not keep:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps {keep} of {n} tokens: it must lie in (0, 1) and leave at least one"
        )
    ranked = noise.argsort(dim=1, stable=True)
    visible, hidden = ranked[:, :keep].sort(dim=1).values, ranked[:, keep:].sort(dim=1).values
    if mask_type == "tube":
        start = (torch.arange(t, device=noise.device) * space)[:, None]  # (t', 1)
        visible, hidden = ((start + ids[:, None]).flatten(1) for ids in (visible, hidden))
    return visible, hidden


def untubelets(tokens: Tensor, grid: tuple[int, int, int], u: int, p: int) -> Tensor:
    """Tokens (B, L, P) back to frames (B, C, t' * u, H, W)."""
    t, h, w = grid
    x = tokens.view(len(tokens), t, h, w, u, p, p, 3)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), 3, t * u, h * p, w * p)


class MaskedAutoencoderViT(VideoEncoder):
    """The encoder, plus a narrow decoder that reconstructs the pixels of the hidden tokens."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        num_frames: int,
        t_patch_size: int,
        pred_t_dim: int,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        sep_pos_embed: bool = True,
        cls_embed: bool = True,
        no_qkv_bias: bool = False,
        trunc_init: bool = False,
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
            sep_pos_embed=sep_pos_embed,
            cls_embed=cls_embed,
            no_qkv_bias=no_qkv_bias,
            attn=attn,
        )
        if pred_t_dim < 1 or (t_patch_size * pred_t_dim) % num_frames:
            raise ValueError(
                f"pred_t_dim {pred_t_dim} does not fit num_frames {num_frames} and t_patch_size {t_patch_size}: "
                f"t_patch_size * pred_t_dim / num_frames must be a whole number of frames per tubelet"
            )
        self.config |= {
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "pred_t_dim": pred_t_dim,
            "norm_pix_loss": norm_pix_loss,
        }
        self.norm_pix_loss, self.pred_t_dim = norm_pix_loss, pred_t_dim
        self.u = t_patch_size * pred_t_dim // num_frames

        if cls_embed:
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        for name in [name for name in self._parameters if name.startswith("pos_embed")]:
            self.register_parameter(
                name, self._parameters.pop(name)
            )  # optimizer states index parameters in this order
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.add_positions("decoder_", decoder_embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, not no_qkv_bias, attn)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.u * patch_size * patch_size * 3)
        self.init_weights(trunc_init)

    def check_mask(self, mask_ratio: float, mask_type: str) -> None:
        """Raises ValueError for a mask that this model cannot make."""
        split_tokens(torch.zeros(1, self.num_tokens), self.grid, mask_ratio, mask_type)

    def flops_per_clip(self, mask_ratio: float, mask_type: str) -> float:
        """FLOPs of a training step per clip, see `training_flops`: visible tokens in the encoder, hidden ones predicted."""
        visible, hidden = (
            ids.shape[1]
            for ids in split_tokens(
                torch.zeros(1, self.num_tokens), self.grid, mask_ratio, mask_type
            )
        )
        c, tokens = self.config, self.num_tokens + int(self.cls_embed)
        decoder = block_flops(tokens, c["decoder_embed_dim"], c["decoder_depth"], c["mlp_ratio"])
        ends = 6 * (
            visible * self.decoder_embed.weight.numel() + hidden * self.decoder_pred.weight.numel()
        )
        return self.training_flops(visible) + decoder + ends

    def compile_parts(self) -> None:
        """torch.compile in place: the blocks, and the loss."""
        super().compile_parts()
        self.reconstruction_loss = torch.compile(
            self.reconstruction_loss, fullgraph=True, dynamic=False
        )

    def decode(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Decoder output of every token, visible ones first: latent (B, [1 +] V, D) -> (B, V + K, E), after the norm.

        The tokens are not put back in place: each carries its position, and attention does not care about order.
        """
        positions, class_position = self.positions("decoder_")
        x = self.decoder_embed(latent[:, int(self.cls_embed) :]) + positions[visible]
        masked = self.mask_token + positions[hidden]
        x = torch.cat([x, masked.to(x.dtype)], dim=1)
        if self.cls_embed:
            x = torch.cat(
                [(self.decoder_cls_token + class_position).expand(len(x), -1, -1).to(x.dtype), x],
                dim=1,
            )
        return self.through(self.decoder_blocks, x)[:, int(self.cls_embed) :]

    def predict(self, x: Tensor) -> Tensor:
        """Decoder tokens (B, N, E) -> pixels (B, N, P)."""
        return self.decoder_pred(self.decoder_norm(x))

    def target_frames(self, clips: Tensor) -> Tensor:
        """The frames that are predicted: (B, C, T, H, W) -> (B, C, pred_t_dim, H, W), evenly spread, ends included."""
        frames = clips.shape[2]
        if self.pred_t_dim == frames:
            return clips
        steps = max(self.pred_t_dim - 1, 1)  # floor(i (T - 1) / (pred_t_dim - 1)), in whole numbers
        index = torch.arange(self.pred_t_dim, device=clips.device) * (frames - 1) // steps
        return clips.index_select(2, index)

    def targets(self, clips: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels to predict (B, N, P) of the tokens `ids`, or of all, with the mean and deviation (B, N, 1) taken out.

        Without norm_pix_loss these are the plain pixels, 0 and 1. arXiv 2111.06377, section 3 ("Reconstruction target").
        """
        values = tubelets(
            self.target_frames(clips), self.u, self.patch_size, ids
        )  # (B, N, C, u, p, p)
        values = values.permute(0, 1, 3, 4, 5, 2).flatten(2)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if not self.norm_pix_loss:
            zero = values.new_zeros(1, 1, 1)
            return values, zero, zero + 1
        mean = values.mean(dim=2, keepdim=True)
        deviation = (values.var(dim=2, keepdim=True) + 1e-6).sqrt()
        return (values - mean) / deviation, mean, deviation

    def reconstruction_loss(self, pred: Tensor, clips: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of pred (B, K, P) over the hidden tokens: a scalar, in float32 at least."""
        target, _, _ = self.targets(clips, hidden)
        return (pred.to(target.dtype) - target).square().mean()

    def forward(
        self,
        clips: Tensor,
        mask_ratio: float = 0.9,
        mask_type: str = "random",
        noise: Tensor | None = None,
    ):
        """One pass of masked reconstruction.

        clips (B, C, T, H, W) float; noise (B, L) float32, the draw that a random mask sorts (made here if None).
        Returns loss (scalar), pred (B, K, P) of the hidden tokens in token order, mask (B, L) bool, True = hidden.
        """
        if noise is None:
            noise = torch.rand(len(clips), self.num_tokens, device=clips.device)
        visible, hidden = split_tokens(noise, self.grid, mask_ratio, mask_type)
        latent = self.norm(self.encode(clips, visible))
        pred = self.predict(self.decode(latent, visible, hidden)[:, visible.shape[1] :])
        mask = torch.ones(noise.shape, dtype=torch.bool, device=clips.device).scatter_(
            1, visible, False
        )
        return self.reconstruction_loss(pred, clips, hidden), pred, mask

    @torch.no_grad()
    def reconstruct(
        self,
        clips: Tensor,
        mask_ratio: float = 0.9,
        mask_type: str = "random",
        noise: Tensor | None = None,
        true_statistics: bool = True,
    ):
        """Pictures of what the model does: frames (B, C, pred_t_dim, H, W) original, predicted (every token, visible
        ones too) and hidden (bool, True where the encoder saw nothing).

        With norm_pix_loss each predicted patch gets the true mean and deviation back, or with true_statistics=False stays as
        it is predicted, with mean 0 and deviation 1.
        """
        if noise is None:
            noise = torch.rand(len(clips), self.num_tokens, device=clips.device)
        visible, hidden = split_tokens(noise, self.grid, mask_ratio, mask_type)
        decoded = self.decode(self.norm(self.encode(clips, visible)), visible, hidden)
        place = torch.cat([visible, hidden], dim=1).argsort(
            dim=1
        )  # where token i stands in the decoder's sequence
        decoded = decoded.gather(1, place[:, :, None].expand_as(decoded))
        pred = self.predict(decoded).float()
        if true_statistics:
            _, mean, deviation = self.targets(clips)
            pred = pred * deviation + mean
        mask = torch.ones(noise.shape, dtype=torch.bool, device=clips.device).scatter_(
            1, visible, False
        )
        mask = mask[:, :, None].expand_as(pred)
        return (
            self.target_frames(clips),
            untubelets(pred, self.grid, self.u, self.patch_size),
            untubelets(mask, self.grid, self.u, self.patch_size),
        )
