"""Compute the time of a training step from counted FLOPs and bytes.

The time is a sum over kinds, because kernels run one after another:

* matrix products: FLOPs / (FLOP/s that a large one reaches), or bytes / bandwidth if that is longer
* attention: the time measured for its shape on an H200 (results/attention_cuda.json). A shape that
  was not measured takes the time of the nearest one, scaled by B x heads x width x (tiles of 128
  tokens)^2, and is marked "scaled". An H100 has the same compute units, so it gets the same time.
* elementwise, not compiled, update: bytes / bandwidth

Cards: an H100 SXM has 989 TFLOP/s (bf16) and 3.35 TB/s by its datasheet. Matrix products reach
about 790 TFLOP/s there, and large kernels 3.0 TB/s. An H200 has 989 and 4.8 by its datasheet. A
product of 8192 x 8192 matrices reached 761 (measured, torch 2.11), and 4.3 TB/s is assumed. MFU is
the model's own FLOPs / time / 989 TFLOP/s. Launch overhead and waits are left out.

The sum is a lower bound. In a profile of a step on an H200
(results/profile_vit-h14_pretrain_cuda.md) elementwise kernels reach 2.6 TB/s on average.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
MATRIX_PRODUCTS = "matrix products"
ATTENTION = "attention"
ELEMENTWISE = "elementwise"
NOT_COMPILED = "not compiled"
UPDATE = "update"
KINDS = (MATRIX_PRODUCTS, ATTENTION, ELEMENTWISE, NOT_COMPILED, UPDATE)
TILE = 128  # tokens that an attention kernel takes at once
MEASURED = {  # (preset, card, label): file of results/
    ("vit-h14", "H200", "before"): "train_step_vit-h14_pretrain_cuda_before",
    ("vit-h14", "H200", "now"): "train_step_vit-h14_pretrain_cuda",
}
MEASURED_COLUMN = "measured ms"
KERNELS = ("flash", "cudnn")  # of attention


class Card(NamedTuple):
    """What a GPU reaches."""

    flops: float  # FLOP/s of large bf16 matrix products
    bandwidth: float  # bytes/s
    peak: float  # FLOP/s of the datasheet


CARDS = {
    "H100": Card(790e12, 3.0e12, 989e12),
    "H200": Card(761e12, 4.3e12, 989e12),
}


class AttentionTime(NamedTuple):
    """The time of attention, forward and backward, and the measured shape that it comes from."""

    seconds: float
    source: str
    exact: bool


# ---- Times ----


def attention_time(shape: tuple[int, ...], kernel: str, measured: dict) -> AttentionTime:
    """Return the time of one attention of q (B, heads, N, width).

    measured: the content of attention_cuda.json.
    """
    batch, heads, tokens, width = shape
    sizes = {name: tuple(map(int, name.split(" x "))) for name in measured["shapes"]}

    def distance(name: str) -> tuple[float, float]:
        tokens_there, width_there = sizes[name]
        return abs(math.log(tokens / tokens_there)), abs(math.log(width / width_there))

    nearest = min(sizes, key=distance)
    tokens_there, width_there = sizes[nearest]
    tiles = math.ceil(tokens / TILE) / math.ceil(tokens_there / TILE)
    sequences = batch * heads / (measured["batch"] * measured["heads"])
    scale = sequences * width / width_there * tiles**2
    seconds = measured["shapes"][nearest][kernel]["ms"] / 1000 * scale
    return AttentionTime(seconds, nearest, (tokens, width) == sizes[nearest])


def step_seconds(row: dict, card: Card, attention: float) -> dict[str, float]:
    """Return the seconds of a counted step by kind. attention: seconds of all its attention."""
    seconds = {kind: 1e9 * row["gb"][kind] / card.bandwidth for kind in KINDS}
    products = 1e12 * row["tflop"][MATRIX_PRODUCTS] / card.flops
    seconds[MATRIX_PRODUCTS] = max(seconds[MATRIX_PRODUCTS], products)
    seconds[ATTENTION] = attention
    return seconds


def measured_ms(preset: str, card: str, label: str, variant: str) -> float | None:
    """Return the measured time of the same code on the same card, or None.

    The parts of a variant's name may come in any order.
    """
    name = MEASURED.get((preset, card, label))
    if name is None:
        return None
    parts = set(variant.split(", "))
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return next(
        (row["median_ms"] for row in rows if set(row["variant"].split(", ")) == parts), None
    )


# ---- Tables ----


def markdown(rows: list[dict[str, str]], columns: Iterable[str] | None = None) -> str:
    """Return rows of cells by column as a Markdown table. columns: those to show (None: all)."""
    columns = list(columns or rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[row[column] for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def counted_cells(row: dict) -> dict[str, str]:
    """Return the cells of a counted step by column."""
    return {
        "label": row["label"],
        "variant": row["variant"],
        "kernels": f"{row['kernels']:,}",
        "products": f"{row['matrix_products']:,}",
        "TFLOP": f"{sum(row['tflop'].values()):.1f}",
        **{f"{kind}, GB": f"{row['gb'][kind]:.1f}" for kind in KINDS},
        "all, GB": f"{sum(row['gb'].values()):.1f}",
        "peak GiB": f"{row['peak_gib']:.1f}",
        "graphs": str(row["graphs"]),
    }


def counted_table(result: dict) -> str:
    """Return the counts of a preset as Markdown."""
    title = (
        f"{result['preset']}, pretraining, {result['batch']} clips, bf16: counted without a GPU, "
        f"torch {result['torch']}, triton {result['triton']}"
    )
    return f"{title}\n\n{markdown([counted_cells(row) for row in result['rows']])}"


def attention_of_step(row: dict, kernel: str) -> tuple[float, str]:
    """Return the seconds of a step's attention, and the shapes that they are scaled from."""
    measured = json.loads((RESULTS / "attention_cuda.json").read_text())
    seconds = 0.0
    scaled = []
    for *shape, calls in row["attention"]:
        time = attention_time(tuple(shape), kernel, measured)
        seconds += calls * time.seconds
        if not time.exact:
            scaled.append(time.source)
    if not scaled:
        return seconds, "measured"
    return seconds, f"scaled from {', '.join(scaled)}"


def computed_cells(result: dict, row: dict, card: str, kernel: str) -> dict[str, str]:
    """Return the cells of a computed step by column."""
    attention, source = attention_of_step(row, kernel)
    seconds = step_seconds(row, CARDS[card], attention)
    total = sum(seconds.values())
    name = row["variant"]
    if kernel == "cudnn":
        name += ", cudnn"
    cells = {"preset": result["preset"], "label": row["label"], "variant": name, "GPU": card}
    cells |= {f"{kind}, ms": f"{1000 * seconds[kind]:.1f}" for kind in KINDS}
    cells["computed ms"] = f"{1000 * total:.1f}"
    cells["clips/s"] = f"{result['batch'] / total:.0f}"
    cells["MFU"] = f"{1e9 * result['gflop_per_step'] / total / CARDS[card].peak:.1%}"
    measured = measured_ms(result["preset"], card, row["label"], name)
    cells |= {MEASURED_COLUMN: "-", "computed / measured": "-", "time of attention": source}
    if measured is not None:
        cells[MEASURED_COLUMN] = f"{measured:.1f}"
        cells["computed / measured"] = f"{1000 * total / measured:.2f}"
    return cells


def computed_rows(results: list[dict]) -> list[dict[str, str]]:
    """Return the cells of all computed steps, by column."""
    return [
        computed_cells(result, row, card, kernel)
        for result in results
        for card in CARDS
        for row in result["rows"]
        for kernel in KERNELS
    ]


def computed_table(results: list[dict]) -> str:
    """Return the computed steps of all presets as Markdown."""
    title = "Computed from counted bytes and FLOPs (benchmarks/roofline.py); not measured"
    return f"{title}\n\n{markdown(computed_rows(results))}"


# ---- Tables of docs/performance.md ----


def put_table(text: str, source: str, tables: list[str]) -> str:
    """Return a page with these tables, in order, under its markers of rows of `source`."""
    remaining = iter(tables)
    mark = f"<!-- rows of benchmarks/results/{source} -->\n"
    return re.sub(
        rf"({re.escape(mark)})(?:\|.*\n)*", lambda match: match[1] + next(remaining), text
    )


def with_new_tables(text: str, results: list[dict]) -> str:
    """Return the page with the newest counts and the times computed from them."""
    rows = computed_rows(results)
    latest = {result["preset"]: result["rows"][-1]["label"] for result in results}
    times = [f"{kind}, ms" for kind in KINDS]
    measured = [row for row in rows if row[MEASURED_COLUMN] != "-"]
    ours = [
        row
        for row in rows
        if row["variant"].startswith("ours compiled") and row["label"] == latest[row["preset"]]
    ]
    ladder = ["variant", *times, "computed ms", MEASURED_COLUMN, "computed / measured"]
    outlook = ["preset", "variant", "GPU", *times, "computed ms", "clips/s", "MFU"]
    tables = [markdown(measured, ladder), markdown(ours, [*outlook, "time of attention"])]
    text = put_table(text, "computed_steps.md", tables)
    for result in results:
        counted = [counted_cells(row) for row in result["rows"]]
        text = put_table(text, f"ledger_{result['preset']}.md", [markdown(counted)])
    return text
