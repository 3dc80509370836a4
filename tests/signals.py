"""Signals to this process, sent by a function that a run calls."""

import os
import signal


def count_and_signal(monkeypatch, module, name: str, at: int) -> list[int]:
    """Make a function send SIGTERM to this process at its call number `at`.

    Returns a list that grows by one element per call.
    """
    original = getattr(module, name)
    calls = []

    def call(*arguments, **options):
        calls.append(len(calls) + 1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    return calls
