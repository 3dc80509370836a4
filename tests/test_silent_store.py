"""The end of a process whose network is cut, so that the processes' store does not answer (F04)."""

import threading
import time

import pytest

from util import failures
from util.failures import FailureWatch

LIMITS = ("ANSWER_SECONDS", "POLL_SECONDS", "WAIT_FOR_OTHERS", "WAIT_FOR_RANK0", "WAIT_FOR_END")


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
    watch = FailureWatch(SilentStore(), 1, 2, outlives_ranks=False, report=print)
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
