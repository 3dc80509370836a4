"""Exact evaluation: every sample exactly once over all ranks. Scores, losses, features, and probes.

A model sees batches of a fixed size only, and results are sorted by sample index. So they depend
neither on the number of processes nor on the other samples of a batch. Shapes as in models_vit.py,
and: R clips (views) per sample, n samples, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT
from models_vit import VideoEncoder
from util.dist import UserError, all_gather_object
from util.optim import autocast

EVAL_CLIPS_PER_FORWARD = 8  # in pretraining's validation, for any training batch size
ROWS_ON_DEVICE = 1000  # batches whose results stay on the device before they are copied
NEIGHBORS = 20
TEMPERATURE = 0.07
RIDGE = 0.1


class Scores(NamedTuple):
    """Totals of an evaluation, and the best classes of each sample in validation set order."""

    loss: float
    acc1: float  # percent
    acc5: float  # percent
    labels: Tensor  # (n,)
    top: Tensor  # (n, min(5, K)) classes, best first
    top_scores: Tensor  # (n, min(5, K)) probabilities


class Results(NamedTuple):
    """Results of a pass that leaves out unreadable samples. Both parts are sorted by index."""

    table: dict[str, Tensor]  # "index" and results (n, ...) by name; {} if no sample is readable
    unreadable: dict[int, str]  # reasons by sample index


def pad_to(tensor: Tensor, length: int) -> Tensor:
    """Return a tensor (N, ...) padded to (length, ...) with copies of its last element."""
    missing = length - len(tensor)
    if missing == 0:
        return tensor
    padding = tensor[-1:].expand(missing, *tensor.shape[1:])
    return torch.cat([tensor, padding])


def raise_unreadable(batch: dict) -> None:
    """Raise UserError for the first unreadable file of a batch."""
    path, reason = batch["bad"][0]
    raise UserError(
        f"validation file {path} cannot be read ({reason}). Repair it or remove it from the set.",
        print_on_any_rank=True,
    )


def padded_batches(
    batches,
    clips_per_forward: int,
    compute: Callable[..., Tensor],
    inputs: tuple[str, ...] = ("clips",),
    on_unreadable: Callable[[dict], None] = raise_unreadable,
) -> Iterator[tuple[dict, Tensor]]:
    """Yield each batch with the outputs of `compute` (B, R, ...).

    inputs: names of tensors (B, R, ...) of the batch, the arguments of compute:
    (clips_per_forward, ...) each -> (clips_per_forward, ...). on_unreadable: called with each
    batch that has unreadable files; if it returns, a batch without clips is left out.
    """
    for batch in batches:
        if batch["bad"]:
            on_unreadable(batch)
        if batch["clips"] is None:
            continue
        views = batch["clips"].shape[1]
        parts = [batch[name].flatten(0, 1).split(clips_per_forward) for name in inputs]
        outputs = []
        for arguments in zip(*parts, strict=True):
            count = len(arguments[0])
            output = compute(*(pad_to(tensor, clips_per_forward) for tensor in arguments))
            outputs.append(output[:count])
        yield batch, torch.cat(outputs).unflatten(0, (-1, views))


def concatenate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the tensors of the same name; return {} for no rows."""
    if not rows:
        return {}
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def to_host(rows: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the tensors of the same name of all rows, on the CPU.

    A copy to the CPU waits for the device, so ROWS_ON_DEVICE rows are copied at once.
    """
    remaining = iter(rows)
    parts = []
    while part := concatenate(list(islice(remaining, ROWS_ON_DEVICE))):
        parts.append({name: values.cpu() for name, values in part.items()})
    return concatenate(parts)


def gather_sorted(rows: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return {name: (n, ...)} of all ranks on every rank, on the CPU, sorted by sample index.

    rows: {"index": (B,), name: (B, ...)} of each batch of this rank, on the device. The result is
    {} for no rows. Call it on every rank.
    """
    shares = all_gather_object(to_host(rows))
    table = concatenate([share for share in shares if share])
    if not table:
        return {}
    order = table["index"].argsort()
    return {name: values[order] for name, values in table.items()}


def gather_readable(rows: Iterable[dict[str, Tensor]], unreadable: dict[int, str]) -> Results:
    """Return the results of the readable samples of all ranks, and the reasons of the others.

    rows: see `gather_sorted`. unreadable: this rank's reasons by sample index, which are complete
    once the rows have been read. Call it on every rank.
    """
    table = gather_sorted(rows)
    reasons: dict[int, str] = {}
    for share in all_gather_object(unreadable):
        reasons |= share
    return Results(table, dict(sorted(reasons.items())))


def best_classes(batch: dict, probabilities: Tensor) -> dict[str, Tensor]:
    """Return index, best classes and their probabilities of a batch's samples.

    probabilities: (B, K).
    """
    top_scores, top = probabilities.topk(min(5, probabilities.shape[1]))
    return {"index": batch["index"], "top": top, "top_scores": top_scores}


def score_samples(batch: dict, probabilities: Tensor) -> dict[str, Tensor]:
    """Return `best_classes` of a batch's samples with labels and losses. probabilities: (B, K)."""
    label_probabilities = probabilities.gather(1, batch["labels"][:, None])  # (B, 1)
    loss = -label_probabilities.clamp(min=1e-30).log()
    return best_classes(batch, probabilities) | {"label": batch["labels"], "loss": loss}


def class_probabilities(
    model: nn.Module,
    batches,
    clips_per_forward: int,
    prepare: Callable[[Tensor], Tensor],
    amp: torch.dtype,
    on_unreadable: Callable[[dict], None] = raise_unreadable,
) -> Iterator[tuple[dict, Tensor]]:
    """Yield each batch with the class probabilities (B, K) of its samples, averaged over views.

    They are (B, H, K) for a model of H heads. See `evaluate` and `padded_batches`.
    """
    model.eval()

    def compute_logits(clips: Tensor) -> Tensor:
        with autocast(clips.device, amp):
            return model(prepare(clips)).float()

    outputs = padded_batches(
        batches, clips_per_forward, compute_logits, on_unreadable=on_unreadable
    )
    for batch, logits in outputs:
        yield batch, logits.softmax(-1).mean(1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches,
    clips_per_forward: int,
    prepare: Callable[[Tensor], Tensor],
    amp: torch.dtype,
) -> Scores:
    """Evaluate a classifier; the probabilities of a sample's views are averaged.

    model: unwrapped; prepare: clips (B, C, T, H, W) uint8 -> the input of the model. Raises
    UserError for an unreadable file. Call it on every rank.
    """
    outputs = class_probabilities(model, batches, clips_per_forward, prepare, amp)
    return total_scores(gather_sorted(score_samples(*output) for output in outputs))


@torch.no_grad()
def evaluate_heads(
    heads: nn.Module, batches, clips_per_forward: int, amp: torch.dtype
) -> list[Scores]:
    """Evaluate H heads at once as `evaluate` does with a classifier.

    heads: features -> logits (B, H, K). batches: with features (B, R, ...) in place of clips. Call
    it on every rank.
    """

    def score_heads(batch: dict, probabilities: Tensor) -> dict[str, Tensor]:
        rows = [score_samples(batch, per_head) for per_head in probabilities.unbind(1)]
        return {name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]} | {
            "index": batch["index"]
        }

    outputs = class_probabilities(heads, batches, clips_per_forward, lambda values: values, amp)
    table = gather_sorted(score_heads(*output) for output in outputs)
    del table["index"]
    per_head = [values.unbind(1) for values in table.values()]
    return [
        total_scores(dict(zip(table, columns, strict=True)))
        for columns in zip(*per_head, strict=True)
    ]


def total_scores(table: dict[str, Tensor]) -> Scores:
    """Return the scores of samples, from the columns of `score_samples`."""
    hits = table["top"] == table["label"][:, None]  # (n, min(5, K))
    return Scores(
        loss=table["loss"].double().mean().item(),
        acc1=percent(hits[:, 0]),
        acc5=percent(hits.any(1)),
        labels=table["label"],
        top=table["top"],
        top_scores=table["top_scores"],
    )


@torch.no_grad()
def predict(
    model: nn.Module,
    batches,
    clips_per_forward: int,
    prepare: Callable[[Tensor], Tensor],
    amp: torch.dtype,
) -> Results:
    """Return `top` (n, min(5, K)) and `top_scores` of all readable samples, as in `evaluate`.

    batches: made by `collate_readable`. Call it on every rank.
    """
    skipped: dict[int, str] = {}
    outputs = class_probabilities(
        model,
        batches,
        clips_per_forward,
        prepare,
        amp,
        on_unreadable=lambda batch: skipped.update(batch["unreadable"]),
    )
    return gather_readable((best_classes(*output) for output in outputs), skipped)


def percent(correct: Tensor) -> float:
    """Return the share of True in a bool tensor, in percent."""
    return 100 * correct.double().mean().item()


def clip_losses(
    model: MaskedAutoencoderViT,
    clips: Tensor,
    noise: Tensor,
    mask_ratio: float,
    mask_type: str,
    amp: torch.dtype,
) -> Tensor:
    """Return the reconstruction loss (B,) of each clip: mean squared error of its hidden tokens.

    clips: (B, C, T, H, W) uint8. noise: (B, L), see `make_mask`.
    """
    with autocast(clips.device, amp):
        _, pred, mask = model(clips, mask_ratio, mask_type, noise)
    # the hidden tokens first, in token order; nonzero() would wait for the device
    order = mask.byte().argsort(dim=1, descending=True, stable=True)  # (B, L)
    hidden = order[:, : pred.shape[1]]  # (B, K)
    return model.squared_errors(pred, clips, hidden).mean(dim=(1, 2))


@torch.no_grad()
def validation_loss(
    model: MaskedAutoencoderViT, batches, mask_ratio: float, mask_type: str, amp: torch.dtype
) -> float:
    """Return the mean reconstruction loss of the samples, each with its noise of the batch.

    model: unwrapped, with `pixel_stats`. Raises UserError for an unreadable file. Call it on every
    rank.
    """
    model.eval()

    def compute_losses(clips: Tensor, noise: Tensor) -> Tensor:
        return clip_losses(model, clips, noise, mask_ratio, mask_type, amp)

    outputs = padded_batches(batches, EVAL_CLIPS_PER_FORWARD, compute_losses, ("clips", "noise"))
    with torch.compiler.set_stance("force_eager"):
        table = gather_sorted({"index": batch["index"], "loss": loss} for batch, loss in outputs)
    return table["loss"].double().mean().item()


def feature_rows(
    pool: Callable[[Tensor], Tensor],
    batches,
    clips_per_forward: int,
    amp: torch.dtype,
    on_unreadable: Callable[[dict], None] = raise_unreadable,
) -> Iterator[dict[str, Tensor]]:
    """Yield index and features (B, D) of each batch's samples. See `features`."""

    def compute_features(clips: Tensor) -> Tensor:
        with autocast(clips.device, amp):
            return pool(clips).float()

    outputs = padded_batches(
        batches, clips_per_forward, compute_features, on_unreadable=on_unreadable
    )
    for batch, values in outputs:
        yield {"index": batch["index"], "features": values.mean(1)}


@torch.no_grad()
def features(
    pool: Callable[[Tensor], Tensor], batches, clips_per_forward: int, amp: torch.dtype
) -> Tensor:
    """Return features (n, D) float32 of all samples on the CPU, averaged over the views.

    pool: clips (B, C, T, H, W) uint8 -> (B, D). Raises UserError for an unreadable file. Call it
    on every rank.
    """
    with torch.compiler.set_stance("force_eager"):
        return gather_sorted(feature_rows(pool, batches, clips_per_forward, amp))["features"]


def mean_features(model: VideoEncoder, batches, amp: torch.dtype) -> Tensor:
    """Return features (n, D) of an encoder: the mean of the patch tokens, then the norm.

    The classifier pools in the same way with global_pool. model: with `pixel_stats`.
    """
    model.eval()
    first_patch = int(model.cls_embed)

    def pool(clips: Tensor) -> Tensor:
        tokens = model.encode(clips)
        return model.norm(tokens[:, first_patch:].mean(dim=1))

    return features(pool, batches, EVAL_CLIPS_PER_FORWARD, amp)


def standardize(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets (n, D) as float64, standardized by the mean and std of the training set."""
    train = train.double()
    mean = train.mean(0)
    std = train.std(0, correction=0) + 1e-6
    return (train - mean) / std, (val.double() - mean) / std


def knn_classes(train: Tensor, labels: Tensor, val: Tensor) -> Tensor:
    """Classify val (m, D) by its 20 nearest neighbors in train (n, D), and return classes (m,).

    A neighbor's vote is weighted by exp(cosine similarity / 0.07) (Wu et al. 2018, arXiv
    1805.01978).
    """
    train = F.normalize(train, dim=1)
    targets = F.one_hot(labels)
    classes = []
    for part in F.normalize(val, dim=1).split(256):
        similarity, nearest = (part @ train.T).topk(min(NEIGHBORS, len(train)), dim=1)
        weights = ((similarity - 1) / TEMPERATURE).exp()  # (256, 20)
        votes = targets[nearest] * weights[:, :, None]  # (256, 20, K)
        classes.append(votes.sum(1).argmax(1))
    return torch.cat(classes)


def linear_classes(train: Tensor, labels: Tensor, val: Tensor) -> Tensor:
    """Classify val (m, D) by ridge regression of one-hot labels on train (n, D), return (m,).

    The penalty is 0.1 per training sample. The solution is exact, without random draws or a step
    size. train has mean 0, so the bias is the share of each class.
    """
    targets = F.one_hot(labels).to(train.dtype)
    bias = targets.mean(0)
    penalty = RIDGE * len(train) * torch.eye(train.shape[1], dtype=train.dtype)
    gram = train.T @ train + penalty
    weights = torch.linalg.solve(gram, train.T @ (targets - bias))  # (D, K)
    return (val @ weights + bias).argmax(1)


def probe(values: Tensor, labels: list[int], train_size: int) -> dict[str, float]:
    """Return accuracies in percent of k nearest neighbors and of a linear head on features (n, D).

    The first `train_size` samples classify the others. values: from `mean_features`.
    """
    targets = torch.tensor(labels)
    train, val = standardize(values[:train_size], values[train_size:])
    accuracies = {}
    for name, classify in (("knn", knn_classes), ("linear", linear_classes)):
        classes = classify(train, targets[:train_size], val)
        accuracies[f"probe_{name}_acc1"] = percent(classes.eq(targets[train_size:]))
    return accuracies
