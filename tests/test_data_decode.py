"""Reading frames: the right ones, the same ones from both decoders, and as few as possible."""

import gc
import os
import re
import struct
import weakref
from fractions import Fraction
from pathlib import Path

import av
import decoder_matrix
import numpy as np
import pytest
import torch
from make_videos import frame_number, numbered_frame, write_video
from video_matrix import CASES
from video_writer import Encoding, encode, write_case

from data.clips import ClipSampling, frame_indices
from data.decode import decord_installed, describe, open_video
from data.decord_video import DecordVideo
from data.frame_geometry import scaled_size
from data.input_files import ReadError
from data.pyav_compat import VERSION
from data.pyav_video import PyAVVideo

DECODERS = ["pyav"] + (["decord"] if decord_installed() else [])
# decord's FFmpeg of 2019 against PyAV's: largest difference of a color level.
ROUNDING = {
    "exoplayer__roadtrip-vp92-10bit.webm": 255,  # other indices after hidden frames
    "exoplayer__sample_with_color_info.mp4": 8,  # 10 bit to 8
    "exoplayer__sample.avi": 2,  # MPEG-4 part 2
}
HIDDEN_PACKETS = (  # files with packets that show no frame
    "exoplayer__roadtrip-vp92-10bit.webm",
    "exoplayer__dolbyVision-hdr.MOV",
)
READABLE = (  # unusual files that must be readable
    "h264_no_pts",
    "raw_annexb_no_pts",
    "vfr_30_to_5fps",
    "single_frame",
    "truncated_half",
)
CASE_BY_NAME = {case.name: case for case in CASES}
each_decoder = pytest.mark.parametrize("decoder", DECODERS)
needs_test_data = pytest.mark.skipif(
    "STMAE_TEST_DATA" not in os.environ, reason="STMAE_TEST_DATA is not set"
)


def real_files(kind: str) -> list[Path]:
    """Return the real files of a kind ("videos" or "odd"), if available."""
    folder = Path(os.environ.get("STMAE_TEST_DATA", "/nonexistent"), "data", kind)
    return sorted(folder.glob("*"))


each_video = pytest.mark.parametrize("path", real_files("videos"), ids=lambda path: path.name)
each_odd_file = pytest.mark.parametrize("path", real_files("odd"), ids=lambda path: path.name)


def numbers_shown(video, wanted) -> list[int]:
    """Return the numbers that the wanted frames of a video show."""
    return [frame_number(frame) for frame in video.read(np.array(wanted))]


def middle_clip(video) -> np.ndarray:
    """Return the frame indices (8,) of a clip in the second half of a video."""
    return frame_indices(video.num_frames, video.fps, ClipSampling(8, 4), start=0.6)


# The right frames


@each_decoder
@pytest.mark.parametrize(("gop", "b_frames"), [(250, 0), (12, 2), (1, 0)])
def test_the_wanted_frames_are_read(tmp_path, decoder, gop, b_frames):
    path = write_video(tmp_path / "v.mp4", frames=60, gop=gop, b_frames=b_frames)
    with open_video(str(path), decoder) as video:
        assert video.num_frames == 60
        assert video.fps == 30
        assert video.read(np.array([0])).dtype == np.uint8
        for wanted in ([0], [59], [3, 3, 10, 11, 47], list(range(5, 60, 7)), list(range(60))):
            assert numbers_shown(video, wanted) == wanted


@each_decoder
def test_an_index_past_the_end_gives_the_last_frame(tmp_path, decoder):
    path = write_video(tmp_path / "v.mp4", frames=20)
    with open_video(str(path), decoder) as video:
        assert numbers_shown(video, [200]) == [19]


@each_decoder
def test_read_tensor_gives_the_frames_with_channels_last(tmp_path, decoder):
    path = write_video(tmp_path / "v.mp4", frames=20, size=(96, 64))
    indices = np.array([3, 9])
    with open_video(str(path), decoder) as video:
        tensor = video.read_tensor(indices)
        assert tensor.shape == (2, 3, 64, 96)
        assert tensor.dtype == torch.uint8
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), video.read(indices))


@pytest.mark.skipif(not decord_installed(), reason="decord is not installed")
def test_both_decoders_give_the_same_pixels(tmp_path):
    path = write_video(tmp_path / "v.mkv", frames=50, gop=20)
    wanted = np.arange(3, 50, 5)
    with open_video(str(path), "decord") as one, open_video(str(path), "pyav") as other:
        assert type(one) is not type(other)
        assert np.array_equal(one.read(wanted), other.read(wanted))


@each_decoder
def test_the_short_side_is_reduced_but_never_enlarged(tmp_path, decoder):
    path = write_video(tmp_path / "v.mp4", frames=5, size=(96, 64))
    with open_video(str(path), decoder, short_side=32) as video:
        assert video.read(np.array([2])).shape == (1, 32, 48, 3)
        assert numbers_shown(video, [2]) == [2]
    with open_video(str(path), decoder, short_side=640) as video:
        assert video.read(np.array([2])).shape == (1, 64, 96, 3)
    assert scaled_size(1080, 1920, 256) == (256, 455)


def test_false_keyframes_do_not_change_the_frames(tmp_path):
    for codec, b_frames in (("mpeg4", 0), ("mpeg4", 2), ("libx264", 2)):
        path = tmp_path / f"{codec}_{b_frames}.mp4"
        write_video(path, frames=40, gop=12, b_frames=b_frames, codec=codec)
        hide_box(path, b"stss")
        with open_video(str(path)) as video:
            for wanted in ([30], [7], [3, 14, 22, 39]):
                assert numbers_shown(video, wanted) == wanted


def hide_box(path: Path, name: bytes) -> None:
    """Rename a box of an MP4 file, so that readers ignore it."""
    data = path.read_bytes()
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, b"free"))


def test_a_keyframe_with_the_dts_of_the_frame_before(tmp_path):
    path = tmp_path / "v.mp4"
    write_long_frame(path, 11)
    data = path.read_bytes()
    one_entry = struct.pack(">II", 1, 1024)  # in the table of durations (stts): 1 frame, 1024 ticks
    assert data.count(one_entry) == 1
    path.write_bytes(data.replace(one_entry, struct.pack(">II", 1, 0)))
    for info in (None, describe(str(path))):
        with open_video(str(path), info=info) as video:
            assert numbers_shown(video, range(36)) == list(range(36))


def write_long_frame(path: Path, long_frame: int) -> None:
    """Write 36 frames of 512 ticks each, but for one of 1024 ticks."""
    tick = Fraction(1, 15360)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = 96
        stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = tick
        stream.codec_context.gop_size = 12
        stream.codec_context.max_b_frames = 0
        for number in range(36):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 96, 64), format="rgb24")
            frame.time_base = tick
            frame.pts = 512 * number
            if number > long_frame:
                frame.pts += 512
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_times_that_jump_back_are_put_in_order(tmp_path):
    case = CASE_BY_NAME["bytes_joined_h264.ts"]
    with open_video(str(write_case(case, tmp_path))) as video:
        times = video.times
        if times is None:
            times = np.arange(video.num_frames) / video.fps
        assert (np.diff(times) > 0).all()
        assert times[-1] < 2 * video.num_frames / 24


def test_the_frame_rate_of_avi_ignores_empty_packets(tmp_path):
    source = tmp_path / "v.mp4"
    encode(Encoding("mpeg4", frames=50, rate=Fraction(25), size=(96, 64)), source)
    with av.open(str(source)) as mp4, av.open(str(tmp_path / "v.avi"), "w") as avi:
        stream = avi.add_stream_from_template(mp4.streams.video[0])
        for packet in mp4.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                avi.mux(packet)
    assert describe(str(tmp_path / "v.avi")).fps == pytest.approx(25, rel=0.05)


# Files that cannot be read


@each_decoder
def test_fg_frames_that_cannot_be_converted_give_the_reason(tmp_path, decoder):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = 96
        stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = 8  # YCgCo
        frame = av.VideoFrame.from_ndarray(numbered_frame(3, 96, 64), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reason = r"frames \(yuv420p, color space 8\) cannot be converted to RGB: YCgCo is not supported"
    with pytest.raises(ReadError, match=reason):
        open_video(str(path), decoder).read(np.array([0]))


@each_decoder
def test_unreadable_files_are_an_error_of_one_line(tmp_path, decoder):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in ("text.mp4", "empty.mp4", "folder.mp4", "fifo.mp4", "missing.mp4", "concat:a|b"):
        with pytest.raises(ReadError) as raised:
            open_video(str(tmp_path / name), decoder)
        assert str(raised.value)
        assert "\n" not in str(raised.value)


@each_decoder
def test_a_path_that_starts_with_a_dash_is_no_option(tmp_path, monkeypatch, decoder):
    write_video(tmp_path / "-v.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    with open_video("-v.mp4", decoder) as video:
        assert numbers_shown(video, [1]) == [1]


# Real files


@needs_test_data
@each_video
def test_real_videos_equal_their_sequential_decode(path):
    with PyAVVideo(str(path), None) as video:
        indices = middle_clip(video)
        sequential = video._decode_sequentially(sorted(set(indices.tolist())))
    if path.name not in HIDDEN_PACKETS:
        assert set(sequential) == set(indices.tolist())
    elif len(sequential) < len(set(indices.tolist())):
        sequential = {}  # packets were counted that show no frame
    for decoder in DECODERS:
        tolerance = ROUNDING.get(path.name, 0) if decoder == "decord" else 0
        with open_video(str(path), decoder) as video:
            frames = video.read(indices)
        assert len(frames) == 8
        for index, frame in zip(indices.tolist(), frames, strict=True):
            if index in sequential:
                difference = np.abs(frame.astype(int) - sequential[index]).max()
                assert difference <= tolerance, (decoder, index)


@needs_test_data
@each_odd_file
@each_decoder
def test_odd_files_are_read_or_give_the_reason(path, decoder):
    try:
        with open_video(str(path), decoder, short_side=128) as video:
            frames = video.read(middle_clip(video))
    except ReadError as error:
        assert str(error)
        assert "\n" not in str(error)
        _, _, stem = path.stem.partition("__")
        assert stem not in READABLE
    else:
        assert frames.shape[0] == 8
        assert frames.shape[3] == 3


@needs_test_data
@each_odd_file
def test_odd_files_equal_their_sequential_decode(path):
    try:
        info = describe(str(path))
    except ReadError:
        return
    with PyAVVideo(str(path), None, info) as video:
        indices = middle_clip(video)
        sequential = video._decode_sequentially(sorted(set(indices.tolist())))
        frames = video.read(indices)
    assert set(sequential) == set(indices.tolist())
    if path.name == "made__bytes_flipped.mp4":
        return  # which frames are decoded changes how FFmpeg conceals the corruption
    for index, frame in zip(indices.tolist(), frames, strict=True):
        assert np.array_equal(sequential[index], frame)


@needs_test_data
def test_a_truncated_file_ends_where_its_data_ends():
    path = Path(os.environ["STMAE_TEST_DATA"], "data/odd/made__truncated_faststart_half.mp4")
    # Its table lists 203 frames. PyAV 16 counts the frame that is cut in half.
    expected = 85 if VERSION >= 17 else 86
    assert describe(str(path)).frames == expected


MADE_WITH = re.search(r"with PyAV (\d+\.\d+\.\d+)", decoder_matrix.PAGE.read_text())[1]
same_versions = pytest.mark.skipif(
    not decord_installed() or av.__version__ != MADE_WITH,
    reason=f"docs/decoders.md was made with PyAV {MADE_WITH} and decord",
)


@needs_test_data
@same_versions
def test_the_docs_are_true_of_real_files():
    assert decoder_matrix.PAGE.read_text().endswith(decoder_matrix.real_files())


@pytest.mark.slow
@same_versions
def test_the_docs_are_true_of_the_matrix(tmp_path):
    expected = decoder_matrix.HEAD + decoder_matrix.matrix_table(tmp_path)
    assert decoder_matrix.PAGE.read_text().startswith(expected)


# Cost


def test_only_wanted_frames_and_their_references_are_decoded(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=240, gop=12, b_frames=2)
    with PyAVVideo(str(path), None) as video:
        video.read(np.array([100, 105]))
        assert video.decoded <= 12  # two GOPs without their unused B-frames
        video.decoded = 0
        video.read(np.array([0]))
        assert video.decoded == 1


@pytest.mark.skipif(VERSION < 17, reason="PyAV 16 does not show the file's table of packets")
def test_only_the_packets_of_wanted_gops_are_read(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=240, gop=12)
    with PyAVVideo(str(path), None) as video:
        assert numbers_shown(video, [100, 110]) == [100, 110]
        assert sorted(video.gops.cache) == [8, 9]
        assert video.gops.all_packets is None


def erase_gops(path: Path, gops) -> None:
    """Overwrite all packets of some GOPs with zeros."""
    data = bytearray(path.read_bytes())
    with PyAVVideo(str(path), None) as video:
        for gop in gops:
            for packet in video.gops.packets(gop):
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)


@each_decoder
def test_the_cost_grows_with_the_span_of_a_clip(tmp_path, decoder):
    """Corrupt all GOPs but those of a clip: it stays the same, since nothing else is decoded.

    decord's thread runs ahead, usually by up to one GOP. A clip that reaches beyond fails with
    decord, and shows other frames with PyAV, which conceals the corruption.
    """
    path = write_video(tmp_path / "v.mp4", frames=100, size=(320, 240), gop=10, b_frames=0)
    near = np.arange(40, 60, 3)
    far = np.arange(40, 100, 6)
    with open_video(str(path), decoder) as video:
        expected = video.read(near)
    info = describe(str(path))
    intact = (4, 5, 6, 7) if decoder == "decord" else (4, 5)
    erase_gops(path, [gop for gop in range(10) if gop not in intact])
    if decoder == "decord":
        with DecordVideo(str(path), None, info) as video:
            assert np.array_equal(video.reader.get_batch(near.tolist()).asnumpy(), expected)
            with pytest.raises(Exception, match="decode|threaded_decoder|Error"):
                video.reader.get_batch(far.tolist())
    else:
        with PyAVVideo(str(path), None, info) as video:
            assert np.array_equal(video.read(near), expected)
            assert numbers_shown(video, far) != far.tolist()


def test_the_cost_of_corruption_is_bounded(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=3000, gop=10, b_frames=0)
    info = describe(str(path))
    erase_gops(path, range(60, 240))
    with PyAVVideo(str(path), None, info) as video:
        video.read(np.arange(500, 2500, 100))
        assert video.replaced >= 17
        assert video.decoded < 3000


def test_a_video_is_freed_without_the_garbage_collector(tmp_path):
    """A reference cycle would keep packets and open files until the collector runs."""
    path = str(write_video(tmp_path / "v.mp4", frames=40))
    gc.disable()
    try:
        with PyAVVideo(path, None) as video:
            video.read(np.array([5, 30]))
        reference = weakref.ref(video)
        del video
        assert reference() is None
    finally:
        gc.enable()


# Corrupt files


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_after_a_corrupt_keyframe_are_concealed(tmp_path, codec):
    """They look as in a player that decodes the file from the start."""
    path = tmp_path / "v.mp4"
    write_video(path, frames=60, gop=20, b_frames=0, codec=codec, size=(160, 96))
    data = bytearray(path.read_bytes())
    with PyAVVideo(str(path), None) as video:
        keyframe = video.gops.packets(1)[0]
    middle = keyframe.pos + keyframe.size // 2
    end = keyframe.pos + keyframe.size
    data[middle:end] = bytes(end - middle)
    path.write_bytes(data)
    expected = decode_as_player(path)
    with open_video(str(path)) as video:
        frames = video.read(np.arange(20, 60))
    for frame, expected_frame in zip(frames, expected[20:], strict=True):
        assert np.abs(frame.astype(int) - expected_frame).mean() < 8


def decode_as_player(path: Path) -> list[np.ndarray]:
    """Return all frames in order, with corruption concealed by the decoder."""
    images = []
    with PyAVVideo(str(path), None) as video:
        for packet in video._packets_and_drain():
            frames, _ = video._decode_packet(packet)
            images += [frame.to_ndarray(format="rgb24") for frame in frames]
    return images


def test_f01_a_damaged_first_frame_costs_itself_alone(tmp_path):
    path = str(write_video(tmp_path / "v.mov", codec="prores_ks", pix_fmt="yuv422p10le"))
    info = describe(path)
    with av.open(path) as container:
        packet = next(container.demux(video=0))
    content = bytearray(Path(path).read_bytes())
    content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    Path(path).write_bytes(content)
    assert describe(path) == info._replace(decord_reads=False)
    with open_video(path, "pyav") as video:
        frames = video.read(np.arange(40))
        assert video.replaced == 1
    assert [frame_number(frame) for frame in frames] == [1, *range(1, 40)]


def test_a_restart_forgets_earlier_reads(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=40)
    with PyAVVideo(str(path), None) as video:
        video.read(np.arange(40))
        assert len(video.gops.cache) > 0
        video.retry_packets = 0
        video.replaced = 3
        video.conversion_error = "of an earlier read"
        assert video.restart()
        fresh = PyAVVideo(str(path), None)
        for name in ("retry_packets", "replaced", "conversion_error"):
            assert getattr(video, name) == getattr(fresh, name)
        fresh.close()
        assert video.gops.cache == {}
        video.gops._read_all()  # as after a packet that the table does not announce
        assert not video.restart()


def test_a_restart_of_decord_reads_the_same_frames(tmp_path):
    path = str(write_video(tmp_path / "v.mp4", frames=40))
    with open_video(path, "decord") as video:
        expected = video.read(np.arange(40))
        video.replaced = 3
        assert video.restart()
        assert video.replaced == 0
        np.testing.assert_array_equal(video.read(np.array([30, 35])), expected[[30, 35]])
