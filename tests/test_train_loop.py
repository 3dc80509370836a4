"""The training loop against a plain one, and updates that are not finite (T14)."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launch import check_ranks, run_ranks
from runs import log_records, pretrain_command, recorded_steps
from tiny import same
from torch import nn

import engine_pretrain
import pretrain
from util import preemption
from util.bad_files import BadFiles
from util.checkpointer import Checkpointer
from util.dist import UserError
from util.files import RunFiles
from util.logger import RunLogger
from util.metrics import MetricSums
from util.optim import Schedule, backward, make_optimizer
from util.train_loop import train_one_epoch
from util.train_state import TrainState, dataset_fingerprint

CPU = torch.device("cpu")
ACCUM_ITER = 2
STEPS_PER_EPOCH = 3
EPOCHS = 2
CLIP_GRAD = 0.5
LR = 0.1
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.95)


def new_model() -> nn.Linear:
    """Return the same layer in each call."""
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def epoch_batches(epoch: int) -> list[dict]:
    """Return the batches of an epoch, with the entries that the loop reads."""
    generator = torch.Generator().manual_seed(epoch)
    batches = []
    for index in range(STEPS_PER_EPOCH * ACCUM_ITER):
        batch = {
            "clips": torch.randn(4, 1, 3, generator=generator),  # (B, R, C)
            "targets": torch.randn(4, 1, 2, generator=generator),
            "replaced": torch.tensor([0, 0, 1, 0]),
            "paths": [f"{index}.mp4"],
            "bad": [],
            "damaged": [],
        }
        batches.append(batch)
    return batches


def start_run(out: Path, max_bad_steps: int = 10) -> Checkpointer:
    """Return a run that has not begun."""
    model = new_model()
    groups = [{"params": list(model.parameters()), "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0}]
    state = TrainState(
        model=model,
        optimizer=make_optimizer(groups, model.parameters(), BETAS),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        schedule=Schedule(LR, 0.0, 1.0, STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH),
        metrics=MetricSums(("loss", "grad_norm"), CPU, max_bad_steps),
        accum_iter=ACCUM_ITER,
        clip_grad=CLIP_GRAD,
        global_batch=8,
        flops_per_clip=1.0,
        config={},
        flags={},
        data=dataset_fingerprint(["a.mp4"]),
    )
    logger = RunLogger(RunFiles(out, "run"))
    checkpointer = Checkpointer(
        state=state,
        logger=logger,
        bad_files=BadFiles(out, limit=0),
        keep=1,
        every_steps=None,
        every_minutes=0,
    )
    checkpointer.start(None, force=False)
    return checkpointer


def train_epoch(checkpointer: Checkpointer, batches: list[dict], log_every: int = 100) -> dict:
    """Train from the current update to the end of its epoch; return the epoch's record."""
    state = checkpointer.state

    def micro_step(batch: dict, _micro: int) -> torch.Tensor:
        loss = F.mse_loss(state.model(batch["clips"]), batch["targets"])
        backward(loss, state.scaler, ACCUM_ITER)
        return loss.detach()[None]

    return train_one_epoch(state.model, batches, micro_step, checkpointer, log_every)


def current_weights(checkpointer: Checkpointer) -> dict:
    """Return the current weights."""
    return checkpointer.state.model.state_dict()


def plain_learning_rate(step: int) -> float:
    """Return the learning rate: one epoch of warm-up, then half a cosine in the other."""
    if step < STEPS_PER_EPOCH:
        return LR * step / STEPS_PER_EPOCH
    progress = (step - STEPS_PER_EPOCH) / STEPS_PER_EPOCH
    return LR * (1 + math.cos(math.pi * progress)) / 2


def plain_loop() -> tuple[nn.Linear, list[list[float]], list[list[float]]]:
    """Train in a few lines of torch; return the model, and loss and norm by epoch and update."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY)
    losses = [[] for _ in range(EPOCHS)]
    norms = [[] for _ in range(EPOCHS)]
    for epoch in range(EPOCHS):
        batches = epoch_batches(epoch)
        for update in range(STEPS_PER_EPOCH):
            step = epoch * STEPS_PER_EPOCH + update
            optimizer.param_groups[0]["lr"] = plain_learning_rate(step)
            optimizer.zero_grad()
            loss = 0
            for batch in batches[update * ACCUM_ITER : (update + 1) * ACCUM_ITER]:
                loss += F.mse_loss(model(batch["clips"]), batch["targets"]) / ACCUM_ITER
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.step()
            losses[epoch].append(loss.item())
            norms[epoch].append(norm.item())
    return model, losses, norms


def test_an_epoch_equals_a_plain_loop(tmp_path):
    checkpointer = start_run(tmp_path)
    state = checkpointer.state
    model, losses, norms = plain_loop()
    assert max(norms[0]) > CLIP_GRAD  # gradients are clipped
    for epoch in range(EPOCHS):
        record = train_epoch(checkpointer, epoch_batches(epoch))
        state.metrics.reset()
        steps_done = (epoch + 1) * STEPS_PER_EPOCH
        assert state.step == steps_done
        assert state.samples_consumed == 8 * steps_done
        assert record == {
            "train_loss": pytest.approx(sum(losses[epoch]) / STEPS_PER_EPOCH, rel=1e-5),
            "train_grad_norm": pytest.approx(sum(norms[epoch]) / STEPS_PER_EPOCH, rel=1e-5),
            "train_lr": pytest.approx(plain_learning_rate(steps_done - 1)),
            "skipped_steps": 0,
            "replaced_frames": STEPS_PER_EPOCH * ACCUM_ITER,
        }
    torch.testing.assert_close(state.model.state_dict(), model.state_dict())


def test_an_interrupted_epoch_continues_with_its_other_batches(tmp_path):
    whole = start_run(tmp_path / "whole")
    record = train_epoch(whole, epoch_batches(0))
    parts = start_run(tmp_path / "parts")
    train_epoch(parts, epoch_batches(0)[:ACCUM_ITER])  # one update
    assert parts.state.position() == (0, 1)
    assert train_epoch(parts, epoch_batches(0)[ACCUM_ITER:]) == record
    assert same(parts.state.state_dict(0), whole.state.state_dict(0))


def test_a_complete_epoch_has_the_same_record_without_batches(tmp_path):
    checkpointer = start_run(tmp_path)
    record = train_epoch(checkpointer, epoch_batches(0))
    assert train_epoch(checkpointer, []) == record
    assert checkpointer.state.step == STEPS_PER_EPOCH


def test_an_epoch_leaves_later_batches_unused(tmp_path):
    checkpointer = start_run(tmp_path)
    batches = iter(epoch_batches(0) + epoch_batches(1))
    train_epoch(checkpointer, batches)
    assert checkpointer.state.step == STEPS_PER_EPOCH
    assert len(list(batches)) == STEPS_PER_EPOCH * ACCUM_ITER


def test_progress_lines_have_the_means_since_the_last_one(tmp_path, capsys):
    checkpointer = start_run(tmp_path)
    _, losses, _ = plain_loop()
    train_epoch(checkpointer, epoch_batches(0), log_every=2)
    checkpointer.state.metrics.reset()
    train_epoch(checkpointer, epoch_batches(1), log_every=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "update " in line]
    assert [line.split("update ")[1].split()[0] for line in lines] == ["2/6", "4/6", "6/6"]
    assert f"loss {sum(losses[0][:2]) / 2:.4g} " in lines[0]
    assert f"loss {losses[1][0]:.4g} " in lines[1]  # an epoch's end begins a line
    assert f"lr {plain_learning_rate(5):.4g} " in lines[2]
    assert "replaced 4 " in lines[0]


def test_a_stop_request_ends_training_after_the_current_update(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "_request", preemption.StopRequest())  # for this test only
    checkpointer = start_run(tmp_path)

    def batches():
        for index, batch in enumerate(epoch_batches(0)):
            if index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    preemption.install_signal_handlers()
    with checkpointer.graceful_shutdown():
        train_epoch(checkpointer, batches())
    assert checkpointer.state.step == 1
    assert checkpointer.logger.files.marker.read_text() == "1\n"
    saved = torch.load(tmp_path / "run.pth", weights_only=True)
    assert saved["step"] == 1
    assert same(saved["model"], current_weights(checkpointer))


def test_a_nonfinite_loss_is_skipped_counted_and_listed(tmp_path, capsys):
    checkpointer = start_run(tmp_path)
    batches = epoch_batches(0)
    batches[3]["clips"][0] = torch.inf  # of the second update
    record = train_epoch(checkpointer, batches, log_every=1)
    assert record["skipped_steps"] == 1
    assert math.isfinite(record["train_loss"])
    assert all(value.isfinite().all() for value in current_weights(checkpointer).values())
    assert "skipped 1 " in capsys.readouterr().out
    listed = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert listed == {"run": "run", "update": 2, "files": ["2.mp4", "3.mp4"]}


def test_too_many_nonfinite_losses_end_the_run(tmp_path):
    checkpointer = start_run(tmp_path, max_bad_steps=2)
    batches = epoch_batches(0)
    for batch in batches[2:]:
        batch["clips"][0] = torch.inf
    with pytest.raises(UserError, match="^2 updates in a row .*, up to update 3: lower --lr"):
        train_epoch(checkpointer, batches)


def test_a_nonfinite_gradient_skips_the_update_of_a_pretraining(videos, tmp_path, monkeypatch):
    original = engine_pretrain.micro_step
    calls = 0

    def poisoned(model, *rest):
        nonlocal calls
        loss = original(model, *rest)
        calls += 1
        if calls in (2, 3):
            model.norm.weight.grad[0] = float("nan")
        return loss

    monkeypatch.setattr(engine_pretrain, "micro_step", poisoned)
    flags = "--batch_size_per_gpu 4 --min_lr 0.001 --epochs 2".split()
    pretrain.main(pretrain_command(videos, tmp_path / "a", *flags))
    assert [record["skipped_steps"] for record in log_records(tmp_path / "a")] == [1, 1]
    state = torch.load(tmp_path / "a/run.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    optimizer_steps = {float(moments["step"]) for moments in state["optimizer"]["state"].values()}
    assert optimizer_steps == {2.0}
    calls = 0
    with pytest.raises(UserError, match="2 updates in a row"):
        pretrain.main(pretrain_command(videos, tmp_path / "b", *flags, "--max_bad_steps", "2"))


FAULTS = [{"do": "nan", "rank": 1}, {"do": "inf", "rank": 0}]
FAULT_NAMES = ["nan loss on rank 1", "inf gradient on rank 0"]


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fault", FAULTS, ids=FAULT_NAMES)
def test_t14_an_update_that_is_not_finite_is_skipped_by_all_ranks(amp, fault, videos, tmp_path):
    flags = f"--batch_size_per_gpu 2 --epochs 2 --checkpoint_every_steps 1 --keep 9 --amp {amp}"
    check_ranks(2, pretrain_command(videos, tmp_path, *flags.split()), [fault | {"at": 3}])
    states = {}
    for path in tmp_path.glob("run*.pth"):
        saved = torch.load(path, weights_only=True)
        states[saved["step"]] = saved
        assert all(value.isfinite().all() for value in saved["model"].values())
        for moments in saved["optimizer"]["state"].values():
            assert all(value.isfinite().all() for value in moments.values())
    assert sorted(states) == [1, 2, 3, 4]
    assert same(states[3]["model"], states[2]["model"])
    assert same(states[3]["optimizer"]["state"], states[2]["optimizer"]["state"])
    assert not same(states[4]["model"], states[3]["model"])

    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    paths = (tmp_path / "run_train.csv").read_text().splitlines()[1:]
    indices = [index for rank in (0, 1) for index in recorded_steps(tmp_path, rank)[2]["index"]]
    files = [paths[index] for index in indices]
    assert json.loads(line) == {"run": "run", "update": 3, "files": files}
    log = log_records(tmp_path)
    assert [record["skipped_steps"] for record in log] == [0, 1]
    assert all(math.isfinite(record["train_loss"]) for record in log)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fault", FAULTS, ids=FAULT_NAMES)
def test_t14_two_such_updates_in_a_row_end_the_run_on_all_ranks(amp, fault, videos, tmp_path):
    flags = (
        f"--batch_size_per_gpu 2 --epochs 2 --checkpoint_every_steps 1 --keep 9 --amp {amp} "
        "--max_bad_steps 2"
    ).split()
    faults = [fault | {"at": 2}, fault | {"at": 3}]
    codes, printed = run_ranks(2, pretrain_command(videos, tmp_path, *flags), faults)
    assert codes == [2, 2]
    message = "2 updates in a row without a finite loss and gradient, up to update 3"
    assert message in printed
    assert "Traceback" not in printed
    assert torch.load(tmp_path / "run.pth", weights_only=True)["step"] == 2  # nothing is deleted
