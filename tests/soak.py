"""Disturb runs of two processes at random; each must end like the same run without disturbance.

    nice python tests/soak.py [--disturbances 60] [--seed 0] > benchmarks/results/soak.log

Half of the disturbances hit a pretraining with validation, probes, EMA and decoder masking, the
others a finetuning with MixUp, CutMix, EMA, validation and best checkpoint. They come in the
first seconds of a start, or after a random number of its updates; tests/disturbances.py has their
kinds. A run that ends is started again by the same command. A run that a disturbance must not end
has to make another update by itself.

Exits with 0 if nothing unexpected happened, and if weights, optimizer, EMA, position, best
checkpoint and log are equal, bit for bit. Full disks and cut links need the rights of root; without
them these kinds are left out, with a note.
"""

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from disturbances import KINDS, READ_TIMEOUT, Disturbance, Hit
from disturbed_run import Command, DisturbedRun, send
from make_videos import write_folder
from network_link import LinkedJob, can_link, network_link
from runs import log_records, pretrain_command, saved_state, video_command
from small_disk import can_mount, small_disk
from tiny import same

from util.dist import print0

UPDATES_PER_EPOCH = 4  # of 17 videos, two on each of two processes: one is left over
EPOCHS_PER_DISTURBANCE = 4  # more than the disturbances need
MAX_UPDATES = 12  # between two disturbances
START_SECONDS = 9  # in which a disturbance of a start comes
ATTEMPTS = 4  # to start a run that ends by itself before the next disturbance
COMMON = (
    "--batch_size_per_gpu 2 --checkpoint_every_steps 3 --checkpoint_period 2 --num_workers 2 "
    f"--ema 0.9 --read_timeout {READ_TIMEOUT}"
).split()
PRETRAINING = "--decoder_mask_ratio 0.5 --val_every 6".split()
FINETUNING = "--mixup 0.8 --cutmix 1.0 --mixup_prob 1.0 --repeat_aug 2".split()
RUNS = ("pretraining", "finetuning")


def make_data(folder: Path) -> Path:
    """Write the videos of the runs; return their folder."""
    write_folder(folder / "train", 17)
    write_folder(folder / "probe" / "train", 6)
    write_folder(folder / "probe" / "val", 4)
    return folder


def run_command(name: str, data: Path, out: Path, epochs: int) -> Command:
    """Return the command of one of RUNS with the output folder `out`."""
    videos = str(data / "train")
    more = [*COMMON, "--epochs", str(epochs)]
    if name == "pretraining":
        validation = ["--val_dirs", videos, "--probe_dir", str(data / "probe")]
        flags = pretrain_command(videos, out, *more, *PRETRAINING, *validation)
        script = "pretrain.py"
    else:
        flags = video_command(videos, out, *more, *FINETUNING)
        script = "finetune.py"
    return Command(script, flags, UPDATES_PER_EPOCH, epochs * UPDATES_PER_EPOCH)


def draw_disturbances(kinds: list[str], number: int, seed: int) -> list[Disturbance]:
    """Return disturbances of all kinds, about equally many of each, in random order."""
    draw = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < number:
        drawn += draw.sample(kinds, len(kinds))
    return [
        Disturbance(
            kind=kind,
            rank=draw.randrange(2),
            in_start=KINDS[kind].in_starts and draw.random() < 0.3,
            updates=draw.randint(1, MAX_UPDATES),
            delay=draw.random(),
            dice=draw.random(),
        )
        for kind in drawn[:number]
    ]


class Unfinished(Exception):
    """The run does not get to the next disturbance."""


def bring_to(run: DisturbedRun, disturbance: Disturbance) -> None:
    """Let the run reach the moment of a disturbance; start it if it does not run.

    Raises Unfinished if it ends by itself again and again, or is complete.
    """
    linked = KINDS[disturbance.kind].needs == "link"
    if run.job is not None and isinstance(run.job, LinkedJob) != linked:
        stop(run)
    for _ in range(ATTEMPTS):
        is_new = run.job is None
        if is_new:
            run.start(linked)
        if disturbance.in_start and is_new:
            reached = run.wait_in_start(START_SECONDS * disturbance.delay)
        else:
            reached = run.wait_for_updates(disturbance.updates)
            reached = reached and run.wait_in_start(0.3 * disturbance.delay)
        if reached:
            return
        if run.last_update() == run.command.updates:
            raise Unfinished("complete before its last disturbance")
        count_unexpected_end(run)
    raise Unfinished(f"ended by itself {ATTEMPTS} times in a row")


def stop(run: DisturbedRun) -> None:
    """Stop the run gracefully, for a start of another kind."""
    job = run.running()
    pids = job.rank_pids() if isinstance(job, LinkedJob) else [job.process.pid]
    send(pids, signal.SIGTERM)
    run.wait_until_gone()
    run.close()


def count_unexpected_end(run: DisturbedRun) -> None:
    """Count a start that has ended or hung without being disturbed, and print a line."""
    error = run.last_error()
    run.kill_all()
    position = run.position()
    code = run.close()
    run.faults.append(f"ended by itself with exit code {code}: {error}")
    print0(f"    FAULT  {position}; {run.faults[-1]}")


def outcome(run: DisturbedRun, hit: Hit) -> str:
    """Wait for what must follow a disturbance; return what does."""
    if not hit.must_end:
        if run.wait_for_updates(1):
            return "continued"
        count_unexpected_end(run)
        return "NOT CONTINUED"
    if hit.orphans:
        run.running().process.wait()
        run.close()
        return "started again at once"
    run.wait_until_gone()
    code = run.close()
    run.expected_update = hit.resume_at
    return f"ended, exit code {code}"


def disturb(run: DisturbedRun, disturbances: list[Disturbance]) -> None:
    """Disturb a run and print one line for each disturbance."""
    start = time.monotonic()
    for index, disturbance in enumerate(disturbances, start=1):
        bring_to(run, disturbance)
        kind = KINDS[disturbance.kind]
        position = run.position()
        seconds = time.monotonic() - start
        faults = len(run.faults)
        hit = kind.act(run, disturbance)
        follows = outcome(run, hit)
        for fault in run.faults[faults:]:
            follows += f"; FAULT: {fault}"
        print0(f"{index:2d}  {seconds:6.1f} s  {kind.name:20s}  {position}  {hit.what}: {follows}")


def finish(run: DisturbedRun) -> None:
    """Let a run come to its end; count a fault for each start that does not."""
    for _ in range(ATTEMPTS):
        if run.job is None:
            run.start()
        run.wait_until(lambda: not run.is_running())
        if run.running().process.poll() == 0 and run.last_update() == run.command.updates:
            run.wait_until_gone()
            run.close()
            return
        count_unexpected_end(run)
    raise Unfinished("does not come to its end")


def differences(name: str, out: Path, whole: Path) -> list[str]:
    """Return what differs between the folders of two runs."""
    found = []
    if not same(saved_state(out), saved_state(whole)):
        found.append("weights, optimizer, EMA or position")
    if name == "finetuning" and not same(
        saved_state(out, "run_best.pth"), saved_state(whole, "run_best.pth")
    ):
        found.append("best checkpoint")
    if log_records(out) != log_records(whole):
        found.append("log")
    for listed in ("quarantine.csv", "bad_videos.csv"):
        if (out / listed).exists():
            found.append(listed)
    return found


def campaign(name: str, kinds: list[str], number: int, seed: int, folder: Path) -> list[str]:
    """Disturb one of RUNS `number` times. Return what is wrong with it, [] if all is right.

    folder: for the videos and the runs; those of a wrong run stay there.
    """
    start = time.monotonic()
    data = folder / "videos"
    if not data.exists():
        make_data(data)
    epochs = EPOCHS_PER_DISTURBANCE * number
    whole_out = folder / f"{name}_whole"
    whole = DisturbedRun(run_command(name, data, whole_out, epochs), whole_out, None, None)
    finish(whole)
    print0(f"{name}: {whole.command.updates} updates, {epochs} epochs on 2 processes, seed {seed}")
    needs = {KINDS[kind].needs for kind in kinds}
    out = folder / name
    run_folder = out / "run"
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(run_folder)) if "disk" in needs else None
        link = stack.enter_context(network_link()) if "link" in needs else None
        run = DisturbedRun(run_command(name, data, run_folder, epochs), out, disk, link)
        stack.callback(end, run)
        try:
            disturb(run, draw_disturbances(kinds, number, seed))
            finish(run)
            wrong = differences(name, run_folder, whole_out)
        except Unfinished as unfinished:
            wrong = [str(unfinished)]
        wrong += run.faults
        if wrong:
            shutil.copytree(run_folder, folder / f"{name}_wrong")
    verdict = "; ".join(f"{count} x {each}" for each, count in Counter(wrong).items())
    print0(
        f"{name}: {f'NOT EQUAL: {verdict}' if wrong else 'equal'}; "
        f"{run.leftovers} processes waited for others of their start; "
        f"{time.monotonic() - start:.0f} s"
    )
    return wrong


def end(run: DisturbedRun) -> None:
    """Kill what still runs."""
    if run.job is not None:
        run.kill_all()
        run.kill_leftovers()


def possible_kinds(wanted: list[str]) -> list[str]:
    """Return the kinds that this process may cause; print a note about the others."""
    impossible = set()
    if not can_mount():
        impossible.add("disk")
    if not can_link():
        impossible.add("link")
    possible = [kind for kind in wanted if KINDS[kind].needs not in impossible]
    left_out = [kind for kind in wanted if kind not in possible]
    if left_out:
        print0(f"note: left out, since they need the rights of root: {', '.join(left_out)}")
    return possible


def main() -> int:
    """Run the campaigns. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--disturbances", type=int, default=60, help=f"of both runs together {default}"
    )
    parser.add_argument("--seed", type=int, default=0, help=f"of the disturbances {default}")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="(default: both)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        metavar="KIND",
        help=f"of {', '.join(KINDS)} (default: all)",
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    kinds = possible_kinds(args.kinds)
    print0(f"torch {torch.__version__}, files in {folder}")
    wrong = []
    for index, name in enumerate(args.runs):
        number = args.disturbances // len(args.runs)
        wrong += campaign(name, kinds, number, args.seed + index, folder)
    if wrong:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
