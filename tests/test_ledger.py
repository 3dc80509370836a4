"""The ledger of a training step: its arithmetic, and the committed counts of ViT-H/14."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nullgpu import build

from benchmarks import ledger, roofline

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "benchmarks/results/ledger_vit-h14.json").read_text())
MARGIN = 1.01  # of bytes, which depend on how Inductor fuses


def recorded(function, compiled: bool = False) -> ledger.Recorder:
    """Return what a function does, recorded."""
    recorder = ledger.Recorder(compiled)
    with recorder:
        function()
    return recorder


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 1, 2 * 400),
        (lambda x: x.add_(1), 2 * 400),
        (lambda x: x.add_(x), 3 * 400),
        (lambda x: x.zero_(), 400),
        (lambda x: torch.empty(4, 25).copy_(x), 2 * 400),
        (lambda x: x.to(torch.bfloat16), 400 + 200),
        (lambda x: x[:, :5] * 2, 2 * 80),
        (lambda x: x.t().view(25, 2, 2)[0], 0),
        (lambda x: x.index_select(1, torch.tensor([3, 4])), 2 * 32 + 2 * 8),
        (lambda x: torch.mm(x, x.t(), out=torch.empty(4, 4)), 2 * 400 + 64),
        (lambda x: x + x[:1].expand(4, 25), 3 * 400),
        (lambda x: torch._foreach_mul_([x, x], 2.0), 4 * 400),
    ],
)
def test_an_operator_reads_and_writes_once(function, expected):
    x = torch.zeros(4, 25)
    recorder = recorded(lambda: function(x))
    assert sum(recorder.totals("bytes").values()) == expected


def test_an_update_moves_28_bytes_a_parameter():
    parameter = torch.zeros(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(1000)
    optimizer.step()  # makes the moments
    entries = recorded(optimizer.step).entries.items()
    (adamw,) = [entry for (_, name, _), entry in entries if name == "_fused_adamw_"]
    assert 0 <= adamw.bytes - 28 * 1000 <= 8  # the rest is the count of steps


def test_kinds_of_operators():
    x = torch.zeros(2, 3, 5, 4)

    def step() -> None:
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        (y[0, 0] @ torch.zeros(4, 7)).relu()

    eager = recorded(step)
    calls = eager.totals("calls")
    assert calls[roofline.MATRIX_PRODUCTS] == calls[roofline.ATTENTION] == 1
    assert calls[roofline.NOT_COMPILED] == calls[roofline.UPDATE] == 0
    assert eager.totals("flops")[roofline.MATRIX_PRODUCTS] == 2 * 5 * 4 * 7
    assert dict(eager.attention) == {(2, 3, 5, 4): 1}
    assert recorded(step, compiled=True).totals("calls")[roofline.NOT_COMPILED] >= 1


ATTENTION = {
    "batch": 64,
    "heads": 16,
    "shapes": {"205 x 80": {"flash": {"ms": 1.0}}, "2049 x 32": {"flash": {"ms": 17.0}}},
}


@pytest.mark.parametrize(
    ("shape", "ms", "exact"),
    [
        ((64, 16, 205, 80), 1.0, True),
        ((32, 16, 2049, 32), 8.5, True),
        ((64, 12, 157, 64), 0.6, False),  # 12 of 16 heads, 64 of 80 wide, two tiles in both
        ((64, 16, 1025, 64), 17 * 2 * (9 / 17) ** 2, False),
    ],
)
def test_attention_takes_its_measured_time(shape, ms, exact):
    time = roofline.attention_time(shape, "flash", ATTENTION)
    assert time.seconds == pytest.approx(ms / 1000)
    assert time.exact is exact


def test_a_step_takes_the_sum_of_its_kinds():
    gb = dict.fromkeys(roofline.KINDS, 10.0)
    row = {"gb": gb, "tflop": {roofline.MATRIX_PRODUCTS: 50.0}}
    card = roofline.Card(flops=100e12, bandwidth=1e12, peak=200e12)
    seconds = roofline.step_seconds(row, card, attention=0.3)
    assert [seconds[kind] for kind in roofline.KINDS] == pytest.approx([0.5, 0.3, 0.01, 0.01, 0.01])
    row["tflop"][roofline.MATRIX_PRODUCTS] = 0.1
    assert roofline.step_seconds(row, card, 0.3)[roofline.MATRIX_PRODUCTS] == pytest.approx(0.01)


def test_measured_steps_are_found_by_label_and_parts_of_the_name():
    name = "ours compiled, bf16 residual, cudnn"  # the benchmark names "cudnn" first
    place = ("vit-h14", "H200", "now")
    assert roofline.measured_ms(*place, name) is not None
    assert roofline.measured_ms(*place, "ours compiled, bf16 residual") is None
    assert roofline.measured_ms("vit-h14", "H100", "now", name) is None
    before = roofline.measured_ms("vit-h14", "H200", "before", "ours compiled")
    assert before != roofline.measured_ms(*place, "ours compiled")


def test_tables_are_made_from_the_json():
    results = ledger.results_of_presets(ledger.RESULTS)
    assert {result["preset"] for result in results} >= set(ledger.PRESETS_OF_THE_DOCS)
    for result in results:
        written = (ledger.RESULTS / f"ledger_{result['preset']}.md").read_text()
        assert written == roofline.counted_table(result)
    written = (ledger.RESULTS / "computed_steps.md").read_text()
    assert written == roofline.computed_table(results)
    page = ledger.PAGE.read_text()
    assert page == roofline.with_new_tables(page, results)


def test_a_row_replaces_that_of_its_label_and_variant():
    rows = [{"label": "a", "variant": "ours"}, {"label": "b", "variant": "ours"}]
    ledger.put_row(rows, {"label": "a", "variant": "ours", "kernels": 1})
    ledger.put_row(rows, {"label": "c", "variant": "ours"})
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["kernels"] == 1


def excesses(row: dict, committed: dict) -> list[str]:
    """Return what a row of counts has more of than the committed row."""
    found = []
    for name in ("kernels", "matrix_products", "graphs"):
        if row[name] > committed[name]:
            found.append(f"{row[name]} {name}, not {committed[name]}")
    sizes = row["gb"] | {"peak GiB": row["peak_gib"]}
    allowed = committed["gb"] | {"peak GiB": committed["peak_gib"]}
    for name, size in sizes.items():
        if size > MARGIN * allowed[name]:
            found.append(f"{size:.2f} {name}, not {allowed[name]:.2f}")
    return found


def latest_row(result: dict, variant: str) -> dict:
    """Return the row of a variant that was counted last."""
    return [row for row in result["rows"] if row["variant"] == variant][-1]


def test_more_bytes_and_launches_are_found():
    committed = latest_row(COMMITTED, "ours compiled")
    elementwise = committed["gb"][roofline.ELEMENTWISE]
    assert excesses(committed, committed) == []
    more = committed | {"kernels": committed["kernels"] + 1}
    more["gb"] = committed["gb"] | {roofline.ELEMENTWISE: 1.02 * elementwise}
    assert len(excesses(more, committed)) == 2
    assert len(excesses(committed | {"peak_gib": 1.02 * committed["peak_gib"]}, committed)) == 1


@pytest.mark.slow
@pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle()))
def test_a_step_of_vit_h14_moves_no_more_than_committed(tmp_path):
    if COMMITTED["torch"] != torch.__version__:
        pytest.skip(f"counted with torch {COMMITTED['torch']}, here is {torch.__version__}")
    variants = ["ours", "ours compiled"]
    command = [sys.executable, str(ROOT / "benchmarks/ledger.py"), "--preset", "vit-h14"]
    command += ["--out", str(tmp_path), "--variants", *variants]
    done = subprocess.run(command, capture_output=True, text=True)
    if "does not compile" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads((tmp_path / "ledger_vit-h14.json").read_text())
    for variant in variants:
        assert excesses(latest_row(counted, variant), latest_row(COMMITTED, variant)) == []
