"""The tables of docs/reliability.md: each of their tests exists."""

import re

from launch import ROOT


def test_every_test_of_the_reliability_tables_exists():
    table = (ROOT / "docs/reliability.md").read_text()
    documented = {name.lower() for name in re.findall(r"^\| (T\d\d|F\d\d|F[A-G]) \|", table, re.M)}
    source = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    existing = set(re.findall(r"def test_(t\d\d|f\d\d|f[a-g])_", source))
    assert documented >= {f"t{index:02d}" for index in range(1, 21)}
    assert documented >= {f"f{index:02d}" for index in range(1, 22)}
    assert documented >= {f"f{letter}" for letter in "abcdefg"}
    assert documented == existing
