"""Measure how long training stands still for a checkpoint, and what a write beside it costs.

    python benchmarks/saving.py                      # this checkout; 15 minutes on two cores
    python benchmarks/saving.py --before CHECKOUT    # another checkout, this one with --sync_save,
                                                     # and this one

Pretrains ViT-L on tiny clips with pretrain.py: its state, with AdamW's moments, does not depend on
their size. The checkpoints go to a file object that sleeps until --mb_per_second is kept, and then
to the disk. Also takes steps of a small model, which Python limits as it does with a fast GPU,
alone, beside a thread that writes and beside a process that does. Writes
benchmarks/results/saving.json and .md.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAVE_EVERY = 20  # updates
FLAGS = (
    "--model mae_vit_large_patch16 --img_size 48 --num_frames 4 --pred_t_dim 4 --short_side 64 "
    "--sampling_rate 2 --batch_size_per_gpu 1 --repeat_aug 1 --num_workers 1 --recon_every 0 "
    "--warmup_epochs 0 --log_every 1000 --device cpu --epochs 1 "
    f"--max_steps {3 * SAVE_EVERY} --checkpoint_every_steps {SAVE_EVERY}"
)
MEGABYTE = 10**6
SMALL_TENSORS = 60  # of 16 MB, for the small model's writer
SECONDS = 5  # of steps alone


class ThrottledFile(io.FileIO):
    """A file that takes a limited number of bytes per second."""

    def __init__(self, path: str, bytes_per_second: float):
        """Open the file for writing."""
        super().__init__(path, "wb")
        self.bytes_per_second = bytes_per_second
        self.start = time.perf_counter()
        self.written = 0

    def write(self, content) -> int:
        """Write, and sleep as long as a disk of this speed would need."""
        count = super().write(content)
        self.written += count
        due = self.start + self.written / self.bytes_per_second
        time.sleep(max(0, due - time.perf_counter()))
        return count


def throttled_open(bytes_per_second: float) -> Callable:
    """Return a replacement of `open` for files that are written as bytes."""

    def open_slowly(path, mode):
        assert mode == "wb"
        return io.BufferedWriter(ThrottledFile(path, bytes_per_second))

    return open_slowly


def memory_gib(name: str) -> float:
    """Return a value of this process's memory: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 2**20
    raise ValueError(name)


class Recorder:
    """Times the updates, saves and writes of a run in this process."""

    def __init__(self, bytes_per_second: float):
        """Patch the code of the first checkout on the path."""
        from util import checkpoint, checkpointer, train_loop

        self.updates: list[tuple[float, float]] = []  # start and end
        self.saves: list[float] = []  # seconds that training stood still
        self.writes: list[tuple[float, float]] = []
        self.memory_before = 0.0
        self.last_end = time.perf_counter()
        self.finish_update = train_loop.finish_update
        self.save = checkpointer.Checkpointer.save
        self.write = checkpoint.save
        train_loop.finish_update = self.finish_and_record
        checkpoint.save = self.write_and_record
        checkpoint.open = throttled_open(bytes_per_second)
        recorder = self

        def save_and_record(checkpointer, *arguments, **options):
            if not recorder.saves:
                recorder.memory_before = memory_gib("VmRSS")
            start = time.perf_counter()
            written = recorder.save(checkpointer, *arguments, **options)
            recorder.saves.append(time.perf_counter() - start)
            return written

        checkpointer.Checkpointer.save = save_and_record

    def finish_and_record(self, *arguments) -> None:
        """Record an update, which ends where its saving begins."""
        self.updates.append((self.last_end, time.perf_counter()))
        self.finish_update(*arguments)
        self.last_end = time.perf_counter()

    def write_and_record(self, *arguments) -> None:
        """Record a write."""
        start = time.perf_counter()
        self.write(*arguments)
        self.writes.append((start, time.perf_counter()))

    def summary(self) -> dict:
        """Return the results. The last saves of a run, which it waits for, do not count."""
        beside = []
        alone = []
        for start, end in self.updates[1:]:
            inside = any(begun < start and end < ended for begun, ended in self.writes)
            outside = all(end < begun or ended < start for begun, ended in self.writes)
            if inside:
                beside.append(end - start)
            elif outside:
                alone.append(end - start)
        return {
            "stall_s": self.saves[:2],
            "write_s": [end - start for start, end in self.writes[:2]],
            "update_alone_s": statistics.median(alone),
            "update_beside_write_s": statistics.median(beside) if beside else None,
            "updates_beside_write": len(beside),
            "memory_before_gib": self.memory_before,
            "memory_peak_gib": memory_gib("VmHWM"),
        }


def train(flags: list[str], bytes_per_second: float) -> dict:
    """Pretrain with the code of the first checkout on the path; return the results."""
    import pretrain

    recorder = Recorder(bytes_per_second)
    pretrain.main(flags)
    return recorder.summary()


def measure_run(checkout: Path, more: list[str], manifest: Path, mb_per_second: float) -> dict:
    """Train in a new process, with the code of a checkout."""
    with tempfile.TemporaryDirectory() as out:
        flags = [*FLAGS.split(), "--data_csv", str(manifest), "--output_dir", out, *more]
        command = [sys.executable, __file__, "--train", str(checkout), str(mb_per_second), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if run.returncode:
            sys.exit(run.stdout + run.stderr)
        (path,) = Path(out).glob("*patch16.pth")
        size = path.stat().st_size / 1e9
    return {"file_gb": size} | json.loads(run.stdout.splitlines()[-1])


# ---- Steps that Python limits ----


def write_state(state: dict, path: str, mb_per_second: float, started: Callable) -> None:
    """Write a state to a throttled file."""
    torch.set_num_threads(1)
    started()
    with throttled_open(mb_per_second * MEGABYTE)(path, "wb") as file:
        torch.save(state, file)


def steps_while(active: Callable[[], bool]) -> dict:
    """Take steps of a small model; return their number and times."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(60)])
    batch = torch.randn(4, 64)
    times = []
    while active():
        start = time.perf_counter()
        model(batch).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return {
        "steps": len(times),
        "mean_ms": statistics.mean(times),
        "median_ms": statistics.median(times),
        "longest_ms": max(times),
    }


def measure_steps(mb_per_second: float, folder: str) -> list[dict]:
    """Take steps alone, beside a thread that writes, and beside a process that does."""
    torch.set_num_threads(1)
    path = f"{folder}/state.pth"
    rows = []
    state = {f"tensor{index}": torch.randn(4 * MEGABYTE) for index in range(SMALL_TENSORS)}
    shared = {name: tensor.clone().share_memory_() for name, tensor in state.items()}
    spawn = torch.multiprocessing.get_context("spawn")
    for _ in range(3):
        end = time.perf_counter() + SECONDS
        rows.append({"beside": "nothing"} | steps_while(lambda end=end: time.perf_counter() < end))
        thread = threading.Thread(target=write_state, args=(state, path, mb_per_second, no_signal))
        thread.start()
        rows.append({"beside": "a thread"} | steps_while(thread.is_alive))
        started = spawn.Event()
        arguments = (shared, path, mb_per_second, started.set)
        process = spawn.Process(target=write_state, args=arguments)
        process.start()
        started.wait()
        rows.append({"beside": "a process"} | steps_while(process.is_alive))
    return rows


def no_signal() -> None:
    """Do nothing when a write starts."""


# ---- Report ----


def numbers(values: list[float], digits: int = 1) -> str:
    """Return numbers as text, separated by commas."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def run_table(rows: list[dict]) -> list[str]:
    """Return the lines of the table of runs."""
    lines = [
        "| code | file, GB | training stands still, s (first and second save) | write, s "
        "| update, s: alone | beside a write | memory before the first save, GiB | at most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        beside = row["update_beside_write_s"]
        cells = (
            row["code"],
            f"{row['file_gb']:.2f}",
            numbers(row["stall_s"]),
            numbers(row["write_s"]),
            numbers([row["update_alone_s"]], 2),
            "none" if beside is None else f"{beside:.2f} ({row['updates_beside_write']} updates)",
            numbers([row["memory_before_gib"]]),
            numbers([row["memory_peak_gib"]]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def step_table(rows: list[dict]) -> list[str]:
    """Return the lines of the table of small steps."""
    lines = ["| beside | steps | mean, ms | median, ms | longest, ms |", "| --- " * 5 + "|"]
    for row in rows:
        times = [row["mean_ms"], row["median_ms"], row["longest_ms"]]
        cells = (row["beside"], str(row["steps"]), *(f"{value:.2f}" for value in times))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(result: dict) -> str:
    """Return the results as a Markdown page."""
    lines = [
        "Made by `benchmarks/saving.py` from saving.json.",
        "",
        ", ".join(f"{name} {value}" for name, value in result["environment"].items()),
        "",
        "Pretraining of ViT-L with AdamW, on a CPU with tiny clips. Its file object sleeps until "
        f"{result['mb_per_second']:g} MB/s are kept.",
        "",
        *run_table(result["runs"]),
    ]
    if "steps" in result:
        gigabytes = SMALL_TENSORS * 4 * 4 * MEGABYTE / 1e9
        lines += [
            "",
            f"Steps of 60 small layers, beside writes of {gigabytes:.2f} GB at the same speed.",
            "",
            *step_table(result["steps"]),
        ]
    return "\n".join(lines) + "\n"


def write_results(result: dict) -> None:
    """Write the results, and a page of tables."""
    (RESULTS / "saving.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "saving.md").write_text(page(result))


def main() -> None:
    """Measure all runs and the small steps; write the results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another checkout, measured first")
    parser.add_argument("--mb_per_second", type=float, default=200)
    args = parser.parse_args()
    runs = [("foreground (--sync_save)", ROOT, ["--sync_save"]), ("background", ROOT, [])]
    if args.before:
        runs.insert(0, ("before", args.before, []))
    found = {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    found |= {"torch": version("torch"), "load average": f"{os.getloadavg()[0]:.1f}"}
    result = {"environment": found, "mb_per_second": args.mb_per_second, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "videos.csv"
        videos = sorted(map(str, (ROOT / "samples/videos/train").rglob("*.mp4")))
        updates = 3 * SAVE_EVERY
        rows = [videos[index % len(videos)] for index in range(2 * updates)]
        manifest.write_text("".join(f"{row}\n" for row in rows))
        for code, checkout, more in runs:
            row = {"code": code} | measure_run(checkout, more, manifest, args.mb_per_second)
            result["runs"].append(row)
            write_results(result)
            print(json.dumps(row), flush=True)
        result["steps"] = measure_steps(args.mb_per_second, folder)
        write_results(result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.path.insert(0, sys.argv[2])
        print(json.dumps(train(sys.argv[4:], float(sys.argv[3]) * MEGABYTE)))
    else:
        main()
