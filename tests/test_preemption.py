"""Runs under torchrun that are stopped, or lose a process or their launcher (T11-T13).

The sbatch example runs under a fake scheduler.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, Job, check_ranks, clean_environment, faulty_job
from make_videos import write_folder
from runs import pretrain_command, recorded_steps, saved_state
from tiny import same

from util.checkpoint import load

FLAGS = "--batch_size_per_gpu 2 --epochs 3".split()
WORKER = "--num_workers 1".split()
HANDLED_SIGNALS = "--signals-to-handle SIGTERM,SIGINT,SIGUSR1".split()
SLOW = {"do": "slow", "seconds": 0.3}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of 16 videos: four updates of 2 x 2 an epoch."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 16))


@pytest.fixture(scope="module")
def uninterrupted(videos, tmp_path_factory):
    """Return the folder of three epochs on two ranks."""
    out = tmp_path_factory.mktemp("uninterrupted")
    check_ranks(2, pretrain_command(videos, out, *FLAGS))
    return out


def check_stopped_and_resume(job: Job, videos: str, uninterrupted: Path, *flags: str) -> None:
    """Check the files of a job that was stopped; resume it, and compare the end.

    flags: more flags of the command.
    """
    text = job.printed.read_text()
    assert text.count("Run the same command to resume.") == 1, text[-3000:]
    step = load(job.out / "run.pth")["step"]
    marker = job.out / "run.PREEMPTED"
    assert 0 < step < 12
    assert marker.read_text().strip() == str(step)
    assert not list(job.out.glob("*.tmp"))
    printed = check_ranks(2, pretrain_command(videos, job.out, *FLAGS, *flags))
    assert f"resumed from {job.out / 'run.pth'} at update {step}" in printed
    assert not marker.exists()
    assert same(saved_state(job.out), saved_state(uninterrupted))


def send_to_torchrun(job: Job, signum: int) -> None:
    """Send torchrun a signal, which it forwards to its processes."""
    job.process.send_signal(signum)


def terminate_twice(job: Job) -> None:
    """Send torchrun SIGTERM two times."""
    job.process.terminate()
    time.sleep(0.2)
    job.process.terminate()


def interrupt_all(job: Job) -> None:
    """Send SIGINT to every process of the job, loader workers too, as a terminal does."""
    for pid in job.processes():
        os.kill(pid, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        lambda job: send_to_torchrun(job, signal.SIGTERM),
        lambda job: send_to_torchrun(job, signal.SIGUSR1),
        terminate_twice,
        interrupt_all,
    ],
    ids=["SIGTERM to torchrun", "SIGUSR1 to torchrun", "SIGTERM twice", "Ctrl-C in a terminal"],
)
def test_t11_a_signal_stops_the_run_gracefully(stop, videos, uninterrupted, tmp_path):
    flags = pretrain_command(videos, tmp_path, *FLAGS, *WORKER)
    job = faulty_job(tmp_path, [SLOW], flags, *HANDLED_SIGNALS)
    job.wait_for(r"update 3/12")
    stop(job)
    # torchrun reports any signal to itself as an error; the marker shows that all is well
    assert job.wait_until_gone() != 0
    check_stopped_and_resume(job, videos, uninterrupted)


@pytest.mark.slow
def test_t11_a_signal_to_one_rank_stops_all(videos, uninterrupted, tmp_path):
    faults = [SLOW, {"do": "SIGUSR1", "rank": 1, "at": 5}]
    flags = pretrain_command(videos, tmp_path, *FLAGS, *WORKER)
    job = faulty_job(tmp_path, faults, flags, *HANDLED_SIGNALS)
    assert job.wait_until_gone(90) == 0
    check_stopped_and_resume(job, videos, uninterrupted)


@pytest.mark.slow
def test_t11_a_signal_in_validation_stops_and_resumes_it(videos, tmp_path):
    validation = ["--val_dirs", videos]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    check_ranks(2, pretrain_command(videos, whole, *FLAGS, *validation))
    faults = [{"do": "in validation", "signal": "SIGTERM", "rank": 0}]
    job = faulty_job(parts, faults, pretrain_command(videos, parts, *FLAGS, *validation))
    assert job.wait_until_gone(90) == 0
    assert load(parts / "run.pth")["step"] == 4
    assert not (parts / "run_log.txt").exists()
    check_stopped_and_resume(job, videos, whole, *validation)
    log = (parts / "run_log.txt").read_text()
    assert log == (whole / "run_log.txt").read_text()
    assert log.count("val_loss") == 3


@pytest.mark.slow
def test_t11_a_signal_while_compiling(videos, tmp_path):
    """A stop waits for the first update, in which the blocks are compiled.

    The ranks get the signal themselves, so that torchrun's grace period does not begin.
    """
    flags = pretrain_command(videos, tmp_path, *FLAGS, "--compile")
    job = faulty_job(tmp_path, [{"do": "SIGTERM", "at": 1}], flags)
    assert job.wait_until_gone(200) == 0
    assert load(tmp_path / "run.pth")["step"] in (1, 2)
    assert (tmp_path / "run.PREEMPTED").exists()
    printed = check_ranks(2, pretrain_command(videos, tmp_path, *FLAGS))
    assert "--compile True -> False" in printed


@pytest.mark.slow
def test_t12_a_killed_rank_is_restarted_five_times(videos, uninterrupted, tmp_path):
    faults = [{"do": "SIGKILL", "rank": start % 2, "at": 3, "start": start} for start in range(5)]
    flags = pretrain_command(videos, tmp_path, *FLAGS, "--checkpoint_every_steps", "1")
    options = ["--max-restarts", "5"]
    job = faulty_job(tmp_path, faults, flags, *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert job.wait_until_gone(240) == 0
    assert len(re.findall("resumed from", job.printed.read_text())) == 5
    assert same(saved_state(tmp_path), saved_state(uninterrupted))


@pytest.mark.slow
def test_t12_a_killed_launcher_leaves_no_process(videos, uninterrupted, tmp_path):
    job = faulty_job(tmp_path, [SLOW], pretrain_command(videos, tmp_path, *FLAGS, *WORKER))
    job.wait_for(r"update 2/12")
    job.process.kill()
    assert job.wait_until_gone(20) == -signal.SIGKILL
    assert "(launcher died)" in job.printed.read_text()
    check_stopped_and_resume(job, videos, uninterrupted)


@pytest.mark.slow
def test_t12_a_launcher_killed_before_training_leaves_no_process(videos, tmp_path):
    job = faulty_job(tmp_path, [], pretrain_command(videos, tmp_path, *FLAGS))
    job.wait_for("revision")  # the process group exists
    job.process.kill()
    assert job.wait_until_gone(20) == -signal.SIGKILL
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
def test_t13_a_rank_that_fails_ends_the_run(videos, tmp_path):
    faults = [{"do": "raise", "rank": 1, "at": 3}]
    job = faulty_job(tmp_path, faults, pretrain_command(videos, tmp_path, *FLAGS))
    assert job.wait_until_gone(60) != 0
    text = job.printed.read_text()
    cause = text.index("RuntimeError: injected: this rank fails")
    torchruns_summary = text.index("exitcode")
    assert cause < torchruns_summary
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "run.PREEMPTED").exists()
    assert len(recorded_steps(tmp_path, 1)) == 2


@pytest.mark.slow
def test_the_sbatch_example_requeues_itself_and_resumes(videos, uninterrupted, tmp_path):
    """Every process of the step gets the scheduler's signal, twice.

    The first signal comes during training and the second in another start's validation.
    """
    log = tmp_path / "job.out"
    out = tmp_path / "out"
    flags = pretrain_command(videos, out, *FLAGS, *WORKER, "--val_dirs", videos)
    for name in ("--output_dir", "--datafile_dir", "--save_prefix"):  # the script gives them
        index = flags.index(name)
        del flags[index : index + 2]
    scheduler = [sys.executable, str(ROOT / "tests/fake_slurm.py")]
    moments = ["update 2/12", "update 8/12"]
    job = [str(ROOT / "examples/pretrain.sbatch"), str(out), "run", *flags]
    command = [*scheduler, str(log), *moments, "--", *job]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=clean_environment()
    )
    assert done.stdout.splitlines() == [
        "start 0: exit code 0, requeued",
        "start 1: exit code 0, requeued",
        "start 2: exit code 0, done",
    ], done.stdout + done.stderr + log.read_text()[-3000:]
    assert len(re.findall("preempted at update", log.read_text())) == 2
    assert not (out / "run.PREEMPTED").exists()
    assert same(saved_state(out)["model"], saved_state(uninterrupted)["model"])
