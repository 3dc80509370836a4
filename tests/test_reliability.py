"""The tables of docs/reliability.md: each of their tests exists."""

import re

from launch import ROOT


def test_every_test_of_the_reliability_tables_exists():
    table = (ROOT / "docs/reliability.md").read_text()
    documented = {name.lower() for name in re.findall(r"^\| ([TF]\d\d) \|", table, re.M)}
    source = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    existing = set(re.findall(r"def test_([tf]\d\d)_", source))
    assert documented >= {f"t{index:02d}" for index in range(1, 21)}
    assert documented == existing
