"""Show what masked pretraining does, in five minutes on two cores. All files go to demo/.

    make demo                 # or: OMP_NUM_THREADS=1 python examples/demo.py

1. Make videos and images: discs that all move in one of eight directions, and eight patterns.
2. Pretrain two tiny encoders without labels: one on those videos, one on real clips (samples/).
3. Finetune the first encoder to classify the direction of motion, with 16 labeled clips per class.
   Train the same encoder from scratch on the same clips for as many updates. Plot both accuracies.
4. Finetune the first encoder to classify patterns in images.
5. Draw the second encoder's predictions on clips that were not in its training set.

Every step is a command in its own process. The command and its output go to demo/logs/.
Each call starts over and overwrites the files of the previous one.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CLASSES = 8  # directions of motion, and patterns
LABELS = 16  # labeled clips per class
VIDEOS = 8  # per finetuning update
SECONDS_BETWEEN_LINES = 60  # between progress lines, if the output is not a terminal
SHOWN = (  # drawn clips, in samples/videos/val
    "asl_sign/asl__want.mp4",
    "person_indoors/person_t123.80.mp4",
)
CLEAR_LINE = "\r\033[K"  # of a terminal
SHARED = (
    "--patch_size 8 --num_frames 8 --num_workers 1 --no-compile --clip_grad 1 "
    "--checkpoint_period 1000"
)
VIDEO = f"{SHARED} --decoder pyav"
MOTION = (
    f"{VIDEO} --img_size 32 --sampling_rate 1 --jitter_scales_relative 0.75 1 "
    "--jitter_aspect_relative 0.9 1.1"
)
PRETRAIN = (
    "--model mae_vit_micro_patch16 --decoder_embed_dim 64 --decoder_depth 1 --pred_t_dim 8 "
    "--recon_every 0 --log_every 50"
)
CLASSIFY = (
    f"--model vit_micro_patch16 --num_classes {CLASSES} --dropout 0 --drop_path_rate 0 "
    "--layer_decay 1 --no-flip --log_every 50"
)


class Scale(NamedTuple):
    """Amount of work of the demo; tests use a smaller one."""

    train_clips: int = 2400
    val_clips: int = 400
    train_images: int = 1600
    val_images: int = 400
    motion_updates: int = 2600
    sample_updates: int = 2600
    finetune_updates: int = 100
    image_epochs: int = 4


FULL = Scale()


class Step(NamedTuple):
    """A command of the demo: its name, and its arguments after `python`."""

    name: str
    arguments: list[str]


class Running(NamedTuple):
    """A step whose process was started."""

    step: Step
    process: subprocess.Popen
    start_time: float  # seconds of time.monotonic()


class StepFailed(Exception):
    """A step failed: exit code, and a message with the end of its log."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def to_arguments(flags: str, **paths: Path) -> list[str]:
    """Split flags into arguments, and add --NAME PATH for each path, which may contain spaces."""
    arguments = flags.split()
    for name, path in paths.items():
        arguments += [f"--{name}", str(path)]
    return arguments


def run_flags(out: Path, prefix: str) -> list[str]:
    """Return the flags of a run in `out` that starts over."""
    return ["--output_dir", str(out), "--save_prefix", prefix, "--resume", "", "--overwrite"]


def file_steps(out: Path, scale: Scale) -> list[Step]:
    """Return the steps that make videos, in two halves, and images."""
    script = "examples/demo_parts.py"
    clip_counts = f"--train {scale.train_clips} --val {scale.val_clips}"
    image_counts = f"--train {scale.train_images} --val {scale.val_images}"
    clips = ["clips", str(out / "clips"), *clip_counts.split()]
    images = ["images", str(out / "images"), *image_counts.split()]
    return [
        Step("make videos, first half", [script, *clips, "--part", "0", "--parts", "2"]),
        Step("make videos, second half", [script, *clips, "--part", "1", "--parts", "2"]),
        Step("make images", [script, *images]),
    ]


def pretrain_motion(out: Path, scale: Scale) -> Step:
    """Return the pretraining on motion clips."""
    flags = (
        f"{PRETRAIN} {MOTION} --decoder_num_heads 2 --mask_type temporal --mask_ratio 0.5 "
        "--batch_size_per_gpu 8 --repeat_aug 2 --lr 3e-3 --warmup_epochs 0.5 "
        f"--max_steps {scale.motion_updates}"
    )
    arguments = to_arguments(flags, data_dirs=out / "clips" / "train")
    return Step("pretrain on motion", ["pretrain.py", *arguments, *run_flags(out, "motion")])


def pretrain_samples(out: Path, scale: Scale) -> Step:
    """Return the pretraining on real clips."""
    flags = (
        f"{PRETRAIN} {VIDEO} --decoder_num_heads 4 --img_size 64 --short_side 96 --sampling_rate 2 "
        "--jitter_scales_relative 0.3 0.6 --mask_ratio 0.75 --batch_size_per_gpu 4 --repeat_aug 2 "
        f"--lr 6e-3 --warmup_epochs 12 --val_every 1000 --max_steps {scale.sample_updates}"
    )
    videos = ROOT / "samples" / "videos"
    arguments = to_arguments(flags, data_dirs=videos / "train", val_dirs=videos / "val")
    return Step("pretrain on real clips", ["pretrain.py", *arguments, *run_flags(out, "samples")])


def draw_picture(out: Path) -> Step:
    """Return the drawing of predictions."""
    videos = [str(ROOT / "samples" / "videos" / "val" / name) for name in SHOWN]
    arguments = ["picture", str(out / "samples.pth"), str(out / "prediction.png"), *videos]
    return Step("draw predictions", ["examples/demo_parts.py", *arguments])


def write_labels(clips: Path, path: Path, labels: int, lines: int) -> None:
    """Write a manifest of `labels` clips per class, repeated to at least `lines` lines."""
    rows = []
    for folder in sorted(clips.iterdir()):
        videos = sorted(folder.iterdir())[:labels]
        rows += [(str(video), folder.name) for video in videos]
    rows *= math.ceil(lines / len(rows))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


def finetune_direction(out: Path, scale: Scale, prefix: str) -> Step:
    """Return the finetuning with few labels. prefix: "pretrained" or "scratch"."""
    flags = (
        f"{CLASSIFY} {MOTION} --batch_size_per_gpu {VIDEOS} --repeat_aug 4 --warmup_epochs 0.1 "
        f"--lr 2e-3 --max_steps {scale.finetune_updates}"
    )
    arguments = to_arguments(flags, train_csv=out / "labels.csv", val_dir=out / "clips" / "val")
    name = "train from scratch"
    if prefix == "pretrained":
        name = "finetune, pretrained"
        arguments += ["--finetune", str(out / "motion.pth")]
    return Step(name, ["finetune.py", *arguments, *run_flags(out, prefix)])


def finetune_images(out: Path, scale: Scale) -> Step:
    """Return the finetuning on images."""
    flags = (
        f"{CLASSIFY} {SHARED} --img_size 32 --static_clip folded --smoothing 0.1 "
        f"--batch_size_per_gpu 16 --lr 3e-3 --warmup_epochs 1 --epochs {scale.image_epochs}"
    )
    images = out / "images"
    arguments = to_arguments(
        flags,
        train_data_path=images / "train",
        val_data_path=images / "val",
        finetune=out / "motion.pth",
    )
    return Step(
        "finetune on images", ["finetune_on_image.py", *arguments, *run_flags(out, "images")]
    )


def log_path(logs: Path, step: Step) -> Path:
    """Return the file of a step's output."""
    return logs / (re.sub(r"[^a-z]+", "_", step.name) + ".txt")


def percent_done(log: Path) -> str:
    """Return the last progress in a log, such as " 40 %", or "" if there is none."""
    found = re.findall(r"(?:update|file) (\d+)/(\d+)", log.read_text(errors="replace"))
    if not found:
        return ""
    done, total = found[-1]
    return f" {100 * int(done) // int(total)} %"


def last_lines(path: Path, count: int = 5) -> str:
    """Return the end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def start(step: Step, logs: Path) -> Running:
    """Start a step in its own process group, with its output in a file."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *step.arguments]
    with open(log_path(logs, step), "w") as log:
        log.write(f"{shlex.join(command)}\n\n")
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(step, process, time.monotonic())


def kill(running: Running) -> None:
    """Kill a step and its child processes. Nothing is lost: the demo starts over."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


class ProgressDisplay:
    """Prints one progress line that is overwritten in a terminal, or a few lines to a file."""

    def __init__(self):
        self.start_time = time.monotonic()
        self.last_print = self.start_time
        self.terminal = sys.stdout.isatty()

    def print_line(self, text: str) -> None:
        """Print a line in place of the progress line."""
        if self.terminal:
            text = CLEAR_LINE + text
        print(text, flush=True)

    def show(self, states: list[str]) -> None:
        """Print the elapsed seconds and the states of the steps, if it is time to."""
        now = time.monotonic()
        text = f"{now - self.start_time:.0f} s: {', '.join(states)}"
        if self.terminal:
            width = os.get_terminal_size(sys.stdout.fileno()).columns
            print(CLEAR_LINE + text[: max(width, 20) - 1], end="", flush=True)
        elif now - self.last_print >= SECONDS_BETWEEN_LINES:
            self.last_print = now
            print(f"  {text}", flush=True)


def is_done(running: Running, logs: Path, display: ProgressDisplay) -> bool:
    """Return whether a step is done, and print its time. Raises StepFailed."""
    step = running.step
    code = running.process.poll()
    if code is None:
        return False
    if code != 0:
        if code < 0:  # killed by a signal
            code = 128 - code
        log = log_path(logs, step)
        raise StepFailed(f"{last_lines(log)}\nerror: {step.name} failed, see {log}", code)
    display.print_line(f"{step.name}: {time.monotonic() - running.start_time:.0f} s")
    return True


def run_in_parallel(chains: list[list[Step]], logs: Path, display: ProgressDisplay) -> None:
    """Run chains of steps in parallel, each chain in order. If one step fails, kill the others.

    Raises StepFailed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    queues = [deque(chain) for chain in chains]
    running: list[Running | None] = [None] * len(chains)
    try:
        for index, queue in enumerate(queues):
            running[index] = start(queue.popleft(), logs)
        while any(running):
            time.sleep(0.2)
            for index, current in enumerate(running):
                if current is None or not is_done(current, logs, display):
                    continue
                running[index] = None
                if queues[index]:
                    running[index] = start(queues[index].popleft(), logs)
            active = [current.step for current in running if current]
            display.show([step.name + percent_done(log_path(logs, step)) for step in active])
    finally:
        for current in filter(None, running):
            kill(current)


def accuracy(out: Path, prefix: str) -> float:
    """Return the last validation accuracy of a finetuning run, in percent."""
    lines = (out / f"{prefix}_log.txt").read_text().splitlines()
    return json.loads(lines[-1])["test_acc1"]


def draw_chart(path: Path, pretrained: float, scratch: float) -> None:
    """Plot the two accuracies on the motion task, and chance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chance = 100 / CLASSES
    figure, axes = plt.subplots(figsize=(4.4, 3), layout="constrained")
    names = ["pretrained\nwithout labels", "from scratch"]
    bars = axes.bar(names, [pretrained, scratch], color=["#2a6f97", "#b0b0b0"], width=0.6)
    axes.bar_label(bars, fmt="%.0f %%", padding=2)
    axes.axhline(chance, color="black", linewidth=1, linestyle=":")
    axes.annotate("chance", (0.5, chance + 1), ha="center", fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{CLASSES} directions, {LABELS} labels per class, same updates", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(out: Path, scale: Scale, seconds: float) -> list[str]:
    """Return at most 15 lines: results, files to open, commands to try next."""
    pretrained = accuracy(out, "pretrained")
    scratch = accuracy(out, "scratch")
    images = accuracy(out, "images")
    folder = os.path.relpath(out)
    chance = f"chance {100 / CLASSES:.1f} %"
    return [
        f"Done in {int(seconds) // 60} min {int(seconds) % 60} s.",
        f"Direction of motion, {CLASSES} classes with {LABELS} labels each, "
        f"{scale.finetune_updates} updates:",
        f"  pretrained without labels   {pretrained:.0f} % of {scale.val_clips} unseen clips",
        f"  from scratch                {scratch:.0f} % "
        f"({chance}; more updates and labels are needed)",
        f"Patterns in images, the same encoder: {images:.0f} % ({chance})",
        "Open:",
        f"  {folder}/accuracy.png        the two accuracies",
        f"  {folder}/prediction.png      unseen real clips, 75 % hidden, and the predictions",
        f"  {folder}/logs/               command and output of each step",
        "Try next:",
        f"  tensorboard --logdir {folder}/tb",
        "  python pretrain.py --data_dirs YOUR_VIDEOS --output_dir runs/first",
        "  python finetune.py --help    (docs/finetuning.md)",
    ]


def run(out: Path, scale: Scale = FULL) -> None:
    """Run the demo; all files go to `out`. Raises StepFailed."""
    display = ProgressDisplay()
    logs = out / "logs"
    first_half, second_half, images = file_steps(out, scale)
    run_in_parallel([[first_half], [second_half]], logs, display)
    lines = VIDEOS * scale.finetune_updates
    write_labels(out / "clips" / "train", out / "labels.csv", LABELS, lines)
    on_motion = [
        pretrain_motion(out, scale),
        finetune_direction(out, scale, "pretrained"),
        finetune_direction(out, scale, "scratch"),
        finetune_images(out, scale),
    ]
    others = [
        images,
        pretrain_samples(out, scale),
        draw_picture(out),
    ]
    run_in_parallel([on_motion, others], logs, display)
    draw_chart(out / "accuracy.png", accuracy(out, "pretrained"), accuracy(out, "scratch"))
    for line in summary(out, scale, time.monotonic() - display.start_time):
        display.print_line(line)


def main(argv: list[str] | None = None, scale: Scale = FULL) -> None:
    """Parse a command line (sys.argv by default) and run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo", help="(default: demo)")
    args = parser.parse_args(argv)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    try:
        run(args.output_dir.absolute(), scale)
    except StepFailed as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("\ninterrupted. Run the demo again to start over.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
