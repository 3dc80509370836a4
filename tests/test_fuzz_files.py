"""Files that are damaged at random: see tests/fuzz_files.py (F01)."""

import json
import subprocess
import sys

import pytest
from launch import ROOT, clean_environment


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mutants", "seed"),
    [(12, 1), pytest.param(200, 2, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_f01_damaged_files_end_no_run_and_show_no_wrong_frame(mutants, seed, tmp_path):
    flags = ["--mutants", str(mutants), "--seed", str(seed), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "tests/fuzz_files.py", *flags],
        cwd=ROOT,
        env=clean_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "out.json").read_text())
    assert counts["faults"] == []
    assert counts["mutants"] > mutants / 2  # the others are of kinds that cannot be written here
    assert counts["outcomes"]["pyav: read"] > 0
    assert counts["outcomes"]["pyav: refused"] > 0
