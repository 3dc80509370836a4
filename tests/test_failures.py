"""One process fails, waits without end or trains something else: all end and say why once (F04).

The processes are started by hand or with srun's variables: nothing else would end them.
"""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launch import (
    clean_environment,
    end_processes,
    launcher_variables,
    script_command,
    slurm_variables,
    start_ranks,
    torchrun,
)
from make_videos import write_folder
from runs import pretrain_command
from torch.distributed import HashStore, TCPStore

from util import dist, failures, preemption, same_run
from util.dist import UserError
from util.failures import FailureWatch
from util.preemption import Progress, StopTimer

FLAGS = "--batch_size_per_gpu 2 --epochs 3".split()
SLOW = {"do": "slow", "seconds": 0.2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of 8 videos: two updates of 2 x 2 an epoch."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


def wait_for_text(path: Path, pattern: str, seconds: float = 60) -> None:
    """Wait until a file contains a pattern."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and re.search(pattern, path.read_text())):
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)


def printed_by(out: Path) -> list[str]:
    """Return what two ranks have printed."""
    return [(out / f"printed_{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.parametrize("variables", [launcher_variables, slurm_variables], ids=["hand", "srun"])
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--no_such_flag"], "unknown flag --no_such_flag"),
        (["--mask_ratio", "0.5"], "differs from rank 0 .*: --mask_ratio 0.5 instead of 0.75. "),
        (["--device", "cuda:9"], "--device cuda:9: "),
    ],
    ids=["unknown flag", "another flag", "no GPU"],
)
def test_f04_a_rank_with_other_flags_ends_all(flags, reason, variables, videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *FLAGS)
    processes = start_ranks([command, [*command, *flags]], variables=variables)
    assert not end_processes(processes, 60)
    assert [process.exitcode for process in processes] == [2, 2]
    text = "".join(printed_by(tmp_path))
    assert len(re.findall(f"error: .*{reason}", text)) == 1, text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert not (tmp_path / "run_train.csv").exists()


def test_f04_a_rank_with_another_manifest_ends_all(videos, tmp_path):
    """Its folder of manifests is not shared: it has none, or that of an earlier run."""
    command = pretrain_command(videos, tmp_path, *FLAGS)
    other = tmp_path / "other"
    for problem in ("not found", "differs from rank 0 on "):
        processes = start_ranks([command, [*command, "--datafile_dir", str(other)]])
        assert not end_processes(processes, 60)
        assert [process.exitcode for process in processes] == [2, 2]
        text = "".join(printed_by(tmp_path))
        assert len(re.findall(f"error: .*run_train.csv.*{problem}|{problem}.*run_train", text)) == 1
        assert text.count("error:") == 1, text
        other.mkdir(exist_ok=True)
        lines = (tmp_path / "run_train.csv").read_text().splitlines()
        (other / "run_train.csv").write_text("\n".join(lines[:-1]) + "\n")


def test_f04_a_port_in_use_is_one_line(videos, tmp_path):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        variables = launcher_variables(0, 2, used.getsockname()[1])
        run = subprocess.run(
            script_command("pretrain.py", pretrain_command(videos, tmp_path)),
            env=clean_environment(**variables),
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert run.returncode == 2
    errors = [line for line in run.stderr.splitlines() if "error: " in line]
    assert re.match("error: the 2 processes do not meet at 127.0.0.1:.*MASTER_PORT", errors[0])
    assert "Traceback" not in run.stderr


def test_f04_a_crash_by_hand_ends_all_within_seconds(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *FLAGS)
    fault = {"do": "raise", "rank": 1, "at": 3}
    processes = start_ranks([command, command], [fault])
    wait_for_text(tmp_path / "printed_1.txt", "this rank fails")
    assert not end_processes(processes, 10)
    assert [process.exitcode for process in processes] == [1, 1]
    text = "".join(printed_by(tmp_path))
    assert text.count("Traceback") == 1
    assert text.count("ended, because rank 1 on ") == 1


def test_f04_torchrun_prints_the_reason_once(videos, tmp_path):
    run = torchrun("pretrain.py", 2, pretrain_command(videos, tmp_path, "--mask_ratio", "1.5"))
    assert run.returncode != 0
    assert run.stderr.count("error: mask_ratio 1.5 ") == 1
    assert 'Traceback (most recent call last):\n  File "pretrain.py' not in run.stderr


@pytest.mark.slow
def test_f04_a_second_sigterm_ends_a_rank_that_waits(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *FLAGS, "--epochs", "100")
    processes = start_ranks([command, command], [SLOW])
    waiting, suspended = processes
    try:
        wait_for_text(tmp_path / "printed_0.txt", "update 3/")
        os.kill(suspended.pid, signal.SIGSTOP)
        time.sleep(1)
        for pause in (1, 9.5):
            waiting.terminate()
            time.sleep(pause)
            assert waiting.is_alive()
        waiting.terminate()
        waiting.join(10)
        assert waiting.exitcode == 128 + signal.SIGTERM
        assert "ended by a second SIGTERM" in printed_by(tmp_path)[0]
        os.kill(suspended.pid, signal.SIGCONT)
        suspended.join(20)
        assert suspended.exitcode not in (0, None)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_f04_a_stop_without_progress_ends_the_run(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *FLAGS, "--epochs", "100")
    faults = [SLOW, {"do": "stop within", "seconds": 3}]
    processes = start_ranks([command, command], faults)
    waiting, suspended = processes
    try:
        wait_for_text(tmp_path / "printed_0.txt", "update 3/")
        os.kill(suspended.pid, signal.SIGSTOP)
        waiting.terminate()
        waiting.join(20)
        assert waiting.exitcode == 128 + signal.SIGTERM
        assert re.search(r"ended \d s after SIGTERM", printed_by(tmp_path)[0])
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last entry is the time; progress starts again."""
    times = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: times[-1])
    monkeypatch.setattr(preemption, "_progress", Progress())
    return times


def seconds_until_end(clock: list[float], timer: StopTimer, most: float = 3000) -> float:
    """Return how long a process without progress lives after a signal."""
    begin = clock[-1]
    received = bytes([signal.SIGUSR1])
    while clock[-1] - begin < most:
        if timer.reason_to_end(received):
            return clock[-1] - begin
        received = b""
        clock.append(clock[-1] + preemption.POLL_SECONDS)
    return most


@pytest.mark.parametrize(("longest", "allowed"), [(1, 60), (11, 60), (40, 200)])
def test_f04_how_long_a_stop_may_take(longest, allowed, clock):
    assert seconds_until_end(clock, StopTimer()) == pytest.approx(600, abs=1)  # compiling
    for _ in range(2):
        preemption.mark_progress(update=True)
        clock.append(clock[-1] + longest)
    preemption.mark_progress()
    assert seconds_until_end(clock, StopTimer()) == pytest.approx(allowed, abs=1)
    with preemption.slow_work():
        assert seconds_until_end(clock, StopTimer()) == pytest.approx(600, abs=1)


def test_f04_progress_and_suspension_prolong_a_stop(clock):
    preemption.mark_progress(update=True)
    timer = StopTimer()
    timer.reason_to_end(bytes([signal.SIGTERM]))
    clock.append(clock[-1] + 3600)  # suspended
    assert not timer.reason_to_end(b"")
    for _ in range(100):
        clock.append(clock[-1] + preemption.POLL_SECONDS)
        assert not timer.reason_to_end(b"")
    preemption.mark_progress()
    assert 50 < seconds_until_end(clock, timer) < 70


def test_f04_only_a_late_second_sigterm_ends_a_stop(clock):
    timer = StopTimer()
    for signum, pause, stuck in (
        (signal.SIGUSR1, 100, False),
        (signal.SIGTERM, 0.1, False),
        (signal.SIGTERM, 9.8, False),
        (signal.SIGUSR1, 5, False),
        (signal.SIGTERM, 0, True),
    ):
        assert bool(timer.reason_to_end(bytes([signum]))) == stuck
        clock.append(clock[-1] + pause)


def test_f04_a_failure_of_an_earlier_start_is_ignored():
    """The store of torchrun serves all starts of the processes."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reported = []
    watches = []

    def start(rank):
        settings = {"store_in_launcher": True, "report": reported.append}
        watches.append(FailureWatch(server, rank, 2, **settings))
        return watches[-1]

    assert start(1).announce("earlier", 2, at_once=True).reason == "earlier"
    first, second = start(0), start(1)
    time.sleep(1.5 * failures.POLL_SECONDS)
    assert reported == []
    assert second.announce("now", 1, at_once=True).reason == "now"
    assert first.announce("later", 2, at_once=True).reason == "now"
    for watch in watches:
        watch.leave()


def test_f04_another_kind_of_device_ends_all_before_they_meet(monkeypatch):
    store = HashStore()
    monkeypatch.setenv("RANK", "0")
    dist._compare_devices(store, torch.device("cuda", 0))
    monkeypatch.setenv("RANK", "1")
    dist._compare_devices(store, torch.device("cuda", 1))
    with pytest.raises(UserError, match="^rank 1 on .* runs on cpu, rank 0 on cuda: "):
        dist._compare_devices(store, torch.device("cpu"))


def test_f04_a_terminal_that_is_gone_does_not_keep_a_process():
    def fail():
        raise BrokenPipeError

    assert failures.call_with_timeout(fail) is None
    assert failures.call_with_timeout(lambda: time.sleep(5), seconds=0.1) is None
    assert failures.call_with_timeout(lambda: 3) == 3


def test_f04_differences_name_rank_host_and_fact(monkeypatch):
    hosts = iter(["node1", "node2", "node3"])
    gathered = []

    def three_ranks(item):
        if isinstance(item, bytes):
            return [item, item, b"another"]
        name, facts = item
        gathered.append(name)
        return [(next(hosts), facts), (next(hosts), facts), (next(hosts), facts | {"torch": "2"})]

    monkeypatch.setattr(same_run, "all_gather_object", three_ranks)
    with pytest.raises(UserError, match="^rank 2 on node3 differs from rank 0 on node1: torch 2 "):
        same_run.compare({"torch": "3", "--lr": None}, "Install it.")
    assert len(gathered) == 1


def test_f04_equal_ranks_need_one_collective(monkeypatch):
    calls = []
    monkeypatch.setattr(
        same_run, "all_gather_object", lambda item: calls.append(item) or [item] * 2
    )
    same_run.compare({"a": 1}, "")
    same_run.compare({"a": 2}, "")
    assert len(set(calls)) == 2
    assert all(len(call) == 32 for call in calls)
