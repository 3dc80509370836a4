"""Which frames make a clip: the formula, variable frame rates, evaluation views."""

import numpy as np
import pytest
from video_matrix import CASES
from video_writer import write_case

from data.clips import (
    clip_indices,
    clip_slack,
    frame_indices,
    frame_indices_by_time,
    view_start,
)
from data.decode import describe, open_video

CASE_BY_NAME = {case.name: case for case in CASES}
STEADY = (
    "h264.mp4",
    "vp9.webm",
    "h264.ts",
    "480_per_second.mp4",
    "480_per_second.mkv",
    "half_per_second.mp4",
    "half_per_second.mkv",
)
VARIABLE = (
    "irregular_h264.mp4",
    "irregular_h264.mkv",
    "pause_h264.mp4",
    "pause_h264.mkv",
    "pause_hevc.mp4",
)


def test_indices_follow_the_formula():
    # 16 frames at stride 4 of a 60 fps video: a span of 128 source frames
    clip = {"num_frames": 16, "sampling_rate": 4}
    first_clip = frame_indices(1000, 60, **clip, start=0)
    assert first_clip.tolist() == [int(i * 127 / 15) for i in range(16)]
    last_clip = frame_indices(1000, 60, **clip, start=1)
    assert last_clip[[0, -1]].tolist() == [872, 999]
    assert frame_indices(1000, 30, **clip, start=0.5)[0] == 468


def test_a_short_video_repeats_its_last_frame():
    indices = frame_indices(10, 30, num_frames=8, sampling_rate=4, start=0.7)
    assert indices.tolist() == [min(int(i * 31 / 7), 9) for i in range(8)]


def test_times_of_a_constant_rate_give_the_same_indices():
    random = np.random.default_rng(0)
    for _ in range(300):
        num_frames = int(random.integers(3, 900))
        fps = float(random.choice([12.5, 23.976, 25, 30, 59.94, 480]))
        sampling_rate = int(random.integers(1, 9))
        start = float(random.random())
        clip = {"num_frames": 16, "sampling_rate": sampling_rate, "start": start}
        by_time = frame_indices_by_time(np.arange(num_frames) / fps, **clip)
        assert by_time.tolist() == frame_indices(num_frames, fps, **clip).tolist()


@pytest.mark.parametrize("name", VARIABLE)
@pytest.mark.parametrize("indexed", [False, True])
def test_clips_of_variable_rate_are_chosen_by_time(tmp_path, name, indexed):
    case = CASE_BY_NAME[name]
    path = str(write_case(case, tmp_path))
    times = np.array(case.seconds)
    frame_duration = float(np.median(np.diff(times)))
    clip_duration = 32 / 30  # 8 frames at stride 4
    info = describe(path) if indexed else None
    with open_video(path, info=info) as video:
        assert video.fps == pytest.approx((len(times) - 1) / times[-1], rel=0.01)
        for start in (0, 0.3, 1):
            indices = clip_indices(video, num_frames=8, sampling_rate=4, start=start)
            first = start * max(times[-1] + frame_duration - clip_duration, 0)
            instants = first + np.linspace(0, clip_duration - frame_duration, 8)
            for index, instant in zip(indices, instants, strict=True):
                assert index in frames_shown_at(times, instant)


def frames_shown_at(times: np.ndarray, instant: float) -> set[int]:
    """Return the indices that may be shown at an instant, as MKV rounds times to 1 ms."""
    return {int(sum(times <= instant + error)) - 1 for error in (-0.0015, 0, 0.0015)}


@pytest.mark.parametrize("name", STEADY)
def test_videos_of_constant_rate_need_no_times(tmp_path, name):
    case = CASE_BY_NAME[name]
    with open_video(str(write_case(case, tmp_path))) as video:
        rate = (len(case.seconds) - 1) / (case.seconds[-1] - case.seconds[0])
        assert video.times is None
        assert video.fps == pytest.approx(rate, rel=0.01)


def test_views_are_evenly_spread_over_the_video():
    clip = {"num_frames": 16, "sampling_rate": 4}
    slack = clip_slack(301, 30, **clip)
    assert slack == 237

    def first_frame(view, num_views):
        start = view_start(slack, view, num_views)
        return frame_indices(301, 30, **clip, start=start)[0]

    assert first_frame(0, 1) == 237 // 2
    assert [first_frame(view, 5) for view in range(5)] == [view * (237 // 4) for view in range(5)]


def test_all_views_of_a_short_video_start_at_its_first_frame():
    slack = clip_slack(10, 30, num_frames=16, sampling_rate=4)
    assert view_start(slack, 2, 3) == 0
