"""The packets of a video stream and the frames that a player shows of them, without decoding.

A group is what lies between two key frames in the file: a key frame and the packets that follow it. Frames are numbered in
the order of display; groups follow each other in that order as they do in the file, and within a group time stamps decide.
What no player shows has no number: packets that an edit list hides (a cut without re-encoding), and packets of VP8 and VP9
that only later ones refer to.
"""

from collections.abc import Iterator
from itertools import chain, dropwhile, islice

import av
import numpy as np

from data.pyav import packet_table

STARTS_ANEW = {
    "h264": {5},
    "hevc": {19, 20},
}  # NAL unit types of key frames before which nothing is shown: IDR


ALL_KEYS = ("mjpeg", "prores", "dnxhd", "ffv1", "rawvideo")  # codecs whose every frame stands alone
GIVES_NOTHING_AMID = (
    "av1",
    "libdav1d",
    "libaom-av1",
    "mpeg2video",
    "svq1",
    "vp8",
    "vp9",
)  # until a key frame comes
JUMP_SECONDS = 10  # a larger step of the time stamps of MPEG-TS and PS begins another recording (as in the ffmpeg tool)
NOTHING_READ, SEEK_FIRST = -1, -2  # positions of the demuxer
ENTRY = np.dtype(
    [("pos", "i8"), ("size", "i8"), ("stamp", "i8"), ("is_key", "?"), ("is_shown", "?")]
)
NO_TABLE = np.zeros(0, dtype=ENTRY)


class NoPackets(Exception):
    """The stream ends, or is damaged, before its first packet."""


class Packets:
    """The groups of a stream: their packets, read when they are needed, and the numbers of their frames.

    Where the container has a table of its packets (MP4, MOV), a group is read by itself. Elsewhere all packets are read
    once. unseen: how many of the first frames cannot be decoded, since they refer to what was cut off; whoever decodes
    sets it.
    """

    def __init__(self, container, stream):
        """Look at the table, or read all packets. Raises NoPackets."""
        self.container, self.stream = container, stream
        self.codec = stream.codec_context.name
        self.all: list | None = None  # the packets, where all were read
        self.groups: dict[int, list] = {}  # else those of each group, once read
        self.position, self.reader = NOTHING_READ, None  # which packet `reader` gives next
        self.first_stamp: int | None = None  # of decoding, of the first packet
        self.unseen, self.table_misleads = 0, False
        table = self._trusted_table()
        if len(table):
            self.stamps = table["stamp"]  # of decoding
            self.first_stamp = int(self.stamps[0])
            self._number(table["is_key"], table["is_shown"])
        else:
            self._read_all()

    def _trusted_table(self) -> np.ndarray:
        """Return the container's table of packets (n,) ENTRY, empty if it cannot be gone by."""
        if not self.container.format.name.startswith("mov") or self.codec in ("vp8", "vp9"):
            return NO_TABLE  # other containers' tables list key frames; VP8 and VP9 have hidden packets
        entries = [
            (entry.pos, entry.size, entry.timestamp, entry.is_keyframe, not entry.is_discard)
            for entry in packet_table(self.stream)
        ]
        table = np.array(entries, dtype=ENTRY)
        if not len(table) or len(table) != self.stream.frames:
            return NO_TABLE  # a fragment's
        missing = table["pos"] + table["size"] > self.container.size
        if missing.any():
            table = table[: missing.argmax()]  # the file was cut short
        repeats = len(np.unique(table["pos"])) < len(table)  # an edit list shows parts twice
        stands_still = (
            np.diff(table["stamp"]) <= 0
        )  # a key frame cannot be sought if time does before it
        unclear = (stands_still & table["is_key"][1:]).any()
        only_keys = len(table) > 1 and table["is_key"].all()
        self.table_misleads = bool(repeats or unclear or (only_keys and self._false_keys()))
        return NO_TABLE if self.table_misleads else table

    def _false_keys(self) -> bool:
        """Return whether packets that are all called key frames, as in MP4 without a list of them, may not be."""
        if self.codec in STARTS_ANEW:
            return not self.starts_anew(self.opening()[-1])
        return self.codec not in ALL_KEYS + GIVES_NOTHING_AMID

    def _number(self, is_key: list[bool], is_shown: list[bool]) -> None:
        """Set the groups: places of their key frames and ends, and the frames shown before each."""
        self.keys = np.flatnonzero(is_key)
        in_mov = self.container.format.name.startswith("mov")
        if (
            self.all is not None
            and in_mov
            and len(is_key) > 1
            and all(is_key)
            and self._false_keys()
        ):
            self.keys, self.table_misleads = self.keys[:1], True
        if self.all is not None and len(self.keys) > 1:
            in_order = self._keys_in_order()
            self.table_misleads |= len(in_order) < len(self.keys)
            self.keys = in_order
        if not len(self.keys) or self.keys[0] > 0:  # begun amid a group
            self.keys = np.insert(self.keys, 0, 0)
        self.ends = np.append(self.keys[1:], len(is_key))
        shown = np.concatenate([[0], np.cumsum(is_shown)])
        self.shown_before, self.shown = shown[self.keys], int(shown[-1])

    def _keys_in_order(self) -> np.ndarray:
        """Return the places of the key frames, without those before which a later group shows something.

        A group that begins with a jump back in decoding time is another recording, appended.
        """
        kept, high = [self.keys[0]], None
        for first, end in zip(self.keys, np.append(self.keys[1:], len(self.all)), strict=True):
            stamps = [packet.pts for packet in self.all[first:end] if self.is_shown(packet)]
            if None in stamps:
                return self.keys
            if not stamps:
                continue
            before, own = self.all[first - 1].dts, self.all[first].dts
            appended = first and None not in (before, own) and own < before
            mixed = high is not None and min(stamps) < high and not appended
            if first > kept[-1] and not mixed:
                kept.append(first)
            high = max(stamps) if high is None or not mixed else max(high, *stamps)
        return np.array(kept)

    def _read_all(self) -> None:
        """Read every packet, without decoding. What comes after damage is lost. Raises NoPackets."""
        rewind = self.position != NOTHING_READ
        self.all, self.groups = [], {}
        try:
            if rewind:  # to any frame, since the first need not be a key frame
                self.container.seek(self.first_stamp or 0, stream=self.stream, any_frame=True)
            self.all.extend(packet for packet in self.container.demux(self.stream) if packet.size)
        except (av.FFmpegError, ValueError) as error:
            if not self.all:
                raise NoPackets(str(error)) from None
        if not self.all:
            raise NoPackets("no packets")
        self._number(
            [packet.is_keyframe for packet in self.all], [self.is_shown(each) for each in self.all]
        )

    def __len__(self) -> int:
        """Return how many groups there are."""
        return len(self.keys)

    @property
    def num_frames(self) -> int:
        """The number of frames that a player shows."""
        return self.shown - self.unseen

    def is_shown(self, packet) -> bool:
        """Return whether a player shows the frame of a packet."""
        return not packet.is_discard and not is_hidden(packet, self.codec)

    def group(self, number: int) -> list:
        """Return the packets of a group in the order of the file; fewer where the file ends early."""
        first, end = int(self.keys[number]), int(self.ends[number])
        if self.all is not None:
            return self.all[first:end]
        if number not in self.groups:
            try:
                self.groups[number] = self._read(first, end)
            except (av.FFmpegError, ValueError):
                self.groups[number] = []
        packets = self.groups[number]
        if packets and packets[0].dts != self.stamps[first]:  # the table does not fit the file
            self._read_all()
            return self.group(min(number, len(self) - 1))
        return packets

    def _read(self, first: int, end: int) -> list:
        """Read packets by their places in the table."""
        if self.position != first:
            stamp = int(self.stamps[first])
            packets = self._seek(stamp, any_frame=False)  # arrives here or at a key frame before
            opening = next(packets, None)
            if (
                opening is None or opening.dts is None or opening.dts > stamp
            ):  # there is none before
                packets = self._seek(stamp, any_frame=True)
            else:
                packets = chain([opening], packets)
            # not `self` in the lambda: a cycle would keep the file open until the collector comes by
            self.reader = dropwhile(
                lambda packet: packet.dts is not None and packet.dts < stamp, packets
            )
        found = list(islice(self.reader, end - first))
        self.position = end
        return found

    def _seek(self, stamp: int, any_frame: bool) -> Iterator:
        """Seek to a time stamp, and return the packets from there on."""
        self.container.seek(stamp, stream=self.stream, any_frame=any_frame)
        return (packet for packet in self.container.demux(self.stream) if packet.size)

    def group_of(self, index: int) -> int:
        """Return the group that shows frame `index`."""
        place = np.searchsorted(self.shown_before, index + self.unseen, side="right") - 1
        return max(int(place), 0)

    def numbers(self, number: int) -> dict[int, int] | None:
        """Return the frame number of each time stamp of a group, or None if the stamps cannot tell.

        Numbers below 0 are those of unseen frames.
        """
        packets = [packet for packet in self.group(number) if not packet.is_discard]
        if self.codec in ("vp8", "vp9"):
            packets = [packet for packet in packets if not is_hidden(packet, self.codec)]
        stamps = [packet.pts for packet in packets]
        if None in stamps or len(set(stamps)) < len(stamps):
            return None
        first = int(self.shown_before[number]) - self.unseen
        return {stamp: first + place for place, stamp in enumerate(sorted(stamps))}

    def count_from_the_start(self) -> bool:
        """Return whether frames can only be numbered by decoding all: there are no usable time stamps."""
        if self.container.format.name == "avi" and self.stream.codec_context.has_b_frames:
            return True  # AVI does not store when to show a frame
        if self.all is None:
            return False
        return any(self.numbers(number) is None for number in range(len(self)))

    def starts_anew(self, packet) -> bool:
        """Return whether decoding can begin at a packet: what it and later packets show refers to nothing before it."""
        if self.codec in STARTS_ANEW:
            return bool(nal_types(packet, self.codec) & STARTS_ANEW[self.codec])
        return packet.is_keyframe

    def starts_clean(self) -> bool:
        """Return whether nothing of what the first group shows can refer to what was cut off."""
        first, *after = self.opening()
        if first.is_discard:
            return True  # the edit list hides what cannot be shown
        if not after or None in (first.pts, after[0].pts):
            return self.starts_anew(first)
        return self.starts_anew(first) and after[0].pts > first.pts

    def opening(self) -> list:
        """Return the first two packets of the file, if it has as many. Raises NoPackets."""
        if self.all is not None:
            return self.all[:2]
        if self.position != NOTHING_READ:
            return self.group(0)[:2]
        try:
            found = list(
                islice((each for each in self.container.demux(self.stream) if each.size), 2)
            )
        except (av.FFmpegError, ValueError) as error:
            raise NoPackets(str(error)) from None
        if not found:
            raise NoPackets("no packets")
        self.position, self.first_stamp = SEEK_FIRST, found[0].dts
        return found

    def groups_are_closed(self, most: int = 32) -> bool:
        """Return whether groups refer to nothing outside of them, and show their key frame first.

        most: how many groups, evenly spread, are looked at.
        """
        looked_at = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        for number in looked_at.tolist():
            packets = self.group(number)
            stamps = [packet.pts for packet in packets if packet.pts is not None]
            if packets and not (
                self.starts_anew(packets[0]) and stamps and min(stamps) == stamps[0]
            ):
                return False
        return True

    def times(self) -> np.ndarray | None:
        """Return when each frame is shown, in seconds from the first one's, or None if that is not known.

        Reads all packets.
        """
        if self.all is None:
            self._read_all()
        if self.count_from_the_start():
            return None
        stamps = []
        for number in range(len(self)):
            stamps += sorted(self.numbers(number))
        times = np.array(stamps[self.unseen :], dtype=np.float64) * float(self.stream.time_base)
        steps = np.diff(times)
        longest = JUMP_SECONDS if self.container.format.name in ("mpegts", "mpeg") else np.inf
        jumps = (steps < 0) | (steps > longest)
        if jumps.any():
            steps[jumps] = np.median(steps)
        return np.concatenate([[0.0], np.cumsum(steps)]) if jumps.any() else times - times[0]


def is_hidden(packet, codec: str) -> bool:
    """Return whether a packet of VP8 or VP9 shows nothing by itself (RFC 6386, 9.1; VP9 specification, 7.2 and annex B)."""
    if codec not in ("vp8", "vp9"):
        return False
    data = memoryview(packet)
    head = data[0]
    if codec == "vp8":
        return not head >> 4 & 1
    if data[-1] & 0xE0 == 0xC0:  # several frames in one packet, of which one is shown
        return False
    if head >> 4 & 3 == 3:  # profile 3 has one bit more
        head <<= 1
    show_existing, show = head >> 3 & 1, head >> 1 & 1
    return not (show_existing or show)


def nal_types(packet, codec: str) -> set[int]:
    """Return the types of a packet's NAL units (H.264 table 7-1, H.265 table 7-1)."""
    data = bytes(packet)
    found = set()
    for start in _nal_starts(data, packet.stream.codec_context.extradata or b"", codec):
        if start < len(data):
            found.add(data[start] & 31 if codec == "h264" else data[start] >> 1 & 63)
    return found


def _nal_starts(data: bytes, extradata: bytes, codec: str) -> list[int]:
    """Return where NAL units begin: after start codes, or after lengths, as in MP4 and Matroska."""
    starts, place = [], 0
    if extradata[:1] != b"\x01":
        while (place := data.find(b"\0\0\1", place) + 3) > 2:
            starts.append(place)
        return starts
    size = extradata[4 if codec == "h264" else 21] % 4 + 1  # ISO/IEC 14496-15, 5.3.3 and 8.3.3
    while place + size < len(data):
        starts.append(place + size)
        place += size + int.from_bytes(data[place : place + size], "big")
    return starts
