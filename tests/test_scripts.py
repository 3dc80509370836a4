"""The three scripts as programs (T19, T20): hostile files, missing packages, --help, args.json."""

import json
import re
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from corrupt_files import Payload
from launch import ROOT, clean_environment
from runs import SCRIPTS, image_command, pretrain_command, saved_weights, video_command

import finetune
import finetune_on_image
import pretrain
from tools import data_doctor, make_manifest, visualize
from util.dist import UserError

TWO_UPDATES = "--max_steps 2 --batch_size_per_gpu 4".split()
SLOW_PACKAGES = ("torchvision", "torch._dynamo", "tensorboard", "decord", "av", "pandas")
RUN_WITHOUT_PACKAGE = """
import sys
sys.modules[{package!r}] = None
import pretrain
from util.dist import run_script
run_script(lambda: pretrain.main({flags!r}))
"""
SHOW_HELP = """
import sys
import {script}
try:
    {script}.main(["--help"])
except SystemExit:
    pass
print("loaded", [name for name in {packages} if name in sys.modules])
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run code in the root of the repository."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        timeout=120,
    )


def run_without(package: str, flags: list[str]) -> subprocess.CompletedProcess:
    """Run the pretraining script as on a machine that lacks a package."""
    return run_python(RUN_WITHOUT_PACKAGE.format(package=package, flags=flags))


@pytest.mark.parametrize("package", ["torchvision", "tensorboard", "av"])
def test_t20_a_missing_package_is_one_line_with_its_cure(package, videos, tmp_path):
    done = run_without(package, pretrain_command(videos, tmp_path, *TWO_UPDATES))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: the package {package}")
    assert "pip install -r requirements.txt" in done.stderr


def test_t20_decord_may_be_absent(videos, tmp_path):
    flags = pretrain_command(videos, tmp_path, *TWO_UPDATES, "--decoder", "decord")
    done = run_without("decord", flags)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert re.search("decord is not installed.*PyAV|PyAV.*decord is not installed", printed)


def test_t20_flash_attn_may_be_absent(videos, tmp_path):
    flags = pretrain_command(videos, tmp_path, *TWO_UPDATES, "--attn", "flash_attn")
    done = run_without("flash_attn", flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "flash-attn" in done.stderr
    assert "pip install" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_t20_help_imports_no_slow_package_but_torch(script):
    done = run_python(SHOW_HELP.format(script=script, packages=SLOW_PACKAGES))
    assert done.stdout.strip().endswith("loaded []"), done.stderr
    assert "--batch_size_per_gpu" in done.stdout


def as_flags(parser, values: dict) -> list[str]:
    """Return the command line that the values of an args.json stand for."""
    words = []
    for action in parser._actions:
        value = values.get(action.dest)
        name = action.option_strings[0]
        negated = f"--no-{action.dest}"
        if value is None or value in ([], ""):
            continue
        if value is True and action.const is not False:
            words.append(name)
        elif value is False and negated in action.option_strings:
            words.append(negated)
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        elif not isinstance(value, bool):
            words += [name, str(value)]
    return words


def test_t20_args_json_reproduces_the_run(videos, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    more = "--no-flip --norm_pix_loss --clip_grad 0.5 --jitter_scales_relative 0.4 0.9".split()
    pretrain.main(pretrain_command(videos, one, *TWO_UPDATES, *more))
    values = json.loads((one / "run_args.json").read_text())
    other_folder = {"output_dir": str(two), "datafile_dir": str(two)}
    flags = as_flags(import_module("pretrain").get_parser(), values | other_folder)
    assert "--no-flip" in flags
    assert "--clip_grad" in flags
    pretrain.main(flags)
    first = saved_weights(one)
    second = saved_weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    repeated = json.loads((two / "run_args.json").read_text())
    changed = {name for name in repeated if repeated[name] != values[name]}
    assert changed == {"output_dir", "datafile_dir"}


@pytest.fixture(scope="module")
def run_state(videos, tmp_path_factory):
    """Return the checkpoint of a small pretraining run."""
    out = tmp_path_factory.mktemp("run")
    pretrain.main(pretrain_command(videos, out, *"--max_steps 1 --batch_size_per_gpu 4".split()))
    return torch.load(out / "run.pth", weights_only=True)


def write_hostile(kind: str, path: Path, state: dict, marker: Path) -> None:
    """Write a file that is no usable checkpoint. marker: what a payload in it would create."""
    config = state["config"]
    states = {
        "payload": state | {"tally": Payload(marker)},
        "not a run": {"model": state["model"]},
        "config of another kind": state | {"config": 7},
        "config with nonsense": state | {"config": config | {"more": [1]}},
        "a huge config": state | {"config": config | {"depth": 10**9}},
    }
    if kind in states:
        torch.save(states[kind], path)
    elif kind == "text":
        path.write_bytes(b"no checkpoint")
    else:
        path.write_bytes(b"")


HOSTILE = ["payload", "text", "empty", "not a run"]
HOSTILE_CONFIGS = ["config of another kind", "config with nonsense", "a huge config"]


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        *product(["pretrain", "visualize", "finetune"], HOSTILE),
        *product(
            ["pretrain", "finetune"], HOSTILE_CONFIGS
        ),  # the tools read sizes from the weights
    ],
)
def test_t19_a_hostile_checkpoint_is_refused(kind, program, run_state, videos, tmp_path):
    path = tmp_path / "hostile.pth"
    out = tmp_path / "out"
    marker = tmp_path / "payload_has_run"
    write_hostile(kind, path, run_state, marker)
    with pytest.raises(UserError) as raised:
        if program == "pretrain":
            flags = [*TWO_UPDATES, "--resume", str(path)]
            pretrain.main(pretrain_command(videos, out, *flags))
        elif program == "visualize":
            visualize.main(f"{path} --data_dirs {videos} --output_dir {out}".split())
        else:
            flags = f"--eval --resume {path} --val_dir {videos} --output_dir {out}"
            finetune.main(flags.split())
    message = str(raised.value)
    assert "hostile.pth" in message
    assert "\n" not in message
    assert len(message) < 600
    assert not marker.exists()
    assert not list(out.glob("*.pth"))
    assert not (out / "run_log.txt").exists()


def test_f20_every_script_counts_the_samples_left_over(videos, images, tmp_path, capsys):
    flags = "--max_steps 1 --batch_size_per_gpu 5".split()
    pretrain.main(pretrain_command(videos, tmp_path / "a", *flags))
    finetune.main(video_command(videos, tmp_path / "b", *flags))
    finetune_on_image.main(image_command(images, tmp_path / "c", *flags))
    shown = re.findall(r"note: (\d+) of (\d+) samples are left over", capsys.readouterr().out)
    assert shown == [("3", "8"), ("3", "8"), ("2", "12")]


def test_f11_a_mistyped_folder_is_blamed_on_its_own_flag(videos, images, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    out = tmp_path / "out"
    commands = {
        "--val_dirs": (pretrain.main, pretrain_command(videos, out, "--val_dirs", nowhere)),
        "--probe_dir": (pretrain.main, pretrain_command(videos, out, "--probe_dir", nowhere)),
        "--val_dir": (finetune.main, video_command(videos, out, "--val_dir", nowhere)),
        "--train_dir": (finetune.main, video_command(videos, out, "--train_dir", nowhere)),
        "--val_data_path": (
            finetune_on_image.main,
            image_command(images, out, "--val_data_path", nowhere),
        ),
        "SOURCE": (data_doctor.main, [nowhere]),
        "VIDEOS": (make_manifest.main, ["--from", "folders", nowhere, str(tmp_path / "list.csv")]),
    }
    for flag, (main, command) in commands.items():
        with pytest.raises(UserError, match=f"nowhere.* not found: check {flag}$"):
            main(command)
