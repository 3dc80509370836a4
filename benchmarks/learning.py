"""Does pretraining help? Videos whose class is the direction of motion, pretrained without labels, finetuned with few of them.

    python benchmarks/learning.py                    # two budgets, three seeds, eight minutes on two cores: results/learning_medium.md
    python benchmarks/learning.py --setting full     # three budgets, every arm, 70 minutes: results/learning.md
    python benchmarks/learning.py --setting small    # one budget, two seeds, three minutes: run by tests/test_learning.py

Writes H.264 files (photographs of samples/images that move alike over a still frame of samples/videos), then calls pretrain.py and
finetune.py on them: pretrained against from scratch at several label budgets, a linear probe, scratch with the pretraining's FLOPs on top,
and a control, the same encoder finetuned on clips whose frames are shuffled before encoding: opposite directions must become
indistinguishable. Learning rates are chosen per arm and budget on validation clips; test clips are read once per reported number. Goes on
where it stopped: the JSON is written after each run.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import finetune
import pretrain
from data.decode import read_image
from engine_finetune import build_model
from util import args as flags
from util.dist import print0, usable_cores

FASTER = {
    "loader": "--num_workers 2 --decoder pyav",
    "repeats": "--batch_size_per_gpu 16 --repeat_aug 4",
}  # as many clips of fewer videos
SETTINGS = {  # clips: train, val, test; labels: per class; lrs: what is tried on the validation clips
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
SIZE, FRAMES, SPRITES, SPEED, RADII = (
    36,
    8,
    3,
    2.25,
    (6.5, 11.0),
)  # pixels, frames, sprites per clip, pixels per frame, pixels
TINT = 0.15  # largest change of a sprite's colors
DIRECTIONS = tuple(f"{degrees:03d}" for degrees in range(0, 360, 45))
SHARED = (
    f"--patch_size 8 --img_size 32 --num_frames {FRAMES} --sampling_rate 1 --no-flip --jitter_scales_relative 0.75 1 "
    "--jitter_aspect_relative 0.9 1.1 --clip_grad 1 --num_workers 1 --checkpoint_period 1000"
)
PRETRAIN = (
    f"--model mae_vit_micro_patch16 {SHARED} --decoder_embed_dim 64 --decoder_depth 1 --decoder_num_heads 2 --pred_t_dim {FRAMES} "
    "--mask_type temporal --mask_ratio 0.5 --batch_size_per_gpu 32 --repeat_aug 2 --lr 3e-3 --warmup_epochs 1 --recon_every 0"
)
VIDEOS, REPEATS = 8, 4  # of an update in finetuning: 8 videos, 4 crops of each
FINETUNE = (
    f"--model vit_micro_patch16 {SHARED} --num_classes {len(DIRECTIONS)} --dropout 0 --drop_path_rate 0 --layer_decay 1 "
    f"--batch_size_per_gpu {VIDEOS} --repeat_aug {REPEATS} --warmup_epochs 0.4"
)
VALIDATIONS = 4  # per finetuning run


def sources(split: str) -> tuple[list[Path], list[Path]]:
    """The photographs and videos that a split is made of; no file serves two splits. train, val: parts of samples/*/train; test: samples/*/val."""
    found = []
    for pattern in ("images/{}/*/*.jpg", "videos/{}/*/*.mp4"):
        files = sorted(
            (ROOT / "samples").glob(pattern.format("val" if split == "test" else "train"))
        )
        found.append(
            files
            if split == "test"
            else [path for place, path in enumerate(files) if (place % 6 == 0) == (split == "val")]
        )
    return found[0], found[1]


def pictures(split: str) -> tuple[torch.Tensor, list[Image.Image]]:
    """Photographs (N, 3, 24, 24) in [0, 1] to cut sprites from, and every 20th frame of the videos for backgrounds."""
    photographs, videos = sources(split)
    small = [
        np.asarray(read_image(str(path)).resize((24, 24), Image.Resampling.BILINEAR))
        for path in photographs
    ]
    grounds = []
    for path in videos:
        with av.open(str(path)) as container:
            grounds += [
                frame.to_image()
                for number, frame in enumerate(container.decode(video=0))
                if number % 20 == 0
            ]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255, grounds


class Sprites(NamedTuple):
    """How the discs of a clip look."""

    count: int = SPRITES
    radii: tuple[float, float] = RADII  # smallest and largest, pixels
    tint: float = TINT


LEARNING_SPRITES = Sprites()


def moving_clip(
    rng: np.random.Generator,
    photographs: torch.Tensor,
    grounds: list[Image.Image],
    degrees: int,
    sprites: Sprites = LEARNING_SPRITES,
) -> np.ndarray:
    """A clip (T, H, W, 3) uint8: discs of photographs that all move by SPEED in one direction over a still background of half contrast.

    Places, sizes, rotations, colours and the background are random. Each path is symmetric in time about its middle and the frame is a torus for
    it, so that a direction and its opposite hold the same frames, in opposite order.
    """
    ground = grounds[rng.integers(len(grounds))]
    side = rng.uniform(SIZE, min(ground.size))
    left, top = rng.uniform(0, ground.width - side), rng.uniform(0, ground.height - side)
    square = ground.resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    clip = (
        0.25
        + 0.5
        * torch.from_numpy(np.array(square)).permute(2, 0, 1).float().expand(FRAMES, -1, -1, -1)
        / 255
    )
    velocity = SPEED * torch.tensor(
        [np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], dtype=torch.float32
    )
    moved = velocity * (torch.arange(FRAMES) - (FRAMES - 1) / 2)[:, None]  # (T, 2), x and y
    grid = torch.stack(
        torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="xy"), dim=-1
    )  # (H, W, 2)
    largest = sprites.radii[1]
    for _ in range(sprites.count):
        photograph, radius, turn = (
            photographs[rng.integers(len(photographs))],
            rng.uniform(*sprites.radii),
            rng.uniform(0, 2 * np.pi),
        )
        photograph = (
            (photograph - 0.5) * rng.uniform(0.7, 1.3)
            + 0.5
            + torch.from_numpy(rng.uniform(-sprites.tint, sprites.tint, (3, 1, 1))).float()
        )
        centre = torch.from_numpy(rng.uniform(0, SIZE + 2 * largest, 2)).float()
        places = (centre + moved) % (SIZE + 2 * largest) - largest  # (T, 2)
        away = grid - places[:, None, None]  # (T, H, W, 2)
        rotation = torch.tensor(
            [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], dtype=torch.float32
        )
        disc = F.grid_sample(
            photograph.clamp(0, 1).expand(FRAMES, -1, -1, -1),
            away @ rotation * (0.75 / radius),
            padding_mode="border",
            align_corners=False,
        )
        cover = (radius + 0.5 - away.norm(dim=-1)).clamp(0, 1)[:, None]
        clip = clip + (disc - clip) * cover
    return (clip * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def encode(path: Path, frames: np.ndarray, codec: str = "libx264") -> None:
    """Write frames (T, H, W, 3) uint8 at 30 frames/s, by "libx264" or, which is quicker to read, "mpeg4"."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec,
            rate=30,
            options={"crf": "14", "preset": "veryfast"} if codec == "libx264" else {},
        )
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = (
            SIZE,
            SIZE,
            "yuv420p",
            1,
        )
        if codec == "mpeg4":
            stream.bit_rate, stream.codec_context.qmin, stream.codec_context.qmax = 4_000_000, 1, 3
        for frame in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                )
            )
        container.mux(stream.encode())


def make_videos(folder: Path, clips: tuple[int, int, int], shuffled: bool) -> None:
    """{folder}/{train,val,test}/{direction}/NUMBER.mp4, a function of code and samples alone. shuffled: frames in random order."""
    for kind, (split, count) in enumerate(zip(("train", "val", "test"), clips, strict=True)):
        photographs, grounds = pictures(split)
        for number in range(count):
            rng, name = np.random.default_rng((kind, number)), DIRECTIONS[number % len(DIRECTIONS)]
            frames = moving_clip(rng, photographs, grounds, int(name))
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            encode(
                folder / split / name / f"{number:05d}.mp4",
                rng.permutation(frames) if shuffled else frames,
            )


def labelled_subset(folder: Path, labels: int, seed: int, lines: int, manifest: Path) -> None:
    """A manifest of `labels` random videos per class, drawn by the seed, all repeated until there are at least that many lines."""
    rows = []
    for name in DIRECTIONS:
        files = sorted((folder / "train" / name).iterdir())
        rows += [
            (str(files[place]), name)
            for place in np.random.default_rng((9, seed, labels)).permutation(len(files))[:labels]
        ]
    rows *= -(-lines // len(rows))
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])


def read_log(path: Path, key: str) -> list[float]:
    """A value of each epoch of a script's log."""
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def read_predictions(path: Path) -> tuple[float, float]:
    """Percent of clips whose class is right, and percent whose class scores above the opposite direction; of two that are not among the best five
    scores neither is above the other: half a hit."""
    right, above, half = [], [], len(DIRECTIONS) // 2
    for row in csv.DictReader(path.read_text().splitlines()):
        scores = {row[f"top{place}"]: float(row[f"score{place}"]) for place in range(1, 6)}
        opposite = DIRECTIONS[(DIRECTIONS.index(row["label"]) + half) % len(DIRECTIONS)]
        own, other = scores.get(row["label"], 0.0), scores.get(opposite, 0.0)
        right.append(row["top1"] == row["label"])
        above.append((own > other) + (own == other) / 2)
    return 100 * statistics.mean(right), 100 * statistics.mean(above)


def seconds() -> np.ndarray:
    """Wall and CPU seconds so far, CPU with the loader's processes that have ended."""
    times = os.times()
    return np.array(
        [
            time.perf_counter(),
            times.user + times.system + times.children_user + times.children_system,
        ]
    )


class Bench:
    """The runs of a setting: what is done stands in the JSON and is not done again."""

    def __init__(self, setting: str, work: Path, out: Path):
        self.setting, self.json = (
            SETTINGS[setting],
            out / ("learning.json" if setting == "full" else f"learning_{setting}.json"),
        )
        self.about = {
            "setting": setting,
            **self.setting,
            "pretrain": PRETRAIN,
            "finetune": FINETUNE,
            "clip": [SIZE, FRAMES, SPRITES, SPEED, RADII],
        }
        self.about = json.loads(json.dumps(self.about))
        self.work = (
            work / f"learning_{hashlib.sha256(json.dumps(self.about).encode()).hexdigest()[:8]}"
        )
        self.work.mkdir(parents=True, exist_ok=True)
        self.runs, old = {}, json.loads(self.json.read_text()) if self.json.exists() else {}
        if all(old.get(key) == value for key, value in self.about.items()):
            self.runs = old["runs"]

    def once(self, name: str, work) -> dict:
        """The record of a run: read, or made by `work` and written with its time."""
        if name not in self.runs:
            start = seconds()
            with open(self.work / "log.txt", "a") as log, contextlib.redirect_stdout(log):
                record = work()
            wall, cpu = (seconds() - start).round(1).tolist()
            self.runs[name] = record | {"wall_s": wall, "cpu_s": cpu}
            machine = {
                "cores": usable_cores(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "av": av.__version__,
                "cpu": cpu_name(),
                "python": platform.python_version(),
            }
            self.json.write_text(
                json.dumps(self.about | machine | {"runs": self.runs}, indent=1) + "\n"
            )
            print0(
                f"{name}: "
                + ", ".join(
                    f"{key} {value}"
                    for key, value in self.runs[name].items()
                    if isinstance(value, (int, float))
                )
            )
        return self.runs[name]

    def videos(self, kind: str) -> None:
        """The videos of a kind (ordered, shuffled)."""
        folder = self.work / kind

        def work() -> dict:
            make_videos(folder, self.setting["clips"], kind == "shuffled")
            return {"bytes": sum(path.stat().st_size for path in folder.rglob("*.mp4"))}

        if not folder.exists():
            self.runs.pop(f"{kind} videos", None)
        self.once(f"{kind} videos", work)

    def pretraining(self) -> None:
        """Pretrain on the ordered videos, without their labels."""
        folder = self.work / "ordered"

        def work() -> dict:
            places = f"--data_dirs {folder}/train --output_dir {self.work} --datafile_dir {self.work} --save_prefix mae"
            extra = f"{self.setting['loader']} {self.setting['repeats']} --epochs {self.setting['epochs']}"
            pretrain.main([*PRETRAIN.split(), *places.split(), *extra.split()])
            return {"loss": read_log(self.work / "mae_log.txt", "train_loss")}

        if not (self.work / "mae.pth").exists():
            self.runs.pop("pretraining", None)
        self.once("pretraining", work)

    def finetuned(self, kind: str, arm: str, labels: int, lr: float, seed: int, steps: int) -> str:
        """Finetune; the run's name. Its record has the validation accuracy."""
        name, folder = f"{kind} {arm} {labels} labels lr {lr:g} seed {seed}", self.work / kind
        prefix = name.replace(" ", "_")

        def work() -> dict:
            labelled_subset(
                folder,
                labels,
                seed,
                VIDEOS * steps // VALIDATIONS,
                folder / "lists" / f"{prefix}.csv",
            )
            extra = (
                f"--train_csv {folder}/lists/{prefix}.csv --val_dir {folder}/val --output_dir {folder}/runs --datafile_dir {folder}/runs "
                f"--save_prefix {prefix} --max_steps {steps} --lr {lr} --seed {seed} {self.setting['loader']}".split()
            )
            extra += [] if arm.startswith("scratch") else ["--finetune", str(self.work / "mae.pth")]
            finetune.main(
                [*FINETUNE.split(), *extra, *(["--freeze_backbone"] if arm == "probe" else [])]
            )
            return {"val_acc": read_log(folder / "runs" / f"{prefix}_log.txt", "test_acc1")}

        self.once(name, work)
        return name

    def tested(self, kind: str, name: str) -> None:
        """Evaluate the last checkpoint of a finetuning on the test clips."""
        folder, prefix = self.work / kind, name.replace(" ", "_")

        def work() -> dict:
            extra = f"--eval --resume {folder}/runs/{prefix}.pth --val_dir {folder}/test --output_dir {folder}/runs --datafile_dir {folder}/runs"
            finetune.main(
                [
                    *FINETUNE.split(),
                    *extra.split(),
                    *self.setting["loader"].split(),
                    "--save_prefix",
                    prefix,
                ]
            )
            accuracy, pairs = read_predictions(folder / "runs" / f"{prefix}_test_predictions.csv")
            return {"acc": accuracy, "pairs": pairs}

        self.once(f"{name} test", work)

    def arm(self, kind: str, arm: str, labels: int, steps: int, lrs: tuple[float, ...]) -> float:
        """All seeds of an arm at a budget: with each learning rate, then on the test clips the one that is best in validation. Returns that."""
        names = {
            lr: [
                self.finetuned(kind, arm, labels, lr, seed, steps)
                for seed in range(self.setting["seeds"])
            ]
            for lr in lrs
        }
        best = max(
            lrs,
            key=lambda lr: statistics.mean(self.runs[name]["val_acc"][-1] for name in names[lr]),
        )
        for name in names[best]:
            self.tested(kind, name)
        return best

    def extra_steps(self) -> int:
        """Updates of finetuning that take as many FLOPs as the pretraining did."""
        mae = flags.parse(pretrain.get_parser(), PRETRAIN.split())
        vit = flags.parse(finetune.get_parser(), FINETUNE.split())
        clips = (
            self.setting["clips"][0]
            // mae.batch_size_per_gpu
            * mae.batch_size_per_gpu
            * mae.repeat_aug
            * self.setting["epochs"]
        )
        spent = clips * pretrain.build_model(mae, torch.device("cpu")).flops_per_clip(
            mae.mask_ratio, mae.mask_type
        )
        return round(
            spent
            / (VIDEOS * REPEATS * build_model(vit, torch.device("cpu"), None).flops_per_clip())
        )

    def run(self) -> None:
        """Everything, the long runs last."""
        setting, chosen = self.setting, {}
        self.videos("ordered")
        self.pretraining()
        for labels in setting["labels"]:
            for arm, lrs in setting["lrs"].items():
                chosen[arm, labels] = self.arm("ordered", arm, labels, setting["steps"], lrs)
        self.videos("shuffled")
        for labels in setting["control_at"]:
            self.arm(
                "shuffled", "pretrained", labels, setting["steps"], (chosen["pretrained", labels],)
            )
        if setting["compute_at"]:
            labels = setting["compute_at"]
            self.arm(
                "ordered",
                "scratch+compute",
                labels,
                setting["steps"] + self.extra_steps(),
                (chosen["scratch", labels],),
            )


def cpu_name() -> str:
    """The processor's name."""
    names = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def test_scores(runs: dict, kind: str, arm: str, labels: int, score: str) -> list[float]:
    """The test results of all seeds, "acc" or "pairs"."""
    return [
        record[score]
        for name, record in runs.items()
        if name.startswith(f"{kind} {arm} {labels} labels") and name.endswith(" test")
    ]


ARMS = {
    "pretrained": "pretrained",
    "scratch": "from scratch",
    "scratch+compute": "scratch, pretraining's FLOPs on top",
    "probe": "linear probe",
}


def table(result: dict) -> str:
    """The result as Markdown."""

    def cell(values: list[float]) -> str:
        return (
            f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
            if values
            else "-"
        )

    runs = result["runs"]
    wall, cpu = (sum(record[key] for record in runs.values()) / 60 for key in ("wall_s", "cpu_s"))
    lines = [
        f"Test accuracy in percent over {len(DIRECTIONS)} directions (chance {100 / len(DIRECTIONS):.1f}), {result['clips'][2]} clips: mean of "
        f"{result['seeds']} seeds (lowest-highest). {result['clips'][0]} unlabelled clips, {result['steps']} updates of finetuning for every arm.",
        "",
        "| labels a class | "
        + " | ".join(ARMS.values())
        + " | opposite directions: pretrained | scratch | control, frames shuffled |",
        "| --- " * (len(ARMS) + 4) + "|",
    ]
    for labels in result["labels"]:
        cells = [cell(test_scores(runs, "ordered", arm, labels, "acc")) for arm in ARMS]
        cells += [
            cell(test_scores(runs, kind, arm, labels, "pairs"))
            for kind, arm in (
                ("ordered", "pretrained"),
                ("ordered", "scratch"),
                ("shuffled", "pretrained"),
            )
        ]
        lines.append(f"| {labels} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Opposite directions: percent of clips whose direction scores above its opposite (chance 50). "
        f"{wall:.0f} minutes, {cpu:.0f} CPU minutes; "
        f"{result['cores']} cores ({result['cpu']}), {result['threads']} thread and {2 if result['loader'] else 1} loader process(es), "
        f"torch {result['torch']}, python {result['python']}.",
    ]
    return "\n".join(lines) + "\n"


def curves_picture(result: dict) -> Image.Image:
    """Three panels: pretraining loss per epoch, validation accuracy over finetuning at the smallest budget, test accuracy over label budgets."""
    runs, few = result["runs"], result["labels"][0]
    colours = {"pretrained": "blue", "scratch": "grey", "probe": "orange"}
    losses = [("pretrained", list(enumerate(runs["pretraining"]["loss"], 1)))]
    training = [
        (arm, list(enumerate(record["val_acc"], 1)))
        for arm in result["lrs"]
        for name, record in runs.items()
        if name.startswith(f"ordered {arm} {few} labels") and f"{name} test" in runs
    ]
    budgets = [
        (
            arm,
            [
                (place, score)
                for place, labels in enumerate(result["labels"])
                for score in test_scores(runs, "ordered", arm, labels, "acc")
            ],
        )
        for arm in result["lrs"]
    ]
    panels = (
        ("pretraining loss over epochs", losses, 0),
        (f"validation % in finetuning, {few} labels a class", training, 100),
        (f"test % over {', '.join(map(str, result['labels']))} labels a class", budgets, 100),
    )
    picture = Image.new("RGB", (340 * len(panels), 300), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (title, lines, top) in enumerate(panels):
        points = [point for _, line in lines for point in line]
        top, first, last = (
            top or 1.1 * max(y for _, y in points),
            min(x for x, _ in points),
            max(x for x, _ in points),
        )
        left, right, low = 340 * panel + 50, 340 * panel + 320, 250
        draw.line([(left, 20), (left, low), (right, low)], fill="black")
        draw.text((left - 6, 20), f"{top:.3g}", fill="black", anchor="rm")
        draw.text((left - 6, low), "0", fill="black", anchor="rm")
        for number, (name, line) in enumerate(lines):
            placed = [
                (
                    left + 12 + (right - left - 24) * (x - first) / max(last - first, 1),
                    low - (low - 20) * y / top,
                )
                for x, y in line
            ]
            if lines is not budgets:
                draw.line(placed, fill=colours[name], width=2)
            for x, y in placed:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colours[name])
            if name not in [before for before, _ in lines[:number]]:
                draw.text(
                    (left + 12 + 90 * list(dict(lines)).index(name), low + 14),
                    name,
                    fill=colours[name],
                    anchor="lm",
                )
        draw.text(((left + right) / 2, 284), title, fill="black", anchor="mm")
    return picture


def main(argv: list[str] | None = None) -> dict:
    """Make what is missing, write JSON, table and curves, print the table. Returns the content of the JSON."""
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
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the results (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more are slower for a model of this size
    bench = Bench(args.setting, args.work, args.out)
    bench.run()
    result = json.loads(bench.json.read_text())
    bench.json.with_suffix(".md").write_text(table(result))
    curves_picture(result).save(bench.json.with_suffix(".png"))
    print0(table(result))
    return result


if __name__ == "__main__":
    main()
