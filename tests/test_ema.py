"""The EMA of the weights: its recursion, exact resuming, its evaluation, and its extraction."""

import math
import os
import shutil
import signal

import pytest
import torch
from launch import check_ranks
from make_videos import write_folder
from runs import (
    assert_same_run,
    image_command,
    log_records,
    output_flags,
    pretrain_command,
    saved_state,
    write_images,
)
from tiny import same, tiny_vit

import engine_finetune
import engine_pretrain
import finetune_on_image
import pretrain
from tools.convert_checkpoint import main as convert
from tools.inspect_checkpoint import main as inspect
from util import preemption
from util.checkpoint import load
from util.dist import UserError
from util.ema import WeightAverage
from util.evaluation import Scores

DECAY = 0.9
EPOCHS = ["--batch_size_per_gpu", "4", "--min_lr", "0.001", "--epochs"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of 17 videos: four updates of four an epoch, one video left over."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 17))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of twelve images of two classes."""
    return write_images(tmp_path_factory.mktemp("images"))


def command(videos, out, *more) -> list[str]:
    """Return the command of a validated pretraining with an EMA."""
    return pretrain_command(videos, out, "--val_dirs", videos, "--ema", str(DECAY), *more)


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    """Return the folder of two epochs with an EMA, in one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    pretrain.main(command(videos, out, *EPOCHS, "2"))
    return out


def states_by_step(out) -> dict[int, dict]:
    """Return a run's newest and previous checkpoints by their number of updates."""
    states = [load(path) for path in out.glob("run*.pth")]
    return {state["step"]: state for state in states}


def assert_next_average(before: dict, weights: dict, after: dict, decay: float = DECAY) -> None:
    """Check average = decay * average + (1 - decay) * weights, computed in float64."""
    for name, average in after.items():
        expected = decay * before[name].double() + (1 - decay) * weights[name].double()
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)


def test_every_update_moves_the_average_but_skipped_ones(videos, tmp_path, monkeypatch):
    original = engine_pretrain.micro_step
    initial = []

    def poisoned(model, *rest):
        initial.append({name: value.clone() for name, value in model.state_dict().items()})
        loss = original(model, *rest)
        if len(initial) == 3:
            model.norm.weight.grad[0] = float("nan")
        return loss

    monkeypatch.setattr(engine_pretrain, "micro_step", poisoned)
    flags = [*EPOCHS, "2", "--checkpoint_every_steps", "1", "--keep", "99"]
    pretrain.main(command(videos, tmp_path, *flags))
    states = states_by_step(tmp_path)
    assert sorted(states) == list(range(1, 9))
    average = initial[0]
    for step in range(1, 9):
        state = states[step]
        if step == 3:
            assert same(state["ema"], average)
        else:
            assert_next_average(average, state["model"], state["ema"])
            assert not same(state["ema"], average)
        average = state["ema"]
    assert state["ema"].keys() == state["model"].keys()


def test_an_average_changes_nothing_in_training(videos, undisturbed, tmp_path):
    pretrain.main(pretrain_command(videos, tmp_path, "--val_dirs", videos, *EPOCHS, "2"))
    plain = saved_state(tmp_path)
    state = saved_state(undisturbed)
    assert "ema" not in plain
    state.pop("ema")
    assert same(state, plain)
    for record, plain_record in zip(log_records(undisturbed), log_records(tmp_path), strict=True):
        ema_loss = record.pop("val_loss_ema")
        assert record == plain_record
        assert math.isfinite(ema_loss) and ema_loss != record["val_loss"]


def test_a_stop_inside_the_validation_of_the_ema_is_exact(
    videos, undisturbed, tmp_path, monkeypatch, capsys
):
    original = pretrain.validation_loss
    calls = 0

    def validation_loss(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:  # of the EMA, after the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(pretrain, "validation_loss", validation_loss)
    for _ in range(2):
        monkeypatch.setattr(preemption, "_request", preemption.StopRequest())
        pretrain.main(command(videos, tmp_path, *EPOCHS, "2"))
    assert calls == 6
    assert "at update 4" in capsys.readouterr().out
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_processes_continue_their_averages_exactly(videos, tmp_path):
    """The log has the loss of the EMA over both ranks, so it covers the average of each."""
    flags = ["--batch_size_per_gpu", "2", "--epochs", "2"]
    check_ranks(2, command(videos, tmp_path / "whole", *flags))
    for faults in ([{"do": "SIGTERM", "at": 2}], [{"do": "SIGTERM", "at": 1}], []):
        check_ranks(2, command(videos, tmp_path / "parts", *flags), faults)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_resumed_run_may_switch_the_average_on_and_off(videos, tmp_path, capsys):
    def resume(epochs: int, *more) -> tuple[dict, str]:
        pretrain.main(pretrain_command(videos, tmp_path, *EPOCHS, str(epochs), *more))
        return load(tmp_path / "run.pth"), capsys.readouterr().out

    every_update = ["--checkpoint_every_steps", "1", "--keep", "9"]
    before, _ = resume(1)
    _, printed = resume(2, "--ema", "0.9", *every_update)
    assert "run.pth has no EMA: it starts from the weights at update 4" in printed
    first = states_by_step(tmp_path)[5]
    assert_next_average(before["model"], first["model"], first["ema"])
    _, printed = resume(3, "--ema", "0.5", *every_update)
    assert "--ema 0.9 -> 0.5" in printed
    states = states_by_step(tmp_path)
    assert_next_average(states[8]["ema"], states[9]["model"], states[9]["ema"], decay=0.5)
    state, printed = resume(4)
    assert "run.pth is not continued, and later checkpoints lack it (--ema 0)" in printed
    assert "ema" not in state


def test_a_frozen_backbone_is_averaged_and_stored_once(images, tmp_path):
    flags = ["--ema", "0.5", "--freeze_backbone", "--epochs", "1", "--batch_size_per_gpu", "4"]
    finetune_on_image.main(image_command(images, tmp_path, *flags))
    state = load(tmp_path / "run.pth")
    differing = [
        name for name in state["ema"] if not same(state["ema"][name], state["model"][name])
    ]
    assert differing == ["head.weight", "head.bias"]
    weights = state["model"]["blocks.0.mlp.fc1.weight"]
    assert state["ema"]["blocks.0.mlp.fc1.weight"].data_ptr() == weights.data_ptr()


@pytest.fixture(scope="module")
def finetuned(images, tmp_path_factory):
    """Return the folder of a finetuning with an EMA."""
    out = tmp_path_factory.mktemp("finetuned")
    flags = ["--ema", "0.8", "--epochs", "3", "--batch_size_per_gpu", "4"]
    finetune_on_image.main(image_command(images, out, *flags))
    return out


def test_eval_gives_the_figures_of_the_validation(images, finetuned, tmp_path, capsys):
    record = log_records(finetuned)[-1]
    assert record["test_loss"] != record["test_ema_loss"]
    flags = ["--eval", "--resume", str(finetuned / "run.pth")]
    finetune_on_image.main(image_command(images, tmp_path, *flags))
    printed = capsys.readouterr().out
    for name, prefix in (("test", "\n"), ("test_ema", "EMA: ")):
        acc1, acc5, loss = (record[f"{name}_{figure}"] for figure in ("acc1", "acc5", "loss"))
        assert f"{prefix}top-1 {acc1:.2f} %  top-5 {acc5:.2f} %  loss {loss:.4f}  (" in printed
    tables = [
        (tmp_path / f"run_{name}_predictions.csv").read_text() for name in ("test", "test_ema")
    ]
    assert tables[0] != tables[1]


def test_the_converted_average_is_a_checkpoint_of_its_own(images, finetuned, tmp_path, capsys):
    source = str(finetuned / "run.pth")
    state = load(source)
    average = tmp_path / "average.pth"
    convert([source, str(average), "--to", "native", "--ema"])
    converted = load(average)
    assert same(converted["model"], state["ema"])
    assert converted.keys() == (state.keys() | {"averaged"}) - {"optimizer", "scaler", "ema"}
    capsys.readouterr()
    finetune_on_image.main(
        image_command(images, tmp_path / "eval", "--eval", "--resume", str(average))
    )
    assert f"loss {log_records(finetuned)[-1]['test_ema_loss']:.4f}  (" in capsys.readouterr().out
    convert([source, str(tmp_path / "plain.pth"), "--to", "native"])
    assert "has an EMA beside the weights: it is left out (--ema" in capsys.readouterr().out
    plain = load(tmp_path / "plain.pth")
    assert same(plain["model"], state["model"]) and "ema" not in plain
    inspect([source])
    assert "ema " in capsys.readouterr().out
    for path, message in ((average, "as its weights already"), ("plain.pth", "has no EMA")):
        with pytest.raises(UserError, match=message):
            convert([str(tmp_path / path), str(tmp_path / "c.pth"), "--to", "native", "--ema"])


def scripted_scores(acc1: float) -> Scores:
    """Return the scores of a validation of the twelve images with this top-1."""
    ones = torch.ones(12, dtype=torch.long)
    return Scores(1.0, acc1, 100.0, ones, ones[:, None], torch.ones(12, 1))


def test_the_best_checkpoint_has_the_better_of_both(images, tmp_path, monkeypatch):
    scripted = iter([50.0, 60.0, 70.0, 60.0, 70.0, 70.0])
    monkeypatch.setattr(engine_finetune, "evaluate", lambda *_: scripted_scores(next(scripted)))
    flags = ["--ema", "0.8", "--batch_size_per_gpu", "4"]
    bests = []
    for epochs in ("1", "2", "3"):
        finetune_on_image.main(image_command(images, tmp_path, *flags, "--epochs", epochs))
        bests.append(load(tmp_path / "run_best.pth"))
        if epochs == "1":
            assert same(bests[0]["model"], load(tmp_path / "run.pth")["ema"])
            assert bests[0]["averaged"] and "ema" not in bests[0]
            shutil.copy(tmp_path / "run_best.pth", tmp_path / "averaged.pth")
        elif epochs == "2":
            assert same(bests[1]["model"], load(tmp_path / "run.pth")["model"])
            assert not bests[1].keys() & {"ema", "averaged"}
    assert same(bests[2], bests[1])  # not better
    assert [best["best_acc1"] for best in bests] == [60.0, 70.0, 70.0]
    resumed = ["--resume", str(tmp_path / "averaged.pth"), "--epochs", "2"]
    with pytest.raises(UserError, match="from which training cannot be resumed"):
        finetune_on_image.main(image_command(images, tmp_path / "other", *flags, *resumed))


def test_finetuning_takes_the_weights_and_names_the_average(images, undisturbed, tmp_path, capsys):
    sources = [undisturbed / "run.pth", tmp_path / "average.pth"]
    convert([*map(str, sources), "--to", "native", "--ema"])
    for key, source in zip(("model", "ema"), sources, strict=True):
        capsys.readouterr()
        model = tiny_vit(num_frames=4)
        engine_finetune.load_pretrained(source, model)
        printed = capsys.readouterr().out
        expected = load(undisturbed / "run.pth")[key]
        assert same(
            model.state_dict()["blocks.0.attn.q.weight"], expected["blocks.0.attn.q.weight"]
        )
        count = len(expected)
        assert (f"ema ({count})" in printed) == (key == "model")


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "much"])
def test_other_decays_are_refused(value, tmp_path):
    with pytest.raises(UserError, match=f"--ema: .*{value}"):
        pretrain.main(["--ema", value, *output_flags(tmp_path)])


def test_the_weights_come_back_after_an_error():
    model = tiny_vit()
    ema = WeightAverage(model, 0.5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    with pytest.raises(ValueError), ema.in_model():
        assert same(model.state_dict(), weights)
        raise ValueError
    assert same(ema.state_dict(), weights)
