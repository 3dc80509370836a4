"""Warnings of libraries do not reach the user (F21). Tools run in their own tests too.

Python shows a DeprecationWarning only where the program itself is the cause, so each program runs
as one. Warnings about calls are errors in all tests: see pyproject.toml.
"""

import subprocess
import sys

import pytest
from launch import ROOT, clean_environment

SHOW_HELP = """
import os, runpy, sys
import torch
for program in {programs}:
    child = os.fork()
    if child == 0:
        sys.argv[1:] = ["--help"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        sys.exit("no help")
    _, status = os.waitpid(child, 0)
    assert status == 0, program
"""


def programs() -> list[str]:
    """Return the module names of all scripts and tools."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if '__name__ == "__main__"' in path.read_text()
    ]


@pytest.mark.slow
def test_f21_no_program_prints_warnings():
    names = programs()
    assert len(names) >= 11
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP.format(programs=names)],
        cwd=ROOT,
        env=clean_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(names)
    assert done.stderr == ""
