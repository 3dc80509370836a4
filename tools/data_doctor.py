"""Inspect a data set of videos: report its contents, the cost of reading it, and what to change.

    python -m tools.data_doctor VIDEOS [VIDEOS ...]             folders, searched recursively
    python -m tools.data_doctor train.csv                       a manifest
    python -m tools.data_doctor VIDEOS --write train.csv        folders; writes a manifest of them

The index of a manifest is written beside it, and training with --data_csv uses it.
To make a manifest from official annotations, use python -m tools.make_manifest.
See docs/data.md.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data import video_index
from data.clips import ClipSampling, Span, clip_indices
from data.datasets import ReadClips, SampleDataset
from data.decode import decord_installed, describe, open_video
from data.frame_folder import FRAME_FOLDER, check_frame_folders
from data.input_files import ReadError
from data.loader import FaultTolerantLoader, WorkerSettings
from data.manifest import find_videos, read_manifest, unlabeled, write_manifest
from data.samplers import DistributedEvalSampler
from data.transforms import decode_short_side, train_transform
from data.video import VideoInfo
from util.args import add_frames_fps
from util.cli import Parser
from util.dist import UserError, available_cpus, end_progress, print0, run_script, show_progress
from util.seeds import fork_rng

STAGES = ("open", "seek", "decode", "crop")
REPEATS = (1, 4, 16)  # values of --repeat_aug for which rates are printed
SAVE_SECONDS = 10  # between two saves of an unfinished index
BAR_WIDTH = 30  # characters
MAX_LISTED = 10  # unreadable files that are printed
MAX_SIDES = 8  # distinct short sides that are counted one by one
LARGE_SIDE = 320  # pixels; larger videos are worth re-encoding
LONG_GOP = 32  # frames from key frame to key frame; longer groups are worth re-encoding


class ClipSpec(NamedTuple):
    """A training clip: which frames of a video it takes, and the size of its crop."""

    num_frames: int = 16
    sampling_rate: int = 4  # distance of two frames, at 30 frames/s
    img_size: int = 224  # pixels


class Probed(NamedTuple):
    """The description of a video file, or the reason why it cannot be read."""

    path_index: int  # in the list of files
    info: VideoInfo | None
    reason: str  # "" if it can be read


class ProbeDataset(SampleDataset):
    """Describe each video once.

    The `clips` of a sample are the VideoInfo of the file, or None; `bad` holds the reason.
    """

    def __init__(self, paths: list[str], frames_fps: float | None):
        super().__init__(paths, None, seed=0, substitutes=0)
        self.frames_fps = frames_fps

    def read_clips(
        self, key: tuple[int, int], path: str, span: Span | None, info: VideoInfo | None
    ) -> ReadClips:
        """Return the description of a file in place of clips. Raises ReadError."""
        return ReadClips(describe(path, self.frames_fps))


class Progress:
    """Print a progress line: five times a second on a terminal, every 10 s in a file."""

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total
        self.start_time = time.time()
        self.last_print = 0.0
        self.interval = 10.0
        if os.isatty(1):
            self.interval = 0.2

    def show(self, done: int) -> None:
        """Print the number of finished items and the seconds left; always after the last item."""
        now = time.time()
        if done < self.total and now - self.last_print < self.interval:
            return
        self.last_print = now
        seconds_per_item = (now - self.start_time) / max(done, 1)
        seconds_left = seconds_per_item * (self.total - done)
        filled = BAR_WIDTH * done // max(self.total, 1)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        show_progress(f"{self.label} [{bar}] {done}/{self.total}, {seconds_left:.0f} s left")
        if done == self.total:
            end_progress()


def collate_probed(samples: list[dict]) -> dict:
    """Return a batch of `ProbeDataset` samples: the files of each, as {"files": list[Probed]}."""
    files = []
    for sample in samples:
        reason = "".join(reason for _, reason in sample["bad"])  # one at most
        files.append(Probed(sample["index"], sample["clips"], reason))
    return {"files": files}


def probe_files(
    paths: list[str], workers: int, seconds: float, frames_fps: float | None
) -> Iterator[list[Probed]]:
    """Yield the descriptions of all files in batches, read by `workers` processes.

    A file that takes longer than `seconds` is unreadable. frames_fps: see `open_video`.
    """
    if not paths:
        return
    loader = FaultTolerantLoader(
        ProbeDataset(paths, frames_fps),
        DistributedEvalSampler(len(paths), 0, 1),
        batch_size=16,
        workers=WorkerSettings(workers, False, seconds, quarantine=None),
        collate_fn=collate_probed,
    )
    for batch in loader:
        yield batch["files"]


def build_index(
    paths: list[str],
    target: Path | None,
    workers: int,
    seconds: float,
    frames_fps: float | None = None,
) -> video_index.VideoIndex:
    """Return the index of videos, read by `workers` processes.

    A file that takes longer than `seconds` is unreadable. With a `target`, the index is saved
    there every few seconds, so that an interrupted call resumes. Readable files that have not
    changed since they were indexed are not read again. frames_fps: see `open_video`.
    """
    previous = None
    if target:
        previous = video_index.open_index(target)
    index = video_index.new_index(paths, previous, frames_fps)
    # Unreadable files are tried again: the reason may have been a failing disk.
    pending = np.flatnonzero(index.rows["state"] != video_index.READABLE).tolist()
    pending_paths = [paths[video] for video in pending]
    progress = Progress("looking at videos", len(pending))
    done = 0
    last_save = time.time()
    for batch in probe_files(pending_paths, workers, seconds, frames_fps):
        for file in batch:
            index.set_row(pending[file.path_index], file.info, file.reason)
        done += len(batch)
        progress.show(done)
        if target and time.time() - last_save > SAVE_SECONDS:
            video_index.save_index(target, index)
            last_save = time.time()
    if target:
        video_index.save_index(target, index)
    return index


def clip_cost(
    path: str,
    decoder: str,
    short_side: int,
    clip: ClipSpec,
    info: VideoInfo | None = None,
    start: float = 0.5,
) -> dict[str, float]:
    """Return the CPU seconds of each of STAGES, for one clip of a video on this thread.

    short_side: frames are reduced to it (pixels). start: position of the clip in the video, 0 to 1.
    Raises ReadError.
    """
    transform = train_transform(clip.img_size, (0.5, 1.0), (0.75, 1.3333), True, 0.0)
    frames_fps = info.fps if info else None  # of a folder of frames
    marks = [time.process_time()]
    with open_video(path, decoder, short_side, info, frames_fps) as video:
        marks.append(time.process_time())
        indices = clip_indices(video, ClipSampling(clip.num_frames, clip.sampling_rate), start)
        video.seek(int(indices[0]))
        marks.append(time.process_time())
        frames = video.read_tensor(indices)
        marks.append(time.process_time())
    with fork_rng(0):
        transform(frames)
    marks.append(time.process_time())
    return dict(zip(STAGES, np.diff(marks).tolist(), strict=True))


def mean_clip_costs(
    paths: list[str], index: video_index.VideoIndex, max_videos: int, clip: ClipSpec
) -> pd.DataFrame:
    """Return the mean CPU seconds per clip: a row for each decoder, a column for each of STAGES.

    Up to `max_videos` readable videos are timed, spread over the list, on one torch thread.
    The table is empty if no clip can be read.
    """
    readable = np.flatnonzero(index.rows["state"] == video_index.READABLE)
    count = min(max_videos, len(readable))
    chosen = readable[np.linspace(0, len(readable) - 1, count).astype(int)].tolist()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    progress = Progress("reading clips", len(chosen))
    costs = []
    for done, video in enumerate(chosen, 1):
        path = paths[video]
        costs += _costs_of_video(path, index.info(video, path), clip)
        progress.show(done)
    torch.set_num_threads(num_threads)
    table = pd.DataFrame(costs, columns=["decoder", *STAGES])
    return table.groupby("decoder").mean()


def _costs_of_video(path: str, info: VideoInfo | None, clip: ClipSpec) -> list[dict]:
    """Return the cost of two clips of a video for each decoder, without those that fail."""
    decoders = ["pyav"]
    if decord_installed():
        decoders.insert(0, "decord")
    short_side = decode_short_side(clip.img_size)
    costs = []
    for start in (0.5, 0.2, 0.8):  # the decoders take turns
        for decoder in decoders:
            with contextlib.suppress(ReadError):
                cost = clip_cost(path, decoder, short_side, clip, info, start)
                if start != 0.5:  # the first reading fetches the file, and is not counted
                    costs.append({"decoder": decoder, **cost})
    return costs


def _spread(values: np.ndarray, unit: str, digits: int = 0) -> str:
    """Return the smallest, largest and median value as text."""
    low, median, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:.{digits}f} to {high:.{digits}f}{unit}, median {median:.{digits}f}"


def _short_sides(rows: np.ndarray) -> np.ndarray:
    """Return the short side of each video (n,), in pixels."""
    return np.minimum(rows["width"], rows["height"])


def summary(paths: list[str], rows: np.ndarray, clip: ClipSpec) -> list[str]:
    """Return the lines that describe the files: those that are readable and those that are not."""
    readable = rows[rows["state"] == video_index.READABLE]
    in_folders = rows["codec"] == FRAME_FOLDER.encode()
    gigabytes = rows["bytes"][~in_folders].clip(min=0).sum() / 1e9
    size = f"{gigabytes:.3g} GB"
    if in_folders.any():
        size += f" and {in_folders.sum()} folders of frames"
    lines = [f"videos      {len(readable)} of {len(rows)} readable, {size}"]
    if len(readable):
        lines += content_lines(readable, clip)
    return lines + unreadable_lines(paths, rows)


def content_lines(rows: np.ndarray, clip: ClipSpec) -> list[str]:
    """Return the lines that describe readable videos: durations, codecs, sizes, rates."""
    seconds = rows["frames"] / rows["fps"]
    hours = seconds.sum() / 3600
    codecs = pd.Series(rows["codec"]).str.decode("ascii").value_counts()
    codec_counts = ", ".join(f"{name} {count}" for name, count in codecs.items())
    clip_seconds = clip.num_frames * clip.sampling_rate / 30
    num_unsteady = int((rows["times_at"] >= 0).sum())
    num_rotated = int((rows["rotation"] != 0).sum())
    num_short = int((seconds < clip_seconds).sum())
    return [
        f"durations   {_spread(seconds, ' s', 1)}; {hours:.3g} hours together",
        f"codecs      {codec_counts}",
        f"short side  {side_counts(_short_sides(rows))}",
        f"rates       {_spread(rows['fps'], ' frames/s', 1)}",
        f"unsteady    {num_unsteady} of changing rate; clips are chosen by time",
        f"key frames  every {_spread(rows['key_distance'], ' frames')}",
        f"rotated     {num_rotated}; they are turned upright",
        f"short       {num_short} shorter than {clip.num_frames} frames at stride "
        f"{clip.sampling_rate} ({clip_seconds:.1f} s); their last frame repeats",
    ]


def side_counts(sides: np.ndarray) -> str:
    """Return how many videos have each short side (pixels), or the spread of many sides."""
    counts = pd.Series(sides).value_counts().sort_index()
    if len(counts) > MAX_SIDES:
        return _spread(sides, " px")
    return ", ".join(f"{side} px: {count}" for side, count in counts.items())


def unreadable_lines(paths: list[str], rows: np.ndarray) -> list[str]:
    """Return the lines that list unreadable files and their reasons."""
    unreadable = np.flatnonzero(rows["state"] == video_index.UNREADABLE).tolist()
    if not unreadable:
        return ["unreadable  0"]
    lines = [f"unreadable  {len(unreadable)}; they are replaced by others in training"]
    for video in unreadable[:MAX_LISTED]:
        reason = rows[video]["reason"].decode(errors="replace")
        lines.append(f"            {paths[video]}: {reason}")
    if len(unreadable) > MAX_LISTED:
        lines.append("            ...")
    return lines


def cost_lines(costs: pd.DataFrame, clip: ClipSpec, gpu_rate: float) -> list[str]:
    """Return the table of costs per clip and of the cores that feed a GPU of gpu_rate clips/s."""
    columns = "".join(f"{name:>9}" for name in (*STAGES, "total"))
    repeats = ", ".join(str(count) for count in REPEATS)
    lines = [
        f"CPU milliseconds per clip of {clip.num_frames} frames at stride {clip.sampling_rate}, "
        f"cropped to {clip.img_size} px, on one core:",
        f"{'':<10}{columns}   clips/s/core at {repeats} repeats   cores per GPU at these",
    ]
    for decoder, seconds in costs.iterrows():
        lines.append(_cost_row(decoder, seconds, gpu_rate))
    lines.append(
        f"A GPU is taken to train {gpu_rate:g} clips/s "
        "(--gpu_rate: the progress line of a run shows yours)."
    )
    return lines


def _cost_row(decoder: str, seconds: pd.Series, gpu_rate: float) -> str:
    """Return the row of a decoder in the table of costs."""
    total = seconds.sum()
    crop = seconds["crop"]
    read = total - crop  # once for all repeats
    milliseconds = "".join(f"{1000 * value:9.1f}" for value in (*seconds, total))
    rates = [repeats / (read + repeats * crop) for repeats in REPEATS]
    rate_text = ", ".join(f"{rate:.0f}" for rate in rates)
    cores_text = ", ".join(f"{gpu_rate / rate:.1f}" for rate in rates)
    return f"{decoder:<10}{milliseconds}   {rate_text:<32}   {cores_text}"


def advice(rows: np.ndarray, costs: pd.DataFrame, gpu_rate: float) -> list[str]:
    """Return the lines that recommend a decoder, re-encoding and repeated augmentation."""
    totals = costs.sum(axis=1).sort_values(kind="stable")
    lines = []
    if len(totals) == 2:
        best, other = totals.index
        speedup = totals[other] / totals[best]
        lines.append(f"--decoder {best}: {speedup:.2f} times as fast as {other} on these files")
    lines.append(reencode_advice(rows[rows["state"] == video_index.READABLE]))
    if 1 / totals.min() < gpu_rate / 4:
        lines.append(
            "--repeat_aug 4 or more spreads the cost of reading over several clips of a video"
        )
    return lines


def reencode_advice(rows: np.ndarray) -> str:
    """Return a line that recommends re-encoding readable videos, or states that it is needless."""
    rows = rows[rows["codec"] != FRAME_FOLDER.encode()]  # the tool converts files only
    num_large = int((_short_sides(rows) > LARGE_SIDE).sum())
    num_long = int((rows["key_distance"] > LONG_GOP).sum())
    reasons = []
    if num_large:
        reasons.append(f"{num_large} videos are larger than {LARGE_SIDE} px")
    if num_long:
        reasons.append(f"{num_long} have more than {LONG_GOP} frames between key frames")
    if not reasons:
        return "no need to re-encode: short sides and key frame distances are small"
    return (
        f"re-encode once (python -m tools.reencode SRC DST): {' and '.join(reasons)}; "
        "it measures the gain"
    )


def get_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(__doc__, prog="python -m tools.data_doctor")
    parser.add_argument("source", nargs="+", help="folders of videos, or one manifest")
    parser.add_argument(
        "--write",
        metavar="CSV",
        help="for folders: write a manifest and its index, for --data_csv",
    )
    parser.add_argument(
        "--num_frames", type=int, default=16, help="frames per clip (default: %(default)s)"
    )
    parser.add_argument(
        "--sampling_rate",
        type=int,
        default=4,
        help="distance of a clip's frames at 30 frames/s (default: %(default)s)",
    )
    parser.add_argument(
        "--img_size",
        type=int,
        default=224,
        help="side of the crop in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--files", type=int, default=32, help="number of videos to time (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu_rate",
        type=float,
        default=419,
        help="clips/s that one GPU trains (default: %(default)s, ViT-H/14 pretraining at 45 %% "
        "of an H100, computed)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cpus(),
        help="number of processes (default: the cores, %(default)s)",
    )
    parser.add_argument(
        "--read_timeout",
        type=float,
        default=60,
        help="seconds that a file may take (default: %(default)s)",
    )
    add_frames_fps(parser)
    return parser


def find_source(
    source: list[str], write: str | None, frames_fps: float | None
) -> tuple[list[str], str | None]:
    """Return the paths of the videos, and the manifest that they have or get (None for none).

    source: one manifest, or folders. write: the manifest to make of folders. frames_fps: see
    `open_video`. Raises UserError for bad input, or if `write` exists.
    """
    if len(source) == 1 and os.path.isfile(source[0]):
        paths = video_index.distinct(read_manifest(source[0]).paths)
        if write:
            raise UserError(
                f"--write {write}: the source is a manifest already. Leave out --write."
            )
        return paths, source[0]
    paths = find_videos(source, "SOURCE", frames_fps is not None)
    if write and os.path.exists(write):
        raise UserError(f"--write {write} exists. Choose another name.")
    return paths, write


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input."""
    args = get_parser().parse_args(argv)
    clip = ClipSpec(args.num_frames, args.sampling_rate, args.img_size)
    paths, manifest = find_source(args.source, args.write, args.frames_fps)
    # An index must not say of a folder that it needs a rate: training may have one.
    check_frame_folders(paths, args.frames_fps, of_any_name=True)
    target = None
    if manifest:
        target = video_index.index_path(manifest)
    index = build_index(paths, target, max(1, args.workers), args.read_timeout, args.frames_fps)
    if args.write:
        write_manifest(args.write, unlabeled(paths))
    print0(*summary(paths, index.rows, clip), sep="\n")
    costs = mean_clip_costs(paths, index, args.files, clip)
    if len(costs):
        print0("", *cost_lines(costs, clip, args.gpu_rate), sep="\n")
        print0("", *advice(index.rows, costs, args.gpu_rate), sep="\n")
    if manifest:
        print0(f"\nindex written to {target}; --data_csv {manifest} uses it")


if __name__ == "__main__":
    run_script(main)
