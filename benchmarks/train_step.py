"""How long a training step takes: ours and the plain model of tests/plain_model.py, eager and compiled, on CUDA or CPU.

    python benchmarks/train_step.py --preset tiny               # a CPU or any GPU
    python benchmarks/train_step.py --preset seed-H             # one big GPU: ViT-H/14, 16 x 224², 64 clips, bf16
    python benchmarks/train_step.py --preset tiny --task finetune --no-compile
    python benchmarks/train_step.py --preset tiny --curves --no-compile --max_batch 8 --rounds 5

A step is: uint8 clips on the device -> normalise -> forward -> backward -> clip -> fused AdamW, the same for all. Losses and gradients
are compared first; then the variants take turns (A B C A B C ...), medians over --rounds after ten warm-up rounds. MFU: counted FLOPs over the
datasheet's peak, and over a matrix product measured in this run. Writes benchmarks/results/train_step_NAME.json and .md.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from plain_model import PlainMAE, PlainViT

from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize
from models_mae import MaskedAutoencoderViT
from models_vit import ATTENTION, VisionTransformer, flash_attn_qkvpacked_func, named_size
from util.dist import peak_flops, print0, usable_cores
from util.optim import make_optimizer, pretrain_groups, update

PRESETS = {  # model, patch, img_size, decoder (width, depth, heads), batch
    "seed-H": ("huge_patch14", None, 224, (512, 4, 16), 64),
    "L16": ("large_patch16", None, 224, (512, 4, 16), 64),
    "tiny": ("tiny_patch16", None, 160, (192, 4, 6), 2),
}
MASK_RATIO = 0.9


def count_syncs(step, device: torch.device) -> int:
    """Host syncs of one step: CUDA's own warnings there, reads of a tensor's value on a CPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    reads = ("aten::_local_scalar_dense", "aten::nonzero")
    return sum(event.count for event in profile.key_averages() if event.key in reads)


def build(
    args, kind: str, attn: str, device: torch.device, base: torch.nn.Module | None
) -> torch.nn.Module:
    """One of the models; all share the parameters of `base`, the first. kind: ours, plain (softmax written out) or plain-sdpa."""
    name, patch, img_size, (width, depth, heads), _ = PRESETS[args.preset]
    torch.manual_seed(0)
    shared = named_size(f"vit_{name}", patch) | {
        "img_size": img_size,
        "num_frames": 16,
        "t_patch_size": 2,
    }
    with torch.device(device if base is None else "meta"):
        if args.task == "pretrain":
            model = MaskedAutoencoderViT(
                **shared,
                decoder_embed_dim=width,
                decoder_depth=depth,
                decoder_num_heads=heads,
                pred_t_dim=16,
                attn=attn,
            )
        else:
            model = VisionTransformer(
                **shared, num_classes=700, drop_path_rate=0.0, dropout=0.0, attn=attn
            )
        if kind != "ours":
            model = (PlainMAE if args.task == "pretrain" else PlainViT)(
                model.config, sdpa=kind == "plain-sdpa"
            )
    if base is not None:
        model.load_state_dict(base.state_dict(keep_vars=True), assign=True)
    return model.train()


class Variant:
    """A model, the optimizer of the parameters that all share, and how to take a step with it."""

    def __init__(
        self,
        args,
        kind: str,
        model: torch.nn.Module,
        optimizer,
        compiled: bool,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.args, self.kind, self.device, self.dtype, self.model, self.optimizer = (
            args,
            kind,
            device,
            dtype,
            model,
            optimizer,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.times, self.compile_s, self.mask_ratio = [], None, MASK_RATIO
        if compiled and kind == "ours":
            self.model.compile_parts()
        elif compiled:
            self.model.compile(fullgraph=True, dynamic=False)

    def loss(self, clips: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Loss of uint8 clips."""
        clips = normalize(clips, VIDEO_MEAN, VIDEO_STD)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.args.task == "finetune":
                return self.model(clips).float().logsumexp(1).mean()
            return (
                self.model(clips, self.mask_ratio, noise=noise)[0]
                if self.kind == "ours"
                else self.model(clips, noise, self.mask_ratio)
            )

    def step(self, clips: torch.Tensor, noise: torch.Tensor) -> None:
        """One update."""
        self.loss(clips, noise).backward()
        update(self.optimizer, self.scaler, 1.0)

    def timed(self, clips: torch.Tensor, noise: torch.Tensor) -> float:
        """Seconds of one step, to its end on the device."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        self.step(clips, noise)
        wait()
        return time.perf_counter() - start


def check_equal(variants: dict[str, Variant], clips, noise, tolerance: float) -> dict[str, float]:
    """Largest relative difference of loss and gradients from the first variant; asserts that they are small."""
    reference, differences = None, {}
    for name, variant in variants.items():
        loss = variant.loss(clips, noise)
        loss.backward()
        parameters = dict(variant.model.named_parameters())
        if reference is None:
            gradients = {key: parameter.grad.clone() for key, parameter in parameters.items()}
            reference = (
                loss.item(),
                gradients,
                max(gradient.abs().max() for gradient in gradients.values()),
            )
        off = max(
            ((parameters[key].grad - reference[1][key]).abs().max() / reference[2]).item()
            for key in parameters
        )
        differences[name] = max(off, abs(loss.item() - reference[0]) / abs(reference[0]))
        assert differences[name] < tolerance, (name, differences[name])
        variant.model.zero_grad()
    return differences


def first_calls(variants: dict[str, Variant], clips, noise) -> dict[str, str]:
    """Compile and warm up; takes out the variants that cannot run here, and returns why."""
    impossible = {}
    for name, variant in list(variants.items()):
        start = time.perf_counter()
        try:
            variant.loss(clips, noise).backward()
        except (
            RuntimeError
        ) as error:  # out of memory, or a backend that does not take these tensors
            impossible[name] = str(error).splitlines()[0][:120]
            del variants[name]
        variant.model.zero_grad()
        variant.compile_s = time.perf_counter() - start
    return impossible


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 1e9
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def kinds_to_run(args, device: torch.device) -> list[tuple[str, str, str, bool]]:
    """(name, kind, attn, compiled) of the variants."""
    rows = [
        ("plain", "plain", "auto", False),
        ("plain sdpa", "plain-sdpa", "auto", False),
        ("ours", "ours", "auto", False),
    ]
    if args.compile:
        rows += [
            ("plain sdpa compiled", "plain-sdpa", "auto", True),
            ("ours compiled", "ours", "auto", True),
        ]
        backends = [
            name
            for name in ATTENTION
            if name != "sdpa" and (device.type == "cuda" or name != "cudnn")
        ]
        backends += (
            ["flash_attn"]
            if flash_attn_qkvpacked_func is not None and device.type == "cuda"
            else []
        )
        rows += [(f"ours compiled, {name}", "ours", name, True) for name in backends]
    return rows


def measure(args, device: torch.device, dtype: torch.dtype) -> dict:
    """Everything that goes into the table."""
    batch = args.batch or PRESETS[args.preset][4]
    first = build(args, "ours", "auto", device, None)
    optimizer = make_optimizer(pretrain_groups(first, 0.05), first.parameters(), (0.9, 0.95))
    variants = {
        name: Variant(
            args, kind, build(args, kind, attn, device, first), optimizer, compiled, device, dtype
        )
        for name, kind, attn, compiled in kinds_to_run(args, device)
    }
    clips = torch.randint(
        0,
        256,
        (batch, 3, 16, first.config["img_size"], first.config["img_size"]),
        dtype=torch.uint8,
        device=device,
    )
    noise = torch.rand(batch, first.num_tokens, device=device)
    impossible = first_calls(variants, clips, noise)
    differences = check_equal(variants, clips, noise, 1e-3 if dtype == torch.float32 else 5e-2)
    peaks = {}
    for turn in range(10 + args.rounds):
        for name, variant in variants.items():
            if device.type == "cuda" and turn == 0:
                torch.cuda.reset_peak_memory_stats()
            elapsed = variant.timed(clips, noise)
            if device.type == "cuda" and turn == 0:
                peaks[name] = (
                    torch.cuda.max_memory_allocated() / 2**30
                )  # weights and moments included
            if turn >= 10:
                variant.times.append(elapsed)
    flops = batch * (
        first.flops_per_clip(MASK_RATIO, "random")
        if args.task == "pretrain"
        else first.flops_per_clip()
    )
    peak, measured = peak_flops(device), ceiling(device, dtype)
    rows = []
    for name, variant in variants.items():
        quantiles = statistics.quantiles(variant.times, n=10)
        median = statistics.median(variant.times)
        rows.append(
            {
                "variant": name,
                "median_ms": median * 1000,
                "p10_ms": quantiles[0] * 1000,
                "p90_ms": quantiles[-1] * 1000,
                "clips_per_s": batch / median,
                "mfu_datasheet": flops / median / peak if peak else None,
                "mfu_measured": flops / median / measured,
                "peak_gib": peaks.get(name),
                "syncs": count_syncs(lambda v=variant: v.step(clips, noise), device),
                "first_call_s": variant.compile_s,
                "difference": differences[name],
            }
        )
    return {
        "preset": args.preset,
        "task": args.task,
        "batch": batch,
        "rounds": args.rounds,
        "gflop_per_step": flops / 1e9,
        "rows": rows,
        "impossible": impossible,
        "ceiling_tflops": measured / 1e12,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


CURVES = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),
    "mask_ratio": (0.5, 0.75, 0.9, 0.95),
    "frames": (8, 16, 32, 64),
}


def curve_point(
    args, device: torch.device, dtype: torch.dtype, batch: int, mask_ratio: float, frames: int
) -> dict:
    """Median ms per clip of our pretraining step at one setting, and the FLOPs of it; ms None: out of memory."""
    name, patch, img_size, (width, depth, heads), _ = PRESETS[args.preset]
    torch.manual_seed(0)
    with torch.device(device):
        model = MaskedAutoencoderViT(
            **named_size(f"vit_{name}", patch),
            img_size=img_size,
            num_frames=frames,
            t_patch_size=2,
            decoder_embed_dim=width,
            decoder_depth=depth,
            decoder_num_heads=heads,
            pred_t_dim=frames,
        )
        clips = torch.randint(0, 256, (batch, 3, frames, img_size, img_size), dtype=torch.uint8)
        noise = torch.rand(batch, model.num_tokens)
    optimizer = make_optimizer(pretrain_groups(model, 0.05), model.parameters(), (0.9, 0.95))
    if args.compile:
        model.compile_parts()
    variant = Variant(args, "ours", model.train(), optimizer, False, device, dtype)
    variant.mask_ratio = mask_ratio
    point = {
        "batch": batch,
        "mask_ratio": mask_ratio,
        "frames": frames,
        "gflop": model.flops_per_clip(mask_ratio, "random") / 1e9,
    }
    try:
        times = [variant.timed(clips, noise) for _ in range(3 + args.rounds)][3:]
    except torch.OutOfMemoryError:
        return point | {"ms": None}
    return point | {"ms": statistics.median(times) * 1000 / batch}


def curves(args, device: torch.device, dtype: torch.dtype) -> dict[str, list[dict]]:
    """Time per clip over batch, mask ratio and frames, each with the others at the preset's values."""
    centre = {
        "batch": args.batch or PRESETS[args.preset][4],
        "mask_ratio": MASK_RATIO,
        "frames": 16,
    }
    points = {}
    for axis, values in CURVES.items():
        points[axis] = []
        for value in values:
            if axis != "batch" or value <= args.max_batch:
                points[axis].append(curve_point(args, device, dtype, **centre | {axis: value}))
                print0(points[axis][-1])
    return points


def curves_picture(points: dict[str, list[dict]]) -> Image.Image:
    """One panel per axis: measured ms per clip (blue) and the FLOP prediction through the point in the middle (grey), from zero."""
    picture = Image.new("RGB", (340 * len(points), 300), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (axis, row) in enumerate(points.items()):
        row = [point for point in row if point["ms"] is not None]
        anchor = row[len(row) // 2]
        predicted = [anchor["ms"] * point["gflop"] / anchor["gflop"] for point in row]
        top = 1.1 * max(max(point["ms"] for point in row), *predicted)
        left, right, low = 340 * panel + 60, 340 * panel + 320, 250
        across = [
            left + (right - left) * number / max(len(row) - 1, 1) for number in range(len(row))
        ]
        draw.line([(left, 20), (left, low), (right, low)], fill="black")
        draw.text((left - 6, 20), f"{top:.3g}", fill="black", anchor="rm")
        draw.text((left - 6, low), "0 ms/clip", fill="black", anchor="rm")
        for values, colour in ((predicted, "grey"), ([point["ms"] for point in row], "blue")):
            line = [
                (x, low - (low - 20) * value / top) for x, value in zip(across, values, strict=True)
            ]
            draw.line(line, fill=colour, width=2)
            for x, y in line:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        for x, point in zip(across, row, strict=True):
            draw.text((x, low + 12), str(point[axis]), fill="black", anchor="mm")
        draw.text(
            ((left + right) / 2, 284),
            f"{axis}: measured (blue), by FLOPs (grey)",
            fill="black",
            anchor="mm",
        )
    return picture


def table(result: dict) -> str:
    """The result as Markdown."""

    def cell(value, form):
        return "-" if value is None else format(value, form)

    opponent = next(row for row in result["rows"] if row["variant"] == "plain sdpa")["median_ms"]
    lines = [
        f"{result['preset']}, {result['task']}, {result['batch']} clips, {result['dtype']}, {result['device']}, {result['cores']} cores, "
        f"{result['threads']} threads, torch {result['torch']}, medians of {result['rounds']} (p10 to p90); a matrix product here reaches "
        f"{result['ceiling_tflops']:.3g} TFLOP/s",
        "",
        "| variant | ms | p10-p90 | against plain sdpa | clips/s | MFU (datasheet) | MFU (measured ceiling) | peak GiB | syncs | first call s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['variant']} | {row['median_ms']:.1f} | {row['p10_ms']:.1f}-{row['p90_ms']:.1f} | {opponent / row['median_ms']:.2f}x "
            f"| {row['clips_per_s']:.2f} | {cell(row['mfu_datasheet'], '.1%')} | {cell(row['mfu_measured'], '.1%')} "
            f"| {cell(row['peak_gib'], '.1f')} | {row['syncs']} | {row['first_call_s']:.1f} |"
        )
    lines += [
        "",
        *(f"{name}: cannot run here ({reason})" for name, reason in result["impossible"].items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure, print the table, write the results."""
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
        help="time per clip over batch, mask ratio and frames instead, and a PNG",
    )
    parser.add_argument(
        "--max_batch",
        type=int,
        default=128,
        help="largest batch of the curve (default: %(default)s)",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results (default: %(default)s)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.curves:
        stem, points = args.out / f"curves_{args.preset}_{device.type}", curves(args, device, dtype)
        about = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(dtype),
            "rounds": args.rounds,
        }
        stem.with_suffix(".json").write_text(
            json.dumps(about | {"points": points}, indent=2) + "\n"
        )
        curves_picture(points).save(stem.with_suffix(".png"))
        return
    result = measure(args, device, dtype)
    stem = args.out / f"train_step_{args.preset}_{args.task}_{device.type}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    print0(table(result))


if __name__ == "__main__":
    main()
