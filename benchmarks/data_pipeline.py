"""What it costs to feed the model: decoding, augmentation, the loader, and training from files.

    python benchmarks/data_pipeline.py                 # all parts but the million rows; about five minutes on two cores
    python benchmarks/data_pipeline.py --part rows     # start-up and memory with a manifest of a million rows

Makes its own H.264 files of ten seconds from samples/ (real pictures in motion): four sizes and key frame distances. Per clip: CPU time of one
core, the methods taking turns over the same windows, medians over --rounds. Two opponents are written out below: `window` decodes every
frame of the clip's span with decord, `video` every frame of the file with PyAV, and both then crop in float, as the ancestors did.
Writes benchmarks/results/data_PART.json and data_pipeline.md.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms import v2

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from data import probe
from data.decode import VideoInfo, describe, frame_indices, open_video, read_image
from data.index import read_manifest
from data.loaders import ClipDataset, EpochSampler, Feed, on_device
from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize, seeded, train_transform
from models_mae import MaskedAutoencoderViT
from models_vit import named_size
from util.dist import print0, usable_cores
from util.optim import make_optimizer, pretrain_groups, update

RESULTS = ROOT / "benchmarks" / "results"
FILES = {  # name: width, height, frames between key frames, B-frames
    "340x256 GOP 250": (340, 256, 250, 3),
    "340x256 GOP 16": (340, 256, 16, 2),
    "640x360 GOP 250": (640, 360, 250, 3),
    "1280x720 GOP 250": (1280, 720, 250, 3),
}
CLIP = {"num_frames": 16, "sampling_rate": 4}
CROP = train_transform(224, (0.5, 1.0), (0.75, 1.3333), True, 0.0)


def write_file(
    path: Path, width: int, height: int, gop: int, b_frames: int, frames: int = 300
) -> None:
    """Ten seconds of H.264: a wall of photographs drifting by, with a real video shining through it."""
    pictures = [
        np.asarray(read_image(str(file)).resize((128, 128)))
        for file in sorted(ROOT.glob("samples/images/train/*/*.jpg"))[:96]
    ]
    wall = np.concatenate(
        [np.concatenate(pictures[row * 12 : row * 12 + 12], axis=1) for row in range(8)]
    )  # (1024, 1536, 3)
    clips = [str(file) for file in sorted(ROOT.glob("samples/videos/train/person*/*.mp4"))]
    inside = (frame for clip in clips for frame in av.open(clip).decode(video=0))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=30, options={"crf": "23", "sc_threshold": "0"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for number in range(frames):
            x, y = (
                (number * 3 // 2) % (1536 - width),
                int((1024 - height) * (0.5 + 0.5 * np.sin(number / 40))),
            )
            picture = (
                next(inside)
                .reformat(width, height, format="rgb24", interpolation="BICUBIC")
                .to_ndarray()
            )
            mixed = (0.5 * picture + 0.5 * wall[y : y + height, x : x + width]).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(mixed, format="rgb24")))
        container.mux(stream.encode())


def float_crops(frames: np.ndarray, repeats: int) -> torch.Tensor:
    """The ancestors' augmentation of (T, H, W, C) uint8: normalise all pixels in float, then crop and mirror each repeat."""
    video = torch.from_numpy(frames).float() / 255
    video = ((video - 0.45) / 0.225).permute(0, 3, 1, 2)
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.5, 1.0), ratio=(0.75, 1.3333), antialias=False),
            v2.RandomHorizontalFlip(),
        ]
    )
    return torch.stack([crop(video).transpose(0, 1) for _ in range(repeats)])


def window_opponent(
    path: str, info: VideoInfo, start: float, stride: int, repeats: int
) -> torch.Tensor:
    """Decodes every frame of the span with decord, keeps those of the clip, crops in float."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    wanted = frame_indices(len(reader), info.fps, num_frames=16, sampling_rate=stride, start=start)
    span = reader.get_batch(np.arange(wanted[0], wanted[-1] + 1)).asnumpy()
    return float_crops(span[wanted - wanted[0]], repeats)


def video_opponent(
    path: str, info: VideoInfo, start: float, stride: int, repeats: int
) -> torch.Tensor:
    """Decodes the whole file with PyAV, keeps the frames of the clip, crops in float."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = frame_indices(len(frames), info.fps, num_frames=16, sampling_rate=stride, start=start)
    return float_crops(np.stack([frames[index] for index in wanted]), repeats)


def ours(decoder: str):
    """This project's path, as ClipDataset takes it with an index."""

    def read(path: str, info: VideoInfo, start: float, stride: int, repeats: int) -> torch.Tensor:
        with open_video(path, decoder, 256, info) as video:
            wanted = frame_indices(
                video.num_frames, video.fps, num_frames=16, sampling_rate=stride, start=start
            )
            window = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)
        return torch.stack([CROP(window).permute(0, 2, 3, 1) for _ in range(repeats)]).permute(
            0, 4, 1, 2, 3
        )

    return read


def decode_only(decoder: str):
    """Only the reading of frames, without crops."""

    def read(path: str, info: VideoInfo, start: float, stride: int, repeats: int) -> np.ndarray:
        with open_video(path, decoder, 256, info) as video:
            return video.read(
                frame_indices(
                    video.num_frames, video.fps, num_frames=16, sampling_rate=stride, start=start
                )
            )

    return read


METHODS = {
    "pyav": ours("pyav"),
    "decord": ours("decord"),
    "window": window_opponent,
    "video": video_opponent,
    "pyav, frames only": decode_only("pyav"),
    "decord, frames only": decode_only("decord"),
}


def time_clips(
    path: str, names: list[str], stride: int, repeats: int, rounds: int
) -> dict[str, float]:
    """Median CPU seconds of reading a video once, per method; the methods take turns."""
    info, starts = describe(path), np.random.default_rng(0).random(rounds + 1)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number, start in enumerate(starts):
        for name in names if number % 2 else names[::-1]:
            with seeded(number):
                begun = time.process_time()
                METHODS[name](path, info, float(start), stride, repeats)
                spent[name].append(time.process_time() - begun)
    return {
        name: statistics.median(values[1:]) for name, values in spent.items()
    }  # the first is a warm-up


def part_clips(files: dict[str, str], args) -> dict:
    """Reading and cropping, one core: every file at stride 4 with 1 and 4 repeats, then strides on the first."""
    torch.set_num_threads(1)
    found = {"files": {}, "strides": {}}
    for name, path in files.items():
        record = {"kbit_per_s": round(os.path.getsize(path) * 8 / 10 / 1000)}
        for repeats in (1, 4):
            slow = ["video"] if repeats == 1 or "340" in name else []
            record[f"seconds_at_{repeats}"] = time_clips(
                path, ["pyav", "decord", "window", *slow], 4, repeats, args.rounds
            )
        record["frames_only"] = time_clips(
            path, ["pyav, frames only", "decord, frames only"], 4, 1, args.rounds
        )
        found["files"][name] = record
        print0(name, json.dumps(record))
    first = next(iter(files.values()))
    for stride in (1, 2, 4, 8):
        found["strides"][stride] = time_clips(
            first, ["pyav, frames only", "decord, frames only"], stride, 1, args.rounds
        )
    return found


def clip_dataset(
    paths: list[str],
    repeats: int,
    decoder: str,
    known: probe.VideoIndex | None,
    tokens: int = 1568,
    size: int = 224,
) -> ClipDataset:
    """The pretraining clips of some files."""
    return ClipDataset(
        paths=paths,
        labels=None,
        **CLIP,
        target_fps=30,
        repeat_aug=repeats,
        repeat_windows=1,
        transform=CROP
        if size == 224
        else train_transform(size, (0.5, 1.0), (0.75, 1.3333), True, 0.0),
        decoder=decoder,
        short_side=256,
        seed=0,
        noise_tokens=tokens,
        known=known,
    )


def feed_of(dataset: ClipDataset, batch: int, workers: int) -> Feed:
    """The project's loader."""
    return Feed(
        dataset,
        EpochSampler(len(dataset), batch, 1, 0, 1, 0),
        batch_size=batch,
        num_workers=workers,
        pin_memory=False,
        seconds=60,
        quarantine=Path(os.devnull),
    )


def index_of(paths: list[str]) -> probe.VideoIndex:
    """An index of a few files that repeat."""
    index, known = probe.start(paths, None), {path: describe(path) for path in set(paths)}
    for place, path in enumerate(paths):
        index.fill(place, known[path])
    return index


def part_loader(files: dict[str, str], args) -> dict:
    """The real loader at 0 to N workers, clips per second of wall time."""
    found, torch_threads = {}, torch.get_num_threads()
    for name in ("340x256 GOP 250", "340x256 GOP 16"):
        paths = [files[name]] * 160
        known = index_of(paths)
        for repeats in (1, 4):
            for decoder in ("decord", "pyav"):
                for workers in range(usable_cores() + 1):
                    torch.set_num_threads(1)
                    feed = feed_of(clip_dataset(paths, repeats, decoder, known), 4, workers)
                    batches = iter(feed)
                    for _ in range(
                        4 if not workers else 4 * workers
                    ):  # what the workers had prepared while we did not look
                        next(batches)
                    begun, count = time.perf_counter(), 0
                    for _batch in batches:
                        count += 4 * repeats
                    found[f"{name}, {decoder}, {repeats} repeats, {workers} workers"] = count / (
                        time.perf_counter() - begun
                    )
        print0(name, json.dumps({key: round(value) for key, value in found.items()}))
    torch.set_num_threads(torch_threads)
    return found


def part_end_to_end(files: dict[str, str], args) -> dict:
    """Three rates of one training: the step on clips in memory, the loader alone, and both together (one worker, one torch thread)."""
    torch.set_num_threads(1)
    device, found = torch.device("cpu"), {}
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        **named_size("mae_vit_tiny_patch16", None),
        img_size=112,
        num_frames=16,
        t_patch_size=2,
        decoder_embed_dim=128,
        decoder_depth=1,
        decoder_num_heads=4,
        pred_t_dim=16,
    )
    optimizer = make_optimizer(pretrain_groups(model, 0.05), model.parameters(), (0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(batch: dict) -> None:
        clips, noise = batch["clips"].flatten(0, 1), batch["noise"].flatten(0, 1)
        model(normalize(clips, VIDEO_MEAN, VIDEO_STD), 0.9, "random", noise)[0].backward()
        update(optimizer, scaler, 1.0)

    paths = [files["340x256 GOP 16"]] * 120
    known = index_of(paths)
    for decoder in ("decord", "pyav"):
        feeds = [
            feed_of(clip_dataset(paths, 4, decoder, known, model.num_tokens, 112), 2, 1)
            for _ in range(2)
        ]
        loader = on_device(feeds[0], device)
        first = next(loader)
        alone, _ = rate_of(iter([first] * 50), step)
        loading, _ = rate_of(loader, lambda batch: None)
        together, waited = rate_of(on_device(feeds[1], device), step)
        found[decoder] = {
            "step alone": alone,
            "loader alone": loading,
            "together": together,
            "share waiting": waited,
        }
        print0(decoder, json.dumps(found[decoder]))
    return found


def rate_of(batches, act) -> tuple[float, float]:
    """Clips per second of wall time over the rest of some batches, after eight of them, and the share of it spent waiting for one."""
    for _, batch in zip(range(8), batches, strict=False):
        act(batch)
    begun = asked = time.perf_counter()
    waited, count = 0.0, 0
    for batch in batches:
        waited += time.perf_counter() - asked
        act(batch)
        count += batch["clips"].shape[:2].numel()
        asked = time.perf_counter()
    return count / (asked - begun), waited / (asked - begun)


def memory_mib(process: int | str = "self") -> dict[str, float]:
    """Private and proportional memory of a process in MiB."""
    lines = [
        line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    ]
    sizes = {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines}
    return {
        "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "proportional": sizes["Pss"],
    }


def part_rows(files: dict[str, str], args) -> dict:
    """A manifest of --rows rows (many spellings of one path to a small video): start-up, and memory of two workers while they read."""
    import multiprocessing

    folder = Path(next(iter(files.values()))).parent
    write_file(folder / "small.mp4", 64, 64, 16, 2, frames=32)
    bits = [("/", "/./")[digit] for digit in (0, 1)]
    spelled = ["".join(bits[number >> bit & 1] for bit in range(20)) for number in range(args.rows)]
    manifest = folder / "rows.csv"
    manifest.write_text("\n".join(f"{folder}{spelling}small.mp4" for spelling in spelled) + "\n")
    del spelled
    info = describe(str(folder / "small.mp4"))
    paths = read_manifest(manifest)[0]
    index = probe.start(paths, None)
    index.fill(0, info)
    for field in index.rows.dtype.names:
        if field != "file":
            index.rows[field] = index.rows[field][0]
    probe.save(probe.index_path(manifest), index)
    del index, paths
    begun, before = time.perf_counter(), memory_mib()
    paths = read_manifest(manifest)[0]
    read = time.perf_counter()
    index = probe.load(manifest, paths)
    mapped = time.perf_counter()
    dataset = clip_dataset(paths, 1, args.decoder, index, 16, 32)
    del paths
    feed = feed_of(dataset, 32, 2)
    ready = time.perf_counter()
    found = {
        "rows": args.rows,
        "decoder": args.decoder,
        "bytes_per_path": round(manifest.stat().st_size / args.rows),
        "seconds": {
            "manifest": read - begun,
            "index": mapped - read,
            "dataset": ready - mapped,
            "together": ready - begun,
        },
        "main process": {"before": before, "after": memory_mib()},
        "workers": [],
    }
    for number, _batch in enumerate(feed):
        if number == 0:
            found["seconds"]["first batch"] = time.perf_counter() - ready
        if number % (args.samples // 32 // 10) == 0:
            workers = [memory_mib(child.pid) for child in multiprocessing.active_children()]
            found["workers"].append(
                {"samples": 32 * (number + 1)}
                | {key: max(worker[key] for worker in workers) for key in workers[0]}
            )
            print0(json.dumps(found["workers"][-1]))
        if 32 * number >= args.samples:
            break
    return found


PARTS = {
    "clips": part_clips,
    "loader": part_loader,
    "end_to_end": part_end_to_end,
    "rows": part_rows,
}


def machine() -> dict:
    """What this was measured on."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (
            line.split(":")[1].strip()
            for line in described.splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "cpu": model or platform.machine(),
        "cores": usable_cores(),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "torchvision", "av", "decord")}


def tables() -> str:
    """The Markdown tables of all results that are there."""
    found = {
        part: json.loads((RESULTS / f"data_{part}.json").read_text())
        for part in PARTS
        if (RESULTS / f"data_{part}.json").exists()
    }
    lines = ["Made by `benchmarks/data_pipeline.py` from the JSON files beside this one.", ""]
    for part, record in found.items():
        lines += [
            f"## {part}",
            "",
            ", ".join(f"{key} {value}" for key, value in record["machine"].items()),
            "",
        ]
        result = record["result"]
        if part == "clips":
            lines += [
                "Clips of 16 frames at stride 4, cropped to 224 px, from 10 s of H.264: clips/s of one core; in brackets, times `window`.",
                "",
                "| file | kbit/s | repeats | pyav | decord | window | video |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]
            for name, file in result["files"].items():
                for repeats in (1, 4):
                    times = file[f"seconds_at_{repeats}"]
                    cells = [
                        f"{repeats / times[method]:.1f} ({times['window'] / times[method]:.2f}x)"
                        if method in times
                        else "-"
                        for method in ("pyav", "decord", "window", "video")
                    ]
                    lines.append(
                        f"| {name} | {file['kbit_per_s']} | {repeats} | {' | '.join(cells)} |"
                    )
            lines += ["", "Frames only, without crops: CPU milliseconds per clip.", ""]
            lines += [
                "| file | stride | pyav | decord | decord / pyav |",
                "| --- | --- | --- | --- | --- |",
            ]
            first = next(iter(result["files"]))
            pairs = [(name, 4, file["frames_only"]) for name, file in result["files"].items()]
            pairs += [(first, stride, times) for stride, times in result["strides"].items()]
            for name, stride, times in pairs:
                fast, slow = times["pyav, frames only"], times["decord, frames only"]
                lines.append(
                    f"| {name} | {stride} | {1000 * fast:.1f} | {1000 * slow:.1f} | {slow / fast:.2f}x |"
                )
        elif part == "loader":
            lines += [
                "The loader alone, wall time: clips/s.",
                "",
                "| file, decoder, repeats, workers | clips/s |",
                "| --- | --- |",
            ]
            lines += [f"| {name} | {rate:.0f} |" for name, rate in result.items()]
        elif part == "end_to_end":
            lines += [
                "Training `mae_vit_tiny_patch16` (16 x 112², one torch thread) from 340x256 GOP 16 with 4 repeats and one worker: clips/s.",
                "",
                "| decoder | step alone | loader alone | together | waiting for data |",
                "| --- | --- | --- | --- | --- |",
            ]
            lines += [
                f"| {name} | {rate['step alone']:.1f} | {rate['loader alone']:.1f} | {rate['together']:.1f} | {rate['share waiting']:.1%} |"
                for name, rate in result.items()
            ]
        else:
            seconds = ", ".join(
                f"{name} {value:.2f} s" for name, value in result["seconds"].items()
            )
            lines += [
                f"A manifest of {result['rows']:,} rows of {result['bytes_per_path']} bytes with an index, {result['decoder']}: {seconds}.",
                "",
                "| samples read | private memory of the larger worker | with its share of the common |",
                "| --- | --- | --- |",
            ]
            lines += [
                f"| {row['samples']:,} | {row['private']:.0f} MiB | {row['proportional']:.0f} MiB |"
                for row in result["workers"]
            ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure the parts that are asked for, and write JSON and tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", choices=PARTS, nargs="+", default=["clips", "loader", "end_to_end"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100_000, help="how many of the rows to read")
    parser.add_argument(
        "--decoder", choices=("decord", "pyav"), default="pyav", help="for --part rows"
    )
    parser.add_argument("--keep", help="folder for the files, kept (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: str(folder / f"{name.replace(' ', '_')}.mp4") for name in FILES}
        for name, path in files.items():
            if not os.path.exists(path) and (args.part != ["rows"] or name == next(iter(FILES))):
                write_file(Path(path), *FILES[name])
        for part in args.part:
            record = {"machine": machine(), "result": PARTS[part](files, args)}
            (RESULTS / f"data_{part}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "data_pipeline.md").write_text(tables())
    print0((RESULTS / "data_pipeline.md").read_text())


if __name__ == "__main__":
    main()
