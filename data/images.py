"""Reading images with Pillow."""

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data.input_files import ReadError, check_path, error_summary

# Errors that Pillow raises for corrupt files.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Yield an image of which only the header is read so far.

    Raises ReadError, also within the context, for anything that is not a readable image.
    """
    try:
        with Image.open(check_path(path)) as image:
            yield image
    except PILLOW_ERRORS as error:
        reason = error_summary(error).partition(": ")[0]  # the rest repeats the path
        raise ReadError(f"not an image: {reason}") from None


def read_image(path: str) -> Image.Image:
    """Return an image in RGB. Raises ReadError for anything that is not a readable image.

    Of 16 bits per gray value, the upper 8 count, as Pillow reads those of colors. It would clip
    gray values to 255, and also those of 32 bits, whose range is unknown.
    """
    with open_image(path) as image:
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise ReadError("32 bits per gray value: convert it to 8 or 16 bits")
        if image.mode.startswith("I"):  # "I;16", or "I" as in PGM files
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def image_size(path: str) -> tuple[int, int]:
    """Return width and height of an image in pixels, from its header. Raises ReadError."""
    with open_image(path) as image:
        return image.size
