"""Compare how fast two checkouts of this repository train, in turns.

    python benchmarks/revisions.py CHECKOUT [--rounds 7]

Pretrains a tiny model on a CPU with one and with two processes, in CHECKOUT and in this checkout,
one after the other in each round. Its updates take milliseconds, so what the loop, the loader and
the collectives cost beside the model shows. Writes benchmarks/results/revisions.json and .md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data_pipeline import RESULTS, machine

from util.dist import print0

PROCESSES = (1, 2)
FIRST, LAST = 100, 600  # updates between which the time is taken
FLAGS = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 32 --num_frames 4 --pred_t_dim 4 "
    "--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --short_side 48 "
    "--num_workers 1 --repeat_aug 4 --batch_size_per_gpu 2 --sampling_rate 2 --mask_ratio 0.75 "
    "--recon_every 0 --lr 0.001 --device cpu --epochs 1000 --checkpoint_period 1000 "
    f"--max_steps {LAST} --log_every {FIRST}"
).split()


def train(checkout: Path, processes: int, videos: Path) -> dict[str, float]:
    """Pretrain in a checkout; return the updates per second and the seconds to the first update."""
    launcher = []
    if processes > 1:
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    with tempfile.TemporaryDirectory() as out:
        files = ["--data_dirs", str(videos), "--output_dir", out, "--datafile_dir", out]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *launcher, str(checkout / "pretrain.py"), *FLAGS, *files],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        times = {}
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"update (\d+)/", line)
            if found:
                times[int(found[1])] = time.monotonic()
        if process.wait() != 0:
            raise SystemExit(f"pretraining in {checkout} failed")
    speed = (LAST - FIRST) / (times[LAST] - times[FIRST])
    return {"updates/s": speed, "start, s": times[FIRST] - start - FIRST / speed}


def table(result: dict) -> str:
    """Return the result as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        "# Updates per second before and after",
        "",
        f"Made by `benchmarks/revisions.py`: medians of {result['rounds']} rounds, tiny model on a "
        f"CPU; {about}. Before: {result['before']}. The ratio is taken round by round. The start "
        "includes the imports.",
        "",
        "| processes | updates/s before | after | ratio | start before, s | after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        before, after = row["before"], row["after"]
        pairs = zip(before, after, strict=True)
        ratios = [new["updates/s"] / old["updates/s"] for old, new in pairs]
        cells = [str(row["processes"])]
        cells += [f"{median(runs, 'updates/s'):.1f}" for runs in (before, after)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        cells += [f"{median(runs, 'start, s'):.1f}" for runs in (before, after)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def median(runs: list[dict[str, float]], name: str) -> float:
    """Return the median of a measurement over the rounds."""
    return statistics.median(run[name] for run in runs)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of the code before")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    revision = subprocess.run(
        ["git", "-C", str(args.checkout), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    videos = ROOT / "samples" / "videos" / "train"
    rows = []
    for processes in PROCESSES:
        row: dict = {"processes": processes, "before": [], "after": []}
        for index in range(args.rounds):
            order = [("before", args.checkout), ("after", ROOT)]
            if index % 2:
                order.reverse()
            for name, checkout in order:
                row[name].append(train(checkout, processes, videos))
                print0(processes, name, json.dumps(row[name][-1]))
        rows.append(row)
    result = {
        "machine": machine(),
        "before": revision.stdout.strip(),
        "rounds": args.rounds,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "revisions.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "revisions.md").write_text(table(result))


if __name__ == "__main__":
    main()
