"""Videos and images whose pictures are too large for the memory of a loader's worker."""

import numpy as np
import pytest
from make_videos import write_frames, write_video
from PIL import Image
from video_matrix import CASES
from video_writer import write_case

import data.pyav_video
from data.decode import describe, open_video
from data.frame_geometry import MAX_PIXELS
from data.images import read_image
from data.input_files import ReadError


def test_f01_videos_of_more_pixels_than_8k_are_refused(tmp_path, monkeypatch):
    assert MAX_PIXELS >= 7680 * 4320
    path = write_video(tmp_path / "a.mp4", frames=2, size=(96, 64))
    describe(str(path))
    monkeypatch.setattr(data.pyav_video, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(ReadError, match="pictures of 96 x 64 pixels, more than 6143 in all"):
        describe(str(path))


def test_f01_a_later_picture_that_is_too_large_is_replaced(tmp_path, monkeypatch):
    case = next(case for case in CASES if case.name == "size_change_h264.mkv")
    path = str(write_case(case, tmp_path))
    with open_video(path, "pyav") as video:
        pixels = 128 * 64  # FFmpeg counts the width of 96 as 128
        whole = video.read(np.arange(video.num_frames))
        assert video.replaced == 0
    monkeypatch.setattr(data.pyav_video, "MAX_PIXELS", pixels)
    with open_video(path, "pyav") as video:
        frames = video.read(np.arange(video.num_frames))
        assert 0 < video.replaced < video.num_frames
    kept = video.num_frames - video.replaced
    assert np.array_equal(frames[:kept], whole[:kept])


def test_f01_images_that_pillow_only_warns_of_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (30, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for pixels in (1000, 100):  # of which Pillow warns, and raises an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        with pytest.raises(ReadError, match=f"^an image of more than {pixels} pixels$"):
            read_image(str(path))
    folder = write_frames(tmp_path / "frames", frames=3, size=(10, 10))
    Image.new("L", (30, 50)).save(folder / "00002.png")
    with open_video(str(folder), frames_fps=30) as video:
        video.read(np.arange(3))
        assert video.replaced == 1
