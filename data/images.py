"""Reading images with Pillow."""

import contextlib
from collections.abc import Iterator

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
    """Return an image in RGB. Raises ReadError for anything that is not a readable image."""
    with open_image(path) as image:
        return image.convert("RGB")


def image_size(path: str) -> tuple[int, int]:
    """Return width and height of an image in pixels, from its header. Raises ReadError."""
    with open_image(path) as image:
        return image.size
