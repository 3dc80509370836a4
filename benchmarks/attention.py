"""Measure attention, forward and backward, per backend and shape.

    python benchmarks/attention.py            # a GPU, bf16, 64 clips
    python benchmarks/attention.py --small    # any machine, small shapes

The shapes (tokens x head width) are the encoder's, 205 x 80, and two decoders', 2049 x 32 and
2049 x 64. Each backend is first compared with softmax written out. The backends take turns; the
results are medians. A GPU is timed by its own events behind queued work, so launches do not count.
Writes benchmarks/results/attention_DEVICE.json and .md after each shape. The fastest of PyTorch's
backends belongs into FASTEST_ATTENTION of models_vit.py, which --attn auto follows.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models_vit import flash_attn_qkvpacked_func
from util.dist import print0

RESULTS = ROOT / "benchmarks" / "results"
WARMUP_ROUNDS = 10
FLASH_ATTN = "flash-attn package"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Shape(NamedTuple):
    """Sizes of queries, keys and values."""

    batch: int
    tokens: int
    heads: int
    head_dim: int


SMALL_SHAPES = (Shape(2, 65, 2, 80), Shape(2, 257, 2, 32), Shape(2, 257, 2, 64))
SHAPES = (Shape(64, 205, 16, 80), Shape(64, 2049, 16, 32), Shape(64, 2049, 16, 64))


def inputs_of(qkv: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
    """Return what a backend takes, as leaves: qkv itself, or q, k and v (B, heads, N, head_dim)."""
    inputs = (qkv,)
    if backend != FLASH_ATTN:
        inputs = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(tensor.detach().requires_grad_() for tensor in inputs)


def attend(inputs: tuple[torch.Tensor, ...], backend: str) -> torch.Tensor:
    """Return the attention (B, N, heads, head_dim) of `inputs_of`.

    Raises RuntimeError if the backend does not support the tensors.
    """
    if backend == FLASH_ATTN:
        return flash_attn_qkvpacked_func(*inputs)
    with sdpa_kernel(BACKENDS[backend]):
        return scaled_dot_product_attention(*inputs).transpose(1, 2)


def written_out(qkv: torch.Tensor) -> torch.Tensor:
    """Return the attention of the first sample in float32: softmax(q k' / sqrt(head_dim)) v."""
    q, k, v = qkv[:1].float().permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def occupy(device: torch.device) -> None:
    """Queue milliseconds of work on a GPU, during which the host launches what is timed."""
    square = torch.zeros(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(4):
        square @ square


def timed_pass(qkv: torch.Tensor, backend: str) -> float:
    """Return the seconds of one forward and backward pass, of the GPU alone if there is one."""
    inputs = inputs_of(qkv, backend)
    upstream = qkv.detach()[:, :, 0]
    if not qkv.is_cuda:
        begin = time.perf_counter()
        torch.autograd.grad(attend(inputs, backend), inputs, upstream)
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    occupy(qkv.device)
    start.record()
    torch.autograd.grad(attend(inputs, backend), inputs, upstream)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def check_backends(qkv: torch.Tensor, backends: list[str], compare: bool) -> dict[str, str]:
    """Run each backend once. Return the errors of those that cannot run here.

    compare: assert that the differences from `written_out` are small.
    """
    tolerance = 5e-2
    if qkv.dtype == torch.float32:
        tolerance = 1e-4
    with torch.no_grad():
        expected = written_out(qkv)
    errors = {}
    for backend in backends:
        try:
            output = attend(inputs_of(qkv, backend), backend)
            difference = (output[:1].float() - expected).abs().max().item()
            assert difference < tolerance or not compare, (backend, difference)
            timed_pass(qkv, backend)
        except RuntimeError as error:
            errors[backend] = str(error).splitlines()[0][:100]
    return errors


def measure(shape: Shape, rounds: int, qkv: torch.Tensor, compare: bool) -> dict[str, dict]:
    """Return the median ms and TFLOP/s of each backend, or why it cannot run.

    qkv: (B, N, 3, heads, head_dim). compare: as in `check_backends`.
    """
    backends = list(BACKENDS)
    if flash_attn_qkvpacked_func is not None and qkv.is_cuda:
        backends.append(FLASH_ATTN)
    errors = check_backends(qkv, backends, compare)
    times = {backend: [] for backend in backends if backend not in errors}
    for turn in range(WARMUP_ROUNDS + rounds):
        for backend, seconds in times.items():
            elapsed = timed_pass(qkv, backend)
            if turn >= WARMUP_ROUNDS:
                seconds.append(elapsed)
    flops = 12 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    result = {backend: {"error": error} for backend, error in errors.items()}
    for backend, seconds in times.items():
        median = statistics.median(seconds)
        result[backend] = {"ms": round(median * 1000, 4), "tflops": round(flops / median / 1e12, 3)}
    return result


def table(result: dict) -> str:
    """Return the result as Markdown."""
    backends = list(next(iter(result["shapes"].values())))
    lines = [
        f"{result['device']}, {result['dtype']}, torch {result['torch']}, "
        f"batch {result['batch']}, {result['heads']} heads, medians of {result['rounds']}",
        "",
        "| tokens x head width | " + " | ".join(backends) + " |",
        "| --- |" + " --- |" * len(backends),
    ]
    for shape, row in result["shapes"].items():
        cells = [shape]
        for backend in backends:
            cell = "-"
            if "ms" in row[backend]:
                cell = f"{row[backend]['ms']} ms, {row[backend]['tflops']} TFLOP/s"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(result: dict) -> str:
    """Return which of PyTorch's backends is the fastest, by shape, in one line."""
    names = []
    for shape, row in result["shapes"].items():
        times = {name: row[name]["ms"] for name in BACKENDS if "ms" in row[name]}
        names.append(f"{shape}: {min(times, key=times.__getitem__)}")
    return f"fastest on compute capability {result['capability']}: {', '.join(names)}"


def main() -> None:
    """Measure, write the results as they come, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with softmax written out (default: on)",
    )
    args = parser.parse_args()
    if not args.check:
        print0("--no-check: values are not compared")
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cpu"
    device_name = "cpu"
    capability = None
    dtype = torch.float32
    if torch.cuda.is_available():
        device = "cuda"
        device_name = torch.cuda.get_device_name()
        capability = torch.cuda.get_device_capability()
        dtype = torch.bfloat16
    shapes = SHAPES
    stem = f"attention_{device}"
    if args.small:
        shapes = SMALL_SHAPES
        stem += "_small"
    result = {
        "device": device_name,
        "capability": capability,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "batch": shapes[0].batch,
        "heads": shapes[0].heads,
        "rounds": args.rounds,
        "shapes": {},
    }
    for shape in shapes:
        size = (shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
        qkv = torch.randn(size, device=device, dtype=dtype)
        row = measure(shape, args.rounds, qkv, args.check)
        result["shapes"][f"{shape.tokens} x {shape.head_dim}"] = row
        (args.out / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
        (args.out / f"{stem}.md").write_text(table(result) + "\n")
    print0(table(result))
    print0(fastest(result))


if __name__ == "__main__":
    main()
