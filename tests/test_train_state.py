"""The state of a run: its position, what a checkpoint holds, and another batch size."""

import pytest
import torch
from tiny import same
from torch import nn

from util.metrics import MetricSums
from util.optim import Schedule, make_optimizer, set_learning_rate
from util.train_state import TrainState, dataset_fingerprint

CPU = torch.device("cpu")


def new_state(
    steps_per_epoch: int = 4, global_batch: int = 4, weight_decay: float = 0.0, epochs: int = 3
) -> TrainState:
    """Return the state of a run that has not begun."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": list(model.parameters()), "weight_decay": weight_decay, "lr_scale": 1.0}]
    return TrainState(
        model=model,
        optimizer=make_optimizer(groups, model.parameters(), betas=(0.9, 0.95)),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        schedule=Schedule(0.1, 0.0, 0, steps_per_epoch, epochs * steps_per_epoch),
        metrics=MetricSums(("loss",), CPU, max_bad_steps=10),
        accum_iter=1,
        clip_grad=None,
        global_batch=global_batch,
        flops_per_clip=1.0,
        config={"depth": 2},
        flags={"lr": 0.1, "amp": "auto"},
        data=dataset_fingerprint(["a.mp4"]),
    )


def do_updates(state: TrainState, count: int) -> None:
    """Do `count` updates, without the end of an epoch."""
    for _ in range(count):
        state.model(torch.ones(1, 3)).square().sum().backward()
        set_learning_rate(state.optimizer, state.schedule.learning_rate(state.step))
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.metrics.add(torch.ones(1), torch.zeros(()), torch.zeros(()), ["a.mp4"])
        state.step += 1
        state.samples_consumed += state.global_batch
    state.metrics.all_reduce(state.step)


def saved_at(step: int, **options) -> dict:
    """Return the checkpoint of a run after this update, in the middle of an epoch."""
    state = new_state(**options)
    do_updates(state, step)
    epoch, _ = state.position()
    return state.state_dict(epoch)


def test_an_epoch_stays_current_until_it_is_logged():
    state = new_state(steps_per_epoch=4)
    assert state.position() == (0, 0)
    do_updates(state, 3)
    assert state.position() == (0, 3)
    do_updates(state, 1)
    assert state.position() == (0, 4)
    assert state.end_of_epoch() == 4
    state.metrics.reset()
    assert state.position() == (1, 0)
    assert state.end_of_epoch() == 8


def test_a_run_is_unfinished_until_its_last_epoch_is_logged():
    state = new_state(steps_per_epoch=2, epochs=1)
    do_updates(state, 1)
    assert state.unfinished() and not state.is_last_step()
    do_updates(state, 1)
    assert state.unfinished() and state.is_last_step()
    state.metrics.reset()
    assert not state.unfinished()


def test_a_checkpoint_restores_the_state():
    saved = saved_at(3)
    state = new_state()
    state.model.load_state_dict(saved["model"])
    state.restore_progress(saved)
    assert same(state.state_dict(epoch=0), saved)
    assert state.position() == (0, 3)
    assert state.start_step == 3
    assert state.last_logged_step == 3


def test_a_checkpoint_has_the_documented_keys():
    keys = (
        "model optimizer scaler epoch step samples_consumed config args tally global_batch "
        "steps_per_epoch data"
    )
    saved = saved_at(1)
    assert set(saved) == set(keys.split())
    state = new_state()
    state.best_acc1 = 50.0
    assert state.state_dict(0)["best_acc1"] == 50.0


def test_weight_decay_and_betas_stay_those_of_the_flags():
    saved = saved_at(2, weight_decay=0.5)
    state = new_state(weight_decay=0.1)
    state.restore_progress(saved)
    (group,) = state.optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.9, 0.95)
    moments = state.optimizer.state_dict()["state"]
    assert same(moments, saved["optimizer"]["state"])


@pytest.mark.parametrize(
    ("step", "steps_per_epoch", "global_batch", "expected"),
    [
        (3, 8, 2, 6),  # 3 x 4 samples of the epoch are 6 updates of 2
        (3, 2, 8, 1),  # 12 samples are one complete update of 8
        (6, 8, 2, 12),  # of the second epoch: 8 + 2 x 4 / 2
        (6, 2, 8, 3),
        (7, 1, 16, 1),  # an epoch is never complete: 12 samples are no update of 16
        (3, 2, 4, 1),  # a smaller set: the epoch's last update is left to do
        (3, 6, 4, 3),  # a larger set
    ],
)
def test_another_batch_continues_in_the_same_epoch(step, steps_per_epoch, global_batch, expected):
    saved = saved_at(step)  # epochs of 4 updates of 4 samples
    state = new_state(steps_per_epoch, global_batch)
    state.restore_progress(saved)
    assert state.step == expected
    assert state.samples_consumed == 4 * step
    assert state.metrics.updates == 0  # the epoch's metrics begin here
    assert state.start_step == expected


def test_another_batch_after_complete_epochs_begins_an_epoch():
    state = new_state(steps_per_epoch=4)
    do_updates(state, 8)
    state.metrics.reset()
    saved = state.state_dict(epoch=1)
    resumed = new_state(steps_per_epoch=8, global_batch=2)
    resumed.restore_progress(saved)
    assert resumed.step == 16
    assert resumed.position() == (2, 0)


def test_the_fingerprint_depends_on_paths_labels_and_order():
    fingerprint = dataset_fingerprint(["a", "b"], [0, 1])
    assert fingerprint["samples"] == 2
    others = [
        dataset_fingerprint(["a", "b"]),
        dataset_fingerprint(["b", "a"], [0, 1]),
        dataset_fingerprint(["a", "b"], [1, 0]),
        dataset_fingerprint(["a", "c"], [0, 1]),
    ]
    hashes = {other["sha256"] for other in others}
    assert len(hashes) == 4
    assert fingerprint["sha256"] not in hashes
    assert dataset_fingerprint(["a", "b"], [0, 1]) == fingerprint
