"""The benchmark of a step: both models run the same kernels; a variant loses only its own row."""

import json
import sys
from functools import partial
from importlib import import_module

import pytest
import torch

train_step = import_module("benchmarks.train_step")
CPU = torch.device("cpu")
CHILD = """
import json, sys, time
from pathlib import Path

name, out = sys.argv[sys.argv.index("--only") + 1], Path(sys.argv[-1])
if name == "ours compiled":
    sys.exit(3)
if name == "ours":
    time.sleep(60)
(out / "train_step.json").write_text(json.dumps({"rows": [{"variant": name}], "impossible": {}}))
"""


@pytest.fixture
def args():
    """Return the arguments of a short measurement of a micro model."""
    flags = ["--preset", "micro", "--rounds", "2", "--limit", "2"]
    return train_step.get_parser().parse_args(flags)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "math"])
def test_both_models_run_the_same_attention(kernel, task):
    specs = [train_step.VariantSpec(kind, kind, kernel, False) for kind in ("ours", "plain-sdpa")]
    model, variants = train_step.build_variants(
        train_step.PRESETS["micro"], task, specs, CPU, torch.float32
    )
    clips = torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8)
    noise = torch.rand(1, model.num_tokens)
    operators = {}
    for kind, variant in variants.items():
        with torch.profiler.profile(acc_events=True) as profile:
            variant.loss(clips, noise)
        names = {event.name for event in profile.events()}
        operators[kind] = {name for name in names if "_scaled_dot_product" in name}
    assert operators["ours"] == operators["plain-sdpa"]
    runs_math = any("math" in name for name in operators["ours"])
    assert runs_math == (kernel == "math")


@pytest.mark.parametrize("only", [None, "ours"])
def test_every_variant_is_compared_with_the_plain_model(args, only, monkeypatch):
    specs = train_step.variants_to_run(False, CPU)
    if only is not None:
        specs = [spec for spec in specs if spec.name == only]
    result = train_step.measure(args, specs, CPU, torch.float32)
    assert [row["variant"] for row in result["rows"]] == [spec.name for spec in specs]
    assert all(row["difference"] < 1e-3 for row in result["rows"])

    def loss_of_ours_is_doubled(self, clips, noise):
        return loss(self, clips, noise) * {"ours": 2, "plain-sdpa": 1}[self.spec.kind]

    loss = train_step.Variant.loss
    monkeypatch.setattr(train_step.Variant, "loss", loss_of_ours_is_doubled)
    with pytest.raises(AssertionError):
        train_step.measure(args, specs, CPU, torch.float32)


def test_a_failing_variant_loses_only_its_own_row(args, monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(train_step, "__file__", str(child))
    monkeypatch.setattr(sys, "argv", ["train_step.py"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    results = []
    for result in train_step.measure_in_processes(args, torch.device("cuda"), torch.float32):
        train_step.write(result | {"rows": []}, tmp_path / "written")
        results.append(json.loads(json.dumps(result)))
    names = [spec.name for spec in train_step.variants_to_run(True, torch.device("cuda"))]
    lost = {"ours compiled": "exit code 3", "ours": "longer than 2.0 s"}
    assert results[-1]["impossible"] == lost
    assert [row["variant"] for row in results[-1]["rows"]] == [n for n in names if n not in lost]
    assert len(results) == len(names) and len(results[1]["rows"]) == 1
    assert "ours: cannot run here (longer than 2.0 s)" in (tmp_path / "written.md").read_text()


def test_a_row_is_compared_with_the_same_kernels():
    measured = {"p10_ms": 1, "p90_ms": 1, "clips_per_s": 1, "syncs": 0, "first_call_s": 1}
    measured |= {"mfu_datasheet": None, "mfu_measured": 0.1, "peak_gib": None}
    times = {
        ("plain sdpa", "sdpa"): 30,
        ("ours", "sdpa"): 20,
        ("plain sdpa, cudnn", "cudnn"): 18,
        ("ours, cudnn", "cudnn"): 10,
        ("ours, flash_attn", "flash_attn"): 10,
    }
    rows = [
        {"variant": name, "attn": attn, "median_ms": ms, **measured}
        for (name, attn), ms in times.items()
    ]
    settings = "preset task batch dtype device cores threads torch rounds".split()
    table = train_step.table(dict.fromkeys(settings, 1) | {"rows": rows, "impossible": {}})
    ratios = [line.split(" | ")[3] for line in table.splitlines() if line[:3] in ("| p", "| o")]
    assert ratios == ["1.00x", "1.50x", "1.00x", "1.80x", "-"]


def test_curves_compile_as_many_graphs_as_they_need(args, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train_step, "CURVES", {"frames": (8, 16, 32)})
    with torch._dynamo.config.patch(recompile_limit=2):  # a point needs two
        *_, points = train_step.curves(args, CPU, torch.float32)
    assert [point["frames"] for point in points["frames"]] == [8, 16, 32]
    assert all(point["ms"] > 0 for point in points["frames"])
