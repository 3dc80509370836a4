"""Where a process finds its place: torchrun's variables, SLURM's, or none."""

import os
import subprocess
import sys

import pytest

from util import dist


@pytest.fixture
def environment(monkeypatch):
    """An environment without a launcher, and a way to set one."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_alone(environment):
    assert dist.rank() == 0
    assert dist.setup("cpu")[1:] == (0, 1, 0, 1)


def test_torchrun_wins_over_slurm(environment):
    environment(
        RANK="3", LOCAL_WORLD_SIZE="4", SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"
    )
    assert dist.rank() == 3 and dist.local_world_size() == 4


def test_a_batch_scripts_own_shell_is_one_process(environment):
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
    """Two processes with SLURM's variables alone add up their ranks."""
    code = (
        "from util import dist; import torch; p = dist.setup('cpu'); "
        "print(p[1:], dist.sum_over_ranks(torch.tensor(p.rank + 1.0)).item()); dist.cleanup()"
    )
    start = {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **start, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    said = [task.communicate(timeout=60)[0].strip() for task in tasks]
    assert said == ["(0, 2, 0, 2) 3.0", "(1, 2, 1, 2) 3.0"]
