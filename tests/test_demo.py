"""The demo: its data, its commands, its output and its summary."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo
import demo_parts
from demo import Scale, Step, StepFailed

TINY = Scale(
    train_clips=64,
    val_clips=16,
    train_images=32,
    val_images=16,
    motion_updates=4,
    sample_updates=10,
    finetune_updates=2,
    image_epochs=1,
)
WAITS = Step("waits", ["-c", "import time; print('update 3/10', flush=True); time.sleep(600)"])


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, by relative path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def make_files(out: Path, indices: range) -> None:
    """Make clips and images of these indices."""
    demo_parts.make_clips(out / "clips", "val", indices)
    demo_parts.make_images(out / "images", "train", indices)


def test_clips_and_images_are_functions_of_their_index(tmp_path):
    make_files(tmp_path / "parts", range(0, 16, 2))
    make_files(tmp_path / "parts", range(1, 16, 2))
    make_files(tmp_path / "whole", range(16))
    parts = files_of(tmp_path / "parts")
    assert parts == files_of(tmp_path / "whole")
    assert len(parts) == len(set(parts.values())) == 32


def test_images_of_two_splits_differ(tmp_path):
    for split in demo_parts.SPLITS:
        demo_parts.make_images(tmp_path, split, range(8))
    for train in (tmp_path / "train").rglob("*.png"):
        val = tmp_path / "val" / train.relative_to(tmp_path / "train")
        assert not np.array_equal(np.array(Image.open(train)), np.array(Image.open(val)))


def test_there_are_as_many_classes_as_the_demo_states():
    assert len(demo_parts.DIRECTIONS) == len(demo_parts.PATTERNS) == demo.CLASSES


def test_labels_are_the_first_of_each_class_repeated(tmp_path):
    for name in ("000", "045"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "clips" / name / f"{number}.mp4").touch()
    demo.write_labels(tmp_path / "clips", tmp_path / "labels.csv", labels=2, lines=5)
    rows = [line.split(",") for line in (tmp_path / "labels.csv").read_text().splitlines()]
    assert rows[0] == ["path", "label"] and len(rows) == 9  # two times four
    assert rows[1:5] == rows[5:]
    assert [Path(path).name for path, _ in rows[1:5]] == ["0.mp4", "1.mp4"] * 2
    assert all(Path(path).parent.name == label for path, label in rows[1:])


def test_every_command_parses_in_a_folder_with_spaces(tmp_path):
    out = tmp_path / "my demo"
    steps = [
        demo.pretrain_motion(out, TINY),
        demo.pretrain_samples(out, TINY),
        demo.finetune_direction(out, TINY, "pretrained"),
        demo.finetune_direction(out, TINY, "scratch"),
        demo.finetune_images(out, TINY),
    ]
    for step in steps:
        parser = import_module(Path(step.arguments[0]).stem).get_parser()
        args = parser.parse_args(step.arguments[1:])
        assert args.output_dir == str(out) and args.compile is False and args.device is None
    for step in [*demo.file_steps(out, TINY), demo.draw_picture(out)]:
        demo_parts.get_parser().parse_args(step.arguments[1:])


def test_the_two_finetunings_differ_only_in_the_weights(tmp_path):
    pretrained = demo.finetune_direction(tmp_path, TINY, "pretrained").arguments
    scratch = demo.finetune_direction(tmp_path, TINY, "scratch").arguments
    weights = ["--finetune", str(tmp_path / "motion.pth")]
    others = [argument for argument in pretrained if argument not in weights]
    assert [argument.replace("pretrained", "scratch") for argument in others] == scratch


def test_progress_is_the_last_one_in_a_log(tmp_path):
    log = tmp_path / "log.txt"
    for text, shown in (
        ("", ""),
        ("model: 5 M parameters\n", ""),
        ("file 0/80\nfile 40/80\n", " 50 %"),
        ("epoch 0.1  update 20/1500  loss 1\nepoch 0.2  update 300/1500  loss 1\n", " 20 %"),
    ):
        log.write_text(text)
        assert demo.percent_done(log) == shown


def test_f17_progress_in_a_file_is_rare(capsys, monkeypatch):
    display = demo.ProgressDisplay()
    for _ in range(3):
        display.show(["pretrain 20 %"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(demo, "SECONDS_BETWEEN_LINES", 0)
    display.show(["pretrain 20 %", "draw"])
    assert capsys.readouterr().out == "  0 s: pretrain 20 %, draw\n"


def test_the_summary_is_short_and_has_the_numbers(tmp_path):
    for name, value in (("pretrained", 88.2), ("scratch", 16.5), ("images", 87.0)):
        (tmp_path / f"{name}_log.txt").write_text(json.dumps({"test_acc1": value}) + "\n")
    lines = demo.summary(tmp_path, Scale(), 245.0)
    assert len(lines) <= 15
    text = "\n".join(lines)
    for part in ("88 %", "16 %", "87 %", "12.5 %", "4 min 5 s", "accuracy.png", "prediction.png"):
        assert part in text


def test_the_chart_is_a_small_picture(tmp_path):
    demo.draw_chart(tmp_path / "accuracy.png", 88.2, 16.5)
    assert Image.open(tmp_path / "accuracy.png").width < 600
    assert (tmp_path / "accuracy.png").stat().st_size < 60_000


def test_a_failed_step_kills_the_others(tmp_path):
    fails = Step("fails", ["-c", "print('the reason'); raise SystemExit(3)"])
    start = time.monotonic()
    with pytest.raises(StepFailed, match=r"the reason\nerror: fails failed, see .*fails\.txt") as e:
        demo.run_in_parallel([[WAITS], [fails, WAITS]], tmp_path, demo.ProgressDisplay())
    assert e.value.code == 3
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_kills_the_children_without_a_traceback(tmp_path, signum):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); import demo\n"
        f"steps = [demo.Step('waits', ['-c', {child!r}])]\n"
        "display = demo.ProgressDisplay()\n"
        "demo.run = lambda out, scale: demo.run_in_parallel([steps], out / 'logs', display)\n"
        f"demo.main(['--output_dir', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "waits.txt"
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 3 + child.count("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = int(log.read_text().splitlines()[-1])
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)


@pytest.mark.slow
def test_f17_the_whole_demo_runs_twice_with_little_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LABELS", 1)
    (tmp_path / "mine.txt").write_text("kept")
    for _ in range(2):
        demo.main(["--output_dir", str(tmp_path)], TINY)
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) <= 80 and "\r" not in printed
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert Image.open(tmp_path / "prediction.png").width > 400
    assert (tmp_path / "accuracy.png").exists()
