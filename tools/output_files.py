"""The files that tools write: their names, and checks before the work begins."""

import os
from pathlib import Path, PurePath

from util.dist import UserError
from util.hub import WEIGHT_SUFFIXES, is_hub_path, parse_address


def checkpoint_name(checkpoint: str) -> str:
    """Return the name that files about a checkpoint start with: "b" of "a/b.pth" and "a/b/".

    Of hf:OWNER/REPO it is "REPO".
    """
    if is_hub_path(checkpoint):
        address = parse_address(checkpoint)
        name = PurePath(address.file or address.repository).name
    else:
        name = PurePath(os.path.abspath(checkpoint)).name
    for suffix in WEIGHT_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def check_writable(path: Path, flags: str) -> None:
    """Raise UserError if a file cannot be made at `path`, in folders that may have to be made too.

    flags: those that name it.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: {folder} is a file. Choose another {flags}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: folder {folder} is read-only. Choose another {flags}."
        )


def refuse_existing(path: Path, overwrite: bool, flags: str) -> None:
    """Raise UserError if `path` exists and may not be replaced, or cannot be made.

    flags: those that name it.
    """
    check_writable(path, flags)
    if path.is_dir():
        raise UserError(f"{path} is a folder. Choose another {flags}.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists. Choose another {flags}, or pass --overwrite.")
