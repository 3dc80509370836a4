"""Step-exact resuming (T01-T04, T09): an interrupted run ends with the weights, the log and the samples of one that was not."""

import json
import re
import shutil
from pathlib import Path

import pytest
from launch import ranks
from make_videos import write_folder
from test_pretrain import command, records
from tiny import same

from util.checkpoint import load

BATCH = ["--batch_size_per_gpu", "2"]
DONE = [0, 0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seventeen videos: four updates of 2 x 2 an epoch, one video left over."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 17))


def state(out, name="run.pth") -> dict:
    """A run's checkpoint without what may differ: where it was written, by which flags."""
    return {key: value for key, value in load(Path(out, name)).items() if key != "args"}


def used(out, rank: int) -> list[dict]:
    """What a rank trained on: [{index, loss}] per micro-step."""
    return [json.loads(line) for line in Path(out, f"used_{rank}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    """Three epochs on two ranks, with validation, without disturbance."""
    out = tmp_path_factory.mktemp("undisturbed")
    codes, printed = ranks(2, three_epochs(videos, out))
    assert codes == DONE, printed
    return out


def three_epochs(videos, out, *more) -> list[str]:
    """Three epochs of four updates, each validated."""
    return command(videos, out, *BATCH, "--epochs", "3", "--val_dirs", videos, *more)


@pytest.mark.slow
def test_t01_a_run_repeats_bit_by_bit_whatever_its_workers_and_validation(
    videos, undisturbed, tmp_path
):
    flags = {
        "again": ["--val_dirs", videos],
        "workers": ["--val_dirs", videos, "--num_workers", "2"],
        "no validation": [],
    }
    for name, more in flags.items():
        codes, printed = ranks(2, command(videos, tmp_path / name, *BATCH, "--epochs", "3", *more))
        assert codes == DONE, printed
        assert same(state(tmp_path / name), state(undisturbed)), name
        assert [used(tmp_path / name, rank) for rank in (0, 1)] == [
            used(undisturbed, rank) for rank in (0, 1)
        ]
    assert (
        len(used(undisturbed, 0)) == 12
        and len({entry["loss"] for rank in (0, 1) for entry in used(undisturbed, rank)}) > 20
    )


def stopped_three_times(videos, out, *faults) -> None:
    """SIGTERM to rank 0, rank 1 and both, in the middle of an epoch each time; then to the end."""
    stops = (
        [{"do": "SIGTERM", "rank": 0, "at": 2}],
        [{"do": "SIGTERM", "rank": 1, "at": 2}],
        [{"do": "SIGTERM", "at": 1}],
        [],
    )
    for number, stopping in enumerate(stops):
        codes, printed = ranks(2, three_epochs(videos, out), [*stopping, *faults])
        assert codes == DONE, printed
        marker = out / "run.PREEMPTED"
        assert marker.exists() == (number < 3)
        if stopping:
            assert marker.read_text().strip() == str(load(out / "run.pth")["step"])
            assert "the same command goes on from here" in printed


def test_t02_three_stops_inside_an_epoch_change_nothing(videos, undisturbed, tmp_path):
    stopped_three_times(videos, tmp_path)
    assert same(state(tmp_path), state(undisturbed))
    assert records(tmp_path) == records(undisturbed)
    assert [used(tmp_path, rank) for rank in (0, 1)] == [
        used(undisturbed, rank) for rank in (0, 1)
    ]  # each sample once, in the same order
    for epoch in range(3):
        seen = [
            index
            for rank in (0, 1)
            for entry in used(tmp_path, rank)[4 * epoch : 4 * epoch + 4]
            for index in entry["index"]
        ]
        assert len(seen) == len(set(seen)) == 16


@pytest.mark.slow
def test_t02_without_the_place_in_the_epoch_it_would_show(videos, undisturbed, tmp_path):
    stopped_three_times(videos, tmp_path, {"do": "no offset"})
    assert not same(state(tmp_path)["model"], state(undisturbed)["model"])


@pytest.mark.parametrize("step", [1, 4, 5])
def test_t03_killed_after_a_save_anywhere_in_an_epoch(videos, undisturbed, tmp_path, step):
    """After the first update, after the last of an epoch (before its validation), after the first of the next."""
    flags = three_epochs(videos, tmp_path, "--checkpoint_every_steps", "1")
    codes, _ = ranks(2, flags, [{"do": "die after save", "rank": 0, "step": step}])
    assert codes[0] == -9 and load(tmp_path / "run.pth")["step"] == step
    codes, printed = ranks(2, flags)
    assert codes == DONE and f"resumed from {tmp_path / 'run.pth'} at update {step}" in printed
    assert same(state(tmp_path), state(undisturbed)) and records(tmp_path) == records(undisturbed)


@pytest.mark.slow
def test_t03_a_stop_inside_an_accumulation_waits_for_its_update(videos, tmp_path):
    flags = ["--accum_iter", "2", "--batch_size_per_gpu", "2", "--epochs", "2", "--lr", "1e-4"]
    assert ranks(2, command(videos, tmp_path / "whole", *flags))[0] == DONE
    assert (
        ranks(2, command(videos, tmp_path / "parts", *flags), [{"do": "SIGUSR1", "at": 1}])[0]
        == DONE
    )
    assert (tmp_path / "parts/run.PREEMPTED").exists() and len(used(tmp_path / "parts", 0)) % 2 == 0
    assert ranks(2, command(videos, tmp_path / "parts", *flags))[0] == DONE
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    flags = ["--accum_iter", "1", "--batch_size_per_gpu", "4", "--epochs", "2", "--lr", "1e-4"]
    assert ranks(2, command(videos, tmp_path / "large", *flags))[0] == DONE
    assert close(state(tmp_path / "large")["model"], state(tmp_path / "whole")["model"])


def close(one: dict, other: dict) -> bool:
    """Weights equal to 1e-6, but for the bias of k, whose gradient is rounding alone."""
    return all(
        (one[name] - other[name]).abs().max() <= 1e-6
        for name in one
        if not name.endswith("attn.k.bias")
    )


@pytest.mark.slow
def test_t04_two_ranks_one_and_two_again_at_the_same_global_batch(videos, tmp_path):
    flags = ["--epochs", "3", "--lr", "1e-4", "--checkpoint_every_steps", "1"]
    split = {2: [*flags, "--batch_size_per_gpu", "2"], 1: [*flags, "--batch_size_per_gpu", "4"]}
    assert ranks(2, command(videos, tmp_path / "whole", *split[2]))[0] == DONE
    out = tmp_path / "parts"
    for world, stopping in (
        (2, [{"do": "SIGTERM", "at": 2}]),
        (1, [{"do": "SIGTERM", "at": 3}]),
        (2, []),
    ):
        codes, printed = ranks(
            world, command(videos, out, *split[world], "--num_workers", str(3 - world)), stopping
        )
        assert codes == [0] * world, printed
    alone = [entry for entry in used(out, 0) if len(entry["index"]) == 4]
    assert 2 <= len(alone) <= 4
    pairs = list(zip(used(tmp_path / "whole", 0), used(tmp_path / "whole", 1), strict=True))
    by_step, others = [], iter(used(out, 1))
    for entry in used(out, 0):
        partner = entry if len(entry["index"]) == 4 else next(others)
        both = (
            entry["index"]
            if partner is entry
            else [
                index
                for pair in zip(entry["index"], partner["index"], strict=True)
                for index in pair
            ]
        )
        by_step.append((both, (entry["loss"] + partner["loss"]) / 2))
    for (indices, loss), (first, second) in zip(by_step, pairs, strict=True):
        assert indices == [
            index for pair in zip(first["index"], second["index"], strict=True) for index in pair
        ]  # the same order
        assert loss == pytest.approx((first["loss"] + second["loss"]) / 2, abs=1e-6)
    assert close(state(out)["model"], state(tmp_path / "whole")["model"])


def test_t04_another_global_batch_is_refused_unless_asked_for(videos, tmp_path):
    flags = ["--epochs", "4", "--checkpoint_every_steps", "3", "--batch_size_per_gpu"]
    ranks(
        1, command(videos, tmp_path, *flags, "4"), [{"do": "SIGKILL", "at": 4}]
    )  # 12 of 16 samples of the first epoch are used
    before = (tmp_path / "run.pth").read_bytes()
    codes, printed = ranks(1, command(videos, tmp_path, *flags, "2"))
    assert (
        codes == [2]
        and "global batch 4 -> 2" in printed
        and "--force_resume" in printed
        and "Traceback" not in printed
    )
    assert (tmp_path / "run.pth").read_bytes() == before
    codes, printed = ranks(
        1, command(videos, tmp_path, *flags, "2", "--force_resume"), [{"do": "SIGKILL", "at": 3}]
    )
    assert "resumed from" in printed and "at update 6" in printed  # 12 samples in updates of two
    seen = [index for entry in used(tmp_path, 0)[:5] for index in entry["index"]]
    assert len(seen) == len(set(seen)) == 16  # the epoch went on with the samples that were left


def test_t04_with_a_larger_batch_the_epoch_goes_on_too(videos, tmp_path):
    flags = ["--epochs", "4", "--checkpoint_every_steps", "1", "--batch_size_per_gpu"]
    ranks(
        1, command(videos, tmp_path, *flags, "2"), [{"do": "SIGKILL", "at": 2}]
    )  # one update of two samples is saved
    codes, printed = ranks(1, command(videos, tmp_path, *flags, "4", "--force_resume"))
    assert codes == [0], printed
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1, 2, 3] and records(tmp_path)[
        -1
    ]["step"] == 16


def test_the_command_of_a_complete_run_changes_nothing_and_a_longer_one_adds(videos, tmp_path):
    for steps in ("6", "6", "8"):
        assert ranks(
            1, command(videos, tmp_path, "--batch_size_per_gpu", "4", "--max_steps", steps)
        )[0] == [0]
        assert [record["step"] for record in records(tmp_path)] == [4, 6, 8][: 2 + (steps == "8")]


@pytest.mark.slow
def test_given_again_a_command_with_a_path_goes_on_from_its_own_checkpoint(videos, tmp_path):
    flags = [*BATCH, "--checkpoint_every_steps", "1", "--max_steps"]
    assert ranks(1, command(videos, tmp_path / "first", *flags, "2"))[0] == [0]
    start = ["12", "--resume", str(tmp_path / "first/run.pth")]
    for at, resumed in ((3, 2), (4, 4)):
        codes, printed = ranks(
            1, command(videos, tmp_path / "second", *flags, *start), [{"do": "SIGKILL", "at": at}]
        )
        assert f"at update {resumed}" in printed
    codes, printed = ranks(
        1,
        command(
            videos,
            tmp_path / "second",
            *flags,
            "12",
            "--resume",
            str(tmp_path / "second/run_previous1.pth"),
        ),
    )
    assert codes == [2] and "would start over it" in printed


def test_a_log_of_updates_that_were_never_saved_is_set_aside(videos, tmp_path):
    flags = [*BATCH, "--epochs", "4", "--checkpoint_period", "4"]
    ranks(
        1, command(videos, tmp_path, *flags), [{"do": "SIGKILL", "at": 18}]
    )  # two epochs of eight are logged, none is saved
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1] and not (
        tmp_path / "run.pth"
    ).exists()
    before = (tmp_path / "run_log.txt").read_text()
    assert ranks(1, command(videos, tmp_path, *flags))[0] == [0]
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1, 2, 3] and (
        tmp_path / "run_log.txt.before"
    ).read_text() == before


@pytest.mark.slow
def test_unreadable_videos_are_remembered_over_a_stop(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "videos")
    for path in sorted((tmp_path / "videos").glob("*/*.mp4"))[::4]:
        path.write_text("no video")
    flags = command(
        str(tmp_path / "videos"),
        tmp_path / "whole",
        *BATCH,
        "--epochs",
        "2",
        "--max_bad_frac",
        "0.5",
    )
    assert ranks(2, flags)[0] == DONE
    parts = [word.replace("whole", "parts") for word in flags]
    for stopping in ([{"do": "SIGTERM", "at": 3}], []):
        assert ranks(2, parts, stopping)[0] == DONE
    assert (
        records(tmp_path / "parts") == records(tmp_path / "whole")
        and records(tmp_path / "whole")[-1]["unreadable_videos"] == 5
    )
    listed = [
        (tmp_path / name / "bad_videos.csv").read_text().splitlines() for name in ("whole", "parts")
    ]
    assert sorted(listed[0]) == sorted(listed[1])


@pytest.mark.slow
def test_t02_on_three_ranks_with_several_buckets(videos, tmp_path):
    """DDP arranges its buckets anew after the first passes of a process; three ranks add up in another order then."""
    flags = [
        "--model",
        "mae_vit_tiny_patch16",
        "--patch_size",
        "16",
        "--batch_size_per_gpu",
        "1",
        "--max_steps",
        "8",
    ]
    assert ranks(3, command(videos, tmp_path / "whole", *flags), timeout=300)[0] == [0] * 3
    for stopping in ([{"do": "SIGTERM", "at": 2}], [{"do": "SIGTERM", "at": 1}], []):
        assert (
            ranks(3, command(videos, tmp_path / "parts", *flags), stopping, timeout=300)[0]
            == [0] * 3
        )
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole")) and records(
        tmp_path / "parts"
    ) == records(tmp_path / "whole")


@pytest.mark.slow
def test_t09_changes_are_named_or_refused(videos, tmp_path):
    flags = ["--epochs", "2", *BATCH]
    assert ranks(1, command(videos, tmp_path, *flags), [{"do": "SIGTERM", "at": 3}])[0] == [0]
    before = (tmp_path / "run.pth").read_bytes()
    manifest = tmp_path / "run_train.csv"
    lines = manifest.read_text()
    manifest.write_text("".join(lines.splitlines(keepends=True)[:-1]))
    refused = {
        "training set of 17 -> 16 samples": flags,
        "depth 2 -> 12|embed_dim 64 -> 192": [*flags, "--model", "mae_vit_tiny_patch16"],
    }
    for message, changed in refused.items():
        codes, printed = ranks(1, command(videos, tmp_path, *changed))
        assert codes == [2] and re.search(message, printed) and "Traceback" not in printed
        manifest.write_text(lines)
    codes, printed = ranks(
        1, command(videos, tmp_path, *flags, "--force_resume", "--model", "mae_vit_tiny_patch16")
    )
    assert (
        codes == [2] and "does not fit the model" in printed
    )  # no force makes weights of another shape
    assert (tmp_path / "run.pth").read_bytes() == before
    codes, printed = ranks(1, command(videos, tmp_path, *flags, "--lr", "0.0005", "--seed", "3"))
    assert codes == [0], printed
    assert (
        "--lr 0.001 -> 0.0005" in printed
        and "--seed 0 -> 3" in printed
        and "--epochs" not in printed
    )
    shorter = tmp_path / "shorter"
    assert ranks(1, command(videos, shorter, *flags), [{"do": "SIGTERM", "at": 3}])[0] == [0]
    (shorter / "run_train.csv").write_text("".join(lines.splitlines(keepends=True)[:-1]))
    codes, printed = ranks(1, command(videos, shorter, *flags, "--force_resume"))
    assert codes == [0] and "by --force_resume: training set of 17 -> 16 samples" in printed
