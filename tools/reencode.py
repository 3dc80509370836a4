"""Convert videos once for training: small pictures, a key frame every 16 frames, no sound.

    python -m tools.reencode SRC DST                     SRC: a folder, searched recursively
    python -m tools.reencode train.csv DST               a manifest; writes DST/manifest.csv
    python -m tools.reencode SRC DST --short_side 320    larger pictures

Each output is H.264 in MP4: upright, with square pixels, 8 bit 4:2:0, and the color matrix, range
and time stamps of its source. A file gets its final name only after it has been read back and
compared with its source. Run the same command again to resume; use one run per DST at a time.
See docs/data.md.
"""

import csv
import faulthandler
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from data.decode import DECODERS, open_video
from data.frame_geometry import (
    UPRIGHT,
    apply_orientation,
    frame_orientation,
    scaled_size,
    square_pixel_size,
)
from data.input_files import ReadError, check_path
from data.manifest import Samples, find_videos, read_manifest, unlabeled, write_manifest
from data.pyav_compat import ON_ONE_THREAD, open_container, to_rgb
from tools.data_doctor import ClipSpec, clip_cost
from util.cli import Parser
from util.dist import UserError, available_cpus, print0, run_script
from util.files import atomic_write

GOP = 16  # frames from key frame to key frame
B_FRAMES = 2  # in a row
# No other frame refers to a B frame, so that a reader can skip all of them, and entropy coding is
# the faster kind: 9 % more bytes, a fifth less time to decode.
X264 = "b-pyramid=none:cabac=0"
LOWEST_PSNR = 20  # dB between an output and its source; a wrong picture or wrong colors give less
HANG_SECONDS = 120  # without a decoded packet, after which a file fails
PROGRESS_SECONDS = 10
SAMPLE = 32  # files whose reading is timed before and after
MEASURED_CLIP = ClipSpec(num_frames=16, sampling_rate=4, img_size=224)
FAILURES = "reencode_failed.csv"
SETTINGS = "reencode.json"


class Encoded(NamedTuple):
    """What was written to an output."""

    num_frames: int
    lost_packets: int  # packets of the source that could not be decoded
    expected: dict[int, np.ndarray]  # picture (H, W, 3) uint8 RGB that a reader should return


class Source(NamedTuple):
    """The videos to convert."""

    samples: Samples
    from_manifest: bool
    root: str  # the folder that the names of the outputs are relative to


class Timestamps:
    """Turn the time stamps of a source into strictly increasing ones that begin at 0.

    step: distance of two frames in units of the time base, for a source that never gives one.
    """

    def __init__(self, step: int):
        self.step = step
        self.first = 0
        self.previous: int | None = None

    def following(self, stamp: int | None) -> int:
        """Return the time stamp of the next frame, whose source has `stamp` (None for none)."""
        if self.previous is None:
            self.first = stamp or 0
            self.previous = self.first
        elif stamp is None or stamp <= self.previous:
            self.previous += self.step  # missing or out of order: keep the last distance
        else:
            self.step = stamp - self.previous
            self.previous = stamp
        return self.previous - self.first


def target_names(names: list[str]) -> list[str]:
    """Return the output name of each distinct relative path.

    Its extension is replaced by .mp4. Where two names would then be equal, .mp4 is appended.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    counts = Counter(stems)
    sources = set(names)
    targets = []
    for name, stem in zip(names, stems, strict=True):
        if counts[stem] == 1 and stem not in sources:
            targets.append(stem + ".mp4")
        else:
            targets.append(name + ".mp4")
    return targets


def output_size(
    width: int, height: int, pixel_aspect: Fraction | None, short_side: int
) -> tuple[int, int]:
    """Return an even width and height with square pixels.

    The short side is reduced to `short_side` pixels; nothing is enlarged, except 1 pixel to 2.
    """
    width, height = square_pixel_size(width, height, pixel_aspect)
    scaled = scaled_size(width, height, short_side)
    if scaled:
        width, height = scaled
    return max(width // 2 * 2, 2), max(height // 2 * 2, 2)


def temporary_name(target: str) -> str:
    """Return the path that an output is written to: hidden, and not a video by its extension."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.part")


def convert(source: str, target: str, short_side: int, crf: int, decoder: str) -> int:
    """Convert one file and verify it. Return the number of packets that could not be decoded.

    Raises ReadError, FFmpegError or OSError; there is no target then.
    """
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        encoded = _encode(source, temporary, short_side, crf)
        _verify(temporary, decoder, encoded)
        os.replace(temporary, target)
    finally:
        faulthandler.cancel_dump_traceback_later()
        Path(temporary).unlink(missing_ok=True)
    return encoded.lost_packets


def _encode(source: str, temporary: str, short_side: int, crf: int) -> Encoded:
    """Encode the frames of a file that can be decoded. Raises ReadError if there are none."""
    with open_video(source, "pyav") as video:  # raises ReadError with its reason
        fps = Fraction(video.fps).limit_denominator(100000)
    lost: list[int | None] = []
    with (
        open_container(check_path(source)) as container,
        av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as output,
    ):
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = _decode_frames(container, stream, lost)
        expected = _encode_frames(frames, stream, output, fps, short_side, crf)
    num_frames = max(expected) + 1
    return Encoded(num_frames, len(lost), expected)


def _encode_frames(
    frames: Iterator, stream, output, fps: Fraction, short_side: int, crf: int
) -> dict[int, np.ndarray]:
    """Encode the frames of a stream to an output.

    Return {index: expected picture (H, W, 3) uint8 RGB} of frames 0, 1, 2, 4, 8, ... and the last.
    """
    first = next(frames, None)
    if first is None:
        raise ReadError("no frame can be decoded")
    size = output_size(first.width, first.height, stream.sample_aspect_ratio, short_side)
    encoder = _add_encoder(output, _to_yuv420(first, size), stream, fps, crf)
    timestamps = Timestamps(step=max(round(1 / (fps * stream.time_base)), 1))
    is_avi = stream.container.format.name == "avi"
    expected = {}
    for index, frame in enumerate(itertools.chain([first], frames)):
        picture = _to_yuv420(frame, size)
        stamp = frame.pts
        if is_avi:
            stamp = frame.dts  # FFmpeg's pts of AVI are not in display order
        picture.pts = timestamps.following(stamp)
        picture.time_base = stream.time_base
        picture.pict_type = 0  # the encoder chooses
        output.mux(encoder.encode(picture))
        if index & (index - 1) == 0:
            expected[index] = _expected_rgb(frame, size)
    expected[index] = _expected_rgb(frame, size)
    output.mux(encoder.encode())
    return expected


def _decode_frames(container, stream, lost: list[int | None]) -> Iterator:
    """Yield the frames that can be decoded, in display order; append the others' pts to `lost`."""
    try:
        for packet in container.demux(stream):
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=2)
            try:
                yield from packet.decode()
            except (av.FFmpegError, ValueError):
                lost.append(packet.pts)
    except av.FFmpegError:  # the file is cut off: keep what came before
        lost.append(None)


def _add_encoder(output, picture, source, fps: Fraction, crf: int):
    """Add a video stream to an output, for pictures like this one of the stream `source`."""
    encoder = output.add_stream("libx264", rate=fps, options={"crf": str(crf), "x264-params": X264})
    encoder.width = picture.width
    encoder.height = picture.height
    encoder.pix_fmt = picture.format.name
    context = encoder.codec_context
    context.time_base = source.time_base
    context.gop_size = GOP
    context.max_b_frames = B_FRAMES
    context.thread_count = 1
    context.colorspace = picture.colorspace
    context.color_range = picture.color_range
    context.color_primaries = source.codec_context.color_primaries
    context.color_trc = source.codec_context.color_trc
    return encoder


def _to_yuv420(frame, size: tuple[int, int]):
    """Return a decoded frame scaled to `size` (width, height) as 8 bit 4:2:0, then upright."""
    pixel_format = "yuv420p"
    conversion = {}
    if frame.format.is_rgb:
        conversion = {"dst_colorspace": "ITU601", "dst_color_range": "MPEG"}
    elif frame.color_range == ColorRange.JPEG:
        pixel_format = "yuvj420p"  # PyAV 16 takes the range from the name alone
    picture = frame.reformat(
        *size, format=pixel_format, interpolation="BICUBIC", **ON_ONE_THREAD, **conversion
    )
    signs = frame_orientation(frame)
    if signs == UPRIGHT:
        return picture
    return _turn(picture, signs)


def _turn(picture, signs: tuple[int, int, int, int]):
    """Return a 4:2:0 picture turned by the signs of its display matrix, see `orientation`."""
    width, height = picture.width, picture.height
    luma = width * height
    half_shape = (height // 2, width // 2)
    planes = np.split(picture.to_ndarray().reshape(-1), [luma, luma * 5 // 4])
    turned = [
        apply_orientation(plane.reshape(*shape, 1), signs)
        for plane, shape in zip(planes, [(height, width), half_shape, half_shape], strict=True)
    ]
    flat = np.concatenate([plane.reshape(-1) for plane in turned])
    turned_width = turned[0].shape[1]
    shown = av.VideoFrame.from_ndarray(flat.reshape(-1, turned_width), format=picture.format.name)
    shown.colorspace = picture.colorspace
    shown.color_range = picture.color_range
    return shown


def _expected_rgb(frame, size: tuple[int, int]) -> np.ndarray:
    """Return what a reader should see of a frame: (H, W, 3) uint8 RGB, without `_to_yuv420`."""
    return apply_orientation(to_rgb(VideoReformatter(), frame, *size), frame_orientation(frame))


def _verify(path: str, decoder: str, encoded: Encoded) -> None:
    """Read an output back. Raises ReadError unless its frames are those that were encoded."""
    with open_video(path, decoder) as video:
        if video.num_frames != encoded.num_frames:
            raise ReadError(
                f"verification: {encoded.num_frames} frames written, {video.num_frames} found"
            )
        indices = list(encoded.expected)
        frames = video.read(np.array(indices))
    for index, frame in zip(indices, frames, strict=True):
        expected = encoded.expected[index]
        if frame.shape != expected.shape:
            raise ReadError(
                f"verification: frame {index} has the shape {frame.shape}, not {expected.shape}"
            )
        error = np.mean((frame / 255.0 - expected / 255.0) ** 2)
        psnr = -10 * np.log10(error + 1e-10)
        if psnr < LOWEST_PSNR:
            raise ReadError(
                f"verification: frame {index} differs from its source (PSNR {psnr:.1f} dB)"
            )


class Child(NamedTuple):
    """A process that runs one job."""

    job_index: int
    process: BaseProcess
    receiver: Connection  # of the result


def run_each(
    function: Callable, jobs: list[tuple], workers: int, seconds: float = HANG_SECONDS
) -> Iterator[tuple[int, object, str]]:
    """Call function(*job) for each job in a process of its own, `workers` at a time.

    A crash, or `seconds` without a decoded packet, fails one job only.
    Yield (index of the job, result, "") or (index, None, reason) in order of completion.
    """
    # A plain fork could inherit locks that threads of a library hold. The server imports once what
    # takes long to import. It must not import this module: under `python -m` a process runs it
    # again, and warns if it is imported already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.data_doctor", "data.pyav_compat"])
    waiting = iter(enumerate(jobs))
    children: list[Child] = []
    while True:
        for index, job in itertools.islice(waiting, workers - len(children)):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_job, args=(sender, function, job, seconds), daemon=True
            )
            process.start()
            sender.close()  # the process has the only copy left: the receiver ends when it dies
            children.append(Child(index, process, receiver))
        if not children:
            return
        ready = wait([child.receiver for child in children])
        finished = [child for child in children if child.receiver in ready]
        children = [child for child in children if child.receiver not in ready]
        for child in finished:
            result, reason = _receive(child, seconds)
            yield child.job_index, result, reason


def _run_job(sender: Connection, function: Callable, job: tuple, seconds: float) -> None:
    """Run one job in its own process, and send (result, "") or (None, reason)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops its children
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        sender.send((function(*job), ""))
    except Exception as error:
        sender.send((None, _error_text(error)))


def _error_text(error: Exception) -> str:
    """Return the first line of an error, with its type unless the file is the cause."""
    lines = str(getattr(error, "strerror", None) or error).splitlines() or [""]
    if isinstance(error, (ReadError, OSError)):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


def _receive(child: Child, seconds: float) -> tuple[object, str]:
    """Return what a job sent, (result, "") or (None, reason), and release its process."""
    process = child.process
    try:
        result, reason = child.receiver.recv()
        process.join()
    except EOFError:  # the process died
        process.join()
        assert process.exitcode is not None  # it has ended
        result = None
        if process.exitcode == 1:  # faulthandler exits with 1, see `_run_job`
            reason = f"no frame in {seconds} s"
        else:
            reason = f"the decoder died ({signal.strsignal(-process.exitcode)})"
    child.receiver.close()
    return result, reason


def find_source(src: str, dst: str) -> Source:
    """Return the videos of a folder or manifest. Raises UserError if DST would overwrite them."""
    if os.path.isdir(src):
        if Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(src)):
            raise UserError(f"DST {dst} is SRC or a folder inside it. Give a folder elsewhere.")
        return Source(unlabeled(find_videos([src], "SRC")), False, os.path.abspath(src))
    if os.path.realpath(src) == os.path.realpath(os.path.join(dst, "manifest.csv")):
        raise UserError(f"SRC {src} would be overwritten by the manifest of DST. Give another DST.")
    samples = read_manifest(src)
    paths = [os.path.normpath(path) for path in samples.paths]
    folder = next(filter(os.path.isdir, paths), None)
    if folder is not None:
        raise UserError(
            f"SRC {src} lists the folder {folder}, but only files are converted. Take out the "
            "folders of frames."
        )
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return Source(samples._replace(paths=paths), True, root)


def prepare_folder(dst: str, settings: dict) -> None:
    """Make DST, and record in it its source and settings.

    Raises UserError if it was made with others, or cannot be written to.
    """
    file = Path(dst, SETTINGS)
    try:
        Path(dst).mkdir(parents=True, exist_ok=True)
        if not file.exists():
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=0) + "\n")
        recorded = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"DST {dst} cannot be used ({error}). Give a folder that can be written to."
        ) from None
    if recorded != settings:
        changes = [
            f"{name} {recorded.get(name)!r}, not {value!r}"
            for name, value in settings.items()
            if recorded.get(name) != value
        ]
        raise UserError(
            f"DST {dst} was made with {', '.join(changes)}. Give another folder, or empty this one."
        )


def plan_targets(source: Source, dst: str) -> dict[str, str]:
    """Return {source: target} of each video once. Raises UserError if a target is a source."""
    paths = list(dict.fromkeys(source.samples.paths))
    names = target_names([os.path.relpath(path, source.root) for path in paths])
    folder = os.path.abspath(dst)
    targets = {path: os.path.join(folder, name) for path, name in zip(paths, names, strict=True)}
    overwritten = set(targets) & set(targets.values())
    if overwritten:
        raise UserError(
            f"DST {dst}: {min(overwritten)} is a source and would be overwritten. "
            "Give another folder."
        )
    return targets


class ConversionProgress:
    """Count converted and failed files, and print them every PROGRESS_SECONDS."""

    def __init__(self, num_jobs: int, num_converted: int):
        self.num_jobs = num_jobs
        self.num_converted = num_converted
        self.done = 0
        self.failed = 0
        self.start_time = time.monotonic()
        self.last_print = self.start_time

    def add(self, failed: bool) -> None:
        """Count a file; print a line if one is due, and after the last file."""
        self.done += 1
        if failed:
            self.failed += 1
        now = time.monotonic()
        if now - self.last_print <= PROGRESS_SECONDS and self.done < self.num_jobs:
            return
        self.last_print = now
        files = f"{self.num_converted + self.done}/{self.num_converted + self.num_jobs} files"
        seconds_per_file = (now - self.start_time) / self.done
        minutes_left = seconds_per_file * (self.num_jobs - self.done) / 60
        print0(f"{files}, {self.failed} failed, {minutes_left:.0f} min to go")


def convert_all(jobs: list[tuple], dst: str, workers: int, num_converted: int) -> int:
    """Run `convert` for each job (source, target, ...). Return the number of failures.

    Failures and their reasons are listed in DST/reencode_failed.csv; without any there is no list.
    num_converted: files of earlier runs, for the progress. Raises UserError if the disk is full.
    """
    listing = Path(dst, FAILURES)
    progress = ConversionProgress(len(jobs), num_converted)
    num_incomplete = 0
    with listing.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "reason"])
        for index, lost_packets, reason in run_each(convert, jobs, workers):
            source, target = jobs[index][:2]
            if reason:
                writer.writerow([source, reason])
                file.flush()
                Path(temporary_name(target)).unlink(missing_ok=True)  # of a process that died
            if "No space left" in reason:
                raise UserError(
                    f"DST {dst}: no space left. Free some, then run the same command to resume."
                )
            if lost_packets:
                num_incomplete += 1
            progress.add(failed=bool(reason))
    if num_incomplete:
        print0(f"{num_incomplete} files have corrupt parts, which were left out")
    if progress.failed:
        print0(f"{listing}: the {progress.failed} files that could not be converted, and why")
    else:
        listing.unlink()
    return progress.failed


def write_converted_manifest(samples: Samples, converted: dict[str, str], dst: str) -> None:
    """Write DST/manifest.csv with the rows of the source's manifest that were converted.

    Their times stay: an output has the time stamps of its source.
    """
    kept = samples.select([i for i, path in enumerate(samples.paths) if path in converted])
    targets = [os.path.relpath(converted[path], dst) for path in kept.paths]
    write_manifest(os.path.join(dst, "manifest.csv"), kept._replace(paths=targets))


def seconds_per_clip(path: str, decoder: str, short_side: int) -> float:
    """Return the CPU seconds to open a video and read a clip, as in training: the mean of three.

    Raises ReadError.
    """
    seconds = []
    for start in (0.5, 0.2, 0.5, 0.8):
        cost = clip_cost(path, decoder, short_side, MEASURED_CLIP, start=start)
        seconds.append(sum(cost.values()) - cost["crop"])
    return float(np.mean(seconds[1:]))  # the first imports the decoder and fetches the file


def report_gain(converted: dict[str, str], decoder: str, short_side: int) -> None:
    """Print the cost of reading a clip before and after, of up to SAMPLE files, and all sizes."""
    stride = max(len(converted) // SAMPLE, 1)
    pairs = list(converted.items())[::stride][:SAMPLE]
    if pairs:
        costs = [[seconds_per_clip(path, decoder, short_side) for path in pair] for pair in pairs]
        before, after = np.mean(costs, axis=0)
        print0(
            f"reading a clip (16 frames at stride 4, {decoder}, short side {short_side}, "
            f"{len(pairs)} files): {before * 1e3:.0f} ms before, {after * 1e3:.0f} ms after = "
            f"{1 / before:.1f} -> {1 / after:.1f} clips/s/core, {before / after:.1f}x"
        )
    old = sum(os.path.getsize(path) for path in converted) / 1e6
    new = sum(os.path.getsize(path) for path in converted.values()) / 1e6
    change = 100 * (new / old - 1)
    print0(f"{len(converted)} files, {old:.1f} MB -> {new:.1f} MB ({change:+.0f} %)")


def get_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(__doc__, prog="python -m tools.reencode")
    parser.add_argument(
        "src",
        metavar="SRC",
        help="folder of videos, searched recursively, or a manifest (path[,label[,start,end]])",
    )
    parser.add_argument(
        "dst", metavar="DST", help="folder for the results, which keep the structure of SRC"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        default=256,
        help="reduce to this short side in pixels, never enlarge (default: %(default)s)",
    )
    parser.add_argument(
        "--crf",
        type=int,
        default=23,
        help="x264's quality, lower is better and larger (default: %(default)s)",
    )
    parser.add_argument(
        "--decoder",
        choices=DECODERS,
        default="auto",
        help="reads the outputs back and measures (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="files at a time (default: the cores that this process may use)",
    )
    return parser


def check_values(short_side: int, crf: int, workers: int) -> None:
    """Raise UserError for values that x264 or this program cannot work with."""
    if short_side < 16 or short_side % 2:
        raise UserError(f"--short_side {short_side} must be an even number from 16")
    if not 0 <= crf <= 51 or workers < 0:
        raise UserError(f"--crf {crf} must be 0 to 51, --workers {workers} at least 0")
    if "libx264" not in av.codecs_available:
        raise UserError(
            f"PyAV {av.__version__} has no libx264 encoder here: "
            "pip install --force-reinstall av (its wheels have it)"
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input, or if no video can be converted."""
    args = get_parser().parse_args(argv)
    check_values(args.short_side, args.crf, args.workers)
    workers = args.workers or available_cpus()
    source = find_source(args.src, args.dst)
    prepare_folder(
        args.dst,
        {"source": os.path.realpath(args.src), "short_side": args.short_side, "crf": args.crf},
    )
    targets = plan_targets(source, args.dst)
    jobs = []
    for path, target in targets.items():
        if not os.path.exists(target):
            Path(temporary_name(target)).unlink(missing_ok=True)  # of a run that was killed
            jobs.append((path, target, args.short_side, args.crf, args.decoder))
    num_converted = len(targets) - len(jobs)
    print0(f"{len(targets)} videos, {num_converted} converted before; {workers} at a time")
    failed = 0
    if jobs:
        failed = convert_all(jobs, args.dst, workers, num_converted)
    if failed == len(targets):
        raise UserError(
            f"none of the {failed} videos of {args.src} could be converted. "
            f"See {os.path.join(args.dst, FAILURES)}."
        )
    converted = {path: target for path, target in targets.items() if os.path.exists(target)}
    if source.from_manifest:
        write_converted_manifest(source.samples, converted, args.dst)
    if len(jobs) > failed:
        report_gain(converted, args.decoder, args.short_side)


if __name__ == "__main__":
    run_script(main)
