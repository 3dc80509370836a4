"""What masked pretraining does, in five minutes on two cores. All files go to demo/.

    make demo                 # or: OMP_NUM_THREADS=1 python examples/demo.py

1. Make videos and images: discs that all move in one of eight directions, and eight patterns.
2. Pretrain two tiny encoders without labels: one on those videos, one on real clips (samples/).
3. Finetune the first to name the direction of motion, with 16 labeled clips a class, and train the
   same encoder from scratch: same clips, same updates. Draw the two accuracies.
4. Finetune it to name the patterns of images.
5. Draw what the second encoder predicts on clips that it never saw.

Every step is a command in a process of its own. Its output, with the command, goes to demo/logs/.
The demo starts over each time and overwrites its own files.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CLASSES = 8  # directions of motion, and patterns
LABELS = 16  # a class
VIDEOS = 8  # of a finetuning update
SECONDS_BETWEEN_LINES = 60  # of progress, where output is not a terminal
SHOWN = ("asl_sign/asl__want.mp4", "person_indoors/person_t123.80.mp4")  # of samples/videos/val
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
    """How much work the demo does; a test makes it small."""

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
    """A command of the demo: what it does, and its words after `python`."""

    name: str
    words: list[str]


class Running(NamedTuple):
    """A step under way."""

    step: Step
    process: subprocess.Popen
    begun: float  # seconds of time.monotonic()


class StepFailed(Exception):
    """A step ended with an error: its exit code, and a message with the end of its log."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def words_of(flags: str, **paths: Path) -> list[str]:
    """Return flags as words, and --NAME PATH for each path, which may have blanks."""
    words = flags.split()
    for name, path in paths.items():
        words += [f"--{name}", str(path)]
    return words


def run_of(out: Path, prefix: str) -> list[str]:
    """Return the flags of a run in `out` that starts over."""
    return ["--output_dir", str(out), "--save_prefix", prefix, "--resume", "", "--overwrite"]


def file_steps(out: Path, scale: Scale) -> list[Step]:
    """Return the steps that make videos, in two halves, and images."""
    script = "examples/demo_parts.py"
    clips = [
        "clips",
        str(out / "clips"),
        *f"--train {scale.train_clips} --val {scale.val_clips}".split(),
    ]
    images = [
        "images",
        str(out / "images"),
        *f"--train {scale.train_images} --val {scale.val_images}".split(),
    ]
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
    words = words_of(flags, data_dirs=out / "clips" / "train")
    return Step("pretrain on motion", ["pretrain.py", *words, *run_of(out, "motion")])


def pretrain_samples(out: Path, scale: Scale) -> Step:
    """Return the pretraining on real clips."""
    flags = (
        f"{PRETRAIN} {VIDEO} --decoder_num_heads 4 --img_size 64 --short_side 96 --sampling_rate 2 "
        "--jitter_scales_relative 0.3 0.6 --mask_ratio 0.75 --batch_size_per_gpu 4 --repeat_aug 2 "
        f"--lr 6e-3 --warmup_epochs 12 --val_every 1000 --max_steps {scale.sample_updates}"
    )
    videos = ROOT / "samples" / "videos"
    words = words_of(flags, data_dirs=videos / "train", val_dirs=videos / "val")
    return Step("pretrain on real clips", ["pretrain.py", *words, *run_of(out, "samples")])


def draw_picture(out: Path) -> Step:
    """Return the drawing of what is predicted."""
    videos = [str(ROOT / "samples" / "videos" / "val" / name) for name in SHOWN]
    words = ["picture", str(out / "samples.pth"), str(out / "prediction.png"), *videos]
    return Step("draw predictions", ["examples/demo_parts.py", *words])


def write_labels(clips: Path, path: Path, labels: int, lines: int) -> None:
    """Write a manifest of the first `labels` clips a class, repeated until it has `lines` lines."""
    rows = []
    for folder in sorted(clips.iterdir()):
        videos = sorted(folder.iterdir())[:labels]
        rows += [(str(video), folder.name) for video in videos]
    rows *= -(-lines // len(rows))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


def finetune_direction(out: Path, scale: Scale, prefix: str) -> Step:
    """Return the finetuning with few labels: "pretrained", or "scratch"."""
    flags = (
        f"{CLASSIFY} {MOTION} --batch_size_per_gpu {VIDEOS} --repeat_aug 4 --warmup_epochs 0.1 "
        f"--lr 2e-3 --max_steps {scale.finetune_updates}"
    )
    words = words_of(flags, train_csv=out / "labels.csv", val_dir=out / "clips" / "val")
    name = "train from scratch"
    if prefix == "pretrained":
        name = "finetune, pretrained"
        words += words_of("", finetune=out / "motion.pth")
    return Step(name, ["finetune.py", *words, *run_of(out, prefix)])


def finetune_images(out: Path, scale: Scale) -> Step:
    """Return the finetuning on images."""
    flags = (
        f"{CLASSIFY} {SHARED} --img_size 32 --static_clip folded --smoothing 0.1 "
        f"--batch_size_per_gpu 16 --lr 3e-3 --warmup_epochs 1 --epochs {scale.image_epochs}"
    )
    images = out / "images"
    paths = {"train_data_path": images / "train", "val_data_path": images / "val"}
    words = words_of(flags, **paths, finetune=out / "motion.pth")
    return Step("finetune on images", ["finetune_on_image.py", *words, *run_of(out, "images")])


def log_of(logs: Path, step: Step) -> Path:
    """Return the file that gets a step's output."""
    return logs / (re.sub(r"[^a-z]+", "_", step.name) + ".txt")


def progress_of(log: Path) -> str:
    """Return the last position in a log, such as " 40 %"; "" if it has none."""
    found = re.findall(r"(?:update|file) (\d+)/(\d+)", log.read_text(errors="replace"))
    if not found:
        return ""
    done, total = found[-1]
    return f" {100 * int(done) // int(total)} %"


def last_lines(path: Path, count: int = 5) -> str:
    """Return the end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def start(step: Step, logs: Path) -> Running:
    """Start a step in a process group of its own, its output in a file."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *step.words]
    with open(log_of(logs, step), "w") as log:
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


def end(running: Running) -> None:
    """End a step and the processes that it started. Nothing is lost: the demo starts over."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


class Screen:
    """What the demo prints: one progress line that is overwritten, or a few lines in a file."""

    def __init__(self):
        self.begun = self.last = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def line(self, text: str) -> None:
        """Print a line to stay."""
        clear = "\r\033[K" if self.terminal else ""
        print(clear + text, flush=True)

    def progress(self, states: list[str]) -> None:
        """Show how far the steps are."""
        now = time.monotonic()
        text = f"{now - self.begun:.0f} s: {', '.join(states)}"
        if self.terminal:
            width = os.get_terminal_size(sys.stdout.fileno()).columns
            print(f"\r\033[K{text[: max(width, 20) - 1]}", end="", flush=True)
        elif now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"  {text}", flush=True)


def check(running: Running, logs: Path, screen: Screen) -> bool:
    """Return whether a step is done. Raises StepFailed."""
    step, process, begun = running
    if process.poll() is None:
        return False
    if process.returncode:
        code = process.returncode if process.returncode > 0 else 128 - process.returncode
        log = log_of(logs, step)
        raise StepFailed(f"{last_lines(log)}\nerror: {step.name} failed, see {log}", code)
    screen.line(f"{step.name}: {time.monotonic() - begun:.0f} s")
    return True


def run_side_by_side(chains: list[list[Step]], logs: Path, screen: Screen) -> None:
    """Run chains of steps, each chain in order, side by side. End them all if one step fails."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [list(chain) for chain in chains]
    running: list[Running | None] = [None] * len(chains)
    try:
        for index, chain in enumerate(waiting):
            running[index] = start(chain.pop(0), logs)
        while any(running):
            time.sleep(0.2)
            for index, current in enumerate(running):
                if current and check(current, logs, screen):
                    running[index] = start(waiting[index].pop(0), logs) if waiting[index] else None
            active = [current.step for current in running if current]
            screen.progress([step.name + progress_of(log_of(logs, step)) for step in active])
    finally:
        for current in filter(None, running):
            end(current)


def accuracy(out: Path, prefix: str) -> float:
    """Return the last validation accuracy of a finetuning, in percent."""
    lines = (out / f"{prefix}_log.txt").read_text().splitlines()
    return json.loads(lines[-1])["test_acc1"]


def draw_chart(path: Path, pretrained: float, scratch: float) -> None:
    """Draw the two accuracies on the motion task beside chance."""
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
    axes.set_ylabel("directions named right, %")
    axes.set_title(f"{CLASSES} directions, {LABELS} labels each, same updates", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(out: Path, scale: Scale, seconds: float) -> list[str]:
    """Return at most 15 lines: what was shown, which files to open, what to try next."""
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
        f"  from scratch                {scratch:.0f} % ({chance}; it needs more updates and labels)",
        f"Patterns in images, the same encoder: {images:.0f} % ({chance})",
        "Open:",
        f"  {folder}/accuracy.png        the two accuracies",
        f"  {folder}/prediction.png      real clips it never saw, 75 % hidden, and what it predicts",
        f"  {folder}/logs/               each step's command and output",
        "Try next:",
        f"  tensorboard --logdir {folder}/tb",
        "  python pretrain.py --data_dirs YOUR_VIDEOS --output_dir runs/first",
        "  python finetune.py --help    (README.md, Finetuning on videos)",
    ]


def run(out: Path, scale: Scale = FULL) -> None:
    """Run the demo; all files go to `out`. Raises StepFailed."""
    screen = Screen()
    logs = out / "logs"
    first_half, second_half, images = file_steps(out, scale)
    run_side_by_side([[first_half], [second_half]], logs, screen)
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
    run_side_by_side([on_motion, others], logs, screen)
    draw_chart(out / "accuracy.png", accuracy(out, "pretrained"), accuracy(out, "scratch"))
    for line in summary(out, scale, time.monotonic() - screen.begun):
        screen.line(line)


def main(argv: list[str] | None = None, scale: Scale = FULL) -> None:
    """Run the demo on a command line (sys.argv by default)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo", help="(default: demo)")
    args = parser.parse_args(argv)
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    try:
        run(args.output_dir.absolute(), scale)
    except StepFailed as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("\ninterrupted: run it again to start over", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
