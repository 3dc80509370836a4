"""How many packets the tables of MP4 and its relatives list, found before FFmpeg trusts them.

FFmpeg keeps about 60 bytes of each listed packet. A damaged number can list 60 million of them in a
small file. Source of the boxes: ISO/IEC 14496-12.
"""

import os

from data.input_files import ReadError

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
COUNT_AT = {b"stsz": 16, b"stz2": 16, b"trun": 12}  # offset of the number of packets in a table
HEAD = 32  # bytes of a box that are read: its size, its type and its first numbers
MAX_BOXES = 1_000_000  # to parse: two fragments a second for a day
ALWAYS_ALLOWED_PACKETS = 1_000_000  # in a file of any size; they take at most 600 MB
MAX_PACKETS = 10_000_000  # nearly four days at 30 frames/s
MIN_BYTES = 16  # that a packet and its entries in the tables take, on average


def check_tables(path: str) -> None:
    """Raise ReadError if the tables of a file list more packets than it can hold.

    A file of any other format has no such tables and passes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        listed = listed_packets(descriptor, size)
    finally:
        os.close(descriptor)
    if listed > max(ALWAYS_ALLOWED_PACKETS, min(size // MIN_BYTES, MAX_PACKETS)):
        raise ReadError(f"damaged: its tables list {listed} packets, more than it can hold")


def listed_packets(descriptor: int, size: int) -> int:
    """Return how many packets the tables of an open file of `size` bytes list.

    Uncompressed sound (one tick per packet) is left out: FFmpeg lists it by chunk, not by packet.
    """
    listed = 0
    is_sound = False
    has_one_tick = False
    begin = 0
    ends = [size]  # of the boxes that contain offset `begin`, the outermost first
    for _ in range(MAX_BOXES):
        while ends and begin + 8 > ends[-1]:
            begin = ends.pop()
        if not ends:
            break
        head = os.pread(descriptor, HEAD, begin)
        kind = head[4:8]
        box_size = _number(head, 0)
        header_size = 8
        if box_size == 1:
            box_size = int.from_bytes(head[8:16], "big")
            header_size = 16
            head = head[8:]  # the first numbers follow the longer header
        if box_size < 8:  # up to the end, or damaged
            box_size = ends[-1] - begin
        if kind in CONTAINERS:
            ends.append(min(begin + box_size, ends[-1]))
            begin += header_size
            continue
        if kind == b"hdlr" and head[12:16] != b"dhlr":  # QuickTime's other one, about the data
            is_sound = head[16:20] == b"soun"
        elif kind == b"stts":
            has_one_tick = _number(head, 12) == 1 and _number(head, 20) == 1
        elif kind in COUNT_AT and not (is_sound and has_one_tick):
            listed += _number(head, COUNT_AT[kind])
        begin += box_size
    return listed


def _number(head: bytes, offset: int) -> int:
    """Return the number of 32 bits at an offset."""
    return int.from_bytes(head[offset : offset + 4], "big")
