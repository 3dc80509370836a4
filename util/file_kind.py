"""Name the kind of a file that is not a checkpoint, by its content."""

import codecs
import zipfile
from pathlib import Path

SIGNATURES = (  # (offset in bytes, bytes there, kind)
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (8, b"AVI ", "an AVI video"),
    (4, b"ftyp", "an MP4 video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x93NUMPY", "an array of NumPy"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"%PDF", "a PDF document"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, to be replaced by git lfs pull"),
    (257, b"ustar", "a tar archive"),
)
ZIP_START = b"PK\x03\x04"
HEAD = 4096  # bytes that are examined


def kind_of_file(path: Path) -> str | None:
    """Return what a file is, such as "a text file"; None for a checkpoint or unknown bytes.

    Raises OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        return "an empty file"
    for offset, signature, kind in SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    if zipfile.is_zipfile(path):
        return _kind_of_zip(path)
    if head.startswith(ZIP_START):
        return None  # a truncated zip archive, perhaps a checkpoint
    return _kind_of_text(head)


def _kind_of_zip(path: Path) -> str | None:
    """Return what a zip archive is, None for a file of torch.save and for a corrupt archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    if "constants.pkl" in names:
        return "a TorchScript program"
    if "data.pkl" not in names:
        return "a zip archive"
    return None


def _kind_of_text(head: bytes) -> str | None:
    """Return what a text file is by its first bytes, None if they are not UTF-8 text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # may end inside a character
    except UnicodeDecodeError:
        return None
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    if text.lstrip().lower().startswith(("<!doctype html", "<html")):
        return "a web page"
    return "a text file"
