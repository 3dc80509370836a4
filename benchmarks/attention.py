"""Time of attention, forward and backward, per backend and shape: the encoder's (205 x 80), two decoders' (2049 x 32, 2049 x 64).

    python benchmarks/attention.py            # a GPU, bf16, 64 clips
    python benchmarks/attention.py --small    # any machine, small shapes

Medians of alternating rounds; checks each backend against softmax written out first. Writes benchmarks/results/attention_DEVICE.json and .md.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models_vit import flash_attn_qkvpacked_func
from util.dist import print0

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(qkv: torch.Tensor, backend: str) -> torch.Tensor:
    """(B, N, 3, A, K) -> (B, N, A, K). Raises RuntimeError where the backend cannot."""
    if backend == "flash-attn package":
        return flash_attn_qkvpacked_func(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(BACKENDS[backend]):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def once(qkv: torch.Tensor, backend: str) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    attend(qkv, backend).backward(qkv.detach()[:, :, 0])
    if qkv.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    batch: int, tokens: int, heads: int, head_dim: int, rounds: int, device: str, dtype: torch.dtype
) -> dict[str, dict]:
    """Median ms and TFLOP/s of each backend, or why it cannot run."""
    qkv = torch.randn(
        batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True
    )
    with torch.no_grad():
        q, k, v = qkv.float().permute(2, 0, 3, 1, 4).unbind(0)
        expected = (
            ((q[:1] @ k[:1].transpose(2, 3)) * head_dim**-0.5).softmax(-1) @ v[:1]
        ).transpose(1, 2)
    result, times = {}, {}
    for backend in [
        *BACKENDS,
        *(
            ["flash-attn package"]
            if flash_attn_qkvpacked_func is not None and device == "cuda"
            else []
        ),
    ]:
        try:
            off = (attend(qkv, backend)[:1].float() - expected).abs().max().item()
            assert off < (1e-4 if dtype == torch.float32 else 5e-2), (backend, off)
            once(qkv, backend)
            times[backend] = []
        except RuntimeError as error:
            result[backend] = {"error": str(error).splitlines()[0][:100]}
    for turn in range(10 + rounds):
        for backend, seconds in times.items():
            elapsed = once(qkv, backend)
            if turn >= 10:
                seconds.append(elapsed)
    flops = 12 * batch * heads * tokens**2 * head_dim
    for backend, seconds in times.items():
        median = statistics.median(seconds)
        result[backend] = {"ms": round(median * 1000, 4), "tflops": round(flops / median / 1e12, 3)}
    return result


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results (default: %(default)s)",
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = (
        [(2, 65, 2, 80), (2, 257, 2, 32), (2, 257, 2, 64)]
        if args.small
        else [(64, 205, 16, 80), (64, 2049, 16, 32), (64, 2049, 16, 64)]
    )
    results = {
        f"{n} x {k}": measure(b, n, a, k, args.rounds, device, dtype) for b, n, a, k in shapes
    }
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype),
        "torch": torch.__version__,
        "batch": shapes[0][0],
        "heads": shapes[0][2],
        "rounds": args.rounds,
        "shapes": results,
    }
    backends = list(next(iter(results.values())))
    lines = [
        f"{result['device']}, {dtype}, torch {torch.__version__}, batch {result['batch']}, {result['heads']} heads, medians of {args.rounds}",
        "",
        "| tokens x head width | " + " | ".join(backends) + " |",
        "| --- |" + " --- |" * len(backends),
    ]
    for shape, row in results.items():
        cells = (
            f"{row[backend]['ms']} ms, {row[backend]['tflops']} TFLOP/s"
            if "ms" in row[backend]
            else "-"
            for backend in backends
        )
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    stem = args.out / f"attention_{device}{'_small' if args.small else ''}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print0("\n".join(lines))


if __name__ == "__main__":
    main()
