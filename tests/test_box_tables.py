"""The number of packets that MP4 files list, and files that list more than they can hold."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from make_videos import write_video
from video_writer import Case, Encoding, encode, write_case

from data.box_tables import ALWAYS_ALLOWED_PACKETS, check_tables, listed_packets
from data.decode import describe, open_video
from data.input_files import ReadError

FRAGMENTS = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
MANY = 60_000_000
SHORT = Encoding("mpeg4", frames=12, b_frames=0)


def listed(path: Path) -> int:
    """Return the number of packets that a file lists."""
    with open(path, "rb") as file:
        return listed_packets(file.fileno(), path.stat().st_size)


def num_packets(path: Path) -> int:
    """Return the number of packets in a file, of all streams."""
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux())


def put(path: Path, box: bytes, offset: int, number: int) -> None:
    """Put a number of 32 bits into the first box of a kind, at an offset from its start."""
    data = bytearray(path.read_bytes())
    start = data.index(box) - 4 + offset
    data[start : start + 4] = number.to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "muxer"),
    [("a.mp4", ()), ("a.mov", (("movflags", "faststart"),)), ("fragments.mp4", FRAGMENTS)],
    ids=["MP4", "MOV", "fragments"],
)
def test_listed_packets_are_those_in_the_file(name, muxer, tmp_path):
    path = tmp_path / name
    encode(SHORT._replace(audio=True), path, muxer)
    assert listed(path) == num_packets(path) > SHORT.frames


def test_other_formats_list_nothing(tmp_path):
    for name in ("a.mkv", "a.avi", "a.ts"):
        path = write_case(Case(name, "", SHORT), tmp_path)
        check_tables(str(path))
        assert listed(path) == 0
    path.write_bytes(bytes(1000))
    assert listed(path) == 0


def test_uncompressed_sound_is_not_counted(tmp_path):
    path = tmp_path / "a.mov"
    samples = np.zeros((1, 2 * 48_000), np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
    put(path, b"stsz", 16, MANY)
    assert listed(path) == 0


@pytest.mark.parametrize(
    ("muxer", "changes"),
    [
        ((), {(b"stsz", 12): 1, (b"stsz", 16): MANY, (b"stsc", 20): MANY}),
        (FRAGMENTS, {(b"trun", 8): 0, (b"trun", 12): MANY}),
    ],
    ids=["one table", "fragments"],
)
def test_f01_more_packets_than_the_file_can_hold_are_refused(muxer, changes, tmp_path):
    path = tmp_path / "a.mp4"
    encode(SHORT, path, muxer)
    info = describe(str(path))
    for (box, offset), number in changes.items():
        put(path, box, offset, number)
    for read in (describe, open_video):
        with pytest.raises(ReadError, match=f"damaged: its tables list {MANY}"):
            read(str(path))
    assert info.frames == SHORT.frames


def test_long_recordings_are_not_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=12)
    put(path, b"stsz", 16, 2 * ALWAYS_ALLOWED_PACKETS)
    with pytest.raises(ReadError):
        check_tables(str(path))
    os.truncate(path, 2 * ALWAYS_ALLOWED_PACKETS * 20)  # 20 bytes for each
    check_tables(str(path))
