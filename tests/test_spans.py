"""Where videos are cut: durations from an index, and clips at a regular distance."""

import numpy as np
import pytest

from data.spans import cut_into_spans, index_durations
from data.video import VideoInfo
from data.video_index import new_index

INFO = VideoInfo(
    frames=75, fps=25.0, width=64, height=64, rotation=0, key_distance=12.0, codec="h264"
)


def test_clips_start_at_multiples_of_the_stride():
    videos, spans = cut_into_spans(np.array([2.5, 0.1, 2.0]), 0.5, 1.0)
    assert videos.tolist() == [0, 0, 0, 1, 2, 2]
    assert spans.tolist() == [[0, 0.5], [1, 1.5], [2, 2.5], [0, 0.5], [0, 0.5], [1, 1.5]]


@pytest.mark.parametrize("stride", [0.1, 0.3, 1 / 3, 2.5])
def test_every_start_is_in_its_video_and_the_next_is_not(stride):
    durations = np.random.default_rng(0).uniform(0.01, 20, 50)
    videos, spans = cut_into_spans(durations, 4.0, stride)
    for video, duration in enumerate(durations):
        starts = spans[videos == video, 0]
        assert starts.tolist() == [k * stride for k in range(len(starts))]
        assert starts[-1] < duration <= len(starts) * stride
    assert np.allclose(spans[:, 1] - spans[:, 0], 4)


def test_an_end_between_two_floats_makes_no_empty_clip():
    videos, _ = cut_into_spans(np.array([0.1 + 0.2]), 1.0, 0.1)  # 0.30000000000000004 s
    assert len(videos) == 3


def test_unreadable_videos_have_no_clips():
    videos, spans = cut_into_spans(np.array([np.nan, 1.0, np.nan]), 0.5, 0.6)
    assert videos.tolist() == [1, 1]
    none, no_spans = cut_into_spans(np.array([np.nan]), 0.5, 0.6)
    assert (none.shape, no_spans.shape) == ((0,), (0, 2))


def test_durations_come_from_the_index():
    index = new_index(["a", "b", "c", "d"], None)
    index.set_row(0, INFO)
    index.set_row(1, None, "no frames")
    times = np.array([0, 0.1, 0.2, 3.0])
    index.set_row(2, INFO._replace(frames=4, times=times))
    durations = index_durations(index)
    assert durations[[0, 2]].tolist() == [3.0, 3.1]
    assert np.isnan(durations[[1, 3]]).all()
