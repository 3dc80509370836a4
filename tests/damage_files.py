"""Ways to damage the bytes of a video or an image, for tests/fuzz_files.py.

Each function takes the bytes of a file and a random generator, and returns the damaged bytes.
`DAMAGE` lists those for files of any kind, `BOX_DAMAGE` those for MP4 and its relatives,
`PNG_DAMAGE` and `JPEG_DAMAGE` those for images.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Numbers that a careless reader allocates memory for, counts to or divides by.
EXTREME = (0, 1, 2, 255, 65_535, 1 << 20, 60_000_000, 2**31 - 1, 2**31, 2**32 - 1)
HEADER = 512  # bytes
PAGE = 512  # bytes; disks lose larger pieces, of larger files
CONTAINER_BOXES = (
    b"moov",
    b"trak",
    b"edts",
    b"mdia",
    b"minf",
    b"dinf",
    b"stbl",
    b"mvex",
    b"moof",
    b"traf",
)
# Offsets, after the size and type of a box, of the numbers that decide how long its table is.
COUNTS = {
    b"stsz": (4, 8),
    b"stts": (4, 8),
    b"ctts": (4, 8),
    b"stsc": (4, 12),
    b"stco": (4,),
    b"stss": (4,),
    b"stsd": (4,),
    b"elst": (4,),
    b"dref": (4,),
    b"trun": (4,),
    b"sidx": (20,),
}
PNG_SIGNATURE = 8  # bytes
JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of baseline, extended and progressive frames


class Box(NamedTuple):
    """A box of MP4 (ISO/IEC 14496-12, 4.2)."""

    start: int  # of its size and type
    end: int
    kind: bytes
    parents: tuple[int, ...]  # their starts


def boxes_of(data: bytes) -> list[Box]:
    """Return the boxes of a good MP4 file, those inside others included."""
    return list(_walk(data, 0, len(data), ()))


def _walk(data: bytes, start: int, end: int, parents: tuple[int, ...]) -> Iterator[Box]:
    """Yield the boxes between two offsets."""
    while start + 8 <= end:
        size = int.from_bytes(data[start : start + 4], "big") or end - start
        kind = data[start + 4 : start + 8]
        yield Box(start, start + size, kind, parents)
        if kind in CONTAINER_BOXES:
            yield from _walk(data, start + 8, start + size, (*parents, start))
        start += size


def _two_places(data: bytes, draw: np.random.Generator) -> tuple[int, int]:
    """Return the start and end of a piece of a file, mostly a small one."""
    start = int(draw.integers(0, len(data)))
    longest = min(len(data) - start, int(draw.choice([8, 200, 4000, len(data)])))
    return start, start + int(draw.integers(1, longest + 1))


def _extreme(draw: np.random.Generator, size: int) -> bytes:
    """Return an extreme number of `size` bytes, in either order of bytes."""
    number = EXTREME[draw.integers(len(EXTREME))] % 2 ** (8 * size)
    return number.to_bytes(size, "big" if draw.random() < 0.5 else "little")


def _put(data: bytes, offset: int, value: bytes) -> bytes:
    """Return the bytes with a value in place of those at an offset."""
    return data[:offset] + value + data[offset + len(value) :]


# Files of any kind


def flip_bits(data: bytes, draw: np.random.Generator) -> bytes:
    """Flip up to eight bits anywhere."""
    return _flip(data, draw, len(data))


def flip_header_bits(data: bytes, draw: np.random.Generator) -> bytes:
    """Flip up to eight bits of the header."""
    return _flip(data, draw, min(HEADER, len(data)))


def _flip(data: bytes, draw: np.random.Generator, end: int) -> bytes:
    """Flip up to eight bits before an offset."""
    damaged = bytearray(data)
    for offset in draw.integers(0, end, draw.integers(1, 9)):
        damaged[offset] ^= 1 << draw.integers(8)
    return bytes(damaged)


def truncate(data: bytes, draw: np.random.Generator) -> bytes:
    """Remove the end, as of an interrupted download."""
    return data[: draw.integers(1, len(data))]


def remove_chunk(data: bytes, draw: np.random.Generator) -> bytes:
    """Remove a piece."""
    start, end = _two_places(data, draw)
    return data[:start] + data[end:] or data[:1]


def repeat_chunk(data: bytes, draw: np.random.Generator) -> bytes:
    """Insert a piece a second time."""
    start, end = _two_places(data, draw)
    return data[:end] + data[start:end] + data[end:]


def swap_chunks(data: bytes, draw: np.random.Generator) -> bytes:
    """Exchange two pieces that follow each other."""
    first, middle, end = np.sort(draw.integers(0, len(data) + 1, 3)).tolist()
    return data[:first] + data[middle:end] + data[first:middle] + data[end:]


def clear_page(data: bytes, draw: np.random.Generator) -> bytes:
    """Fill pages with zeros, as a file system does with blocks that were never written."""
    page = int(draw.integers(0, len(data) // PAGE + 1))
    cleared = data[page * PAGE : (page + int(draw.integers(1, 5))) * PAGE]
    return _put(data, page * PAGE, bytes(len(cleared)))


def overwrite(data: bytes, draw: np.random.Generator) -> bytes:
    """Overwrite a piece with random bytes."""
    start, end = _two_places(data, draw)
    return _put(data, start, draw.bytes(end - start))


def put_extreme_number(data: bytes, draw: np.random.Generator) -> bytes:
    """Put an extreme number into the header."""
    size = int(draw.choice([2, 4]))
    offset = int(draw.integers(0, min(HEADER, len(data) - size)))
    return _put(data, offset, _extreme(draw, size))


def append_bytes(data: bytes, draw: np.random.Generator) -> bytes:
    """Append the file itself, zeros or noise."""
    noise = draw.bytes(1000)
    return data + (data, bytes(1000), noise)[draw.integers(3)]


def prepend_bytes(data: bytes, draw: np.random.Generator) -> bytes:
    """Prepend a part of the file itself, zeros or noise."""
    noise = draw.bytes(1000)
    return (data[: draw.integers(len(data))], bytes(1000), noise)[draw.integers(3)] + data


# MP4


def resize_box(data: bytes, draw: np.random.Generator) -> bytes:
    """Give a box an extreme size, or one that is off by a little."""
    box = _any_box(data, draw)
    size = _extreme(draw, 4)
    if draw.random() < 0.5:
        size = (box.end - box.start + int(draw.integers(-16, 17))).to_bytes(4, "big", signed=True)
    return _put(data, box.start, size)


def rename_box(data: bytes, draw: np.random.Generator) -> bytes:
    """Give a box the type of another one."""
    return _put(data, _any_box(data, draw).start + 4, _any_box(data, draw).kind)


def change_box(data: bytes, draw: np.random.Generator) -> bytes:
    """Put an extreme number anywhere into a box, where the fields of most boxes begin."""
    box = _any_box(data, draw, with_data=False)
    offset = int(draw.integers(box.start + 8, max(box.end - 3, box.start + 9)))
    return _put(data, offset - offset % 2, _extreme(draw, int(draw.choice([2, 4]))))


def change_count(data: bytes, draw: np.random.Generator) -> bytes:
    """Give a table an extreme number of entries; maybe let its box be as long as they need."""
    tables = [box for box in boxes_of(data) if box.kind in COUNTS]
    box = tables[draw.integers(len(tables))]
    offset = int(draw.choice(COUNTS[box.kind]))
    number = int(EXTREME[draw.integers(5, len(EXTREME))])
    damaged = _put(data, box.start + 8 + offset, number.to_bytes(4, "big"))
    if draw.random() < 0.5:
        return damaged
    for start in (box.start, *box.parents):
        size = int.from_bytes(data[start : start + 4], "big") + 8 * number
        damaged = _put(damaged, start, min(size, 2**32 - 1).to_bytes(4, "big"))
    return damaged


def list_many_packets(data: bytes, draw: np.random.Generator) -> bytes:
    """List 60 million packets in a way that needs no room in the file."""
    number = (60_000_000).to_bytes(4, "big")
    damaged = data
    for box in boxes_of(data):
        first = box.start + 8
        if box.kind == b"stsz":
            size = int(draw.integers(1, 9)).to_bytes(4, "big")
            damaged = _put(damaged, first + 4, size + number)
        elif box.kind == b"stsc":
            damaged = _put(damaged, first + 12, number)
        elif box.kind == b"trun":
            damaged = _put(damaged, first, bytes(4) + number)
    return damaged


def remove_box(data: bytes, draw: np.random.Generator) -> bytes:
    """Remove a box, and shorten those around it; or insert it a second time."""
    box = _any_box(data, draw)
    change = box.start - box.end
    damaged = data[: box.start] + data[box.end :]
    if draw.random() < 0.5:
        change = -change
        damaged = data[: box.end] + data[box.start :]
    for start in box.parents:
        size = int.from_bytes(data[start : start + 4], "big") + change
        damaged = _put(damaged, start, size.to_bytes(4, "big"))
    return damaged or data[:1]


def _any_box(data: bytes, draw: np.random.Generator, with_data: bool = True) -> Box:
    """Return a random box. with_data: it may hold the coded frames."""
    boxes = [box for box in boxes_of(data) if with_data or box.kind != b"mdat"]
    return boxes[draw.integers(len(boxes))]


# Images


def change_png_header(data: bytes, draw: np.random.Generator) -> bytes:
    """Change the size, depth, color type or interlacing of a PNG; its checksum is right."""
    start = PNG_SIGNATURE + 8
    header = data[start : start + 13]
    if draw.random() < 0.5:
        sides = draw.choice([1, 64, 5000, 60_000, 2**31 - 1], 2)
        header = b"".join(int(side).to_bytes(4, "big") for side in sides) + header[8:]
    else:
        offset = int(draw.choice([8, 9, 12]))
        header = _put(header, offset, bytes([int(draw.choice([0, 1, 2, 3, 4, 6, 8, 16]))]))
    checksum = zlib.crc32(b"IHDR" + header).to_bytes(4, "big")
    return _put(data, start, header + checksum)


def change_jpeg_frame(data: bytes, draw: np.random.Generator) -> bytes:
    """Change the size, depth, number of components or sampling of a JPEG (ITU-T T.81, B.2.2)."""
    start = next(
        offset
        for offset in range(len(data) - 1)
        if data[offset] == 0xFF and data[offset + 1] in JPEG_FRAMES
    )
    if draw.random() < 0.5:
        sides = draw.choice([1, 64, 5000, 30_000, 65_535], 2)
        return _put(data, start + 5, b"".join(int(side).to_bytes(2, "big") for side in sides))
    offset = int(draw.choice([1, 4, 9, 10, 11]))
    return _put(data, start + offset, draw.bytes(1))


DAMAGE = {
    "bits flipped": flip_bits,
    "bits of the header flipped": flip_header_bits,
    "truncated": truncate,
    "a piece removed": remove_chunk,
    "a piece repeated": repeat_chunk,
    "pieces exchanged": swap_chunks,
    "pages of zeros": clear_page,
    "a piece overwritten": overwrite,
    "an extreme number in the header": put_extreme_number,
    "bytes appended": append_bytes,
    "bytes prepended": prepend_bytes,
}
BOX_DAMAGE = {
    "size of a box": resize_box,
    "type of a box": rename_box,
    "an extreme number in a box": change_box,
    "number of entries of a table": change_count,
    "millions of packets": list_many_packets,
    "a box removed or repeated": remove_box,
}
PNG_DAMAGE = {"header of a PNG": change_png_header}
JPEG_DAMAGE = {"header of a JPEG": change_jpeg_frame}
