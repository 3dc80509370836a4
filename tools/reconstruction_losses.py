"""The reconstruction loss of each video under some masks, as a table. See `tools.visualize`.

Shapes as in models_mae.py; M masks: each type and ratio with each seed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from data.manifest import Samples, part_name
from models_mae import MaskedAutoencoderViT
from tools.reading import nothing_readable, print_unreadable
from util.dist import print0
from util.evaluation import Results, clip_losses, gather_readable, padded_batches
from util.files import save_csv, span_columns
from util.seeds import fixed_noise


class Masks(NamedTuple):
    """The masks under which a loss is measured: each kind with each seed."""

    kinds: list[tuple[str, float]]  # mask type and ratio
    num_seeds: int


def with_noise(batches, num_tokens: int, num_seeds: int) -> Iterator[dict]:
    """Yield the batches with their mask noise (B, 1, seeds, L) on the device of the clips.

    It depends on the seed and the video's index in the list. Seed 0 is the noise of pretraining's
    validation loss.
    """
    for batch in batches:
        if batch["clips"] is not None:
            indices = batch["index"].tolist()
            draws = [fixed_noise(indices, num_tokens, seed) for seed in range(num_seeds)]
            noise = torch.stack(draws, dim=1)[:, None]
            batch["noise"] = noise.to(batch["clips"].device)
        yield batch


@torch.no_grad()
def reconstruction_losses(
    model: MaskedAutoencoderViT,
    batches,
    clips_per_forward: int,
    masks: Masks,
    amp: torch.dtype,
) -> Results:
    """Return `loss` (n, M) of all readable videos: for each kind of mask, one for each seed.

    batches: made by `collate_readable`, one view per video. Call it on every rank.
    """
    model.eval()
    skipped: dict[int, str] = {}

    def compute_losses(clips: Tensor, noise: Tensor) -> Tensor:
        losses = []
        for mask_type, ratio in masks.kinds:
            for draw in noise.unbind(dim=1):
                losses.append(clip_losses(model, clips, draw, ratio, mask_type, amp))
        return torch.stack(losses, dim=1)

    outputs = padded_batches(
        with_noise(batches, model.num_tokens, masks.num_seeds),
        clips_per_forward,
        compute_losses,
        ("clips", "noise"),
        on_unreadable=lambda batch: skipped.update(batch["unreadable"]),
    )
    rows = ({"index": batch["index"], "loss": losses[:, 0]} for batch, losses in outputs)
    return gather_readable(rows, skipped)


def loss_table(found: Results, samples: Samples, masks: Masks) -> pd.DataFrame:
    """Return a row for each readable sample, kind of mask and seed.

    If there are parts of videos, also start and end (seconds), as in a manifest.
    """
    rows = []
    for index, losses in zip(found.table["index"].tolist(), found.table["loss"], strict=True):
        losses_of_kinds = losses.unflatten(0, (-1, masks.num_seeds)).tolist()
        for (mask_type, ratio), losses_of_seeds in zip(masks.kinds, losses_of_kinds, strict=True):
            for seed, loss in enumerate(losses_of_seeds):
                rows.append((index, seed, mask_type, ratio, loss))
    table = pd.DataFrame(rows, columns=["index", "seed", "mask_type", "mask_ratio", "loss"])
    indices = table.pop("index").tolist()
    table.insert(0, "path", [samples.paths[index] for index in indices])
    if samples.spans is not None:
        times = span_columns(samples.spans[indices])
        table.insert(1, "start", times["start"])
        table.insert(2, "end", times["end"])
    return table


def save_losses(path: Path, found: Results, samples: Samples, masks: Masks) -> None:
    """Write the table of the losses; print the means and the unreadable videos.

    Raises UserError if no video is readable.
    """
    paths = samples.paths
    unreadable = {}
    for index, reason in found.unreadable.items():
        span = None if samples.spans is None else samples.spans[index]
        unreadable[part_name(paths[index], span)] = reason
    if not found.table:
        raise nothing_readable(unreadable, len(paths))
    print_unreadable(unreadable, len(paths), most=len(paths))  # the table does not list them
    table = loss_table(found, samples, masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_csv(table, path)
    means = table.groupby(["mask_type", "mask_ratio"], sort=False)["loss"].mean()
    for (mask_type, ratio), mean in means.items():
        print0(f"mean loss with {mask_type}:{ratio:g}: {mean:.6g}")
    readable = len(found.table["index"])
    print0(f"wrote {path}: {len(table)} rows, {readable} of {len(paths)} videos")
