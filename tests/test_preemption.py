"""Runs under torchrun that are stopped, lose a process or their launcher (T11-T13), and the sbatch example under a fake scheduler."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, Job, clean_environment, faulty, ranks
from make_videos import write_folder
from test_pretrain import command
from test_resume import DONE, state, used
from tiny import same

import finetune
from util import checkpoint
from util.checkpoint import load
from util.dist import UserError

FLAGS = ["--batch_size_per_gpu", "2", "--epochs", "3"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Sixteen videos: four updates of 2 x 2 an epoch."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 16))


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    """Three epochs on two ranks without disturbance."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert ranks(2, command(videos, out, *FLAGS))[0] == DONE
    return out


def check_stopped_and_go_on(
    job: Job, videos: str, undisturbed: Path, flags: list[str] = ()
) -> None:
    """One checkpoint at one update, a marker that names it; the same command ends as if nothing had happened."""
    text = job.printed.read_text()
    assert text.count("the same command goes on from here") == 1, text[-3000:]
    step = load(job.out / "run.pth")["step"]
    assert (
        0 < step < 12
        and (job.out / "run.PREEMPTED").read_text().strip() == str(step)
        and not list(job.out.glob("*.tmp"))
    )
    codes, printed = ranks(2, command(videos, job.out, *FLAGS, *flags))
    assert codes == DONE and f"resumed from {job.out / 'run.pth'} at update {step}" in printed, (
        printed
    )
    assert not (job.out / "run.PREEMPTED").exists()
    assert same(state(job.out), state(undisturbed))


HANDLED = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "SIGTERM to torchrun",
        "SIGUSR1 with the flag",
        "to rank 1 only",
        "twice",
        "Ctrl-C in a terminal",
    ],
)
def test_t11_a_signal_stops_the_run_in_good_order(case, videos, undisturbed, tmp_path):
    faults, workers = (
        [{"do": "SIGUSR1", "rank": 1, "at": 5}] if case == "to rank 1 only" else [],
        ["--num_workers", "1"],
    )
    job = Job(
        tmp_path,
        "tests/faulty.py",
        faulty(
            [*faults, {"do": "slow", "seconds": 0.3}], command(videos, tmp_path, *FLAGS, *workers)
        ),
        *HANDLED,
    )
    job.until(r"update 3/12")
    if case in ("SIGTERM to torchrun", "twice"):
        job.process.terminate()
        time.sleep(0.2)
        job.process.terminate() if case == "twice" else None
    elif case == "SIGUSR1 with the flag":
        job.process.send_signal(signal.SIGUSR1)
    elif case == "Ctrl-C in a terminal":  # which every process of the job gets, loaders too
        for process in job.processes():
            os.kill(process, signal.SIGINT)
    assert (job.gone() == 0) == (
        case == "to rank 1 only"
    )  # torchrun calls a signal of its own an error: the marker is what tells
    check_stopped_and_go_on(job, videos, undisturbed)


@pytest.mark.slow
def test_t11_a_signal_in_validation_stops_it_and_the_next_start_makes_it_up(videos, tmp_path):
    seen = ["--val_dirs", videos]
    assert ranks(2, command(videos, tmp_path / "whole", *FLAGS, *seen))[0] == DONE
    flags = faulty(
        [{"do": "in validation", "signal": "SIGTERM", "rank": 0}],
        command(videos, tmp_path / "parts", *FLAGS, *seen),
    )
    job = Job(tmp_path / "parts", "tests/faulty.py", flags)
    assert job.gone(90) == 0
    assert (
        load(tmp_path / "parts/run.pth")["step"] == 4
        and not (tmp_path / "parts/run_log.txt").exists()
    )
    check_stopped_and_go_on(job, videos, tmp_path / "whole", seen)
    logs = [(tmp_path / name / "run_log.txt").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and logs[0].count("val_loss") == 3


@pytest.mark.slow
def test_t11_a_signal_while_compiling(videos, tmp_path):
    """It waits for the first update, in which the blocks are compiled; here the ranks get it, and no clock of torchrun runs."""
    flags = command(videos, tmp_path, *FLAGS, "--compile")
    job = Job(tmp_path, "tests/faulty.py", faulty([{"do": "SIGTERM", "at": 1}], flags))
    assert job.gone(200) == 0
    assert load(tmp_path / "run.pth")["step"] in (1, 2) and (tmp_path / "run.PREEMPTED").exists()
    codes, printed = ranks(2, command(videos, tmp_path, *FLAGS))
    assert codes == DONE and "--compile True -> False" in printed


@pytest.mark.slow
def test_t12_a_killed_rank_is_started_again_five_times(videos, undisturbed, tmp_path):
    faults = [{"do": "SIGKILL", "rank": start % 2, "at": 3, "start": start} for start in range(5)]
    flags = command(videos, tmp_path, *FLAGS, "--checkpoint_every_steps", "1")
    job = Job(
        tmp_path,
        "tests/faulty.py",
        faulty(faults, flags),
        "--max-restarts",
        "5",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert job.gone(240) == 0
    assert len(re.findall("resumed from", job.printed.read_text())) == 5
    assert same(state(tmp_path), state(undisturbed))


@pytest.mark.slow
def test_t12_a_launcher_that_is_killed_leaves_nobody_behind(videos, undisturbed, tmp_path):
    job = Job(
        tmp_path,
        "tests/faulty.py",
        faulty(
            [{"do": "slow", "seconds": 0.3}],
            command(videos, tmp_path, *FLAGS, "--num_workers", "1"),
        ),
    )
    job.until(r"update 2/12")
    job.process.kill()
    assert job.gone(20) == -signal.SIGKILL
    assert "by the end of its launcher" in job.printed.read_text()
    check_stopped_and_go_on(job, videos, undisturbed)


@pytest.mark.slow
def test_t12_a_launcher_that_is_killed_before_training_leaves_nobody_behind(videos, tmp_path):
    job = Job(tmp_path, "tests/faulty.py", faulty([], command(videos, tmp_path, *FLAGS)))
    job.until("revision")  # rank 0 has met the others
    job.process.kill()
    assert job.gone(20) == -signal.SIGKILL
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
def test_t13_a_rank_that_fails_ends_the_run(videos, tmp_path):
    job = Job(
        tmp_path,
        "tests/faulty.py",
        faulty([{"do": "raise", "rank": 1, "at": 3}], command(videos, tmp_path, *FLAGS)),
    )
    assert job.gone(60) != 0
    text = job.printed.read_text()
    assert text.index("RuntimeError: injected: this rank fails") < text.index(
        "exitcode"
    )  # the cause, before torchrun's summary
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "run.PREEMPTED").exists()
    assert len(used(tmp_path, 1)) == 2


def test_two_processes_cannot_write_one_run(videos, tmp_path, monkeypatch):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import fcntl, sys, time
file = open({str(tmp_path / ".run.lock")!r}, "a"); fcntl.lockf(file, fcntl.LOCK_EX); print("held", flush=True); time.sleep(60)""",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"

    class Flags:
        output_dir, save_prefix = str(tmp_path), "run"

    with pytest.raises(UserError, match="another process writes .*run.pth"):
        checkpoint.claim(Flags, patience=0.5)
    with pytest.raises(
        UserError, match="found no checkpoint"
    ):  # evaluation beside a run that trains does not wait for it
        finetune.main(
            ["--eval", "--val_dir", videos, "--output_dir", str(tmp_path), "--save_prefix", "run"]
        )
    holder.kill()
    checkpoint.claim(Flags, patience=10)
    Flags.save_prefix = "other"
    checkpoint.claim(Flags, patience=0)


@pytest.mark.slow
def test_the_sbatch_example_comes_back_by_itself(videos, undisturbed, tmp_path):
    """The scheduler's signal hits every process of the step twice, before and in the validation of another start; then the run ends."""
    log, out = tmp_path / "job.out", tmp_path / "out"
    flags = command(videos, out, *FLAGS, "--num_workers", "1", "--val_dirs", videos)
    for name in ("--output_dir", "--datafile_dir", "--save_prefix"):
        del flags[flags.index(name) : flags.index(name) + 2]
    scheduler = [
        sys.executable,
        str(ROOT / "tests/fake_slurm.py"),
        str(log),
        "update 2/12",
        "update 8/12",
        "--",
        str(ROOT / "examples/pretrain.sbatch"),
        str(out),
        "run",
        *flags,
    ]
    done = subprocess.run(
        scheduler, capture_output=True, text=True, timeout=300, cwd=ROOT, env=clean_environment()
    )
    assert done.stdout.splitlines() == [
        "start 0: exit code 0, back into the queue",
        "start 1: exit code 0, back into the queue",
        "start 2: exit code 0, done",
    ], done.stdout + done.stderr + log.read_text()[-3000:]
    assert (
        log.read_text().count("pre-empted at update") == 2 and not (out / "run.PREEMPTED").exists()
    )
    assert same(state(out)["model"], state(undisturbed)["model"])
