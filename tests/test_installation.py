"""Installation: interpreters, requirements, the version, and the Makefile's messages."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from util import __version__
from util.dist import available_cpus

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the root of the repository."""
    variables = os.environ | environment
    for name in ("MAKEFLAGS", "MAKELEVEL", "PY", "VENV"):
        if name not in environment:
            variables.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60
    )


def requirements(name: str) -> dict[str, str]:
    """Return the packages of a requirements file with their version specifiers."""
    text = (ROOT / name).read_text()
    return dict(re.findall(r"^([a-z][a-z-]*)([<>=]*[\d.*]*)", text, re.MULTILINE))


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == __version__
    assert re.search(r"^## \[(\d.*)\]", changelog, re.MULTILINE)[1] == __version__
    assert 'version = { attr = "util.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = requirements("requirements.txt")
    oldest = requirements("requirements-oldest.txt")
    assert bounds.keys() == oldest.keys()
    for package, bound in bounds.items():
        lowest = bound.removeprefix(">=")
        tested = oldest[package].removeprefix("==").removesuffix(".*")
        assert tested in (lowest, f"{lowest}.0"), package


def test_an_interpreter_is_found_by_its_version():
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    found = run(sys.executable, ".ci/find_python.py", this, PATH=path)
    assert run(found.stdout.strip(), "--version").stdout.startswith(f"Python {this}")


def test_the_newest_interpreter_is_found():
    newest = run(sys.executable, ".ci/find_python.py", "newest").stdout.strip()
    version = run(newest, "-c", "import sys; print(sys.version_info >= (3, 10))").stdout.strip()
    assert version == "True"


def test_an_interpreter_that_is_missing_is_one_line():
    none = run(sys.executable, ".ci/find_python.py", "3.99")
    assert none.returncode == 1 and none.stderr.count("\n") == 1 and "3.99" in none.stderr


@pytest.fixture
def clone(tmp_path):
    """Copy the Makefile and the requirements alone; return their folder."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, when: str) -> str:
    """Write an interpreter that fails if its code contains `when`; return its path."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\ncase "$2" in *{when}*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
@pytest.mark.parametrize(
    ("when", "cure"),
    [
        ("version_info", "install Python 3.10 or newer"),
        ("ensurepip", "apt-get install python3-venv"),
    ],
)
def test_an_unsuitable_python_is_one_line_with_its_cure(clone, target, when, cure):
    done = run("make", "-C", str(clone), target, f"PYTHON={fake_python(clone, when)}")
    printed = (done.stdout + done.stderr).splitlines()
    lines = [line for line in printed if not line.startswith("make")]
    assert done.returncode == 2 and len(lines) == 1 and cure in lines[0]
    assert not (clone / ".venv").exists()


def test_a_missing_python_is_one_line_with_its_cure(clone):
    done = run("make", "-C", str(clone), "demo", "PYTHON=no-such-python")
    assert done.returncode == 2 and "no no-such-python here: install Python 3.10" in done.stderr


def test_an_interpreter_with_packages_needs_no_environment():
    shown = run("make", "-n", "demo", "test", "lint", "PY=python").stdout
    assert "venv" not in shown and "python -m pytest" in shown


def test_demo_and_tests_share_one_environment(clone):
    shown = run("make", "-C", str(clone), "-n", "demo", "test").stdout
    assert shown.count(" -m venv ") == 1 and shown.count("pip install") == 1


def test_cpus_are_counted_without_linux_functions(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cpus() == os.cpu_count()
