"""What --static_clip folded saves: tubelet embedding and whole training step of a static clip, against exact, in one process.

    python benchmarks/static_clip.py [--model vit_tiny_patch16] [--img_size 224] [--num_frames 16] [--batch 2]

Asserts equal logits first, then times A B A B; writes benchmarks/results/static_clip.json and .md (medians).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from models_vit import VisionTransformer, named_size
from util.dist import print0, usable_cores


def timed(work, device: torch.device) -> float:
    """Milliseconds of one call, to its end on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def compare(exact, folded, device: torch.device, rounds: int) -> dict[str, float]:
    """Medians in ms over alternating rounds, after ten warm-up rounds, and their ratio."""
    times = {"exact_ms": [], "folded_ms": []}
    for number in range(rounds + 10):
        for name, work in (("exact_ms", exact), ("folded_ms", folded)):
            elapsed = timed(work, device)
            if number >= 10:
                times[name].append(elapsed)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return medians | {"ratio": round(medians["exact_ms"] / medians["folded_ms"], 3)}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results (default: %(default)s)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = VisionTransformer(
        **named_size(args.model),
        img_size=args.img_size,
        num_frames=args.num_frames,
        t_patch_size=2,
        num_classes=1000,
        drop_path_rate=0.0,
        dropout=0.0,
    ).to(device)
    image = torch.randn(args.batch, 3, 1, args.img_size, args.img_size, device=device)
    clip = image.expand(-1, -1, args.num_frames, -1, -1)
    with torch.no_grad():
        difference = (model(clip) - model(image)).abs().max().item()
    assert difference < 1e-4, difference

    def embedding(clips):
        model.embed(clips).sum().backward()

    def step(clips):
        model(clips).square().sum().backward()

    result = {
        "model": args.model,
        "img_size": args.img_size,
        "num_frames": args.num_frames,
        "batch": args.batch,
        "rounds": args.rounds,
        "largest_logit_difference": difference,
        "embedding": compare(
            lambda: embedding(clip), lambda: embedding(image), device, args.rounds
        ),
        "step": compare(lambda: step(clip), lambda: step(image), device, args.rounds),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    (args.out / "static_clip.json").write_text(json.dumps(result, indent=2) + "\n")
    cells = [(part, *result[part].values()) for part in ("embedding", "step")]
    rows = "".join("| " + " | ".join(map(str, row)) + " |\n" for row in cells)
    table = (
        f"`{args.model}`, {args.batch} static clips of {args.num_frames} x {args.img_size}², forward and backward, float32, {result['device']}, "
        f"{result['cores']} cores, {result['threads']} threads, torch {torch.__version__}, medians of {args.rounds}\n\n"
        f"| | exact (ms) | folded (ms) | exact / folded |\n| --- | --- | --- | --- |\n{rows}"
    )
    (args.out / "static_clip.md").write_text(table)
    print0(table)


if __name__ == "__main__":
    main()
