"""Spatiotemporal masked autoencoder.

The encoder sees a few tubelets of a clip, and a small decoder predicts the pixels of the hidden
ones. Shapes as in models_vit.py, and: V visible and K hidden tokens (V + K = L), M hidden tokens
that are predicted (M = K without decoder masking), E decoder width, u = t * pred_t_dim / T
predicted frames per tubelet, P = u * p * p * C values per token, in the order (frame, row, column,
color).

Feichtenhofer et al. 2022, arXiv 2205.09113; He et al. 2021, arXiv 2111.06377. Decoder masking:
Wang et al. 2023 (VideoMAE v2), arXiv 2303.16727.
"""

import torch
from torch import Tensor, nn

from models_vit import Block, Linear, VideoEncoder, block_flops, pad_tokens, patchify, prepend_token

MASK_TYPES = ("random", "tube", "temporal", "boundary")
DECODER_MASK_TYPES = ("cell", "random")


def make_mask(
    noise: Tensor, grid: tuple[int, int, int], mask_ratio: float, mask_type: str
) -> tuple[Tensor, Tensor]:
    """Return the indices of the visible tokens (B, V) and the hidden ones (B, K), in token order.

    MAE's random masking, and three other types. noise: (B, L) float32; grid: (t', h, w).
    int(n * (1 - mask_ratio)) of n tokens stay visible:

    * random: those with the smallest noise
    * tube: the same positions in every tubelet, by the noise of the first h * w tokens
    * temporal: the first tokens (predict the future)
    * boundary: the first and last tokens (interpolate)

    Raises ValueError for an unknown type, and for a ratio that leaves no token visible or hidden.
    """
    b, n = noise.shape
    grid_t, h, w = grid
    order = torch.arange(n, device=noise.device)
    if mask_type == "tube":
        n = h * w
        noise = noise[:, :n]
    elif mask_type == "temporal":
        noise = order.expand(b, n)
    elif mask_type == "boundary":
        noise = torch.minimum(order, n - 1 - order).expand(b, n)
    elif mask_type != "random":
        raise ValueError(f"unknown mask type {mask_type!r}. Choose one of {', '.join(MASK_TYPES)}.")
    keep = int(n * (1 - mask_ratio))
    if not 0 < mask_ratio < 1 or not keep:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps {keep} of {n} tokens. "
            "Choose one between 0 and 1 that keeps at least one token."
        )
    ranked = noise.argsort(dim=1, stable=True)
    visible = ranked[:, :keep].sort(dim=1).values
    hidden = ranked[:, keep:].sort(dim=1).values
    if mask_type == "tube":
        first_token = torch.arange(grid_t, device=noise.device)[:, None] * (h * w)  # (t', 1)
        visible = (first_token + visible[:, None]).flatten(1)
        hidden = (first_token + hidden[:, None]).flatten(1)
    return visible, hidden


def unused_noise(
    noise: Tensor, visible: Tensor, grid: tuple[int, int, int], mask_type: str
) -> Tensor:
    """Return noise (B, L) that orders the hidden tokens independently of which ones are hidden.

    noise, grid, mask_type: as for `make_mask`; visible: its result (B, V). The noise of the hidden
    tokens is exchangeable in all types but "tube". There it chose the positions by its first h * w
    values, whose hidden ones are uniform above the largest visible one. Only these are scaled.
    """
    if mask_type != "tube":
        return noise
    grid_t, h, w = grid
    first, others = noise.split([h * w, noise.shape[1] - h * w], dim=1)
    positions = visible[:, : visible.shape[1] // grid_t]  # of the first tubelets
    threshold = first.gather(1, positions).amax(dim=1, keepdim=True)
    return torch.cat([(first - threshold) / (1 - threshold), others], dim=1)


def cell_turns(noise: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return the turn (B, L) of each token, 0 to 3, in VideoMAE v2's running cells.

    A cell has 2 x 2 positions, one for each turn. The turns move on by one position with each
    tubelet, so four tubelets give each position every turn once. Where they begin in the first
    tubelet is random: it is taken from the 20th binary digit of a noise value, and the mask depends
    on the digits before.
    """
    t, h, w = grid
    tubelet = torch.arange(t, device=noise.device)[:, None, None]
    row = torch.arange(h, device=noise.device)[:, None] % 2
    column = torch.arange(w, device=noise.device) % 2
    turns = (tubelet + 2 * row + column).flatten()  # (L,)
    start = (noise[:, -1:] * 2**20).long()  # (B, 1)
    return (turns + start) % 4


def choose_predicted(
    hidden: Tensor,
    noise: Tensor,
    grid: tuple[int, int, int],
    decoder_mask_ratio: float,
    decoder_mask_type: str,
) -> Tensor:
    """Return the hidden tokens that the decoder predicts (B, M), in token order.

    M = int(K * (1 - decoder_mask_ratio)) for every clip. hidden: indices (B, K); noise: as
    `unused_noise` returns it; grid: (t', h, w). The chosen tokens are:

    * random: those with the smallest noise
    * cell: those whose turn comes first (see `cell_turns`), and among equals the smallest noise

    VideoMAE v2 draws the decoder's tokens from all L, and its loss is on the hidden ones of them.
    Here they are drawn from the hidden ones, so that all clips have equally many.
    Raises ValueError for an unknown type, and for a ratio that leaves no token to predict.
    """
    if decoder_mask_type not in DECODER_MASK_TYPES:
        raise ValueError(
            f"unknown decoder mask type {decoder_mask_type!r}. "
            f"Choose one of {', '.join(DECODER_MASK_TYPES)}."
        )
    count = hidden.shape[1]
    if not 0 <= decoder_mask_ratio < 1 or int(count * (1 - decoder_mask_ratio)) < 1:
        raise ValueError(
            f"decoder_mask_ratio {decoder_mask_ratio} leaves none of {count} hidden tokens to "
            "predict. Choose one from 0 to below 1 that leaves at least one token."
        )
    if decoder_mask_type == "cell":
        noise = noise + cell_turns(noise, grid)
    ranked = noise.gather(1, hidden).argsort(dim=1, stable=True)
    chosen = ranked[:, : int(count * (1 - decoder_mask_ratio))]
    return hidden.gather(1, chosen).sort(dim=1).values


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], u: int, p: int) -> Tensor:
    """Return frames (B, C, t' * u, H, W) from the pixels of all tokens (B, L, P)."""
    t, h, w = grid
    x = tokens.view(len(tokens), t, h, w, u, p, p, 3)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), 3, t * u, h * p, w * p)


def normalize_colors(values: Tensor, pixel_std: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return VideoMAE's targets (B, N, P), and the mean and std (B, N, P) that normalize them.

    Each color of a patch is normalized by its own mean and unbiased std + 1e-6, which is meant for
    pixels in [0, 1]. values: pixels (B, N, P) that were divided by pixel_std, so 1e-6 is too.
    Tong et al. 2022, arXiv 2203.12602, and its released code.
    """
    colors = values.unflatten(2, (-1, 3))  # (B, N, u p p, C)
    epsilon = 1e-6 / values.new_tensor(pixel_std)
    mean = colors.mean(dim=2, keepdim=True)
    std = colors.std(dim=2, keepdim=True) + epsilon
    normalized = (colors - mean) / std
    return (
        normalized.flatten(2),
        mean.expand_as(colors).flatten(2),
        std.expand_as(colors).flatten(2),
    )


def index_mask(ids: Tensor, num_tokens: int) -> Tensor:
    """Return the mask (B, L) bool that is True at these token indices (B, N)."""
    mask = torch.zeros(len(ids), num_tokens, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, ids, True)


class MaskedAutoencoderViT(VideoEncoder):
    """The encoder, and a narrow decoder that reconstructs the pixels of the hidden tokens.

    Raises ValueError for sizes that do not fit each other.
    """

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
                f"pred_t_dim {pred_t_dim} does not fit num_frames {num_frames} and "
                f"t_patch_size {t_patch_size}. Make t_patch_size * pred_t_dim / num_frames "
                "a whole number of frames per tubelet."
            )
        self.config |= {
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "pred_t_dim": pred_t_dim,
            "norm_pix_loss": norm_pix_loss,
        }
        self.norm_pix_loss = norm_pix_loss
        self.pred_t_dim = pred_t_dim
        self.pred_frames_per_tubelet = t_patch_size * pred_t_dim // num_frames
        self.add_decoder(attn)
        self.init_weights(trunc_init)

    def add_decoder(self, attn: str) -> None:
        """Register the modules and parameters of the decoder that `config` describes.

        Its blocks have the encoder's MLP ratio, as those of VideoMAE v2 (arXiv 2303.16727).
        Optimizer states index parameters in the order of registration: do not change it.
        """
        c = self.config
        width = c["decoder_embed_dim"]
        if self.cls_embed:
            self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = [name for name in self._parameters if name.startswith("pos_embed")]
        for name in positions:  # move them behind decoder_cls_token
            self.register_parameter(name, self._parameters.pop(name))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.add_positions("decoder_", width)
        self.decoder_embed = Linear(c["embed_dim"], width)
        num_heads = c["decoder_num_heads"]
        qkv_bias = not c["no_qkv_bias"]
        self.decoder_blocks = nn.ModuleList(
            Block(width, num_heads, c["mlp_ratio"], qkv_bias, attn)
            for _ in range(c["decoder_depth"])
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        num_values = self.pred_frames_per_tubelet * self.patch_size**2 * 3  # P
        self.decoder_pred = Linear(width, num_values)

    @property
    def normalizes_targets(self) -> bool:
        """Whether each target patch is normalized by its own statistics, see `patch_targets`."""
        return self.norm_pix_loss or self.config.get("targets") == "videomae"

    def check_mask(
        self, mask_ratio: float, mask_type: str, decoder_mask_ratio: float = 0.0
    ) -> None:
        """Raise ValueError for masks that this model cannot make."""
        self.mask_sizes(mask_ratio, mask_type, decoder_mask_ratio)

    def mask_sizes(
        self, mask_ratio: float, mask_type: str, decoder_mask_ratio: float = 0.0
    ) -> tuple[int, int]:
        """Return the numbers V of visible and M of predicted tokens.

        Raises ValueError as `make_mask` and `choose_predicted`.
        """
        noise = torch.zeros(1, self.num_tokens)
        visible, hidden = make_mask(noise, self.grid, mask_ratio, mask_type)
        predicted = choose_predicted(hidden, noise, self.grid, decoder_mask_ratio, "random")
        return visible.shape[1], predicted.shape[1]

    def flops_per_clip(
        self, mask_ratio: float, mask_type: str, decoder_mask_ratio: float = 0.0
    ) -> float:
        """Return the FLOPs of a training step per clip, see `training_flops`.

        The encoder processes the visible tokens, the decoder these and the predicted ones.
        """
        c = self.config
        visible, predicted = self.mask_sizes(mask_ratio, mask_type, decoder_mask_ratio)
        sequence = visible + predicted + int(self.cls_embed)
        decoder = block_flops(sequence, c["decoder_embed_dim"], c["decoder_depth"], c["mlp_ratio"])
        decoder_embed = 6 * visible * self.decoder_embed.weight.numel()
        decoder_pred = 6 * predicted * self.decoder_pred.weight.numel()
        return self.training_flops(visible) + decoder + decoder_embed + decoder_pred

    def compile_parts(self) -> None:
        """Compile the embeddings, the blocks and the prediction with its loss in place."""
        super().compile_parts()
        self.compile_method("embed_for_decoder")
        self.compile_method("predict_hidden")

    def embed_for_decoder(
        self, x: Tensor, delta: Tensor, visible: Tensor, predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's positions and its tokens without them, each (B, [1 +] V + M, E).

        Visible tokens come first. They are not sorted: each one carries its position, and attention
        ignores the order. x + delta: the encoder's output (B, [1 +] V, D), before the norm.
        visible: as `make_mask` returns it; predicted: as `choose_predicted` returns it.
        """
        first_patch = int(self.cls_embed)
        latent = self.norm(x + delta)[:, first_patch:]
        positions, class_position = self.positions("decoder_")
        masked = self.mask_token + positions[predicted]
        x = torch.cat([positions[visible], masked], dim=1)
        if class_position is not None:
            x = prepend_token(self.decoder_cls_token + class_position, x)
        tokens = pad_tokens(self.decoder_embed(latent), first_patch, predicted.shape[1])
        return self.start_residual(x), tokens

    def predict(self, x: Tensor) -> Tensor:
        """Return the pixels (B, N, P) of decoder tokens (B, N, E)."""
        return self.decoder_pred(self.decoder_norm(x))

    def predict_hidden(
        self, x: Tensor, delta: Tensor, clips: Tensor, predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean squared error (scalar) and the pixels (B, M, P) of the predicted tokens.

        x + delta: the decoder's output (B, [1 +] V + M, E).
        """
        pred = self.predict((x + delta)[:, -predicted.shape[1] :])
        return self.squared_errors(pred, clips, predicted).mean(), pred

    def target_frames(self, clips: Tensor) -> Tensor:
        """Return the frames to predict (B, C, pred_t_dim, H, W) of clips (B, C, T, H, W).

        They are evenly spaced and include the first and the last frame.
        """
        num_frames = clips.shape[2]
        if self.pred_t_dim == num_frames:
            return clips
        # floor(i * (T - 1) / (pred_t_dim - 1)), in integers
        steps = max(self.pred_t_dim - 1, 1)
        index = torch.arange(self.pred_t_dim, device=clips.device) * (num_frames - 1) // steps
        return clips.index_select(2, index)

    def patch_targets(
        self, clips: Tensor, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pixels to predict (B, N, P), and the mean and std of each patch (B, N, 1).

        ids: indices (B, N) of the tokens; None: all. With norm_pix_loss the pixels are normalized
        by that mean and std. Without it they are the plain pixels, and mean and std are 0 and 1.
        arXiv 2111.06377, section 3 ("Reconstruction target").

        For VideoMAE's decoders (config["targets"] is "videomae") see `normalize_colors`.
        """
        frames = self.target_frames(clips)
        values = self.normalize(
            patchify(frames, self.pred_frames_per_tubelet, self.patch_size, ids)
        )
        values = values.permute(0, 1, 3, 4, 5, 2).flatten(2)  # (B, N, C, u, p, p) -> (B, N, P)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.config.get("targets") == "videomae":
            assert self.pixel_stats is not None  # whoever sets the targets sets both
            return normalize_colors(values, self.pixel_stats[1])
        if not self.norm_pix_loss:
            zero = values.new_zeros(1, 1, 1)
            return values, zero, zero + 1
        mean = values.mean(dim=2, keepdim=True)
        std = (values.var(dim=2, keepdim=True) + 1e-6).sqrt()
        return (values - mean) / std, mean, std

    def squared_errors(self, pred: Tensor, clips: Tensor, predicted: Tensor) -> Tensor:
        """Return the squared error (B, M, P) of each value of the predicted tokens.

        It is computed in float32 or wider.
        """
        target, _, _ = self.patch_targets(clips, predicted)
        return (pred.to(target.dtype) - target).square()

    def encode_and_decode(
        self,
        clips: Tensor,
        mask_ratio: float,
        mask_type: str,
        noise: Tensor | None,
        decoder_mask_ratio: float = 0.0,
        decoder_mask_type: str = "cell",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mask the clips, encode what is visible, and decode it with the tokens to predict.

        noise: (B, L) float32 in [0, 1) for both masks, drawn here if None; in training the data set
        draws it. decoder_mask_ratio, decoder_mask_type: see `choose_predicted`.
        Returns x and delta of the decoder's tokens, each (B, [1 +] V + M, E), then the indices of
        the visible tokens (B, V) and of the predicted ones (B, M).
        """
        if noise is None:
            noise = torch.rand(len(clips), self.num_tokens, device=clips.device)
        visible, hidden = make_mask(noise, self.grid, mask_ratio, mask_type)
        predicted = hidden
        if decoder_mask_ratio != 0:
            noise = unused_noise(noise, visible, self.grid, mask_type)
            predicted = choose_predicted(
                hidden, noise, self.grid, decoder_mask_ratio, decoder_mask_type
            )
        x, delta = self.run_blocks(self.blocks, *self.embed(clips, visible))
        x, delta = self.embed_for_decoder(x, delta, visible, predicted)
        x, delta = self.run_blocks(self.decoder_blocks, x, delta)
        return x, delta, visible, predicted

    def forward(  # type: ignore[override]  # besides clips it takes a mask
        self,
        clips: Tensor,
        mask_ratio: float = 0.9,
        mask_type: str = "random",
        noise: Tensor | None = None,
        decoder_mask_ratio: float = 0.0,
        decoder_mask_type: str = "cell",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, decode, and compare with the pixels of the hidden tokens.

        clips: (B, C, T, H, W) float, or uint8 with `pixel_stats` set. noise and the decoder's mask:
        see `encode_and_decode`. Returns loss (scalar), pred (B, K, P) of the hidden tokens in token
        order, and mask (B, L) bool, True = hidden. With a decoder mask, pred (B, M, P) and mask are
        those of the predicted tokens alone.
        """
        x, delta, _, predicted = self.encode_and_decode(
            clips, mask_ratio, mask_type, noise, decoder_mask_ratio, decoder_mask_type
        )
        loss, pred = self.predict_hidden(x, delta, clips, predicted)
        return loss, pred, index_mask(predicted, self.num_tokens)

    @torch.no_grad()
    def reconstruct(
        self,
        clips: Tensor,
        mask_ratio: float = 0.9,
        mask_type: str = "random",
        noise: Tensor | None = None,
        true_statistics: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return original, predicted and hidden frames, each (B, C, pred_t_dim, H, W).

        All tokens are predicted, the visible ones too. hidden is bool, True where the encoder saw
        nothing. Where targets are normalized, the predicted patches get the mean and std of the
        true patches; true_statistics=False leaves them as predicted, with mean 0 and std 1.
        """
        x, delta, visible, hidden = self.encode_and_decode(clips, mask_ratio, mask_type, noise)
        decoded = (x + delta)[:, int(self.cls_embed) :]
        ids_restore = torch.cat([visible, hidden], dim=1).argsort(dim=1)  # (B, L)
        decoded = decoded.gather(1, ids_restore[:, :, None].expand_as(decoded))
        pred = self.predict(decoded).float()
        if true_statistics:
            _, mean, std = self.patch_targets(clips)
            pred = pred * std + mean
        mask = index_mask(hidden, self.num_tokens)[:, :, None].expand_as(pred)
        u = self.pred_frames_per_tubelet
        p = self.patch_size
        predicted = unpatchify(pred, self.grid, u, p)
        return self.target_frames(clips), predicted, unpatchify(mask, self.grid, u, p)
