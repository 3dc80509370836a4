"""The launcher's environment: torchrun's variables, SLURM's, or none."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util import dist
from util.dist import UserError
from util.preemption import AnyRank

ROOT = Path(__file__).parent.parent
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture
def environment(monkeypatch):
    """Remove the launcher's variables; return a function that sets some."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in LAUNCHER:
            monkeypatch.delenv(name)

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_without_a_launcher_there_is_one_process(environment):
    assert dist.rank() == 0
    assert dist.setup("cpu")[1:] == (0, 1, 0, 1)


def test_deterministic_kernels_without_filling_new_tensors(environment):
    try:
        dist.setup("cpu", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_torchrun_wins_over_slurm(environment):
    environment(
        RANK="3", LOCAL_WORLD_SIZE="4", SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"
    )
    assert dist.rank() == 3 and dist.local_world_size() == 4


def test_the_shell_of_a_batch_script_is_one_process(environment):
    environment(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_LOCALID="0")
    assert dist.rank() == 0 and dist.local_world_size() == 1
    assert dist.setup("cpu").world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("a1,b[2-3]", "a1"),
        ("n-1-[100,200]", "n-1-100"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert dist._first_host(nodes) == first


def test_srun_tasks_find_each_other(environment):
    """Sum the ranks of two processes that have SLURM's variables alone."""
    code = (
        "from util import dist; import torch; env = dist.setup('cpu'); "
        "print(env[1:], dist.all_reduce_sum(torch.tensor(env.rank + 1.0)).item()); dist.cleanup()"
    )
    start = {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **start, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=60)[0].strip() for task in tasks]
    assert printed == ["(0, 2, 0, 2) 3.0", "(1, 2, 1, 2) 3.0"]


def test_cuda_without_a_gpu_is_one_line(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match="^--device cuda: .* finds no CUDA device. Use --device cpu"
    ):
        dist.setup("cuda")


@pytest.mark.parametrize(
    ("device", "local_rank", "srun", "visible", "index"),
    [
        ("cuda", 1, False, 2, 1),
        ("cuda", 1, True, 2, 1),
        ("cuda", 1, True, 1, 0),  # srun --gpus-per-task 1
        ("cuda:0", 1, False, 2, 0),
    ],
)
def test_each_process_gets_a_gpu(monkeypatch, device, local_rank, srun, visible, index):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpu = torch.device("cuda", index)
    assert dist._select_gpu(torch.device(device), local_rank, srun) == gpu
    assert chosen == [gpu]


def test_more_processes_than_gpus_is_one_line_of_that_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^local rank 2 has no GPU \(2 visible\). Start") as raised:
        dist._select_gpu(torch.device("cuda"), 2, started_by_srun=False)
    assert raised.value.print_on_any_rank


def test_flags_of_one_process_are_the_result():
    any_rank = AnyRank()
    assert any_rank.now(True, False) == [True, False]
    assert any_rank.deferred(False, True) == [False, True]
    any_rank.drain()


def test_an_output_path_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from util.dist import run_script
run_script(lambda: Path({str(tmp_path / "file" / "runs")!r}).mkdir(parents=True))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'file'}")


def test_other_errors_of_the_system_keep_their_traceback():
    def fail() -> None:
        raise ConnectionResetError("peer")

    with pytest.raises(ConnectionResetError):
        dist.run_script(fail)


def run_piped(program: str, output: int, **options) -> subprocess.CompletedProcess:
    """Run a Python program that imports util.dist, its stdout a file descriptor."""
    return subprocess.run(
        [sys.executable, "-c", f"from util import dist\n{program}"],
        stdout=output,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        **options,
    )


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_ends_early_ends_the_script_quietly(lines):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_piped(f"dist.run_script(lambda: dist.print0('line\\n' * {lines}))", writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_keeps_its_traceback(tmp_path):
    with open(tmp_path / "out.txt", "w") as output:
        done = run_piped(
            "def fail(): raise BrokenPipeError('of a worker')\ndist.run_script(fail)",
            output.fileno(),
        )
    assert done.returncode == 1
    assert b"BrokenPipeError: of a worker" in done.stderr


def test_names_that_are_no_text_are_printed_by_any_terminal(tmp_path):
    program = "dist.run_script(lambda: dist.print0('a\\udce9b'))"
    strict = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    with open(tmp_path / "out.txt", "w") as output:
        done = run_piped(program, output.fileno(), env=strict)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out.txt").read_text() == "a\\udce9b\n"


def test_an_error_is_one_line_whatever_is_in_a_name(capsys):
    def fail() -> None:
        raise UserError("a\nb\x1b[31m.mp4 cannot be read")

    with pytest.raises(SystemExit):
        dist.run_script(fail)
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m.mp4 cannot be read\n"


@pytest.mark.parametrize("error", [errno.ENAMETOOLONG, errno.ELOOP, errno.EDQUOT])
def test_a_path_that_the_system_refuses_is_one_line(error, capsys):
    def fail() -> None:
        raise OSError(error, os.strerror(error), "some/path")

    with pytest.raises(SystemExit):
        dist.run_script(fail)
    assert capsys.readouterr().err.startswith("error: some/path cannot be used")


def test_a_lack_of_open_files_is_one_line(capsys):
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files", "run_log.txt")

    with pytest.raises(SystemExit, match="2"):
        dist.run_script(fail)
    error = capsys.readouterr().err
    assert error.startswith("error: no more files can be opened (Too many open files; ulimit -n is")
    assert error.count("\n") == 1
