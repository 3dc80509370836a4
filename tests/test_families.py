"""Every family of checkpoints goes through every use, with the outcome that the docs state."""

import pytest
from checkpoint_families import BEGIN, END, FAMILIES, NEEDED, PAGE, row, table

QUICK = ("optimized-stmae, finetuned", "VideoMAE, pretrained")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_a_family_has_the_outcomes_that_the_docs_state(name, tmp_path):
    assert row(name, tmp_path / "files") in PAGE.read_text().splitlines()


def test_the_docs_have_a_row_for_each_family_and_no_other():
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = text.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in rows] == list(FAMILIES)
    assert table(rows) == text
    assert set(NEEDED) <= set(FAMILIES)
