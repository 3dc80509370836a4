"""The matrix of videos: codecs, containers, structures, time stamps and pictures.

    path = write_case(case, folder)  # tests/video_writer.py
    reference = decode_in_sequence(path)  # tests/video_checks.py
    assert reference.numbers == case.numbers  # what a player shows

`CASES` is the whole matrix, `QUICK` a small part of it.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
from video_writer import (
    ORIENTATIONS,
    Case,
    Encoding,
    hide_vp8,
    hide_vp9,
    pack_mpeg4,
    write_bytes_joined,
    write_copied,
    write_cut,
    write_edited,
    write_joined,
    write_rewritten,
    write_without_key_table,
    write_without_start,
)

H264, X265 = Encoding(), Encoding("libx265")
VP8, VP9 = Encoding("libvpx", b_frames=0), Encoding("libvpx-vp9", b_frames=0)
SVT = Encoding("libsvtav1", size=(160, 96), b_frames=0)
AOM = Encoding("libaom-av1", b_frames=0)
MPEG4, MPEG2 = Encoding("mpeg4"), Encoding("mpeg2video", size=(128, 96))
MJPEG = Encoding("mjpeg", gop=1, b_frames=0, pix_fmt="yuvj420p", full_range=True)
PRORES = Encoding("prores_ks", gop=1, b_frames=0, pix_fmt="yuv422p10le")
H263 = Encoding("h263", size=(128, 96), b_frames=0, aspect=Fraction(12, 11))  # the format's own
OPEN = H264._replace(params="open-gop=1", b_frames=3)
CLOSED_HEVC = X265._replace(params="open-gop=0")
LONG, OPEN_LONG = H264._replace(frames=72), OPEN._replace(frames=72)
LAYERS = (
    (
        "ts-parameters",
        "ts_number_layers=2:ts_target_bitrate=400,800:ts_rate_decimator=2,1:ts_periodicity=2:ts_layer_id=0,1:ts_layering_mode=2",
    ),
    ("deadline", "realtime"),
    ("lag-in-frames", "0"),
    ("b", "800k"),
)
IRREGULAR = tuple(np.cumsum([0] + [7 + i * 37 % 50 for i in range(47)]).tolist())
PAUSE = tuple(i * 40 + 120_000 * (i >= 20) for i in range(48))
FRAGMENTS = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
APART = (("fflags", "-autobsf"),)  # or the container would join hidden frames with the next ones
FASTSTART = (("movflags", "faststart"),)
NEGATIVE = (("movflags", "negative_cts_offsets"),)
TWICE = (*range(24), *range(1000, 1024))  # two encodes of 24 frames


def _cut_case(
    name: str,
    what: str,
    encoding: Encoding,
    at: int,
    key: int,
    first: int | None = None,
    keep: str = ".mp4",
    muxer: tuple = (),
) -> Case:
    """Make a case of `write_cut`; the frames from `first` on are shown (None: from the cut)."""
    shown = tuple(range(at if first is None else first, encoding.frames))
    return Case(name, what, encoding, partial(write_cut, at=at, key=key, keep=keep), muxer, shown)


def _edited_case(name: str, what: str, encoding: Encoding, *edits: tuple[int, int]) -> Case:
    """Make a case of `write_edited`."""
    shown = tuple(i for first, end in edits for i in range(first, end))
    one = len(edits) == 1  # FFmpeg shows the second edit a frame late
    return Case(
        name, what, encoding, partial(write_edited, edits=edits), shown=shown, has_times=one
    )


def _joined_case(name: str, what: str, encoding: Encoding, size: tuple[int, int], raw: str) -> Case:
    """Make a case of `write_joined`: twice 24 frames, the second half of another size."""
    encoding = encoding._replace(frames=24)
    return Case(name, what, encoding, partial(write_joined, size=size, raw=raw), shown=TWICE)


def _hidden_case(
    name: str, what: str, encoding: Encoding, change: Callable, hidden: int, muxer: tuple = ()
) -> Case:
    """Make a case in which frame `hidden` of each group is not shown; VP9's first one is."""
    shown = tuple(
        i for i in range(encoding.frames) if i % encoding.gop != hidden or (hidden == i == 0)
    )
    times = tuple(i / float(encoding.rate) for i in shown)
    return Case(name, what, encoding, partial(write_rewritten, change=change), muxer, shown, times)


def _later_case(name: str) -> Case:
    """Make a case in which all key frames of VP9 but the first are shown 7 frames later."""
    shown = [
        *range(12),
        *(i + j for i in (12, 24, 36) for j in (1, 2, 3, 4, 5, 6, 7, 0, 8, 9, 10, 11)),
    ]
    what = "hidden key frames are shown 7 frames later by packets of 1 byte"
    return Case(
        name,
        what,
        VP9,
        partial(write_rewritten, change=partial(hide_vp9, joined=True, later=7)),
        (),
        tuple(shown),
    )


CODECS = (
    Case("h264.mp4", "closed groups of 12, 2 B frames"),
    Case("h264_faststart.mp4", "the table of packets before the packets", muxer=FASTSTART),
    Case("h264.mov", "as in MP4", H264._replace(size=(128, 80))),
    Case("h264.mkv", "time stamps rounded to milliseconds"),
    Case("h264.ts", "no table of packets; starts after 0", H264._replace(size=(128, 80))),
    Case("h264.3gp", "as in MP4", H264._replace(b_frames=0)),
    Case("h264.flv", "decode time stamps and offsets"),
    Case("h264_b.avi", "AVI does not store when to show frames: they are counted", has_times=False),
    Case("h264_no_b.avi", "decoded and shown in the same order", H264._replace(b_frames=0)),
    Case("raw.h264", "no container, no time stamps: frames are counted", has_times=False),
    Case(
        "h264_fragments.mp4", "a fragment for each group, each with its own table", muxer=FRAGMENTS
    ),
    Case("hevc.mp4", "closed groups", CLOSED_HEVC),
    Case(
        "hevc_fragments.mp4", "open groups in fragments", X265._replace(b_frames=3), muxer=FRAGMENTS
    ),
    Case("hevc.mkv", "closed groups", CLOSED_HEVC._replace(b_frames=3)),
    Case("hevc.mov", "closed groups", CLOSED_HEVC._replace(b_frames=1)),
    Case("hevc.ts", "no table of packets", CLOSED_HEVC),
    Case("vp8.webm", "no hidden frames", VP8),
    _hidden_case(
        "vp8_hidden.webm", "hidden packets, referred to later, show nothing", VP8, hide_vp8, 3
    ),
    _hidden_case(
        "vp8_hidden.mkv",
        "hidden packets, referred to later, show nothing",
        VP8._replace(gop=20),
        hide_vp8,
        3,
    ),
    Case("vp9.webm", "no hidden frames", VP9),
    _hidden_case(
        "vp9_hidden.webm", "hidden key frames in packets of their own", VP9, hide_vp9, 0, APART
    ),
    _hidden_case(
        "vp9_hidden.mkv",
        "hidden key frames in packets of their own",
        VP9._replace(gop=16),
        hide_vp9,
        0,
        APART,
    ),
    _hidden_case(
        "vp9_superframes.webm",
        "hidden key frames in one packet with the frame after",
        VP9,
        partial(hide_vp9, joined=True),
        0,
    ),
    _hidden_case(
        "vp9_superframes.mp4",
        "hidden key frames in one packet with the frame after",
        VP9,
        partial(hide_vp9, joined=True),
        0,
    ),
    _later_case("vp9_shown_later.webm"),
    _later_case("vp9_shown_later.mp4"),
    Case("vp9.mkv", "one key frame", VP9._replace(gop=1000)),
    Case(
        "av1_svt.mp4",
        "B pyramid; a packet may only point at a frame decoded before",
        SVT._replace(frames=80, gop=32),
    ),
    Case("av1_svt.mkv", "B pyramid", SVT._replace(frames=60, gop=16)),
    Case("av1_svt.webm", "one key frame", SVT._replace(frames=48, gop=1000)),
    Case(
        "av1_svt_fragments.mp4",
        "B pyramid in fragments",
        SVT._replace(frames=64, gop=16),
        muxer=FRAGMENTS,
    ),
    Case("av1_svt_all_keys.mp4", "each a key frame", SVT._replace(frames=40, gop=1)),
    Case("av1_aom.mp4", "B pyramid with hidden references", AOM._replace(frames=64, gop=32)),
    Case("av1_aom.webm", "B pyramid with hidden references", AOM._replace(gop=1000)),
    Case("mpeg4.mp4", "2 B frames", MPEG4),
    Case(
        "mpeg4_b.avi",
        "AVI does not store when to show frames: they are counted",
        MPEG4,
        has_times=False,
    ),
    Case("mpeg4_no_b.avi", "decoded and shown in the same order", MPEG4._replace(b_frames=0)),
    Case(
        "mpeg4_packed.avi",
        "DivX: each B frame in the packet before it, then an empty packet",
        MPEG4._replace(b_frames=1),
        partial(write_rewritten, change=pack_mpeg4),
        has_times=False,
    ),
    Case("mpeg4.mkv", "1 B frame", MPEG4._replace(b_frames=1)),
    Case("mpeg4.3gp", "as in MP4", MPEG4._replace(b_frames=0, size=(128, 96))),
    Case("mpeg4.ts", "2 B frames", MPEG4),
    Case("mpeg2.ts", "open groups", MPEG2),
    Case("mpeg2.mpg", "program stream: not every packet has a time stamp", MPEG2),
    Case("mpeg2.mkv", "open groups", MPEG2._replace(b_frames=1)),
    Case("flv1.flv", "no B frames", Encoding("flv", b_frames=0)),
    Case("wmv2.wmv", "no B frames", Encoding("wmv2", b_frames=0)),
    Case("h263.3gp", "no B frames", H263),
    Case("h263.mov", "no B frames", H263),
    Case("mjpeg.avi", "each a key frame, full range", MJPEG),
    Case("mjpeg.mov", "each a key frame, full range", MJPEG._replace(size=(97, 65))),
    Case("mjpeg.mkv", "each a key frame, full range", MJPEG),
    Case("prores.mov", "each a key frame, 10 bit 4:2:2", PRORES),
    Case(
        "prores_444.mov", "each a key frame, 10 bit 4:4:4", PRORES._replace(pix_fmt="yuv444p10le")
    ),
    Case("prores.mkv", "each a key frame, 10 bit 4:2:2", PRORES._replace(size=(98, 66))),
)

GROUPS = (
    Case("h264_no_b.mp4", "no B frames", H264._replace(b_frames=0)),
    Case("h264_1_b.mkv", "1 B frame", H264._replace(b_frames=1)),
    Case(
        "h264_3_b.mp4",
        "3 B frames without pyramid",
        H264._replace(b_frames=3, params="b-pyramid=none"),
    ),
    Case(
        "h264_pyramid.mp4",
        "3 B frames, one of them a reference",
        H264._replace(b_frames=3, params="b-pyramid=normal"),
    ),
    Case(
        "h264_pyramid.ts",
        "3 B frames, one of them a reference",
        H264._replace(b_frames=3, params="b-pyramid=normal"),
    ),
    Case("h264_open.mp4", "frames shown before a key frame depend on the group before it", OPEN),
    Case("h264_open.mkv", "frames shown before a key frame depend on the group before it", OPEN),
    Case("h264_open.ts", "frames shown before a key frame depend on the group before it", OPEN),
    Case("h264_open_fragments.mp4", "open groups in fragments", OPEN, muxer=FRAGMENTS),
    Case(
        "hevc_open.mp4",
        "x265's default; leading frames depend on the group before",
        X265._replace(b_frames=3),
    ),
    Case("hevc_open.mkv", "leading frames depend on the group before", X265._replace(b_frames=3)),
    Case("hevc_open.ts", "leading frames depend on the group before", X265._replace(b_frames=3)),
    Case(
        "hevc_open_pyramid.mp4",
        "4 B frames with pyramid",
        X265._replace(b_frames=4, params="b-pyramid=1"),
    ),
    Case("h264_one_key.mp4", "one key frame only", H264._replace(frames=96, gop=1000)),
    Case("h264_one_key.mkv", "one key frame only", H264._replace(gop=1000)),
    Case("hevc_one_key.mp4", "one key frame only", X265._replace(gop=1000)),
    Case("h264_all_keys.mp4", "each a key frame", H264._replace(gop=1, b_frames=0)),
    Case("hevc_all_keys.mkv", "each a key frame", X265._replace(gop=1, b_frames=0)),
    Case(
        "h264_refresh.mp4",
        "intra refresh: marked packets are not decodable alone",
        H264._replace(b_frames=0, params="intra-refresh=1"),
    ),
    Case("h264_refresh.mkv", "intra refresh", H264._replace(b_frames=0, params="intra-refresh=1")),
    Case("h264_refresh.ts", "intra refresh", H264._replace(b_frames=0, params="intra-refresh=1")),
    Case(
        "false_keys_h264.mp4",
        "the table calls each packet a key frame, wrongly",
        make=write_without_key_table,
    ),
    Case(
        "false_keys_hevc.mp4",
        "the table calls each packet a key frame, wrongly",
        CLOSED_HEVC,
        write_without_key_table,
    ),
    Case("vp8_layers.webm", "no frame refers to every other one", VP8._replace(options=LAYERS)),
    Case("vp9_layers.webm", "two temporal layers", VP9._replace(options=LAYERS)),
    Case("h264_interlaced.mp4", "interlaced blocks (MBAFF)", H264._replace(params="tff=1")),
    Case(
        "h264_many_refs.mp4",
        "16 reference frames, B pyramid",
        H264._replace(gop=30, b_frames=8, params="ref=16:b-pyramid=normal"),
    ),
)

CUTS = (
    _cut_case(
        "cut_h264.mp4", "edit list amid a group: the lead-in is decoded, not shown", LONG, 30, 2
    ),
    _cut_case("cut_h264_late.mp4", "edit list at the end of a group", LONG, 35, 2),
    _cut_case("cut_h264_long.mp4", "edit list; the lead-in is longer than a group", LONG, 40, 1),
    _cut_case("cut_h264.mov", "edit list amid a group", LONG._replace(b_frames=0), 29, 2),
    _cut_case(
        "cut_h264_at_open_key.mp4",
        "edit list at an open group: leading frames are not shown",
        OPEN_LONG,
        24,
        2,
    ),
    _cut_case("cut_h264_open.mp4", "edit list amid an open group", OPEN_LONG, 30, 2),
    _cut_case(
        "cut_h264_open.mkv",
        "no edit lists in MKV: shown from the key frame, without leading frames",
        OPEN_LONG,
        30,
        2,
        24,
        ".mkv",
    ),
    _cut_case(
        "cut_h264_open.ts",
        "shown from the key frame, without leading frames",
        OPEN_LONG,
        24,
        2,
        24,
        ".ts",
    ),
    _cut_case(
        "cut_h264.mkv", "no edit lists in MKV: the lead-in is shown", LONG, 30, 2, 24, ".mkv"
    ),
    _cut_case(
        "cut_h264_fragments.mp4",
        "no edit list before fragments: the lead-in is shown",
        LONG,
        30,
        2,
        24,
        muxer=FRAGMENTS,
    ),
    _cut_case(
        "cut_hevc.mp4", "edit list amid a closed group", CLOSED_HEVC._replace(frames=72), 31, 2
    ),
    _cut_case(
        "cut_hevc_open.mp4",
        "edit list amid an open group",
        X265._replace(frames=72, b_frames=3),
        30,
        2,
    ),
    _cut_case(
        "cut_hevc_at_open_key.mp4",
        "edit list at an open group",
        X265._replace(frames=72, b_frames=3),
        24,
        2,
    ),
    _cut_case(
        "cut_hevc_open.mkv",
        "shown from the key frame, without leading frames",
        X265._replace(frames=72, b_frames=3),
        30,
        2,
        24,
        ".mkv",
    ),
    _cut_case("cut_av1.mp4", "edit list amid a group", SVT._replace(frames=64, gop=16), 37, 2),
    _cut_case("cut_vp9.mp4", "edit list amid a group", VP9._replace(frames=60), 30, 2),
    _cut_case("cut_mpeg4.mp4", "edit list amid a group", MPEG4._replace(frames=60), 31, 2),
    _edited_case("trimmed_h264.mp4", "an edit list hides both ends", LONG, (17, 53)),
    _edited_case("trimmed_end_h264.mp4", "an edit list hides the end", LONG, (0, 40)),
    _edited_case(
        "trimmed_hevc_open.mov",
        "an edit list hides both ends, open groups",
        X265._replace(frames=72, b_frames=3),
        (22, 58),
    ),
    _edited_case(
        "trimmed_mpeg4.mp4", "an edit list hides both ends", MPEG4._replace(frames=60), (13, 41)
    ),
    _edited_case("two_edits_h264.mp4", "two edits leave out the middle", LONG, (5, 21), (45, 66)),
    _edited_case(
        "two_edits_hevc.mp4",
        "two edits leave out the middle",
        CLOSED_HEVC._replace(frames=72),
        (5, 21),
        (45, 66),
    ),
    _edited_case("swapped_edits_h264.mp4", "two edits in another order", LONG, (45, 66), (5, 21)),
    _cut_case(
        "cut_prores.mov",
        "each a key frame: the cut is exact, no lead-in",
        PRORES,
        20,
        20,
        keep=".mov",
    ),
    Case(
        "begun_late_h264.ts",
        "a recording begun amid a group: shown from the first key frame",
        LONG,
        partial(write_without_start, packets=6),
        shown=tuple(range(12, 72)),
    ),
    Case(
        "begun_late_h264.mp4",
        "begun amid a group: shown from the first key frame",
        LONG,
        partial(write_copied, keep=".mp4", amid=6),
        shown=tuple(range(12, 72)),
    ),
    Case(
        "begun_late_hevc.mkv",
        "begun amid a group: shown from the first key frame",
        CLOSED_HEVC._replace(frames=72),
        partial(write_copied, keep=".mp4", amid=6),
        shown=tuple(range(12, 72)),
    ),
    Case(
        "begun_late_hevc.ts",
        "a recording begun amid a group",
        CLOSED_HEVC._replace(frames=72),
        partial(write_without_start, packets=6),
        shown=tuple(range(12, 72)),
    ),
)

STAMPS = (
    Case("start_5.mp4", "starts at 5 s by an empty edit", H264._replace(start=Fraction(5))),
    Case("start_5.mkv", "starts at 5 s", H264._replace(start=Fraction(5))),
    Case("start_5.ts", "starts at 5 s", OPEN._replace(start=Fraction(5))),
    Case("start_5_hevc.mov", "starts at 5 s by an empty edit", X265._replace(start=Fraction(5))),
    Case(
        "wrapped.ts",
        "the 33 bits of the time stamps overflow after half a second",
        H264._replace(start=Fraction(2**33, 90000) - Fraction(1, 2)),
    ),
    Case(
        "negative_h264.mp4",
        "offsets of composition below 0, no edit list",
        H264._replace(b_frames=3),
        muxer=NEGATIVE,
    ),
    Case("negative_h264.mov", "offsets of composition below 0, open groups", OPEN, muxer=NEGATIVE),
    Case("negative_hevc.mp4", "offsets of composition below 0", X265, muxer=NEGATIVE),
    Case("irregular_h264.mp4", "7 to 56 ms between frames", H264._replace(stamps=IRREGULAR)),
    Case("irregular_h264.mkv", "7 to 56 ms between frames", OPEN._replace(stamps=IRREGULAR)),
    Case("irregular_vp9.webm", "7 to 56 ms between frames", VP9._replace(stamps=IRREGULAR)),
    Case("irregular_av1.mp4", "7 to 56 ms between frames", SVT._replace(stamps=IRREGULAR)),
    Case(
        "irregular_mjpeg.avi",
        "empty packets in the gaps show nothing",
        MJPEG._replace(stamps=IRREGULAR),
    ),
    Case("pause_h264.mp4", "a pause of two minutes", H264._replace(stamps=PAUSE)),
    Case("pause_h264.mkv", "a pause of two minutes", H264._replace(stamps=PAUSE)),
    Case("pause_hevc.mp4", "a pause of two minutes", X265._replace(stamps=PAUSE)),
    Case("480_per_second.mp4", "480 frames a second", H264._replace(rate=Fraction(480))),
    Case("480_per_second_hevc.mov", "480 frames a second", X265._replace(rate=Fraction(480))),
    Case(
        "480_per_second.mkv",
        "stamps of 1 ms: rounded to unequal steps",
        H264._replace(rate=Fraction(480)),
    ),
    Case("half_per_second.mp4", "a frame every two seconds", H264._replace(rate=Fraction(1, 2))),
    Case("half_per_second.mkv", "a frame every two seconds", H264._replace(rate=Fraction(1, 2))),
    Case("ntsc.mp4", "30000/1001 frames a second", H264._replace(rate=Fraction(30000, 1001))),
    Case(
        "ntsc_mpeg4.avi",
        "30000/1001 frames a second",
        MPEG4._replace(rate=Fraction(30000, 1001), b_frames=0),
    ),
    Case("one_frame.mp4", "1 frame", H264._replace(frames=1)),
    Case("one_frame.webm", "1 frame", VP9._replace(frames=1)),
    Case("one_frame.mkv", "1 frame", X265._replace(frames=1)),
    Case("one_frame_mjpeg.avi", "1 frame", MJPEG._replace(frames=1)),
    Case("two_frames.mp4", "2 frames", H264._replace(frames=2)),
    Case("two_frames_av1.mp4", "2 frames", SVT._replace(frames=2)),
    Case("two_frames_hevc.mov", "2 frames", X265._replace(frames=2)),
    Case("audio_h264.mp4", "the first stream is sound", H264._replace(audio=True)),
    Case("audio_h264_open.mkv", "the first stream is sound", OPEN._replace(audio=True)),
    Case("audio_h264.ts", "the first stream is sound", H264._replace(audio=True)),
)

JOINED = (
    _joined_case("joined_h264.mp4", "two encodes with the same settings", H264, (96, 64), ".mp4"),
    _joined_case("joined_h264_open.mkv", "two encodes with open groups", OPEN, (96, 64), ".mp4"),
    _joined_case("joined_hevc.mp4", "two encodes with the same settings", X265, (96, 64), ".mp4"),
    _joined_case("joined_vp8.webm", "two encodes with the same settings", VP8, (96, 64), ".webm"),
    _joined_case(
        "size_change_h264.mkv",
        "96x64, then 128x80: shown at the first size",
        H264,
        (128, 80),
        ".ts",
    ),
    _joined_case(
        "size_change_h264.ts", "96x64, then 128x80: shown at the first size", H264, (128, 80), ".ts"
    ),
    _joined_case(
        "size_change_hevc.ts", "96x64, then 160x96: shown at the first size", X265, (160, 96), ".ts"
    ),
    _joined_case(
        "size_change_vp8.webm",
        "96x64, then 128x80: shown at the first size",
        VP8,
        (128, 80),
        ".webm",
    ),
    _joined_case(
        "size_change_vp9.webm", "96x64, then 64x48: shown at the first size", VP9, (64, 48), ".webm"
    ),
    _joined_case(
        "size_change_vp9.mp4", "96x64, then 128x80: shown at the first size", VP9, (128, 80), ".mp4"
    ),
    Case(
        "bytes_joined_h264.ts",
        "two files in one: time stamps begin again in the middle",
        H264._replace(frames=24),
        write_bytes_joined,
        shown=TWICE,
        has_times=False,
    ),
    Case(
        "bytes_joined_mpeg2.mpg",
        "two files in one: time stamps begin again in the middle",
        MPEG2._replace(frames=24),
        write_bytes_joined,
        shown=TWICE,
        has_times=False,
    ),
)

PICTURES = (
    *(
        Case(f"{name.replace(' ', '_')}.mp4", "display matrix", H264._replace(orientation=name))
        for name in ORIENTATIONS
        if name != "upright"
    ),
    Case("turned_90_hevc.mov", "display matrix", X265._replace(orientation="turned 90")),
    Case("mirrored_prores.mov", "display matrix", PRORES._replace(orientation="mirrored")),
    Case("flipped_mpeg4.mp4", "display matrix", MPEG4._replace(orientation="flipped")),
    Case(
        "turned_270.mkv",
        "the display matrix as angles in MKV",
        H264._replace(orientation="turned 270"),
        partial(write_copied, keep=".mp4"),
    ),
    Case(
        "turned_90_wide.mp4",
        "turned, with pixels of 4:3 before turning",
        H264._replace(orientation="turned 90", aspect=Fraction(4, 3)),
    ),
    Case("wide.mp4", "pixels of 4:3", H264._replace(aspect=Fraction(4, 3))),
    Case("wide.mkv", "pixels of 2:1", H264._replace(aspect=Fraction(2))),
    Case("narrow.mp4", "pixels of 2:3", X265._replace(aspect=Fraction(2, 3))),
    Case("narrow_mpeg4.mp4", "pixels of 8:9", MPEG4._replace(aspect=Fraction(8, 9))),
    Case(
        "narrow_mpeg2.ts", "a picture of 4:3", MPEG2._replace(size=(144, 96), aspect=Fraction(8, 9))
    ),
    Case("odd_even.mp4", "98x66: not whole blocks", H264._replace(size=(98, 66))),
    Case("odd_444.mp4", "97x65, 4:4:4", H264._replace(size=(97, 65), pix_fmt="yuv444p")),
    Case("odd_vp9.webm", "97x65", VP9._replace(size=(97, 65))),
    Case("odd_vp8.webm", "101x67", VP8._replace(size=(101, 67))),
    Case("odd_mpeg4.avi", "99x61", MPEG4._replace(size=(99, 61), b_frames=0)),
    Case("odd_hevc.mkv", "100x58", X265._replace(size=(100, 58))),
    Case("10_bit_h264.mp4", "10 bit", H264._replace(pix_fmt="yuv420p10le")),
    Case(
        "10_bit_hevc.mp4", "10 bit, open groups", X265._replace(pix_fmt="yuv420p10le", b_frames=3)
    ),
    Case("12_bit_hevc.mkv", "12 bit", X265._replace(pix_fmt="yuv420p12le")),
    Case("10_bit_vp9.webm", "10 bit", VP9._replace(pix_fmt="yuv420p10le")),
    Case("10_bit_av1.mp4", "10 bit", SVT._replace(pix_fmt="yuv420p10le")),
    Case("422_h264.mkv", "4:2:2", H264._replace(pix_fmt="yuv422p")),
    Case("422_10_bit_hevc.mov", "10 bit 4:2:2", X265._replace(pix_fmt="yuv422p10le")),
    Case("444_h264.mkv", "4:4:4", OPEN._replace(pix_fmt="yuv444p")),
    Case("444_hevc.mp4", "4:4:4", X265._replace(pix_fmt="yuv444p")),
    Case("444_vp9.webm", "4:4:4", VP9._replace(pix_fmt="yuv444p")),
    Case("full_range_h264.mp4", "full range", H264._replace(full_range=True)),
    Case(
        "full_range_hevc_709.mkv",
        "full range, BT.709",
        X265._replace(full_range=True, colors="bt709"),
    ),
    Case("bt601_h264.mp4", "tagged BT.601", H264._replace(colors="bt601")),
    Case("bt709_h264.mp4", "tagged BT.709", H264._replace(colors="bt709")),
    Case("bt709_vp9.webm", "tagged BT.709", VP9._replace(colors="bt709")),
    Case(
        "bt2020_10_bit_hevc.mp4",
        "tagged BT.2020, 10 bit",
        X265._replace(colors="bt2020", pix_fmt="yuv420p10le"),
    ),
    Case("bt2020_h264.ts", "tagged BT.2020", H264._replace(colors="bt2020")),
)

CASES = CODECS + GROUPS + CUTS + STAMPS + JOINED + PICTURES
QUICK_NAMES = (
    "h264_open.mp4",
    "hevc_open.ts",
    "vp8_hidden.webm",
    "vp9_shown_later.mp4",
    "av1_svt.mp4",
    "mpeg4_b.avi",
    "cut_h264.mp4",
    "cut_hevc_open.mkv",
    "irregular_h264.mkv",
    "size_change_h264.mkv",
    "mirrored.mp4",
    "wide.mp4",
    "h264_fragments.mp4",
    "bytes_joined_h264.ts",
)
QUICK = tuple(case for case in CASES if case.name in QUICK_NAMES)
