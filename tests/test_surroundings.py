"""What a machine may lack, and what a run says of itself (T20): missing packages, --help, piped output, args.json."""

import json
import os
import pty
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from launch import ROOT, clean_environment
from make_videos import write_folder
from test_design import SCRIPTS
from test_pretrain import command, weights

import pretrain

SHORT = ["--max_steps", "2", "--batch_size_per_gpu", "4"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight videos."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


def python(code: str) -> subprocess.CompletedProcess:
    """Run code in the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        timeout=120,
    )


def without(package: str, flags: list[str]) -> subprocess.CompletedProcess:
    """The pretraining script on a machine that lacks a package."""
    return python(
        f"import sys; sys.modules[{package!r}] = None; import pretrain; from util.dist import run_script; "
        f"run_script(lambda: pretrain.main({flags!r}))"
    )


@pytest.mark.parametrize("package", ["torchvision", "tensorboard", "pandas", "av"])
def test_t20_a_missing_package_is_one_line_with_its_cure(package, videos, tmp_path):
    done = without(package, command(videos, tmp_path, *SHORT))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        f"error: the package {package}" in done.stderr
        and "pip install -r requirements.txt" in done.stderr
    )


def test_t20_decord_and_flash_attn_may_be_absent(videos, tmp_path):
    done = without("decord", command(videos, tmp_path, *SHORT, "--decoder", "decord"))
    assert done.returncode == 0, done.stderr
    assert re.search(
        "decord is not installed.*PyAV|PyAV.*decord is not installed", done.stdout + done.stderr
    )
    done = without(
        "flash_attn", command(videos, tmp_path / "other", *SHORT, "--attn", "flash_attn")
    )
    assert (
        done.returncode == 2
        and "flash-attn" in done.stderr
        and "pip install" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_t20_help_loads_nothing_that_takes_long_but_torch(script):
    slow = ("torchvision", "torch._dynamo", "tensorboard", "decord", "av", "pandas")
    done = python(
        f"import sys, {script}\ntry: {script}.main(['--help'])\nexcept SystemExit: pass\n"
        f"print('loaded', [name for name in {slow} if name in sys.modules])"
    )
    assert done.stdout.strip().endswith("loaded []") and "--batch_size_per_gpu" in done.stdout, (
        done.stderr
    )


def test_t20_a_piped_log_has_lines_and_a_terminal_one_that_is_overwritten(videos, tmp_path):
    flags = [sys.executable, str(ROOT / "pretrain.py"), *command(videos, tmp_path, *SHORT)]
    piped = subprocess.run(flags, capture_output=True, env=clean_environment(), timeout=120).stdout
    assert b"\r" not in piped and b"\033" not in piped and piped.count(b"update ") == 2
    ours, theirs = pty.openpty()
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "tty")
    process, shown = (
        subprocess.Popen(flags, stdout=theirs, stderr=theirs, env=clean_environment()),
        b"",
    )
    os.close(theirs)
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the terminal is gone with its process
        pass
    assert process.wait() == 0 and shown.count(b"\r\033[Kepoch") == 2


def as_flags(parser, values: dict) -> list[str]:
    """The command line of an args.json."""
    flags = []
    for action in parser._actions:
        value = values.get(action.dest)
        if action.dest not in values or value is None or value == [] or value == "":
            continue
        name = action.option_strings[0]
        if isinstance(value, bool):
            off = f"--no-{action.dest}"
            flags += (
                [name]
                if value and action.const is not False
                else [off]
                if not value and off in action.option_strings
                else []
            )
        else:
            flags += [name, *map(str, value if isinstance(value, list) else [value])]
    return flags


def test_t20_args_json_reproduces_the_run(videos, tmp_path):
    more = [
        "--no-flip",
        "--norm_pix_loss",
        "--clip_grad",
        "0.5",
        "--jitter_scales_relative",
        "0.4",
        "0.9",
    ]
    pretrain.main(command(videos, tmp_path / "a", *SHORT, *more))
    values = json.loads((tmp_path / "a/run_args.json").read_text())
    flags = as_flags(
        import_module("pretrain").get_parser(),
        values | {"output_dir": str(tmp_path / "b"), "datafile_dir": str(tmp_path / "b")},
    )
    assert "--no-flip" in flags and "--clip_grad" in flags
    pretrain.main(flags)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours = json.loads((tmp_path / "b/run_args.json").read_text())
    assert {key for key in ours if ours[key] != values[key]} == {"output_dir", "datafile_dir"}


def test_every_test_of_the_reliability_list_is_here():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {f"t{number:02d}" for number in range(1, 21)} <= set(
        re.findall(r"def test_(t\d\d)_", text)
    )
