"""The scripts on the null GPU: what the host and the device do in an update, counted.

tests/nullgpu/build.py describes the null GPU, and tests/nullgpu/run_script.py what is counted.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from launch import ROOT
from nullgpu import build
from runs import image_command, pretrain_command, video_command

RECORDED_WITH = "2.14.1+cu130"  # the version of torch whose launches, graphs and memory these are
MOST_LAUNCHES = 1637  # of an update of ViT-H/14 with 64 clips, compiled
MOST_GIB = 36.3  # peak memory in it
MOST_GRAPHS = 5  # compiled for it
FEW_VIDEOS = 8  # one forward pass of the validation
MANY_VIDEOS = 24
SECONDS = "600"  # that a group of cases may take

DEVICE = "--device cuda --batch_size_per_gpu 2 --epochs 2 --log_every 3 --overwrite"
RECIPE = (
    "--mixup 0.8 --cutmix 1 --rand_aug --reprob 0.25 --smoothing 0.1 --drop_path_rate 0.2 "
    "--dropout 0.3 --repeat_aug 2 --clip_grad 1"
)
HUGE = (
    "--model mae_vit_huge_patch14 --patch_size 14 --img_size 224 --num_frames 16 --pred_t_dim 16 "
    "--decoder_embed_dim 512 --decoder_depth 4 --decoder_num_heads 16 --mask_ratio 0.9 "
    "--clip_grad 1 --repeat_aug 4 --batch_size_per_gpu 16 --data_csv {many}"
)
COMMANDS = {  # script: its command line without the flags of a case
    "pretrain": lambda data, out: pretrain_command(data["videos"], out, *DEVICE.split()),
    "finetune": lambda data, out: video_command(data["videos"], out, *DEVICE.split()),
    "finetune_on_image": lambda data, out: image_command(data["images"], out, *DEVICE.split()),
}


class Case(NamedTuple):
    """A run of a script on the null GPU."""

    name: str
    module: str
    flags: str  # {videos}, {images}, {many}, {few} and {out} stand for paths
    patches: tuple[str, ...] = ()  # of tests/nullgpu/run_script.py
    first_steady: int | None = 3  # the first update that waits for nothing


CAPTURE = ("capture pretraining",)
CASES = {  # the cases of a process
    "quick": (
        Case("pretraining", "pretrain", "--no-compile", CAPTURE),
        Case("average", "pretrain", "--no-compile --ema 0.9"),
        Case("read a value", "pretrain", "--no-compile", ("item", "six updates"), None),
        Case("tensor on the CPU", "pretrain", "--no-compile", ("cpu tensor", "six updates"), None),
    ),
    "eager": (
        Case("plain", "pretrain", "--no-compile --max_steps 6"),
        Case("deterministic", "pretrain", "--no-compile --max_steps 6 --deterministic"),
        Case("fp16", "pretrain", "--no-compile --amp fp16 --clip_grad 1", CAPTURE),
        Case("accumulation", "pretrain", "--no-compile --accum_iter 2 --epochs 4"),
        Case("checkpointing", "pretrain", "--no-compile --activation_checkpointing"),
        Case("workers", "pretrain", "--no-compile --num_workers 1"),
        Case("normalized pixels", "pretrain", "--no-compile --norm_pix_loss --mask_type tube"),
        Case("finetuning", "finetune", f"--no-compile {RECIPE}", ("capture finetuning",)),
        Case("finetuning in fp16", "finetune", f"--no-compile {RECIPE} --amp fp16"),
        Case("images", "finetune_on_image", "--no-compile --rand_aug --mixup 0.8"),
        Case("folded images", "finetune_on_image", "--no-compile --static_clip folded"),
    ),
    "compiled": (
        Case("compiled", "pretrain", "--compile", CAPTURE),
        Case("compiled checkpointing", "pretrain", "--compile --activation_checkpointing"),
        Case(
            "compiled finetuning",
            "finetune",
            f"--compile {RECIPE} --ema 0.9 --train_dir= --train_csv {{more}}",
            ("six updates",),
        ),
    ),
    "ranks": (
        Case(
            "eight ranks",
            "pretrain",
            "--compile --data_csv {many}",
            ("empty batches", "eight ranks", "twenty updates"),
            first_steady=12,  # DDP measures its first ten iterations, and waits for that
        ),
    ),
    "huge": (
        Case(
            "huge",
            "pretrain",
            f"--compile {HUGE}",
            ("empty batches", "six updates"),
            first_steady=4,  # the allocator needs three updates to have all sizes
        ),
    ),
    "ends": (
        Case("few samples", "pretrain", "--no-compile --epochs 1 --val_csv {few}", (), None),
        Case("many samples", "pretrain", "--no-compile --epochs 1 --val_csv {more}", (), None),
        Case("pictures", "pretrain", "--no-compile --epochs 1 --recon_every 1", (), None),
        Case("probes", "pretrain", "--no-compile --epochs 1 --probe_dir {probes}", (), None),
        Case("finetuned", "finetune", "--no-compile --epochs 1", (), None),
        Case("eval", "finetune", "--no-compile --eval --output_dir {out}/finetuned", (), None),
        Case(
            "features",
            "tools.extract_features",
            "{out}/pictures/run.pth --data_dir {videos} --num_workers 0 --device cuda",
            (),
            None,
        ),
        Case(
            "gallery",
            "tools.visualize",
            "{out}/pictures/run.pth --data_dirs {videos} --output_dir {out}/gallery --device cuda",
            (),
            None,
        ),
    ),
}
BLOCKS = 3  # of the model of these cases: two of the encoder, one of the decoder


def select(belongs: Callable[[Case], bool]) -> list:
    """Return (group, case) of some cases, as parameters of a test; all but quick are slow."""
    parameters = []
    for group, cases in CASES.items():
        marks = [] if group == "quick" else [pytest.mark.slow]
        for case in cases:
            if belongs(case):
                parameters.append(pytest.param(group, case, marks=marks, id=case.name))
    return parameters


STEADY = select(lambda case: case.first_steady is not None)
CAPTURED = select(lambda case: any(name.startswith("capture") for name in case.patches))
ENDS = select(lambda case: case in CASES["ends"])


def case_record(case: Case, data: dict[str, str], out: Path) -> dict:
    """Return a case as tests/nullgpu/run_script.py reads it. data: names of paths."""
    flags = case.flags.format(**data, out=out).split()
    if case.module in COMMANDS:
        flags = [*COMMANDS[case.module](data, out / case.name), *flags]
    return {"name": case.name, "module": case.module, "flags": flags, "patches": case.patches}


@pytest.fixture(scope="module")
def run_group(null_gpu, videos, images, tmp_path_factory) -> Callable[[str], dict[str, dict]]:
    """Return a function that runs the cases of a group once and returns their results by name."""
    out = tmp_path_factory.mktemp("runs")
    paths = sorted(str(path) for path in Path(videos).glob("*/*.mp4"))
    data = {"videos": videos, "images": images, "probes": str(out / "probes")}
    for part in ("train", "val"):
        (out / "probes").mkdir(exist_ok=True)
        (out / "probes" / part).symlink_to(videos)
    for name, count in (("few", FEW_VIDEOS), ("more", MANY_VIDEOS), ("many", 512)):
        data[name] = str(out / f"{name}.csv")
        lines = [f"{path},{Path(path).parent.name}" for path in (paths * count)[:count]]
        Path(data[name]).write_text("\n".join(lines))

    @cache
    def end_of_group(group: str) -> subprocess.CompletedProcess:
        cases = [case_record(case, data, out) for case in CASES[group]]
        (out / f"{group}.json").write_text(json.dumps(cases))
        files = [str(out / f"{group}.json"), str(out / f"{group}_results.json")]
        return subprocess.run(
            ["timeout", SECONDS, sys.executable, str(ROOT / "tests/nullgpu/run_script.py"), *files],
            cwd=out,
            env=build.environment(null_gpu) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(group: str) -> dict[str, dict]:
        ended = end_of_group(group)
        assert ended.returncode == 0, ended.stdout[-3000:]
        return json.loads((out / f"{group}_results.json").read_text())

    return run


def steady_updates(result: dict, case: Case) -> list[dict]:
    """Return the updates of a case that wait for nothing but the log."""
    assert result["error"] is None
    updates = result["updates"][case.first_steady - 1 :]
    steady = [update for update in updates if not update["captures"]]
    assert {update["reduces"] for update in steady} == {False, True}
    return steady


@pytest.mark.parametrize(("group", "case"), STEADY)
def test_an_update_waits_only_to_log(group, case, run_group):
    result = run_group(group)[case.name]
    for update in steady_updates(result, case):
        waits = int(update["reduces"])
        assert update["syncs"] == waits, result["sync_lines"]
        assert update["pageable"] == waits
        # a thread pins memory until its queue is full; a save takes pinned memory of batches
        if "--num_workers" not in case.flags and not update["after_save"]:
            assert update["allocations"] == 0
        assert update["launches"] > 0


@pytest.mark.parametrize(("group", "case"), STEADY)
def test_nothing_is_compiled_again(group, case, run_group):
    result = run_group(group)[case.name]
    assert {update["compiled"] for update in result["updates"]} == {result["compiled"]}
    assert (result["compiled"] > 0) == ("--compile" in case.flags)


@pytest.mark.parametrize("kind", ["syncs", "pageable"])
def test_the_counts_find_a_tensor_of_the_cpu(kind, run_group):
    for update in run_group("quick")["tensor on the CPU"]["updates"]:
        assert update[kind] > update["reduces"]


def test_the_counts_find_a_value_that_is_read(run_group):
    result = run_group("quick")["read a value"]
    for update in result["updates"]:
        assert update["syncs"] > update["reduces"]
    assert result["sync_lines"]


@pytest.mark.parametrize(("group", "case"), CAPTURED)
def test_forward_and_backward_fit_a_cuda_graph(group, case, run_group):
    captured = [update for update in run_group(group)[case.name]["updates"] if update["captures"]]
    assert [update["replays"] for update in captured] == [1]
    assert captured[0]["not captured"] == 0


@pytest.mark.parametrize(("group", "case"), ENDS)
def test_a_program_runs_to_its_end(group, case, run_group):
    assert run_group(group)[case.name]["error"] is None


@pytest.mark.slow
def test_waits_of_a_validation_do_not_grow_with_its_samples(run_group):
    results = run_group("ends")
    few = results["few samples"]["epoch_ends"][-1]
    many = results["many samples"]["epoch_ends"][-1]
    assert many["syncs"] == few["syncs"]
    assert many["launches"] > few["launches"] > 0


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("sys.platform", "darwin", "needs Linux, not darwin"),
        ("torch.version.cuda", None, "is no CUDA build"),
        ("torch.cuda.is_available", lambda: True, "a real GPU"),
        ("shutil.which", lambda _program: None, "needs g++"),
        ("nullgpu.build.HEADERS", ("absent.h",), "no absent.h beside torch"),
    ],
)
def test_a_reason_is_given_where_there_is_no_null_gpu(target, value, reason, null_gpu, monkeypatch):
    assert build.obstacle() is None
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(target, value)
    assert reason in build.obstacle()


def test_a_failed_build_reports_the_first_error(null_gpu, monkeypatch, tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int f() { return absent; }\nint g() { return absent; }\n")
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"wrong\.cpp:1:.* error: .*absent"):
        build.build(tmp_path)


def skip_on_another_torch() -> None:
    """Skip a test of numbers that hold for one version of torch."""
    if torch.__version__ != RECORDED_WITH:
        pytest.skip(f"recorded with torch {RECORDED_WITH}, here is {torch.__version__}")


@pytest.mark.slow
def test_launches_graphs_and_memory_of_vit_h_do_not_grow(run_group):
    skip_on_another_torch()
    result = run_group("huge")["huge"]
    update = [update for update in result["updates"] if not update["reduces"]][-1]
    assert update["launches"] <= MOST_LAUNCHES
    assert update["peak_gib"] <= MOST_GIB
    assert result["compiled"] <= MOST_GRAPHS


@pytest.mark.slow
def test_deterministic_attention_alone_fills_new_tensors(run_group):
    results = run_group("eager")
    plain = results["plain"]["updates"][-1]
    deterministic = results["deterministic"]["updates"][-1]
    assert deterministic["fills"] <= plain["fills"] + BLOCKS
