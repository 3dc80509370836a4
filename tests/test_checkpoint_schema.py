"""Checkpoints with parts that cannot be right are refused before anything is used (fault 9)."""

import copy
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from runs import output_flags, pretrain_command, saved_state, video_command
from tiny import same

import finetune
import pretrain
from tools.convert_checkpoint import main as convert
from tools.inspect_checkpoint import main as inspect
from util import resume
from util.checkpoint import CorruptCheckpoint, load
from util.checkpoint_schema import SchemaError, check_contents
from util.dist import UserError
from util.files import RunFiles

FOUR_UPDATES = (
    "--batch_size_per_gpu 4 --epochs 2 --checkpoint_every_steps 1 --keep 3 --ema 0.9".split()
)


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory) -> Path:
    """Return the folder of a run of four updates, with its file of update 3: run_previous2.pth."""
    out = tmp_path_factory.mktemp("run")
    pretrain.main(pretrain_command(videos, out, *FOUR_UPDATES))
    assert load(out / "run_previous2.pth")["step"] == 3
    return out


def endless() -> list:
    """Return a list that holds itself."""
    entries: list = []
    entries.append(entries)
    return entries


def deep() -> list:
    """Return a list in a list, and so on, 200 times."""
    entries: list = []
    for _ in range(200):
        entries = [entries]
    return entries


def wide() -> list:
    """Return ten lists of ten lists, and so on, of 10^9 entries in all."""
    entries: list = [0] * 10
    for _ in range(8):
        entries = [entries] * 10
    return entries


def moments(**changes):
    """Return a change of the optimizer's entries for its parameter 1."""
    return lambda state: state["optimizer"]["state"][1].update(changes)


def entry(part: str, **changes):
    """Return a change of entries, named in `part` as in a.b."""

    def change(state: dict) -> None:
        for name in filter(None, part.split(".")):
            state = state[name]
        state.update(changes)

    return change


def share_memory(state: dict) -> None:
    """Let the two moments of a parameter be one tensor."""
    first = state["optimizer"]["state"][0]
    first["exp_avg_sq"] = first["exp_avg"]


def renumber(state: dict) -> None:
    """Let two groups have the same parameter."""
    state["optimizer"]["param_groups"][1]["params"][0] = 0


HUGE = torch.zeros(1).expand(2**40)
FAULTS = {
    "text": (entry("", step="3"), r"step is '3' \(str\), not a whole number from 0 to 2\^53"),
    "float": (entry("", step=4.0), "step is 4.0, not"),
    "bool": (entry("", step=True), "step is True, not"),
    "negative": (entry("", step=-1), "step is -1, not"),
    "nan": (entry("", step=float("nan")), "step is nan, not"),
    "huge": (entry("", step=10**30), "step is 1000000000000000000000000000000, not"),
    "bits": (entry("", step=10**70), "step has a number of 233 bits, not of at most 128"),
    "complete": (entry("", step=1000), r"step is 1000, which is not in epoch 1 \(updates 2 to 4"),
    "early": (entry("", step=2), "1 of them in tally"),
    "epoch": (entry("", epoch=None), "epoch is None, not"),
    "no updates": (entry("", steps_per_epoch=0), "steps_per_epoch is 0, not a whole number from 1"),
    "batch": (entry("", global_batch=[4]), r"global_batch is \[4\] \(list\)"),
    "accuracy": (entry("", best_acc1=float("inf")), "best_acc1 is inf, not a number from -1 to"),
    "no config": (lambda state: state.pop("config"), "it has no config"),
    "no heads": (lambda state: state["config"].pop("num_heads"), "config has no num_heads"),
    "read-out": (entry("config", num_classes=2), "config has no global_pool"),
    "list": (entry("", config=[]), r"config is \[\] \(list\), not a dictionary"),
    "tally": (entry("", tally=3), "tally is 3, not a dictionary"),
    "sums": (entry("", tally={"sums": {}, "streak": 0}), "tally.sums has no epoch, line"),
    "sum": (entry("tally.sums.epoch", loss="low"), "tally.sums.epoch.'loss' .* is 'low'"),
    "counts": (entry("tally.sums.line", skipped=2.0), "more skipped updates than updates"),
    "streak": (entry("tally", streak=0.5), "tally.streak is 0.5, not"),
    "data": (entry("", data={"samples": 8}), "data has no sha256"),
    "weighting": (entry("data", weighting=2), "data.weighting is 2, not text"),
    "unreadable": (entry("unreadable", a=1), "unreadable.a is 1, not text"),
    "scaler": (entry("", scaler={"scale": 2.0}), "scaler has no _growth_tracker, backoff_factor"),
    "size": (entry("config", num_heads="2"), "config.num_heads is '2'"),
    "mean": (entry("config", mean=(0.5, 0.5)), "config.mean is .*, not 3 of a number"),
    "std": (entry("config", std=(0.5, 0.5, 0.0)), "config.std is"),
    "flags": (entry("args", lr=torch.ones(2)), "args.lr has a tensor, not plain data"),
    "names": (entry("", args={1: 2}), "args has the name 1, which is not text"),
    "endless": (entry("config", model=endless()), "config is nested more than 20 deep"),
    "deep": (entry("args", lr=deep()), "args is nested more than 20 deep"),
    "wide": (entry("args", lr=wide()), "args has more than 1000000 entries"),
    "weight": (
        entry("model", cls_token=[0.0]),
        r"model.cls_token is \[0.0\] \(list\), not a tensor",
    ),
    "integers": (entry("model", cls_token=torch.ones(1, 1, 64, dtype=torch.int32)), "int32, not"),
    "memory": (entry("model", cls_token=HUGE), "on 4 bytes, not 4398046511104"),
    "sparse": (entry("model", cls_token=torch.ones(2).to_sparse()), "is not an array in memory"),
    "ema": (entry("ema", cls_token=torch.ones(64)), "ema.cls_token is missing or has another"),
    "optimizer": (entry("", optimizer=[1]), r"optimizer is \[1\] \(list\), not a dictionary"),
    "groups": (renumber, "optimizer.param_groups does not number its parameters from 0"),
    "lost": (entry("optimizer", state={0: {}}), "optimizer.state is not of the 67 parameters"),
    "kind": (moments(exp_avg=1), "optimizer.state.1.exp_avg is 1, not a tensor of moments"),
    "cut": (
        moments(exp_avg=torch.ones(1, 1), exp_avg_sq=torch.ones(1, 1)),
        r"moments of shape \(1, 1\) that no weight has",
    ),
    "one cut": (moments(exp_avg_sq=torch.ones(1, 1)), "in another order or shape"),
    "shared": (share_memory, "moments that share memory"),
    "count": (moments(step=torch.tensor(float("nan"))), "optimizer.state.1.step is nan, not"),
    "counts of one": (moments(step=3), "optimizer.state.1.step is 3, not one number in a tensor"),
}


def broken(run: Path, change, folder: Path) -> Path:
    """Write a run's checkpoint with a change, and the good one before it; return its path."""
    state = torch.load(run / "run_previous2.pth", weights_only=True)
    change(state)
    torch.save(state, folder / "run.pth")
    shutil.copy(run / "run_previous2.pth", folder)
    return folder / "run.pth"


@pytest.fixture(scope="module")
def good_state(run) -> dict:
    """Return what a checkpoint of the run holds."""
    return load(run / "run_previous2.pth")


@pytest.mark.parametrize("fault", FAULTS)
def test_f09_a_part_that_cannot_be_right_is_named(fault, good_state):
    change, words = FAULTS[fault]
    state = copy.deepcopy(good_state)
    change(state)
    with pytest.raises(SchemaError, match=words) as error:
        check_contents(state)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("fault", ["text", "huge", "endless", "deep", "cut", "tally", "list"])
def test_f09_a_resume_falls_back_to_the_good_file(fault, run, tmp_path, capsys):
    change, words = FAULTS[fault]
    path = broken(run, change, tmp_path)
    content = path.read_bytes()
    good = resume.find_resume(RunFiles(tmp_path, "run"), "auto", False)
    assert good == tmp_path / "run_previous2.pth"
    printed = capsys.readouterr().out
    assert re.search(f"run.pth cannot be used .*{words}.*; renamed to run.pth.damaged", printed)
    assert printed.count("\n") == 1
    assert (tmp_path / "run.pth.damaged").read_bytes() == content


def fill_weight(value: float):
    """Return a change of one weight."""
    return lambda state: next(iter(state["model"].values())).view(-1)[:1].fill_(value)


def fill_moment(name: str, value: float):
    """Return a change of one value of a moment."""
    return lambda state: state["optimizer"]["state"][1][name].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fill_weight(float("nan")), "model.* has values that are not finite"),
        (fill_weight(float("-inf")), "model.* has values that are not finite"),
        (fill_moment("exp_avg", float("nan")), "optimizer.state.1 has values that are no moments"),
        (fill_moment("exp_avg_sq", -1), "optimizer.state.1 has values that are no moments"),
        (fill_moment("exp_avg_sq", float("nan")), "optimizer.state.1 has values that are no mom"),
    ],
    ids=["weight nan", "weight inf", "mean nan", "square negative", "square nan"],
)
def test_f09_values_that_end_a_run_are_not_resumed(change, words, run, tmp_path, capsys):
    path = broken(run, change, tmp_path)
    good = resume.find_resume(RunFiles(tmp_path, "run"), "auto", False)
    assert good == tmp_path / "run_previous2.pth"
    assert re.search(f"run.pth cannot be used .{words}.*; renamed", capsys.readouterr().out)
    with pytest.raises(UserError, match=words):
        resume.find_resume(RunFiles(tmp_path, "new"), f"{path}.damaged", False)


def test_f09_resume_continues_from_the_good_file(run, videos, tmp_path):
    """With moments that the fused kernel would read beyond their ends."""
    broken(run, FAULTS["cut"][0], tmp_path)
    for path in run.glob("run_*.csv"):
        shutil.copy(path, tmp_path)
    pretrain.main(pretrain_command(videos, tmp_path, *FOUR_UPDATES))
    assert same(saved_state(tmp_path), saved_state(run))


def test_f09_every_reader_refuses_the_file(run, videos, tmp_path):
    path = str(broken(run, FAULTS["size"][0], tmp_path))
    out = tmp_path / "out"
    fresh = FOUR_UPDATES
    for read in (
        lambda: inspect([path]),
        lambda: convert([path, str(out), "--to", "native"]),
        lambda: pretrain.main(pretrain_command(videos, out, *fresh, "--init_from", path)),
        lambda: pretrain.main(pretrain_command(videos, out, *fresh, "--resume", path)),
        lambda: finetune.main(video_command(videos, out, "--finetune", path)),
        lambda: finetune.main(
            ["--val_dir", videos, *output_flags(out), "--eval", "--resume", path]
        ),
    ):
        with pytest.raises(UserError, match="run.pth cannot be used .config.num_heads is '2'"):
            read()
    assert not list(tmp_path.rglob("out/*.pth"))


def swap_moments(state: dict) -> None:
    """Exchange the moments of two parameters of different shapes."""
    states = state["optimizer"]["state"]
    last = max(states)
    states[0], states[last] = states[last], states[0]


def rename_metric(state: dict) -> None:
    """Give the sums of the loss another name."""
    for sums in state["tally"]["sums"].values():
        sums["error"] = sums.pop("loss")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            swap_moments,
            r"does not fit \(exp_avg of parameter 0 has shape \(\d+, \d+\), not \(64,\)",
        ),
        (rename_metric, "has no sums of loss: another script or version saved it"),
    ],
)
def test_f09_what_does_not_fit_this_run_is_refused(change, words, run, videos, tmp_path):
    path = broken(run, change, tmp_path)
    for manifest in run.glob("run_*.csv"):
        shutil.copy(manifest, tmp_path)
    with pytest.raises(UserError, match=words):
        pretrain.main(pretrain_command(videos, tmp_path, *FOUR_UPDATES))
    assert path.exists() and not list(tmp_path.glob("*.damaged"))


def test_f09_a_tensor_keeps_within_its_record(tmp_path):
    torch.save({"a": torch.zeros(8), "b": torch.zeros(1000)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w") as target,
    ):
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                assert content.count(b"K\x08") == 2  # the length of the storage, and of the tensor
                content = content.replace(b"K\x08", b"K\x40")
            target.writestr(record.filename, content)
    load(tmp_path / "a.pth", lazily=True)
    for lazily in (True, False):
        with pytest.raises(CorruptCheckpoint, match="b.pth cannot be"):
            load(tmp_path / "b.pth", lazily=lazily)


def test_f09_files_of_other_projects_keep_their_entries():
    """Entries of our names may have any value there."""
    other = {"model": {"w": torch.ones(2, dtype=torch.int8)}, "step": "3", "epoch": -1, "args": 3}
    check_contents(other)
    with pytest.raises(SchemaError, match="config.mean is 3, not"):
        check_contents(other | {"config": {"mean": 3}})
