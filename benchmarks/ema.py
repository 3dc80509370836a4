"""Measure what --ema costs: the time of a pretraining update without and with it, and the bytes.

    python benchmarks/ema.py [--img_size 160] [--batch 2] [--rounds 20]

Takes updates without and with the average in turn (A B A B ...) in one process. On a CPU it counts
the CPU time of one thread, which other jobs hardly change. Writes benchmarks/results/ema.json and
.md: medians, and the median of the differences of neighbors.
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
from static_clip import RESULTS, WARMUP_ROUNDS, synchronize

from models_mae import MaskedAutoencoderViT
from models_vit import named_size
from util.dist import available_cpus, print0
from util.ema import WeightAverage
from util.optim import backward, make_optimizer, pretrain_param_groups, set_learning_rate, update
from util.pixels import VIDEO_MEAN, VIDEO_STD

MODEL = "mae_vit_tiny_patch16"
DECAY = 0.9999
CLIP_GRAD = 1.0


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of a call: until the GPU has finished, or of CPU time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return (clock() - start) * 1000


def build_model(img_size: int) -> MaskedAutoencoderViT:
    """Return the model of the CPU table in docs/performance.md."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        **named_size(MODEL),
        img_size=img_size,
        num_frames=16,
        t_patch_size=2,
        decoder_embed_dim=192,
        decoder_depth=4,
        decoder_num_heads=6,
        pred_t_dim=16,
    )
    model.pixel_stats = (VIDEO_MEAN, VIDEO_STD)
    return model


def measure(model: MaskedAutoencoderViT, batch: int, rounds: int) -> dict[str, float]:
    """Return the medians in ms of updates without and with the average, and of the average."""
    device = next(model.parameters()).device
    img_size = model.config["img_size"]
    clips = torch.randint(0, 256, (batch, 3, 16, img_size, img_size), dtype=torch.uint8).to(device)
    groups = pretrain_param_groups(model, 0.05)
    optimizer = make_optimizer(groups, model.parameters(), (0.9, 0.95))
    set_learning_rate(optimizer, 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    ema = WeightAverage(model, DECAY)

    def without() -> torch.Tensor:
        backward(model(clips, 0.9)[0], scaler, 1)
        _, skipped = update(optimizer, scaler, CLIP_GRAD)
        return skipped

    def with_average() -> None:
        ema.update(without())

    times: dict[str, list[float]] = {"without_ms": [], "with_ms": [], "average_ms": []}
    no_skip = torch.zeros((), device=device)
    for _ in range(WARMUP_ROUNDS + rounds):
        times["without_ms"].append(timed(without, device))
        times["with_ms"].append(timed(with_average, device))
        times["average_ms"].append(timed(lambda: ema.update(no_skip), device))
    measured = {name: values[WARMUP_ROUNDS:] for name, values in times.items()}
    pairs = zip(measured["without_ms"], measured["with_ms"], strict=True)
    medians = {name: statistics.median(values) for name, values in measured.items()}
    medians["difference_ms"] = statistics.median(second - first for first, second in pairs)
    return {name: round(value, 2) for name, value in medians.items()}


def table(result: dict) -> str:
    """Return the result as Markdown."""
    return (
        f"`{MODEL}`, {result['weights'] / 1e6:.2f} M weights, {result['batch']} clips of 16 x "
        f"{result['img_size']}², 90 % hidden, float32, {result['device']}, torch "
        f"{result['torch']}, {result['clock']}, medians of {result['rounds']} pairs\n\n"
        "| update without (ms) | with (ms) | median of the differences (ms) | "
        "the average alone (ms) | memory of the average (MB) |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"| {result['without_ms']} | {result['with_ms']} | {result['difference_ms']} | "
        f"{result['average_ms']} | {result['bytes'] / 1e6:.2f} |\n"
    )


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--img_size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    device_name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        device_name = torch.cuda.get_device_name()
    model = build_model(args.img_size).to(device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    averages = WeightAverage(model, DECAY).averages
    result = {
        "model": MODEL,
        "weights": weights,
        "img_size": args.img_size,
        "batch": args.batch,
        "rounds": args.rounds,
        **measure(model, args.batch, args.rounds),
        "bytes": sum(average.nbytes for average in averages),
        "torch": torch.__version__,
        "device": device_name,
        "cores": available_cpus(),
        "clock": "CPU time of one thread" if device.type == "cpu" else "time",
    }
    (RESULTS / "ema.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "ema.md").write_text(table(result))
    print0(table(result))


if __name__ == "__main__":
    main()
