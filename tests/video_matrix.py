"""The matrix of test videos: codecs, containers, structures, time stamps and frame geometry.

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

# Encodings
H264 = Encoding()
X265 = Encoding("libx265")
VP8 = Encoding("libvpx", b_frames=0)
VP9 = Encoding("libvpx-vp9", b_frames=0)
SVT = Encoding("libsvtav1", size=(160, 96), b_frames=0)
AOM = Encoding("libaom-av1", b_frames=0)
MPEG4 = Encoding("mpeg4")
MPEG2 = Encoding("mpeg2video", size=(128, 96))
MJPEG = Encoding("mjpeg", gop=1, b_frames=0, pix_fmt="yuvj420p", full_range=True)
PRORES = Encoding("prores_ks", gop=1, b_frames=0, pix_fmt="yuv422p10le")
H263 = Encoding("h263", size=(128, 96), b_frames=0, aspect=Fraction(12, 11))  # the format's own
OPEN = H264._replace(params="open-gop=1", b_frames=3)
CLOSED_HEVC = X265._replace(params="open-gop=0")
LONG = H264._replace(frames=72)
OPEN_LONG = OPEN._replace(frames=72)
LAYERS = (
    (
        "ts-parameters",
        "ts_number_layers=2:ts_target_bitrate=400,800:ts_rate_decimator=2,1:ts_periodicity=2:"
        "ts_layer_id=0,1:ts_layering_mode=2",
    ),
    ("deadline", "realtime"),
    ("lag-in-frames", "0"),
    ("b", "800k"),
)
# Display times in milliseconds
IRREGULAR = tuple(np.cumsum([0] + [7 + i * 37 % 50 for i in range(47)]).tolist())
PAUSE = tuple(i * 40 + 120_000 * (i >= 20) for i in range(48))
# Options of containers
FRAGMENTS = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
# Otherwise the muxer joins hidden frames with the next ones.
APART = (("fflags", "-autobsf"),)
FASTSTART = (("movflags", "faststart"),)
NEGATIVE = (("movflags", "negative_cts_offsets"),)
# Numbers shown
TWICE = (*range(24), *range(1000, 1024))  # two encodings of 24 frames


# Helpers: each completes a case and returns it.


def _cut_case(
    case: Case, first: int, keyframe: int, shown_from: int | None = None, suffix: str = ".mp4"
) -> Case:
    """Write with `write_cut`; frames from `shown_from` on are shown (None: from the cut)."""
    if shown_from is None:
        shown_from = first
    shown = tuple(range(shown_from, case.encoding.frames))
    make = partial(write_cut, first=first, keyframe=keyframe, suffix=suffix)
    return case._replace(make=make, shown=shown)


def _edited_case(case: Case, *edits: tuple[int, int]) -> Case:
    """Write with `write_edited`: each edit (first, end) shows frames first to end - 1."""
    shown = []
    for first, end in edits:
        shown.extend(range(first, end))
    single = len(edits) == 1  # FFmpeg shows the second edit a frame late
    make = partial(write_edited, edits=edits)
    return case._replace(make=make, shown=tuple(shown), has_times=single)


def _joined_case(case: Case, size: tuple[int, int], suffix: str) -> Case:
    """Write with `write_joined`: twice 24 frames, the second half of another size."""
    make = partial(write_joined, size=size, suffix=suffix)
    return case._replace(encoding=case.encoding._replace(frames=24), make=make, shown=TWICE)


def _hidden_case(case: Case, change: Callable, hidden: int) -> Case:
    """Hide frame `hidden` of each GOP; a keyframe (VP9) only after the first GOP."""
    gop = case.encoding.gop
    shown = [i for i in range(case.encoding.frames) if i % gop != hidden]
    if hidden == 0:
        shown.insert(0, 0)
    times = tuple(i / float(case.encoding.rate) for i in shown)
    make = partial(write_rewritten, change=change)
    return case._replace(make=make, shown=tuple(shown), times=times)


def _later_case(name: str) -> Case:
    """Show all keyframes of VP9 but the first 7 frames later."""
    description = "hidden keyframes, shown 7 frames later by packets of 1 byte"
    shown = list(range(12))
    for keyframe in (12, 24, 36):
        shown.extend(range(keyframe + 1, keyframe + 8))
        shown.append(keyframe)
        shown.extend(range(keyframe + 8, keyframe + 12))
    change = partial(hide_vp9, joined=True, later=7)
    make = partial(write_rewritten, change=change)
    return Case(name, description, VP9, make, shown=tuple(shown))


CODECS = (
    Case("h264.mp4", "closed GOPs of 12 frames, 2 B-frames"),
    Case("h264_faststart.mp4", "table of packets before the packets", muxer=FASTSTART),
    Case("h264.mov", "as in MP4", H264._replace(size=(128, 80))),
    Case("h264.mkv", "time stamps rounded to milliseconds"),
    Case("h264.ts", "no table of packets; starts after 0", H264._replace(size=(128, 80))),
    Case("h264.3gp", "as in MP4", H264._replace(b_frames=0)),
    Case("h264.flv", "decode time stamps and offsets"),
    Case("h264_b.avi", "AVI stores no display times: frames are counted", has_times=False),
    Case("h264_no_b.avi", "decoding order is display order", H264._replace(b_frames=0)),
    Case("raw.h264", "no container, no time stamps: frames are counted", has_times=False),
    Case("h264_fragments.mp4", "one fragment per GOP, each with its own table", muxer=FRAGMENTS),
    Case("hevc.mp4", "closed GOPs", CLOSED_HEVC),
    Case(
        "hevc_fragments.mp4", "open GOPs in fragments", X265._replace(b_frames=3), muxer=FRAGMENTS
    ),
    Case("hevc.mkv", "closed GOPs", CLOSED_HEVC._replace(b_frames=3)),
    Case("hevc.mov", "closed GOPs", CLOSED_HEVC._replace(b_frames=1)),
    Case("hevc.ts", "no table of packets", CLOSED_HEVC),
    Case("vp8.webm", "no hidden frames", VP8),
    _hidden_case(
        Case("vp8_hidden.webm", "hidden packets, which later frames refer to", VP8), hide_vp8, 3
    ),
    _hidden_case(
        Case("vp8_hidden.mkv", "hidden packets, which later frames refer to", VP8._replace(gop=20)),
        hide_vp8,
        3,
    ),
    Case("vp9.webm", "no hidden frames", VP9),
    _hidden_case(
        Case("vp9_hidden.webm", "hidden keyframes in packets of their own", VP9, muxer=APART),
        hide_vp9,
        0,
    ),
    _hidden_case(
        Case(
            "vp9_hidden.mkv",
            "hidden keyframes in packets of their own",
            VP9._replace(gop=16),
            muxer=APART,
        ),
        hide_vp9,
        0,
    ),
    _hidden_case(
        Case("vp9_superframes.webm", "hidden keyframes in one packet with the next frame", VP9),
        partial(hide_vp9, joined=True),
        0,
    ),
    _hidden_case(
        Case("vp9_superframes.mp4", "hidden keyframes in one packet with the next frame", VP9),
        partial(hide_vp9, joined=True),
        0,
    ),
    _later_case("vp9_shown_later.webm"),
    _later_case("vp9_shown_later.mp4"),
    Case("vp9.mkv", "one keyframe", VP9._replace(gop=1000)),
    Case(
        "av1_svt.mp4",
        "B-pyramid; some packets only show a frame decoded earlier",
        SVT._replace(frames=80, gop=32),
    ),
    Case("av1_svt.mkv", "B-pyramid", SVT._replace(frames=60, gop=16)),
    Case("av1_svt.webm", "one keyframe", SVT._replace(frames=48, gop=1000)),
    Case(
        "av1_svt_fragments.mp4",
        "B-pyramid in fragments",
        SVT._replace(frames=64, gop=16),
        muxer=FRAGMENTS,
    ),
    Case("av1_svt_all_keys.mp4", "keyframes only", SVT._replace(frames=40, gop=1)),
    Case("av1_aom.mp4", "B-pyramid with hidden references", AOM._replace(frames=64, gop=32)),
    Case("av1_aom.webm", "B-pyramid with hidden references", AOM._replace(gop=1000)),
    Case("mpeg4.mp4", "2 B-frames", MPEG4),
    Case(
        "mpeg4_b.avi",
        "AVI stores no display times: frames are counted",
        MPEG4,
        has_times=False,
    ),
    Case("mpeg4_no_b.avi", "decoding order is display order", MPEG4._replace(b_frames=0)),
    Case(
        "mpeg4_packed.avi",
        "DivX: each B-frame in the packet before it, then an empty packet",
        MPEG4._replace(b_frames=1),
        partial(write_rewritten, change=pack_mpeg4),
        has_times=False,
    ),
    Case("mpeg4.mkv", "1 B-frame", MPEG4._replace(b_frames=1)),
    Case("mpeg4.3gp", "as in MP4", MPEG4._replace(b_frames=0, size=(128, 96))),
    Case("mpeg4.ts", "2 B-frames", MPEG4),
    Case("mpeg2.ts", "open GOPs", MPEG2),
    Case("mpeg2.mpg", "program stream: not every packet has a time stamp", MPEG2),
    Case("mpeg2.mkv", "open GOPs", MPEG2._replace(b_frames=1)),
    Case("flv1.flv", "no B-frames", Encoding("flv", b_frames=0)),
    Case("wmv2.wmv", "no B-frames", Encoding("wmv2", b_frames=0)),
    Case("h263.3gp", "no B-frames", H263),
    Case("h263.mov", "no B-frames", H263),
    Case("mjpeg.avi", "keyframes only, full range", MJPEG),
    Case("mjpeg.mov", "keyframes only, full range", MJPEG._replace(size=(97, 65))),
    Case("mjpeg.mkv", "keyframes only, full range", MJPEG),
    Case("prores.mov", "keyframes only, 10 bit 4:2:2", PRORES),
    Case("prores_444.mov", "keyframes only, 10 bit 4:4:4", PRORES._replace(pix_fmt="yuv444p10le")),
    Case("prores.mkv", "keyframes only, 10 bit 4:2:2", PRORES._replace(size=(98, 66))),
)

GROUPS = (
    Case("h264_no_b.mp4", "no B-frames", H264._replace(b_frames=0)),
    Case("h264_1_b.mkv", "1 B-frame", H264._replace(b_frames=1)),
    Case(
        "h264_3_b.mp4",
        "3 B-frames without pyramid",
        H264._replace(b_frames=3, params="b-pyramid=none"),
    ),
    Case(
        "h264_pyramid.mp4",
        "3 B-frames, one of them a reference",
        H264._replace(b_frames=3, params="b-pyramid=normal"),
    ),
    Case(
        "h264_pyramid.ts",
        "3 B-frames, one of them a reference",
        H264._replace(b_frames=3, params="b-pyramid=normal"),
    ),
    Case("h264_open.mp4", "frames shown before a keyframe depend on the previous GOP", OPEN),
    Case("h264_open.mkv", "frames shown before a keyframe depend on the previous GOP", OPEN),
    Case("h264_open.ts", "frames shown before a keyframe depend on the previous GOP", OPEN),
    Case("h264_open_fragments.mp4", "open GOPs in fragments", OPEN, muxer=FRAGMENTS),
    Case(
        "hevc_open.mp4",
        "x265's default; leading frames depend on the previous GOP",
        X265._replace(b_frames=3),
    ),
    Case("hevc_open.mkv", "leading frames depend on the previous GOP", X265._replace(b_frames=3)),
    Case("hevc_open.ts", "leading frames depend on the previous GOP", X265._replace(b_frames=3)),
    Case(
        "hevc_open_pyramid.mp4",
        "4 B-frames with pyramid",
        X265._replace(b_frames=4, params="b-pyramid=1"),
    ),
    Case("h264_one_key.mp4", "one keyframe", H264._replace(frames=96, gop=1000)),
    Case("h264_one_key.mkv", "one keyframe", H264._replace(gop=1000)),
    Case("hevc_one_key.mp4", "one keyframe", X265._replace(gop=1000)),
    Case("h264_all_keys.mp4", "keyframes only", H264._replace(gop=1, b_frames=0)),
    Case("hevc_all_keys.mkv", "keyframes only", X265._replace(gop=1, b_frames=0)),
    Case(
        "h264_refresh.mp4",
        "intra refresh: packets marked as keyframes are not decodable alone",
        H264._replace(b_frames=0, params="intra-refresh=1"),
    ),
    Case("h264_refresh.mkv", "intra refresh", H264._replace(b_frames=0, params="intra-refresh=1")),
    Case("h264_refresh.ts", "intra refresh", H264._replace(b_frames=0, params="intra-refresh=1")),
    Case(
        "false_keys_h264.mp4",
        "the table wrongly marks each packet as a keyframe",
        make=write_without_key_table,
    ),
    Case(
        "false_keys_hevc.mp4",
        "the table wrongly marks each packet as a keyframe",
        CLOSED_HEVC,
        write_without_key_table,
    ),
    Case("vp8_layers.webm", "every other frame is not referred to", VP8._replace(options=LAYERS)),
    Case("vp9_layers.webm", "two temporal layers", VP9._replace(options=LAYERS)),
    Case("h264_interlaced.mp4", "interlaced blocks (MBAFF)", H264._replace(params="tff=1")),
    Case(
        "h264_many_refs.mp4",
        "16 reference frames, B-pyramid",
        H264._replace(gop=30, b_frames=8, params="ref=16:b-pyramid=normal"),
    ),
)

CUTS = (
    _cut_case(
        Case("cut_h264.mp4", "edit list inside a GOP: the lead-in is decoded, not shown", LONG),
        30,
        2,
    ),
    _cut_case(Case("cut_h264_late.mp4", "edit list at the end of a GOP", LONG), 35, 2),
    _cut_case(
        Case("cut_h264_long.mp4", "edit list; the lead-in is longer than a GOP", LONG), 40, 1
    ),
    _cut_case(Case("cut_h264.mov", "edit list inside a GOP", LONG._replace(b_frames=0)), 29, 2),
    _cut_case(
        Case(
            "cut_h264_at_open_key.mp4",
            "edit list at an open GOP: leading frames are not shown",
            OPEN_LONG,
        ),
        24,
        2,
    ),
    _cut_case(Case("cut_h264_open.mp4", "edit list inside an open GOP", OPEN_LONG), 30, 2),
    _cut_case(
        Case(
            "cut_h264_open.mkv",
            "no edit lists in MKV: shown from the keyframe, without leading frames",
            OPEN_LONG,
        ),
        30,
        2,
        shown_from=24,
        suffix=".mkv",
    ),
    _cut_case(
        Case("cut_h264_open.ts", "shown from the keyframe, without leading frames", OPEN_LONG),
        24,
        2,
        shown_from=24,
        suffix=".ts",
    ),
    _cut_case(
        Case("cut_h264.mkv", "no edit lists in MKV: the lead-in is shown", LONG),
        30,
        2,
        shown_from=24,
        suffix=".mkv",
    ),
    _cut_case(
        Case(
            "cut_h264_fragments.mp4",
            "no edit list before fragments: the lead-in is shown",
            LONG,
            muxer=FRAGMENTS,
        ),
        30,
        2,
        shown_from=24,
    ),
    _cut_case(
        Case("cut_hevc.mp4", "edit list inside a closed GOP", CLOSED_HEVC._replace(frames=72)),
        31,
        2,
    ),
    _cut_case(
        Case(
            "cut_hevc_open.mp4",
            "edit list inside an open GOP",
            X265._replace(frames=72, b_frames=3),
        ),
        30,
        2,
    ),
    _cut_case(
        Case(
            "cut_hevc_at_open_key.mp4",
            "edit list at an open GOP",
            X265._replace(frames=72, b_frames=3),
        ),
        24,
        2,
    ),
    _cut_case(
        Case(
            "cut_hevc_open.mkv",
            "shown from the keyframe, without leading frames",
            X265._replace(frames=72, b_frames=3),
        ),
        30,
        2,
        shown_from=24,
        suffix=".mkv",
    ),
    _cut_case(
        Case("cut_av1.mp4", "edit list inside a GOP", SVT._replace(frames=64, gop=16)), 37, 2
    ),
    _cut_case(Case("cut_vp9.mp4", "edit list inside a GOP", VP9._replace(frames=60)), 30, 2),
    _cut_case(Case("cut_mpeg4.mp4", "edit list inside a GOP", MPEG4._replace(frames=60)), 31, 2),
    _edited_case(Case("trimmed_h264.mp4", "an edit list hides both ends", LONG), (17, 53)),
    _edited_case(Case("trimmed_end_h264.mp4", "an edit list hides the end", LONG), (0, 40)),
    _edited_case(
        Case(
            "trimmed_hevc_open.mov",
            "an edit list hides both ends, open GOPs",
            X265._replace(frames=72, b_frames=3),
        ),
        (22, 58),
    ),
    _edited_case(
        Case("trimmed_mpeg4.mp4", "an edit list hides both ends", MPEG4._replace(frames=60)),
        (13, 41),
    ),
    _edited_case(
        Case("two_edits_h264.mp4", "two edits leave out the middle", LONG), (5, 21), (45, 66)
    ),
    _edited_case(
        Case(
            "two_edits_hevc.mp4", "two edits leave out the middle", CLOSED_HEVC._replace(frames=72)
        ),
        (5, 21),
        (45, 66),
    ),
    _edited_case(
        Case("swapped_edits_h264.mp4", "two edits in another order", LONG), (45, 66), (5, 21)
    ),
    _cut_case(
        Case("cut_prores.mov", "keyframes only: the cut is exact, no lead-in", PRORES),
        20,
        20,
        suffix=".mov",
    ),
    Case(
        "begun_late_h264.ts",
        "a recording that starts inside a GOP: shown from the first keyframe",
        LONG,
        partial(write_without_start, packets=6),
        shown=tuple(range(12, 72)),
    ),
    Case(
        "begun_late_h264.mp4",
        "starts inside a GOP: shown from the first keyframe",
        LONG,
        partial(write_copied, suffix=".mp4", skip=6),
        shown=tuple(range(12, 72)),
    ),
    Case(
        "begun_late_hevc.mkv",
        "starts inside a GOP: shown from the first keyframe",
        CLOSED_HEVC._replace(frames=72),
        partial(write_copied, suffix=".mp4", skip=6),
        shown=tuple(range(12, 72)),
    ),
    Case(
        "begun_late_hevc.ts",
        "a recording that starts inside a GOP",
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
        "negative composition offsets, no edit list",
        H264._replace(b_frames=3),
        muxer=NEGATIVE,
    ),
    Case("negative_h264.mov", "negative composition offsets, open GOPs", OPEN, muxer=NEGATIVE),
    Case("negative_hevc.mp4", "negative composition offsets", X265, muxer=NEGATIVE),
    Case("irregular_h264.mp4", "7 to 56 ms between frames", H264._replace(times_ms=IRREGULAR)),
    Case("irregular_h264.mkv", "7 to 56 ms between frames", OPEN._replace(times_ms=IRREGULAR)),
    Case("irregular_vp9.webm", "7 to 56 ms between frames", VP9._replace(times_ms=IRREGULAR)),
    Case("irregular_av1.mp4", "7 to 56 ms between frames", SVT._replace(times_ms=IRREGULAR)),
    Case(
        "irregular_mjpeg.avi",
        "empty packets in the gaps",
        MJPEG._replace(times_ms=IRREGULAR),
    ),
    Case("pause_h264.mp4", "a pause of two minutes", H264._replace(times_ms=PAUSE)),
    Case("pause_h264.mkv", "a pause of two minutes", H264._replace(times_ms=PAUSE)),
    Case("pause_hevc.mp4", "a pause of two minutes", X265._replace(times_ms=PAUSE)),
    Case("480_per_second.mp4", "480 frames per second", H264._replace(rate=Fraction(480))),
    Case("480_per_second_hevc.mov", "480 frames per second", X265._replace(rate=Fraction(480))),
    Case(
        "480_per_second.mkv",
        "time stamps of 1 ms: rounded to unequal steps",
        H264._replace(rate=Fraction(480)),
    ),
    Case("half_per_second.mp4", "a frame every two seconds", H264._replace(rate=Fraction(1, 2))),
    Case("half_per_second.mkv", "a frame every two seconds", H264._replace(rate=Fraction(1, 2))),
    Case("ntsc.mp4", "30000/1001 frames per second", H264._replace(rate=Fraction(30000, 1001))),
    Case(
        "ntsc_mpeg4.avi",
        "30000/1001 frames per second",
        MPEG4._replace(rate=Fraction(30000, 1001), b_frames=0),
    ),
    Case("one_frame.mp4", "1 frame", H264._replace(frames=1)),
    Case("one_frame.webm", "1 frame", VP9._replace(frames=1)),
    Case("one_frame.mkv", "1 frame", X265._replace(frames=1)),
    Case("one_frame_mjpeg.avi", "1 frame", MJPEG._replace(frames=1)),
    Case("two_frames.mp4", "2 frames", H264._replace(frames=2)),
    Case("two_frames_av1.mp4", "2 frames", SVT._replace(frames=2)),
    Case("two_frames_hevc.mov", "2 frames", X265._replace(frames=2)),
    Case("audio_h264.mp4", "the first stream is audio", H264._replace(audio=True)),
    Case("audio_h264_open.mkv", "the first stream is audio", OPEN._replace(audio=True)),
    Case("audio_h264.ts", "the first stream is audio", H264._replace(audio=True)),
)

JOINED = (
    _joined_case(
        Case("joined_h264.mp4", "two encodings with the same settings", H264), (96, 64), ".mp4"
    ),
    _joined_case(
        Case("joined_h264_open.mkv", "two encodings with open GOPs", OPEN), (96, 64), ".mp4"
    ),
    _joined_case(
        Case("joined_hevc.mp4", "two encodings with the same settings", X265), (96, 64), ".mp4"
    ),
    _joined_case(
        Case("joined_vp8.webm", "two encodings with the same settings", VP8), (96, 64), ".webm"
    ),
    _joined_case(
        Case("size_change_h264.mkv", "96x64, then 128x80: shown at the first size", H264),
        (128, 80),
        ".ts",
    ),
    _joined_case(
        Case("size_change_h264.ts", "96x64, then 128x80: shown at the first size", H264),
        (128, 80),
        ".ts",
    ),
    _joined_case(
        Case("size_change_hevc.ts", "96x64, then 160x96: shown at the first size", X265),
        (160, 96),
        ".ts",
    ),
    _joined_case(
        Case("size_change_vp8.webm", "96x64, then 128x80: shown at the first size", VP8),
        (128, 80),
        ".webm",
    ),
    _joined_case(
        Case("size_change_vp9.webm", "96x64, then 64x48: shown at the first size", VP9),
        (64, 48),
        ".webm",
    ),
    _joined_case(
        Case("size_change_vp9.mp4", "96x64, then 128x80: shown at the first size", VP9),
        (128, 80),
        ".mp4",
    ),
    Case(
        "bytes_joined_h264.ts",
        "two files in one: time stamps restart in the middle",
        H264._replace(frames=24),
        write_bytes_joined,
        shown=TWICE,
        has_times=False,
    ),
    Case(
        "bytes_joined_mpeg2.mpg",
        "two files in one: time stamps restart in the middle",
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
        "display matrix, stored as angles in MKV",
        H264._replace(orientation="turned 270"),
        partial(write_copied, suffix=".mp4"),
    ),
    Case(
        "turned_90_wide.mp4",
        "rotated, with pixels of 4:3 before rotation",
        H264._replace(orientation="turned 90", aspect=Fraction(4, 3)),
    ),
    Case("wide.mp4", "pixels of 4:3", H264._replace(aspect=Fraction(4, 3))),
    Case("wide.mkv", "pixels of 2:1", H264._replace(aspect=Fraction(2))),
    Case("narrow.mp4", "pixels of 2:3", X265._replace(aspect=Fraction(2, 3))),
    Case("narrow_mpeg4.mp4", "pixels of 8:9", MPEG4._replace(aspect=Fraction(8, 9))),
    Case(
        "narrow_mpeg2.ts",
        "display aspect ratio of 4:3",
        MPEG2._replace(size=(144, 96), aspect=Fraction(8, 9)),
    ),
    Case("odd_even.mp4", "98x66: no multiple of the block size", H264._replace(size=(98, 66))),
    Case("odd_444.mp4", "97x65, 4:4:4", H264._replace(size=(97, 65), pix_fmt="yuv444p")),
    Case("odd_vp9.webm", "97x65", VP9._replace(size=(97, 65))),
    Case("odd_vp8.webm", "101x67", VP8._replace(size=(101, 67))),
    Case("odd_mpeg4.avi", "99x61", MPEG4._replace(size=(99, 61), b_frames=0)),
    Case("odd_hevc.mkv", "100x58", X265._replace(size=(100, 58))),
    Case("10_bit_h264.mp4", "10 bit", H264._replace(pix_fmt="yuv420p10le")),
    Case("10_bit_hevc.mp4", "10 bit, open GOPs", X265._replace(pix_fmt="yuv420p10le", b_frames=3)),
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
