"""Size and orientation of frames: reduction, square pixels, display matrix."""

import sys
from fractions import Fraction

import numpy as np

UPRIGHT = (1, 0, 0, 1)  # see `frame_orientation`
# Of a stored picture, of which decoders keep up to 17: the limit of level 6.2 of H.264 and HEVC.
MAX_PIXELS = 35_651_584
PIXEL_ASPECTS = (0.25, 4)  # plausible range; values outside of it are errors of the file


def scaled_size(width: int, height: int, short_side: int | None) -> tuple[int, int] | None:
    """Return width and height with the short side reduced to `short_side` pixels.

    Returns None if the short side is not above it, or if `short_side` is None.
    """
    if short_side is None or min(width, height) <= short_side:
        return None
    scale = short_side / min(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def square_pixel_size(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Return width and height of a frame after conversion to square pixels; no side grows."""
    low, high = PIXEL_ASPECTS
    if not pixel_aspect or not low <= pixel_aspect <= high:
        return width, height
    square_width = round(width * min(pixel_aspect, Fraction(1)))
    square_height = round(height / max(pixel_aspect, Fraction(1)))
    return max(square_width, 1), max(square_height, 1)


def frame_orientation(frame) -> tuple[int, int, int, int]:
    """Return the signs (a, b, c, d) of the display matrix of a PyAV frame.

    A pixel (x, y) is shown at (a x + c y, b x + d y). Multiples of 90 degrees and mirrored frames
    are supported; any other matrix is rounded to the nearest of these.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return UPRIGHT
    int32 = "<i4" if sys.byteorder == "little" else ">i4"
    matrix = np.frombuffer(bytes(side_data), dtype=int32)  # 3 x 3, row by row
    a, b, c, d = (int(matrix[index]) for index in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _sign(a), 0, 0, _sign(d)
    return 0, _sign(b), _sign(c), 0


def _sign(value: int) -> int:
    """Return -1 for a negative value, otherwise 1."""
    return -1 if value < 0 else 1


def apply_orientation(frame: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """Return a frame (H, W, 3) as its display matrix shows it, see `frame_orientation`."""
    a, b, c, d = orientation
    if b:  # x becomes y
        return frame.transpose(1, 0, 2)[::b, ::c]
    return frame[::d, ::a]
