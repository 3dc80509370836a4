"""Frozen models on fixed samples, each exactly once over all ranks: validation loss, features, and probes on them.

A model sees full batches of a fixed size only and results are put in the order of the samples, so that they depend
neither on the number of processes nor on neighbours. Shapes as in models_vit.py; R clips per sample, n samples, K classes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit
from torch.nn.functional import one_hot

from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize, sample_seed
from util.dist import UserError, gather_objects

SIZE = 8  # clips at a time in pretraining's validation, whatever the training batch
NEIGHBOURS, TEMPERATURE, RIDGE = 20, 0.07, 0.1


def in_full_batches(
    batches, size: int, compute: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[dict, Tensor]]:
    """Each batch with what `compute` makes of its clips, (B, R, ...).

    compute: clips (size, C, T, H, W) uint8 and the numbers of their samples (size,) -> (size, ...); the last clips of a batch
    are filled up with copies. Raises UserError for an unreadable file.
    """
    for batch in batches:
        if batch["clips"] is None:
            path, reason = batch["bad"][0]
            raise UserError(
                f"validation file {path} cannot be read ({reason}): repair it or take it out of the set",
                this_rank_only=True,
            )
        views, outputs = batch["clips"].shape[1], []
        numbers = batch["index"].repeat_interleave(views)
        for clips, index in zip(
            batch["clips"].flatten(0, 1).split(size), numbers.split(size), strict=True
        ):
            missing = size - len(clips)
            clips, index = (
                torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
                for part in (clips, index)
            )
            outputs.append(compute(clips, index)[: size - missing])
        yield batch, torch.cat(outputs).unflatten(0, (-1, views))


def in_order(rows: list[Tensor]) -> Tensor:
    """Rows (B, 1 + columns) of all ranks, the sample's number first -> (n, columns) in the order of the numbers, on every rank."""
    shares = [
        share for share in gather_objects(torch.cat(rows) if rows else None) if share is not None
    ]
    table = torch.cat(shares)
    return table[table[:, 0].argsort(), 1:]


def fixed_noise(index: Tensor, tokens: int) -> Tensor:
    """Mask noise (B, L) of the samples with these numbers, the same in every run."""
    generators = (
        torch.Generator().manual_seed(sample_seed(number, 5)) for number in index.tolist()
    )
    return torch.stack([torch.rand(tokens, generator=generator) for generator in generators]).to(
        index.device
    )


@torch.no_grad()
def validation_loss(model: nn.Module, batches, args, amp: torch.dtype) -> float:
    """Mean over the samples of the loss with `fixed_noise`, as in training otherwise. model: unwrapped."""
    model.eval()

    def loss(clips: Tensor, index: Tensor) -> Tensor:
        clips = normalize(clips, VIDEO_MEAN, VIDEO_STD)
        with torch.autocast(clips.device.type, amp, enabled=amp != torch.float32):
            _, pred, mask = model(
                clips, args.mask_ratio, args.mask_type, fixed_noise(index, model.num_tokens)
            )
        hidden = mask.nonzero()[:, 1].view(len(clips), -1)  # (B, K)
        target, _, _ = model.targets(clips, hidden)
        return (pred.to(target.dtype) - target).square().mean(dim=(1, 2))

    with torch.compiler.set_stance("force_eager"):
        rows = [
            torch.cat([batch["index"][:, None].double(), losses], dim=1).cpu()
            for batch, losses in in_full_batches(batches, SIZE, loss)
        ]
    return in_order(rows).mean().item()


@torch.no_grad()
def features(pooled: Callable[[Tensor], Tensor], batches, size: int, amp: torch.dtype) -> Tensor:
    """Features (n, D) float32 of all samples, on the CPU. pooled: clips (size, C, T, H, W) uint8 -> (size, D)."""

    def compute(clips: Tensor, _index: Tensor) -> Tensor:
        with torch.autocast(clips.device.type, amp, enabled=amp != torch.float32):
            return pooled(clips).float()

    with torch.compiler.set_stance("force_eager"):
        rows = [
            torch.cat([batch["index"][:, None].double(), values.mean(1)], dim=1).cpu()
            for batch, values in in_full_batches(batches, size, compute)
        ]
    return in_order(rows).float()


def mean_features(model: nn.Module, batches, amp: torch.dtype) -> Tensor:
    """Features (n, D) of an encoder: mean of the patch tokens after the blocks, then the norm, as the classifier reads it."""
    model.eval()
    first = int(model.cls_embed)
    return features(
        lambda clips: model.norm(
            model.encode(normalize(clips, VIDEO_MEAN, VIDEO_STD))[:, first:].mean(dim=1)
        ),
        batches,
        SIZE,
        amp,
    )


def standardised(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (n, D) float64, with the training set's mean and deviation taken out."""
    train, val = train.double(), val.double()
    mean, deviation = train.mean(0), train.std(0, correction=0) + 1e-6
    return (train - mean) / deviation, (val - mean) / deviation


def knn_classes(train: Tensor, labels: Tensor, val: Tensor) -> Tensor:
    """Classes (m,) of val (m, D) by its 20 nearest of train (n, D) in cosine, weighted exp(cosine / 0.07) (Wu et al. 2018, arXiv 1805.01978)."""
    train, targets, classes = unit(train, dim=1), one_hot(labels), []
    for part in unit(val, dim=1).split(256):
        near, index = (part @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = targets[index] * ((near - 1) / TEMPERATURE).exp()[:, :, None]  # (256, 20, K)
        classes.append(votes.sum(1).argmax(1))
    return torch.cat(classes)


def linear_classes(train: Tensor, labels: Tensor, val: Tensor) -> Tensor:
    """Classes (m,) of val (m, D) by ridge regression on one-hot labels, the penalty 0.1 per training sample; no draw, no step size.

    train has mean 0, so the bias is the share of each class.
    """
    targets = one_hot(labels).to(train.dtype)
    bias, gram = (
        targets.mean(0),
        train.T @ train + RIDGE * len(train) * torch.eye(train.shape[1], dtype=train.dtype),
    )
    return (val @ torch.linalg.solve(gram, train.T @ (targets - bias)) + bias).argmax(1)


def probe(values: Tensor, labels: list[int], train_size: int) -> dict[str, float]:
    """Accuracies in percent on the samples from `train_size` on, by the ones before: k nearest neighbours, and a linear head.

    values (n, D): `mean_features`.
    """
    labels = torch.tensor(labels)
    train, val = standardised(values[:train_size], values[train_size:])
    shares = {}
    for name, classes in (("knn", knn_classes), ("linear", linear_classes)):
        right = classes(train, labels[:train_size], val) == labels[train_size:]
        shares[f"probe_{name}_acc1"] = 100 * right.double().mean().item()
    return shares
