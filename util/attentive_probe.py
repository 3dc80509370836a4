"""The attentive probe of pretraining: a head on the tokens of labeled clips, at a fixed cost.

The head is that of `finetune.py --probe attentive`, with one learning rate and a fixed number of
updates. Rank 0 trains it. Shapes as in models_vit.py, and: n samples, K classes.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_vit import AttentivePool, VideoEncoder, init_parameters
from util.dist import print0, rank, world_size
from util.evaluation import EVAL_CLIPS_PER_FORWARD, gather_sorted, padded_batches, percent
from util.frozen_features import gather_rows, rows_of_rank
from util.optim import (
    autocast,
    make_optimizer,
    param_groups,
    set_learning_rate,
    update,
    warmup_cosine,
)
from util.probe_heads import ProbeHead
from util.seeds import fork_rng

MAX_GIB = 8.0  # of the tokens of all clips
UPDATES = 300
BATCH = 64  # clips per update
LEARNING_RATE = 1e-3  # at the start of a cosine to 0
WEIGHT_DECAY = 0.05


def tokens_fit(model: VideoEncoder, n: int, amp: torch.dtype) -> bool:
    """Return whether the tokens of n clips may be kept in memory; print a note if not."""
    tokens = model.num_tokens + int(model.cls_embed)
    gib = n * tokens * model.config["embed_dim"] * amp.itemsize / 2**30
    if gib <= MAX_GIB:
        return True
    print0(
        f"note: no attentive probe: the tokens of {n} clips need {gib:.1f} GiB, more than "
        f"{MAX_GIB:g}. Use fewer videos in --probe_dir, or finetune.py --probe attentive."
    )
    return False


@torch.no_grad()
def features_and_tokens(
    model: VideoEncoder, batches, n: int, amp: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the features (n, D) of `mean_features`, and the tokens (n, [1 +] L, D) on rank 0.

    The tokens are those after the norm, in the dtype `amp`; other ranks get (0, [1 +] L, D). Call
    it on every rank. Raises UserError for an unreadable file.
    """
    model.eval()
    device = model.norm.weight.device
    first_patch = int(model.cls_embed)
    shape = (first_patch + model.num_tokens, model.config["embed_dim"])
    own = torch.empty(rows_of_rank(n, rank()), *shape, dtype=amp)

    def compute(clips: Tensor) -> Tensor:
        with autocast(clips.device, amp):
            tokens = model.encode(clips)
            mean = model.norm(tokens[:, first_patch:].mean(dim=1, keepdim=True))
            return torch.cat([mean, model.norm(tokens)], dim=1).float()

    def rows() -> Iterator[dict[str, Tensor]]:
        for batch, values in padded_batches(batches, EVAL_CLIPS_PER_FORWARD, compute):
            own[batch["index"].cpu() // world_size()] = values[:, 0, 1:].to(amp).cpu()
            yield {"index": batch["index"], "features": values[:, 0, 0]}

    with torch.compiler.set_stance("force_eager"):
        features = gather_sorted(rows())["features"]
    return features, gather_rows(own, n, device, keep=rank() == 0)


def attentive_accuracy(
    model: VideoEncoder, tokens: Tensor, labels: list[int], train_size: int, amp: torch.dtype
) -> float:
    """Return the accuracy in percent of a head that is trained on the first `train_size` samples.

    It classifies the others. tokens: (n, [1 +] L, D). The result depends on nothing else: all draws
    are seeded.
    """
    device = model.norm.weight.device
    targets = torch.tensor(labels)
    with fork_rng(0):
        head = new_head(model, int(targets.max()) + 1).to(device)
        train_head(head, tokens[:train_size], targets[:train_size], amp)
    correct = []
    with torch.no_grad(), autocast(device, amp):
        for batch, batch_targets in zip(
            tokens[train_size:].split(BATCH), targets[train_size:].split(BATCH), strict=True
        ):
            classes = head(batch.to(device)).argmax(1).cpu()
            correct.append(classes == batch_targets)
    return percent(torch.cat(correct))


def new_head(model: VideoEncoder, num_classes: int) -> ProbeHead:
    """Return an attentive pool with as many heads as the encoder, and a linear map."""
    config = model.config
    pool = AttentivePool(config["embed_dim"], config["num_heads"], config["mlp_ratio"])
    head = ProbeHead(pool, nn.Linear(config["embed_dim"], num_classes))
    init_parameters(head)
    return head


def train_head(head: ProbeHead, tokens: Tensor, targets: Tensor, amp: torch.dtype) -> None:
    """Train a head on tokens (n, N, D) with targets (n,), by AdamW and in random batches."""
    device = head.head.weight.device
    groups = param_groups(
        head,
        WEIGHT_DECAY,
        decays=lambda name, parameter: parameter.ndim > 1 and not name.endswith("query"),
        lr_scale=lambda _name: 1.0,
    )
    optimizer = make_optimizer(groups, head.parameters(), betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    for step in range(UPDATES):
        rows = torch.randperm(len(targets))[:BATCH]
        with autocast(device, amp):
            logits = head(tokens[rows].to(device))
        loss = F.cross_entropy(logits.float(), targets[rows].to(device))
        scaler.scale(loss).backward()
        lr = warmup_cosine(step, lr=LEARNING_RATE, min_lr=0.0, warmup_epochs=0, epochs=UPDATES)
        set_learning_rate(optimizer, lr)
        update(optimizer, scaler, None)
