"""What a disturbance does to a run of two processes: see tests/soak.py."""

import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from disturbed_run import DisturbedRun, send

from util.checkpoint import load, previous

READ_TIMEOUT = 5  # seconds, --read_timeout of the runs


class Disturbance(NamedTuple):
    """One disturbance of a run."""

    kind: str  # a key of KINDS
    rank: int  # which is hit, if it is one of them
    in_start: bool  # `delay` after a start, not after `updates`
    updates: int
    delay: float  # seconds
    dice: float  # in [0, 1): how long, which worker, which byte


class Hit(NamedTuple):
    """What a disturbance has done."""

    what: str
    must_end: bool  # otherwise the run must continue by itself
    orphans: bool = False  # the next start comes before all processes have ended
    resume_at: int | None = None  # where the next start must resume; None: anywhere


class Kind(NamedTuple):
    """A kind of disturbance."""

    name: str
    act: Callable[[DisturbedRun, Disturbance], Hit]
    in_starts: bool  # it may also come before the first update of a start
    needs: str = ""  # "disk" or "link"


def between(low: float, high: float, disturbance: Disturbance) -> float:
    """Return the number that a disturbance has drawn, between two numbers."""
    return low + (high - low) * disturbance.dice


def kill_rank(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Kill a rank, or torchrun if it has not started the ranks yet."""
    pids = run.running().rank_pids()
    if not pids:
        run.running().process.kill()
        return Hit("torchrun, which had no ranks yet", must_end=True)
    rank = disturbance.rank % len(pids)
    send([pids[rank]], signal.SIGKILL)
    return Hit(f"rank {rank}", must_end=True)


def kill_torchrun(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Kill torchrun. Half of the next starts come at once, while the ranks still run."""
    run.running().process.kill()
    return Hit("torchrun", must_end=True, orphans=disturbance.dice < 0.5)


def terminate(run: DisturbedRun, _disturbance: Disturbance) -> Hit:
    """Send torchrun SIGTERM, which it forwards."""
    run.running().process.terminate()
    return Hit("torchrun", must_end=True)


def terminate_twice(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Send torchrun SIGTERM two times."""
    seconds = between(0.1, 3, disturbance)
    run.running().process.terminate()
    time.sleep(seconds)
    if run.is_running():
        run.running().process.terminate()
    return Hit(f"torchrun, again after {seconds:.1f} s", must_end=True)


def stop_by_usr1(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Send a rank SIGUSR1, or torchrun SIGTERM if it has not started the ranks yet."""
    pids = run.running().rank_pids()
    if not pids:
        return terminate(run, disturbance)
    rank = disturbance.rank % len(pids)
    send([pids[rank]], signal.SIGUSR1)
    return Hit(f"rank {rank}", must_end=True)


def suspend_job(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Suspend all processes for longer than a file may take."""
    pids = run.running().processes()
    seconds = between(READ_TIMEOUT + 1, READ_TIMEOUT + 4, disturbance)
    suspend(pids, seconds)
    return Hit(f"{len(pids)} processes for {seconds:.1f} s", must_end=False)


def suspend_rank(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Suspend a rank, but not its loader workers."""
    seconds = between(0.5, READ_TIMEOUT + 3, disturbance)
    suspend([run.running().rank_pids()[disturbance.rank]], seconds)
    return Hit(f"rank {disturbance.rank} for {seconds:.1f} s", must_end=False)


def suspend(pids: list[int], seconds: float) -> None:
    """Suspend processes for a time."""
    send(pids, signal.SIGSTOP)
    time.sleep(seconds)
    send(pids, signal.SIGCONT)


def kill_worker(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Kill a loader worker of any rank: of training, of the validation or of the probe."""
    pids = run.workers()
    index = int(disturbance.dice * len(pids))
    send([pids[index]], signal.SIGKILL)
    return Hit(f"worker {index} of {len(pids)}", must_end=False)


def fill_disk(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Fill the disk, and free it after some updates.

    A full disk loses the records of epochs that end meanwhile, and their best checkpoint. So the
    run is killed before the disk is free if there was such an epoch, and must continue otherwise.
    """
    disk = run.disk
    assert disk is not None
    ranks = run.running().rank_pids()
    send(ranks, signal.SIGSTOP)
    first = run.last_update() or 0
    disk.fill()
    send(ranks, signal.SIGCONT)
    if not run.wait_for_updates(1 + int(6 * disturbance.dice)):
        disk.free()
        return Hit("the disk, and the run ended", must_end=False)
    send(ranks, signal.SIGSTOP)
    last = run.last_update() or 0
    per_epoch = run.command.updates_per_epoch
    ended_epochs = last // per_epoch - first // per_epoch
    if ended_epochs or first % per_epoch == 0:
        run.kill_all()
        disk.free()
        return Hit(f"the disk at updates {first} to {last}, then all killed", must_end=True)
    disk.free()
    send(ranks, signal.SIGCONT)
    return Hit(f"the disk at updates {first} to {last}", must_end=False)


def damage_checkpoint(run: DisturbedRun, damage: Callable[[bytes], bytes]) -> Hit:
    """Kill the run and damage its newest checkpoint; the next start must resume before it."""
    run.kill_all()
    folder = Path(run.command.flags[run.command.flags.index("--output_dir") + 1])
    newest = folder / "run.pth"
    if not previous(newest, 1).exists():
        return Hit("nothing: there is only one checkpoint", must_end=True)
    before = load(previous(newest, 1))["step"]
    step = load(newest)["step"] if newest.exists() else "none"
    if newest.exists():
        damaged = newest.with_name("damaged")
        damaged.write_bytes(damage(newest.read_bytes()))
        os.replace(damaged, newest)  # a new file, even if it has a second name
    what = f"the checkpoint of update {step}; that of {before} remains"
    return Hit(what, must_end=True, resume_at=before)


def truncate(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Cut off the end of the newest checkpoint, between two starts."""
    return damage_checkpoint(run, lambda data: data[: int(disturbance.dice * len(data))])


def flip_bit(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Flip a bit of the newest checkpoint's largest tensor, between two starts."""
    return damage_checkpoint(run, lambda data: flipped_bit(data, disturbance.dice))


def flipped_bit(data: bytes, dice: float) -> bytes:
    """Return a checkpoint with one other bit in its largest tensor. dice: in [0, 1); which."""
    start, size = largest_record(data)
    flipped = bytearray(data)
    flipped[start + int(dice * size)] ^= 1 << random.Random(dice).randrange(8)
    return bytes(flipped)


def largest_record(data: bytes) -> tuple[int, int]:
    """Return where the contents of a ZIP archive's largest, uncompressed file are: start, size."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        record = max(archive.infolist(), key=lambda each: each.file_size)
    header = data[record.header_offset : record.header_offset + 30]
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    return record.header_offset + 30 + name_length + extra_length, record.file_size


def cut_link(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Cut the link between the ranks for a time."""
    assert run.link is not None
    seconds = between(5, 20, disturbance)
    run.link.cut()
    time.sleep(seconds)
    run.link.restore()
    return Hit(f"the link for {seconds:.1f} s", must_end=False)


def cut_link_and_kill(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Cut the link between the ranks, then kill both and restore it."""
    assert run.link is not None
    seconds = between(1, 5, disturbance)
    run.link.cut()
    time.sleep(seconds)
    run.kill_all()
    run.link.restore()
    return Hit(f"the link, after {seconds:.1f} s both ranks", must_end=True)


def cut_link_and_terminate(run: DisturbedRun, disturbance: Disturbance) -> Hit:
    """Cut the link between the ranks, and send both SIGTERM twice, 11 seconds apart.

    The first one cannot stop ranks that wait for each other; the second one must end them.
    """
    assert run.link is not None
    run.link.cut()
    time.sleep(between(1, 5, disturbance))
    send(run.running().rank_pids(), signal.SIGTERM)
    time.sleep(11)
    send(run.running().rank_pids(), signal.SIGTERM)
    run.wait_until_gone()
    run.link.restore()
    return Hit("the link, both ranks twice", must_end=True)


KINDS = {
    "kill-rank": Kind("SIGKILL of a rank", kill_rank, in_starts=True),
    "kill-torchrun": Kind("SIGKILL of torchrun", kill_torchrun, in_starts=True),
    "term": Kind("SIGTERM to torchrun", terminate, in_starts=True),
    "term-twice": Kind("SIGTERM twice", terminate_twice, in_starts=True),
    "usr1": Kind("SIGUSR1 to a rank", stop_by_usr1, in_starts=True),
    "suspend-job": Kind("suspended job", suspend_job, in_starts=False),
    "suspend-rank": Kind("suspended rank", suspend_rank, in_starts=False),
    "kill-worker": Kind("SIGKILL of a worker", kill_worker, in_starts=False),
    "full-disk": Kind("full disk", fill_disk, in_starts=False, needs="disk"),
    "truncate": Kind("truncated checkpoint", truncate, in_starts=False),
    "flip": Kind("flipped bit", flip_bit, in_starts=False),
    "cut": Kind("link cut", cut_link, in_starts=False, needs="link"),
    "cut-kill": Kind("link cut, SIGKILL", cut_link_and_kill, in_starts=False, needs="link"),
    "cut-term": Kind("link cut, SIGTERM", cut_link_and_terminate, in_starts=False, needs="link"),
}
