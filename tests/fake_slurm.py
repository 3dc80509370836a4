"""A scheduler for one job: runs an sbatch script as SLURM would, signals its step before the time is up, starts it again when asked to.

    python tests/fake_slurm.py LOG TEXT... -- SCRIPT [arguments]

At each start the step gets the signal of `#SBATCH --signal` once LOG holds the next TEXT; all its processes do, as from slurmstepd. After the seconds
that the script asks for, what is left is killed and counted as a failure. Prints a line per start, exits with the last exit code.
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
    """The processes of a step: `root` and all below it."""
    try:
        step = psutil.Process(root)
        return sorted([root, *(process.pid for process in step.children(recursive=True))])
    except psutil.NoSuchProcess:
        return []


def one_start(number: int, folder: Path, script: list[str], log: Path, text: str | None) -> int:
    """Run the job once. Returns its exit code, 137 if it had to be killed."""
    name, seconds = re.search(
        r"^#SBATCH --signal=(\w+)@(\d+)", Path(script[0]).read_text(), re.M
    ).groups()
    environment = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FAKE_SLURM": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_RESTART_COUNT": str(number),
    }
    with open(log, "a") as output:
        job = subprocess.Popen(
            ["bash", *script], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    began = log.stat().st_size if log.exists() else 0
    while text and job.poll() is None and text not in log.read_text()[began:]:
        time.sleep(0.1)
    if text and job.poll() is None:
        step = int((folder / "step").read_text())
        for process in descendants(step):
            os.kill(process, getattr(signal, f"SIG{name}"))
        try:
            job.wait(timeout=int(seconds))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            return 137
    return job.wait()


def main(argv: list[str]) -> int:
    """Run the job until it does not ask to be started again."""
    split = argv.index("--")
    log, texts, script = Path(argv[0]), argv[1:split], argv[split + 1 :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tool, content in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / tool).write_text(content)
            (folder / tool).chmod(0o755)
        for number in range(10):
            code = one_start(
                number, folder, script, log, texts[number] if number < len(texts) else None
            )
            asked = (folder / "requeue").exists()
            sys.stdout.write(
                f"start {number}: exit code {code}, {'back into the queue' if asked else 'done'}\n"
            )
            (folder / "requeue").unlink(missing_ok=True)
            if not asked:
                return code
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
