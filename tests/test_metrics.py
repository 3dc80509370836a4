"""Sums of metrics, skipped updates, throughput, and the clock of the time spent waiting."""

import time

import pytest
import torch

from util import metrics
from util.metrics import DataWaitTimer, MetricSums, throughput

CPU = torch.device("cpu")


def metric_sums(max_bad_steps: int = 10) -> MetricSums:
    """Return sums of two metrics."""
    return MetricSums(("loss", "grad_norm"), CPU, max_bad_steps)


def add(sums: MetricSums, loss: float, skipped: bool = False, replaced: int = 0, path: str = "a"):
    """Add an update with this loss and a gradient norm ten times as large."""
    values = torch.tensor([loss, 10 * loss])
    sums.add(values, torch.tensor(float(skipped)), torch.tensor(replaced), [path])


def test_means_are_those_of_all_updates():
    sums = metric_sums()
    for loss in (1.0, 2.0, 6.0):
        add(sums, loss, replaced=2)
    assert sums.all_reduce(step=3) == {}
    assert sums.epoch.means() == {"loss": 3.0, "grad_norm": 30.0}
    assert sums.epoch.updates == 3
    assert sums.epoch.skipped == 0
    assert sums.epoch.replaced_frames == 6


def test_skipped_updates_are_counted_but_not_averaged():
    sums = metric_sums()
    add(sums, 1.0, path="a")
    add(sums, float("nan"), skipped=True, path="b")
    add(sums, 5.0, path="c")
    assert sums.all_reduce(step=12) == {11: ["b"]}
    assert sums.epoch.means() == {"loss": 3.0, "grad_norm": 30.0}
    assert sums.epoch.updates == 3
    assert sums.epoch.skipped == 1
    assert sums.epoch.state_dict()["shares"] == 2


def test_means_without_a_finite_update_are_zero():
    sums = metric_sums()
    add(sums, float("inf"), skipped=True)
    sums.all_reduce(step=1)
    assert sums.epoch.means() == {"loss": 0.0, "grad_norm": 0.0}


def test_updates_count_before_they_are_reduced_and_once():
    sums = metric_sums()
    add(sums, 1.0)
    assert sums.updates == 1
    sums.all_reduce(step=1)
    assert sums.all_reduce(step=1) == {}
    add(sums, 1.0)
    assert sums.updates == 2
    sums.all_reduce(step=2)
    assert sums.epoch.updates == 2


def test_a_line_begins_after_the_last_one_and_an_epoch_after_a_reset():
    sums = metric_sums()
    add(sums, 1.0)
    sums.all_reduce(step=1)
    assert sums.pop_line().means()["loss"] == 1.0
    add(sums, 3.0)
    sums.all_reduce(step=2)
    assert sums.pop_line().means()["loss"] == 3.0
    assert sums.epoch.means()["loss"] == 2.0
    sums.reset()
    assert sums.updates == 0
    assert sums.epoch.totals == {"loss": 0.0, "grad_norm": 0.0}


@pytest.mark.parametrize(
    ("skipped", "streak", "failed_step"),
    [
        ([True, False, True], 1, None),
        ([True, True, False], 0, 2),
        ([False, True, True], 2, 3),
        ([True, True, True], 3, 2),  # where the limit was reached first
    ],
)
def test_a_streak_is_of_skipped_updates_in_a_row(skipped, streak, failed_step):
    sums = metric_sums(max_bad_steps=2)
    for flag in skipped:
        add(sums, 1.0, flag)
    sums.all_reduce(step=3)
    assert sums.bad_streak == streak
    assert sums.failed_step == failed_step


def test_a_streak_continues_over_reductions_and_epochs():
    sums = metric_sums(max_bad_steps=2)
    add(sums, 1.0, skipped=True)
    sums.all_reduce(step=4)
    assert sums.failed_step is None
    sums.reset()
    add(sums, 1.0, skipped=True)
    sums.all_reduce(step=5)
    assert sums.failed_step == 5


def test_a_saved_state_continues_with_the_same_sums():
    whole = metric_sums()
    parts = metric_sums()
    for sums in (whole, parts):
        add(sums, 0.1, replaced=3)
        sums.all_reduce(step=1)
        sums.pop_line()
        add(sums, 0.7, skipped=True)
        sums.all_reduce(step=2)
    resumed = metric_sums()
    resumed.load_state_dict(parts.state_dict())
    assert resumed.updates == 2
    for sums in (whole, resumed):
        add(sums, 0.3)
        sums.all_reduce(step=3)
    assert resumed.epoch == whole.epoch
    assert resumed.line == whole.line
    assert resumed.bad_streak == whole.bad_streak


def test_the_state_has_the_keys_of_older_checkpoints():
    sums = metric_sums()
    add(sums, 2.0, replaced=1)
    add(sums, 1.0, skipped=True)
    sums.all_reduce(step=2)
    expected = {
        "loss": 2.0,
        "grad_norm": 20.0,
        "updates": 2.0,
        "skipped": 1.0,
        "shares": 1.0,
        "replaced": 1.0,
    }
    assert sums.state_dict() == {"sums": {"epoch": expected, "line": expected}, "streak": 1}


@pytest.mark.parametrize("state", [None, {}])
def test_a_checkpoint_without_sums_begins_an_epoch(state):
    sums = metric_sums()
    sums.load_state_dict(state)
    assert sums.updates == 0


def test_rates_are_of_all_ranks_together_and_per_device(monkeypatch):
    monkeypatch.setattr(metrics, "world_size", lambda: 2)
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 40e12)
    rates = throughput(clips=100, seconds=5.0, flops_per_clip=1e12, device=CPU)
    assert rates["clips_per_second"] == 20
    assert rates["tflops"] == 10  # per device
    assert rates["mfu"] == 0.25
    assert rates["memory_gib"] > 0


def test_the_timer_excludes_the_time_between_epochs(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = DataWaitTimer(CPU)
    for _ in range(2):
        timer.resume()
        now += 1  # waiting
        timer.end_wait()
        now += 3  # a step
        timer.begin_wait()
        timer.end_wait()
        now += 4
        timer.begin_wait()
        timer.pause()
        now += 1000  # a validation
    timer.resume()
    now += 4
    timer.end_wait()
    assert timer.read() == (pytest.approx(20), pytest.approx(6 / 20))
