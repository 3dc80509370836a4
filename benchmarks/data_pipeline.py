"""Measure the input pipeline: decoding, augmentation, the loader, and training from files.

    python benchmarks/data_pipeline.py                # all parts but "rows"; 5 minutes on two cores
    python benchmarks/data_pipeline.py --part rows    # start-up and memory with a million rows

Makes H.264 files of ten seconds from samples/ (real pictures in motion), with four frame sizes and
keyframe distances. The times per clip are CPU times of one core; the methods take turns over the
same windows, and the results are medians over --rounds. Two methods serve as baselines: `window`
decodes every frame of the clip's span with decord, `video` every frame of the file with PyAV. Both
then crop in float, as the ancestors did. Writes benchmarks/results/data_PART.json and
data_pipeline.md.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from torchvision.transforms import v2

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from data import video_index
from data.clips import ClipSampling, frame_indices
from data.datasets import ClipDataset
from data.decode import describe, open_video
from data.images import read_image
from data.loader import FaultTolerantLoader, WorkerSettings, on_device
from data.manifest import read_manifest
from data.samplers import EpochSampler
from data.transforms import train_transform
from data.video import VideoInfo
from models_mae import MaskedAutoencoderViT
from models_vit import named_size, normalize
from util.dist import DistEnv, available_cpus, print0
from util.optim import make_optimizer, pretrain_param_groups, update
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.seeds import fork_rng

RESULTS = ROOT / "benchmarks" / "results"


class Encoding(NamedTuple):
    """Frame size and structure of an H.264 file."""

    width: int
    height: int
    gop: int  # frames between keyframes
    b_frames: int
    frames: int = 300  # at 30 frames/s


FILES = {
    "340x256 GOP 250": Encoding(340, 256, 250, 3),
    "340x256 GOP 16": Encoding(340, 256, 16, 2),
    "640x360 GOP 250": Encoding(640, 360, 250, 3),
    "1280x720 GOP 250": Encoding(1280, 720, 250, 3),
}
CROP = train_transform(224, (0.5, 1.0), (0.75, 1.3333), True, 0.0)


def photograph_wall() -> np.ndarray:
    """Return a wall (1024, 1536, 3) of 8 x 12 photographs."""
    photographs = []
    for path in sorted(ROOT.glob("samples/images/train/*/*.jpg"))[:96]:
        photographs.append(np.asarray(read_image(str(path)).resize((128, 128))))
    rows = [np.concatenate(photographs[start : start + 12], axis=1) for start in range(0, 96, 12)]
    return np.concatenate(rows)


def sample_frames() -> Iterator[av.VideoFrame]:
    """Yield the frames of sample videos of persons."""
    for path in sorted(ROOT.glob("samples/videos/train/person*/*.mp4")):
        yield from av.open(str(path)).decode(video=0)


def write_file(path: Path, encoding: Encoding) -> None:
    """Write H.264: a drifting wall of photographs, blended with real videos."""
    width, height = encoding.width, encoding.height
    wall = photograph_wall()
    videos = sample_frames()
    options = {"crf": "23", "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = encoding.gop
        stream.codec_context.max_b_frames = encoding.b_frames
        for index in range(encoding.frames):
            x = (index * 3 // 2) % (1536 - width)
            y = int((1024 - height) * (0.5 + 0.5 * np.sin(index / 40)))
            frame = next(videos).reformat(width, height, format="rgb24", interpolation="BICUBIC")
            background = wall[y : y + height, x : x + width]
            mixed = (0.5 * frame.to_ndarray() + 0.5 * background).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(mixed, format="rgb24")))
        container.mux(stream.encode())


def float_crops(frames: np.ndarray, repeats: int) -> torch.Tensor:
    """Augment frames (T, H, W, C) uint8 as the ancestors did; return clips (R, C, T, H, W).

    All pixels are normalized in float, then each repeat is cropped and mirrored.
    """
    video = torch.from_numpy(frames).float() / 255
    video = ((video - 0.45) / 0.225).permute(0, 3, 1, 2)
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.5, 1.0), ratio=(0.75, 1.3333), antialias=False),
            v2.RandomHorizontalFlip(),
        ]
    )
    return torch.stack([crop(video).transpose(0, 1) for _ in range(repeats)])


def window_baseline(
    path: str, info: VideoInfo, start: float, stride: int, repeats: int
) -> torch.Tensor:
    """Decode every frame of the span with decord, keep those of the clip, crop in float."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    wanted = frame_indices(len(reader), info.fps, ClipSampling(16, stride), start=start)
    span = reader.get_batch(np.arange(wanted[0], wanted[-1] + 1)).asnumpy()
    return float_crops(span[wanted - wanted[0]], repeats)


def video_baseline(
    path: str, info: VideoInfo, start: float, stride: int, repeats: int
) -> torch.Tensor:
    """Decode the whole file with PyAV, keep the frames of the clip, crop in float."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = frame_indices(len(frames), info.fps, ClipSampling(16, stride), start=start)
    return float_crops(np.stack([frames[index] for index in wanted]), repeats)


def ours(decoder: str) -> Callable:
    """Return this project's method: what ClipDataset does with an index."""

    def read(path: str, info: VideoInfo, start: float, stride: int, repeats: int) -> torch.Tensor:
        with open_video(path, decoder, 256, info) as video:
            wanted = frame_indices(
                video.num_frames, video.fps, ClipSampling(16, stride), start=start
            )
            window = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)
        crops = [CROP(window).permute(0, 2, 3, 1) for _ in range(repeats)]
        return torch.stack(crops).permute(0, 4, 1, 2, 3)

    return read


def decode_only(decoder: str) -> Callable:
    """Return a method that reads the frames and makes no crops."""

    def read(path: str, info: VideoInfo, start: float, stride: int, repeats: int) -> np.ndarray:
        with open_video(path, decoder, 256, info) as video:
            wanted = frame_indices(
                video.num_frames, video.fps, ClipSampling(16, stride), start=start
            )
            return video.read(wanted)

    return read


METHODS = {
    "pyav": ours("pyav"),
    "decord": ours("decord"),
    "window": window_baseline,
    "video": video_baseline,
    "pyav, frames only": decode_only("pyav"),
    "decord, frames only": decode_only("decord"),
}


def time_clips(
    path: str, names: list[str], stride: int, repeats: int, rounds: int
) -> dict[str, float]:
    """Return the median CPU seconds of reading a video once, per method; the methods take turns."""
    info = describe(path)
    starts = np.random.default_rng(0).random(rounds + 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn, start in enumerate(starts):
        order = list(names)
        if turn % 2 == 0:
            order.reverse()
        for name in order:
            with fork_rng(turn):
                begin = time.process_time()
                METHODS[name](path, info, float(start), stride, repeats)
                times[name].append(time.process_time() - begin)
    # The first round is a warm-up
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def part_clips(files: dict[str, str], args: argparse.Namespace) -> dict:
    """Measure reading and cropping on one core.

    Every file at stride 4 with 1 and 4 repeats, then all strides on the first file.
    """
    torch.set_num_threads(1)
    frames_only = ["pyav, frames only", "decord, frames only"]
    result = {"files": {}, "strides": {}}
    for name, path in files.items():
        record = {"kbit_per_s": round(os.path.getsize(path) * 8 / 10 / 1000)}
        for repeats in (1, 4):
            methods = ["pyav", "decord", "window"]
            if repeats == 1 or "340" in name:
                methods.append("video")
            record[f"seconds_at_{repeats}"] = time_clips(path, methods, 4, repeats, args.rounds)
        record["frames_only"] = time_clips(path, frames_only, 4, 1, args.rounds)
        result["files"][name] = record
        print0(name, json.dumps(record))
    first = next(iter(files.values()))
    for stride in (1, 2, 4, 8):
        result["strides"][stride] = time_clips(first, frames_only, stride, 1, args.rounds)
    return result


def clip_dataset(
    paths: list[str],
    repeats: int,
    decoder: str,
    known: video_index.VideoIndex | None,
    tokens: int = 1568,
    size: int = 224,
) -> ClipDataset:
    """Return the pretraining clips of some files. tokens: length of the mask noise."""
    transform = CROP
    if size != 224:
        transform = train_transform(size, (0.5, 1.0), (0.75, 1.3333), True, 0.0)
    return ClipDataset(
        paths=paths,
        labels=None,
        sampling=ClipSampling(num_frames=16, sampling_rate=4),
        repeat_aug=repeats,
        repeat_windows=1,
        transform=transform,
        decoder=decoder,
        short_side=256,
        seed=0,
        noise_tokens=tokens,
        known=known,
    )


def feed_of(dataset: ClipDataset, batch: int, workers: int) -> FaultTolerantLoader:
    """Return the project's loader."""
    return FaultTolerantLoader(
        dataset,
        EpochSampler(len(dataset), batch, 1, DistEnv(torch.device("cpu")), 0),
        batch_size=batch,
        workers=WorkerSettings(workers, False, 60, Path(os.devnull)),
    )


def index_of(paths: list[str]) -> video_index.VideoIndex:
    """Return an index of paths, which may repeat."""
    index = video_index.new_index(paths, None)
    infos = {path: describe(path) for path in set(paths)}
    for row, path in enumerate(paths):
        index.set_row(row, infos[path])
    return index


def loader_rate(dataset: ClipDataset, workers: int) -> float:
    """Return the clips per second of wall time of the loader, after its workers have started."""
    batches = iter(feed_of(dataset, 4, workers))
    for _ in range(4 * max(workers, 1)):  # batches that were prefetched before the clock starts
        next(batches)
    begin = time.perf_counter()
    clips = sum(batch["clips"].shape[:2].numel() for batch in batches)
    return clips / (time.perf_counter() - begin)


def part_loader(files: dict[str, str], args: argparse.Namespace) -> dict:
    """Measure the loader with 0 to N workers, in clips per second of wall time."""
    result = {}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("340x256 GOP 250", "340x256 GOP 16"):
        paths = [files[name]] * 160
        index = index_of(paths)
        cases = itertools.product((1, 4), ("decord", "pyav"), range(available_cpus() + 1))
        for repeats, decoder, workers in cases:
            rate = loader_rate(clip_dataset(paths, repeats, decoder, index), workers)
            result[f"{name}, {decoder}, {repeats} repeats, {workers} workers"] = rate
        print0(name, json.dumps({key: round(value) for key, value in result.items()}))
    torch.set_num_threads(torch_threads)
    return result


def training_step(model: MaskedAutoencoderViT) -> Callable[[dict], None]:
    """Return a function that runs an update on a batch."""
    optimizer = make_optimizer(pretrain_param_groups(model, 0.05), model.parameters(), (0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(batch: dict) -> None:
        clips = normalize(batch["clips"].flatten(0, 1), VIDEO_MEAN, VIDEO_STD)
        noise = batch["noise"].flatten(0, 1)
        model(clips, 0.9, "random", noise)[0].backward()
        update(optimizer, scaler, 1.0)

    return step


def part_end_to_end(files: dict[str, str], args: argparse.Namespace) -> dict:
    """Measure a training with one worker and one torch thread.

    Three rates: the step on clips in memory, the loader alone, and both together.
    """
    torch.set_num_threads(1)
    device = torch.device("cpu")
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
    step = training_step(model)
    paths = [files["340x256 GOP 16"]] * 120
    index = index_of(paths)
    result = {}
    for decoder in ("decord", "pyav"):

        def batches(decoder: str = decoder) -> Iterator[dict]:
            dataset = clip_dataset(paths, 4, decoder, index, model.num_tokens, 112)
            return on_device(feed_of(dataset, 2, 1), device)

        loader = batches()
        first = next(loader)
        step_rate, _ = rate_of(iter([first] * 50), step)
        loading_rate, _ = rate_of(loader, lambda batch: None)
        together, waiting = rate_of(batches(), step)
        result[decoder] = {
            "step alone": step_rate,
            "loader alone": loading_rate,
            "together": together,
            "share waiting": waiting,
        }
        print0(decoder, json.dumps(result[decoder]))
    return result


def rate_of(batches: Iterator[dict], act: Callable[[dict], object]) -> tuple[float, float]:
    """Return the clips per second of wall time, and the share of it spent waiting for batches.

    The first eight batches are not counted.
    """
    for batch in itertools.islice(batches, 8):
        act(batch)
    begin = time.perf_counter()
    wait_start = begin
    waited = 0.0
    clips = 0
    for batch in batches:
        waited += time.perf_counter() - wait_start
        act(batch)
        clips += batch["clips"].shape[:2].numel()
        wait_start = time.perf_counter()
    seconds = wait_start - begin
    return clips / seconds, waited / seconds


def memory_mib(process: int | str = "self") -> dict[str, float]:
    """Return the private and proportional memory of a process in MiB."""
    sizes = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, kib = line.split()[:2]
        sizes[name.rstrip(":")] = int(kib) / 1024
    return {
        "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "proportional": sizes["Pss"],
    }


def write_rows(folder: Path, rows: int) -> Path:
    """Write a manifest and its index; return the manifest.

    The rows are different spellings of the path of one small video: "/./" for "/" at 20 places.
    """
    video = folder / "small.mp4"
    write_file(video, Encoding(64, 64, 16, 2, frames=32))
    separators = ("/", "/./")
    manifest = folder / "rows.csv"
    with open(manifest, "w") as file:
        for row in range(rows):
            spelling = "".join(separators[row >> bit & 1] for bit in range(20))
            file.write(f"{folder}{spelling}small.mp4\n")
    index = video_index.new_index(read_manifest(manifest)[0], None)
    index.set_row(0, describe(str(video)))
    for field in index.rows.dtype.names:
        if field != "file":
            index.rows[field] = index.rows[field][0]
    video_index.save_index(video_index.index_path(manifest), index)
    return manifest


def worker_memory(feed: Iterable[dict], samples: int, ready: float) -> tuple[list[dict], float]:
    """Read samples; return the memory of the larger worker at ten points, and the first wait.

    ready: time.perf_counter() before the first batch is requested.
    """
    points = []
    first_wait = 0.0
    for index, _batch in enumerate(feed):
        if index == 0:
            first_wait = time.perf_counter() - ready
        if index % (samples // 32 // 10) == 0:
            workers = [memory_mib(child.pid) for child in multiprocessing.active_children()]
            largest = {key: max(worker[key] for worker in workers) for key in workers[0]}
            points.append({"samples": 32 * (index + 1), **largest})
            print0(json.dumps(points[-1]))
        if 32 * index >= samples:
            break
    return points, first_wait


def part_rows(files: dict[str, str], args: argparse.Namespace) -> dict:
    """Measure start-up, and the memory of two workers, with a manifest of --rows rows."""
    manifest = write_rows(Path(next(iter(files.values()))).parent, args.rows)
    memory_before = memory_mib()
    begin = time.perf_counter()
    paths = read_manifest(manifest)[0]
    read = time.perf_counter()
    index = video_index.load_index(manifest, paths)
    mapped = time.perf_counter()
    dataset = clip_dataset(paths, 1, args.decoder, index, 16, 32)
    del paths
    feed = feed_of(dataset, 32, 2)
    ready = time.perf_counter()
    memory_after = memory_mib()
    workers, first_wait = worker_memory(feed, args.samples, ready)
    return {
        "rows": args.rows,
        "decoder": args.decoder,
        "bytes_per_path": round(manifest.stat().st_size / args.rows),
        "seconds": {
            "manifest": read - begin,
            "index": mapped - read,
            "dataset": ready - mapped,
            "together": ready - begin,
            "first batch": first_wait,
        },
        "main process": {"before": memory_before, "after": memory_after},
        "workers": workers,
    }


PARTS = {
    "clips": part_clips,
    "loader": part_loader,
    "end_to_end": part_end_to_end,
    "rows": part_rows,
}


def cpu_name() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def machine() -> dict:
    """Return the hardware and software of this run."""
    return {
        "cpu": cpu_name(),
        "cores": available_cpus(),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "torchvision", "av", "decord")}


# ---- Tables ----


def clips_table(result: dict) -> list[str]:
    """Return the table of reading and cropping."""
    lines = [
        "Clips of 16 frames at stride 4, cropped to 224 px, from 10 s of H.264: "
        "clips/s of one core; in brackets, times `window`.",
        "",
        "| file | kbit/s | repeats | pyav | decord | window | video |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, file in result["files"].items():
        for repeats in (1, 4):
            times = file[f"seconds_at_{repeats}"]
            cells = [name, str(file["kbit_per_s"]), str(repeats)]
            for method in ("pyav", "decord", "window", "video"):
                cell = "-"
                if method in times:
                    ratio = times["window"] / times[method]
                    cell = f"{repeats / times[method]:.1f} ({ratio:.2f}x)"
                cells.append(cell)
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *frames_table(result)]


def frames_table(result: dict) -> list[str]:
    """Return the table of reading without cropping."""
    lines = [
        "Frames only, without crops: CPU milliseconds per clip.",
        "",
        "| file | stride | pyav | decord | decord / pyav |",
        "| --- | --- | --- | --- | --- |",
    ]
    first = next(iter(result["files"]))
    rows = [(name, 4, file["frames_only"]) for name, file in result["files"].items()]
    rows += [(first, stride, times) for stride, times in result["strides"].items()]
    for name, stride, times in rows:
        pyav = times["pyav, frames only"]
        decord = times["decord, frames only"]
        lines.append(
            f"| {name} | {stride} | {1000 * pyav:.1f} | {1000 * decord:.1f} "
            f"| {decord / pyav:.2f}x |"
        )
    return lines


def loader_table(result: dict) -> list[str]:
    """Return the table of the loader."""
    lines = [
        "The loader alone, wall time: clips/s.",
        "",
        "| file, decoder, repeats, workers | clips/s |",
        "| --- | --- |",
    ]
    return lines + [f"| {name} | {rate:.0f} |" for name, rate in result.items()]


def end_to_end_table(result: dict) -> list[str]:
    """Return the table of training."""
    lines = [
        "Training `mae_vit_tiny_patch16` (16 x 112², one torch thread) from 340x256 GOP 16 with "
        "4 repeats and one worker: clips/s.",
        "",
        "| decoder | step alone | loader alone | together | waiting for data |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rate in result.items():
        lines.append(
            f"| {name} | {rate['step alone']:.1f} | {rate['loader alone']:.1f} "
            f"| {rate['together']:.1f} | {rate['share waiting']:.1%} |"
        )
    return lines


def rows_table(result: dict) -> list[str]:
    """Return the table of a large manifest."""
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in result["seconds"].items())
    lines = [
        f"A manifest of {result['rows']:,} rows of {result['bytes_per_path']} bytes with an index, "
        f"{result['decoder']}: {seconds}.",
        "",
        "| samples read | private memory of the larger worker | with its share of the common |",
        "| --- | --- | --- |",
    ]
    for row in result["workers"]:
        lines.append(
            f"| {row['samples']:,} | {row['private']:.0f} MiB | {row['proportional']:.0f} MiB |"
        )
    return lines


TABLES = {
    "clips": clips_table,
    "loader": loader_table,
    "end_to_end": end_to_end_table,
    "rows": rows_table,
}


def tables() -> str:
    """Return the tables of all existing results as Markdown."""
    lines = ["Made by `benchmarks/data_pipeline.py` from the JSON files beside this one.", ""]
    for part in PARTS:
        path = RESULTS / f"data_{part}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        environment = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
        lines += [f"## {part}", "", environment, "", *TABLES[part](record["result"]), ""]
    return "\n".join(lines)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", choices=PARTS, nargs="+", default=["clips", "loader", "end_to_end"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100_000, help="number of the rows to read")
    parser.add_argument(
        "--decoder", choices=("decord", "pyav"), default="pyav", help="for --part rows"
    )
    parser.add_argument("--keep", help="folder of the files, kept (default: a temporary one)")
    return parser


def main() -> None:
    """Measure the requested parts, and write JSON and tables."""
    args = get_parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: str(folder / f"{name.replace(' ', '_')}.mp4") for name in FILES}
        if args.part != ["rows"]:
            for name, path in files.items():
                if not os.path.exists(path):
                    write_file(Path(path), FILES[name])
        for part in args.part:
            record = {"machine": machine(), "result": PARTS[part](files, args)}
            (RESULTS / f"data_{part}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "data_pipeline.md").write_text(tables())
    print0((RESULTS / "data_pipeline.md").read_text())


if __name__ == "__main__":
    main()
