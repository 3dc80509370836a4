"""From folders or CSV files to manifests: which videos there are, and their labels."""

import csv
import io
import math
import os
from pathlib import Path

import pandas as pd

from util.dist import UserError

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
HEADER_NAMES = ("path", "video", "file", "filename", "filepath", "video_path", "name")


def find_videos(folders: list[str]) -> list[str]:
    """Absolute paths of all videos below the folders: these in the order given, each sorted. Raises UserError if there are none."""
    found = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"folder {folder!r} not found: check --data_dirs" if not os.path.exists(folder) else f"{folder} is no folder")
        for parent, subfolders, files in os.walk(folder, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            names = sorted(name for name in files if name.lower().endswith(VIDEO_EXTENSIONS) and not name.startswith("."))
            found.extend(os.path.abspath(os.path.join(parent, name)) for name in names)
    if not found:
        raise UserError(f"no videos below {', '.join(folders)}: looked for {' '.join(VIDEO_EXTENSIONS)} in any case, subfolders included")
    return found


def keep_fraction(paths: list[str], share: float) -> list[str]:
    """The first ceil(n * share) paths."""
    return paths[: math.ceil(len(paths) * share)]


def write_manifest(path: str | Path, paths: list[str], labels: list[str] | None = None) -> None:
    """Write a manifest (columns path and, if given, label), by way of a temporary file; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"path": paths} if labels is None else {"path": paths, "label": labels})
    temporary = path.with_name(path.name + ".tmp")
    table.to_csv(temporary, index=False)
    os.replace(temporary, path)


def _separator(first_lines: list[str]) -> str:
    """The column separator: a comma if the first lines have one outside quotes, else a tab, else a space if each line then
    has two fields of which the second has no slash and no dot (a label), else a comma (one column)."""
    for separator in (",", "\t"):
        if any(len(row) > 1 for row in csv.reader(first_lines, delimiter=separator)):
            return separator
    rows = list(csv.reader(first_lines, delimiter=" "))
    labelled = all(len(row) == 2 and row[0] and row[1] and not set(row[1]) & set("/.") for row in rows)
    return " " if rows and labelled else ","


def read_manifest(path: str | Path) -> tuple[list[str], list[str]]:
    """Paths and labels ("" where there are none) of a manifest: path[,label] per line.

    Separated by comma, tab or space, with or without a header, fields may be quoted; relative paths count from the
    manifest's folder. Whether the videos exist is not checked. Raises UserError with file and line for a malformed row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"manifest {path} not found: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"manifest {path} cannot be read ({error}): it must be a text file in UTF-8") from None
    lines = text.splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not numbers:
        raise UserError(f"manifest {path} is empty: give one video a line, path or path,label")
    separator = _separator([lines[number - 1] for number in numbers[:20]])
    try:
        table = pd.read_csv(io.StringIO(text), sep=separator, header=None, names=["path", "label", "rest"], dtype=str, index_col=False,
                            keep_default_na=False, na_filter=False, skipinitialspace=True, skip_blank_lines=False, on_bad_lines="error",
                            quoting=csv.QUOTE_MINIMAL)  # fmt: skip
    except pd.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"manifest {path}: {reason}; one video a line, path or path,label") from None
    table = table.fillna("").apply(lambda column: column.str.strip())
    table.index += 1  # line numbers
    table = table[(table != "").any(axis=1)]
    if table.iloc[0]["path"].lower() in HEADER_NAMES:
        table = table.iloc[1:]
    problems = {
        "more than two fields (quote a path that holds the separator)": table["rest"] != "",
        "no path": table["path"] == "",
        "a URL or protocol, not a file (download it first)": table["path"].str.match(r"[A-Za-z][A-Za-z0-9+.-]+:"),
    }
    for problem, rows in problems.items():
        if rows.any():
            raise UserError(f"manifest {path}, line {rows.idxmax()}: {problem}: {lines[rows.idxmax() - 1][:120]!r}")
    if table.empty:
        raise UserError(f"manifest {path} has a header and no videos")
    folder = os.path.dirname(os.path.abspath(path))
    paths = [item if os.path.isabs(item) else os.path.normpath(os.path.join(folder, item)) for item in table["path"]]
    return paths, table["label"].tolist()
