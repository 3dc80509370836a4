"""Reading images with Pillow."""

from PIL import Image

from data.input_files import ReadError, check_path, error_summary

# Errors that Pillow raises for corrupt files.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def read_image(path: str) -> Image.Image:
    """Return an image in RGB. Raises ReadError for anything that is not a readable image."""
    try:
        with Image.open(check_path(path)) as image:
            return image.convert("RGB")
    except PILLOW_ERRORS as error:
        reason = error_summary(error).partition(": ")[0]  # the rest repeats the path
        raise ReadError(f"not an image: {reason}") from None
