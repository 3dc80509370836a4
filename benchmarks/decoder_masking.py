"""Measure decoder masking (--decoder_mask_ratio 0.5): time of a training step, and accuracy.

    python benchmarks/decoder_masking.py time       # three models; 7 CPU minutes
    python benchmarks/decoder_masking.py learning   # three arms of three seeds; 40 CPU minutes

"time" lets steps with and without decoder masking take turns, on one model and one thread. It
measures the CPU time of the process, which other jobs on the machine disturb least.

"learning" pretrains on the clips of benchmarks/learning.py, whose class is the direction of motion,
and finetunes with 16 labels per class. Its arms are: without decoder masking, and with it at the
same number of updates and at the same FLOPs. A seed chooses the initial weights, the order, the
masks and the labels. The JSON file is written after each run; the same command resumes from it.
Writes results/decoder_masking_time.json and .md, or results/decoder_masking.json and .md.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import finetune
import pretrain
from benchmarks import learning
from benchmarks.data_pipeline import cpu_name
from benchmarks.train_step import (
    MASK_RATIO,
    NUM_FRAMES,
    Preset,
    Variant,
    VariantSpec,
    build_mae,
    environment,
)
from models_mae import MaskedAutoencoderViT
from models_vit import named_size
from util.dist import print0
from util.optim import make_optimizer, pretrain_param_groups

DECODER_MASK_RATIO = 0.5
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")

# ---- Time of a step ----

PRESETS = {  # decoders of tiny and small: with the share of the FLOPs that ViT-L's has
    "tiny_patch16": Preset("tiny_patch16", 224, 64, 3, 2, batch_size=2),
    "small_patch16": Preset("small_patch16", 224, 128, 4, 4, batch_size=2),
    "large_patch16": Preset("large_patch16", 224, 512, 8, 16, batch_size=1),
}
WARMUP_ROUNDS = 2


def step_times(preset: Preset, rounds: int) -> dict:
    """Return a row of the table: CPU times of steps with and without decoder masking, in turns."""
    torch.manual_seed(0)
    model = build_mae(preset, NUM_FRAMES).train()
    optimizer = make_optimizer(pretrain_param_groups(model, 0.05), model.parameters(), (0.9, 0.95))
    spec = VariantSpec("ours", "ours", "auto", False)
    variants = [Variant(spec, model, optimizer, torch.float32) for _ in range(2)]
    variants[1].decoder_mask_ratio = DECODER_MASK_RATIO
    shape = (preset.batch_size, 3, NUM_FRAMES, preset.img_size, preset.img_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    noise = torch.rand(preset.batch_size, model.num_tokens)
    for turn in range(WARMUP_ROUNDS + rounds):
        for variant in variants:
            start = time.process_time()
            variant.step(clips, noise)
            if turn >= WARMUP_ROUNDS:
                variant.times.append(time.process_time() - start)
    without, masked = (variant.times for variant in variants)
    flops = [model.flops_per_clip(MASK_RATIO, "random", ratio) for ratio in (0, DECODER_MASK_RATIO)]
    visible, _ = model.mask_sizes(MASK_RATIO, "random")
    return {
        "model": preset.model,
        "decoder": [preset.decoder_embed_dim, preset.decoder_depth],
        "clips": preset.batch_size,
        "decoder_share": 1 - model.training_flops(visible) / flops[0],
        "gflop": [count / 1e9 for count in flops],
        "ms": [1000 * statistics.median(times) for times in (without, masked)],
        "ratios": [slow / fast for slow, fast in zip(without, masked, strict=True)],
    }


def time_table(result: dict) -> str:
    """Return the step times as Markdown."""
    lines = [
        f"A pretraining step with and without --decoder_mask_ratio {DECODER_MASK_RATIO}, in turns, "
        f"not compiled: {NUM_FRAMES} x 224 x 224 pixels, {MASK_RATIO:.0%} hidden, "
        f"{result['dtype']}. CPU time of the process, medians of {result['rounds']}; the "
        f"speed-up is the median of the pairs (lowest-highest). {result['cpu']}, "
        f"{result['cores']} cores, {result['threads']} thread, torch {result['torch']}.",
        "",
        "| model | decoder | its share of FLOPs | clips | ms without | ms with | FLOPs | time |",
        "| --- " * 8 + "|",
    ]
    for row in result["rows"]:
        width, depth = row["decoder"]
        without, masked = row["ms"]
        flops = row["gflop"][0] / row["gflop"][1]
        ratios = row["ratios"]
        lines.append(
            f"| {row['model']} | {width} wide, {depth} deep | {row['decoder_share']:.0%} "
            f"| {row['clips']} | {without:.0f} | {masked:.0f} | {flops:.2f}x "
            f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def measure_time(out: Path, rounds: int) -> None:
    """Measure all presets, and write the results after each."""
    torch.set_num_threads(1)
    result = environment(CPU, torch.float32) | {"cpu": cpu_name(), "rounds": rounds, "rows": []}
    for preset in PRESETS.values():
        result["rows"].append(step_times(preset, rounds))
        write(result, out / "decoder_masking_time", time_table(result))


# ---- Accuracy after finetuning ----


class Arm(NamedTuple):
    """A way to pretrain."""

    title: str
    decoder_mask_ratio: float
    equal_flops: bool  # else equal updates


ARMS = {
    "none": Arm("none", 0.0, False),
    "updates": Arm(f"{DECODER_MASK_RATIO}, equal updates", DECODER_MASK_RATIO, False),
    "flops": Arm(f"{DECODER_MASK_RATIO}, equal FLOPs", DECODER_MASK_RATIO, True),
}


class Setting(NamedTuple):
    """The size of the measurement."""

    clips: tuple[int, int, int] = (2400, 160, 800)  # train, val, test
    updates: int = 1800  # of pretraining without decoder masking
    labels: int = 16  # per class
    steps: int = 150  # of finetuning
    lr: float = 2e-3  # of finetuning
    seeds: int = 3


LOADER = "--num_workers 2 --decoder pyav"
PRETRAIN = (
    f"{learning.PRETRAIN} {LOADER} --decoder_depth 2 --batch_size_per_gpu 8 --repeat_aug 8 "
    "--val_every 1000"
)
FINETUNE = f"{learning.FINETUNE} {LOADER}"


def pretraining_flops(ratio: float) -> float:
    """Return the FLOPs per clip of the pretraining with a decoder mask ratio."""
    flags = pretrain.get_parser().parse_args(PRETRAIN.split())
    with torch.device("meta"):
        model = MaskedAutoencoderViT(
            **named_size(flags.model, flags.patch_size),
            img_size=flags.img_size,
            num_frames=flags.num_frames,
            t_patch_size=flags.t_patch_size,
            decoder_embed_dim=flags.decoder_embed_dim,
            decoder_depth=flags.decoder_depth,
            decoder_num_heads=flags.decoder_num_heads,
            pred_t_dim=flags.pred_t_dim,
        )
    return model.flops_per_clip(flags.mask_ratio, flags.mask_type, ratio)


def updates_of(arm: Arm, setting: Setting) -> int:
    """Return the number of updates of an arm's pretraining."""
    if not arm.equal_flops:
        return setting.updates
    saved = pretraining_flops(0) / pretraining_flops(arm.decoder_mask_ratio)
    return round(setting.updates * saved)


class Learning(learning.Benchmark):
    """The runs of all arms and seeds. A run that is in the JSON file is not repeated."""

    def __init__(self, setting: Setting, work: Path, out: Path):
        """Read the JSON file, if it has the same settings.

        work: videos and checkpoints go to a folder below it. out: folder of the results.
        """
        about = {"setting": setting._asdict(), "pretrain": PRETRAIN, "finetune": FINETUNE}
        about = json.loads(json.dumps(about))  # with lists for tuples, as in the file
        self.about = {"about": about}
        self.options = setting
        self.setting = about["setting"]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        self.work = work / f"decoder_masking_{digest[:8]}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.json_path = out / "decoder_masking.json"
        self.runs = {}
        if self.json_path.exists():
            saved = json.loads(self.json_path.read_text())
            if saved["about"] == about:
                self.runs = saved["runs"]

    def pretrain_arm(self, key: str, seed: int) -> None:
        """Pretrain an arm; record the validation loss, which is of all hidden tokens."""
        arm = ARMS[key]
        prefix = f"{key}_{seed}"
        flags = (
            f"{PRETRAIN} --data_dirs {self.work}/ordered/train --val_dirs {self.work}/ordered/val "
            f"--output_dir {self.work} --save_prefix {prefix} --seed {seed} "
            f"--max_steps {updates_of(arm, self.options)} "
            f"--decoder_mask_ratio {arm.decoder_mask_ratio}"
        )

        def run() -> dict:
            pretrain.main(flags.split())
            log = self.work / f"{prefix}_log.txt"
            last = json.loads(log.read_text().splitlines()[-1])
            return {"val_loss": last["val_loss"], "updates": last["step"]}

        self.run_once(f"pretrain {key} seed {seed}", run)

    def finetune_arm(self, key: str, seed: int) -> None:
        """Finetune an arm's encoder, and test the last checkpoint."""
        options = self.options
        prefix = f"{key}_{seed}_finetuned"
        manifest = self.work / f"{prefix}.csv"
        lines = learning.VIDEOS * options.steps // learning.VALIDATIONS
        flags = f"{FINETUNE} --output_dir {self.work} --save_prefix {prefix}"

        def run() -> dict:
            folder = self.work / "ordered"
            learning.write_labeled_subset(folder, options.labels, seed, lines, manifest)
            training = (
                f"{flags} --train_csv {manifest} --val_dir {folder}/val --seed {seed} "
                f"--max_steps {options.steps} --lr {options.lr} "
                f"--finetune {self.work}/{key}_{seed}.pth"
            )
            finetune.main(training.split())
            checkpoint = self.work / f"{prefix}.pth"
            finetune.main(f"{flags} --eval --resume {checkpoint} --val_dir {folder}/test".split())
            predictions = self.work / f"{prefix}_test_predictions.csv"
            accuracy, pairs = learning.read_predictions(predictions)
            return {"acc": accuracy, "pairs": pairs}

        self.run_once(f"finetune {key} seed {seed}", run)

    def run(self) -> None:
        """Run all arms of a seed before the next seed."""
        self.make_videos("ordered")
        for seed in range(self.options.seeds):
            for key in ARMS:
                self.pretrain_arm(key, seed)
                self.finetune_arm(key, seed)


def values(runs: dict, kind: str, key: str, value: str) -> list[float]:
    """Return a value of all seeds that have been run. kind: "pretrain" or "finetune"."""
    prefix = f"{kind} {key} seed "
    return [record[value] for name, record in runs.items() if name.startswith(prefix)]


def difference(ours: list[float], others: list[float]) -> str:
    """Return the differences of the seeds: mean (lowest-highest), with signs."""
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    mean = statistics.mean(differences)
    return f"{mean:+.1f} ({min(differences):+.1f} to {max(differences):+.1f})"


def learning_table(result: dict) -> str:
    """Return the accuracies as Markdown. All arms must have the same seeds."""
    runs = result["runs"]
    setting = result["about"]["setting"]
    without = values(runs, "finetune", "none", "acc")
    cpu = sum(record["cpu_s"] for record in runs.values()) / 60
    lines = [
        f"Test accuracy in percent over {len(learning.DIRECTIONS)} directions of motion, "
        f"{setting['clips'][2]} clips, after finetuning with {setting['labels']} labels a class: "
        f"mean of {len(without)} seeds (lowest-highest). Points: the difference from no decoder "
        "masking with the same seed. The validation loss is of all hidden tokens in every row.",
        "",
        "| decoder masking | updates | MFLOP per clip | CPU s of pretraining | validation loss "
        "| accuracy | points | opposite directions |",
        "| --- " * 8 + "|",
    ]
    for key, arm in ARMS.items():
        accuracy = values(runs, "finetune", key, "acc")
        cells = [
            arm.title,
            f"{values(runs, 'pretrain', key, 'updates')[0]:,}",
            f"{pretraining_flops(arm.decoder_mask_ratio) / 1e6:.1f}",
            f"{statistics.mean(values(runs, 'pretrain', key, 'cpu_s')):.0f}",
            f"{statistics.mean(values(runs, 'pretrain', key, 'val_loss')):.4f}",
            learning.mean_and_range(accuracy),
            difference(accuracy, without),
            learning.mean_and_range(values(runs, "finetune", key, "pairs")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{setting['clips'][0]} unlabeled clips, temporal mask, half of the tokens hidden, decoder "
        f"of 2 blocks; {setting['steps']} updates of finetuning. {cpu:.0f} CPU minutes; "
        f"{result['cores']} cores ({result['cpu']}), {result['threads']} thread and 2 loader "
        f"processes, torch {result['torch']}, python {result['python']}.",
    ]
    return "\n".join(lines) + "\n"


def measure_learning(setting: Setting, work: Path, out: Path) -> None:
    """Run what is missing, and write the table."""
    torch.set_num_threads(1)  # more are slower for a model of this size
    benchmark = Learning(setting, work, out)
    benchmark.run()
    result = json.loads(benchmark.json_path.read_text())
    benchmark.json_path.with_suffix(".md").write_text(learning_table(result))
    print0(learning_table(result))


def write(result: dict, stem: Path, table: str) -> None:
    """Write the JSON and Markdown files of a result."""
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table)
    print0(table)


def main(argv: list[str] | None = None) -> None:
    """Run a part of the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("time", "learning"))
    parser.add_argument("--rounds", type=int, default=10, help="of time (default: %(default)s)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="videos and checkpoints go below it (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "time":
        measure_time(args.out, args.rounds)
    else:
        measure_learning(Setting(), args.work, args.out)


if __name__ == "__main__":
    main()
