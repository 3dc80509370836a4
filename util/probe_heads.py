"""Heads of a probe: several at once on the features of a frozen encoder, one per learning rate.

Shapes as in models_vit.py, and: H heads, K classes. Features are pooled (B, D) for a linear probe,
tokens (B, N, D) for an attentive one.
"""

import copy

import torch
from torch import Tensor, nn

from models_vit import AttentivePool, VisionTransformer
from util.optim import param_groups

VARIANCE_FLOOR = 1e-6  # the eps of BatchNorm


class ProbeHead(nn.Module):
    """A classifier's head on features: a linear map, of an attentive probe after its pool."""

    def __init__(self, pool: AttentivePool | None, head: nn.Linear):
        super().__init__()
        self.pool = copy.deepcopy(pool)
        self.head = copy.deepcopy(head)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, K) of features (B, D), or (B, N, D) for an attentive probe."""
        if self.pool is not None:
            features = self.pool(features)
        return self.head(features)


class ProbeHeads(nn.Module):
    """Heads that start with the same weights and are trained with different learning rates.

    Those of a linear probe read features without their mean and divided by their std: BatchNorm
    without affine parameters, as in He et al. 2021 (arXiv 2111.06377, appendix A.1), but with the
    statistics of the whole training set instead of a batch's. So logits do not depend on the other
    samples of a batch, nor on the number of processes.
    """

    mean: Tensor  # (D,), a buffer
    std: Tensor  # (D,), a buffer

    def __init__(self, model: VisionTransformer, count: int):
        """Copy the head of a model `count` times, with its attentive pool if it has one."""
        super().__init__()
        heads = [ProbeHead(model.attentive_pool, model.head) for _ in range(count)]
        self.heads = nn.ModuleList(heads)
        self.standardizes = model.attentive_pool is None
        if self.standardizes:
            width = model.config["embed_dim"]
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("std", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, H, K) of features (B, D), or (B, N, D) for an attentive probe."""
        if self.standardizes:
            features = (features - self.mean) / self.std
        return torch.stack([head(features) for head in self.heads], dim=1)

    @torch.no_grad()
    def standardize_by(self, features: Tensor) -> None:
        """Standardize features from now on by the mean and std of these features (n, D).

        The std has the floor of He et al.'s BatchNorm, so that noise in a constant feature remains
        small.
        """
        features = features.double()
        self.mean.copy_(features.mean(0))
        self.std.copy_((features.var(0, correction=0) + VARIANCE_FLOOR).sqrt())

    @torch.no_grad()
    def copy_to(self, model: VisionTransformer, index: int) -> None:
        """Make head `index` the head of a model, which then gives the logits of that head.

        The standardization becomes part of the linear map.
        """
        chosen = self.heads[index]
        assert isinstance(chosen, ProbeHead)
        weight: Tensor = chosen.head.weight
        bias: Tensor = chosen.head.bias
        if self.standardizes:
            weight = weight / self.std
            bias = bias - weight @ self.mean
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
        if model.attentive_pool is not None:
            assert chosen.pool is not None
            model.attentive_pool.load_state_dict(chosen.pool.state_dict())


def probe_param_groups(heads: ProbeHeads, lrs: list[float], weight_decay: float) -> list[dict]:
    """Return one group per head and decay; the factor of the learning rate is that of the head.

    1-d parameters and the queries do not decay.
    """

    def decays(name: str, parameter: Tensor) -> bool:
        return weight_decay > 0 and parameter.ndim > 1 and not name.endswith("pool.query")

    def lr_scale(name: str) -> float:
        return lrs[int(name.split(".")[1])]  # heads.0.pool.q.weight

    return param_groups(heads, weight_decay, decays, lr_scale)
