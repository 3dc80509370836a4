"""Saving through crashes, full disks and corrupt files (T05-T07), and when checkpoints are due."""

import re
from pathlib import Path

import pytest
import torch
from launch import check_ranks, run_ranks
from runs import pretrain_command, saved_state
from tiny import same

import pretrain
from util.dist import UserError

SAVE_EACH_UPDATE = "--batch_size_per_gpu 2 --epochs 3 --checkpoint_every_steps 1".split()
FULL_DISK = {"do": "full disk", "rank": 0, "at": 3, "bytes": 300_000}
BOTH_FAILED = [2, 2]  # exit codes of two ranks


@pytest.fixture(scope="module")
def uninterrupted(videos, tmp_path_factory):
    """Return the folder of three epochs of two updates on two ranks."""
    out = tmp_path_factory.mktemp("uninterrupted")
    check_ranks(2, pretrain_command(videos, out, *SAVE_EACH_UPDATE))
    return out


def test_t05_a_new_start_removes_its_own_stale_files_only(videos, tmp_path):
    for name in ("run.pth.tmp", "run_best.pth.tmp", "run_b.pth.tmp", "run_b_best.pth.tmp"):
        (tmp_path / name).write_text("half")
    flags = "--max_steps 1 --batch_size_per_gpu 4".split()
    check_ranks(1, pretrain_command(videos, tmp_path, *flags))
    left = sorted(path.name for path in tmp_path.glob("*.tmp"))
    assert left == ["run_b.pth.tmp", "run_b_best.pth.tmp"]  # those of another run


@pytest.mark.slow
def test_t06_a_full_disk_costs_checkpoints_but_not_the_run(videos, uninterrupted, tmp_path):
    command = pretrain_command(videos, tmp_path, *SAVE_EACH_UPDATE)
    room_again = {"do": "free disk", "rank": 0, "at": 6}
    # the pause lets the write of update 5 fail before there is room
    slow = {"do": "slow", "seconds": 0.5}
    printed = check_ranks(2, command, [slow, FULL_DISK, room_again])
    warning = r"could not save .*run.pth at update (\d) \(File too large\); the run continues"
    # update 4 ends an epoch: one save comes before its log line, and one after it
    assert re.findall(warning, printed) == ["3", "4", "4", "5"]
    assert same(saved_state(tmp_path), saved_state(uninterrupted))


@pytest.mark.slow
def test_t06_a_run_that_cannot_save_its_end_fails_and_resumes(videos, uninterrupted, tmp_path):
    command = pretrain_command(videos, tmp_path, *SAVE_EACH_UPDATE)
    codes, printed = run_ranks(2, command, [FULL_DISK])
    assert codes == BOTH_FAILED
    assert "its last checkpoint could not be written: make room" in printed
    assert "Traceback" not in printed
    assert saved_state(tmp_path)["step"] == 2
    assert not list(tmp_path.glob("*.tmp"))
    check_ranks(2, command)  # there is room again
    assert same(saved_state(tmp_path), saved_state(uninterrupted))


@pytest.mark.slow
def test_t06_a_stopped_run_that_cannot_save_is_an_error(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *SAVE_EACH_UPDATE)
    codes, printed = run_ranks(2, command, [FULL_DISK, {"do": "SIGTERM", "at": 4}])
    assert codes == BOTH_FAILED
    assert "stopped at update" in printed
    assert "the run will resume from update 2" in printed


def truncate(path: Path) -> None:
    """Remove the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_bit_of_a_weight(path: Path) -> None:
    """Flip a bit of a tensor in a checkpoint."""
    weight = torch.load(path, weights_only=True)["model"]["norm.bias"]
    content = bytearray(path.read_bytes())
    offset = content.index(weight.numpy().tobytes()[:40])
    content[offset + 5] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", [truncate, flip_bit_of_a_weight])
def test_t07_a_corrupt_newest_checkpoint_gives_way_to_the_previous(
    corrupt, videos, uninterrupted, tmp_path
):
    newest = tmp_path / "run.pth"
    command = pretrain_command(videos, tmp_path, *SAVE_EACH_UPDATE)
    run_ranks(2, command, [{"do": "die after save", "rank": 0, "step": 3}])
    corrupt(newest)
    content = newest.read_bytes()
    printed = check_ranks(2, command)
    warning = (
        "warning: checkpoint .*run.pth cannot be read .* renamed to run.pth.damaged, "
        "resuming from .*run_previous1.pth"
    )
    assert re.search(warning, printed)
    assert "at update 2" in printed
    assert same(saved_state(tmp_path), saved_state(uninterrupted))
    assert (tmp_path / "run.pth.damaged").read_bytes() == content  # nothing is deleted


@pytest.mark.slow
def test_t07_a_run_without_a_readable_checkpoint_does_not_start_over(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *SAVE_EACH_UPDATE)
    check_ranks(2, command)
    for path in tmp_path.glob("run*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    codes, printed = run_ranks(2, command)
    assert codes == BOTH_FAILED
    assert "no earlier checkpoint is readable either" in printed
    assert "Traceback" not in printed


def test_t07_a_missing_checkpoint_is_an_error_on_all_ranks(videos, tmp_path):
    flags = "--epochs 1 --batch_size_per_gpu 2 --resume missing.pth".split()
    codes, printed = run_ranks(2, pretrain_command(videos, tmp_path, *flags))
    assert codes == BOTH_FAILED
    assert printed.count("error: checkpoint missing.pth not found") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run_train.csv").exists()


def test_timed_checkpoints_come_once_each(videos, tmp_path):
    flags = (
        "--batch_size_per_gpu 2 --epochs 4 --checkpoint_every_minutes 1e-9 --checkpoint_period 9 "
        "--keep 9 --sync_save"  # a write under way would delay the next one
    ).split()
    check_ranks(2, pretrain_command(videos, tmp_path, *flags))
    paths = tmp_path.glob("run*.pth")
    steps = sorted(torch.load(path, weights_only=True)["step"] for path in paths)
    # a request is answered one update later; the second checkpoint of update 8 is that of the end
    assert steps == [2, 4, 6, 8, 8]


def test_a_folder_that_cannot_be_written_is_one_line(videos, tmp_path):
    (tmp_path / "taken").write_text("a file")
    flags = "--max_steps 1 --batch_size_per_gpu 2 --output_dir".split()
    unwritable = str(tmp_path / "taken/run")
    command = pretrain_command(videos, tmp_path / "out", *flags, unwritable)
    with pytest.raises(UserError, match="cannot write to .*taken/run") as raised:
        pretrain.main(command)
    assert "\n" not in str(raised.value)
