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
from make_videos import frame_number, numbered_frame, write_video
from video_matrix import CASES
from video_writer import write_case

from data.decode import (
    DecordVideo,
    PyAVVideo,
    ReadError,
    clip_indices,
    decord_installed,
    describe,
    frame_indices,
    frames_at,
    open_video,
    scaled_size,
    view_start,
)
from data.pyav import VERSION

DECODERS = ["pyav"] + (["decord"] if decord_installed() else [])
ROUNDS_DIFFERENTLY = {  # decord's FFmpeg of 2019 against PyAV's: largest difference of a pixel
    "exoplayer__roadtrip-vp92-10bit.webm": 255,  # 80 packets show 72 pictures: the two number those after a hidden one differently
    "exoplayer__sample_with_color_info.mp4": 8,  # 10 bit to 8
    "exoplayer__sample.avi": 2,  # MPEG-4 part 2
}
needs_test_data = pytest.mark.skipif(
    "STMAE_TEST_DATA" not in os.environ, reason="STMAE_TEST_DATA is not set"
)


def test_data(kind: str) -> list[Path]:
    """Real files of a kind ("videos", "odd"), if they are here."""
    return sorted(Path(os.environ.get("STMAE_TEST_DATA", "/nonexistent"), "data", kind).glob("*"))


test_data.__test__ = False


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("gop", "b_frames"), [(250, 0), (12, 2), (1, 0)])
def test_the_wanted_frames_are_read(tmp_path, decoder, gop, b_frames):
    path = write_video(tmp_path / "v.mp4", frames=60, gop=gop, b_frames=b_frames)
    with open_video(str(path), decoder) as video:
        assert video.num_frames == 60
        assert video.fps == 30
        for wanted in ([0], [59], [3, 3, 10, 11, 47], list(range(5, 60, 7)), list(range(60))):
            frames = video.read(np.array(wanted))
            assert frames.dtype == np.uint8
            assert [frame_number(frame) for frame in frames] == wanted
        assert frame_number(video.read(np.array([200]))[0]) == 59  # past the end: the last frame


def test_indices_follow_the_formula():
    # 16 frames at stride 4 of a 60 fps video: a span of 128 source frames
    assert frame_indices(1000, 60, num_frames=16, sampling_rate=4, start=0).tolist() == [
        int(i * 127 / 15) for i in range(16)
    ]
    assert frame_indices(1000, 60, num_frames=16, sampling_rate=4, start=1)[[0, -1]].tolist() == [
        872,
        999,
    ]
    assert frame_indices(1000, 30, num_frames=16, sampling_rate=4, start=0.5)[0] == 468
    short = frame_indices(10, 30, num_frames=8, sampling_rate=4, start=0.7)
    assert short.tolist() == [int(i * 31 / 7) if i * 31 / 7 < 9 else 9 for i in range(8)]


def test_instants_of_a_constant_rate_are_its_frame_numbers():
    draws = np.random.default_rng(0)
    for _ in range(300):
        frames, fps, rate = (
            int(draws.integers(3, 900)),
            float(draws.choice([12.5, 23.976, 25, 30, 59.94, 480])),
            int(draws.integers(1, 9)),
        )
        clip = {"num_frames": 16, "sampling_rate": rate, "start": float(draws.random())}
        times = np.arange(frames) / fps
        assert frames_at(times, **clip).tolist() == frame_indices(frames, fps, **clip).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "irregular_h264.mp4",
        "irregular_h264.mkv",
        "pause_h264.mp4",
        "pause_h264.mkv",
        "pause_hevc.mp4",
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_clips_of_unsteady_videos_are_chosen_by_the_clock(tmp_path, name, indexed):
    case = next(case for case in CASES if case.name == name)
    path = str(write_case(case, tmp_path))
    seconds, info = np.array(case.seconds) - case.seconds[0], describe(path)
    with open_video(path, info=info if indexed else None) as video:
        fps = (len(seconds) - 1) / seconds[-1]
        assert video.fps == pytest.approx(fps, rel=0.01)
        for start in (0, 0.3, 1):
            wanted = clip_indices(video, num_frames=8, sampling_rate=4, start=start)
            usual = float(np.median(np.diff(seconds)))
            first = start * max(seconds[-1] + usual - 32 / 30, 0)
            for number, index in enumerate(wanted):
                instant = first + number * (32 / 30 - usual) / 7
                possible = {
                    int(sum(seconds <= instant + slack)) - 1 for slack in (-0.0015, 0, 0.0015)
                }  # MKV rounds to 1 ms
                assert int(index) in possible, (start, number)


STEADY = (
    "h264.mp4",
    "vp9.webm",
    "h264.ts",
    "480_per_second.mp4",
    "480_per_second.mkv",
    "half_per_second.mp4",
    "half_per_second.mkv",
)


@pytest.mark.parametrize("name", STEADY)
def test_steady_videos_keep_their_frame_numbers(tmp_path, name):
    case = next(case for case in CASES if case.name == name)
    with open_video(str(write_case(case, tmp_path))) as video:
        rate = (len(case.seconds) - 1) / (case.seconds[-1] - case.seconds[0])
        assert video.times is None and video.fps == pytest.approx(rate, rel=0.01)


def test_views_start_where_the_protocol_says():
    def first(view, views):
        start = view_start(301, 30, num_frames=16, sampling_rate=4, view=view, views=views)
        return frame_indices(301, 30, num_frames=16, sampling_rate=4, start=start)[0]

    assert first(0, 1) == 237 // 2
    assert [first(view, 5) for view in range(5)] == [view * (237 // 4) for view in range(5)]
    assert view_start(10, 30, num_frames=16, sampling_rate=4, view=2, views=3) == 0


def test_only_wanted_frames_and_what_they_need_are_decoded(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=240, gop=12, b_frames=2)
    with PyAVVideo(str(path), None) as video:
        wanted = np.array([100, 105])
        video.read(wanted)
        assert (
            video.decoded <= 12
        )  # one or two groups of pictures, without their unused B frames; 240 in the file
        video.decoded = 0
        video.read(np.array([0]))
        assert video.decoded == 1


@pytest.mark.skipif(not decord_installed(), reason="decord is not installed")
def test_both_decoders_give_the_same_pixels(tmp_path):
    path = write_video(tmp_path / "v.mkv", frames=50, gop=20)
    wanted = np.arange(3, 50, 5)
    with open_video(str(path), "decord") as a, open_video(str(path), "pyav") as b:
        assert type(a) is not type(b)
        assert np.array_equal(a.read(wanted), b.read(wanted))


@pytest.mark.parametrize("decoder", DECODERS)
def test_short_side_is_reduced_and_never_enlarged(tmp_path, decoder):
    path = write_video(tmp_path / "v.mp4", frames=5, size=(96, 64))
    with open_video(str(path), decoder, short_side=32) as video:
        assert video.read(np.array([2])).shape == (1, 32, 48, 3)
        assert frame_number(video.read(np.array([2]))[0]) == 2
    with open_video(str(path), decoder, short_side=640) as video:
        assert video.read(np.array([2])).shape == (1, 64, 96, 3)
    assert scaled_size(1080, 1920, 256) == (256, 455)


@pytest.mark.parametrize("decoder", DECODERS)
def test_pictures_that_cannot_be_converted_say_why(tmp_path, decoder):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.colorspace = (
            96,
            64,
            "yuv420p",
            8,
        )
        container.mux(
            stream.encode(av.VideoFrame.from_ndarray(numbered_frame(3, 96, 64), format="rgb24"))
        )
        container.mux(stream.encode())
    with pytest.raises(
        ReadError,
        match=r"pictures \(yuv420p, color space 8\) cannot be converted to RGB: YCgCo is not supported",
    ):
        open_video(str(tmp_path / "v.mp4"), decoder).read(np.array([0]))


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_no_video_is_an_error_of_one_line(tmp_path, decoder):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in ("text.mp4", "empty.mp4", "folder.mp4", "fifo.mp4", "missing.mp4", "concat:a|b"):
        with pytest.raises(ReadError) as raised:
            open_video(str(tmp_path / name), decoder)
        assert str(raised.value) and "\n" not in str(raised.value)


def test_a_name_that_starts_with_a_dash(tmp_path, monkeypatch):
    write_video(tmp_path / "-v.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    for decoder in DECODERS:
        with open_video("-v.mp4", decoder) as video:
            assert frame_number(video.read(np.array([1]))[0]) == 1


@needs_test_data
@pytest.mark.parametrize("path", test_data("videos"), ids=lambda path: path.name)
def test_every_ordinary_file_decodes_as_if_from_the_start(path):
    """The selective path gives the pictures of a plain decode from the first frame on."""
    with PyAVVideo(str(path), None) as video:
        indices = frame_indices(
            video.num_frames, video.fps, num_frames=8, sampling_rate=4, start=0.6
        )
        plain = video._counted(sorted(set(indices.tolist())))
    if not all(index in plain for index in indices):
        assert path.name in (
            "exoplayer__roadtrip-vp92-10bit.webm",
            "exoplayer__dolbyVision-hdr.MOV",
        )  # packets that show nothing
        plain = {}
    for decoder in DECODERS:
        with open_video(str(path), decoder) as video:
            frames = video.read(indices)
        assert len(frames) == 8
        for index, frame in zip(indices, frames, strict=True):
            if index in plain:
                allowed = ROUNDS_DIFFERENTLY.get(path.name, 0) if decoder == "decord" else 0
                assert np.abs(frame.astype(int) - plain[index]).max() <= allowed, (decoder, index)


@needs_test_data
@pytest.mark.parametrize("path", test_data("odd"), ids=lambda path: path.name)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_odd_file_decodes_or_says_why(path, decoder):
    try:
        with open_video(str(path), decoder, short_side=128) as video:
            frames = video.read(
                frame_indices(video.num_frames, video.fps, num_frames=8, sampling_rate=4, start=0.5)
            )
        assert frames.shape[0] == 8 and frames.shape[3] == 3
    except ReadError as error:
        assert str(error) and "\n" not in str(error)
        assert path.stem.partition("__")[2] not in (
            "h264_no_pts",
            "raw_annexb_no_pts",
            "vfr_30_to_5fps",
            "single_frame",
            "truncated_half",
        )


@needs_test_data
@pytest.mark.parametrize("path", test_data("odd"), ids=lambda path: path.name)
def test_odd_files_decode_as_if_from_the_start(path):
    """The selective path gives the pictures of a plain decode, but where damage is concealed."""
    try:
        info = describe(str(path))
    except ReadError:
        return
    with PyAVVideo(str(path), None, info) as video:
        indices = frame_indices(
            video.num_frames, video.fps, num_frames=8, sampling_rate=4, start=0.6
        )
        plain, frames = video._counted(sorted(set(indices.tolist()))), video.read(indices)
    assert len(plain) == len(set(indices.tolist()))
    equal = all(
        np.array_equal(plain[index], frame)
        for index, frame in zip(indices.tolist(), frames, strict=True)
    )
    assert equal or path.name == "made__bytes_flipped.mp4"


@needs_test_data
def test_a_file_that_was_cut_short_ends_where_it_ends():
    info = describe(
        str(Path(os.environ["STMAE_TEST_DATA"], "data/odd/made__truncated_faststart_half.mp4"))
    )
    assert info.frames == (
        85 if VERSION >= 17 else 86
    )  # of the 203 that its table lists; PyAV 16 counts the one that was cut in half


MADE_WITH = re.search(r"with PyAV ([\d.]+),", decoder_matrix.PAGE.read_text())[1]
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
    assert decoder_matrix.PAGE.read_text().startswith(
        decoder_matrix.HEAD + decoder_matrix.matrix_table(tmp_path)
    )


@pytest.mark.skipif(VERSION < 17, reason="PyAV 16 does not show the file's table of packets")
def test_only_the_packets_of_the_wanted_groups_are_read(tmp_path):
    """Of a file with a table of its packets (MP4): 20 groups of 12 frames, of which two are wanted."""
    with PyAVVideo(str(write_video(tmp_path / "v.mp4", frames=240, gop=12)), None) as video:
        assert frame_number(video.read(np.array([100, 110]))[1]) == 110
        assert sorted(video.packets.groups) == [8, 9] and video.packets.all is None


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_cost_grows_with_the_span_and_not_with_the_video(tmp_path, decoder):
    """Of a video whose packets are all spoilt but those of frames 40 to 59, these frames are read as if nothing were wrong:
    no other packet is decoded (by decord's thread, which runs ahead, none beyond the next group). Where the clip reaches beyond them, decord
    fails (and PyAV conceals)."""
    path = write_video(tmp_path / "v.mp4", frames=100, size=(320, 240), gop=10, b_frames=0)
    whole, near, far = bytearray(path.read_bytes()), np.arange(40, 60, 3), np.arange(40, 100, 6)
    with open_video(str(path), decoder) as video:
        expected = video.read(near)
    info, spared = describe(str(path)), (4, 5, 6) if decoder == "decord" else (4, 5)
    with PyAVVideo(str(path), None) as video:
        for packet in (
            packet
            for group in range(10)
            if group not in spared
            for packet in video.packets.group(group)
        ):
            whole[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(whole)
    with (DecordVideo if decoder == "decord" else PyAVVideo)(str(path), None, info) as video:
        if decoder == "decord":
            assert np.array_equal(video.reader.get_batch(near.tolist()).asnumpy(), expected)
            with pytest.raises(Exception, match="decode|threaded_decoder|Error"):
                video.reader.get_batch(far.tolist())
        else:
            assert np.array_equal(video.read(near), expected)
            assert [frame_number(frame) for frame in video.read(far)] != far.tolist()


def test_a_video_is_freed_without_the_garbage_collector(tmp_path):
    """A reference cycle would keep packets and open files until the collector comes by: memory of workers would grow."""
    path = str(write_video(tmp_path / "v.mp4", frames=40))
    gc.disable()
    try:
        with PyAVVideo(path, None) as video:
            video.read(np.array([5, 30]))
        gone = weakref.ref(video)
        del video
        assert gone() is None
    finally:
        gc.enable()


def sequential(path: Path) -> list[np.ndarray]:
    """All frames in order, as a player that conceals damage shows them."""
    with PyAVVideo(str(path), None) as video:
        return [
            frame.to_ndarray(format="rgb24")
            for packet in video._all_packets()
            for frame in video._frames(packet)[0]
        ]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_what_follows_a_damaged_key_frame_is_as_a_player_shows_it(tmp_path, codec):
    path = write_video(
        tmp_path / "v.mp4", frames=60, gop=20, b_frames=0, codec=codec, size=(160, 96)
    )
    data = bytearray(path.read_bytes())
    with PyAVVideo(str(path), None) as video:
        key = video.packets.group(1)[0]
    data[key.pos + key.size // 2 : key.pos + key.size] = bytes(key.size - key.size // 2)
    path.write_bytes(data)
    expected = sequential(path)
    with open_video(str(path)) as video:
        frames = video.read(np.arange(20, 60))
    far = [
        float(np.abs(frame.astype(int) - other).mean())
        for frame, other in zip(frames, expected[20:], strict=True)
    ]
    assert max(far) < 8, far


def test_packets_that_are_wrongly_called_key_frames(tmp_path):
    for codec, b_frames in (("mpeg4", 0), ("mpeg4", 2), ("libx264", 2)):
        path = write_video(
            tmp_path / f"{codec}_{b_frames}.mp4", frames=40, gop=12, b_frames=b_frames, codec=codec
        )
        data = path.read_bytes()
        assert data.count(b"stss") == 1
        path.write_bytes(data.replace(b"stss", b"free"))
        with open_video(str(path)) as video:
            for wanted in ([30], [7], [3, 14, 22, 39]):
                assert [frame_number(frame) for frame in video.read(np.array(wanted))] == wanted


def test_a_key_frame_at_the_time_of_the_frame_before(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = (
            96,
            64,
            "yuv420p",
            Fraction(1, 15360),
        )
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 0
        for number in range(36):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 96, 64), format="rgb24")
            frame.pts, frame.time_base = (
                (number + (number >= 12)) * 512,
                Fraction(1, 15360),
            )  # frame 11 lasts twice as long
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    twice = struct.pack(">II", 1, 1024)
    data = path.read_bytes()
    assert data.count(twice) == 1
    path.write_bytes(data.replace(twice, struct.pack(">II", 1, 0)))
    for info in (None, describe(str(path))):
        with open_video(str(path), info=info) as video:
            assert [frame_number(frame) for frame in video.read(np.arange(36))] == list(range(36))


def test_the_cost_of_damage_is_bounded(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=3000, gop=10, b_frames=0)
    data, info = bytearray(path.read_bytes()), describe(str(path))
    with PyAVVideo(str(path), None) as video:
        for packet in (packet for group in range(60, 240) for packet in video.packets.group(group)):
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    with PyAVVideo(str(path), None, info) as video:
        video.read(np.arange(500, 2500, 100))
        assert video.replaced >= 17 and video.decoded < 3000


def test_time_stamps_that_jump_back_are_put_in_order(tmp_path):
    case = next(case for case in CASES if case.name == "bytes_joined_h264.ts")
    with open_video(str(write_case(case, tmp_path))) as video:
        times = np.arange(video.num_frames) / video.fps if video.times is None else video.times
        assert (np.diff(times) > 0).all() and times[-1] < 2 * video.num_frames / 24


def test_the_rate_of_avi_is_that_of_its_frames(tmp_path):
    source = write_video(tmp_path / "v.mp4", frames=50, fps=25, codec="mpeg4")
    with av.open(str(source)) as read, av.open(str(tmp_path / "v.avi"), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    assert describe(str(tmp_path / "v.avi")).fps == pytest.approx(25, rel=0.05)
