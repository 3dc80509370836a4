"""Checkpoints through crashes, full disks and damage (T05-T07), updates that are not finite (T14), hostile checkpoints of a run (T19)."""

import argparse
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from launch import ranks
from make_videos import write_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_importer import Payload
from test_pretrain import command
from test_resume import DONE, state, used
from tiny import same

import finetune
import pretrain
from util import checkpoint
from util.dist import UserError
from util.tracking import Run

CALLS = ("fsync", "link", "replace")  # what a save asks of the system, one after the other


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight videos: two updates of 2 x 2 an epoch."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


class Flags:
    """Of a run that goes on by itself."""

    def __init__(self, folder):
        self.output_dir, self.save_prefix, self.resume, self.overwrite = (
            str(folder),
            "run",
            "auto",
            False,
        )


def killed_in_save(folder: Path, number: int, call: int, keep: int) -> bool:
    """Save in a process that is killed just before its `call`-th call of CALLS. Returns whether it came that far."""
    child = os.fork()
    if child == 0:
        count = [0]

        def dying(honest):
            def call_or_die(*arguments):
                count[0] += 1
                if count[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return honest(*arguments)

            return call_or_die

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        checkpoint.save(
            folder / "run.pth", {"step": number, "model": {"w": torch.full((1000,), number)}}, keep
        )
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(("keep", "links"), [(2, True), (4, True), (3, False)])
def test_t05_killed_at_any_point_of_a_save_the_newest_complete_checkpoint_loads(
    keep, links, tmp_path, monkeypatch
):
    """Before the rename, in the rotation, between the two, after both; with and without hard links."""

    def refuse(*_):
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    seen, call = [], 0
    while True:
        call += 1
        folder = tmp_path / str(call)
        folder.mkdir()
        for number in range(6):
            checkpoint.save(
                folder / "run.pth",
                {"step": number, "model": {"w": torch.full((1000,), number)}},
                keep,
            )
        if not killed_in_save(folder, 6, call, keep):
            break
        path = checkpoint.find_resume(Flags(folder))
        found = checkpoint.load(path)
        assert found["step"] in (5, 6) and torch.equal(
            found["model"]["w"], torch.full((1000,), found["step"])
        )
        assert (
            path == folder / "run.pth"
        ) or not links  # without links there is a moment without it
        seen.append(found["step"])
        checkpoint.save(
            folder / "run.pth", {"step": 7, "model": {}}, keep
        )  # and the next save works, whatever was left
        kept = [
            checkpoint.load(file)["step"]
            for file in [
                folder / "run.pth",
                *(checkpoint.previous(folder / "run.pth", n) for n in range(1, keep)),
            ]
            if file.exists()
        ]
        assert kept[0] == 7 and kept == sorted(set(kept), reverse=True) and len(kept) >= keep - 1
        assert {file.name for file in folder.iterdir()} <= {
            "run.pth",
            ".run.lock",
            *(f"run_previous{n}.pth" for n in range(1, keep)),
        }
    assert seen == sorted(seen) and set(seen) == {5, 6} and len(seen) >= 4
    kept = [
        checkpoint.load(file)["step"]
        for file in [
            folder / "run.pth",
            *(checkpoint.previous(folder / "run.pth", n) for n in range(1, keep)),
        ]
    ]
    assert (
        kept == list(range(6, 6 - keep, -1))
        and not checkpoint.previous(folder / "run.pth", keep).exists()
    )


def test_t05_a_new_start_clears_its_own_half_written_files_only(videos, tmp_path):
    for name in ("run.pth.tmp", "run_best.pth.tmp", "run_b.pth.tmp", "run_b_best.pth.tmp"):
        (tmp_path / name).write_text("half")
    assert ranks(1, command(videos, tmp_path, "--max_steps", "1", "--batch_size_per_gpu", "4"))[
        0
    ] == [0]
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == [
        "run_b.pth.tmp",
        "run_b_best.pth.tmp",
    ]  # those are of another run


@pytest.mark.slow
def test_t06_a_full_disk_costs_checkpoints_but_not_the_run(videos, tmp_path):
    flags = ["--batch_size_per_gpu", "2", "--epochs", "3", "--checkpoint_every_steps", "1"]
    assert ranks(2, command(videos, tmp_path / "whole", *flags))[0] == DONE
    limit = {"do": "full disk", "rank": 0, "at": 3, "bytes": 300_000}
    codes, printed = ranks(
        2,
        command(videos, tmp_path / "room", *flags),
        [limit, {"do": "room again", "rank": 0, "at": 6}],
    )
    assert codes == DONE, printed
    warnings = re.findall(
        r"could not save .*run.pth at update (\d) \(File too large\); the run goes on", printed
    )
    assert warnings == [
        "3",
        "4",
        "4",
        "5",
    ]  # update 4 ends an epoch: before its log line, and after it
    assert same(state(tmp_path / "room"), state(tmp_path / "whole"))
    codes, printed = ranks(2, command(videos, tmp_path / "full", *flags), [limit])
    assert (
        codes == [2, 2]
        and "its last checkpoint could not be written: make room" in printed
        and "Traceback" not in printed
    )
    assert state(tmp_path / "full")["step"] == 2 and not list((tmp_path / "full").glob("*.tmp"))
    codes, printed = ranks(
        2, command(videos, tmp_path / "full", *flags)
    )  # with room, the same command ends it
    assert codes == DONE and same(state(tmp_path / "full"), state(tmp_path / "whole"))
    codes, printed = ranks(
        2, command(videos, tmp_path / "stopped", *flags), [limit, {"do": "SIGTERM", "at": 4}]
    )
    assert (
        codes == [2, 2]
        and "stopped at update" in printed
        and "the run goes on from update 2" in printed
    )


def damage(path: Path, how: str) -> None:
    """Truncate a file, or flip a bit of a tensor in it."""
    content = path.read_bytes()
    place = (
        content.index(
            torch.load(path, weights_only=True)["model"]["norm.bias"].numpy().tobytes()[:40]
        )
        + 5
        if how == "bit"
        else 0
    )
    path.write_bytes(
        content[: len(content) // 2]
        if how == "truncated"
        else content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "bit"])
def test_t07_a_damaged_newest_checkpoint_gives_way_to_the_one_before(how, videos, tmp_path):
    flags = ["--batch_size_per_gpu", "2", "--epochs", "3", "--checkpoint_every_steps", "1"]
    assert ranks(2, command(videos, tmp_path / "whole", *flags))[0] == DONE
    out = tmp_path / "damaged"
    ranks(2, command(videos, out, *flags), [{"do": "die after save", "rank": 0, "step": 3}])
    damage(out / "run.pth", how)
    broken = (out / "run.pth").read_bytes()
    codes, printed = ranks(2, command(videos, out, *flags))
    assert codes == DONE, printed
    assert re.search(
        r"warning: checkpoint .*run.pth cannot be read .* set aside as run.pth.damaged, going on from .*run_previous1.pth",
        printed,
    )
    assert "at update 2" in printed and same(state(out), state(tmp_path / "whole"))
    assert (out / "run.pth.damaged").read_bytes() == broken  # nothing is deleted
    for path in out.glob("run*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    codes, printed = ranks(2, command(videos, out, *flags))
    assert (
        codes == [2, 2] and "nor can any before it" in printed and "Traceback" not in printed
    )  # it does not start over by itself


def test_t07_only_damage_sets_a_checkpoint_aside(tmp_path, monkeypatch):
    """A checkpoint that could not be read for want of memory, or by a fault of the network, stays what it is."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "run.pth", {"step": step}, 2)
    for error in (
        MemoryError("no room"),
        OSError(5, "Input/output error"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def fail(*_, error=error, **__):
            raise error

        with (
            monkeypatch.context() as patched,
            pytest.raises(UserError, match="run.pth cannot be read"),
        ):
            patched.setattr(torch, "load", fail)
            checkpoint.find_resume(Flags(tmp_path))
    assert checkpoint.find_resume(Flags(tmp_path)) == tmp_path / "run.pth" and not list(
        tmp_path.glob("*.damaged*")
    )
    for number in range(2):  # and a second damaged file does not take the place of the first
        (tmp_path / "run.pth").write_bytes(b"bad")
        assert checkpoint.find_resume(Flags(tmp_path)) == tmp_path / "run_previous1.pth"
        assert len(list(tmp_path.glob("*.damaged*"))) == number + 1


def test_timed_checkpoints_come_once_each(videos, tmp_path):
    flags = [
        "--batch_size_per_gpu",
        "2",
        "--epochs",
        "4",
        "--checkpoint_every_minutes",
        "1e-9",
        "--checkpoint_period",
        "9",
        "--keep",
        "9",
    ]
    assert ranks(2, command(videos, tmp_path, *flags))[0] == DONE
    steps = sorted(
        torch.load(path, weights_only=True)["step"] for path in tmp_path.glob("run*.pth")
    )
    assert steps == [
        2,
        4,
        6,
        8,
        8,
    ]  # the answer to a vote is an update old; the last is that of the end


def test_a_folder_that_cannot_be_written_is_one_line_on_all_ranks(videos, tmp_path):
    (tmp_path / "taken").write_text("a file")
    flags = command(videos, tmp_path / "out", "--max_steps", "1", "--batch_size_per_gpu", "2")
    flags[flags.index("--output_dir") + 1 :] = [
        str(tmp_path / "taken/run"),
        *flags[flags.index("--output_dir") + 2 :],
    ]
    with pytest.raises(UserError, match="cannot write to .*taken/run") as error:
        pretrain.main(flags)
    assert "\n" not in str(error.value)


def test_t06_log_and_tensorboard_go_on_when_there_is_room_again(tmp_path, capsys):
    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    args = argparse.Namespace(output_dir=str(tmp_path), save_prefix="run")
    run = Run(args)
    run.begin(0)
    run.epoch({"epoch": 0, "step": 1, "train_loss": 0.5})
    with open(tmp_path / "run_log.txt", "a") as log:
        log.write('{"epoch": 1, "st')  # for the rest there was no room
    run.board = Full()
    run.epoch({"epoch": 2, "step": 3, "train_loss": 0.3})
    assert (
        "could not write to TensorBoard (No space left on device); the run goes on"
        in capsys.readouterr().out
    )
    run.epoch({"epoch": 3, "step": 4, "train_loss": 0.2})
    run.close()
    lines = (tmp_path / "run_log.txt").read_text().splitlines()
    assert [json.loads(lines[place])["step"] for place in (0, 2, 3)] == [1, 3, 4] and len(
        lines
    ) == 4
    events = EventAccumulator(str(tmp_path / "tb/run"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/train_loss")] == [0, 3]
    again = Run(args)
    again.begin(4)
    assert [
        json.loads(line)["step"] for line in (tmp_path / "run_log.txt").read_text().splitlines()
    ] == [1, 3, 4]


def test_t07_a_missing_checkpoint_is_an_error_on_all_ranks(videos, tmp_path):
    codes, printed = ranks(
        2,
        command(
            videos,
            tmp_path,
            "--epochs",
            "1",
            "--batch_size_per_gpu",
            "2",
            "--resume",
            "missing.pth",
        ),
    )
    assert (
        codes == [2, 2]
        and printed.count("error: --resume missing.pth: no such file") == 1
        and "Traceback" not in printed
    )
    assert not (tmp_path / "run_train.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "fault",
    [{"do": "nan", "rank": 1}, {"do": "inf", "rank": 0}],
    ids=["nan loss on rank 1", "inf gradient on rank 0"],
)
def test_t14_an_update_that_is_not_finite_is_skipped_by_all_ranks(amp, fault, videos, tmp_path):
    flags = [
        "--batch_size_per_gpu",
        "2",
        "--epochs",
        "2",
        "--checkpoint_every_steps",
        "1",
        "--keep",
        "9",
        "--amp",
        amp,
        "--max_bad_steps",
        "2",
    ]
    codes, printed = ranks(2, command(videos, tmp_path / "one", *flags), [fault | {"at": 3}])
    assert codes == DONE, printed
    steps = {}
    for path in (tmp_path / "one").glob("run*.pth"):
        saved = torch.load(path, weights_only=True)
        steps[saved["step"]] = saved
        assert all(value.isfinite().all() for value in saved["model"].values())
        assert all(
            value.isfinite().all()
            for moments in saved["optimizer"]["state"].values()
            for value in moments.values()
        )
    assert sorted(steps) == [1, 2, 3, 4]
    assert same(steps[3]["model"], steps[2]["model"]) and same(
        steps[3]["optimizer"]["state"], steps[2]["optimizer"]["state"]
    )
    assert not same(steps[4]["model"], steps[3]["model"])
    (listed,) = [
        json.loads(line) for line in (tmp_path / "one/nonfinite.jsonl").read_text().splitlines()
    ]
    fed = [index for rank in (0, 1) for index in used(tmp_path / "one", rank)[2]["index"]]
    paths = (tmp_path / "one/run_train.csv").read_text().splitlines()[1:]
    assert listed == {"run": "run", "update": 3, "files": [paths[index] for index in fed]}
    log = [json.loads(line) for line in (tmp_path / "one/run_log.txt").read_text().splitlines()]
    assert [record["skipped_steps"] for record in log] == [0, 1] and all(
        torch.tensor(record["train_loss"]).isfinite() for record in log
    )
    codes, printed = ranks(
        2, command(videos, tmp_path / "two", *flags), [fault | {"at": 2}, fault | {"at": 3}]
    )
    assert (
        codes == [2, 2]
        and "2 updates in a row without a finite loss and gradient, up to update 3" in printed
        and "Traceback" not in printed
    )
    assert (
        torch.load(tmp_path / "two/run.pth", weights_only=True)["step"] == 2
    )  # nothing is deleted


def test_t14_a_loss_that_is_not_finite_spoils_its_update_even_with_finite_gradients():
    from util.optim import backward

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weight = torch.ones(3, requires_grad=True)
    backward((weight * 2).sum() + torch.inf, scaler, 1)
    assert weight.grad.isnan().all()
    other = torch.ones(3, requires_grad=True)
    backward((other * 2).sum(), scaler, 2)
    assert torch.equal(other.grad, torch.ones(3))


@pytest.mark.parametrize(
    "kind",
    [
        "payload",
        "text",
        "empty",
        "not a run",
        "config of another kind",
        "config with nonsense",
        "a huge config",
    ],
)
def test_t19_a_hostile_checkpoint_is_refused_by_every_script_without_side_effect(
    kind, videos, tmp_path
):
    assert ranks(
        1, command(videos, tmp_path / "own", "--max_steps", "1", "--batch_size_per_gpu", "4")
    )[0] == [0]
    good, path = torch.load(tmp_path / "own/run.pth", weights_only=True), tmp_path / "hostile.pth"
    if kind in ("text", "empty"):
        path.write_bytes(b"no checkpoint" * (kind == "text"))
    else:
        torch.save(
            {
                "payload": good | {"tally": Payload(tmp_path / "ran")},
                "not a run": {"model": good["model"]},
                "config of another kind": good | {"config": 7},
                "config with nonsense": good | {"config": good["config"] | {"more": [1]}},
                "a huge config": good | {"config": good["config"] | {"depth": 10**9}},
            }[kind],
            path,
        )
    out = tmp_path / "out"
    attempts = [
        lambda: pretrain.main(
            command(
                videos, out, "--max_steps", "2", "--batch_size_per_gpu", "4", "--resume", str(path)
            )
        ),
        lambda: pretrain.main(
            ["--visualize", str(path), "--data_dirs", videos, "--output_dir", str(out)]
        ),
        lambda: finetune.main(
            ["--eval", "--resume", str(path), "--val_dir", videos, "--output_dir", str(out)]
        ),
    ]
    for attempt in attempts:
        with pytest.raises(UserError) as error:
            attempt()
        assert (
            "hostile.pth" in str(error.value)
            and "\n" not in str(error.value)
            and len(str(error.value)) < 600
        )
    assert (
        not (tmp_path / "ran").exists()
        and not list(out.glob("*.pth"))
        and not (out / "run_log.txt").exists()
    )
