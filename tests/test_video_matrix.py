"""Every frame is the right one: for each case of the matrix, each decoder, with and without index.

The checks themselves are tested with readers that are known to be right or wrong.
"""

import os

import numpy as np
import pytest
import video_checks
from PIL import Image
from video_matrix import CASES, QUICK
from video_writer import COLORS, NoEncoder, number_of, numbered_picture, write_case

from data.decode import decord_installed, describe, open_video
from data.pyav_compat import VERSION

DECODERS = ["pyav"] + (["decord"] if decord_installed() else [])
READ_BY_DECORD = (  # by decord itself, not handed to PyAV
    "h264.mp4",
    "h264_faststart.mp4",
    "h264.mov",
    "h264_pyramid.mp4",
    "h264_one_key.mp4",
    "h264_all_keys.mp4",
)
SKIPPING = {  # decoder: cases with frames to skip, as far as its codec has any
    "h264": ("h264_pyramid.mp4", "h264_open.mp4", "h264_many_refs.mp4", "h264_interlaced.mp4"),
    "hevc": ("hevc.mp4", "hevc_open.mp4", "hevc_open_pyramid.mp4", "10_bit_hevc.mp4"),
    "vp8": ("vp8_layers.webm", "vp8_hidden.webm"),
    "libvpx": ("vp8_layers.webm", "vp8_hidden.webm"),
    "vp9": ("vp9_layers.webm", "vp9_superframes.mp4", "vp9_shown_later.mp4"),
    "libvpx-vp9": ("vp9_layers.webm", "vp9_superframes.mp4", "vp9_shown_later.mp4"),
    "mpeg4": ("mpeg4.mp4", "mpeg4.mkv", "mpeg4_packed.avi"),
    "mpeg2video": ("mpeg2.ts", "mpeg2.mkv"),
    "h263": ("h263.mov",),
    "flv": ("flv1.flv",),
    "wmv2": ("wmv2.wmv",),
    "mjpeg": ("mjpeg.mov",),
    "prores": ("prores.mov",),
}
# This decoder reads skip_frame only when it is opened.
SKIPS_TOO_MUCH = {"libdav1d": ("av1_svt.mp4", "av1_svt.mkv")}
CASE_BY_NAME = {case.name: case for case in CASES}


def case_param(case):
    """Return a test parameter; cases outside of the quick part are slow."""
    marks = [] if case in QUICK else pytest.mark.slow
    return pytest.param(case, id=case.name, marks=marks)


def reader_param(decoder: str, indexed: bool):
    """Return a test parameter: a decoder, with or without an index."""
    suffix = "-indexed" if indexed else ""
    return pytest.param(decoder, indexed, id=decoder + suffix)


every_case = pytest.mark.parametrize("case", [case_param(case) for case in CASES])
every_reader = pytest.mark.parametrize(
    ("decoder", "indexed"),
    [reader_param(decoder, indexed) for decoder in DECODERS for indexed in (False, True)],
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Return a function that writes a case once and returns its path and sequential decode."""
    folder = tmp_path_factory.mktemp("matrix")
    written = {}

    def write(case):
        if VERSION < 17 and case.name == "full_range_hevc_709.mkv":
            pytest.skip("PyAV 16 assumes BT.601 for full range")
        if case.name not in written:
            try:
                path = write_case(case, folder)
            except NoEncoder as error:
                pytest.skip(str(error))
            written[case.name] = (str(path), video_checks.decode_sequentially(path))
        return written[case.name]

    return write


class WrongReader:
    """A reader whose frames are changed, to prove that the checks find it."""

    def __init__(self, video, late: int = 0, brighter: int = 0, mirrored: bool = False):
        self.video = video
        self.late = late
        self.brighter = brighter
        self.mirrored = mirrored
        self.num_frames = video.num_frames + late

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read frames and change them."""
        last = self.video.num_frames - 1
        frames = self.video.read(np.minimum(indices + self.late, last))
        if self.mirrored:
            frames = frames[:, :, ::-1]
        return (frames.astype(int) + self.brighter).clip(0, 255).astype(np.uint8)


class ReferenceReader:
    """A reader that is right: it holds the sequential decode, scaled to one size."""

    def __init__(self, case, reference):
        frames = []
        for picture in reference.pictures:
            image = Image.fromarray(picture).resize(case.size)
            frames.append(np.asarray(image))
        self.frames = np.stack(frames)
        self.num_frames = len(frames)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Look frames up."""
        return self.frames[indices]


def open_like_dataset(path: str, decoder: str, indexed: bool):
    """Open a video as the data sets do."""
    if decoder == "decord" and VERSION < 17 and "false_keys" in path:
        pytest.skip("PyAV 16 does not show the table of packets that misleads decord")
    info = None
    if indexed:
        info = describe(path)
    return open_video(path, decoder, info=info)


@every_case
def test_the_matrix_shows_what_it_claims(case, matrix):
    _, reference = matrix(case)
    assert video_checks.check_reference(case, reference) == []


@every_case
def test_the_checks_pass_a_reader_that_is_right(case, matrix):
    _, reference = matrix(case)
    reader = ReferenceReader(case, reference)
    assert video_checks.check_count(case, reader) == []
    assert video_checks.check_single_frames(case, reader, np.arange(reader.num_frames)) == []
    assert video_checks.check_clips(case, reader, reference) == []


@every_case
@every_reader
def test_fa_the_frames_that_a_player_shows_are_counted(case, decoder, indexed, matrix):
    path, _ = matrix(case)
    with open_like_dataset(path, decoder, indexed) as video:
        assert video_checks.check_count(case, video) == []


@every_case
@every_reader
def test_fc_each_frame_read_alone_is_the_right_one(case, decoder, indexed, matrix):
    path, _ = matrix(case)
    order = video_checks.random_order(case)
    with open_like_dataset(path, decoder, indexed) as video:
        assert video_checks.check_single_frames(case, video, order) == []
    for index in order[:3]:  # as the first frame that is read of a file
        with open_like_dataset(path, decoder, indexed) as video:
            assert video_checks.check_single_frames(case, video, np.array([index])) == []


@every_case
@every_reader
def test_fd_clips_equal_the_sequential_decode(case, decoder, indexed, matrix):
    path, reference = matrix(case)
    with open_like_dataset(path, decoder, indexed) as video:
        assert video_checks.check_clips(case, video, reference) == []


@pytest.mark.skipif(
    not decord_installed() or VERSION < 17,
    reason="decord is missing, or this PyAV does not show tables of packets",
)
@pytest.mark.parametrize("name", READ_BY_DECORD)
def test_decord_itself_reads_what_it_claims(name, matrix):
    path, _ = matrix(CASE_BY_NAME[name])
    with open_video(path, "decord") as video:
        assert type(video).__name__ == "DecordVideo"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", SKIPPING)
def test_fb_skipping_is_exact_for(decoder, matrix):
    for name in SKIPPING[decoder]:
        path, _ = matrix(CASE_BY_NAME[name])
        measured = video_checks.measure_skipping(path, decoder)
        assert measured.missing == 0, name
        assert measured.wrong == 0, name
        assert measured.corrupt == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("decoder", SKIPS_TOO_MUCH)
def test_skipping_loses_frames_of(decoder, matrix):
    for name in SKIPS_TOO_MUCH[decoder]:
        path, _ = matrix(CASE_BY_NAME[name])
        assert video_checks.measure_skipping(path, decoder).missing > 0, name


@pytest.mark.parametrize("change", [{"late": 1}, {"brighter": 5}, {"mirrored": True}], ids=str)
def test_the_checks_find_a_reader_that_is_wrong(change, matrix):
    case = CASE_BY_NAME["h264.mp4"]
    path, reference = matrix(case)
    with open_video(path, "pyav") as video:
        reader = WrongReader(video, **change)
        assert video_checks.check_clips(case, reader, reference)
        if "brighter" not in change:
            assert video_checks.check_single_frames(case, reader, np.arange(48))
        if "late" in change:
            assert video_checks.check_count(case, reader)


def test_every_number_can_be_read_from_its_picture():
    for number in range(0, 4096, 5):
        assert number_of(numbered_picture(number, 96, 64)) == number
    picture = numbered_picture(5, 96, 64)
    assert np.abs(video_checks.colors_of(picture) - COLORS).max() < 1


def test_no_number_is_read_from_changed_pictures():
    picture = numbered_picture(5, 96, 64)
    blend = picture / 2 + numbered_picture(10, 96, 64) / 2
    black = np.zeros_like(picture)
    white = np.full_like(picture, 255)
    for changed in (blend, picture[:, ::-1], picture[::-1], black, white):
        assert number_of(changed) is None


def test_the_table_has_a_line_for_each_case(tmp_path):
    cases = (CASE_BY_NAME["h264.mp4"], CASE_BY_NAME["one_frame.mp4"])
    lines = video_checks.matrix_table(tmp_path, cases).splitlines()
    assert "| h264.mp4 | closed GOPs of 12 frames, 2 B-frames | exact | exact |" in lines
    assert len(lines) == 4


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux only")
def test_writing_a_case_keeps_the_scheduling_of_the_tests(tmp_path):
    policy = os.sched_getscheduler(0)
    try:
        write_case(CASE_BY_NAME["av1_svt.mp4"], tmp_path)
    except NoEncoder as error:
        pytest.skip(str(error))
    assert os.sched_getscheduler(0) == policy
