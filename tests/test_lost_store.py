"""The end of a process that cannot reach the processes' store (F04, T12).

The network is cut, so that the store does not answer, or torchrun has been killed, which has it.
"""

import threading
import time
from datetime import timedelta

import pytest
from launch import Job, free_port
from runs import pretrain_command

from util import dist, failures
from util.dist import UserError
from util.failures import FailureWatch

LIMITS = ("CALL_SECONDS", "POLL_SECONDS", "WAIT_FOR_OTHERS", "WAIT_FOR_RANK0", "WAIT_FOR_END")


class SilentStore:
    """A store on the other side of a cut network: every call waits without end."""

    def clone(self):
        return self

    def check(self, _keys):
        threading.Event().wait()

    def compare_set(self, *_):
        threading.Event().wait()

    def add(self, *_):
        threading.Event().wait()


@pytest.mark.parametrize("at_once", [True, False])
def test_f04_a_process_ends_without_an_answer_of_the_store(at_once, monkeypatch):
    for limit in LIMITS:
        monkeypatch.setattr(failures, limit, 0.2)
    watch = FailureWatch(SilentStore(), 1, 2, store_in_launcher=False, report=print)
    time.sleep(0.5)  # until its thread waits, too
    announced = []

    def fail() -> None:
        announced.append(watch.announce("out of luck", 3, at_once))
        watch.leave()

    ending = threading.Thread(target=fail, daemon=True)
    ending.start()
    ending.join(10)
    assert not ending.is_alive()
    assert (announced[0].rank, announced[0].code, announced[0].reason) == (1, 3, "out of luck")


def test_t12_no_rank_waits_for_the_store_of_a_dead_torchrun(monkeypatch):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (address | {"RANK": "0", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match=f"torchrun.* has ended .*{address['MASTER_PORT']}"):
        dist._join_store(timedelta(seconds=2))


@pytest.mark.slow
def test_t12_a_launcher_killed_at_once_leaves_no_process(videos, tmp_path):
    job = Job(tmp_path, "pretrain.py", pretrain_command(videos, tmp_path, "--epochs", "1"))
    while len(job.rank_pids()) < 2:
        assert job.process.poll() is None
        time.sleep(0.05)
    job.process.kill()
    job.wait_until_gone(60)
    text = job.printed.read_text()
    assert text.count("error: torchrun, which has started this process, has ended") == 2
    assert "Traceback" not in text
