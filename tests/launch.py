"""Run scripts in processes of their own: under torchrun, or as ranks forked from a server.

The server has torch in memory, so its ranks start sooner than those of torchrun.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
GRACE = 30  # seconds that torchrun leaves its processes after a signal
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment without a launcher's variables, with some more."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return environment | more


def script_command(script: str, arguments: list[str]) -> list[str]:
    """Return the command that runs a script of the repository in one process."""
    return [sys.executable, str(ROOT / script), *arguments]


def torchrun_command(script: str, processes: int, arguments: list[str], *options: str) -> list[str]:
    """Return the command that runs a script of the repository under torchrun."""
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    return [sys.executable, *launcher, *options, str(ROOT / script), *arguments]


def torchrun(
    script: str, processes: int, arguments: list[str], timeout: int = 120
) -> subprocess.CompletedProcess:
    """Run a script of the repository under torchrun, and capture its output."""
    command = torchrun_command(script, processes, arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=clean_environment()
    )


def torchrun_tool(tool: str, arguments: list) -> subprocess.CompletedProcess:
    """Run a tool, such as "predict", on two processes, and capture its output."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 -m".split()
    words = [sys.executable, *launcher, f"tools.{tool}", *map(str, arguments)]
    return subprocess.run(
        [*words, *"--device cpu --num_workers 0 --batch_size_per_gpu 4".split()],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


class Job:
    """A script under torchrun with two processes, its output in {out}/printed.txt."""

    def __init__(
        self, out: Path, script: str, arguments: list[str], *options: str, **environment: str
    ):
        """Start the script. options: of torchrun; environment: variables to set."""
        self._record(out)
        command = torchrun_command(script, 2, arguments, *options)
        self.process = self._start(command, **environment)

    def _record(self, out: Path) -> None:
        """Prepare the output folder, and remember the processes of earlier jobs there."""
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.printed = out / "printed.txt"
        self.earlier = self._processes_of_folder()  # that an earlier job with this folder left

    def _start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Start a process that appends its output to that of the job."""
        with open(self.printed, "a") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, env=clean_environment(**environment)
            )

    def wait_for(self, pattern: str, seconds: float = 90) -> None:
        """Wait until the output contains a pattern."""
        deadline = time.monotonic() + seconds
        text = self.printed.read_text()
        while not re.search(pattern, text):
            assert time.monotonic() < deadline, text[-3000:]
            assert self.process.poll() is None, text[-3000:]
            time.sleep(0.05)
            text = self.printed.read_text()

    def processes(self) -> list[int]:
        """Return the ids of this job's processes: launcher, ranks and loader workers."""
        return [pid for pid in self._processes_of_folder() if pid not in self.earlier]

    def leftovers(self) -> list[int]:
        """Return the ids of processes that an earlier job with this folder left."""
        return [pid for pid in self._processes_of_folder() if pid in self.earlier]

    def _processes_of_folder(self) -> list[int]:
        """Return the ids of the processes with the output folder on their command lines."""
        pids = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command_line = " ".join(process.info["cmdline"] or [])
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and str(self.out) in command_line:
                pids.append(process.pid)
        return pids

    def rank_pids(self) -> list[int]:
        """Return the ids of the ranks' own processes, in order: the children of torchrun."""
        own = self.processes()
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child.pid for child in children if child.pid in own]

    def wait_until_gone(self, seconds: float = GRACE) -> int:
        """Wait for the end of all processes, orphans too; return the launcher's exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < deadline, self.printed.read_text()[-3000:]
            time.sleep(0.05)
        return self.process.returncode


def faulty_arguments(faults: list[dict], flags: list[str]) -> list[str]:
    """Return the arguments with which tests/faulty.py pretrains. flags: of pretrain.py."""
    return [json.dumps(faults), "pretrain.py", *flags]


def faulty_job(
    out: Path, faults: list[dict], flags: list[str], *options: str, **environment: str
) -> Job:
    """Start a pretraining with faults under torchrun. See `Job`."""
    arguments = faulty_arguments(faults, flags)
    return Job(out, "tests/faulty.py", arguments, *options, **environment)


def _run_rank(environment: dict, faults: list[dict], flags: list[str], output: str) -> None:
    """Pretrain in this new process. environment: a launcher's variables; output: a path."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    import torch
    from faulty import main

    torch.set_num_threads(1)
    main(faults, "pretrain", flags)


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank; none for a single process."""
    if world_size == 1:
        return {}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that srun sets for a task, and the port."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(world_size),
        "SLURM_STEP_TASKS_PER_NODE": str(world_size),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_ranks(
    commands: list[list[str]],
    faults: list[dict] = (),
    variables: Callable[[int, int, int], dict[str, str]] = launcher_variables,
) -> list[BaseProcess]:
    """Pretrain in one process for each of these lists of flags, with faults of tests/faulty.py.

    variables: the environment by which they find each other. Rank R prints into printed_R.txt in
    the --output_dir of rank 0.
    """
    # for the server, which starts with the first call
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faulty"])
    out = Path(commands[0][commands[0].index("--output_dir") + 1])
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank, flags in enumerate(commands):
        environment = variables(rank, len(commands), port)
        output = str(out / f"printed_{rank}.txt")
        arguments = (environment, list(faults), flags, output)
        process = context.Process(target=_run_rank, args=arguments)
        process.start()
        processes.append(process)
    return processes


def run_ranks(
    world_size: int, flags: list[str], faults: list[dict] = (), timeout: int = 120
) -> tuple[list[int], str]:
    """Pretrain in `world_size` processes, with faults of tests/faulty.py.

    flags: of pretrain.py. Returns the ranks' exit codes, and what they printed, rank by rank.
    """
    processes = start_ranks([flags] * world_size, faults)
    out = Path(flags[flags.index("--output_dir") + 1])
    hung = end_processes(processes, timeout)
    printed = "".join((out / f"printed_{rank}.txt").read_text() for rank in range(world_size))
    assert not hung, f"still running after {timeout} s:\n{printed[-3000:]}"
    return [process.exitcode for process in processes], printed


def end_processes(processes: list[BaseProcess], timeout: float) -> list[BaseProcess]:
    """Wait for the end of all processes; kill and return those that need more seconds."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return hung


def check_ranks(
    world_size: int, flags: list[str], faults: list[dict] = (), timeout: int = 120
) -> str:
    """Run `run_ranks`, assert that all ranks succeed, and return what they printed."""
    codes, printed = run_ranks(world_size, flags, faults, timeout)
    assert codes == [0] * world_size, printed
    return printed
