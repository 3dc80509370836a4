"""A run of two processes, killed again and again: does it end with the weights of the undisturbed one?

    python tests/soak.py [--kills 30] [--seed 0] > benchmarks/results/soak.log

Each kill comes at a random time after a start and is one of: SIGKILL of a rank, SIGKILL of torchrun, SIGTERM to torchrun. The same
command follows, at once, even while orphans of a killed torchrun are still about. Exit code 0 if weights, optimizer, position and log
are equal, bit for bit.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import psutil
import torch
from launch import Job, faulty, ranks
from make_videos import write_folder
from test_pretrain import command, records
from test_resume import state
from tiny import same

from util.dist import print0

KINDS = ("SIGKILL of rank 0", "SIGKILL of rank 1", "SIGKILL of torchrun", "SIGTERM to torchrun")
FLAGS = [
    "--batch_size_per_gpu",
    "2",
    "--epochs",
    "100",
    "--checkpoint_every_steps",
    "3",
    "--checkpoint_period",
    "2",
    "--num_workers",
    "1",
]


def rank_processes(job: Job) -> list[int]:
    """The ranks' own processes, in order: the children of torchrun."""
    children = [process.pid for process in psutil.Process(job.process.pid).children()]
    return [child for child in children if child in job.processes()]


def strike(job: Job, kind: str, delay: float) -> str:
    """Kill after `delay` seconds; what there was to kill."""
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and job.process.poll() is None:
        time.sleep(0.01)
    if job.process.poll() is not None:
        return "had ended"
    if "rank" in kind:
        living = rank_processes(job)
        if not living:
            job.process.kill()
            return "no rank yet: torchrun instead"
        os.kill(living[int(kind[-1]) % len(living)], signal.SIGKILL)
        job.gone(60)
        return "rank"
    job.process.send_signal(getattr(signal, kind.split()[0]))
    if kind.startswith("SIGTERM"):
        job.gone(60)
    else:
        job.process.wait()
    return "torchrun"


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the times and kinds (default: %(default)s)"
    )
    args = parser.parse_args()
    draw, folder, began = (
        random.Random(args.seed),
        Path(tempfile.mkdtemp(prefix="soak")),
        time.monotonic(),
    )
    videos = str(write_folder(folder / "videos", 17))
    seen = ["--val_dirs", videos, "--val_every", "10"]
    codes, printed = ranks(2, command(videos, folder / "whole", *FLAGS, *seen), timeout=1200)
    assert codes == [0, 0], printed[-3000:]
    print0(
        f"torch {torch.__version__}, seed {args.seed}; undisturbed: 400 updates, 100 epochs on 2 processes"
    )
    arguments = faulty(
        [{"do": "slow", "seconds": 0.08}], command(videos, folder / "killed", *FLAGS, *seen)
    )
    for number in range(1, args.kills + 1):
        kind, delay = draw.choice(KINDS), draw.uniform(3.0, 15.0)
        job = Job(folder / "killed", "tests/faulty.py", arguments)
        start = job.printed.stat().st_size
        hit = strike(job, kind, delay)
        text = job.printed.read_text()[start:]
        resumed, trained = (
            re.findall(r"resumed from .* at update (\d+)", text),
            re.findall(r"update (\d+)/400", text),
        )
        print0(
            f"{number:2d}  {delay:4.1f} s  {kind:20s} ({hit})  resumed at update {resumed[0] if resumed else '-':>3}, "
            f"last seen at {trained[-1] if trained else '-':>3}"
        )
    last = Job(folder / "killed", "tests/faulty.py", arguments)
    code = last.gone(600)
    print0(f"then undisturbed to the end: exit code {code}")
    last.others = []
    if (
        left := last.processes()
    ):  # their torchrun died before they knew of it: they hold nothing, and give up after ten minutes
        print0(f"{len(left)} processes still wait for the others of their start")
        for process in left:
            os.kill(process, signal.SIGKILL)
    equal = {
        "weights, optimizer, position": same(state(folder / "killed"), state(folder / "whole")),
        "log": records(folder / "killed") == records(folder / "whole"),
        "exit code": code == 0,
    }
    print0(
        ", ".join(f"{name}: {'equal' if value else 'NOT EQUAL'}" for name, value in equal.items())
        + f"; {time.monotonic() - began:.0f} s"
    )
    if all(equal.values()):
        shutil.rmtree(folder)
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
