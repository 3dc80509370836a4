"""Features of a frozen encoder: encode each clip once, and keep the features in memory.

Shapes as in models_vit.py; n samples, W processes. The features of a clip have any shape (...).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from models_vit import VideoEncoder, VisionTransformer
from util.dist import rank, show_progress, world_size
from util.evaluation import padded_batches, raise_unreadable
from util.optim import autocast

ROWS_PER_BROADCAST = 256
PROGRESS_SECONDS = 10


class FeatureTable(NamedTuple):
    """The features and labels of all samples, on the CPU, the same on every rank."""

    features: Tensor  # (n, ...)
    labels: Tensor  # (n,)


class FrozenEncoder:
    """Computes what the head of a frozen model reads.

    It is the pooled features (B, D) float32. With an attentive pool it is the tokens after the norm
    (B, [1 +] L, D), in the dtype of autocast.
    """

    def __init__(
        self,
        model: VisionTransformer,
        prepare: Callable[[Tensor], Tensor],
        clips_per_forward: int,
        amp: torch.dtype,
    ):
        """Use a model in evaluation mode. prepare: uint8 clips -> its input."""
        self.model = model
        self.prepare = prepare
        self.clips_per_forward = clips_per_forward
        self.amp = amp

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """Return the features (B, ...) of clips, see `VideoEncoder.embed`."""
        with autocast(clips.device, self.amp):
            if self.model.attentive_pool is None:
                return self.model.forward_features(clips).float()
            return VideoEncoder.forward(self.model, clips).to(self.amp)

    def encode(
        self, batches: Iterable[dict], on_unreadable: Callable[[dict], None] = raise_unreadable
    ) -> Iterator[dict]:
        """Yield batches with features (B, R, ...) in place of clips (B, R, C, T, H, W) uint8.

        on_unreadable: see `padded_batches`.
        """
        outputs = padded_batches(
            batches,
            self.clips_per_forward,
            lambda clips: self.features(self.prepare(clips)),
            on_unreadable=on_unreadable,
        )
        for batch, features in outputs:
            yield batch | {"clips": features}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a clip's features: (D,), or (N, D) of tokens."""
        width = self.model.config["embed_dim"]
        if self.model.attentive_pool is None:
            return (width,)
        return (self.model.num_tokens + int(self.model.cls_embed), width)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        return torch.float32 if self.model.attentive_pool is None else self.amp

    def bytes_per_clip(self) -> int:
        """Return the size of a clip's features."""
        return math.prod(self.shape) * self.dtype.itemsize


def batch_to(batch: dict, device: torch.device) -> dict:
    """Return a batch with its tensors on a device. The host does not wait for a GPU."""
    moved = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.device != device:
            moved[name] = value.to(device, non_blocking=device.type == "cuda")
    return moved


def with_progress(batches: Iterable[dict], samples: int) -> Iterator[dict]:
    """Yield this rank's batches, and show from time to time how many samples are encoded.

    samples: on all ranks.
    """
    shown = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch["index"])
        if time.monotonic() - shown >= PROGRESS_SECONDS:
            shown = time.monotonic()
            show_progress(f"encoded {min(done * world_size(), samples)} of {samples} clips")


def rows_of_rank(n: int, source: int) -> int:
    """Return the number of samples of a rank: those with the indices r, r + W, r + 2 W, ..."""
    return len(range(source, n, world_size()))


def collect_features(
    batches: Iterable[dict], n: int, encoder: FrozenEncoder, device: torch.device
) -> FeatureTable:
    """Return the features of all n samples. Call on every rank.

    batches: this rank's share, of `FrozenEncoder.encode` with one clip per sample. device: of this
    rank, for the exchange.
    """
    count = rows_of_rank(n, rank())
    features = torch.empty(count, *encoder.shape, dtype=encoder.dtype)
    labels = torch.empty(count, dtype=torch.long)
    for batch in batches:
        rows = batch["index"].cpu() // world_size()
        features[rows] = batch["clips"][:, 0].cpu()
        labels[rows] = batch["labels"].cpu()
    return FeatureTable(gather_rows(features, n, device), gather_rows(labels, n, device))


def gather_rows(own: Tensor, n: int, device: torch.device, keep: bool = True) -> Tensor:
    """Return the rows (n, ...) of all samples, from each rank's own. Call on every rank.

    own: rows of the samples r, r + W, r + 2 W, ... of rank r. device: of this rank. keep: False on
    a rank that needs no rows and gets (0, ...).
    """
    if world_size() == 1:
        return own
    table = own.new_empty(n if keep else 0, *own.shape[1:])
    for source in range(world_size()):
        count = rows_of_rank(n, source)
        for start in range(0, count, ROWS_PER_BROADCAST):
            end = min(start + ROWS_PER_BROADCAST, count)
            rows = own[start:end]
            if source != rank():
                rows = own.new_empty(end - start, *own.shape[1:])
            sent = rows.contiguous().view(torch.uint8).to(device)  # bytes: of any dtype
            torch.distributed.broadcast(sent, source)
            if keep:
                table[source :: world_size()][start:end] = sent.cpu().view(own.dtype)
    return table


def table_batches(
    table: FeatureTable,
    paths: list[str],
    micro_batches: Iterable[list[int]],
    device: torch.device,
) -> Iterator[dict]:
    """Yield training batches of features (B, 1, ...) on the device. See `data.loader.collate`.

    paths: of all samples. micro_batches: the indices of each batch's samples.
    """
    for indices in micro_batches:
        rows = torch.tensor(indices)
        batch = {
            "clips": table.features[rows][:, None],
            "labels": table.labels[rows],
            "index": rows,
            "replaced": torch.zeros(len(indices), dtype=torch.long),
        }
        if device.type == "cuda":
            batch = {name: value.pin_memory() for name, value in batch.items()}
        files = {"paths": [paths[index] for index in indices], "bad": [], "damaged": []}
        yield batch_to(batch, device) | files
