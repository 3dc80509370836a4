"""Measure how long the first update of an epoch waits for its batch.

    python benchmarks/epoch_end.py                      # this checkout; 2 minutes on two cores
    python benchmarks/epoch_end.py --before CHECKOUT    # another checkout and this one, in turn

Trains with pretrain.py: short epochs (the 36 videos of samples/, 9 updates) with and without a
validation after each, and long epochs (1,000 updates). On a CPU, a micro model with tiny clips; on
a GPU, ViT-B with 16 x 224 x 224 pixels. Writes benchmarks/results/epoch_end.json and .md, or
epoch_end_cuda.json and .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMALL_MODEL = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 64 --num_frames 8 --pred_t_dim 8 "
    "--decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 4 --short_side 96 "
    "--sampling_rate 2 --num_workers 1 --recon_every 0 --warmup_epochs 0 --log_every 1000 "
    "--checkpoint_period 1000"
)
SHORT = (
    f"{SMALL_MODEL} --data_dirs {ROOT}/samples/videos/train --batch_size_per_gpu 4 "
    "--repeat_aug 8 --epochs 6"
)
FUNCTION = "train_one_epoch"
CASES = {
    "9 updates an epoch": SHORT,
    "9 updates an epoch, validation": f"{SHORT} --val_dirs {ROOT}/samples/videos/val",
    "1,000 updates an epoch": f"{SMALL_MODEL} --batch_size_per_gpu 1 --repeat_aug 1 --epochs 2",
}
BASE_MODEL = (
    "--model mae_vit_base_patch16 --no-compile --batch_size_per_gpu 4 --repeat_aug 4 "
    "--num_workers 12 --recon_every 0 --warmup_epochs 0 --log_every 1000 --checkpoint_period 1000"
)
BASE = f"{BASE_MODEL} --data_dirs {ROOT}/samples/videos/train --epochs 6"
CUDA_CASES = {
    "9 updates an epoch": BASE,
    "9 updates an epoch, validation": f"{BASE} --val_dirs {ROOT}/samples/videos/val",
    "1,000 updates an epoch": f"{BASE_MODEL} --epochs 4",
}


def timed_batches(batches: Iterable[dict], record: dict) -> Iterator[dict]:
    """Yield the batches; record the seconds of each wait, and the number of clips."""
    batches = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        record["waits"].append(time.perf_counter() - start)
        record["clips"] += batch["clips"].shape[:2].numel()
        yield batch


def train(flags: list[str]) -> list[dict]:
    """Run pretrain.py of the first checkout on the path; return the times of each epoch."""
    import engine_pretrain
    import pretrain

    # Older checkouts call it in pretrain.py
    modules = [module for module in (pretrain, engine_pretrain) if hasattr(module, FUNCTION)]
    train_one_epoch = getattr(modules[0], FUNCTION)
    epochs = []

    def timed_epoch(model, batches, *rest):
        record = {"start": time.perf_counter(), "waits": [], "clips": 0}
        epochs.append(record)
        means = train_one_epoch(model, timed_batches(batches, record), *rest)
        record["trained"] = time.perf_counter()
        return means

    for module in modules:
        setattr(module, FUNCTION, timed_epoch)
    pretrain.main(flags)
    ends = [record["start"] for record in epochs[1:]] + [time.perf_counter()]
    for record, end in zip(epochs, ends, strict=True):
        record["end"] = end
    return epochs


def summary(epochs: list[dict]) -> dict:
    """Return the results of a run without its first epoch, which starts the workers."""
    steady = epochs[1:]
    seconds = sum(record["end"] - record["start"] for record in steady)
    steps = []
    for record in steady:
        trained = record["trained"] - record["start"] - sum(record["waits"])
        steps.append(trained / len(record["waits"]))
    first = statistics.median(record["waits"][0] for record in steady)
    others = statistics.median(wait for record in steady for wait in record["waits"][1:])
    return {
        "clips_per_second": sum(record["clips"] for record in steady) / seconds,
        "step_ms": 1000 * statistics.median(steps),
        "first_wait_ms": 1000 * first,
        "other_wait_ms": 1000 * others,
        "first_wait_in_steps": first / statistics.median(steps),
    }


def measure(checkout: Path, flags: str) -> dict:
    """Train in a new process, with the code of a checkout."""
    with tempfile.TemporaryDirectory() as out:
        flags = f"{flags} --output_dir {out}"
        command = [sys.executable, __file__, "--train", str(checkout), flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def list_samples(folder: Path, rows: int) -> Path:
    """Write a manifest of the videos of samples/, repeated to `rows` rows; return its path."""
    videos = sorted(str(path) for path in (ROOT / "samples/videos/train").rglob("*.mp4"))
    manifest = folder / "samples.csv"
    manifest.write_text("".join(f"{videos[row % len(videos)]}\n" for row in range(rows)))
    return manifest


def write_clips(folder: Path, rows: int) -> Path:
    """Write a video of 64 x 64 pixels and a manifest with `rows` rows of it; return its path."""
    import av
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    with av.open(str(folder / "tiny.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = 64
        stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in pixels.repeat(8, axis=1).repeat(8, axis=2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    manifest = folder / "tiny.csv"
    manifest.write_text(f"{folder}/tiny.mp4\n" * rows)
    return manifest


COLUMNS = (
    "run",
    "code",
    "clips/s",
    "step, ms",
    "wait at an epoch's first update, ms",
    "share of a step",
    "at the other updates, ms",
)


def table(result: dict, name: str) -> str:
    """Return the results as a Markdown page."""
    lines = [
        f"Made by `benchmarks/epoch_end.py` from {name}.json.",
        "",
        ", ".join(f"{name} {value}" for name, value in result["environment"].items()),
        "",
        "Medians over epochs, the first one of a run left out; one row a run, "
        "in the order in which they ran.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join(['---'] * len(COLUMNS))} |",
    ]
    for row in result["runs"]:
        cells = (
            row["case"],
            row["code"],
            f"{row['clips_per_second']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{row['first_wait_ms']:.2f}",
            f"{row['first_wait_in_steps']:.1%}",
            f"{row['other_wait_ms']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def environment() -> dict:
    """Return the hardware and software of this run."""
    found = {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: version(name) for name in ("torch", "torchvision", "av", "decord")}


def main() -> None:
    """Measure every case; write the results after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another checkout, measured in turn with this")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default: %(default)s)")
    args = parser.parse_args()
    name = "epoch_end"
    cases = CASES
    if torch.cuda.is_available():
        name = "epoch_end_cuda"
        cases = CUDA_CASES
    checkouts = {"after": ROOT}
    if args.before:
        checkouts = {"before": args.before, "after": ROOT}
    result = {"environment": environment(), "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        if torch.cuda.is_available():
            manifest = list_samples(Path(folder), 4000)
        else:
            manifest = write_clips(Path(folder), 1000)
        for case, flags in cases.items():
            if "--data_dirs" not in flags:
                flags = f"{flags} --data_csv {manifest}"
            for code in [*checkouts] * args.rounds:
                row = {"case": case, "code": code} | measure(checkouts[code], flags)
                result["runs"].append(row)
                (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
                (RESULTS / f"{name}.md").write_text(table(result, name))
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.path.insert(0, sys.argv[2])
        print(json.dumps(summary(train(sys.argv[3].split()))))
    else:
        main()
