"""Every frame read is the right one: by each backend, with and without index, of all the matrix."""

import numpy as np
import pytest
import video_checks
from PIL import Image
from video_matrix import CASES, QUICK
from video_writer import COLORS, NoEncoder, number_of, numbered_picture, write_case

from data.decode import decord_installed, describe, open_video
from data.pyav import VERSION

DECODERS = ["pyav"] + (["decord"] if decord_installed() else [])
DECORD_CLAIMS = (  # read by decord itself, not handed to PyAV
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
SKIPS_TOO_MUCH = {"libdav1d": ("av1_svt.mp4", "av1_svt.mkv")}  # takes skip_frame when opened only
NAMED = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
every_reader = pytest.mark.parametrize(
    ("decoder", "indexed"),
    [
        pytest.param(decoder, indexed, id=decoder + ("-indexed" if indexed else ""))
        for decoder in DECODERS
        for indexed in (False, True)
    ],
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Return a function that writes a case once and returns its path and sequential decode."""
    folder, done = tmp_path_factory.mktemp("matrix"), {}

    def written(case):
        if VERSION < 17 and case.name == "full_range_hevc_709.mkv":
            pytest.skip("PyAV 16 takes full range for BT.601")
        if case.name not in done:
            try:
                path = write_case(case, folder)
            except NoEncoder as error:
                pytest.skip(str(error))
            done[case.name] = str(path), video_checks.decode_in_sequence(path)
        return done[case.name]

    return written


class Spoiled:
    """A reader whose frames are changed, to prove that the checks see it."""

    def __init__(self, video, late: int = 0, brighter: int = 0, mirrored: bool = False):
        self.video, self.late, self.brighter = video, late, brighter
        self.step = -1 if mirrored else 1
        self.num_frames = video.num_frames + late

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read frames and spoil them."""
        frames = self.video.read(np.minimum(indices + self.late, self.video.num_frames - 1))
        return (frames[:, :, :: self.step].astype(int) + self.brighter).clip(0, 255).astype("u1")


class InSequence:
    """A reader that is right: it keeps the sequential decode, scaled to one size."""

    def __init__(self, case, reference):
        images = [Image.fromarray(picture) for picture in reference.pictures]
        self.frames = np.stack([np.asarray(image.resize(case.size)) for image in images])
        self.num_frames = len(self.frames)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Look frames up."""
        return self.frames[indices]


def opened(path: str, decoder: str, indexed: bool):
    """Open a video as the data sets do."""
    if decoder == "decord" and VERSION < 17 and "false_keys" in path:
        pytest.skip("PyAV 16 does not show the table of packets that misleads decord")
    return open_video(path, decoder, info=describe(path) if indexed else None)


@every_case
def test_the_matrix_shows_what_it_claims(case, matrix):
    assert video_checks.proof_faults(case, matrix(case)[1]) == []


@every_case
def test_the_checks_pass_a_reader_that_is_right(case, matrix):
    reader, reference = InSequence(case, matrix(case)[1]), matrix(case)[1]
    faults = video_checks.count_faults(case, reader)
    faults += video_checks.single_faults(case, reader, np.arange(reader.num_frames))
    assert faults + video_checks.clip_faults(case, reader, reference) == []


@every_case
@every_reader
def test_the_frames_that_a_player_shows_are_counted(case, decoder, indexed, matrix):
    with opened(matrix(case)[0], decoder, indexed) as video:
        assert video_checks.count_faults(case, video) == []


@every_case
@every_reader
def test_each_frame_read_alone_is_the_right_one(case, decoder, indexed, matrix):
    path, _ = matrix(case)
    order = np.random.default_rng(len(case.name)).permutation(len(case.numbers))
    with opened(path, decoder, indexed) as video:
        assert video_checks.single_faults(case, video, order) == []
    for index in order[:3]:
        with opened(path, decoder, indexed) as video:
            assert video_checks.single_faults(case, video, order[order == index]) == []


@every_case
@every_reader
def test_clips_equal_the_sequential_decode(case, decoder, indexed, matrix):
    path, reference = matrix(case)
    with opened(path, decoder, indexed) as video:
        assert video_checks.clip_faults(case, video, reference) == []


@pytest.mark.skipif(
    not decord_installed() or VERSION < 17,
    reason="without decord, or a PyAV that shows tables of packets",
)
@pytest.mark.parametrize("name", DECORD_CLAIMS)
def test_decord_itself_reads_what_it_claims(name, matrix):
    with open_video(matrix(NAMED[name])[0], "decord") as video:
        assert type(video).__name__ == "DecordVideo"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", SKIPPING)
def test_skipping_is_exact_for(decoder, matrix):
    for name in SKIPPING[decoder]:
        evidence = video_checks.skipping_evidence(matrix(NAMED[name])[0], decoder)
        assert (evidence.missing, evidence.wrong, evidence.spoiled) == (0, 0, 0), (name, evidence)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", SKIPS_TOO_MUCH)
def test_skipping_loses_frames_of(decoder, matrix):
    for name in SKIPS_TOO_MUCH[decoder]:
        evidence = video_checks.skipping_evidence(matrix(NAMED[name])[0], decoder)
        assert evidence.missing > 0, (name, evidence)


@pytest.mark.parametrize("spoil", [{"late": 1}, {"brighter": 5}, {"mirrored": True}], ids=str)
def test_the_checks_see_a_reader_that_is_wrong(spoil, matrix):
    case = NAMED["h264.mp4"]
    path, reference = matrix(case)
    with open_video(path, "pyav") as video:
        wrong = Spoiled(video, **spoil)
        assert video_checks.clip_faults(case, wrong, reference)
        if "brighter" not in spoil:
            assert video_checks.single_faults(case, wrong, np.arange(48))
        if "late" in spoil:
            assert video_checks.count_faults(case, wrong)


def test_a_number_is_read_from_whole_pictures_only():
    pictures = {number: numbered_picture(number, 96, 64) for number in range(0, 4096, 5)}
    assert all(number_of(picture) == number for number, picture in pictures.items())
    assert number_of(pictures[5] / 2 + pictures[10] / 2) is None
    for spoiled in (
        pictures[5][:, ::-1],
        pictures[5][::-1],
        pictures[5] * 0,
        pictures[5] * 0 + 255,
    ):
        assert number_of(spoiled) is None
    assert np.abs(video_checks.colors_of(pictures[5]) - COLORS).max() < 1


def test_the_table_has_a_line_for_each_case(tmp_path):
    lines = video_checks.matrix_table(tmp_path, (NAMED["h264.mp4"], NAMED["one_frame.mp4"]))
    assert "| h264.mp4 | closed groups of 12, 2 B frames | exact | exact |" in lines
    assert lines.count("\n") == 4
