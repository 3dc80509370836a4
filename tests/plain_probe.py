"""The attentive probe in plain torch, and its training."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models_vit import AttentivePool


class PlainPool(nn.Module):
    """An attentive pool with torch's own attention, and the linear map after it."""

    def __init__(self, pool: AttentivePool, head: nn.Linear):
        super().__init__()
        width = head.in_features
        self.attention = nn.MultiheadAttention(width, pool.num_heads, batch_first=True)
        with torch.no_grad():
            maps = torch.cat([pool.q.weight, pool.k.weight, pool.v.weight])
            self.attention.in_proj_weight.copy_(maps)
            biases = torch.cat([pool.q.bias, torch.ones(width), pool.v.bias])
            self.attention.in_proj_bias.copy_(biases)
            self.attention.out_proj.load_state_dict(pool.proj.state_dict())
        self.query = nn.Parameter(pool.query.detach().clone())
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(*reversed(pool.mlp.fc1.weight.shape))
        self.fc2 = nn.Linear(*reversed(pool.mlp.fc2.weight.shape))
        self.head = nn.Linear(width, head.out_features)
        for mine, theirs in (
            (self.norm1, pool.norm1),
            (self.norm2, pool.norm2),
            (self.fc1, pool.mlp.fc1),
            (self.fc2, pool.mlp.fc2),
            (self.head, head),
        ):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, tokens):
        """Return logits (B, K) of tokens (B, N, D)."""
        query = self.query.expand(len(tokens), -1, -1)
        tokens = self.norm1(tokens)
        attended, _ = self.attention(query, tokens, tokens)
        pooled = query + attended
        pooled = pooled + self.fc2(F.gelu(self.fc1(self.norm2(pooled))))
        return self.head(pooled[:, 0])


def trained_plainly(head: nn.Module, features, labels, lr: float, batches: list) -> nn.Module:
    """Return the head after AdamW on these batches, with a cosine from lr to 0."""
    decayed = [p for name, p in head.named_parameters() if p.ndim > 1 and name != "query"]
    others = [p for name, p in head.named_parameters() if p.ndim == 1 or name == "query"]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        F.cross_entropy(head(features[rows]), labels[rows]).backward()
        optimizer.step()
    return head.eval()
