"""Exact resuming (T01-T04, T09): interrupted runs end like uninterrupted ones.

Equal are the weights, the log, and the samples in their order.
"""

import re
import shutil
import subprocess
import sys

import pytest
from launch import check_ranks, run_ranks
from make_videos import write_folder
from runs import (
    assert_same_run,
    log_records,
    pretrain_command,
    recorded_steps,
    saved_state,
    steps_of_both_ranks,
)
from tiny import same

import finetune
from util import resume
from util.checkpoint import load
from util.dist import UserError
from util.files import RunFiles

BATCH = ["--batch_size_per_gpu", "2"]
HOLD_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of 17 videos: four updates of 2 x 2 an epoch, one video left over."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 17))


@pytest.fixture(scope="module")
def uninterrupted(videos, tmp_path_factory):
    """Return the folder of three epochs on two ranks, with validation."""
    out = tmp_path_factory.mktemp("uninterrupted")
    check_ranks(2, three_epochs(videos, out))
    return out


def three_epochs(videos, out, *more) -> list[str]:
    """Return the command of three epochs of four updates, each validated."""
    flags = [*BATCH, "--epochs", "3", "--val_dirs", videos]
    return pretrain_command(videos, out, *flags, *more)


def assert_close_weights(out, other) -> None:
    """Check that the weights of two runs are equal to 1e-6."""
    ours = saved_state(out)["model"]
    theirs = saved_state(other)["model"]
    for name in theirs:
        if not name.endswith("attn.k.bias"):  # its gradient is rounding alone
            assert (ours[name] - theirs[name]).abs().max() <= 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--val_dirs VIDEOS", "--val_dirs VIDEOS --num_workers 2", ""],
    ids=["again", "with workers", "without validation"],
)
def test_t01_a_run_repeats_with_workers_and_without_validation(
    flags, videos, uninterrupted, tmp_path
):
    flags = flags.replace("VIDEOS", videos).split()
    check_ranks(2, pretrain_command(videos, tmp_path, *BATCH, "--epochs", "3", *flags))
    assert same(saved_state(tmp_path), saved_state(uninterrupted))
    steps = steps_of_both_ranks(tmp_path)
    assert steps == steps_of_both_ranks(uninterrupted)
    assert len(steps[0]) == 12
    losses = {entry["loss"] for rank_steps in steps for entry in rank_steps}
    assert len(losses) > 20


def stop_three_times(videos, out, *faults) -> None:
    """Send SIGTERM to rank 0, to rank 1 and to both, inside an epoch each time; then finish."""
    stops = (
        [{"do": "SIGTERM", "rank": 0, "at": 2}],
        [{"do": "SIGTERM", "rank": 1, "at": 2}],
        [{"do": "SIGTERM", "at": 1}],
    )
    marker = out / "run.PREEMPTED"
    for stop in stops:
        printed = check_ranks(2, three_epochs(videos, out), [*stop, *faults])
        assert marker.read_text().strip() == str(load(out / "run.pth")["step"])
        assert "Run the same command to resume." in printed
    check_ranks(2, three_epochs(videos, out), list(faults))
    assert not marker.exists()


def test_t02_three_stops_inside_an_epoch_change_nothing(videos, uninterrupted, tmp_path):
    stop_three_times(videos, tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    steps = steps_of_both_ranks(tmp_path)
    assert steps == steps_of_both_ranks(uninterrupted)
    for start in (0, 4, 8):  # the first update of each epoch
        used = []
        for rank_steps in steps:
            for entry in rank_steps[start : start + 4]:
                used += entry["index"]
        assert len(used) == len(set(used)) == 16  # each sample once


@pytest.mark.slow
def test_t02_a_wrong_position_in_the_epoch_is_noticed(videos, uninterrupted, tmp_path):
    stop_three_times(videos, tmp_path, {"do": "no offset"})
    assert not same(saved_state(tmp_path)["model"], saved_state(uninterrupted)["model"])


@pytest.mark.slow
def test_t02_on_three_ranks_with_several_buckets(videos, tmp_path):
    """DDP rebuilds its buckets after the first passes, which changes the order of three terms."""
    flags = (
        "--model mae_vit_tiny_patch16 --patch_size 16 --batch_size_per_gpu 1 --max_steps 8"
    ).split()
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    check_ranks(3, pretrain_command(videos, whole, *flags), timeout=300)
    for faults in ([{"do": "SIGTERM", "at": 2}], [{"do": "SIGTERM", "at": 1}], []):
        check_ranks(3, pretrain_command(videos, parts, *flags), faults, timeout=300)
    assert_same_run(parts, whole)


@pytest.mark.parametrize(
    "step",
    [1, 4, 5],
    ids=["first of the run", "last of an epoch, before its validation", "first of an epoch"],
)
def test_t03_killed_after_saving_an_update(videos, uninterrupted, tmp_path, step):
    flags = three_epochs(videos, tmp_path, "--checkpoint_every_steps", "1")
    codes, _ = run_ranks(2, flags, [{"do": "die after save", "rank": 0, "step": step}])
    assert codes[0] == -9
    assert load(tmp_path / "run.pth")["step"] == step
    printed = check_ranks(2, flags)
    assert f"resumed from {tmp_path / 'run.pth'} at update {step}" in printed
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_t03_a_stop_inside_an_accumulation_waits_for_its_update(videos, tmp_path):
    flags = "--accum_iter 2 --batch_size_per_gpu 2 --epochs 2 --lr 1e-4".split()
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    check_ranks(2, pretrain_command(videos, whole, *flags))
    check_ranks(2, pretrain_command(videos, parts, *flags), [{"do": "SIGUSR1", "at": 1}])
    assert (parts / "run.PREEMPTED").exists()
    assert len(recorded_steps(parts, 0)) % 2 == 0
    check_ranks(2, pretrain_command(videos, parts, *flags))
    assert same(saved_state(parts), saved_state(whole))
    flags = "--accum_iter 1 --batch_size_per_gpu 4 --epochs 2 --lr 1e-4".split()
    check_ranks(2, pretrain_command(videos, tmp_path / "large", *flags))
    assert_close_weights(tmp_path / "large", whole)


def interleaved(first: list[int], second: list[int]) -> list[int]:
    """Return the elements of two lists in turn."""
    return [index for pair in zip(first, second, strict=True) for index in pair]


def merged_updates(out) -> list[tuple[list[int], float]]:
    """Return the samples and the loss of each update of all ranks.

    Rank 0 recorded 4 samples per update where it was alone, and 2 where rank 1 had the others.
    """
    second_rank = iter(recorded_steps(out, 1))
    updates = []
    for entry in recorded_steps(out, 0):
        if len(entry["index"]) == 4:
            updates.append((entry["index"], entry["loss"]))
            continue
        other = next(second_rank)
        indices = interleaved(entry["index"], other["index"])
        updates.append((indices, (entry["loss"] + other["loss"]) / 2))
    assert next(second_rank, None) is None
    return updates


@pytest.mark.slow
def test_t04_two_ranks_one_and_two_again_at_the_same_global_batch(videos, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    flags = "--epochs 3 --lr 1e-4 --checkpoint_every_steps 1 --batch_size_per_gpu".split()
    on_two = pretrain_command(videos, parts, *flags, "2", "--num_workers", "1")
    on_one = pretrain_command(videos, parts, *flags, "4", "--num_workers", "2")
    check_ranks(2, pretrain_command(videos, whole, *flags, "2"))
    check_ranks(2, on_two, [{"do": "SIGTERM", "at": 2}])
    check_ranks(1, on_one, [{"do": "SIGTERM", "at": 3}])
    check_ranks(2, on_two)
    alone = [entry for entry in recorded_steps(parts, 0) if len(entry["index"]) == 4]
    assert 2 <= len(alone) <= 4
    for update, expected in zip(merged_updates(parts), merged_updates(whole), strict=True):
        indices, loss = update
        expected_indices, expected_loss = expected
        assert indices == expected_indices
        assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_close_weights(parts, whole)


def test_t04_another_global_batch_is_refused_unless_forced(videos, tmp_path):
    flags = "--epochs 4 --checkpoint_every_steps 3 --sync_save --batch_size_per_gpu".split()
    # killed when 12 of the 16 samples of the first epoch are used
    run_ranks(1, pretrain_command(videos, tmp_path, *flags, "4"), [{"do": "SIGKILL", "at": 4}])
    before = (tmp_path / "run.pth").read_bytes()
    smaller = pretrain_command(videos, tmp_path, *flags, "2")
    codes, printed = run_ranks(1, smaller)
    assert codes == [2]
    assert "global batch 4 -> 2" in printed
    assert "--force_resume" in printed
    assert "Traceback" not in printed
    assert (tmp_path / "run.pth").read_bytes() == before
    faults = [{"do": "SIGKILL", "at": 3}]
    codes, printed = run_ranks(1, [*smaller, "--force_resume"], faults)
    assert "resumed from" in printed
    assert "at update 6" in printed  # 12 samples in updates of two
    used = [index for entry in recorded_steps(tmp_path, 0)[:5] for index in entry["index"]]
    assert len(used) == len(set(used)) == 16  # the epoch continued with the remaining samples


def test_t04_with_a_larger_batch_the_epoch_continues(videos, tmp_path):
    flags = "--epochs 4 --checkpoint_every_steps 1 --sync_save --batch_size_per_gpu".split()
    # killed when one update of two samples is saved
    run_ranks(1, pretrain_command(videos, tmp_path, *flags, "2"), [{"do": "SIGKILL", "at": 2}])
    check_ranks(1, pretrain_command(videos, tmp_path, *flags, "4", "--force_resume"))
    log = log_records(tmp_path)
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
    assert log[-1]["step"] == 16


def test_a_complete_run_is_kept_and_a_longer_one_continues(videos, tmp_path):
    flags = "--batch_size_per_gpu 4 --max_steps".split()
    for max_steps, logged in (("6", [4, 6]), ("6", [4, 6]), ("8", [4, 6, 8])):
        check_ranks(1, pretrain_command(videos, tmp_path, *flags, max_steps))
        assert [record["step"] for record in log_records(tmp_path)] == logged


@pytest.mark.slow
def test_a_repeated_command_with_a_path_resumes_its_own_run(videos, tmp_path):
    flags = [*BATCH, *"--checkpoint_every_steps 1 --sync_save --max_steps".split()]
    check_ranks(1, pretrain_command(videos, tmp_path / "first", *flags, "2"))
    out = tmp_path / "second"
    first = str(tmp_path / "first/run.pth")
    command = pretrain_command(videos, out, *flags, "12", "--resume", first)
    for at, resumed in ((3, 2), (4, 4)):
        _, printed = run_ranks(1, command, [{"do": "SIGKILL", "at": at}])
        assert f"at update {resumed}" in printed
    previous = str(out / "run_previous1.pth")
    codes, printed = run_ranks(1, pretrain_command(videos, out, *flags, "12", "--resume", previous))
    assert codes == [2]
    assert "would overwrite that run" in printed


def test_a_log_of_updates_never_saved_is_renamed(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *BATCH, "--epochs", "4")
    command += ["--checkpoint_period", "4"]
    # killed when two epochs of eight updates are logged and none is saved
    run_ranks(1, command, [{"do": "SIGKILL", "at": 18}])
    assert [record["epoch"] for record in log_records(tmp_path)] == [0, 1]
    assert not (tmp_path / "run.pth").exists()
    before = (tmp_path / "run_log.txt").read_text()
    check_ranks(1, command)
    assert [record["epoch"] for record in log_records(tmp_path)] == [0, 1, 2, 3]
    assert (tmp_path / "run_log.txt.before").read_text() == before


@pytest.mark.slow
def test_unreadable_videos_are_remembered_over_a_stop(videos, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    for path in sorted(folder.glob("*/*.mp4"))[::4]:
        path.write_text("no video")
    flags = [*BATCH, *"--epochs 2 --max_bad_frac 0.5".split()]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    check_ranks(2, pretrain_command(folder, whole, *flags))
    check_ranks(2, pretrain_command(folder, parts, *flags), [{"do": "SIGTERM", "at": 3}])
    check_ranks(2, pretrain_command(folder, parts, *flags))
    assert log_records(parts) == log_records(whole)
    assert log_records(whole)[-1]["unreadable_videos"] == 5
    whole_list = (whole / "bad_videos.csv").read_text().splitlines()
    parts_list = (parts / "bad_videos.csv").read_text().splitlines()
    assert sorted(parts_list) == sorted(whole_list)


@pytest.fixture(scope="module")
def stopped_run(videos, tmp_path_factory):
    """Return the folder of a run that was stopped in its first epoch of eight updates."""
    out = tmp_path_factory.mktemp("stopped")
    command = pretrain_command(videos, out, *BATCH, "--epochs", "2")
    check_ranks(1, command, [{"do": "SIGTERM", "at": 3}])
    return out


@pytest.fixture
def resumable(stopped_run, tmp_path):
    """Return the folder of a copy of the stopped run."""
    out = tmp_path / "run"
    shutil.copytree(stopped_run, out)
    return out


def drop_last_sample(out) -> None:
    """Remove the last line of a run's manifest."""
    manifest = out / "run_train.csv"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-1]))


@pytest.mark.slow
def test_t09_another_training_set_is_refused_unless_forced(videos, resumable):
    command = pretrain_command(videos, resumable, *BATCH, "--epochs", "2")
    before = (resumable / "run.pth").read_bytes()
    drop_last_sample(resumable)
    codes, printed = run_ranks(1, command)
    assert codes == [2]
    assert "training set of 17 -> 16 samples" in printed
    assert "Traceback" not in printed
    assert (resumable / "run.pth").read_bytes() == before
    printed = check_ranks(1, [*command, "--force_resume"])
    assert "by --force_resume: training set of 17 -> 16 samples" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("force", "message"),
    [
        ([], "depth: 2 in the checkpoint, 12 now"),
        (["--force_resume"], "does not fit the model"),  # the shapes differ
    ],
)
def test_t09_another_model_is_refused(force, message, videos, resumable):
    flags = [*BATCH, *"--epochs 2 --model mae_vit_tiny_patch16".split(), *force]
    before = (resumable / "run.pth").read_bytes()
    codes, printed = run_ranks(1, pretrain_command(videos, resumable, *flags))
    assert codes == [2]
    assert re.search(message, printed)
    assert "Traceback" not in printed
    assert (resumable / "run.pth").read_bytes() == before


@pytest.mark.slow
def test_t09_changed_flags_are_printed(videos, resumable):
    flags = [*BATCH, *"--epochs 2 --lr 0.0005 --seed 3".split()]
    printed = check_ranks(1, pretrain_command(videos, resumable, *flags))
    assert "--lr 0.001 -> 0.0005" in printed
    assert "--seed 0 -> 3" in printed
    assert "--epochs" not in printed


def test_two_processes_cannot_write_one_run(videos, tmp_path):
    files = RunFiles(tmp_path, "run")
    command = [sys.executable, "-c", HOLD_LOCK, str(files.lock)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process writes .*run.pth"):
        resume.lock_run(files, patience=0.5)
    # an evaluation beside a run that trains does not wait for it
    evaluation = f"--eval --val_dir {videos} --output_dir {tmp_path} --save_prefix run"
    with pytest.raises(UserError, match="found no checkpoint"):
        finetune.main(evaluation.split())
    holder.kill()
    resume.lock_run(files, patience=10)
    resume.lock_run(RunFiles(tmp_path, "other"), patience=0)
