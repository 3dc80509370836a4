"""The GOPs of a video stream and the frames that a player shows of them, without decoding.

A GOP (group of pictures) is a keyframe and the packets that follow it in the file, up to the next
keyframe. Frames are indexed in display order. GOPs follow each other in that order as they do in
the file; within a GOP the presentation time stamps (PTS) give the order. Packets that no player
shows have no frame index: those hidden by an edit list (a cut without re-encoding), and packets of
VP8 and VP9 that only later ones refer to. DTS are decoding time stamps.
"""

from collections.abc import Iterator
from itertools import chain, dropwhile, islice
from operator import attrgetter

import av
import numpy as np

from data.bitstream import HIDING_CODECS, is_hidden, nal_types
from data.pyav_compat import packet_table

# NAL unit types of IDR pictures: decoding can start there, and nothing after refers to before.
IDR_TYPES = {"h264": {5}, "hevc": {19, 20}}
INTRA_CODECS = ("mjpeg", "prores", "dnxhd", "ffv1", "rawvideo")  # every frame is a keyframe
# Decoders that return nothing until a real keyframe comes.
KEYFRAME_FIRST_DECODERS = ("av1", "libdav1d", "libaom-av1", "mpeg2video", "svq1", "vp8", "vp9")
# Seconds. A larger step in MPEG-TS and MPEG-PS starts another recording (as in the ffmpeg tool).
MAX_STEP = 10
JUMPING_FORMATS = ("mpegts", "mpeg")
# States of the demuxer in place of the index of the next packet.
NOTHING_READ = -1
SEEK_FIRST = -2
TABLE_ENTRY = np.dtype(
    [("pos", "i8"), ("size", "i8"), ("dts", "i8"), ("is_key", "?"), ("is_hidden", "?")]
)
TABLE_FIELDS = attrgetter("pos", "size", "timestamp", "is_keyframe", "is_discard")  # in PyAV
NO_TABLE = np.zeros(0, dtype=TABLE_ENTRY)


class NoPackets(Exception):
    """The stream ends, or is corrupt, before its first packet."""


class GopReader:
    """Reads the packets of GOPs on demand and gives the frame indices of their time stamps.

    If the container has a table of its packets (MP4, MOV), each GOP is read on its own. Otherwise
    all packets are read at once.

    unseen: number of leading frames that cannot be decoded, since their references were cut off.
    The decoding side sets it.
    """

    def __init__(self, container, stream) -> None:
        """Read the table, or all packets if there is none. Raises NoPackets."""
        self.container = container
        self.stream = stream
        self.codec = stream.codec_context.name
        self.all_packets: list | None = None  # once all were read
        self.cache: dict[int, list] = {}  # otherwise: GOP -> its packets, once read
        self.next_packet = NOTHING_READ  # index of the packet that `packets_iter` yields next
        self.packets_iter: Iterator = iter(())  # of the packets since the last seek
        self.first_dts: int | None = None
        self.unseen = 0
        self.table_misleads = False
        table = self._trusted_table()
        if len(table):
            self.packet_dts = table["dts"]
            self.first_dts = int(self.packet_dts[0])
            self._index_frames(table["is_key"], ~table["is_hidden"])
        else:
            self._read_all()

    def __len__(self) -> int:
        """Return the number of GOPs."""
        return len(self.keyframes)

    @property
    def num_frames(self) -> int:
        """The number of frames that a player shows."""
        return self.num_shown - self.unseen

    @property
    def in_mov(self) -> bool:
        """Whether the container is MP4, MOV or a relative."""
        return self.container.format.name.startswith("mov")

    def _trusted_table(self) -> np.ndarray:
        """Return the container's table of packets (n,) TABLE_ENTRY, empty if it is not reliable."""
        if not self.in_mov or self.codec in HIDING_CODECS:
            return NO_TABLE  # other containers list keyframes only; VP8 and VP9 hide packets
        table = np.fromiter(map(TABLE_FIELDS, packet_table(self.stream)), dtype=TABLE_ENTRY)
        if not len(table) or len(table) != self.stream.frames:
            return NO_TABLE  # the table of one fragment
        beyond_end = table["pos"] + table["size"] > self.container.size
        if beyond_end.any():
            table = table[: beyond_end.argmax()]  # the file is truncated
        self.table_misleads = self._is_misleading(table)
        return NO_TABLE if self.table_misleads else table

    def _is_misleading(self, table: np.ndarray) -> bool:
        """Return whether the packets cannot be found, or not decoded, by means of the table."""
        positions = np.sort(table["pos"])
        repeats = np.diff(positions) == 0  # an edit list shows parts twice
        if repeats.any():
            return True
        no_progress = np.diff(table["dts"]) <= 0
        cannot_seek = no_progress & table["is_key"][1:]  # a keyframe's DTS is not above the last
        if cannot_seek.any():
            return True
        only_keyframes = len(table) > 1 and table["is_key"].all()
        return bool(only_keyframes and self._has_false_keyframes())

    def _has_false_keyframes(self) -> bool:
        """Return whether packets that are all marked as keyframes may not be keyframes.

        MP4 without a list of keyframes marks all packets.
        """
        if self.codec in IDR_TYPES:
            second_packet = self.opening()[-1]
            return not self.is_entry_point(second_packet)
        return self.codec not in INTRA_CODECS + KEYFRAME_FIRST_DECODERS

    def _index_frames(self, is_key: np.ndarray, is_shown: np.ndarray) -> None:
        """Set the first and last packets of the GOPs and the number of frames shown before each."""
        keyframes = np.flatnonzero(is_key)
        if self.all_packets is not None:
            keyframes = self._trusted_keyframes(keyframes, self.all_packets)
        if not len(keyframes) or keyframes[0] > 0:  # the stream starts inside a GOP
            keyframes = np.insert(keyframes, 0, 0)
        self.keyframes = keyframes
        self.gop_ends = np.append(keyframes[1:], len(is_key))
        shown_before_packet = np.concatenate([[0], np.cumsum(is_shown)])
        self.shown_before_gop = shown_before_packet[keyframes]
        self.num_shown = int(shown_before_packet[-1])

    def _trusted_keyframes(self, keyframes: np.ndarray, packets: list) -> np.ndarray:
        """Return those of the marked keyframes at which a GOP starts, as packet indices.

        packets: all packets of the stream.
        """
        all_marked = len(keyframes) == len(packets) > 1
        if self.in_mov and all_marked and self._has_false_keyframes():
            self.table_misleads = True
            return keyframes[:1]
        if len(keyframes) > 1:
            num_marked = len(keyframes)
            keyframes = self._drop_overlaps(keyframes, packets)
            if len(keyframes) < num_marked:
                self.table_misleads = True
        return keyframes

    def _drop_overlaps(self, keyframes: np.ndarray, packets: list) -> np.ndarray:
        """Return the keyframes (packet indices) without those of overlapping GOPs.

        A GOP overlaps if it shows a frame before a frame of an earlier GOP. It is then merged with
        the GOP before it, unless its DTS jump back: it is another recording, appended.
        """
        kept = [keyframes[0]]
        highest_pts = None
        ends = np.append(keyframes[1:], len(packets))
        for start, end in zip(keyframes, ends, strict=True):
            gop = packets[start:end]
            shown_pts = [packet.pts for packet in gop if self.is_shown(packet)]
            if None in shown_pts:
                return keyframes
            if not shown_pts:
                continue
            overlaps = highest_pts is not None and min(shown_pts) < highest_pts
            if overlaps and not _is_appended(packets, start):
                highest_pts = max(highest_pts, *shown_pts)
                continue
            highest_pts = max(shown_pts)
            if start > kept[-1]:
                kept.append(start)
        return np.array(kept)

    def _demux(self) -> Iterator:
        """Return an iterator over the packets from the demuxer's position on."""
        return (packet for packet in self.container.demux(self.stream) if packet.size)

    def _read_all(self) -> None:
        """Read every packet, without decoding; what follows a read error is lost.

        Raises NoPackets.
        """
        was_read = self.next_packet != NOTHING_READ
        self.all_packets = []
        self.cache = {}
        try:
            if was_read:  # rewind to any frame, since the first need not be a keyframe
                self.container.seek(self.first_dts or 0, stream=self.stream, any_frame=True)
            self.all_packets.extend(self._demux())
        except (av.FFmpegError, ValueError) as error:
            if not self.all_packets:
                raise NoPackets(str(error)) from None
        if not self.all_packets:
            raise NoPackets("no packets")
        is_key = np.array([packet.is_keyframe for packet in self.all_packets])
        is_shown = np.array([self.is_shown(packet) for packet in self.all_packets])
        self._index_frames(is_key, is_shown)

    def is_shown(self, packet) -> bool:
        """Return whether a player shows the frame of a packet."""
        return not packet.is_discard and not is_hidden(packet, self.codec)

    def packets(self, gop: int) -> list:
        """Return the packets of a GOP in file order; fewer if the file ends early."""
        start = int(self.keyframes[gop])
        end = int(self.gop_ends[gop])
        if self.all_packets is not None:
            return self.all_packets[start:end]
        if gop not in self.cache:
            try:
                self.cache[gop] = self._read_range(start, end)
            except (av.FFmpegError, ValueError):
                self.cache[gop] = []
        packets = self.cache[gop]
        if packets and packets[0].dts != self.packet_dts[start]:  # the table contradicts the file
            self._read_all()
            return self.packets(min(gop, len(self) - 1))
        return packets

    def _read_range(self, start: int, end: int) -> list:
        """Read the packets with indices `start` to `end` - 1 of the table."""
        if self.next_packet != start:
            start_dts = int(self.packet_dts[start])
            following = self._seek(start_dts)
            # The lambda must not refer to `self`: a cycle would keep the file open until the
            # garbage collector runs.
            self.packets_iter = dropwhile(
                lambda packet: packet.dts is not None and packet.dts < start_dts, following
            )
        packets = list(islice(self.packets_iter, end - start))
        self.next_packet = end
        return packets

    def _seek(self, dts: int) -> Iterator:
        """Return the packets from one with this DTS on; earlier packets may come first."""
        self.container.seek(dts, stream=self.stream, any_frame=False)
        packets = self._demux()
        first = next(packets, None)
        if first is not None and first.dts is not None and first.dts <= dts:
            return chain([first], packets)
        # There is no keyframe before it.
        self.container.seek(dts, stream=self.stream, any_frame=True)
        return self._demux()

    def gop_of(self, index: int) -> int:
        """Return the GOP that shows the frame with an index."""
        num_starts = np.searchsorted(self.shown_before_gop, index + self.unseen, side="right")
        return max(int(num_starts) - 1, 0)

    def index_by_pts(self, gop: int) -> dict[int, int] | None:
        """Return {PTS: frame index} of a GOP, or None if a PTS is missing or not unique.

        Indices of unseen frames are negative.
        """
        packets = [packet for packet in self.packets(gop) if self.is_shown(packet)]
        pts = [packet.pts for packet in packets]
        if None in pts or len(set(pts)) < len(pts):
            return None
        first_index = int(self.shown_before_gop[gop]) - self.unseen
        return {value: first_index + rank for rank, value in enumerate(sorted(pts))}

    def has_no_usable_pts(self) -> bool:
        """Return whether only decoding from the start can give the frames their indices."""
        if self._stores_no_pts():
            return True
        if self.all_packets is None:
            return False
        return any(self.index_by_pts(gop) is None for gop in range(len(self)))

    def _stores_no_pts(self) -> bool:
        """Return whether frames are reordered in a container (AVI) without display times."""
        in_avi = self.container.format.name == "avi"
        return bool(in_avi and self.stream.codec_context.has_b_frames)

    def is_entry_point(self, packet) -> bool:
        """Return whether no frame shown from this packet on refers to a packet before it."""
        if self.codec in IDR_TYPES:
            return bool(nal_types(packet, self.codec) & IDR_TYPES[self.codec])
        return packet.is_keyframe

    def starts_decodable(self) -> bool:
        """Return whether no frame of the first GOP can refer to a packet that was cut off."""
        opening = self.opening()
        first = opening[0]
        if first.is_discard:
            return True  # the edit list hides the frames that cannot be decoded
        if not self.is_entry_point(first):
            return False
        if len(opening) == 1 or first.pts is None or opening[1].pts is None:
            return True
        return opening[1].pts > first.pts

    def opening(self) -> list:
        """Return the first two packets of the file, or its only one. Raises NoPackets."""
        if self.all_packets is not None:
            return self.all_packets[:2]
        if self.next_packet != NOTHING_READ:
            return self.packets(0)[:2]
        try:
            packets = list(islice(self._demux(), 2))
        except (av.FFmpegError, ValueError) as error:
            raise NoPackets(str(error)) from None
        if not packets:
            raise NoPackets("no packets")
        self.next_packet = SEEK_FIRST
        self.first_dts = packets[0].dts
        return packets

    def are_closed(self, max_checked: int = 32) -> bool:
        """Return whether GOPs refer to nothing outside of them and show their keyframe first.

        max_checked: number of GOPs to check, evenly spread.
        """
        num_checked = min(max_checked, len(self))
        checked = np.unique(np.linspace(0, len(self) - 1, num_checked).astype(int))
        return all(self._is_closed(gop) for gop in checked.tolist())

    def _is_closed(self, gop: int) -> bool:
        """Return whether a GOP refers to nothing outside of it and shows its keyframe first."""
        packets = self.packets(gop)
        if not packets:
            return True
        pts = [packet.pts for packet in packets if packet.pts is not None]
        if not pts or min(pts) != pts[0]:
            return False
        return self.is_entry_point(packets[0])

    def times(self) -> np.ndarray | None:
        """Return the display times (num_frames,) in seconds, the first one 0; None if not stored.

        Reads all packets.
        """
        if self.all_packets is None:
            self._read_all()
        if self._stores_no_pts():
            return None
        pts: list[int] = []
        for gop in range(len(self)):
            index_by_pts = self.index_by_pts(gop)
            if index_by_pts is None:
                return None
            pts.extend(sorted(index_by_pts))
        seconds_per_tick = float(self.stream.time_base)
        times = np.array(pts[self.unseen :], dtype=np.float64) * seconds_per_tick
        max_step = np.inf
        if self.container.format.name in JUMPING_FORMATS:
            max_step = MAX_STEP
        steps = np.diff(times)
        jumps = (steps < 0) | (steps > max_step)
        if not jumps.any():
            return times - times[0]
        steps[jumps] = np.median(steps)
        return np.concatenate([[0.0], np.cumsum(steps)])


def _is_appended(packets: list, start: int) -> bool:
    """Return whether the DTS jump back at packet `start`, where another recording starts."""
    if start == 0:
        return False
    dts_before = packets[start - 1].dts
    dts = packets[start].dts
    if dts_before is None or dts is None:
        return False
    return dts < dts_before
