"""Measure whether pretraining helps: videos whose class is the direction of motion, few labels.

    python benchmarks/learning.py                    # two budgets, three seeds; 8 min on two cores
    python benchmarks/learning.py --setting full     # three budgets, every arm; 70 minutes
    python benchmarks/learning.py --setting small    # one budget, two seeds; 3 minutes, also a test

Writes H.264 files: photographs of samples/images that move in one direction over a still frame of
samples/videos. Then runs pretrain.py and finetune.py on them. The arms are: pretrained, from
scratch, probes of the frozen encoder (by --freeze_backbone on random clips, by --probe on center
clips), and from scratch with the FLOPs of the pretraining in addition. A control finetunes the
pretrained encoder on clips whose frames were shuffled before encoding: there, opposite directions
must be indistinguishable.

Learning rates are chosen per arm and budget on validation clips. Test clips are read once per
reported number. The JSON file is written after each run; the same command resumes from it.
Writes results/learning.json, .md and .png, with the setting in the name unless it is "full".
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import finetune
import pretrain
from benchmarks.data_pipeline import cpu_name
from data.images import read_image
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, named_size
from util.dist import available_cpus, print0

RESULTS = ROOT / "benchmarks" / "results"
FASTER = {  # as many clips of fewer videos
    "loader": "--num_workers 2 --decoder pyav",
    "repeats": "--batch_size_per_gpu 16 --repeat_aug 4",
}
# clips: train, val, test; labels: per class; lrs: chosen on the validation clips; probes: --probe
# with these learning rates at once
SETTINGS = {
    "full": {
        "clips": (4000, 400, 800),
        "epochs": 24,
        "labels": (4, 16, 64),
        "compute_at": 16,
        "control_at": (16, 64),
        "steps": 200,
        "seeds": 3,
        "loader": "",
        "repeats": "",
        "lrs": {"pretrained": (1e-3, 3e-3), "scratch": (1e-3, 3e-3), "probe": (1e-2, 3e-2)},
    },
    "medium": {
        "clips": (2400, 160, 800),
        "epochs": 18,
        "labels": (4, 16),
        "compute_at": None,
        "control_at": (16,),
        "steps": 150,
        "seeds": 3,
        **FASTER,
        "lrs": {"pretrained": (2e-3,), "scratch": (2e-3,), "probe": (2e-2,)},
        "probes": {"linear": (1e-3, 3e-3, 1e-2, 3e-2), "attentive": (3e-4, 1e-3, 3e-3, 1e-2)},
    },
    "small": {
        "clips": (1200, 80, 400),
        "epochs": 13,
        "labels": (8,),
        "compute_at": None,
        "control_at": (8,),
        "steps": 120,
        "seeds": 2,
        **FASTER,
        "lrs": {"pretrained": (2e-3,), "scratch": (2e-3,)},
    },
}
SIZE = 36  # of a frame, pixels
FRAMES = 8
SPRITES = 3  # per clip
SPEED = 2.25  # pixels per frame
RADII = (6.5, 11.0)  # of a sprite, pixels
TINT = 0.15  # largest change of a sprite's colors
PHOTOGRAPH_SIZE = 24  # of the pictures that sprites are cut from, pixels
DIRECTIONS = tuple(f"{degrees:03d}" for degrees in range(0, 360, 45))
SHARED = (
    f"--patch_size 8 --img_size 32 --num_frames {FRAMES} --sampling_rate 1 --no-flip "
    "--jitter_scales_relative 0.75 1 --jitter_aspect_relative 0.9 1.1 --clip_grad 1 "
    "--num_workers 1 --checkpoint_period 1000"
)
PRETRAIN = (
    f"--model mae_vit_micro_patch16 {SHARED} --decoder_embed_dim 64 --decoder_depth 1 "
    f"--decoder_num_heads 2 --pred_t_dim {FRAMES} --mask_type temporal --mask_ratio 0.5 "
    "--batch_size_per_gpu 32 --repeat_aug 2 --lr 3e-3 --warmup_epochs 1 --recon_every 0"
)
VIDEOS = 8  # per finetuning update
REPEATS = 4  # crops of each of them
FINETUNE = (
    f"--model vit_micro_patch16 {SHARED} --num_classes {len(DIRECTIONS)} --dropout 0 "
    f"--drop_path_rate 0 --layer_decay 1 --batch_size_per_gpu {VIDEOS} --repeat_aug {REPEATS} "
    "--warmup_epochs 0.4"
)
VALIDATIONS = 4  # per finetuning run
PROBE = (
    f"--sampling_rate 1 --num_classes {len(DIRECTIONS)} --num_workers 1 "
    f"--batch_size_per_gpu {VIDEOS * REPEATS} --warmup_epochs 0.4 --checkpoint_period 1000"
)
ARMS = {  # column titles of the table
    "pretrained": "pretrained",
    "scratch": "from scratch",
    "scratch+compute": "scratch, pretraining's FLOPs on top",
    "probe": "linear probe",
    "linear": "linear probe, --probe",
    "attentive": "attentive probe, --probe",
}


# ---- Videos ----


def sources(split: str) -> tuple[list[Path], list[Path]]:
    """Return the photographs and videos of a split; no file is in two splits.

    "test" is made of samples/*/val; "train" and "val" are parts of samples/*/train.
    """
    folder = "train"
    if split == "test":
        folder = "val"
    photographs = sorted((ROOT / "samples" / "images" / folder).glob("*/*.jpg"))
    videos = sorted((ROOT / "samples" / "videos" / folder).glob("*/*.mp4"))
    if split == "test":
        return photographs, videos
    return part_of(photographs, split), part_of(videos, split)


def part_of(files: list[Path], split: str) -> list[Path]:
    """Return every sixth file for "val", and the others for "train"."""
    validation = files[::6]
    if split == "val":
        return validation
    return [path for path in files if path not in validation]


def pictures(split: str) -> tuple[torch.Tensor, list[Image.Image]]:
    """Return the material of a split's clips.

    Photographs (N, 3, 24, 24) in [0, 1] to cut sprites from, and every 20th frame of the videos
    for backgrounds.
    """
    photograph_paths, videos = sources(split)
    photographs = []
    for path in photograph_paths:
        size = (PHOTOGRAPH_SIZE, PHOTOGRAPH_SIZE)
        small = read_image(str(path)).resize(size, Image.Resampling.BILINEAR)
        photographs.append(np.asarray(small))
    backgrounds = []
    for path in videos:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index % 20 == 0:
                    backgrounds.append(frame.to_image())
    stacked = torch.from_numpy(np.stack(photographs))
    return stacked.permute(0, 3, 1, 2) / 255, backgrounds


class Sprites(NamedTuple):
    """Appearance of the discs of a clip."""

    count: int = SPRITES
    radii: tuple[float, float] = RADII  # smallest and largest, pixels
    tint: float = TINT


LEARNING_SPRITES = Sprites()


def random_background(rng: np.random.Generator, backgrounds: list[Image.Image]) -> torch.Tensor:
    """Return a random square of a random background (3, H, W) in [0.25, 0.75]."""
    background = backgrounds[rng.integers(len(backgrounds))]
    side = rng.uniform(SIZE, min(background.size))
    left = rng.uniform(0, background.width - side)
    top = rng.uniform(0, background.height - side)
    square = background.resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()
    return 0.25 + 0.5 * pixels / 255


def displacements(degrees: int) -> torch.Tensor:
    """Return the displacement (T, 2) in x and y of each frame from the middle of the clip."""
    angle = np.deg2rad(degrees)
    velocity = SPEED * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    return velocity * (torch.arange(FRAMES) - (FRAMES - 1) / 2)[:, None]


def rotation_matrix(angle: float) -> torch.Tensor:
    """Return the rotation (2, 2) by an angle in radians."""
    rows = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return torch.tensor(rows, dtype=torch.float32)


def pixel_grid() -> torch.Tensor:
    """Return x and y of each pixel (H, W, 2)."""
    axis = torch.arange(SIZE)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)


def draw_sprite(
    clip: torch.Tensor,
    moved: torch.Tensor,
    photographs: torch.Tensor,
    sprites: Sprites,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Return the clip (T, 3, H, W) with another disc at random, displaced by `moved` (T, 2)."""
    photograph = photographs[rng.integers(len(photographs))]
    radius = rng.uniform(*sprites.radii)
    angle = rng.uniform(0, 2 * np.pi)
    contrast = rng.uniform(0.7, 1.3)
    tint = torch.from_numpy(rng.uniform(-sprites.tint, sprites.tint, (3, 1, 1))).float()
    colors = (photograph - 0.5) * contrast + 0.5 + tint
    largest = sprites.radii[1]
    period = SIZE + 2 * largest  # the frame is a torus, with a margin for a hidden disc
    start = torch.from_numpy(rng.uniform(0, period, 2)).float()
    centers = (start + moved) % period - largest  # (T, 2)
    offsets = pixel_grid() - centers[:, None, None]  # (T, H, W, 2)
    disc = F.grid_sample(
        colors.clamp(0, 1).expand(FRAMES, -1, -1, -1),
        offsets @ rotation_matrix(angle) * (0.75 / radius),
        padding_mode="border",
        align_corners=False,
    )
    cover = (radius + 0.5 - offsets.norm(dim=-1)).clamp(0, 1)[:, None]
    return clip + (disc - clip) * cover


def moving_clip(
    rng: np.random.Generator,
    photographs: torch.Tensor,
    backgrounds: list[Image.Image],
    degrees: int,
    sprites: Sprites = LEARNING_SPRITES,
) -> np.ndarray:
    """Return a clip (T, H, W, 3) uint8 of discs that all move by SPEED in one direction.

    The discs are cut from photographs, over a still background of half contrast. Positions, sizes,
    rotations, colors and the background are random. Each path is symmetric in time about the
    middle of the clip, and the frame is a torus. So a direction and its opposite contain the same
    frames, in opposite order.
    """
    clip = random_background(rng, backgrounds).expand(FRAMES, -1, -1, -1)
    moved = displacements(degrees)
    for _ in range(sprites.count):
        clip = draw_sprite(clip, moved, photographs, sprites, rng)
    return (clip * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def encode(path: Path, frames: np.ndarray, codec: str = "libx264") -> None:
    """Write frames (T, H, W, 3) uint8 at 30 frames/s.

    codec: "libx264" or "mpeg4", which is faster to decode.
    """
    options = {}
    if codec == "libx264":
        options = {"crf": "14", "preset": "veryfast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width = SIZE
        stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
            stream.codec_context.qmin = 1
            stream.codec_context.qmax = 3
        for frame in frames:
            pixels = np.ascontiguousarray(frame)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_videos(folder: Path, clips: tuple[int, int, int], shuffled: bool) -> None:
    """Write {folder}/{train,val,test}/{direction}/{index}.mp4.

    clips: number of clips of each split. shuffled: put the frames in random order. The files are
    a function of this code and samples/ alone.
    """
    for split_index, split in enumerate(("train", "val", "test")):
        photographs, backgrounds = pictures(split)
        for index in range(clips[split_index]):
            rng = np.random.default_rng((split_index, index))
            direction = DIRECTIONS[index % len(DIRECTIONS)]
            frames = moving_clip(rng, photographs, backgrounds, int(direction))
            if shuffled:
                frames = rng.permutation(frames)
            path = folder / split / direction / f"{index:05d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            encode(path, frames)


def write_labeled_subset(folder: Path, labels: int, seed: int, lines: int, manifest: Path) -> None:
    """Write a manifest of `labels` random videos per class, repeated to at least `lines` lines.

    The seed selects the videos.
    """
    rows = []
    for direction in DIRECTIONS:
        files = sorted((folder / "train" / direction).iterdir())
        order = np.random.default_rng((9, seed, labels)).permutation(len(files))
        rows += [(str(files[index]), direction) for index in order[:labels]]
    rows *= math.ceil(lines / len(rows))
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


# ---- Results of the scripts ----


def read_log(path: Path, key: str) -> list[float]:
    """Return a value of each epoch in a script's log."""
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def read_predictions(path: Path) -> tuple[float, float]:
    """Return two accuracies in percent: over all classes, and against the opposite direction.

    The second one counts the clips whose class has a higher score than the opposite direction.
    If neither is among the five best scores, the clip counts as half a hit.
    """
    correct = []
    above_opposite = []
    for row in csv.DictReader(path.read_text().splitlines()):
        scores = {row[f"top{rank}"]: float(row[f"score{rank}"]) for rank in range(1, 6)}
        label = row["label"]
        opposite_index = DIRECTIONS.index(label) + len(DIRECTIONS) // 2
        opposite = DIRECTIONS[opposite_index % len(DIRECTIONS)]
        own_score = scores.get(label, 0.0)
        opposite_score = scores.get(opposite, 0.0)
        correct.append(row["top1"] == label)
        above_opposite.append((own_score > opposite_score) + (own_score == opposite_score) / 2)
    return 100 * statistics.mean(correct), 100 * statistics.mean(above_opposite)


def wall_and_cpu_seconds() -> np.ndarray:
    """Return the wall and CPU seconds so far; CPU includes loader processes that have ended."""
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    return np.array([time.perf_counter(), cpu])


def environment() -> dict:
    """Return the hardware and software of this run."""
    return {
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "av": av.__version__,
        "cpu": cpu_name(),
        "python": platform.python_version(),
    }


# ---- Runs ----


class FinetuneRun(NamedTuple):
    """A finetuning run."""

    kind: str  # of the videos: "ordered" or "shuffled"
    arm: str  # a key of ARMS
    labels: int  # per class
    lr: float | None  # None: a probe, with several at once
    seed: int

    @property
    def name(self) -> str:
        """Return the key of the run in the JSON file."""
        lr = "several" if self.lr is None else f"{self.lr:g}"
        return f"{self.kind} {self.arm} {self.labels} labels lr {lr} seed {self.seed}"

    @property
    def prefix(self) -> str:
        """Return the prefix of the run's files."""
        return self.name.replace(" ", "_")


class Benchmark:
    """The runs of a setting. A run that is in the JSON file is not repeated."""

    def __init__(self, setting: str, work: Path, out: Path, flags: str = ""):
        """Read the JSON file, if it has the same settings.

        work: videos and checkpoints go to a folder below it. out: folder of the results. flags:
        more flags of pretrain.py and finetune.py.
        """
        self.pretrain_flags = f"{PRETRAIN} {flags}".strip()
        self.finetune_flags = f"{FINETUNE} {flags}".strip()
        self.setting = SETTINGS[setting]
        stem = "learning"
        if setting != "full":
            stem = f"learning_{setting}"
        self.json_path = out / f"{stem}.json"
        about = {
            "setting": setting,
            **self.setting,
            "pretrain": self.pretrain_flags,
            "finetune": self.finetune_flags,
            "clip": [SIZE, FRAMES, SPRITES, SPEED, RADII],
        }
        if "probes" in self.setting:
            about["probe"] = PROBE
        self.about = json.loads(json.dumps(about))  # with lists for tuples, as in the file
        digest = hashlib.sha256(json.dumps(self.about).encode()).hexdigest()
        self.work = work / f"learning_{digest[:8]}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.runs = {}
        if self.json_path.exists():
            saved = json.loads(self.json_path.read_text())
            if all(saved.get(key) == value for key, value in self.about.items()):
                self.runs = saved["runs"]

    def run_once(self, name: str, function: Callable[[], dict]) -> None:
        """Call `function` unless the run is recorded; record its result and its time."""
        if name in self.runs:
            return
        start = wall_and_cpu_seconds()
        with open(self.work / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            record = function()
        wall, cpu = (wall_and_cpu_seconds() - start).round(1).tolist()
        self.runs[name] = record | {"wall_s": wall, "cpu_s": cpu}
        content = self.about | environment() | {"runs": self.runs}
        self.json_path.write_text(json.dumps(content, indent=1) + "\n")
        numbers = [
            f"{key} {value}"
            for key, value in self.runs[name].items()
            if isinstance(value, (int, float))
        ]
        print0(f"{name}: {', '.join(numbers)}")

    def make_videos(self, kind: str) -> None:
        """Make the videos: "ordered" or "shuffled"."""
        folder = self.work / kind

        def run() -> dict:
            make_videos(folder, self.setting["clips"], kind == "shuffled")
            return {"bytes": sum(path.stat().st_size for path in folder.rglob("*.mp4"))}

        if not folder.exists():
            self.runs.pop(f"{kind} videos", None)
        self.run_once(f"{kind} videos", run)

    def pretrain(self) -> None:
        """Pretrain on the ordered videos, without their labels."""
        flags = (
            f"{self.pretrain_flags} --data_dirs {self.work}/ordered/train --output_dir {self.work} "
            f"--save_prefix mae {self.setting['loader']} {self.setting['repeats']} "
            f"--epochs {self.setting['epochs']}"
        )

        def run() -> dict:
            pretrain.main(flags.split())
            return {"loss": read_log(self.work / "mae_log.txt", "train_loss")}

        if not (self.work / "mae.pth").exists():
            self.runs.pop("pretraining", None)
        self.run_once("pretraining", run)

    def finetune(self, run: FinetuneRun, steps: int) -> None:
        """Finetune for `steps` updates; record the validation accuracies."""
        folder = self.work / run.kind
        manifest = folder / "lists" / f"{run.prefix}.csv"
        lines = VIDEOS * steps // VALIDATIONS
        flags = (
            f"{self.finetune_flags} --train_csv {manifest} --val_dir {folder}/val "
            f"--output_dir {folder}/runs --save_prefix {run.prefix} --max_steps {steps} "
            f"--lr {run.lr} --seed {run.seed} {self.setting['loader']}"
        )
        if not run.arm.startswith("scratch"):
            flags += f" --finetune {self.work}/mae.pth"
        if run.arm == "probe":
            flags += " --freeze_backbone"

        def train() -> dict:
            write_labeled_subset(folder, run.labels, run.seed, lines, manifest)
            finetune.main(flags.split())
            return {"val_acc": read_log(folder / "runs" / f"{run.prefix}_log.txt", "test_acc1")}

        self.run_once(run.name, train)

    def probe(self, run: FinetuneRun, steps: int) -> None:
        """Train the heads of a probe for `steps` updates; record the validation accuracies."""
        folder = self.work / run.kind
        manifest = folder / "lists" / f"{run.prefix}.csv"
        lrs = " ".join(map(str, self.setting["probes"][run.arm]))
        flags = (
            f"{PROBE} --finetune {self.work}/mae.pth --train_csv {manifest} --val_dir {folder}/val "
            f"--output_dir {folder}/runs --save_prefix {run.prefix} --max_steps {steps} "
            f"--seed {run.seed} --probe {run.arm} --probe_lrs {lrs}"
        )

        def train() -> dict:
            write_labeled_subset(folder, run.labels, run.seed, 1, manifest)
            finetune.main(flags.split())
            return {"val_acc": read_log(folder / "runs" / f"{run.prefix}_log.txt", "test_acc1")}

        self.run_once(run.name, train)

    def test(self, run: FinetuneRun) -> None:
        """Evaluate the last checkpoint of a finetuning run on the test clips."""
        folder = self.work / run.kind
        flags = (
            f"{self.finetune_flags} --eval --resume {folder}/runs/{run.prefix}.pth "
            f"--val_dir {folder}/test --output_dir {folder}/runs --save_prefix {run.prefix} "
            f"{self.setting['loader']}"
        )

        def evaluate() -> dict:
            finetune.main(flags.split())
            predictions = folder / "runs" / f"{run.prefix}_test_predictions.csv"
            accuracy, pairs = read_predictions(predictions)
            return {"acc": accuracy, "pairs": pairs}

        self.run_once(f"{run.name} test", evaluate)

    def run_arm(
        self, kind: str, arm: str, labels: int, steps: int, lrs: tuple[float, ...]
    ) -> float:
        """Finetune all seeds of an arm with each learning rate; return the best learning rate.

        The learning rate with the best mean validation accuracy is evaluated on the test clips.
        """
        runs = {}
        scores = {}
        for lr in lrs:
            seeds = range(self.setting["seeds"])
            runs[lr] = [FinetuneRun(kind, arm, labels, lr, seed) for seed in seeds]
            for run in runs[lr]:
                self.finetune(run, steps)
            scores[lr] = statistics.mean(self.runs[run.name]["val_acc"][-1] for run in runs[lr])
        best = max(scores, key=scores.get)
        for run in runs[best]:
            self.test(run)
        return best

    def run_probes(self, labels: int, steps: int) -> None:
        """Train and test the probes of all seeds; each run chooses its learning rate itself."""
        for arm in self.setting.get("probes", {}):
            for seed in range(self.setting["seeds"]):
                run = FinetuneRun("ordered", arm, labels, None, seed)
                self.probe(run, steps)
                self.test(run)

    def steps_of_pretraining_flops(self) -> int:
        """Return the number of finetuning updates with as many FLOPs as the pretraining."""
        flags = pretrain.get_parser().parse_args(PRETRAIN.split())
        encoder = named_size(flags.model, flags.patch_size) | {
            "img_size": flags.img_size,
            "num_frames": flags.num_frames,
            "t_patch_size": flags.t_patch_size,
        }
        mae = MaskedAutoencoderViT(
            **encoder,
            decoder_embed_dim=flags.decoder_embed_dim,
            decoder_depth=flags.decoder_depth,
            decoder_num_heads=flags.decoder_num_heads,
            pred_t_dim=flags.pred_t_dim,
        )
        classifier = VisionTransformer(**encoder, num_classes=len(DIRECTIONS))
        batches = self.setting["clips"][0] // flags.batch_size_per_gpu
        clips_per_epoch = batches * flags.batch_size_per_gpu * flags.repeat_aug
        clips = clips_per_epoch * self.setting["epochs"]
        pretraining_flops = clips * mae.flops_per_clip(flags.mask_ratio, flags.mask_type)
        flops_per_update = VIDEOS * REPEATS * classifier.flops_per_clip()
        return round(pretraining_flops / flops_per_update)

    def run(self) -> None:
        """Run everything, the longest runs last."""
        steps = self.setting["steps"]
        best_lr = {}
        self.make_videos("ordered")
        self.pretrain()
        for labels in self.setting["labels"]:
            for arm, lrs in self.setting["lrs"].items():
                best_lr[arm, labels] = self.run_arm("ordered", arm, labels, steps, lrs)
            self.run_probes(labels, steps)
        self.make_videos("shuffled")
        for labels in self.setting["control_at"]:
            lrs = (best_lr["pretrained", labels],)
            self.run_arm("shuffled", "pretrained", labels, steps, lrs)
        labels = self.setting["compute_at"]
        if labels:
            more_steps = steps + self.steps_of_pretraining_flops()
            lrs = (best_lr["scratch", labels],)
            self.run_arm("ordered", "scratch+compute", labels, more_steps, lrs)


# ---- Tables and figures ----


def test_scores(runs: dict, kind: str, arm: str, labels: int, score: str) -> list[float]:
    """Return the test results of all seeds. score: "acc" or "pairs"."""
    return [
        record[score]
        for name, record in runs.items()
        if name.startswith(f"{kind} {arm} {labels} labels") and name.endswith(" test")
    ]


def mean_and_range(values: list[float]) -> str:
    """Return the mean with the lowest and highest value, or "-" without values."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def arms_of(result: dict) -> list[str]:
    """Return the arms of the table: those of --probe only where the setting has them."""
    probes = result.get("probes", {})
    return [arm for arm in ARMS if arm not in ("linear", "attentive") or arm in probes]


def table_row(result: dict, labels: int) -> str:
    """Return the table row of a label budget."""
    runs = result["runs"]
    pairs = (("ordered", "pretrained"), ("ordered", "scratch"), ("shuffled", "pretrained"))
    cells = [str(labels)]
    for arm in arms_of(result):
        cells.append(mean_and_range(test_scores(runs, "ordered", arm, labels, "acc")))
    for kind, arm in pairs:
        cells.append(mean_and_range(test_scores(runs, kind, arm, labels, "pairs")))
    return f"| {' | '.join(cells)} |"


def table(result: dict) -> str:
    """Return the result as Markdown."""
    runs = result["runs"]
    wall = sum(record["wall_s"] for record in runs.values()) / 60
    cpu = sum(record["cpu_s"] for record in runs.values()) / 60
    loader_processes = 1
    if result["loader"]:
        loader_processes = 2
    columns = (
        "labels a class",
        *(ARMS[arm] for arm in arms_of(result)),
        "opposite directions: pretrained",
        "scratch",
        "control, frames shuffled",
    )
    lines = [
        f"Test accuracy in percent over {len(DIRECTIONS)} directions "
        f"(chance {100 / len(DIRECTIONS):.1f}), {result['clips'][2]} clips: mean of "
        f"{result['seeds']} seeds (lowest-highest). {result['clips'][0]} unlabeled clips, "
        f"{result['steps']} updates of finetuning for every arm.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
        *(table_row(result, labels) for labels in result["labels"]),
        "",
        f"Opposite directions: percent of clips whose direction scores above its opposite "
        f"(chance 50). {wall:.0f} minutes, {cpu:.0f} CPU minutes; "
        f"{result['cores']} cores ({result['cpu']}), {result['threads']} thread and "
        f"{loader_processes} loader process(es), "
        f"torch {result['torch']}, python {result['python']}.",
    ]
    return "\n".join(lines) + "\n"


COLORS = {
    "pretrained": "tab:blue",
    "scratch": "gray",
    "probe": "tab:orange",
    "linear": "tab:green",
    "attentive": "tab:red",
}


def curves_figure(result: dict) -> Figure:
    """Plot pretraining loss, validation accuracy in finetuning, and test accuracy over labels."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    loss_axes, validation_axes, test_axes = figure.subplots(1, 3)
    plot_loss(loss_axes, result)
    plot_validation(validation_axes, result)
    plot_test(test_axes, result)
    for axes, highest in ((loss_axes, None), (validation_axes, 100), (test_axes, 100)):
        axes.set_ylim(0, highest)
        axes.grid(alpha=0.3)
    lines, labels = test_axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    return figure


def plot_loss(axes, result: dict) -> None:
    """Plot the pretraining loss of each epoch."""
    losses = result["runs"]["pretraining"]["loss"]
    axes.plot(range(1, len(losses) + 1), losses, ".-", color=COLORS["pretrained"])
    axes.set(title="pretraining", xlabel="epoch", ylabel="loss")


def plot_validation(axes, result: dict) -> None:
    """Plot the validation accuracy of each evaluation of finetuning, at the fewest labels."""
    runs = result["runs"]
    labels = result["labels"][0]
    for arm in result["lrs"]:
        for name, record in runs.items():
            if name.startswith(f"ordered {arm} {labels} labels") and f"{name} test" in runs:
                evaluations = range(1, len(record["val_acc"]) + 1)
                axes.plot(evaluations, record["val_acc"], ".-", color=COLORS[arm])
    axes.set(title=f"finetuning, {labels} labels per class", xlabel="evaluation")
    axes.set_ylabel("validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_test(axes, result: dict) -> None:
    """Plot the test accuracy of each seed, and the mean of the seeds, over labels per class."""
    budgets = [str(labels) for labels in result["labels"]]
    for arm in (*result["lrs"], *result.get("probes", {})):
        means = []
        for budget, labels in zip(budgets, result["labels"], strict=True):
            scores = test_scores(result["runs"], "ordered", arm, labels, "acc")
            axes.plot([budget] * len(scores), scores, "o", color=COLORS[arm], alpha=0.5)
            means.append(statistics.mean(scores))
        axes.plot(budgets, means, ".-", color=COLORS[arm], label=ARMS[arm])
    axes.axhline(100 / len(DIRECTIONS), color="black", linestyle=":", label="chance")
    axes.set(title="test", xlabel="labels per class", ylabel="test accuracy (%)")


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing, and write the JSON file, table and figure. Return the JSON content."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setting", choices=SETTINGS, default="medium", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="videos and checkpoints go below it (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--flags", default="", help='more flags of both scripts, such as "--amp bf16"'
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more are slower for a model of this size
    benchmark = Benchmark(args.setting, args.work, args.out, args.flags)
    benchmark.run()
    result = json.loads(benchmark.json_path.read_text())
    benchmark.json_path.with_suffix(".md").write_text(table(result))
    curves_figure(result).savefig(benchmark.json_path.with_suffix(".png"), dpi=120)
    print0(table(result))
    return result


if __name__ == "__main__":
    main()
