"""The data doctor: what is in a folder or manifest of videos, what reading it costs, and what to do about it.

python -m data.index VIDEOS [VIDEOS ...]      folders
python -m data.index train.csv                a manifest; its index (data.probe) is written beside it, and used by training
"""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data import probe
from data.decode import ReadError, VideoInfo, clip_indices, decord_installed, describe, open_video
from data.index import find_videos, read_manifest, write_manifest
from data.loaders import Feed, Reading, Samples, ShareSampler
from data.transforms import seeded, train_transform
from util.cli import Parser
from util.dist import UserError, end_progress, print0, show_progress, usable_cores

STAGES = ("open", "seek", "decode", "crop")


class Look(Samples):
    """Looks at each video once: a sample's `clips` is what `describe` says of the file, or None; `bad` has the reason."""

    def read_clips(self, epoch: int, index: int, path: str, info: VideoInfo | None) -> Reading:
        """What the file holds. Raises ReadError."""
        return Reading(describe(path))


class Progress:
    """A progress line: several times a second on a terminal, every 10 s in a file."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.begun, self.said, self.terminal = (
            what,
            total,
            time.time(),
            0.0,
            os.isatty(1),
        )

    def show(self, done: int, note: str = "") -> None:
        """Say how far it is; the last time in any case."""
        now = time.time()
        if done < self.total and now - self.said < (0.2 if self.terminal else 10):
            return
        self.said, left = now, (now - self.begun) / max(done, 1) * (self.total - done)
        width = 30 * done // max(self.total, 1)
        line = f"{self.what} [{'#' * width}{'.' * (30 - width)}] {done}/{self.total}{note}, {left:.0f} s left"
        show_progress(line)
        if done == self.total:
            end_progress()


def build_index(
    paths: list[str], target: Path | None, workers: int, seconds: float
) -> probe.VideoIndex:
    """The index of videos, on `workers` processes; a file that takes longer than `seconds` is unreadable.

    Kept in `target` (if given) every few seconds, from where an interrupted call goes on; files that it knows and that have
    not changed since are not looked at again.
    """
    index = probe.start(paths, probe.open_index(target) if target else None)
    todo = np.flatnonzero(
        index.rows["state"] != probe.READABLE
    )  # what was unreadable may have been a disk's fault
    look = Look([paths[place] for place in todo], None, seed=0, substitutes=0)
    feed = Feed(
        look,
        ShareSampler(len(todo), 0, 1),
        batch_size=16,
        num_workers=workers,
        pin_memory=False,
        seconds=seconds,
        quarantine=Path(os.devnull),
        collate_fn=list,
    )
    progress, done, kept = Progress("looking at videos", len(todo)), 0, time.time()
    for batch in feed if len(todo) else ():
        for sample in batch:
            index.fill(
                int(todo[sample["index"]]),
                sample["clips"],
                sample["bad"][0][1] if sample["bad"] else "",
            )
        done += len(batch)
        progress.show(done)
        if target and time.time() - kept > 10:
            probe.save(target, index)
            kept = time.time()
    if target:
        probe.save(target, index)
    return index


def clip_cost(
    path: str,
    decoder: str,
    short_side: int,
    *,
    num_frames: int = 16,
    sampling_rate: int = 4,
    img_size: int = 224,
    info: VideoInfo | None = None,
    start: float = 0.5,
) -> dict[str, float]:
    """CPU seconds of each stage of reading a clip of a video and cropping it; see STAGES. Raises ReadError."""
    transform = train_transform(img_size, (0.5, 1.0), (0.75, 1.3333), True, 0.0)
    clock = [time.process_time()]
    with open_video(path, decoder, short_side, info) as video:
        clock.append(time.process_time())
        wanted = clip_indices(
            video, num_frames=num_frames, sampling_rate=sampling_rate, start=start
        )
        video.seek(int(wanted[0]))
        clock.append(time.process_time())
        window = torch.from_numpy(video.read(wanted)).permute(0, 3, 1, 2)
        clock.append(time.process_time())
    with seeded(0):
        transform(window)
    clock.append(time.process_time())
    return dict(zip(STAGES, np.diff(clock).tolist(), strict=True))


def measure(paths: list[str], index: probe.VideoIndex, args) -> dict[str, dict[str, float]]:
    """Mean CPU seconds per clip of each stage for each backend, over up to args.files readable videos, one torch thread."""
    readable = np.flatnonzero(index.rows["state"] == probe.READABLE)
    chosen = readable[np.linspace(0, len(readable) - 1, min(args.files, len(readable))).astype(int)]
    costs = {decoder: [] for decoder in (["decord"] if decord_installed() else []) + ["pyav"]}
    shape = {
        "num_frames": args.num_frames,
        "sampling_rate": args.sampling_rate,
        "img_size": args.img_size,
    }
    threads, progress = torch.get_num_threads(), Progress("reading clips", len(chosen))
    torch.set_num_threads(1)
    for number, place in enumerate(chosen):
        path, info = paths[place], index.info(int(place), paths[place])
        for start in (0.5, 0.2, 0.8):  # the backends take turns; the first reading fetches the file
            for decoder, found in costs.items():
                with contextlib.suppress(ReadError):
                    cost = clip_cost(
                        path,
                        decoder,
                        max(256, -(-args.img_size * 256 // 224)),
                        **shape,
                        info=info,
                        start=start,
                    )
                    found += [cost] if start != 0.5 else []
        progress.show(number + 1)
    torch.set_num_threads(threads)
    return {
        decoder: {stage: float(np.mean([cost[stage] for cost in found])) for stage in STAGES}
        for decoder, found in costs.items()
        if found
    }


def _spread(values: np.ndarray, unit: str, digits: int = 0) -> str:
    """Smallest, median and largest of some values."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:.{digits}f} to {high:.{digits}f}{unit}, median {middle:.{digits}f}"


def summary(paths: list[str], rows: np.ndarray, args) -> list[str]:
    """Lines that say what is there."""
    good = rows[rows["state"] == probe.READABLE]
    bad = np.flatnonzero(rows["state"] == probe.UNREADABLE)
    lines = [
        f"videos      {len(good)} of {len(rows)} readable, {rows['bytes'].clip(min=0).sum() / 1e9:.3g} GB"
    ]
    if len(good):
        seconds = good["frames"] / good["fps"]
        span = args.num_frames * args.sampling_rate / 30
        short = int((seconds < span).sum())
        codecs = pd.Series(good["codec"]).str.decode("ascii").value_counts()
        sides = pd.Series(np.minimum(good["width"], good["height"])).value_counts().sort_index()
        few = dict(sides.items()) if len(sides) <= 8 else None
        lines += [
            f"durations   {_spread(seconds, ' s', 1)}; {seconds.sum() / 3600:.3g} hours together",
            f"codecs      {', '.join(f'{name} {count}' for name, count in codecs.items())}",
            "short side  "
            + (
                ", ".join(f"{side} px: {count}" for side, count in few.items())
                if few
                else _spread(np.minimum(good["width"], good["height"]), " px")
            ),
            f"rates       {_spread(good['fps'], ' frames/s', 1)}",
            f"unsteady    {int((good['times_at'] >= 0).sum())} of changing rate; clips are chosen by time",
            f"key frames  every {_spread(good['key_distance'], ' frames')}",
            f"rotated     {int((good['rotation'] != 0).sum())}; they are turned upright",
            f"short       {short} shorter than {args.num_frames} frames at stride {args.sampling_rate} ({span:.1f} s); their last frame repeats",
        ]
    lines.append(
        f"unreadable  {len(bad)}"
        + ("; they are replaced by others in training" if len(bad) else "")
    )
    lines += [
        f"            {paths[place]}: {rows[place]['reason'].decode(errors='replace')}"
        for place in bad[:10]
    ]
    return lines + (["            ..."] if len(bad) > 10 else [])


def costs_and_cores(costs: dict[str, dict[str, float]], args) -> list[str]:
    """Lines that say what a clip costs, and how many cores feed a GPU."""
    lines = [
        f"CPU milliseconds per clip of {args.num_frames} frames at stride {args.sampling_rate}, cropped to {args.img_size} px, on one core:",
        " " * 10
        + "".join(f"{stage:>9}" for stage in (*STAGES, "total"))
        + "   clips/s/core at 1, 4, 16 repeats   cores per GPU at these",
    ]
    for decoder, cost in costs.items():
        once, crop = sum(cost.values()) - cost["crop"], cost["crop"]
        rates = [repeats / (once + repeats * crop) for repeats in (1, 4, 16)]
        cores = [args.gpu_rate / rate for rate in rates]
        table = "".join(f"{1000 * seconds:9.1f}" for seconds in (*cost.values(), once + crop))
        lines.append(
            f"{decoder:<10}{table}   {', '.join(f'{rate:.0f}' for rate in rates):<32}   {', '.join(f'{count:.1f}' for count in cores)}"
        )
    lines.append(
        f"A GPU is taken to train {args.gpu_rate:g} clips/s (--gpu_rate: the progress line of a run shows yours)."
    )
    return lines


def advice(rows: np.ndarray, costs: dict[str, dict[str, float]], args) -> list[str]:
    """Lines that say what to do."""
    good, lines = rows[rows["state"] == probe.READABLE], []
    totals = {decoder: sum(cost.values()) for decoder, cost in costs.items()}
    if len(totals) == 2:
        best, other = sorted(totals, key=totals.get)
        lines.append(
            f"--decoder {best}: {totals[other] / totals[best]:.2f} times as fast as {other} on these files"
        )
    sides, distance = np.minimum(good["width"], good["height"]), good["key_distance"]
    heavy = (
        [f"{int((sides > 320).sum())} videos are larger than 320 px"] if (sides > 320).any() else []
    )
    heavy += (
        [f"{int((distance > 32).sum())} have more than 32 frames between key frames"]
        if (distance > 32).any()
        else []
    )
    if heavy:
        lines.append(
            f"re-encode once (python -m data.reencode SRC DST): {' and '.join(heavy)}; it measures the gain"
        )
    else:
        lines.append("no need to re-encode: short sides and key frame distances are small")
    best = min(totals.values())
    if 1 / best < args.gpu_rate / 4:
        lines.append(
            "--repeat_aug 4 or more spreads the cost of reading over several clips of a video"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command line. Raises UserError for bad input."""
    parser = Parser(
        __doc__,
        prog="python -m data.index",
        epilog="python -m data.index --from {kinetics,ssv2} ... turns official annotations into a manifest; add --help for that",
    )
    parser.add_argument(
        "source", nargs="+", help="folders of videos, or one manifest (path[,label] per line)"
    )
    parser.add_argument(
        "--write", metavar="CSV", help="for folders: write a manifest and its index, for --data_csv"
    )
    parser.add_argument(
        "--num_frames", type=int, default=16, help="frames per clip (default: %(default)s)"
    )
    parser.add_argument(
        "--sampling_rate",
        type=int,
        default=4,
        help="their distance at 30 frames/s (default: %(default)s)",
    )
    parser.add_argument(
        "--img_size",
        type=int,
        default=224,
        help="side of the crop in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--files", type=int, default=32, help="how many videos to time (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu_rate",
        type=float,
        default=419,
        help="clips/s that one GPU trains (default: %(default)s, ViT-H/14 pretraining at 45 %% of an H100, computed)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="processes (default: the cores, %(default)s)",
    )
    parser.add_argument(
        "--read_timeout",
        type=float,
        default=60,
        help="seconds that a file may take (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from_manifest = len(args.source) == 1 and os.path.isfile(args.source[0])
    paths = read_manifest(args.source[0])[0] if from_manifest else find_videos(args.source)
    manifest = args.source[0] if from_manifest else args.write
    if args.write and (from_manifest or os.path.exists(args.write)):
        raise UserError(
            f"--write {args.write}: "
            + (
                "the source is a manifest already"
                if from_manifest
                else "exists: choose another name"
            )
        )
    index = build_index(
        paths,
        probe.index_path(manifest) if manifest else None,
        max(1, args.workers),
        args.read_timeout,
    )
    if args.write:
        write_manifest(args.write, paths)
    print0(*summary(paths, index.rows, args), sep="\n")
    costs = measure(paths, index, args)
    if costs:
        print0("", *costs_and_cores(costs, args), "", *advice(index.rows, costs, args), sep="\n")
    if manifest:
        print0(f"\nindex written to {probe.index_path(manifest)}; --data_csv {manifest} uses it")
