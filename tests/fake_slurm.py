"""Run an sbatch script as SLURM would: signal its step, and start it again after a requeue.

    python tests/fake_slurm.py LOG TEXT... -- SCRIPT [arguments]

In each start, all processes of the step get the signal of `#SBATCH --signal` once LOG contains the
next TEXT, as from slurmstepd. Processes that run longer than the seconds of that line are killed,
which counts as a failure. Prints one line per start. Exits with the last exit code.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

MAX_STARTS = 10
SRUN = """#!/bin/bash
"$@" &
echo $! > "$FAKE_SLURM/step"
wait $!
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo localhost ;;
    requeue*) touch "$FAKE_SLURM/requeue" ;;
esac
"""


def descendants(root: int) -> list[int]:
    """Return the process ids of a step: `root` and all its descendants."""
    try:
        children = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return sorted([root, *(process.pid for process in children)])


def signal_of(script: Path) -> tuple[signal.Signals, int]:
    """Return the signal that a script requests, and the seconds from it to the time limit."""
    line = re.search(r"^#SBATCH --signal=(\w+)@(\d+)", script.read_text(), re.MULTILINE)
    return signal.Signals[f"SIG{line[1]}"], int(line[2])


def wait_for_text(job: subprocess.Popen, log: Path, offset: int, text: str) -> None:
    """Wait until the log contains a text after an offset, or the job ends."""
    while job.poll() is None and text not in log.read_text()[offset:]:
        time.sleep(0.1)


def run_once(restarts: int, folder: Path, script: list[str], log: Path, text: str | None) -> int:
    """Run the job once. Return its exit code, 137 if it had to be killed."""
    signum, seconds = signal_of(Path(script[0]))
    environment = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FAKE_SLURM": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    with open(log, "a") as output:
        offset = log.stat().st_size
        job = subprocess.Popen(
            ["bash", *script], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    if text is None:
        return job.wait()
    wait_for_text(job, log, offset, text)
    if job.poll() is not None:
        return job.returncode
    step = int((folder / "step").read_text())
    for process in descendants(step):
        os.kill(process, signum)
    try:
        return job.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        return 137


def main(argv: list[str]) -> int:
    """Run the job until it ends without a requeue. Return its exit code."""
    split = argv.index("--")
    log = Path(argv[0])
    texts = argv[1:split]
    script = argv[split + 1 :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tool, content in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / tool).write_text(content)
            (folder / tool).chmod(0o755)
        for restarts in range(MAX_STARTS):
            text = None
            if restarts < len(texts):
                text = texts[restarts]
            code = run_once(restarts, folder, script, log, text)
            if not (folder / "requeue").exists():
                sys.stdout.write(f"start {restarts}: exit code {code}, done\n")
                return code
            sys.stdout.write(f"start {restarts}: exit code {code}, requeued\n")
            (folder / "requeue").unlink()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
