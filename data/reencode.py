"""One-time conversion of videos for training: small pictures, a key frame every 16, no sound. Resumable.

    python -m data.reencode SRC DST      SRC: a folder, or a manifest (then DST/manifest.csv names the new files)

Each output is H.264 in mp4: upright, square pixels, 8 bit 4:2:0, the source's colour matrix, range and time stamps. It gets its
name only after it has been read back and compared, so a file that is there is whole. One run per DST at a time.
"""

import argparse
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
from multiprocessing.connection import wait
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from data.decode import (
    DECODERS,
    UPRIGHT,
    ReadError,
    checked_path,
    open_video,
    orientation,
    scaled_size,
    square_size,
    upright,
)
from data.doctor import clip_cost
from data.index import find_videos, read_manifest, write_manifest
from data.pyav import ON_ONE_THREAD, open_container, to_rgb
from util.cli import Parser
from util.dist import UserError, print0, run_script, usable_cores

GOP, B_FRAMES = 16, 2
X264 = "b-pyramid=none:cabac=0"  # no B frame is needed by others, so all can be skipped; 9 % more bytes, a fifth less to decode
LOWEST_PSNR = (
    20  # dB between a frame written and its source; another picture, or wrong colours, lie below
)
HANG_SECONDS = 120  # without a decoded frame: the file is given up
PROGRESS_SECONDS = 10
SAMPLE = 32  # files whose reading is measured before and after


def target_names(names: list[str]) -> list[str]:
    """The output of each distinct relative path: its ending replaced by .mp4, or, where two would share that, added to."""
    stems = [os.path.splitext(name)[0] for name in names]
    taken, count = set(names), Counter(stems)
    return [
        (stem if count[stem] == 1 and stem not in taken else name) + ".mp4"
        for name, stem in zip(names, stems, strict=True)
    ]


def output_size(
    width: int, height: int, pixel_aspect: Fraction | None, short_side: int
) -> tuple[int, int]:
    """Even width and height with square pixels: short side reduced to `short_side`, nothing enlarged (but 1 becomes 2)."""
    width, height = square_size(width, height, pixel_aspect)
    width, height = scaled_size(width, height, short_side) or (width, height)
    return max(width // 2 * 2, 2), max(height // 2 * 2, 2)


def seconds_per_clip(path: str, decoder: str, short_side: int) -> float:
    """CPU seconds to open a video and read one clip of 16 frames at stride 4, as in training; the mean of three. Raises ReadError."""
    costs = [clip_cost(path, decoder, short_side, start=start) for start in (0.5, 0.2, 0.5, 0.8)]
    return float(
        np.mean([sum(cost.values()) - cost["crop"] for cost in costs[1:]])
    )  # the first imports the decoder and fetches the file


def convert(source: str, target: str, short_side: int, crf: int, decoder: str) -> tuple[int, int]:
    """Convert one file and verify it: (frames written, packets that could not be decoded). Raises ReadError, FFmpegError, OSError."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        written, lost, kept = _encode(source, temporary, short_side, crf)
        _verify(temporary, decoder, written, kept)
        os.replace(temporary, target)
    finally:
        faulthandler.cancel_dump_traceback_later()
        Path(temporary).unlink(missing_ok=True)
    return written, lost


def temporary_name(target: str) -> str:
    """Where an output grows: hidden, beside its place, and no video by its name."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.part")


def _encode(
    source: str, temporary: str, short_side: int, crf: int
) -> tuple[int, int, dict[int, np.ndarray]]:
    """Returns the frames written, the packets lost, and of the frames 0, 1, 2, 4, 8, ... and the last what should be seen (H, W, 3)."""
    with open_video(source, "pyav") as video:  # raises ReadError with its reason
        fps = Fraction(video.fps).limit_denominator(100000)
    written, lost, kept, previous, first = 0, [], {}, 0, 0
    with (
        open_container(checked_path(source)) as container,
        av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as output,
    ):
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in _frames(container, stream, lost):
            if written == 0:
                size = output_size(
                    frame.width, frame.height, stream.sample_aspect_ratio, short_side
                )
                step = max(round(1 / (fps * stream.time_base)), 1)
            picture = _picture(frame, size)
            if written == 0:
                encoder = _add_encoder(output, picture, stream, fps, crf)
            stamp = (
                frame.dts if container.format.name == "avi" else frame.pts
            )  # what AVI calls pts is not in display order
            if written and (
                stamp is None or stamp <= previous
            ):  # no time stamps, or broken ones: goes on as before
                stamp = previous + step
            elif written:
                step = stamp - previous
            previous = stamp or 0
            if not written:
                first = previous
            picture.pts, picture.time_base, picture.pict_type = (
                previous - first,
                stream.time_base,
                0,
            )
            output.mux(encoder.encode(picture))
            if written & (written - 1) == 0:
                kept[written] = _shown(frame, size)
            written, last = written + 1, frame
        if not written:
            raise ReadError("no frame can be decoded")
        kept[written - 1] = _shown(last, size)
        output.mux(encoder.encode())
    return written, len(lost), kept


def _frames(container, stream, lost: list) -> Iterator:
    """The frames of a video that can be decoded, in display order; a packet that cannot be goes to `lost`."""
    try:
        for packet in container.demux(stream):
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=2)
            try:
                yield from packet.decode()
            except (av.FFmpegError, ValueError):
                lost.append(packet.pts)
    except av.FFmpegError:  # cut off: what came before it counts
        lost.append(None)


def _add_encoder(output, picture, source, fps: Fraction, crf: int):
    """The video stream of an output, for pictures like this one of the stream `source`."""
    encoder = output.add_stream("libx264", rate=fps, options={"crf": str(crf), "x264-params": X264})
    encoder.width, encoder.height, encoder.pix_fmt = (
        picture.width,
        picture.height,
        picture.format.name,
    )
    context = encoder.codec_context
    context.time_base, context.gop_size, context.max_b_frames, context.thread_count = (
        source.time_base,
        GOP,
        B_FRAMES,
        1,
    )
    context.colorspace, context.color_range = picture.colorspace, picture.color_range
    context.color_primaries, context.color_trc = (
        source.codec_context.color_primaries,
        source.codec_context.color_trc,
    )
    return encoder


def _picture(frame, size: tuple[int, int]):
    """A decoded frame as a picture to encode: scaled to `size` (width, height), 8 bit 4:2:0, then upright."""
    full_range = frame.color_range == ColorRange.JPEG
    rgb = {"dst_colorspace": "ITU601", "dst_color_range": "MPEG"} if frame.format.is_rgb else {}
    layout = (
        "yuvj420p" if full_range and not rgb else "yuv420p"
    )  # the j: PyAV 16 goes by the name alone
    picture = frame.reformat(*size, format=layout, interpolation="BICUBIC", **ON_ONE_THREAD, **rgb)
    signs = orientation(frame)
    if signs == UPRIGHT:
        return picture
    width, height = size
    planes = np.split(
        picture.to_ndarray().reshape(-1), [width * height, width * height * 5 // 4]
    )  # Y, and U and V of half the size
    shapes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
    turned = [
        upright(plane.reshape(*shape, 1), signs)
        for plane, shape in zip(planes, shapes, strict=True)
    ]
    flat = np.concatenate([plane.reshape(-1) for plane in turned])
    shown = av.VideoFrame.from_ndarray(
        flat.reshape(-1, turned[0].shape[1]), format=picture.format.name
    )
    shown.colorspace, shown.color_range = picture.colorspace, picture.color_range
    return shown


def _shown(frame, size: tuple[int, int]) -> np.ndarray:
    """What a reader should see of a frame: (H, W, 3) uint8 RGB, by a way of its own."""
    return upright(to_rgb(VideoReformatter(), frame, *size), orientation(frame))


def _verify(path: str, decoder: str, written: int, kept: dict[int, np.ndarray]) -> None:
    """Read an output back. Raises ReadError unless it has `written` frames and those kept look like their source."""
    with open_video(path, decoder) as video:
        if video.num_frames != written:
            raise ReadError(f"verification: {written} frames written, {video.num_frames} found")
        for number, frame in zip(kept, video.read(np.array(list(kept))), strict=True):
            if frame.shape != kept[number].shape:
                raise ReadError(
                    f"verification: frame {number} has the shape {frame.shape}, not {kept[number].shape}"
                )
            psnr = -10 * np.log10(np.mean((frame / 255.0 - kept[number] / 255.0) ** 2) + 1e-10)
            if psnr < LOWEST_PSNR:
                raise ReadError(
                    f"verification: frame {number} differs from its source (PSNR {psnr:.1f} dB)"
                )


def run_each(
    function: Callable, jobs: list[tuple], workers: int, seconds: float = HANG_SECONDS
) -> Iterator[tuple[int, object, str]]:
    """Call function(*job) for each job, each in a process of its own: a crash, or `seconds` without a frame, costs one job.

    Yields (job's number, result, "") or (number, None, reason), as they come.
    """
    context, waiting, running = multiprocessing.get_context("forkserver"), iter(enumerate(jobs)), {}
    # What takes long to import is imported once; a plain fork could inherit the locks of libraries' threads. Not this module itself:
    # a process runs it again where it is the program (python -m), and warns if it is imported already.
    context.set_forkserver_preload(["data.doctor", "data.pyav"])
    while True:
        for number, job in itertools.islice(waiting, workers - len(running)):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(there, function, job, seconds), daemon=True
            )
            process.start()
            there.close()  # the child's end is the only one left: when the child dies, `here` ends
            running[here] = number, process
        if not running:
            return
        for here in wait(list(running)):
            number, process = running.pop(here)
            try:
                result, reason = here.recv()
            except EOFError:
                process.join()
                hung = process.exitcode == 1
                result, reason = (
                    None,
                    f"no frame in {seconds} s"
                    if hung
                    else f"the decoder died ({signal.strsignal(-process.exitcode)})",
                )
            process.join()
            here.close()
            yield number, result, reason


def _child(there, function: Callable, job: tuple, seconds: float) -> None:
    """One job, in its process: sends (result, "") or (None, reason)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        there.send((function(*job), ""))
    except Exception as error:
        lines = str(getattr(error, "strerror", None) or error).splitlines() or [""]
        there.send(
            (
                None,
                lines[0]
                if isinstance(error, (ReadError, OSError))
                else f"{type(error).__name__}: {lines[0]}",
            )
        )


def _inputs(src: str, dst: str) -> tuple[list[str], list[str] | None, str]:
    """The videos of a folder or manifest, the labels of a manifest, and the folder that the outputs' names are relative to."""
    if os.path.isdir(src):
        root = os.path.abspath(src)
        if Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(src)):
            raise UserError(f"DST {dst} is SRC or lies inside it: give a folder elsewhere")
        return find_videos([src]), None, root
    if os.path.realpath(src) == os.path.realpath(os.path.join(dst, "manifest.csv")):
        raise UserError(
            f"SRC {src} would be overwritten by the manifest that DST gets: give another DST"
        )
    paths, labels = read_manifest(src)
    paths = [os.path.normpath(path) for path in paths]
    return paths, labels, os.path.commonpath([os.path.dirname(path) for path in paths])


def _check_settings(dst: str, settings: dict) -> None:
    """Make DST, and note in it what it is made from and how. Raises UserError if that was something else before."""
    note = Path(dst) / "reencode.json"
    try:
        Path(dst).mkdir(parents=True, exist_ok=True)
        if not note.exists():
            note.write_text(json.dumps(settings, indent=0) + "\n")
        before = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"DST {dst} cannot be used ({error}): give a folder that can be written to"
        ) from None
    if before != settings:
        changed = ", ".join(
            f"{name} {before.get(name)!r}, not {value!r}"
            for name, value in settings.items()
            if before.get(name) != value
        )
        raise UserError(
            f"DST {dst} was made with {changed}: give another folder, or empty this one"
        )


def _convert_all(todo: dict[str, str], total: int, args: argparse.Namespace) -> int:
    """Convert {source: target}; says how it goes and lists failures in DST/reencode_failed.csv. Returns how many failed."""
    listing, failed, damaged, begin = Path(args.dst) / "reencode_failed.csv", 0, 0, time.monotonic()
    jobs, said = (
        [
            (source, target, args.short_side, args.crf, args.decoder)
            for source, target in todo.items()
        ],
        begin,
    )
    with listing.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "reason"])
        for count, (number, result, reason) in enumerate(run_each(convert, jobs, args.workers), 1):
            if reason:
                failed += 1
                writer.writerow([jobs[number][0], reason])
                file.flush()
                Path(temporary_name(jobs[number][1])).unlink(
                    missing_ok=True
                )  # of a process that died
                if "No space left" in reason:
                    raise UserError(
                        f"DST {args.dst}: no space left; free some and start again, which goes on from here"
                    )
            damaged += bool(result and result[1])
            now = time.monotonic()
            if now - said > PROGRESS_SECONDS or count == len(jobs):
                left = (now - begin) / count * (len(jobs) - count)
                print0(
                    f"{total - len(jobs) + count}/{total} files, {failed} failed, {left / 60:.0f} min to go"
                )
                said = now
    if damaged:
        print0(f"{damaged} files have damaged parts, which were left out")
    if failed:
        print0(f"{listing}: the {failed} files that could not be converted, and why")
    else:
        listing.unlink()
    return failed


def _report_gain(done: dict[str, str], decoder: str, short_side: int) -> None:
    """Print what reading a clip costs before and after, measured on up to SAMPLE files, and the bytes of all files."""
    pairs = list(done.items())[:: max(len(done) // SAMPLE, 1)][:SAMPLE]
    costs = np.array(
        [[seconds_per_clip(path, decoder, short_side) for path in pair] for pair in pairs]
    )
    if len(costs):
        before, after = costs.mean(axis=0)
        print0(
            f"reading a clip (16 frames at stride 4, {decoder}, short side {short_side}, {len(costs)} files): {before * 1e3:.0f} ms before, "
            f"{after * 1e3:.0f} ms after = {1 / before:.1f} -> {1 / after:.1f} clips/s/core, {before / after:.1f}x"
        )
    old, new = (
        sum(os.path.getsize(path) for path in paths) / 1e6 for paths in (done.keys(), done.values())
    )
    print0(f"{len(done)} files, {old:.1f} MB -> {new:.1f} MB ({100 * (new / old - 1):+.0f} %)")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(
        "Convert videos once for training: small, a key frame every 16, no sound.",
        prog="python -m data.reencode",
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        help="folder of videos, searched recursively, or a manifest (path[,label])",
    )
    parser.add_argument(
        "dst", metavar="DST", help="folder for the results, which keep SRC's structure"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        default=256,
        help="reduce to this short side, never enlarge (default: %(default)s)",
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
        help="reads back and measures (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="files at a time (default: the cores this process may use)",
    )
    args = parser.parse_args(argv)
    if args.short_side < 16 or args.short_side % 2:
        raise UserError(f"--short_side {args.short_side} must be an even number from 16")
    if not 0 <= args.crf <= 51 or args.workers < 0:
        raise UserError(f"--crf {args.crf} must be 0 to 51, --workers {args.workers} at least 0")
    if "libx264" not in av.codecs_available:
        raise UserError(
            f"PyAV {av.__version__} has no libx264 encoder here: pip install --force-reinstall av (its wheels have it)"
        )
    args.workers = args.workers or usable_cores()
    paths, labels, root = _inputs(args.src, args.dst)
    _check_settings(
        args.dst,
        {"source": os.path.realpath(args.src), "short_side": args.short_side, "crf": args.crf},
    )
    sources = list(dict.fromkeys(paths))
    names = target_names([os.path.relpath(path, root) for path in sources])
    targets = {
        source: os.path.join(os.path.abspath(args.dst), name)
        for source, name in zip(sources, names, strict=True)
    }
    if both := set(targets) & set(targets.values()):
        raise UserError(
            f"DST {args.dst}: {min(both)} is a source, and would be an output: give another folder"
        )
    todo = {source: target for source, target in targets.items() if not os.path.exists(target)}
    print0(
        f"{len(targets)} videos, {len(targets) - len(todo)} converted before; {args.workers} at a time"
    )
    for target in todo.values():
        Path(temporary_name(target)).unlink(missing_ok=True)  # of a run that was killed
    failed = _convert_all(todo, len(targets), args) if todo else 0
    if failed == len(targets):
        raise UserError(
            f"none of the {failed} videos of {args.src} could be converted: see {os.path.join(args.dst, 'reencode_failed.csv')}"
        )
    done = {source: target for source, target in targets.items() if os.path.exists(target)}
    if labels is not None:
        rows = [
            (os.path.relpath(targets[path], args.dst), label)
            for path, label in zip(paths, labels, strict=True)
            if path in done
        ]
        new_paths, new_labels = map(list, zip(*rows, strict=True))
        write_manifest(
            os.path.join(args.dst, "manifest.csv"),
            new_paths,
            new_labels if any(new_labels) else None,
        )
    if len(todo) > failed:
        _report_gain(done, args.decoder, args.short_side)


if __name__ == "__main__":
    run_script(main)
