"""Facts read from the bytes of a compressed packet: the types of its NAL units, hidden frames.

Sources: ITU-T H.264 and H.265, RFC 6386 (VP8), the VP9 specification, ISO/IEC 14496-15.
"""

HIDING_CODECS = ("vp8", "vp9")  # their packets may hold a frame that only later frames refer to
START_CODE = b"\0\0\1"
CONFIG_RECORD = b"\x01"  # first byte of extradata that announces lengths in place of start codes


def is_hidden(packet, codec: str) -> bool:
    """Return whether a packet of VP8 or VP9 shows no frame.

    Sources: RFC 6386, 9.1; VP9 specification, 7.2 and annex B.
    """
    if codec not in HIDING_CODECS:
        return False
    data = memoryview(packet)
    header = data[0]
    if codec == "vp8":
        show_frame = header >> 4 & 1
        return not show_frame
    if data[-1] & 0xE0 == 0xC0:  # a superframe: several frames, of which one is shown
        return False
    profile = header >> 4 & 3
    if profile == 3:  # has one bit more
        header <<= 1
    show_existing_frame = header >> 3 & 1
    show_frame = header >> 1 & 1
    return not (show_existing_frame or show_frame)


def nal_types(packet, codec: str) -> set[int]:
    """Return the types of a packet's NAL units (H.264 table 7-1, H.265 table 7-1)."""
    data = bytes(packet)
    extradata = packet.stream.codec_context.extradata or b""
    types = set()
    for start in _nal_starts(data, extradata, codec):
        if start >= len(data):
            continue
        header = data[start]
        if codec == "h264":
            types.add(header & 31)
        else:
            types.add(header >> 1 & 63)
    return types


def _nal_starts(data: bytes, extradata: bytes, codec: str) -> list[int]:
    """Return the offsets of NAL units: after start codes, or after lengths (MP4 and Matroska)."""
    if extradata[:1] == CONFIG_RECORD:
        # ISO/IEC 14496-15, 5.3.3 and 8.3.3
        size_offset = 4 if codec == "h264" else 21
        return _starts_after_lengths(data, extradata[size_offset] % 4 + 1)
    return _starts_after_codes(data)


def _starts_after_codes(data: bytes) -> list[int]:
    """Return the offsets after each start code."""
    starts = []
    found = data.find(START_CODE)
    while found >= 0:
        start = found + len(START_CODE)
        starts.append(start)
        found = data.find(START_CODE, start)
    return starts


def _starts_after_lengths(data: bytes, length_size: int) -> list[int]:
    """Return the offsets after each length field of `length_size` bytes."""
    starts = []
    offset = 0
    while offset + length_size < len(data):
        start = offset + length_size
        starts.append(start)
        offset = start + int.from_bytes(data[offset:start], "big")
    return starts
