"""Converting videos: same frames, times and names in another format; resumable, never half done."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pandas as pd
import pytest
from av.video.frame import PictureType
from make_videos import frame_number, numbered_frame, write_folder, write_video

from data.decode import open_video
from data.input_files import ReadError
from data.manifest import read_manifest
from data.pyav_compat import VERSION
from tools import reencode
from tools.reencode import Timestamps, main, output_size, run_each, target_names
from util.dist import UserError

ROOT = Path(__file__).parent.parent


def packets(path: Path) -> tuple[list, Fraction]:
    """Return the video packets of a file, in the order of the file, and their time base."""
    with av.open(str(path)) as container:
        assert len(container.streams) == 1
        time_base = container.streams.video[0].time_base
        return [packet for packet in container.demux(video=0) if packet.size], time_base


def shown_numbers(path: Path) -> list[int]:
    """Return the numbers that are drawn into the frames of a file."""
    with open_video(str(path), "pyav") as video:
        return [frame_number(frame) for frame in video.read(np.arange(video.num_frames))]


class Encoding(NamedTuple):
    """How frames are encoded."""

    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    full_range: bool = False  # luma of 0 to 255


H264 = Encoding()


def write_timed(
    path: Path,
    stamps: list[int],
    rotation: int = 0,
    aspect: Fraction | None = None,
    size: tuple[int, int] = (96, 64),
    encoding: Encoding = H264,
) -> Path:
    """Numbered frames at these times (ms)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoding.codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = encoding.pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        color_range = None
        if encoding.full_range:
            stream.codec_context.color_range = 2
            color_range = "JPEG"
        if rotation:
            stream.set_display_rotation(rotation)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            frame = frame.reformat(format=encoding.pix_fmt, dst_color_range=color_range)
            frame.pts = stamp
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_structure_frames_and_format(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_folder(src, videos=2)
    write_video(src / "deep" / "er" / "big.MKV", frames=50, size=(400, 300), gop=50)
    main([str(src), str(dst), "--workers", "2", "--short_side", "128"])
    made = sorted(str(path.relative_to(dst)) for path in dst.rglob("*") if path.is_file())
    assert made == ["class_0/clip_0.mp4", "class_1/clip_1.mp4", "deep/er/big.mp4", "reencode.json"]
    for name, frames in (
        ("class_0/clip_0.mp4", 20),
        ("class_1/clip_1.mp4", 24),
        ("deep/er/big.mp4", 50),
    ):
        assert shown_numbers(dst / name) == list(range(frames))
    with open_video(str(dst / "deep/er/big.mp4")) as video:
        assert video.read(np.array([0])).shape == (1, 128, 170, 3)
        assert video.fps == pytest.approx(30, rel=2e-3)  # the MKV rounds to milliseconds
    coded, _ = packets(dst / "deep/er/big.mp4")
    assert [i for i, packet in enumerate(coded) if packet.is_keyframe] == [0, 16, 32, 48]
    with av.open(str(dst / "deep/er/big.mp4")) as container:
        types = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
    assert "BB" in "".join(types)
    assert "BBB" not in "".join(types)
    with av.open(str(dst / "deep/er/big.mp4")) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        decoded = len(list(container.decode(video=0)))
    assert decoded == 50 - types.count("B") < 40  # every B frame can be skipped
    data = (dst / "deep/er/big.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    printed = capsys.readouterr().out
    assert "3/3 files, 0 failed" in printed
    assert "clips/s/core" in printed


def test_a_second_run_converts_nothing(tmp_path, capsys):
    write_folder(tmp_path / "src", videos=3)
    main([str(tmp_path / "src"), str(tmp_path / "dst")])
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*") if path.is_file()
    }
    capsys.readouterr()
    main([str(tmp_path / "src"), str(tmp_path / "dst")])
    assert capsys.readouterr().out.startswith("3 videos, 3 converted before")
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "dst").rglob("*") if path.is_file()
    }
    for changed in (["--short_side", "128"], ["--crf", "30"]):
        with pytest.raises(UserError, match="was made with"):
            main([str(tmp_path / "src"), str(tmp_path / "dst"), *changed])


@pytest.mark.slow
def test_a_killed_run_leaves_temporaries_only(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    for index in range(2):
        write_video(src / f"{index}.mp4", frames=750, size=(320, 240), gop=250)
    command = [sys.executable, "-m", "tools.reencode", str(src), str(dst), "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (dst / ".0.mp4.part").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in dst.iterdir() if path.name != "reencode.json"] in (
        [".0.mp4.part"],
        [".0.mp4.part", "reencode_failed.csv"],
        ["reencode_failed.csv", ".0.mp4.part"],
    )
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=200)
    assert sorted(path.name for path in dst.iterdir()) == ["0.mp4", "1.mp4", "reencode.json"]
    assert len(packets(dst / "0.mp4")[0]) == 750


def test_times_are_kept(tmp_path):
    stamps = [0, 33, 67, 100, 300, 500, 700, 733, 767, 800, 1000, 1200]
    (tmp_path / "src").mkdir()
    write_timed(tmp_path / "src" / "vfr.mkv", [stamp + 500 for stamp in stamps])
    main([str(tmp_path / "src"), str(tmp_path / "dst")])
    coded, base = packets(tmp_path / "dst" / "vfr.mp4")
    assert sorted(float(packet.pts * base) for packet in coded) == pytest.approx(
        [stamp / 1000 for stamp in stamps], abs=1e-3
    )
    assert shown_numbers(tmp_path / "dst" / "vfr.mp4") == list(range(12))


def test_avi_and_raw_streams_get_even_time_stamps(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("a.avi", "b.h264"):
        write_video(tmp_path / "src" / name, frames=30)
    (tmp_path / "list.csv").write_text("path\nsrc/a.avi\nsrc/b.h264\n")
    main([str(tmp_path / "list.csv"), str(tmp_path / "dst")])
    for name, rate in (("a.mp4", 30), ("b.mp4", 25)):  # a raw stream has no rate: FFmpeg takes 25
        coded, base = packets(tmp_path / "dst" / name)
        assert np.diff(sorted(float(packet.pts * base) for packet in coded)) == pytest.approx(
            np.full(29, 1 / rate), abs=1e-3
        )
        assert shown_numbers(tmp_path / "dst" / name) == list(range(30))


@pytest.mark.skipif(VERSION < 17, reason="PyAV 16 cannot write a rotation")
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_goes_into_the_pixels(tmp_path, rotation):
    (tmp_path / "src").mkdir()
    source = write_timed(
        tmp_path / "src" / "v.mp4", list(range(0, 660, 33)), rotation, size=(98, 66)
    )
    main([str(tmp_path / "src"), str(tmp_path / "dst")])
    with (
        open_video(str(source), "pyav") as before,
        open_video(str(tmp_path / "dst/v.mp4"), "pyav") as after,
    ):
        old, new = before.read(np.arange(20)), after.read(np.arange(20))
    assert old.shape == new.shape == (20, *((66, 98) if rotation == 180 else (98, 66)), 3)
    assert np.abs(old.astype(int) - new).mean() < 6
    with av.open(str(tmp_path / "dst/v.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full.mp4", {"encoding": Encoding(full_range=True)}),
        ("ten.mkv", {"encoding": Encoding(pix_fmt="yuv420p10le")}),
        ("rgb.avi", {"encoding": Encoding("ffv1", "bgr0")}),
        ("444.mp4", {"encoding": Encoding(pix_fmt="yuv444p"), "size": (97, 65)}),
    ],
)
def test_colors_are_those_of_the_source(tmp_path, name, options):
    (tmp_path / "src").mkdir()
    source = write_timed(tmp_path / "src" / name, list(range(0, 330, 33)), **options)
    main([str(tmp_path / "src"), str(tmp_path / "dst"), "--crf", "5"])
    target = tmp_path / "dst" / (Path(name).stem + ".mp4")
    with open_video(str(source), "pyav") as before, open_video(str(target), "pyav") as after:
        old, new = before.read(np.arange(10)), after.read(np.arange(10))
    assert new.shape == (10, 64, 96, 3)
    assert shown_numbers(target) == list(range(10))
    if "size" not in options:
        shift = np.abs(old.mean((0, 1, 2)) - new.mean((0, 1, 2))).max()
        assert shift < 1.5  # a wrong range or matrix gives 5 and more
    with av.open(str(target)) as container:
        pixel_format = next(container.decode(video=0)).format.name
    assert (pixel_format == "yuvj420p") == (name == "full.mp4")


def test_time_stamps_increase_strictly_from_zero():
    timestamps = Timestamps(step=3)
    stamps = [7, None, 12, 11, 20, None]
    assert [timestamps.following(stamp) for stamp in stamps] == [0, 3, 5, 7, 13, 19]


def test_output_sizes():
    assert output_size(1920, 1080, Fraction(1), 256) == (454, 256)
    assert output_size(320, 240, None, 256) == (320, 240)
    assert output_size(161, 121, None, 256) == (160, 120)
    assert output_size(1, 1, None, 256) == (2, 2)
    assert output_size(720, 576, Fraction(16, 15), 256) == (340, 256)  # 4:3
    assert output_size(720, 576, Fraction(64, 45), 256) == (454, 256)  # 16:9
    assert output_size(480, 576, Fraction(1, 2), 256) == (240, 576)
    assert output_size(2, 180, Fraction(160), 256) == (2, 180)  # no such pixels


def test_ff_pixels_become_square(tmp_path):
    (tmp_path / "src").mkdir()
    write_timed(tmp_path / "src" / "v.mp4", [0, 33, 66], aspect=Fraction(3, 2))
    main([str(tmp_path / "src"), str(tmp_path / "dst")])
    with av.open(str(tmp_path / "dst/v.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.sample_aspect_ratio or 1) == (96, 42, 1)


def test_names_never_collide(tmp_path):
    assert target_names(["a/b.avi", "a/b.mp4", "c/b.avi"]) == [
        "a/b.avi.mp4",
        "a/b.mp4.mp4",
        "c/b.mp4",
    ]
    names = ["b.avi", "b.mp4", "b.avi.mp4", "b.avi.mkv", "b", "b.mp4.mp4"]
    assert len(set(target_names(names))) == len(names)
    assert target_names(names[::-1]) == target_names(names)[::-1]
    write_video(tmp_path / "src" / "b.avi", frames=20, codec="mpeg4", b_frames=0)
    write_video(tmp_path / "src" / "b.mp4", frames=25)
    main([str(tmp_path / "src"), str(tmp_path / "dst")])
    assert len(shown_numbers(tmp_path / "dst" / "b.avi.mp4")) == 20
    assert len(shown_numbers(tmp_path / "dst" / "b.mp4.mp4")) == 25


def test_broken_files_are_listed_and_the_manifest_is_written(tmp_path, capsys):
    folder = tmp_path / "in"
    write_video(folder / "x" / "good.mp4")
    write_video(folder / "y" / "2 good, too.mkv")
    (folder / "text.mp4").write_text("no video")
    os.mkfifo(folder / "pipe.mp4")
    rows = [
        ("x/good.mp4", "run, fast"),
        ("text.mp4", "sit"),
        ("y/2 good, too.mkv", "7"),
        ("gone.mp4", "sit"),
        ("pipe.mp4", "sit"),
        ("x/good.mp4", "again"),
    ]
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(folder / "list.csv", index=False)
    main([str(folder / "list.csv"), str(tmp_path / "dst")])
    assert read_manifest(tmp_path / "dst" / "manifest.csv")[:2] == (
        [
            str(tmp_path / "dst" / name)
            for name in ("x/good.mp4", "y/2 good, too.mp4", "x/good.mp4")
        ],
        ["run, fast", "7", "again"],
    )
    table = pd.read_csv(tmp_path / "dst" / "reencode_failed.csv").set_index("path")["reason"]
    assert sorted(table.index) == [
        str(folder / name) for name in ("gone.mp4", "pipe.mp4", "text.mp4")
    ]
    assert table[str(folder / "gone.mp4")] == "No such file or directory"
    assert table[str(folder / "pipe.mp4")] == "not a regular file"
    assert "3 failed" in capsys.readouterr().out


def test_an_output_that_differs_is_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "src" / "v.mp4")
    to_yuv420 = reencode._to_yuv420
    monkeypatch.setattr(
        reencode, "_to_yuv420", lambda frame, size: to_yuv420(_negative(frame), size)
    )
    with pytest.raises(ReadError, match="verification: frame 0 differs from its source"):
        reencode.convert(
            str(tmp_path / "src" / "v.mp4"), str(tmp_path / "dst" / "v.mp4"), 256, 23, "pyav"
        )
    assert not list((tmp_path / "dst").iterdir())


def _negative(frame):
    """Return the frame with its colors inverted."""
    return av.VideoFrame.from_ndarray(255 - frame.to_ndarray(format="rgb24"), format="rgb24")


def _behave(how: str) -> str:
    """Fail in the given way."""
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise RuntimeError("first\nsecond")
    return how


def test_a_crash_or_hang_fails_one_job():
    begin = time.monotonic()
    jobs = [(how,) for how in ("a", "crash", "hang", "raise", "b")]
    outcome = {index: (result, reason) for index, result, reason in run_each(_behave, jobs, 2, 1)}
    assert time.monotonic() - begin < 60
    assert outcome == {
        0: ("a", ""),
        1: (None, "the decoder died (Segmentation fault)"),
        2: (None, "no frame in 1 s"),
        3: (None, "RuntimeError: first"),
        4: ("b", ""),
    }


def test_bad_input_is_one_line(tmp_path):
    src = tmp_path / "src"
    write_video(src / "v.mp4", frames=3)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([src, src], "a folder inside it"),
        ([src, src / "small"], "a folder inside it"),
        ([tmp_path / "none", tmp_path / "dst"], "not found"),
        ([tmp_path / "empty", tmp_path / "dst"], "no videos"),
        ([src, tmp_path / "file"], "cannot be used"),
        ([src, tmp_path / "dst", "--short_side", "15"], "--short_side 15"),
        ([src, tmp_path / "dst", "--crf", "60"], "--crf 60"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            main([str(word) for word in argv])
        assert "\n" not in str(raised.value)
    (src / "manifest.csv").write_text("v.mp4\n")
    (tmp_path / "list.csv").write_text(f"{src}/v.mp4\n")
    for manifest, message in (
        (src / "manifest.csv", "overwritten"),
        (tmp_path / "list.csv", "is a source"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(manifest), str(src)])


def test_f21_the_program_prints_no_warnings(tmp_path):
    write_folder(tmp_path / "src", videos=2)
    command = [
        sys.executable,
        "-W",
        "always",
        "-m",
        "tools.reencode",
        str(tmp_path / "src"),
        str(tmp_path / "dst"),
        "--workers",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert done.returncode == 0 and warnings == []
