"""A disk that is slower than training: the write of an update begins after later updates."""

import threading

from util import checkpoint, train_loop

TIMEOUT = 60  # seconds, against hanging


class SlowDisk:
    """Writes each checkpoint of a run late, and records when."""

    def __init__(self, monkeypatch, total_steps: int):
        """Patch the training loop and `checkpoint.save`. total_steps: updates of the run."""
        self.total_steps = total_steps
        self.lag = 1  # updates that are done between a save and its write
        self.updates_done = 0
        self.updated = threading.Condition()
        self.writes: list[tuple[str, int, int]] = []  # file, its step, updates done by then
        self.failing: set[str] = set()  # names of files whose next write fails
        self.save = checkpoint.save
        self.apply_update = train_loop.apply_update
        monkeypatch.setattr(checkpoint, "save", self.save_late)
        monkeypatch.setattr(train_loop, "apply_update", self.apply_and_notify)

    def apply_and_notify(self, state, *rest) -> None:
        """Do an update, and let the writes go on that wait for it."""
        self.apply_update(state, *rest)
        with self.updated:
            self.updates_done = state.step + 1
            self.updated.notify_all()

    def save_late(self, path, state, keep=1) -> None:
        """Save `lag` updates later, or at once after the run's last one. Fail if told to."""
        wanted = min(state["step"] + self.lag, self.total_steps)
        with self.updated:
            assert self.updated.wait_for(lambda: self.updates_done >= wanted, TIMEOUT)
            self.writes.append((path.name, state["step"], self.updates_done))
        if path.name in self.failing:
            self.failing.remove(path.name)
            raise OSError(28, "No space left on device")
        self.save(path, state, keep)
