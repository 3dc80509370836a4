"""Which frames make a clip: the formula, variable frame rates, spans, evaluation views."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from video_matrix import CASES
from video_writer import write_case

from data.clips import (
    ClipSampling,
    available_frames,
    check_spans,
    clip_indices,
    clip_slack,
    frame_indices,
    frame_indices_by_time,
    video_duration,
    view_start,
)
from data.decode import describe, open_video
from data.input_files import ReadError
from util.dist import UserError

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
    clip = ClipSampling(16, 4)
    first_clip = frame_indices(1000, 60, clip, start=0)
    assert first_clip.tolist() == [int(i * 127 / 15) for i in range(16)]
    last_clip = frame_indices(1000, 60, clip, start=1)
    assert last_clip[[0, -1]].tolist() == [872, 999]
    assert frame_indices(1000, 30, clip, start=0.5)[0] == 468


def test_a_short_video_repeats_its_last_frame():
    indices = frame_indices(10, 30, ClipSampling(8, 4), start=0.7)
    assert indices.tolist() == [min(int(i * 31 / 7), 9) for i in range(8)]


def test_times_of_a_constant_rate_give_the_same_indices():
    random = np.random.default_rng(0)
    for _ in range(300):
        num_frames = int(random.integers(3, 900))
        fps = float(random.choice([12.5, 23.976, 25, 30, 59.94, 480]))
        sampling_rate = int(random.integers(1, 9))
        start = float(random.random())
        clip = (ClipSampling(16, sampling_rate), start)
        by_time = frame_indices_by_time(np.arange(num_frames) / fps, *clip)
        assert by_time.tolist() == frame_indices(num_frames, fps, *clip).tolist()


@pytest.mark.parametrize("name", VARIABLE)
@pytest.mark.parametrize("indexed", [False, True])
def test_fe_clips_of_variable_rate_are_chosen_by_time(tmp_path, name, indexed):
    case = CASE_BY_NAME[name]
    path = str(write_case(case, tmp_path))
    times = np.array(case.seconds)
    frame_duration = float(np.median(np.diff(times)))
    clip_duration = 32 / 30  # 8 frames at stride 4
    info = describe(path) if indexed else None
    with open_video(path, info=info) as video:
        assert video.fps == pytest.approx((len(times) - 1) / times[-1], rel=0.01)
        for start in (0, 0.3, 1):
            indices = clip_indices(video, ClipSampling(8, 4), start=start)
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
    clip = ClipSampling(16, 4)
    slack = clip_slack(301, 30, clip)
    assert slack == 237

    def first_frame(view, num_views):
        start = view_start(slack, view, num_views)
        return frame_indices(301, 30, clip, start)[0]

    assert first_frame(0, 1) == 237 // 2
    assert [first_frame(view, 5) for view in range(5)] == [view * (237 // 4) for view in range(5)]


def test_all_views_of_a_short_video_start_at_its_first_frame():
    slack = clip_slack(10, 30, ClipSampling(16, 4))
    assert view_start(slack, 2, 3) == 0


def steady_video(num_frames: int, fps: float) -> SimpleNamespace:
    """Return what `clip_indices` reads of an open video of constant rate."""
    return SimpleNamespace(num_frames=num_frames, fps=fps, times=None)


def irregular_video(num_frames: int) -> SimpleNamespace:
    """Return what `clip_indices` reads of an open video of 5 to 95 ms between frames."""
    steps = np.random.default_rng(1).integers(5, 96, num_frames - 1) / 1000
    times = np.concatenate([[0], np.cumsum(steps)])
    return SimpleNamespace(num_frames=num_frames, fps=num_frames / times[-1], times=times)


def test_a_span_between_frames_is_a_video_of_its_own():
    random = np.random.default_rng(0)
    for _ in range(500):
        fps = float(random.choice([12.5, 23.976, 25, 30000 / 1001, 59.94, 480]))
        num_frames = int(random.integers(1, 900))
        first = int(random.integers(num_frames))
        end = int(random.integers(first + 1, num_frames + 1))
        clip = ClipSampling(16, int(random.integers(1, 9)))
        start = float(random.integers(5)) / 4
        span = (first / fps, end / fps)
        indices = clip_indices(steady_video(num_frames, fps), clip, start, span)
        alone = frame_indices(end - first, fps, clip, start)
        assert indices.tolist() == (first + alone).tolist()


def test_a_span_takes_a_number_of_frames_without_rounding_errors():
    video = steady_video(900, 30)
    assert available_frames(video, None) == 900
    for first in range(100):
        assert available_frames(video, (first / 10, (first + 3) / 10)) == 9
    assert available_frames(video, (29, 99)) == 30


def test_frames_that_are_longer_than_a_clip_stay_in_their_span():
    clip = (ClipSampling(4, 1), 0.5)
    video = steady_video(10, 1)
    assert clip_indices(video, *clip, span=(3, 4)).tolist() == [3] * 4
    assert clip_indices(video, *clip, span=(3, 3.5)).tolist() == [3] * 4


def test_a_span_of_a_whole_video_changes_nothing():
    clip = (ClipSampling(16, 2), 0.3)
    for video in (steady_video(700, 23.976), irregular_video(700), steady_video(7, 30)):
        whole = clip_indices(video, *clip)
        assert clip_indices(video, *clip, span=(0, math.inf)).tolist() == whole.tolist()
        assert clip_indices(video, *clip, span=(0, 999)).tolist() == whole.tolist()


def test_a_clip_of_a_span_shows_the_frame_of_each_instant():
    clip = ClipSampling(8, 4)
    random = np.random.default_rng(2)
    for video in (irregular_video(600), steady_video(600, 23.976)):
        times = video.times
        if times is None:
            times = np.arange(600) / video.fps
        distance = np.median(np.diff(times))
        for _ in range(200):
            begin = random.uniform(0, times[-1] - 4)
            end = begin + random.uniform(0.01, 4)
            start = random.random()
            indices = clip_indices(video, clip, start, (begin, end))
            first = begin + start * max(end - begin - 32 / 30, 0)
            instants = first + np.linspace(0, 32 / 30 - distance, 8)
            shown = [sum(times <= instant) - 1 for instant in instants]
            last = sum(times < end) - 1
            assert indices.tolist() == [min(index, last) for index in shown]


def test_a_span_that_is_shorter_than_a_clip_repeats_its_end():
    indices = clip_indices(steady_video(90, 30), ClipSampling(8, 2), start=0.5, span=(1.0, 1.1))
    assert indices.tolist() == [30, 32, 32, 32, 32, 32, 32, 32]


def test_a_pause_is_part_of_the_spans_that_show_it():
    times = np.array([0, 0.04, 0.08, 60, 60.04])  # frame 2 is shown for a minute
    video = SimpleNamespace(num_frames=5, fps=5 / 60, times=times)
    clip = (ClipSampling(4, 1), 0.0)
    assert clip_indices(video, *clip, span=(30, 31)).tolist() == [2, 2, 2, 2]
    assert clip_indices(video, *clip, span=(59.96, 61)).tolist() == [2, 2, 3, 4]
    assert clip_indices(video, *clip, span=(0.02, 0.05)).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("name", ["h264.mp4", "irregular_h264.mkv"])
def test_a_span_after_the_end_is_a_read_error(tmp_path, name):
    clip = (ClipSampling(4, 1), 0.5)
    with open_video(str(write_case(CASE_BY_NAME[name], tmp_path))) as video:
        duration = video_duration(video.num_frames, video.fps, video.times)
        assert clip_indices(video, *clip, span=(duration - 0.001, 99)).tolist() == [47] * 4
        with pytest.raises(ReadError, match="its part starts at"):
            clip_indices(video, *clip, span=(duration, duration + 1))


def test_the_duration_includes_the_last_frame():
    assert video_duration(60, 30, None) == 2
    assert video_duration(5, 2.5, np.array([0, 0.1, 0.2, 0.3, 2.0])) == 2.1
    assert video_duration(1, 25, None) == 0.04


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 1)], "1 spans for 2 samples"),
        ([(0, 1), (3, 3)], "span 1 is 3 to 3 s"),
        ([(-1, 1), (0, 1)], "span 0 is -1 to 1 s"),
        ([(0, 1), (math.nan, 1)], "span 1 is nan"),
        ([(0, math.nan), (0, 1)], "span 0 is 0 to nan"),
        ([(0, 1), (math.inf, math.inf)], "span 1 is inf"),
    ],
)
def test_wrong_spans_are_refused(spans, message):
    with pytest.raises(UserError, match=message):
        check_spans(spans, 2)


def test_spans_are_one_array():
    table = check_spans([(0, 1), (2.5, math.inf)], 2)
    assert table.dtype == np.float64
    assert table.tolist() == [[0, 1], [2.5, math.inf]]
    assert check_spans([], 0).shape == (0, 2)
