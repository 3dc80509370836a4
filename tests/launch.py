"""Running scripts in processes of their own: under torchrun, or (sooner there) as ranks that a server with torch in memory forks."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
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
    """The environment without a launcher's variables."""
    return {key: value for key, value in os.environ.items() if key not in LAUNCHER} | more


def torchrun_command(script: str, processes: int, arguments: list[str], *options: str) -> list[str]:
    """The command that runs a script of the repository under torchrun."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *options,
    ]
    return [*launcher, str(ROOT / script), *arguments]


def torchrun(
    script: str, processes: int, arguments: list[str], timeout: int = 120
) -> subprocess.CompletedProcess:
    """Run a script of the repository under torchrun, in an environment without preparation."""
    command = torchrun_command(script, processes, arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=clean_environment()
    )


class Job:
    """A script under torchrun, its output in {out}/printed.txt."""

    def __init__(
        self, out: Path, script: str, arguments: list[str], *options: str, **environment: str
    ):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.printed = out, out / "printed.txt"
        self.others = []
        self.others = self.processes()
        with open(self.printed, "a") as file:
            command = torchrun_command(script, 2, arguments, *options)
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=clean_environment(**environment)
            )

    def until(self, pattern: str, seconds: float = 90) -> str:
        """Wait until the output has this; returns all of it."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, text := self.printed.read_text()):
            assert time.monotonic() < deadline and self.process.poll() is None, text[-3000:]
            time.sleep(0.05)
        return text

    def processes(self) -> list[int]:
        """The processes that were given this output folder since this start: launcher, ranks, loaders."""
        every = psutil.process_iter(["cmdline", "status"])
        alive = [process for process in every if process.info["status"] != psutil.STATUS_ZOMBIE]
        ours = [
            process.pid
            for process in alive
            if str(self.out) in " ".join(process.info["cmdline"] or [])
        ]
        return [number for number in ours if number not in self.others]

    def gone(self, seconds: float = GRACE) -> int:
        """Wait for the end of all processes, orphans too; returns the launcher's exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < deadline, self.printed.read_text()[-3000:]
            time.sleep(0.05)
        return self.process.returncode


def faulty(faults: list[dict], flags: list[str]) -> list[str]:
    """Arguments of tests/faulty.py for a pretraining."""
    return [json.dumps(faults), "pretrain.py", *flags]


def _as_rank(
    rank: int, world: int, port: int, faults: list[dict], flags: list[str], output: str
) -> None:
    """In a new process: run the pretraining as this rank."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    import torch
    from faulty import main

    torch.set_num_threads(1)
    main(faults, "pretrain", flags)


def ranks(
    world: int, flags: list[str], faults: list[dict] = (), timeout: int = 120
) -> tuple[list[int], str]:
    """Pretrain in `world` processes with faults of tests/faulty.py. Returns their exit codes and all that they printed, rank by rank."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faulty"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = Path(flags[flags.index("--output_dir") + 1])
    out.mkdir(parents=True, exist_ok=True)
    outputs = [str(out / f"printed_{rank}.txt") for rank in range(world)]
    processes = [
        context.Process(
            target=_as_rank, args=(rank, world, port, list(faults), flags, outputs[rank])
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    printed = "".join(Path(output).read_text() for output in outputs)
    assert not hung, f"still running after {timeout} s:\n{printed[-3000:]}"
    return [process.exitcode for process in processes], printed
