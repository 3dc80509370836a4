"""Reading images with Pillow."""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data.input_files import ReadError, check_path, error_summary

WIDE_GRAY = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of gray levels of more than 8 bits
TIFF_BITS = 258  # the tag of the bits per gray level


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Yield an image of which only the header is read so far.

    Raises ReadError, also within the context, for anything that is not a readable image.
    """
    _filter_warnings()
    try:
        with Image.open(check_path(path)) as image:
            yield image
    except ReadError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ReadError(f"an image of more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # a decoder can raise anything; a huge image, MemoryError
        reason = error_summary(error).partition(": ")[0]  # the rest repeats the path
        raise ReadError(f"not an image: {reason}") from None


@functools.cache
def _filter_warnings() -> None:
    """Refuse images that Pillow only warns of: their memory could end the process.

    Ignore its other warnings, such as of damaged metadata: they name no file.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def read_image(path: str) -> Image.Image:
    """Return an image in RGB, of 8 bits like Pillow's own reading of colors of 16 bits.

    Raises ReadError for anything that is not a readable image, or whose gray levels have no known
    range.
    """
    with open_image(path) as image:
        bits = _gray_bits(image)
        if bits == 8:
            return image.convert("RGB")
        levels = np.asarray(image)
        return Image.fromarray((levels >> (bits - 8)).astype(np.uint8)).convert("RGB")


def _gray_bits(image: Image.Image) -> int:
    """Return the bits of a gray level, 8 for all images that Pillow scales to 8 bits itself.

    Raises ReadError for the 32-bit integers and floats of TIFF, whose range is not known.
    """
    if image.mode in WIDE_GRAY and image.format == "TIFF":
        return image.tag_v2[TIFF_BITS][0]  # type: ignore[attr-defined]
    if image.mode in WIDE_GRAY or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 16
    if image.mode in ("I", "F"):
        raise ReadError("gray levels of unknown range: save it with 8 bits, or 16 unsigned ones")
    return 8


def image_size(path: str) -> tuple[int, int]:
    """Return width and height of an image in pixels, from its header. Raises ReadError."""
    with open_image(path) as image:
        return image.size
