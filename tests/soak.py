"""Interrupt a run of two processes at random; it must end like the uninterrupted one.

    python tests/soak.py [--kills 30] [--seed 0] > benchmarks/results/soak.log

Each interruption comes at a random time after a start and is one of: SIGKILL of a rank, SIGKILL of
torchrun, SIGTERM to torchrun. The same command follows at once, even while orphans of a killed
torchrun are still running. Exits with 0 if weights, optimizer, position and log are equal, bit for
bit.
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
from launch import Job, check_ranks, faulty_job
from make_videos import write_folder
from runs import log_records, pretrain_command, saved_state
from tiny import same

from util.dist import print0

KINDS = ("SIGKILL of rank 0", "SIGKILL of rank 1", "SIGKILL of torchrun", "SIGTERM to torchrun")
FLAGS = (
    "--batch_size_per_gpu 2 --epochs 100 --checkpoint_every_steps 3 --checkpoint_period 2 "
    "--num_workers 1 --val_every 10"
).split()
SLOW = [{"do": "slow", "seconds": 0.08}]


def rank_processes(job: Job) -> list[int]:
    """Return the ids of the ranks' own processes, in order: the children of torchrun."""
    children = [process.pid for process in psutil.Process(job.process.pid).children()]
    own = job.processes()
    return [child for child in children if child in own]


def interrupt(job: Job, kind: str, delay: float) -> str:
    """Interrupt a job after `delay` seconds. Return which process was hit, if any."""
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and job.process.poll() is None:
        time.sleep(0.01)
    if job.process.poll() is not None:
        return "had ended"
    if "rank" in kind:
        return kill_rank(job, int(kind[-1]))
    if kind.startswith("SIGTERM"):
        job.process.terminate()
        job.wait_until_gone(60)
    else:
        job.process.kill()
        job.process.wait()
    return "torchrun"


def kill_rank(job: Job, rank: int) -> str:
    """Kill a rank, or torchrun if it has not started the ranks yet. Return which was killed."""
    pids = rank_processes(job)
    if not pids:
        job.process.kill()
        return "no rank yet: torchrun instead"
    os.kill(pids[rank % len(pids)], signal.SIGKILL)
    job.wait_until_gone(60)
    return "rank"


def last_match(pattern: str, text: str) -> str:
    """Return the last match of a pattern's group, or "-"."""
    matches = re.findall(pattern, text)
    return matches[-1] if matches else "-"


def interrupt_repeatedly(out: Path, flags: list[str], kills: int, seed: int) -> None:
    """Start the run and interrupt it `kills` times; print one line per start."""
    draw = random.Random(seed)
    for index in range(1, kills + 1):
        kind = draw.choice(KINDS)
        delay = draw.uniform(3.0, 15.0)
        job = faulty_job(out, SLOW, flags)
        start = job.printed.stat().st_size
        hit = interrupt(job, kind, delay)
        text = job.printed.read_text()[start:]
        resumed = last_match(r"resumed from .* at update (\d+)", text)
        trained = last_match(r"update (\d+)/400", text)
        print0(
            f"{index:2d}  {delay:4.1f} s  {kind:20s} ({hit})  "
            f"resumed at update {resumed:>3}, last seen at {trained:>3}"
        )


def finish(out: Path, flags: list[str]) -> int:
    """Run to the end without interruption; return torchrun's exit code."""
    job = faulty_job(out, SLOW, flags)
    code = job.wait_until_gone(600)
    print0(f"then uninterrupted to the end: exit code {code}")
    job.earlier = []
    orphans = job.processes()
    if orphans:  # their torchrun was killed before they could watch it; they would wait 10 minutes
        print0(f"{len(orphans)} processes still wait for the others of their start")
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    return code


def main() -> int:
    """Run with and without interruptions, and compare. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument("--kills", type=int, default=30, help=default)
    parser.add_argument("--seed", type=int, default=0, help=f"of the times and kinds {default}")
    args = parser.parse_args()
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    videos = write_folder(folder / "videos", 17)
    flags = [*FLAGS, "--val_dirs", str(videos)]
    whole = folder / "whole"
    parts = folder / "killed"
    check_ranks(2, pretrain_command(videos, whole, *flags), timeout=1200)
    print0(
        f"torch {torch.__version__}, seed {args.seed}; "
        "uninterrupted: 400 updates, 100 epochs on 2 processes"
    )
    command = pretrain_command(videos, parts, *flags)
    interrupt_repeatedly(parts, command, args.kills, args.seed)
    code = finish(parts, command)
    equal = {
        "weights, optimizer, position": same(saved_state(parts), saved_state(whole)),
        "log": log_records(parts) == log_records(whole),
        "exit code": code == 0,
    }
    verdicts = []
    for name, is_equal in equal.items():
        verdicts.append(f"{name}: {'equal' if is_equal else 'NOT EQUAL'}")
    print0(f"{', '.join(verdicts)}; {time.monotonic() - start:.0f} s")
    if not all(equal.values()):
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
