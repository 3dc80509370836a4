"""Count what a training step launches, computes and moves, without a GPU.

    python benchmarks/ledger.py --label NAME --docs   # ViT-B/16, ViT-L/16, ViT-H/14: 64 clips
    python benchmarks/ledger.py --preset tiny --variants ours --verbose

It runs the real step on the null GPU (tests/nullgpu), which needs Linux, g++ and torch for CUDA,
and no GPU. Each variant is a row:

* kernels and matrix products: launches that the null GPU counted.
* TFLOP: PyTorch's own count for matrix products and attention. It counts what attention computes
  twice, so it is more than the model's own FLOPs.
* GB, by kind. A compiled Triton kernel moves what Inductor states for it. Any other operator reads
  its inputs once and writes its outputs once.
* peak GiB: of the caching allocator, with weights and optimizer state.
* graphs: those that Dynamo captured.

The null GPU has no cuDNN, so a convolution only allocates its result, and counts as one launch.
Launches and the peak are those of the third step; the fourth one is recorded.
roofline.py computes times from the counts. Rows of other labels and variants stay in the results:
benchmarks/results/ledger_PRESET.json and .md, and computed_steps.md, which has all presets.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from nullgpu import build

from benchmarks.roofline import (
    ATTENTION,
    ELEMENTWISE,
    KINDS,
    MATRIX_PRODUCTS,
    NOT_COMPILED,
    UPDATE,
    computed_table,
    counted_table,
    with_new_tables,
)
from benchmarks.train_step import (
    NUM_FRAMES,
    PRESETS,
    RESULTS,
    Preset,
    VariantSpec,
    build_variants,
    flops_per_clip,
)
from util.dist import UserError, print0, run_script
from util.optim import update

PAGE = ROOT / "docs" / "performance.md"
VARIANTS = {
    "plain sdpa": VariantSpec("plain sdpa", "plain-sdpa", "auto", compiled=False),
    "ours": VariantSpec("ours", "ours", "auto", compiled=False),
    "plain sdpa compiled": VariantSpec("plain sdpa compiled", "plain-sdpa", "auto", compiled=True),
    "ours compiled": VariantSpec("ours compiled", "ours", "auto", compiled=True),
    "ours compiled, bf16 residual": VariantSpec(
        "ours compiled, bf16 residual", "ours", "auto", compiled=True, bf16_residual=True
    ),
}
PRESETS_OF_THE_DOCS = ("B16", "L16", "vit-h14")
CONVOLUTIONS = ("convolution", "convolution_backward")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", *CONVOLUTIONS)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OVERWRITES = ("copy_", "fill_", "zero_")  # operators that do not read what they write to
PICKS = ("gather", "index", "index_select", "embedding")  # they read only what they return


# ---- Bytes of an operator ----


def tensors(values) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def total_bytes(values) -> int:
    """Return the bytes of tensors; elements that share memory count once."""
    sizes = ((tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors(values))
    return sum(min(size) for size in sizes)


def is_view(operator) -> bool:
    """Return whether an operator returns a view of its input, or uninitialized memory."""
    aliases = [result.alias_info for result in operator._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in aliases)
    return views or operator.overloadpacket.__name__ in (*ALLOCATIONS, "_unsafe_view")


def moved_bytes(operator, args: tuple, kwargs: dict, results) -> int:
    """Return the bytes that an operator reads and writes, each tensor once."""
    name = operator.overloadpacket.__name__
    read = 0
    written = total_bytes(results)
    for index, parameter in enumerate(operator._schema.arguments):
        value = kwargs.get(parameter.name)
        if index < len(args):
            value = args[index]
        alias = parameter.alias_info
        is_written = alias is not None and alias.is_write
        if name == "_fused_adamw_" and parameter.name == "grads":
            is_written = kwargs.get("grad_scale") is not None  # the kernel writes them unscaled
        inputs = {id(tensor) for tensor in tensors(value)}
        returned = any(id(tensor) in inputs for tensor in tensors(results))
        if is_written and not returned:
            written += total_bytes(value)
        if not parameter.is_out and not (is_written and name in OVERWRITES):
            read += total_bytes(value)
    if name in PICKS:
        read = min(read, written + total_bytes(args[1:]))
    return read + written


def without_cudnn() -> torch.library.Library:
    """Make convolutions on CUDA allocate their results, while the returned object lives."""
    library = torch.library.Library("aten", "IMPL")
    for name in CONVOLUTIONS:
        operator = getattr(torch.ops.aten, name).default

        def allocate(*args, operator=operator):
            device = tensors(args)[0].device
            on_meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args)
            return tree_map_only(
                torch.Tensor,
                lambda tensor: torch.empty_like(tensor, device=device),
                operator(*on_meta),
            )

        library.impl(name, allocate, "CUDA")
    return library


# ---- Counts of a step ----


class Entry:
    """Calls, bytes and FLOPs of an operator or kernel."""

    def __init__(self):
        self.calls = 0
        self.bytes = 0.0
        self.flops = 0.0


class Recorder(TorchDispatchMode):
    """Record the operators and Triton kernels that run while it is active.

    entries: by (kind, name, shapes). attention: calls of forward passes by (B, heads, N, width).
    Code that torch.compile has made beforehand runs as it is.
    """

    def __init__(self, compiled: bool):
        super().__init__()
        self.compiled = compiled
        self.updating = False
        self.entries: dict[tuple[str, str, str], Entry] = defaultdict(Entry)
        self.attention: dict[tuple[int, ...], int] = defaultdict(int)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as it is."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and record it."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        results = func(*args, **kwargs)
        if is_view(func) or not tensors((args, kwargs, results)):
            return results
        shapes = [f"{list(tensor.shape)}" for tensor in tensors((args, kwargs))[:2]]
        entry = self.entries[self.kind(name), name, " ".join(shapes)]
        entry.calls += 1
        entry.bytes += moved_bytes(func, args, kwargs, results)
        count_flops = flop_registry.get(func.overloadpacket)
        if count_flops is not None:
            entry.flops += count_flops(*args, **kwargs, out_val=results)
        if "attention" in name and "backward" not in name:
            self.attention[tuple(args[0].shape)] += 1
        return results

    def kind(self, name: str) -> str:
        """Return the kind of an operator."""
        if self.updating:
            return UPDATE
        if name in PRODUCTS:
            return MATRIX_PRODUCTS
        if "attention" in name:
            return ATTENTION
        return NOT_COMPILED if self.compiled else ELEMENTWISE

    def record_triton(self, kernel) -> None:
        """Record one launch of a kernel that Inductor made."""
        kind = UPDATE if self.updating else ELEMENTWISE
        entry = self.entries[kind, kernel.inductor_meta["kernel_name"], ""]
        entry.calls += 1
        entry.bytes += kernel.inductor_meta["kernel_num_gb"] * 1e9

    def totals(self, attribute: str) -> dict[str, float]:
        """Return the sum of "calls", "bytes" or "flops" by kind."""
        sums = dict.fromkeys(KINDS, 0.0)
        for (kind, _, _), entry in self.entries.items():
            sums[kind] += getattr(entry, attribute)
        return sums

    def summary(self) -> dict:
        """Return TFLOP and GB by kind, and the calls of attention after its sizes."""
        return {
            "tflop": {kind: flops / 1e12 for kind, flops in self.totals("flops").items()},
            "gb": {kind: size / 1e9 for kind, size in self.totals("bytes").items()},
            "attention": [[*sizes, calls] for sizes, calls in self.attention.items()],
        }

    def listing(self) -> str:
        """Return one line per operator and shape, the largest first."""
        entries = sorted(self.entries.items(), key=lambda item: -item[1].bytes)
        lines = [
            f"{entry.bytes / 1e9:8.2f} GB {entry.flops / 1e12:7.2f} TFLOP x{entry.calls:<5} "
            f"{kind}: {name} {shapes}"
            for (kind, name, shapes), entry in entries
        ]
        return "\n".join(lines)


@contextlib.contextmanager
def triton_launches_in(recorder: Recorder) -> Iterator[None]:
    """Record the launches of Inductor's kernels."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    launch = CachingAutotuner.run

    def recorded(kernel, *args, **kwargs):
        recorder.record_triton(kernel)
        return launch(kernel, *args, **kwargs)

    with mock.patch.object(CachingAutotuner, "run", recorded):
        yield


def record_step(variant, clips: torch.Tensor, noise: torch.Tensor, compiled: bool) -> Recorder:
    """Run a step of a variant and return what it did."""
    recorder = Recorder(compiled)
    with recorder, triton_launches_in(recorder):
        variant.loss(clips, noise).backward()
        recorder.updating = True
        update(variant.optimizer, variant.scaler, 1.0)
    return recorder


def count_step(variant, clips: torch.Tensor, noise: torch.Tensor) -> dict:
    """Return the launches and the peak of the third step of a variant."""
    from nullgpu import counts

    variant.step(clips, noise)
    variant.step(clips, noise)
    torch.cuda.reset_peak_memory_stats()
    counts.reset()
    variant.step(clips, noise)
    launches = counts.rows()
    return {
        "kernels": sum(row.calls for row in launches if row.name.startswith("kernel ")),
        "matrix_products": sum(row.calls for row in launches if row.name.startswith("gemm ")),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def count_variant(preset: Preset, spec: VariantSpec, verbose: bool) -> tuple[dict, float]:
    """Return the counts of a variant, and the model's own FLOPs of a step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    device = torch.device("cuda")
    model, variants = build_variants(preset, "pretrain", [spec], device, torch.bfloat16)
    batch = preset.batch_size
    shape = (batch, 3, NUM_FRAMES, preset.img_size, preset.img_size)
    clips = torch.empty(shape, dtype=torch.uint8, device=device)
    noise = torch.empty(batch, model.num_tokens, device=device)
    row = count_step(variants[spec.name], clips, noise)
    recorder = record_step(variants[spec.name], clips, noise, spec.compiled)
    if verbose:
        print0(recorder.listing())
    calls = recorder.entries.items()
    row["matrix_products"] += sum(entry.calls for key, entry in calls if key[1] in CONVOLUTIONS)
    row |= {"graphs": counters["stats"]["unique_graphs"], **recorder.summary()}
    return row, batch * flops_per_clip(model, "pretrain")


# ---- Results ----


def versions() -> dict[str, str]:
    """Return the versions that the counts hold for."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def read_result(path: Path) -> dict:
    """Return the results so far. Raises UserError if they hold for other versions."""
    if not path.exists():
        return versions() | {"rows": []}
    result = json.loads(path.read_text())
    there = {name: result[name] for name in versions()}
    if there != versions():
        raise UserError(
            f"{path} was counted with {there}, not {versions()}. Move it away, or use --out."
        )
    return result


def put_row(rows: list[dict], row: dict) -> None:
    """Replace the row of the same label and variant, or append the row."""
    for index, other in enumerate(rows):
        if (other["label"], other["variant"]) == (row["label"], row["variant"]):
            rows[index] = row
            return
    rows.append(row)


def count_preset(name: str, args: argparse.Namespace) -> None:
    """Count the variants of a preset and write its results."""
    stem = args.out / f"ledger_{name}"
    result = read_result(stem.with_suffix(".json"))
    for variant in args.variants:
        counted, flops = count_variant(PRESETS[name], VARIANTS[variant], args.verbose)
        gc.collect()
        put_row(result["rows"], {"label": args.label, "variant": variant, **counted})
        result |= {"preset": name, "batch": PRESETS[name].batch_size, "gflop_per_step": flops / 1e9}
        stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        stem.with_suffix(".md").write_text(counted_table(result))
        print0(f"{name}, {args.label}, {variant}: {json.dumps(counted)}")


def results_of_presets(folder: Path) -> list[dict]:
    """Return the results of all presets in a folder, in the order of PRESETS."""
    paths = [folder / f"ledger_{name}.json" for name in PRESETS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def run_on_null_gpu(words: list[str]) -> int:
    """Run this command line on the null GPU and return its exit code. Raises UserError."""
    obstacle = build.obstacle()
    if build.LIBRARY in os.environ.get("LD_PRELOAD", ""):
        obstacle = "CUDA does not start on the null GPU"
    if obstacle is not None:
        raise UserError(f"nothing can be counted here: {obstacle}.")
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build.build(Path(folder))
        except RuntimeError as error:
            raise UserError(f"the null GPU does not compile: {error}") from error
        command = [sys.executable, __file__, *words]
        return subprocess.run(command, env=build.environment(library), check=False).returncode


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=PRESETS_OF_THE_DOCS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--label", default="now", help="name of the code that is counted")
    parser.add_argument("--docs", action="store_true", help=f"put the tables into {PAGE.name} too")
    parser.add_argument("--verbose", action="store_true", help="list operators and kernels")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    return parser


def main() -> None:
    """Count on the null GPU, and write the results. Raises UserError."""
    args = get_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() or build.obstacle() is not None:
        sys.exit(run_on_null_gpu(sys.argv[1:]))
    from nullgpu import counts

    counts.start()
    library = without_cudnn()
    torch._inductor.config.benchmark_kernel = True  # so that kernels state their bytes
    for name in args.preset:
        count_preset(name, args)
    results = results_of_presets(args.out)
    (args.out / "computed_steps.md").write_text(computed_table(results))
    if args.docs:
        PAGE.write_text(with_new_tables(PAGE.read_text(), results))
    del library  # until here, convolutions only allocate


if __name__ == "__main__":
    run_script(main)
