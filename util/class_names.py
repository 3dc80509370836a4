"""The names of a classifier's outputs: those that its checkpoint records, or those of a file."""

import json
from pathlib import Path

from util.dist import UserError, print0

SHOWN_DIFFERENCES = 3
SHOWN_NAMES = 3


def class_list(
    checkpoint: str | Path, num_classes: int, recorded: list[str] | None, names_file: str
) -> list[str]:
    """Return the names of a checkpoint's `num_classes` outputs, in their order.

    They come from names_file (--class_names), if given, else from the checkpoint, else they are
    numbers. A checkpoint may record fewer names than outputs. Raises UserError if names_file has
    another number of names, or other names than the checkpoint.
    """
    if not names_file:
        return names_or_numbers(recorded, num_classes)
    names = read_class_names(names_file)
    expected = num_classes if recorded is None else len(recorded)
    if len(names) != expected:
        raise UserError(
            f"--class_names {names_file} has {len(names)} names, but {checkpoint} has "
            f"{expected} classes. Pass the list that belongs to it."
        )
    if recorded is None:
        shown = ", ".join(names[:SHOWN_NAMES])
        print0(f"class names from {names_file}, in its order: {shown}, ...")
        return names
    differing = [i for i in range(expected) if names[i] != recorded[i]]
    if differing:
        shown = "; ".join(
            f"class {i} is {names[i]!r}, not {recorded[i]!r}" for i in differing[:SHOWN_DIFFERENCES]
        )
        raise UserError(
            f"--class_names {names_file} contradicts the names in {checkpoint} in "
            f"{len(differing)} of {expected} classes ({shown}). Drop the flag."
        )
    return names


def names_or_numbers(names: list[str] | None, num_classes: int) -> list[str]:
    """Return the names of a classifier's outputs, without any their indices as text."""
    return names or [str(index) for index in range(num_classes)]


def read_class_names(path: str | Path) -> list[str]:
    """Return the class names in a file, in the order of their numbers.

    One name per line; or JSON: a list of names, or a dictionary of name: number like
    Something-Something's labels.json. Raises UserError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--class_names {path} cannot be read ({error}). Pass a text file in UTF-8."
        ) from None
    if text.lstrip().startswith(("{", "[")):
        return _names_in_json(text, path)
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"--class_names {path} is empty. List one name per line.")
    return names


def _names_in_json(text: str, path: str | Path) -> list[str]:
    """Return the names in a JSON list, or of a dictionary of name: number. Raises UserError."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"--class_names {path} is not valid JSON ({error})") from None
    if isinstance(content, list):
        return [str(name) for name in content]
    numbers = {}
    for name, number in content.items():
        if not str(number).isdecimal():
            raise UserError(
                f"--class_names {path}: class {name!r} has the number {number!r}. "
                "Number the classes from 0."
            )
        numbers[int(number)] = name
    if sorted(numbers) != list(range(len(content))):
        raise UserError(
            f"--class_names {path} does not number its {len(content)} classes from 0 to "
            f"{len(content) - 1}, each once."
        )
    return [numbers[index] for index in range(len(content))]
