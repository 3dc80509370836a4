"""The data doctor: its table of a data set, the costs it measures and its advice."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_videos import write_folder
from video_matrix import CASES
from video_writer import write_case

from data import video_index
from data.input_files import ReadError
from data.manifest import find_videos, read_manifest, unlabeled, write_manifest
from tools import data_doctor
from tools.data_doctor import (
    STAGES,
    ClipSpec,
    advice,
    build_index,
    clip_cost,
    cost_lines,
    main,
    reencode_advice,
    side_counts,
    unreadable_lines,
)
from util.dist import UserError

ROOT = Path(__file__).parent.parent
QUICK = ["--img_size", "32", "--files", "2", "--workers", "1"]


@pytest.fixture
def folder(tmp_path):
    """Return a folder of four readable videos and a broken one."""
    folder = write_folder(tmp_path / "videos", 4)
    (folder / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture
def manifest(folder, tmp_path):
    """Return a manifest of that folder."""
    path = tmp_path / "list.csv"
    write_manifest(path, unlabeled(find_videos([str(folder)], "VIDEOS")))
    return path


def costs(**seconds_of_decoder: list[float]) -> pd.DataFrame:
    """Return a table of the seconds of each stage."""
    return pd.DataFrame.from_dict(seconds_of_decoder, orient="index", columns=STAGES)


def rows(side: int, key_distance: float) -> np.ndarray:
    """Return the index row of a readable video of square pictures."""
    row = np.zeros(1, dtype=video_index.ROW)
    row["state"] = video_index.READABLE
    row["width"] = side
    row["height"] = side
    row["key_distance"] = key_distance
    return row


def test_the_table_describes_a_manifest(manifest, capsys):
    main([str(manifest), *QUICK])
    printed = capsys.readouterr().out
    assert "videos      4 of 5 readable, " in printed
    assert "codecs      h264 4" in printed
    assert "short side  64 px: 4" in printed
    assert "key frames  every 9 to 12 frames" in printed
    assert "short       4 shorter than 16 frames at stride 4 (2.1 s)" in printed  # 20 to 32 frames
    assert "unreadable  1; they are replaced by others in training" in printed
    assert "broken.mp4: not a video" in printed
    assert "no need to re-encode" in printed


def test_the_index_of_a_manifest_is_written_beside_it(manifest, capsys):
    main([str(manifest), *QUICK])
    paths = read_manifest(manifest).paths
    assert video_index.load_index(manifest, paths) is not None
    assert f"index written to {video_index.index_path(manifest)}" in capsys.readouterr().out


def test_write_makes_a_manifest_of_folders_and_its_index(folder, tmp_path):
    made = tmp_path / "made.csv"
    main([str(folder), *QUICK, "--write", str(made)])
    paths = read_manifest(made).paths
    assert paths == find_videos([str(folder)], "VIDEOS")
    assert video_index.load_index(made, paths) is not None


def test_a_folder_alone_leaves_no_files(folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    main([str(folder), *QUICK])
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_one_line(folder, manifest, tmp_path):
    for argv, message in (
        ([str(folder), "--write", str(manifest)], "exists. Choose another name"),
        ([str(manifest), "--write", "x.csv"], "the source is a manifest already"),
        ([str(tmp_path / "nowhere")], "not found"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            main(argv)
        assert "\n" not in str(raised.value)


def test_videos_of_changing_rate_are_counted(tmp_path, capsys):
    for name in ("h264.mp4", "irregular_h264.mp4", "pause_h264.mkv"):
        write_case(next(case for case in CASES if case.name == name), tmp_path)
    main([str(tmp_path), *QUICK])
    assert "unsteady    2 of changing rate" in capsys.readouterr().out


def test_no_readable_video_gives_no_costs(tmp_path, capsys):
    (tmp_path / "broken.mp4").write_text("no video")
    main([str(tmp_path), *QUICK])
    printed = capsys.readouterr().out
    assert "videos      0 of 1 readable" in printed
    assert "clips/s/core" not in printed


def test_a_file_is_probed_once_unless_unreadable(manifest, monkeypatch):
    paths = read_manifest(manifest).paths
    target = video_index.index_path(manifest)
    build_index(paths, target, workers=0, seconds=30)
    probed = []
    describe = data_doctor.describe

    def recorded(path, frames_fps):
        probed.append(path)
        return describe(path, frames_fps)

    monkeypatch.setattr(data_doctor, "describe", recorded)
    build_index(paths, target, workers=0, seconds=30)
    assert [Path(path).name for path in probed] == ["broken.mp4"]


def test_a_clip_has_a_cost_for_each_stage(folder):
    cost = clip_cost(str(folder / "class_0/clip_0.mp4"), "pyav", 64, ClipSpec(4, 2, 32))
    assert tuple(cost) == STAGES
    assert all(seconds >= 0 for seconds in cost.values())
    with pytest.raises(ReadError):
        clip_cost(str(folder / "broken.mp4"), "pyav", 64, ClipSpec())


def test_rates_count_one_reading_for_all_repeats():
    table = costs(pyav=[0.001, 0.001, 0.006, 0.002])
    row = cost_lines(table, ClipSpec(), gpu_rate=400)[2].replace(",", "").split()
    assert row[0] == "pyav"
    assert [float(word) for word in row[1:6]] == [1.0, 1.0, 6.0, 2.0, 10.0]  # ms, and the total
    assert [int(word) for word in row[6:9]] == [100, 250, 400]  # clips/s at 1, 4, 16 repeats
    assert [float(word) for word in row[9:]] == [4.0, 1.6, 1.0]  # cores


def test_the_faster_decoder_is_recommended():
    table = costs(decord=[0.0, 0.0, 0.010, 0.0], pyav=[0.0, 0.0, 0.004, 0.0])
    lines = advice(rows(256, 16), table, gpu_rate=10)
    assert lines[0] == "--decoder pyav: 2.50 times as fast as decord on these files"
    assert len(lines) == 2


def test_repeats_are_recommended_when_reading_needs_many_cores():
    table = costs(pyav=[0.0, 0.0, 0.01, 0.0])  # 100 clips/s/core
    assert "--repeat_aug 4" in advice(rows(256, 16), table, gpu_rate=401)[-1]
    assert "--repeat_aug" not in advice(rows(256, 16), table, gpu_rate=399)[-1]


@pytest.mark.parametrize(
    ("side", "key_distance", "reason"),
    [
        (320, 32, "no need to re-encode"),
        (321, 32, "1 videos are larger than 320 px; "),
        (320, 33, "1 have more than 32 frames between key frames; "),
        (400, 99, "larger than 320 px and 1 have more than 32 frames"),
    ],
)
def test_large_pictures_and_rare_key_frames_are_worth_reencoding(side, key_distance, reason):
    assert reason in reencode_advice(rows(side, key_distance))


def test_long_lists_are_cut():
    assert side_counts(np.array([256, 128, 256])) == "128 px: 1, 256 px: 2"
    assert side_counts(np.arange(100, 109)) == "100 to 108 px, median 104"
    unreadable = np.zeros(12, dtype=video_index.ROW)
    unreadable["state"] = video_index.UNREADABLE
    lines = unreadable_lines([f"{i}.mp4" for i in range(12)], unreadable)
    assert len(lines) == 12
    assert lines[-1].strip() == "..."


def test_f21_the_program_runs_without_warnings(folder):
    command = [sys.executable, "-W", "always", "-m", "tools.data_doctor", str(folder), *QUICK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 of 5 readable" in done.stdout
    assert "Warning" not in done.stderr
