"""Manifests: which files a dataset consists of, and their classes.

A manifest is a CSV file of one video per line, path[,label]. Files are found in folders or listed
in manifests. A label is a class name; its index is its position in the list of classes.

pandas is imported where it is used, since its import takes longer than all others that --help
needs.
"""

import csv
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np

from util.dist import UserError
from util.files import atomic_write

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
IMAGE_EXTENSIONS = (  # those of torchvision's ImageFolder
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)
HEADER_NAMES = ("path", "video", "file", "filename", "filepath", "video_path", "name")
SEPARATOR_LINES = 20  # number of first lines by which the separator is recognized
SHOWN_CLASSES = 5  # class names in an error message
SHOWN_CHARACTERS = 120  # of a malformed line in an error message


def walk(folder: str, extensions: tuple[str, ...]) -> list[str]:
    """Return the absolute paths of the files below a folder with these extensions, sorted.

    Extensions match in any case. Hidden files and folders are left out.
    """
    found = []
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(extensions) and not name.startswith("."):
                found.append(os.path.abspath(os.path.join(parent, name)))
    return found


def is_image(path: str) -> bool:
    """Return whether a file's name is that of an image."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


def check_folder(folder: str, flag: str) -> None:
    """Raise UserError unless `folder`, which was given as `flag`, is a folder."""
    if not os.path.exists(folder):
        raise UserError(f"folder {folder!r} not found: check {flag}")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is not a folder: give the folder that holds the files")


def find_videos(folders: list[str], flag: str) -> list[str]:
    """Return the absolute paths of all videos below the folders.

    The folders' order is kept; the videos of each folder are sorted. flag: how the folders were
    given, for messages. Raises UserError if a folder does not exist or there are no videos.
    """
    found = []
    for folder in folders:
        check_folder(folder, flag)
        found += walk(folder, VIDEO_EXTENSIONS)
    if not found:
        raise UserError(
            f"no videos below {', '.join(folders)}: check {flag} "
            f"(searched for {' '.join(VIDEO_EXTENSIONS)} in any case, subfolders included)"
        )
    return found


def find_labeled(
    folder: str, extensions: tuple[str, ...], flag: str
) -> tuple[list[str], list[str]]:
    """Return the paths and class names of a folder with one subfolder per class.

    Files may be nested more deeply. flag: how the folder was given, for messages. Raises UserError
    for a class without files.
    """
    check_folder(folder, flag)
    entries = [entry for entry in os.scandir(folder) if entry.is_dir()]
    names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    if not names:
        raise UserError(f"{flag} {folder} has no subfolders: make one per class")
    paths = []
    labels = []
    for name in names:
        class_folder = os.path.join(folder, name)
        found = walk(class_folder, extensions)
        if not found:
            raise UserError(
                f"class folder {class_folder} has no files of {' '.join(extensions)}: "
                "add some or remove the folder"
            )
        paths += found
        labels += [name] * len(found)
    return paths, labels


def class_names(labels: list[str]) -> list[str]:
    """Return the class names in the order of their indices: the distinct labels, sorted.

    If all labels are whole numbers (7, but not 007), each is its own index.
    """
    distinct = sorted(set(labels))
    if all(label.isdecimal() and label == str(int(label)) for label in distinct):
        largest = max(int(label) for label in distinct)
        return [str(index) for index in range(largest + 1)]
    return distinct


def class_indices(labels: list[str], classes: list[str], source: str) -> list[int]:
    """Return the class index of each label.

    source: where the labels come from, for messages. Raises UserError for an unknown label, and for
    one that is the name of several classes.
    """
    index_of = {name: index for index, name in enumerate(classes)}
    unknown = sorted(set(labels) - index_of.keys())
    if unknown:
        shown = ", ".join(classes[:SHOWN_CLASSES])
        if len(classes) > SHOWN_CLASSES:
            shown += ", ..."
        raise UserError(
            f"{source}: unknown class {unknown[0]!r}; "
            f"the {len(classes)} classes are {shown}. Rename it, or pass --class_names."
        )
    counts = Counter(classes)
    several = sorted(label for label in set(labels) if counts[label] > 1)
    if several:
        raise UserError(
            f"{source}: {several[0]!r} is the name of several classes. Number the classes, or "
            "pass other names to --class_names."
        )
    return [index_of[label] for label in labels]


def check_classes(
    train: list[str], val: list[str], known_classes: list[str] | None, val_source: str
) -> list[str]:
    """Return the class names of a training set, given the labels of both sets.

    known_classes: the names in their order, None: those of the training set, sorted. val_source:
    where the validation set comes from, for messages. Raises UserError if either set has an unknown
    class, and if the validation set lacks one of the training set.
    """
    classes = known_classes or class_names(train)
    class_indices(train, classes, "the training set")  # raises for an unknown class
    class_indices(val, classes, val_source)
    absent = sorted(set(train) - set(val))
    if absent:
        raise UserError(
            f"{val_source}: no validation samples of {len(absent)} training classes "
            f"(first: {absent[0]!r}). Add samples or remove the classes."
        )
    return classes


def write_classes(path: Path, classes: list[str]) -> None:
    """Write the class names as a JSON list in the order of their indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(classes, indent=0, ensure_ascii=False) + "\n")


def keep_fraction(paths: list[str], share: float) -> list[str]:
    """Return the first ceil(n * share) of n paths."""
    return paths[: math.ceil(len(paths) * share)]


def keep_stratified(labels: list[int], share: float, seed: int) -> list[int]:
    """Return the sorted indices of a random part of the samples.

    Of the n samples of each class ceil(n * share) are kept, the same for the same seed.
    """
    label_of = np.array(labels)
    generator = np.random.default_rng(seed)
    kept: list[int] = []
    for label in np.unique(label_of):
        indices = np.flatnonzero(label_of == label)
        count = math.ceil(len(indices) * share)
        kept += generator.permutation(indices)[:count].tolist()
    return sorted(kept)


def write_manifest(path: str | Path, paths: list[str], labels: list[str] | None = None) -> None:
    """Write a manifest with the columns path and, if given, label. Make its folder."""
    import pandas as pd

    columns = {"path": paths}
    if labels is not None:
        columns["label"] = labels
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        pd.DataFrame(columns).to_csv(temporary, index=False)


def read_manifest(path: str | Path) -> tuple[list[str], list[str]]:
    """Return the paths and labels of a manifest, path[,label] per line; "" for no label.

    Fields are separated by comma, tab or space and may be quoted; a header is optional. Relative
    paths start at the manifest's folder. Whether the videos exist is not checked. Raises UserError
    with file and line for a malformed row.
    """
    text = _read_text(path)
    lines = text.splitlines()
    table = _parse_table(text, _separator(lines), path)
    if table.iloc[0]["path"].lower() in HEADER_NAMES:
        table = table.iloc[1:]
    _check_rows(table, lines, path)
    if table.empty:
        raise UserError(f"manifest {path} has a header but no videos: list one video per line")
    folder = os.path.dirname(os.path.abspath(path))
    paths = []
    for item in table["path"]:
        if not os.path.isabs(item):
            item = os.path.normpath(os.path.join(folder, item))
        paths.append(item)
    return paths, table["label"].tolist()


def _read_text(path: str | Path) -> str:
    """Return the text of a manifest. Raises UserError if it is unreadable or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"manifest {path} not found: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"manifest {path} cannot be read ({error}): give a text file in UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"manifest {path} is empty: list one video per line, path or path,label")
    return text


def _separator(lines: list[str]) -> str:
    """Return the column separator of a manifest, recognized by its first lines.

    It is a comma if one occurs outside quotes, else a tab if one does. It is a space if each line
    has two fields and the second one is a label, with neither slash nor dot. Otherwise there is one
    column, and the comma serves as well.
    """
    first_lines = [line for line in lines if line.strip()][:SEPARATOR_LINES]
    for separator in (",", "\t"):
        if any(len(row) > 1 for row in csv.reader(first_lines, delimiter=separator)):
            return separator
    for row in csv.reader(first_lines, delimiter=" "):
        if len(row) != 2 or "" in row or set(row[1]) & set("/."):
            return ","
    return " "


def _parse_table(text: str, separator: str, path: str | Path):
    """Return a DataFrame with the columns path, label and rest, indexed by line numbers from 1.

    Blank lines are left out. Raises UserError if the text cannot be parsed.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            names=["path", "label", "rest"],
            dtype=str,
            index_col=False,
            keep_default_na=False,
            na_filter=False,
            skipinitialspace=True,
            skip_blank_lines=False,
            on_bad_lines="error",
            quoting=csv.QUOTE_MINIMAL,
        )
    except pd.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise UserError(
            f"manifest {path}: {reason}. List one video per line, path or path,label."
        ) from None
    table = table.fillna("").apply(lambda column: column.str.strip())
    table.index += 1
    return table[(table != "").any(axis=1)]


def _check_rows(table, lines: list[str], path: str | Path) -> None:
    """Raise UserError for the first malformed row of `_parse_table`'s result."""
    is_url = table["path"].str.match(r"[A-Za-z][A-Za-z0-9+.-]+:")
    malformed = {
        "more than two fields (quote a path that contains the separator)": table["rest"] != "",
        "no path": table["path"] == "",
        "a URL or protocol, not a file (download it first)": is_url,
    }
    for problem, rows in malformed.items():
        if rows.any():
            line = rows.idxmax()
            shown = lines[line - 1][:SHOWN_CHARACTERS]
            raise UserError(f"manifest {path}, line {line}: {problem}: {shown!r}")
