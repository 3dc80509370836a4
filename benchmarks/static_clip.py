"""Measure what --static_clip folded saves: embedding and training step of a static clip.

    python benchmarks/static_clip.py [--model vit_tiny_patch16] [--img_size 224] [--batch 2]

Compares the folded computation with the exact one in one process. Asserts equal logits, then times
the two in turn (A B A B ...). Writes benchmarks/results/static_clip.json and .md (medians).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from models_vit import VisionTransformer, named_size
from util.dist import available_cpus, print0

RESULTS = ROOT / "benchmarks" / "results"
WARMUP_ROUNDS = 10


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Return the milliseconds of a call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return (time.perf_counter() - start) * 1000


def compare(
    exact: Callable[[], None], folded: Callable[[], None], device: torch.device, rounds: int
) -> dict[str, float]:
    """Return the medians in ms over alternating rounds after the warm-up, and their ratio."""
    times = {"exact_ms": [], "folded_ms": []}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, function in (("exact_ms", exact), ("folded_ms", folded)):
            elapsed = timed(function, device)
            if turn >= WARMUP_ROUNDS:
                times[name].append(elapsed)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return medians | {"ratio": round(medians["exact_ms"] / medians["folded_ms"], 3)}


def build_model(name: str, img_size: int, num_frames: int) -> VisionTransformer:
    """Return a named classifier without dropout."""
    torch.manual_seed(0)
    return VisionTransformer(
        **named_size(name),
        img_size=img_size,
        num_frames=num_frames,
        t_patch_size=2,
        num_classes=1000,
        drop_path_rate=0.0,
        dropout=0.0,
    )


def measure(model: VisionTransformer, batch: int, rounds: int) -> dict:
    """Return the largest difference of the logits, and the times of embedding and step."""
    device = next(model.parameters()).device
    img_size = model.config["img_size"]
    image = torch.randn(batch, 3, 1, img_size, img_size, device=device)
    clip = image.expand(-1, -1, model.config["num_frames"], -1, -1)
    with torch.no_grad():
        difference = (model(clip) - model(image)).abs().max().item()
    assert difference < 1e-4, difference

    def embed(clips: torch.Tensor) -> None:
        x, tokens = model.embed(clips)
        (x + tokens).sum().backward()

    def step(clips: torch.Tensor) -> None:
        model(clips).square().sum().backward()

    return {
        "largest_logit_difference": difference,
        "embedding": compare(lambda: embed(clip), lambda: embed(image), device, rounds),
        "step": compare(lambda: step(clip), lambda: step(image), device, rounds),
    }


def table(result: dict) -> str:
    """Return the result as Markdown."""
    lines = [
        f"`{result['model']}`, {result['batch']} static clips of {result['num_frames']} x "
        f"{result['img_size']}², forward and backward, float32, {result['device']}, "
        f"{result['cores']} cores, {result['threads']} threads, torch {result['torch']}, "
        f"medians of {result['rounds']}",
        "",
        "| | exact (ms) | folded (ms) | exact / folded |",
        "| --- | --- | --- | --- |",
    ]
    for part in ("embedding", "step"):
        cells = [part, *map(str, result[part].values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    return parser


def main() -> None:
    """Measure and write the results."""
    args = get_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    device_name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        device_name = torch.cuda.get_device_name()
    model = build_model(args.model, args.img_size, args.num_frames).to(device)
    result = {
        "model": args.model,
        "img_size": args.img_size,
        "num_frames": args.num_frames,
        "batch": args.batch,
        "rounds": args.rounds,
        **measure(model, args.batch, args.rounds),
        "torch": torch.__version__,
        "device": device_name,
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    (args.out / "static_clip.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "static_clip.md").write_text(table(result))
    print0(table(result))


if __name__ == "__main__":
    main()
