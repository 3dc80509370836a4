"""Measure a training step of this repository's model against the plain model of tests/.

    python benchmarks/train_step.py --preset tiny       # a CPU or any GPU
    python benchmarks/train_step.py --preset vit-h14    # one large GPU: ViT-H/14, 64 clips, bf16
    python benchmarks/train_step.py --preset tiny --task finetune --no-compile
    python benchmarks/train_step.py --preset tiny --curves --no-compile --max_batch 8 --rounds 5

A step is the same for all variants: uint8 clips on the device, normalization, forward, backward,
gradient clipping, fused AdamW. Both models use the same list of attention kernels, which the name
of a variant ends with if it is not "sdpa". Losses and gradients are compared with "plain sdpa"
first. Results are medians over --rounds, after ten warm-up rounds. On a CPU the variants take turns
(A B C A B C ...). On a GPU they run one after the other, each in a process of its own with a time
limit, and the results are written after each. MFU is the counted FLOPs over the peak of the
datasheet, and over a matrix product measured in the same process.
Writes benchmarks/results/train_step_NAME.json and .md, or curves_NAME.json and .png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch.nn.attention import sdpa_kernel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from plain_model import PlainMAE, PlainViT

from models_mae import MaskedAutoencoderViT
from models_vit import (
    SDPA_BACKENDS,
    VisionTransformer,
    flash_attn_qkvpacked_func,
    named_size,
    normalize,
)
from util.dist import available_cpus, peak_flops, print0
from util.optim import autocast, make_optimizer, pretrain_param_groups, update
from util.pixels import VIDEO_MEAN, VIDEO_STD

RESULTS = ROOT / "benchmarks" / "results"
MASK_RATIO = 0.9
NUM_FRAMES = 16
WARMUP_ROUNDS = 10


class Preset(NamedTuple):
    """A model and its batch."""

    model: str  # a named size, without "vit_"
    img_size: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    batch_size: int


PRESETS = {
    "vit-h14": Preset("huge_patch14", 224, 512, 4, 16, batch_size=64),
    "B16": Preset("base_patch16", 224, 512, 4, 16, batch_size=64),
    "L16": Preset("large_patch16", 224, 512, 4, 16, batch_size=64),
    "tiny": Preset("tiny_patch16", 160, 192, 4, 6, batch_size=2),
    "micro": Preset("micro_patch16", 32, 32, 1, 2, batch_size=2),  # only for dry runs and tests
}


class VariantSpec(NamedTuple):
    """What to measure."""

    name: str
    kind: str  # "ours" or "plain-sdpa"
    attn: str  # attention kernels of both kinds, as --attn
    compiled: bool
    bf16_residual: bool = False  # of "ours"


VARIANTS = (  # most important first
    VariantSpec("ours compiled", "ours", "sdpa", True),
    VariantSpec("ours compiled, cudnn", "ours", "cudnn", True),
    VariantSpec("ours compiled, cudnn, bf16 residual", "ours", "cudnn", True, bf16_residual=True),
    VariantSpec("plain sdpa", "plain-sdpa", "sdpa", False),
    VariantSpec("plain sdpa, cudnn", "plain-sdpa", "cudnn", False),
    VariantSpec("ours", "ours", "sdpa", False),
    VariantSpec("ours, cudnn", "ours", "cudnn", False),
    VariantSpec("plain sdpa compiled", "plain-sdpa", "sdpa", True),
    VariantSpec("plain sdpa compiled, cudnn", "plain-sdpa", "cudnn", True),
    VariantSpec("ours compiled, flash_attn", "ours", "flash_attn", True),
)


# ---- Models ----


def build_mae(preset: Preset, num_frames: int, attn: str = "auto") -> MaskedAutoencoderViT:
    """Return the pretraining model of a preset."""
    model = MaskedAutoencoderViT(
        **named_size(f"vit_{preset.model}", None),
        img_size=preset.img_size,
        num_frames=num_frames,
        t_patch_size=2,
        decoder_embed_dim=preset.decoder_embed_dim,
        decoder_depth=preset.decoder_depth,
        decoder_num_heads=preset.decoder_num_heads,
        pred_t_dim=num_frames,
        attn=attn,
    )
    model.pixel_stats = (VIDEO_MEAN, VIDEO_STD)
    return model


def build_classifier(preset: Preset, attn: str) -> VisionTransformer:
    """Return the finetuning model of a preset, without dropout."""
    return VisionTransformer(
        **named_size(f"vit_{preset.model}", None),
        img_size=preset.img_size,
        num_frames=NUM_FRAMES,
        t_patch_size=2,
        num_classes=700,
        drop_path_rate=0.0,
        dropout=0.0,
        attn=attn,
    )


def build(preset: Preset, task: str, attn: str) -> MaskedAutoencoderViT | VisionTransformer:
    """Return our model of a task, on torch's current default device."""
    torch.manual_seed(0)
    if task == "pretrain":
        return build_mae(preset, NUM_FRAMES, attn).train()
    return build_classifier(preset, attn).train()


def variants_to_run(with_compiled: bool, device: torch.device) -> list[VariantSpec]:
    """Return the variants that this device may support."""
    kernels = ["sdpa"]
    if device.type == "cuda":
        kernels.append("cudnn")
        if flash_attn_qkvpacked_func is not None:
            kernels.append("flash_attn")
    return [
        spec for spec in VARIANTS if spec.attn in kernels and (with_compiled or not spec.compiled)
    ]


class Variant:
    """A model with an optimizer, and its training step.

    All variants share the parameters of one model, and that model's optimizer.
    """

    def __init__(self, spec: VariantSpec, model: torch.nn.Module, optimizer, dtype: torch.dtype):
        """Compile the model, if the variant is compiled."""
        self.spec = spec
        self.model = model
        self.optimizer = optimizer
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.mask_ratio = MASK_RATIO
        self.decoder_mask_ratio = 0.0  # of "ours"
        self.kernel = "sdpa"  # as `choose_attention` returns it
        self.attention: list[str] = []  # one line per head width
        self.times: list[float] = []  # seconds of a step
        self.first_call = 0.0  # seconds of the first forward and backward pass
        if spec.bf16_residual:
            model.residual_dtype = torch.bfloat16
        if spec.compiled and spec.kind == "ours":
            model.compile_parts()
        elif spec.compiled:
            model.compile(fullgraph=True, dynamic=False)

    def kernels(self):
        """Return the context that gives the plain model the kernels which ours sets itself."""
        if self.spec.kind == "ours":
            return nullcontext()
        # instead of the flash-attn package PyTorch's FlashAttention-2
        backends = SDPA_BACKENDS.get(self.kernel, SDPA_BACKENDS["sdpa"])
        return sdpa_kernel(backends, set_priority=True)

    def loss(self, clips: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the loss of uint8 clips (B, 3, T, H, W) with noise (B, L)."""
        if not isinstance(self.model, MaskedAutoencoderViT):  # which normalizes what it gathers
            clips = normalize(clips, VIDEO_MEAN, VIDEO_STD)
        with self.kernels(), autocast(self.device, self.dtype):
            if isinstance(self.model, (VisionTransformer, PlainViT)):
                return self.model(clips).float().logsumexp(1).mean()
            if self.spec.kind == "ours":
                masks = {"noise": noise, "decoder_mask_ratio": self.decoder_mask_ratio}
                return self.model(clips, self.mask_ratio, **masks)[0]
            return self.model(clips, noise, self.mask_ratio)

    def step(self, clips: torch.Tensor, noise: torch.Tensor) -> None:
        """Run one update."""
        self.loss(clips, noise).backward()
        update(self.optimizer, self.scaler, 1.0)

    def timed_step(self, clips: torch.Tensor, noise: torch.Tensor) -> float:
        """Run one update; return its seconds, until the device has finished."""
        synchronize(self.device)
        start = time.perf_counter()
        self.step(clips, noise)
        synchronize(self.device)
        return time.perf_counter() - start


# ---- Measurements ----


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_syncs(step: Callable[[], None], device: torch.device) -> int:
    """Return the host syncs of a step: CUDA's warnings, or on a CPU the reads of tensor values."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
    reads = ("aten::_local_scalar_dense", "aten::nonzero")
    return sum(event.count for event in profile.key_averages() if event.key in reads)


def largest_difference(gradients: dict[str, torch.Tensor], expected: dict) -> float:
    """Return the largest difference of gradients, relative to the largest expected gradient."""
    scale = max(gradient.abs().max() for gradient in expected.values())
    differences = [
        ((gradients[name] - gradient).abs().max() / scale).item()
        for name, gradient in expected.items()
    ]
    return max(differences)


def check_equal(variants: dict[str, Variant], clips, noise) -> dict[str, float]:
    """Return each variant's largest relative difference of loss and gradients from the first one.

    Asserts that all differences are small.
    """
    differences = {}
    expected_loss = None
    expected = {}
    for name, variant in variants.items():
        tolerance = 5e-2
        if variant.dtype == torch.float32:
            tolerance = 1e-3
        loss = variant.loss(clips, noise)
        loss.backward()
        parameters = variant.model.named_parameters()
        gradients = {key: parameter.grad for key, parameter in parameters}
        if expected_loss is None:
            expected_loss = loss.item()
            expected = {key: gradient.clone() for key, gradient in gradients.items()}
        loss_difference = abs(loss.item() - expected_loss) / abs(expected_loss)
        differences[name] = max(largest_difference(gradients, expected), loss_difference)
        assert differences[name] < tolerance, (name, differences[name])
        variant.model.zero_grad()
    return differences


def run_first_calls(variants: dict[str, Variant], clips, noise) -> dict[str, str]:
    """Compile and run each variant once. Remove those that fail, and return their errors."""
    failed = {}
    for name, variant in list(variants.items()):
        start = time.perf_counter()
        try:
            variant.loss(clips, noise).backward()
        except RuntimeError as error:  # out of memory, or tensors that a kernel does not support
            failed[name] = str(error).splitlines()[0][:120]
            del variants[name]
        variant.model.zero_grad()
        variant.first_call = time.perf_counter() - start
    return failed


def time_rounds(variants: dict[str, Variant], clips, noise, rounds: int) -> dict[str, float]:
    """Let the variants take turns, and collect their times. Return the peak GiB of each on CUDA.

    The peak includes weights and optimizer state.
    """
    peaks = {}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, variant in variants.items():
            # the first step makes the optimizer's state, after its peak
            measures_memory = turn == 1 and variant.device.type == "cuda"
            if measures_memory:
                torch.cuda.reset_peak_memory_stats()
            seconds = variant.timed_step(clips, noise)
            if measures_memory:
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn >= WARMUP_ROUNDS:
                variant.times.append(seconds)
    return peaks


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of twelve."""
    n = 1536
    if device.type == "cuda":
        n = 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """Return the hardware and software of this run."""
    device_name = "cpu"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name()
    return {
        "device": device_name,
        "dtype": str(dtype),
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def timing_row(
    times: list[float], batch_size: int, flops: float, peak: float | None, ceiling: float
) -> dict:
    """Return columns of the table: statistics of the seconds of a step, and the MFU.

    flops: of a step. peak and ceiling: FLOP/s of the datasheet (None: unknown) and as measured.
    """
    quantiles = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    mfu_datasheet = None
    if peak is not None:
        mfu_datasheet = flops / median / peak
    return {
        "median_ms": median * 1000,
        "p10_ms": quantiles[0] * 1000,
        "p90_ms": quantiles[-1] * 1000,
        "clips_per_s": batch_size / median,
        "mfu_datasheet": mfu_datasheet,
        "mfu_measured": flops / median / ceiling,
    }


def flops_per_clip(model: torch.nn.Module, task: str) -> float:
    """Return the FLOPs of a forward and backward pass of one clip."""
    if task == "pretrain":
        return model.flops_per_clip(MASK_RATIO, "random")
    return model.flops_per_clip()


def build_variants(
    preset: Preset, task: str, specs: list[VariantSpec], device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, Variant]]:
    """Return a model, and the variants by name, which share its parameters.

    Raises ValueError where an attention kernel cannot run.
    """
    with device:
        first = build(preset, task, "auto")
    optimizer = make_optimizer(pretrain_param_groups(first, 0.05), first.parameters(), (0.9, 0.95))
    shared = first.state_dict(keep_vars=True)
    plain = {"pretrain": PlainMAE, "finetune": PlainViT}[task]
    variants = {}
    for spec in specs:
        with torch.device("meta"):
            model = build(preset, task, spec.attn)
            attention = model.set_attention(device.type, dtype)
            kernel = model.blocks[0].attn.kernel
            if spec.kind == "plain-sdpa":
                model = plain(model.config, sdpa=True).train()
        model.load_state_dict(shared, assign=True)
        variants[spec.name] = Variant(spec, model, optimizer, dtype)
        variants[spec.name].kernel = kernel
        variants[spec.name].attention = attention
    return first, variants


def row_of(variant: Variant, clips, noise, flops: float, ceiling: float) -> dict:
    """Return the row of the table of a timed variant, without memory and differences.

    flops: of a step. ceiling: the measured peak FLOP/s.
    """
    peak = peak_flops(variant.device)
    return {
        "variant": variant.spec.name,
        "attn": variant.spec.attn,
        "attention": variant.attention,
        **timing_row(variant.times, len(clips), flops, peak, ceiling),
        "syncs": count_syncs(lambda: variant.step(clips, noise), variant.device),
        "first_call_s": variant.first_call,
    }


def settings(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Return what the results depend on."""
    return {
        "preset": args.preset,
        "task": args.task,
        "batch": args.batch or PRESETS[args.preset].batch_size,
        "rounds": args.rounds,
        "compared": args.check,
        **environment(device, dtype),
    }


def compare(variants: dict[str, Variant], clips, noise) -> dict[str, float]:
    """Return the differences of `check_equal`, none if there is nothing to compare with."""
    if next(iter(variants.values())).spec.kind != "plain-sdpa":
        print0("Losses and gradients are not compared: plain sdpa cannot run here.")
        return {}
    return check_equal(variants, clips, noise)


def measure(
    args: argparse.Namespace, specs: list[VariantSpec], device: torch.device, dtype: torch.dtype
) -> dict:
    """Measure variants in turns, after comparing them with "plain sdpa" and the same kernels.

    Returns the content of the JSON file. All variants must have the same kernels.
    """
    preset = PRESETS[args.preset]
    result = settings(args, device, dtype) | {"order": "in turns"}
    if len(specs) == 1:
        result["order"] = "alone"
    reference = VariantSpec("plain sdpa, reference", "plain-sdpa", specs[0].attn, False)
    try:
        model, variants = build_variants(preset, args.task, [reference, *specs], device, dtype)
    except ValueError as error:
        return result | {"rows": [], "impossible": {spec.name: str(error) for spec in specs}}
    batch_size = result["batch"]
    shape = (batch_size, 3, NUM_FRAMES, preset.img_size, preset.img_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    noise = torch.rand(batch_size, model.num_tokens, device=device)
    flops = batch_size * flops_per_clip(model, args.task)
    failed = run_first_calls(variants, clips, noise)
    differences = {}
    if args.check:
        differences = compare(variants, clips, noise)
    variants.pop(reference.name, None)
    peak_gib = time_rounds(variants, clips, noise, args.rounds)
    ceiling = matmul_flops(device, dtype)
    rows = []
    for name, variant in variants.items():
        row = row_of(variant, clips, noise, flops, ceiling)
        row |= {"peak_gib": peak_gib.get(name), "difference": differences.get(name)}
        rows.append(row)
    return result | {
        "gflop_per_step": flops / 1e9,
        "rows": rows,
        "impossible": failed,
        "ceiling_tflops": ceiling / 1e12,
    }


def measure_in_process(args: argparse.Namespace, name: str) -> dict:
    """Measure one variant in a process of its own. Return its result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--out", folder]
        reason = f"longer than {args.limit} s"
        try:
            done = subprocess.run(command, timeout=args.limit, check=False)
            reason = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            pass
        for file in Path(folder).glob("*.json"):
            return json.loads(file.read_text())
    return {"rows": [], "impossible": {name: reason}}


def measure_in_processes(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[dict]:
    """Measure one variant after the other. Yield the result after each."""
    result = settings(args, device, dtype) | {
        "order": "one after the other, each in a process of its own",
        "rows": [],
        "impossible": {},
    }
    for spec in variants_to_run(args.compile, device):
        one = measure_in_process(args, spec.name)
        result["rows"] += one["rows"]
        result["impossible"] |= one["impossible"]
        yield one | result


# ---- Time over batch size, mask ratio and frames ----


CURVES = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),
    "mask_ratio": (0.5, 0.75, 0.9, 0.95),
    "frames": (8, 16, 32, 64),
}


def curve_point(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, setting: dict
) -> dict:
    """Return a setting (batch, mask_ratio, frames) with its time and FLOPs per clip.

    "ms" is the median time of a pretraining step divided by the batch, None if out of memory.
    """
    torch.compiler.reset()  # many graphs of one function are an error
    preset = PRESETS[args.preset]
    shape = (setting["batch"], 3, setting["frames"], preset.img_size, preset.img_size)
    torch.manual_seed(0)
    with device:
        model = build_mae(preset, setting["frames"]).train()
        clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        noise = torch.rand(setting["batch"], model.num_tokens)
    optimizer = make_optimizer(pretrain_param_groups(model, 0.05), model.parameters(), (0.9, 0.95))
    model.set_attention(device.type, dtype)
    variant = Variant(VariantSpec("ours", "ours", "auto", args.compile), model, optimizer, dtype)
    variant.mask_ratio = setting["mask_ratio"]
    gflop = model.flops_per_clip(setting["mask_ratio"], "random") / 1e9
    try:
        times = [variant.timed_step(clips, noise) for _ in range(3 + args.rounds)]
    except torch.OutOfMemoryError:
        return {**setting, "gflop": gflop, "ms": None}
    median = statistics.median(times[3:])
    return {**setting, "gflop": gflop, "ms": median * 1000 / setting["batch"]}


def curves(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, list[dict]]]:
    """Measure the time per clip over each axis of CURVES, with the preset's other values.

    Yields all points so far after each.
    """
    default = {
        "batch": args.batch or PRESETS[args.preset].batch_size,
        "mask_ratio": MASK_RATIO,
        "frames": NUM_FRAMES,
    }
    points: dict[str, list[dict]] = {}
    for axis, values in CURVES.items():
        points[axis] = []
        for value in values:
            if axis == "batch" and value > args.max_batch:
                continue
            point = curve_point(args, device, dtype, default | {axis: value})
            points[axis].append(point)
            print0(point)
            yield points


def curves_figure(points: dict[str, list[dict]]) -> Figure:
    """Plot ms per clip over each axis of CURVES, measured and as FLOPs predict it.

    The prediction passes through the point in the middle.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, (name, row) in zip(panels, points.items(), strict=True):
        row = [point for point in row if point["ms"] is not None]
        middle = row[len(row) // 2]
        ms_per_gflop = middle["ms"] / middle["gflop"]
        values = [str(point[name]) for point in row]
        predicted = [ms_per_gflop * point["gflop"] for point in row]
        measured = [point["ms"] for point in row]
        axes.plot(values, predicted, "o--", color="gray", label="predicted from FLOPs")
        axes.plot(values, measured, "o-", color="tab:blue", label="measured")
        axes.set(xlabel=name.replace("_", " "), ylabel="ms per clip")
        axes.set_ylim(0, 1.1 * max(*predicted, *measured))
        axes.grid(alpha=0.3)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=2)
    return figure


# ---- Results ----


def format_or_dash(value: float | None, spec: str) -> str:
    """Format a number, or return "-" for None."""
    if value is None:
        return "-"
    return format(value, spec)


def header(result: dict) -> str:
    """Return the settings of a result in one line."""
    parts = [
        f"{result['preset']}, {result['task']}, {result['batch']} clips, {result['dtype']}",
        f"{result['device']}, {result['cores']} cores, {result['threads']} threads",
        f"torch {result['torch']}, medians of {result['rounds']} (p10 to p90)",
        f"variants ran {result.get('order', 'in turns')}",
    ]
    if not result.get("compared", True):
        parts.append("losses and gradients not compared")
    line = ", ".join(parts)
    if "ceiling_tflops" in result:
        line += f"; a matrix product here reaches {result['ceiling_tflops']:.3g} TFLOP/s"
    return line


def table(result: dict) -> str:
    """Return the result as Markdown. A row is compared with the plain model on the same kernels."""
    baselines = {
        row.get("attn", "sdpa"): row["median_ms"]
        for row in result["rows"]
        if row["variant"].partition(",")[0] == "plain sdpa"
    }
    columns = (
        "variant",
        "ms",
        "p10-p90",
        "against plain sdpa",
        "clips/s",
        "MFU (datasheet)",
        "MFU (measured ceiling)",
        "peak GiB",
        "syncs",
        "first call s",
    )
    lines = [
        header(result),
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * len(columns))} |",
    ]
    for row in result["rows"]:
        ratio = "-"
        if row.get("attn", "sdpa") in baselines:
            ratio = f"{baselines[row.get('attn', 'sdpa')] / row['median_ms']:.2f}x"
        cells = (
            row["variant"],
            f"{row['median_ms']:.1f}",
            f"{row['p10_ms']:.1f}-{row['p90_ms']:.1f}",
            ratio,
            f"{row['clips_per_s']:.2f}",
            format_or_dash(row["mfu_datasheet"], ".1%"),
            format_or_dash(row["mfu_measured"], ".1%"),
            format_or_dash(row["peak_gib"], ".1f"),
            str(row["syncs"]),
            f"{row['first_call_s']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, reason in result["impossible"].items():
        lines.append(f"{name}: cannot run here ({reason})")
    return "\n".join(lines).rstrip() + "\n"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--task", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--batch", type=int, help="clips per step (default: the preset's)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--curves",
        action="store_true",
        help="measure time per clip over batch, mask ratio and frames, and plot it",
    )
    parser.add_argument(
        "--max_batch",
        type=int,
        default=128,
        help="largest batch of the curve (default: %(default)s)",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare losses and gradients first (default: on)",
    )
    parser.add_argument(
        "--only",
        choices=[spec.name for spec in VARIANTS],
        metavar="VARIANT",
        help="measure one variant, in this process (names are in VARIANTS)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=120,
        help="seconds of a variant on a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    return parser


def write(result: dict, stem: Path) -> None:
    """Write the JSON and Markdown files of a result."""
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table(result))


def main() -> None:
    """Measure, write the results as they come, print the table."""
    args = get_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    dtype = torch.float32
    if torch.cuda.is_available():
        device = torch.device("cuda")
        dtype = torch.bfloat16
    if args.curves:
        stem = args.out / f"curves_{args.preset}_{device.type}"
        for points in curves(args, device, dtype):
            result = environment(device, dtype) | {"rounds": args.rounds, "points": points}
            stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        curves_figure(points).savefig(stem.with_suffix(".png"), dpi=120)
        return
    stem = args.out / f"train_step_{args.preset}_{args.task}_{device.type}"
    if not args.check:
        print0("--no-check: losses and gradients are not compared")
    if device.type == "cuda" and args.only is None:
        for result in measure_in_processes(args, device, dtype):
            write(result, stem)
    else:
        specs = variants_to_run(args.compile, device)
        if args.only is not None:
            specs = [spec for spec in VARIANTS if spec.name == args.only]
        result = measure(args, specs, device, dtype)
        write(result, stem)
    print0(table(result))


if __name__ == "__main__":
    main()
