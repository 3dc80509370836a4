"""Measure the CPU time of reading and cropping a clip: this project, torchcodec, and decord.

    pip install torchcodec    # needs FFmpeg's libraries; without it, its rows are left out
    python benchmarks/readers.py --before 50ad205

A clip has 16 frames at stride 4 from ten seconds of H.264 at 30 frames/s, read at short side 256.
The same transform makes 1, 4 or 16 random crops of 224 pixels. The readers take turns in one
process with one thread. Results are medians, and the median of the pairwise ratios. --before
REVISION loads data/decode.py of an earlier revision, to show the cost of a change. Writes
benchmarks/results/readers.json and .md.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data_pipeline import CROP, FILES, RESULTS, machine, write_file

from data import decode
from data.clips import ClipSampling, frame_indices
from data.decode import describe, open_video
from data.frame_geometry import scaled_size
from data.loader import stack_clips
from data.video import VideoInfo
from util.dist import print0
from util.seeds import fork_rng

SHORT_SIDE = 256
REPEATS = (1, 4, 16)


def wanted_frames(info: VideoInfo, start: float) -> np.ndarray:
    """Return the frame indices (16,) of a clip. start: in [0, 1), position in the video."""
    return frame_indices(info.frames, info.fps, ClipSampling(16, 4), start=start)


def ours(decoder: str) -> Callable:
    """Return this project's reader."""

    def read(path: str, info: VideoInfo, start: float) -> torch.Tensor:
        with open_video(path, decoder, SHORT_SIDE, info) as video:
            return torch.from_numpy(video.read(wanted_frames(info, start)))

    return read


def before(revision: str) -> Callable:
    """Return the PyAV reader of an earlier revision."""
    command = ["git", "-C", str(ROOT), "show", f"{revision}:data/decode.py"]
    source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    module = types.ModuleType("decode_before")
    exec(compile(source, "decode_before.py", "exec"), module.__dict__)
    fields = module.VideoInfo._fields

    def read(path: str, info: VideoInfo, start: float) -> torch.Tensor:
        known = module.VideoInfo(*(getattr(info, field) for field in fields))
        with module.open_video(path, "pyav", SHORT_SIDE, known) as video:
            return torch.from_numpy(video.read(wanted_frames(info, start)))

    return read


def torchcodec(seek_mode: str) -> Callable:
    """Return torchcodec's reader on one thread, which also resizes the frames."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read(path: str, info: VideoInfo, start: float) -> torch.Tensor:
        size = scaled_size(info.width, info.height, SHORT_SIDE)
        transforms = []
        if size is not None:
            width, height = size
            transforms = [Resize((height, width))]
        video = VideoDecoder(
            path,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode=seek_mode,
            transforms=transforms,
        )
        return video.get_frames_at(wanted_frames(info, start).tolist()).data

    return read


def decord_alone(path: str, info: VideoInfo, start: float) -> torch.Tensor:
    """Read a clip with decord, without this project."""
    import decord

    width, height = scaled_size(info.width, info.height, SHORT_SIDE) or (-1, -1)
    video = decord.VideoReader(path, width=width, height=height, num_threads=1)
    return torch.from_numpy(video.get_batch(wanted_frames(info, start).tolist()).asnumpy())


def readers(revision: str | None) -> dict[str, Callable]:
    """Return the readers that can run here, by name."""
    found = {"auto": ours("auto"), "decord": ours("decord")}
    if revision:
        found[f"pyav at {revision}"] = before(revision)
    if decode.decord_installed():
        found["decord alone"] = decord_alone
    try:
        found |= {f"torchcodec, {mode}": torchcodec(mode) for mode in ("approximate", "exact")}
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: no FFmpeg libraries
        print0(f"note: torchcodec is not measured ({str(error).splitlines()[0]})")
    return found


def time_reader(read: Callable, path: str, info: VideoInfo, start: float) -> dict[int, float]:
    """Return the CPU seconds of a clip at each number of repeats: what is read once serves all."""
    begun = time.process_time()
    window = read(path, info, start).permute(0, 3, 1, 2)
    read_seconds = time.process_time() - begun
    found = {}
    for repeats in REPEATS:
        begun = time.process_time()
        stack_clips([CROP(window).transpose(0, 1) for _ in range(repeats)])
        found[repeats] = (read_seconds + time.process_time() - begun) / repeats
    return found


def measure(path: str, named: dict[str, Callable], rounds: int) -> dict[str, dict[int, float]]:
    """Return the median CPU milliseconds per clip by reader and repeats; the readers take turns."""
    info = describe(path)
    starts = np.random.default_rng(0).random(rounds + 1).tolist()
    times: dict[str, list[dict[int, float]]] = {name: [] for name in named}
    for turn, start in enumerate(starts):
        order = list(named)
        if turn % 2 == 0:
            order.reverse()
        for name in order:
            with fork_rng(turn):
                times[name].append(time_reader(named[name], path, info, start))
    counted = {name: found[1:] for name, found in times.items()}  # the first is a warm-up
    result = {name: median_ms(found) for name, found in counted.items()}
    for name in named:
        if " at " in name:
            result[f"auto / {name}"] = median_ratios(counted["auto"], counted[name])
    return result


def median_ms(times: list[dict[int, float]]) -> dict[int, float]:
    """Return the median milliseconds by number of repeats."""
    return {
        repeats: 1000 * statistics.median(found[repeats] for found in times) for repeats in REPEATS
    }


def median_ratios(now: list[dict[int, float]], before: list[dict[int, float]]) -> dict[int, float]:
    """Return the median of the pairwise ratios by number of repeats."""
    pairs = list(zip(now, before, strict=True))
    return {
        repeats: statistics.median(new[repeats] / old[repeats] for new, old in pairs)
        for repeats in REPEATS
    }


def table(result: dict) -> str:
    """Return the result as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    names = list(next(iter(result["files"].values())))
    lines = [
        "# CPU milliseconds per clip, one core",
        "",
        f"Made by `benchmarks/readers.py`: medians of {result['rounds']}; {about}.",
        "",
        "| file | repeats | " + " | ".join(names) + " |",
        "| --- " * (2 + len(names)) + "|",
    ]
    for file, found in result["files"].items():
        for repeats in found[names[0]]:
            cells = [file, repeats]
            for name in names:
                digits = 1
                if "/" in name:  # a ratio
                    digits = 2
                cells.append(f"{found[name][repeats]:.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="REVISION", help="also an earlier revision's reader")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    about = machine() | {"python": platform.python_version()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        about["torchcodec"] = metadata.version("torchcodec")
    files = {}
    named = readers(args.before)
    with tempfile.TemporaryDirectory() as folder:
        for name, encoding in FILES.items():
            path = Path(folder, f"{len(files)}.mp4")
            write_file(path, encoding)
            files[name] = measure(str(path), named, args.rounds)
            print0(name, json.dumps(files[name]))
    result = json.loads(json.dumps({"machine": about, "rounds": args.rounds, "files": files}))
    (args.out / "readers.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "readers.md").write_text(table(result))


if __name__ == "__main__":
    main()
