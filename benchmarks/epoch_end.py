"""How long an epoch's first update waits for its batch, and what that costs, for one or two versions of the repository.

    python benchmarks/epoch_end.py                       # this checkout; about two minutes on two cores
    python benchmarks/epoch_end.py --before CHECKOUT     # that one and this one in turn, twice

Trains with pretrain.py itself: short epochs (the 36 videos of samples/, 9 updates) with and without a validation after
each, and long ones (1,000 updates). A micro model on tiny clips on a CPU, ViT-B on 16 x 224 x 224 pixels where there is
a GPU. Writes epoch_end.json and epoch_end.md, or epoch_end_cuda.*, in benchmarks/results.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMALL_MODEL = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 64 --num_frames 8 --pred_t_dim 8 --decoder_embed_dim 64 "
    "--decoder_depth 1 --decoder_num_heads 4 --short_side 96 --sampling_rate 2 --num_workers 1 --recon_every 0 "
    "--warmup_epochs 0 --log_every 1000 --checkpoint_period 1000"
)
SHORT = f"{SMALL_MODEL} --data_dirs {ROOT}/samples/videos/train --batch_size_per_gpu 4 --repeat_aug 8 --epochs 6"
CASES = {
    "9 updates an epoch": SHORT,
    "9 updates an epoch, validation": f"{SHORT} --val_dirs {ROOT}/samples/videos/val",
    "1,000 updates an epoch": f"{SMALL_MODEL} --batch_size_per_gpu 1 --repeat_aug 1 --epochs 2",
}
BASE_MODEL = (
    "--model mae_vit_base_patch16 --no-compile --batch_size_per_gpu 4 --repeat_aug 4 --num_workers 12 "
    "--recon_every 0 --warmup_epochs 0 --log_every 1000 --checkpoint_period 1000"
)
BASE = f"{BASE_MODEL} --data_dirs {ROOT}/samples/videos/train --epochs 6"
CUDA_CASES = {
    "9 updates an epoch": BASE,
    "9 updates an epoch, validation": f"{BASE} --val_dirs {ROOT}/samples/videos/val",
    "1,000 updates an epoch": f"{BASE_MODEL} --epochs 4",
}


def train(flags: list[str]) -> list[dict]:
    """Run pretrain.py of the first tree on the path; return for each epoch the seconds of its waits and of all of it."""
    import pretrain

    epochs, train_one_epoch = [], pretrain.train_one_epoch

    def timed(batches, record: dict):
        """Yield the batches and note how long each is waited for."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            record["waits"].append(time.perf_counter() - asked)
            record["clips"] += batch["clips"].shape[:2].numel()
            yield batch

    def watched(model, batches, *rest):
        record = {"began": time.perf_counter(), "waits": [], "clips": 0}
        epochs.append(record)
        means = train_one_epoch(model, timed(batches, record), *rest)
        record["trained"] = time.perf_counter()
        return means

    pretrain.train_one_epoch = watched
    pretrain.main(flags)
    for record, following in zip(
        epochs, [*epochs[1:], {"began": time.perf_counter()}], strict=True
    ):
        record["ended"] = following["began"]
    return epochs


def summary(epochs: list[dict]) -> dict:
    """Return the figures of a run without its first epoch, which starts the workers."""
    steady = epochs[1:]
    seconds = sum(record["ended"] - record["began"] for record in steady)
    steps = []
    for record in steady:
        trained = record["trained"] - record["began"] - sum(record["waits"])
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


def measure(tree: Path, flags: str) -> dict:
    """Train in a process of its own, with the code of a tree."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--train", str(tree), f"{flags} --output_dir {out}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def list_samples(folder: Path, rows: int) -> Path:
    """Write a manifest of so many rows with the videos of samples/, again and again; return it."""
    videos = sorted(str(path) for path in (ROOT / "samples/videos/train").rglob("*.mp4"))
    manifest = folder / "samples.csv"
    manifest.write_text("".join(f"{videos[row % len(videos)]}\n" for row in range(rows)))
    return manifest


def write_clips(folder: Path, rows: int) -> Path:
    """Write a video of 64 x 64 pixels and a manifest with so many rows of it; return the manifest."""
    import av
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    with av.open(str(folder / "tiny.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in pixels.repeat(8, axis=1).repeat(8, axis=2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    manifest = folder / "tiny.csv"
    manifest.write_text(f"{folder}/tiny.mp4\n" * rows)
    return manifest


def table(found: dict, name: str) -> str:
    """Return the results as a Markdown page."""
    lines = [
        f"Made by `benchmarks/epoch_end.py` from {name}.json.",
        "",
        ", ".join(f"{name} {value}" for name, value in found["environment"].items()),
        "",
        "Medians over epochs, the first one of a run left out; one row a run, in the order in which they ran.",
        "",
        "| run | code | clips/s | step, ms | wait at an epoch's first update, ms | share of a step | at the other updates, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["runs"]:
        lines.append(
            f"| {row['case']} | {row['code']} | {row['clips_per_second']:.0f} | {row['step_ms']:.1f} | "
            f"{row['first_wait_ms']:.2f} | {row['first_wait_in_steps']:.1%} | {row['other_wait_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every case, and write the results after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another checkout, measured in turn with this")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default: %(default)s)")
    args = parser.parse_args()
    packages = ("torch", "torchvision", "av", "decord")
    on_cuda = torch.cuda.is_available()
    environment = {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    if on_cuda:
        environment["gpu"] = torch.cuda.get_device_name()
    name = "epoch_end_cuda" if on_cuda else "epoch_end"
    found = {"environment": environment | {name: version(name) for name in packages}, "runs": []}
    codes = ({"before": args.before} if args.before else {}) | {"after": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        manifest = list_samples(Path(folder), 4000) if on_cuda else write_clips(Path(folder), 1000)
        for case, flags in (CUDA_CASES if on_cuda else CASES).items():
            flags += "" if "--data_dirs" in flags else f" --data_csv {manifest}"
            for code in [*codes] * args.rounds:
                row = {"case": case, "code": code} | measure(codes[code], flags)
                found["runs"].append(row)
                (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
                (RESULTS / f"{name}.md").write_text(table(found, name))
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.path.insert(0, sys.argv[2])
        print(json.dumps(summary(train(sys.argv[3].split()))))
    else:
        main()
