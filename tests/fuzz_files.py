"""Damage videos and images at random and read them as training does; none may end a run.

    nice python tests/fuzz_files.py [--mutants 2000] [--seed 0]

writes the counts into benchmarks/results/fuzz_files.json. Each damaged file, a mutant, is read in a
process of its own: a video by each decoder, a JPEG or PNG also as a frame in a folder. Outcomes:

read: the frames that the damage leaves alone are equal to those of the good file.
refused: ReadError, which training counts and lists.
refused whole: likewise, although the damage leaves some frames of the video alone.
killed: a library crashed. In training this ends a worker of the loader, not the run.

Faults are any other exception, a warning, wrong frames, and more than SECONDS of CPU time or
MAX_MEMORY. Files of faults and crashes stay in the folder --keep.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import av
import numpy as np
from damage_files import BOX_DAMAGE, DAMAGE, JPEG_DAMAGE, PNG_DAMAGE, boxes_of
from PIL import Image
from video_matrix import CASES
from video_writer import NoEncoder, numbered_picture, write_case

from data.clips import ClipSampling, clip_indices
from data.decode import decord_installed, describe, open_video
from data.images import image_size, read_image
from data.input_files import ReadError
from data.open_videos import OpenVideos
from data.video import VideoInfo
from data.video_index import new_index
from util.logger import installed_version

RESULTS = ROOT / "benchmarks" / "results" / "fuzz_files.json"
SECONDS = 20  # of CPU time for a mutant
WALL_SECONDS = 600  # likewise, on a machine that other programs keep busy
MAX_MEMORY = 2 * 1024**3  # bytes, resident
SAMPLING = ClipSampling(num_frames=16, sampling_rate=4)
FRAMES_AT_ONCE = 16
MAX_FRAMES = 400  # that are read of a mutant
SHORT_SIDE = 48
DECORD_TOLERANCE = 12  # gray levels: its color conversion is another one
VIDEOS = (  # of tests/video_matrix.py
    "h264.mp4",
    "h264_faststart.mp4",
    "h264_open.mp4",
    "h264_fragments.mp4",
    "cut_h264.mp4",
    "irregular_h264.mp4",
    "audio_h264.mp4",
    "h264.mov",
    "h264.mkv",
    "h264.ts",
    "h264.flv",
    "hevc.mp4",
    "hevc.mkv",
    "hevc_fragments.mp4",
    "vp8.webm",
    "vp9.webm",
    "vp9_superframes.mp4",
    "av1_svt.mp4",
    "av1_svt.webm",
    "mpeg4_no_b.avi",
    "mpeg4_b.avi",
    "mpeg4.mp4",
    "mpeg2.mpg",
    "mjpeg.avi",
    "mjpeg.mov",
    "prores.mov",
    "wmv2.wmv",
)
IMAGES = {  # name: mode of Pillow
    "color.jpg": "RGB",
    "gray.jpg": "L",
    "color.png": "RGB",
    "palette.png": "P",
    "gray16.png": "I;16",
    "alpha.png": "RGBA",
    "color.tiff": "RGB",
    "gray16.tiff": "I;16",
    "color.webp": "RGB",
    "palette.gif": "P",
    "color.avif": "RGB",
}
IMAGE_SIZE = (80, 64)
GOOD = ("read", "refused", "refused whole", "killed")
FOLDER_FRAMES = 5
FOLDER_FPS = 30


class Packet(NamedTuple):
    """Where the packet of a frame lies in the file."""

    pts: int
    begin: int
    end: int
    gop: int


class Source(NamedTuple):
    """A good file, and what it shows."""

    name: str
    data: bytes
    pictures: np.ndarray  # (N, H, W, 3) uint8
    packets: list[Packet]  # of the frames of a video, in the order of `pictures`
    damage: dict[str, Callable]


class Mutant(NamedTuple):
    """A damaged file."""

    number: int
    source: Source
    how: str
    data: bytes
    reader: str  # of READERS


class Outcome(NamedTuple):
    """What came of reading a mutant."""

    mutant: Mutant
    kind: str  # of GOOD, otherwise a fault
    detail: str
    seconds: float  # of CPU time
    memory: int  # the most, in bytes

    @property
    def is_fault(self) -> bool:
        """Whether the file would end a run, or give it wrong frames."""
        return self.kind not in GOOD

    def __str__(self) -> str:
        mutant = self.mutant
        return (
            f"{mutant.number} {mutant.source.name}, {mutant.how}, by {mutant.reader}: "
            f"{self.kind} {self.detail} ({self.seconds:.1f} s, {self.memory >> 20} MiB)"
        )


# Good files


class Sources:
    """The good files, each written into a folder when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cases = {case.name: case for case in CASES}
        self.written: dict[str, Source | None] = {}

    def get(self, name: str) -> Source | None:
        """Return a good file, None if the packages here cannot write it."""
        if name not in self.written:
            try:
                self.written[name] = self._write(name)
            except (NoEncoder, KeyError, OSError, ValueError):
                self.written[name] = None
        return self.written[name]

    def _write(self, name: str) -> Source:
        """Write a good file. Raises what its encoder raises."""
        if name in IMAGES:
            return image_source(self.folder / name, IMAGES[name])
        return video_source(write_case(self.cases[name], self.folder))


def video_source(path: Path) -> Source:
    """Describe a good video."""
    data = path.read_bytes()
    with open_video(str(path), "pyav") as video:
        pictures = video.read(np.arange(video.num_frames))
    damage = dict(DAMAGE)
    if is_mp4(data):
        damage |= BOX_DAMAGE
    return Source(path.name, data, pictures, shown_packets(path)[: len(pictures)], damage)


def is_mp4(data: bytes) -> bool:
    """Return whether a good file is MP4 or MOV."""
    return data[4:8] == b"ftyp"


def shown_packets(path: Path) -> list[Packet]:
    """Return the packet of each frame of a video, in display order if the file stores one.

    Containers that split or group packets give the place of a start only, or none. There a packet
    is taken to end with the next one at another place.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux() if packet.size]
        in_mov = container.format.name.startswith("mov")
        in_avi = container.format.name == "avi"
        last = path.stat().st_size
        starts = [last if packet.pos is None else packet.pos for packet in packets]
        places = [*sorted(set(starts)), last, last]
        shown = []
        gop = -1
        for packet, start in zip(packets, starts, strict=True):
            if packet.stream is not stream or packet.is_discard:
                continue
            gop += packet.is_keyframe
            end = places[places.index(start) + 2]
            if in_mov:
                end = start + packet.size
            shown.append(Packet(packet.pts or 0, start, end, gop))
    return shown if in_avi else sorted(shown, key=lambda packet: packet.pts)


def image_source(path: Path, mode: str) -> Source:
    """Write a good image. Raises KeyError, OSError or ValueError if Pillow cannot write it."""
    picture = numbered_picture(77, *IMAGE_SIZE)
    image = Image.fromarray(picture.astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((picture[..., 0] * 257).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(path)
    damage = DAMAGE | {".png": PNG_DAMAGE, ".jpg": JPEG_DAMAGE}.get(path.suffix, {})
    pictures = np.asarray(read_image(str(path)))[None]
    return Source(path.name, path.read_bytes(), pictures, [], damage)


def mutants_of(sources: Sources, count: int, seed: int) -> Iterator[Mutant]:
    """Yield damaged files: all sources in turn, in all ways at random, for each reader."""
    names = np.random.default_rng(seed).permutation([*VIDEOS, *IMAGES]).tolist()
    for number in range(count):
        source = sources.get(names[number % len(names)])
        if source is None:
            continue
        draw = np.random.default_rng([seed, number])
        ways = list(source.damage)
        how = ways[draw.integers(len(ways))]
        data = source.damage[how](source.data, draw)
        for reader in readers_of(source):
            yield Mutant(number, source, how, data, reader)


def readers_of(source: Source) -> list[str]:
    """Return the names of the readers of a file."""
    if not source.packets:
        return ["image", "folder"] if source.name.endswith((".jpg", ".png")) else ["image"]
    return ["pyav", "decord"] if decord_installed() else ["pyav"]


# What the damage leaves alone


def intact_frames(source: Source, data: bytes) -> list[int]:
    """Return the indices of the frames of a video that must be equal to those of the good file.

    Before the first damaged byte these are all frames, in their order: damaged time stamps may put
    others between them. In MP4, damage outside the coded frames may change all of them; damage
    inside changes only its own GOP and, if the next one is open, that one.
    """
    shared = min(len(source.data), len(data))
    differ = np.frombuffer(source.data[:shared], np.uint8) != np.frombuffer(data[:shared], np.uint8)
    damaged = np.flatnonzero(differ)
    first = int(damaged[0]) if len(damaged) else shared
    ends = np.maximum.accumulate([packet.end for packet in source.packets])
    before = np.flatnonzero(ends <= first).tolist()
    if not is_mp4(source.data):
        return before
    boxes = boxes_of(source.data)
    if any(box.kind == b"moof" for box in boxes):
        header_end = next(box.end for box in boxes if box.kind == b"moov")
        return before if first >= header_end else []
    if len(data) < len(source.data) or (len(data) > len(source.data) and len(damaged)):
        return []
    return frames_beside(source, damaged)


def frames_beside(source: Source, damaged: np.ndarray) -> list[int]:
    """Return the indices of the frames in GOPs of an MP4 file that damaged bytes cannot change.

    damaged: offsets of the damaged bytes, in a file of the same length or a longer one.
    """
    hit = set()
    in_packets = np.zeros(len(damaged), bool)
    for packet in source.packets:
        inside = (damaged >= packet.begin) & (damaged < packet.end)
        in_packets |= inside
        if inside.any():
            hit |= {packet.gop, packet.gop + 1}
    if not in_packets.all():
        return []
    return [index for index, packet in enumerate(source.packets) if packet.gop not in hit]


# Reading


def read_video(mutant: Mutant, path: str) -> str:
    """Read a damaged video as training does; return what is wrong with its frames, or nothing.

    Raises ReadError.
    """
    info = describe(path)
    fault = index_fault(path, info)
    if fault:
        return fault
    videos = OpenVideos(mutant.reader, SHORT_SIDE)
    shapes = set()
    for start in np.random.default_rng(mutant.number).random(2):
        try:
            with videos.open(path, info, keep=True) as video:
                shapes.add(video.read(clip_indices(video, SAMPLING, start)).shape)
        except ReadError:  # all frames of this clip are damaged
            continue
    if len(shapes) > 1 or any(shape[0] != SAMPLING.num_frames for shape in shapes):
        return f"clips have the shapes {shapes}"
    return compare_frames(mutant, path, info)


def index_fault(path: str, info: VideoInfo) -> str:
    """Return what is wrong with the properties of a video, or nothing."""
    index = new_index([path], None)
    index.set_row(0, info)
    again = index.info(0, path)
    if again is None or again._replace(times=None) != info._replace(times=None):
        return f"the video index changes {info} to {again}"
    if not (info.frames > 0 and 0 < info.fps < np.inf and info.width > 0 and info.height > 0):
        return f"implausible properties: {info}"
    if info.times is None:
        return ""
    if len(info.times) != info.frames or not np.isfinite(info.times).all():
        return f"{len(info.times)} times of {info.frames} frames"
    return ""


def compare_frames(mutant: Mutant, path: str, info: VideoInfo) -> str:
    """Read all frames; return what is wrong with those that the damage leaves alone, or nothing."""
    shown: list = []
    with open_video(path, mutant.reader, info=info) as video:
        num_frames = min(video.num_frames, MAX_FRAMES)
        for begin in range(0, num_frames, FRAMES_AT_ONCE):
            indices = np.arange(begin, min(begin + FRAMES_AT_ONCE, num_frames))
            try:
                shown.extend(video.read(indices))
            except ReadError:
                shown.extend([None] * len(indices))
    tolerance = DECORD_TOLERANCE if mutant.reader == "decord" else 0
    intact = intact_frames(mutant.source, mutant.data)
    found = 0
    for picture in shown:
        if found == len(intact):
            break
        if is_same_picture(picture, mutant.source.pictures[intact[found]], tolerance):
            found += 1
    if found < len(intact):
        return f"frame {intact[found]} is missing, of {len(intact)} intact ones"
    return ""


def is_same_picture(picture: np.ndarray | None, expected: np.ndarray, tolerance: float) -> bool:
    """Return whether a picture is the expected one, but for a mean difference of gray levels."""
    if picture is None or picture.shape != expected.shape:
        return False
    return bool(np.abs(picture.astype(int) - expected).mean() <= tolerance)


def read_image_file(_mutant: Mutant, path: str) -> str:
    """Read a damaged image; return what is wrong with it, or nothing. Raises ReadError."""
    image = read_image(path)
    if image.mode != "RGB" or image.size != image_size(path):
        return f"mode {image.mode}, size {image.size}, not {image_size(path)}"
    return ""


def read_folder(mutant: Mutant, path: str) -> str:
    """Read a folder with one damaged frame; return what is wrong with the others, or nothing."""
    folder = path + ".frames"
    os.mkdir(folder)
    position = mutant.number % FOLDER_FRAMES
    for index in range(FOLDER_FRAMES):
        data = mutant.data if index == position else mutant.source.data
        Path(folder, f"{index:03d}{Path(path).suffix}").write_bytes(data)
    info = describe(folder, FOLDER_FPS)
    videos = OpenVideos("pyav", SHORT_SIDE, FOLDER_FPS)
    with videos.open(folder, info, keep=False) as video:
        video.read(clip_indices(video, SAMPLING, 0.5))
    expected = mutant.source.pictures[0]
    if (info.height, info.width) != expected.shape[:2]:
        return ""  # all frames have the size in the header of the damaged one
    with open_video(folder, info=info, frames_fps=FOLDER_FPS) as video:
        frames = video.read(np.arange(FOLDER_FRAMES))
    for index, frame in enumerate(frames):
        if index != position and not np.array_equal(frame, expected):
            return f"frame {index} is wrong"
    return ""


READERS = {
    "pyav": read_video,
    "decord": read_video,
    "image": read_image_file,
    "folder": read_folder,
}


# The campaign


def outcome_of(mutant: Mutant, path: str) -> tuple[str, str]:
    """Return the kind of outcome of reading a mutant, and its details."""
    try:
        with warnings.catch_warnings(record=True) as caught:  # those that a user would see
            fault = READERS[mutant.reader](mutant, path)
    except ReadError as error:
        if not str(error).isprintable():
            return "unclear", repr(str(error))
        if mutant.source.packets and intact_frames(mutant.source, mutant.data):
            return "refused whole", str(error)
        return "refused", str(error)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return "raised", f"{type(error).__name__} in {where}: {error}"[:300]
    if caught:
        return "warned", str(caught[0].message)
    return ("wrong frames", fault) if fault else ("read", "")


def read_in_child(mutant: Mutant, path: Path, answer: Path) -> None:
    """Read a mutant, write the outcome into a file, and end the process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WALL_SECONDS)
    try:
        unfinished = answer.with_suffix(".part")
        unfinished.write_text(json.dumps(outcome_of(mutant, str(path))))
        unfinished.rename(answer)
    finally:
        os._exit(0)


def read_safely(mutant: Mutant, folder: Path) -> Outcome:
    """Return the outcome of reading a mutant in a process that may crash or hang.

    folder: an empty one for its files.
    """
    path = folder / f"mutant{Path(mutant.source.name).suffix}"
    path.write_bytes(mutant.data)
    answer = folder / "answer.json"
    child = os.fork()
    if child == 0:
        read_in_child(mutant, path, answer)
    status, usage = wait_for(child)
    memory = usage.ru_maxrss * 1024
    number = os.WTERMSIG(status)
    if memory > MAX_MEMORY:
        kind, detail = "memory", ""
    elif answer.exists():
        kind, detail = json.loads(answer.read_text())
    elif number in (signal.SIGXCPU, signal.SIGALRM):
        kind, detail = "hang", signal.strsignal(number) or ""
    else:
        kind, detail = "killed", f"with status {status}"
    return Outcome(mutant, kind, detail, usage.ru_utime + usage.ru_stime, memory)


def wait_for(child: int) -> tuple[int, resource.struct_rusage]:
    """Return how a process ended and what it used; kill it if it takes far too much memory."""
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return status, usage
        pages = Path(f"/proc/{child}/statm").read_text().split()
        if int(pages[1]) * resource.getpagesize() > 1.5 * MAX_MEMORY:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def campaign(mutants: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Yield the outcomes of reading mutants; files of faults and crashes stay in the folder."""
    sources = Sources(folder)
    for mutant in mutants_of(sources, mutants, seed):
        place = folder / f"{mutant.number}_{mutant.reader}"
        place.mkdir()
        outcome = read_safely(mutant, place)
        if not outcome.is_fault and outcome.kind != "killed":
            shutil.rmtree(place)
        yield outcome


def summarize(outcomes: list[Outcome], seed: int, minutes: float) -> dict:
    """Return the counts of a campaign, for the JSON."""
    kinds = Counter(f"{each.mutant.reader}: {each.kind}" for each in outcomes)
    by_damage = Counter(f"{each.mutant.how}: {each.kind}" for each in outcomes)
    packages = ["av", "decord", "numpy", "pillow"]
    return {
        "mutants": len({each.mutant.number for each in outcomes}),
        "seed": seed,
        "sources": sorted({each.mutant.source.name for each in outcomes}),
        "outcomes": dict(sorted(kinds.items())),
        "by_damage": dict(sorted(by_damage.items())),
        "faults": [str(each) for each in outcomes if each.is_fault],
        "killed": [str(each) for each in outcomes if each.kind == "killed"],
        "refused_whole": [str(each) for each in outcomes if each.kind == "refused whole"],
        "max_memory_mib": max(each.memory for each in outcomes) >> 20,
        "max_cpu_seconds": round(max(each.seconds for each in outcomes), 2),
        "minutes": round(minutes, 1),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in packages},
    }


def main() -> None:
    """Run the command line; exit with code 1 if there are faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the counts")
    parser.add_argument("--keep", type=Path, help="new folder for files of faults and crashes")
    args = parser.parse_args()
    begin = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=args.keep is None)
        for outcome in campaign(args.mutants, args.seed, folder):
            outcomes.append(outcome)
            if outcome.kind not in ("read", "refused"):
                print(outcome, flush=True)
    summary = summarize(outcomes, args.seed, (time.monotonic() - begin) / 60)
    args.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["outcomes"]), f"{len(summary['faults'])} faults")
    sys.exit(1 if summary["faults"] else 0)


if __name__ == "__main__":
    main()
