"""Measure what a clip of a part of a file costs, by the length of the file.

    python benchmarks/long_files.py

The files repeat the same ten seconds of H.264 (340 x 256 pixels, 30 frames/s, GOP 250), for ten
seconds and for ten hours. Samples are parts of ten seconds at random places. A training clip has 16
frames at stride 4, cropped to 224 pixels. CPU time of one process with one thread. Writes
benchmarks/results/long_files.json and .md.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data_pipeline import CROP, FILES, RESULTS, machine, write_file

from data.clips import ClipSampling
from data.datasets import ClipDataset
from data.decode import describe
from data.video_index import new_index
from util.dist import print0

SECONDS = 10  # of the file that is repeated, and of a part
LENGTHS = {"10 seconds": 1, "10 hours": 3600}  # repetitions
DECODERS = ("pyav", "decord")


def repeat_file(source: Path, target: Path, times: int) -> None:
    """Write the packets of a video of SECONDS `times` times in a row."""
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
        ticks = int(Fraction(SECONDS) / stream.time_base)
        with av.open(str(target), "w") as output:
            copy = output.add_stream_from_template(stream)
            for index in range(times):
                for packet in packets:
                    shifted = av.Packet(bytes(packet))
                    shifted.stream = copy
                    shifted.time_base = stream.time_base
                    shifted.pts = packet.pts + index * ticks
                    shifted.dts = packet.dts + index * ticks
                    shifted.is_keyframe = packet.is_keyframe
                    output.mux(shifted)


def parts(times: int, count: int) -> np.ndarray:
    """Return random parts (count, 2) of a file of `times` repetitions, in seconds."""
    starts = SECONDS * np.random.default_rng(0).integers(times, size=count).astype(float)
    return np.stack([starts, starts + SECONDS], axis=1)


def measure(path: Path, times: int, decoder: str, count: int) -> dict[str, float]:
    """Return CPU milliseconds of the first clip, which opens the file, and the others' median."""
    index = new_index([str(path)], None)
    index.set_row(0, describe(str(path)))
    dataset = ClipDataset(
        paths=[str(path)] * count,
        labels=None,
        spans=parts(times, count),
        sampling=ClipSampling(num_frames=16, sampling_rate=4),
        repeat_aug=1,
        repeat_windows=1,
        transform=CROP,
        decoder=decoder,
        short_side=256,
        seed=0,
        noise_tokens=0,
        known=index,
    )
    milliseconds = []
    for sample in range(count):
        start = time.process_time()
        assert dataset[(0, sample)]["clips"] is not None
        milliseconds.append(1000 * (time.process_time() - start))
    return {
        "first clip, ms": milliseconds[0],
        "another clip, ms": statistics.median(milliseconds[1:]),
    }


def table(result: dict) -> str:
    """Return the result as Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        "# A clip of a part of a file, by the length of the file",
        "",
        f"Made by `benchmarks/long_files.py`: CPU time, medians of {result['clips']}; {about}.",
        "",
        "| decoder | file | first clip, ms | another clip, ms |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [row["decoder"], row["file"]]
        cells += [f"{row[name]:.0f}" for name in ("first clip, ms", "another clip, ms")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        once = Path(folder, "once.mp4")
        write_file(once, FILES["340x256 GOP 250"])
        for name, times in LENGTHS.items():
            path = Path(folder, f"{times}.mp4")
            repeat_file(once, path, times)
            for decoder in DECODERS:
                row = {"decoder": decoder, "file": name}
                row |= measure(path, times, decoder, args.clips)
                rows.append(row)
                print0(json.dumps(row))
    about = machine() | {"python": platform.python_version()}
    result = {"machine": about, "clips": args.clips, "rows": rows}
    (args.out / "long_files.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "long_files.md").write_text(table(result))


if __name__ == "__main__":
    main()
