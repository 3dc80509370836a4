"""From folders or CSV files to manifests: which videos there are, and their labels.

pandas is imported where it is used: it takes longer than most of what --help needs.
"""

import csv
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from util.cli import Parser
from util.dist import UserError, print0, run_script

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # torchvision's ImageFolder's
HEADER_NAMES = ("path", "video", "file", "filename", "filepath", "video_path", "name")


def _walk(folder: str, extensions: tuple[str, ...]) -> list[str]:
    """Absolute paths of the files below a folder that end so (in any case), sorted; hidden ones are left out."""
    found = []
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        names = sorted(
            name for name in files if name.lower().endswith(extensions) and not name.startswith(".")
        )
        found.extend(os.path.abspath(os.path.join(parent, name)) for name in names)
    return found


def _check_folder(folder: str, flag: str) -> None:
    """Raises UserError unless this is a folder."""
    if not os.path.isdir(folder):
        raise UserError(
            f"folder {folder!r} not found: check {flag}"
            if not os.path.exists(folder)
            else f"{flag} {folder} is no folder"
        )


def find_videos(folders: list[str]) -> list[str]:
    """Absolute paths of all videos below the folders: these in the order given, each sorted. Raises UserError if there are none."""
    found = []
    for folder in folders:
        _check_folder(folder, "--data_dirs")
        found += _walk(folder, VIDEO_EXTENSIONS)
    if not found:
        raise UserError(
            f"no videos below {', '.join(folders)}: looked for {' '.join(VIDEO_EXTENSIONS)} in any case, subfolders included"
        )
    return found


def find_labelled(
    folder: str, extensions: tuple[str, ...], flag: str
) -> tuple[list[str], list[str]]:
    """Paths and class names of a folder with one subfolder per class; files may lie deeper inside it.

    flag: where the folder was given, for messages. Raises UserError for a class without files.
    """
    _check_folder(folder, flag)
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(f"{flag} {folder} has no subfolders: give each class one")
    paths, labels = [], []
    for name in names:
        found = _walk(os.path.join(folder, name), extensions)
        if not found:
            raise UserError(
                f"class folder {os.path.join(folder, name)} holds none of {' '.join(extensions)}: fill it or remove it"
            )
        paths += found
        labels += [name] * len(found)
    return paths, labels


def class_names(labels: list[str]) -> list[str]:
    """The class of each number 0, 1, ...: the labels, sorted. Labels that are all whole numbers keep their value as number."""
    distinct = sorted(set(labels))
    if all(label.isdecimal() and label == str(int(label)) for label in distinct):  # 7, but not 007
        return [str(number) for number in range(max(map(int, distinct)) + 1)]
    return distinct


def class_numbers(labels: list[str], classes: list[str], source: str) -> list[int]:
    """The numbers of labels. Raises UserError for a label that is no class; `source` names where they come from."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(labels) - numbers.keys())
    if unknown:
        known = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise UserError(
            f"{source}: unknown class {unknown[0]!r}; the training set's {len(classes)} classes are {known}"
        )
    return [numbers[label] for label in labels]


def keep_fraction(paths: list[str], share: float) -> list[str]:
    """The first ceil(n * share) paths."""
    return paths[: math.ceil(len(paths) * share)]


def write_manifest(path: str | Path, paths: list[str], labels: list[str] | None = None) -> None:
    """Write a manifest (columns path and, if given, label), by way of a temporary file; makes the folder."""
    import pandas as pd

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
    labelled = all(
        len(row) == 2 and row[0] and row[1] and not set(row[1]) & set("/.") for row in rows
    )
    return " " if rows and labelled else ","


def read_manifest(path: str | Path) -> tuple[list[str], list[str]]:
    """Paths and labels ("" where there are none) of a manifest: path[,label] per line.

    Separated by comma, tab or space, with or without a header, fields may be quoted; relative paths count from the
    manifest's folder. Whether the videos exist is not checked. Raises UserError with file and line for a malformed row.
    """
    import pandas as pd

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"manifest {path} not found: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"manifest {path} cannot be read ({error}): it must be a text file in UTF-8"
        ) from None
    lines = text.splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    if not numbers:
        raise UserError(f"manifest {path} is empty: give one video a line, path or path,label")
    separator = _separator([lines[number - 1] for number in numbers[:20]])
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
            f"manifest {path}: {reason}; one video a line, path or path,label"
        ) from None
    table = table.fillna("").apply(lambda column: column.str.strip())
    table.index += 1  # line numbers
    table = table[(table != "").any(axis=1)]
    if table.iloc[0]["path"].lower() in HEADER_NAMES:
        table = table.iloc[1:]
    problems = {
        "more than two fields (quote a path that holds the separator)": table["rest"] != "",
        "no path": table["path"] == "",
        "a URL or protocol, not a file (download it first)": table["path"].str.match(
            r"[A-Za-z][A-Za-z0-9+.-]+:"
        ),
    }
    for problem, rows in problems.items():
        if rows.any():
            raise UserError(
                f"manifest {path}, line {rows.idxmax()}: {problem}: {lines[rows.idxmax() - 1][:120]!r}"
            )
    if table.empty:
        raise UserError(f"manifest {path} has a header and no videos")
    folder = os.path.dirname(os.path.abspath(path))
    paths = [
        item if os.path.isabs(item) else os.path.normpath(os.path.join(folder, item))
        for item in table["path"]
    ]
    return paths, table["label"].tolist()


def keep_stratified(labels: list[int], share: float, seed: int) -> list[int]:
    """Places of a random part of the samples, sorted: of each class ceil(n * share), the same for the same seed."""
    labels, generator = np.array(labels), np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        kept += generator.permutation(places)[: math.ceil(len(places) * share)].tolist()
    return sorted(kept)


def check_classes(train: list[str], val: list[str], num_classes: int, val_source: str) -> list[str]:
    """The class names of a training set, which the validation set must share. Raises UserError for a class that it lacks or
    that is unknown, and for more classes than --num_classes; says so when that is larger."""
    classes = class_names(train)
    class_numbers(val, classes, val_source)
    absent = sorted(set(train) - set(val))
    if absent:
        raise UserError(
            f"{val_source}: no sample of class {absent[0]!r}, which the training set has ({len(absent)} such classes): add some"
        )
    if len(classes) > num_classes:
        raise UserError(
            f"the training set has {len(classes)} classes, --num_classes is {num_classes}: raise it to {len(classes)}"
        )
    if len(classes) < num_classes:
        print0(
            f"note: --num_classes {num_classes} is larger than the {len(classes)} classes of the training set; the rest stays unused"
        )
    return classes


def write_classes(path: Path, classes: list[str]) -> None:
    """The class names as a JSON list, number 0 first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(classes, indent=0, ensure_ascii=False) + "\n")


def from_kinetics(annotations: str, files: dict[str, str]):
    """A table of the videos (id, path, label) of a Kinetics split: a CSV with label, youtube_id and perhaps time_start, time_end (seconds).

    files: path by name without extension. A video is called YOUTUBEID_START_END (six digits each) or YOUTUBEID.
    """
    import pandas as pd

    table = _annotations(
        annotations,
        lambda file: pd.read_csv(file, dtype=str, keep_default_na=False),
        {"label", "youtube_id"},
    )
    clip = table["youtube_id"]
    for column in ("time_start", "time_end"):
        clip = clip + ("_" + table[column].str.zfill(6) if column in table else "")
    path = clip.map(files).fillna(table["youtube_id"].map(files)).fillna("")
    return pd.DataFrame({"id": clip, "path": path, "label": table["label"]})


def from_ssv2(annotations: str, files: dict[str, str]):
    """A table of the videos (id, path, label) of a Something-Something v2 split: JSON records with id and template.

    files: path by name without extension; a video is called by its id. The label is the template without its brackets.
    """
    import pandas as pd

    table = _annotations(
        annotations,
        lambda file: pd.DataFrame(json.loads(Path(file).read_text("utf-8"))),
        {"id", "template"},
    ).astype(str)
    label = table["template"].str.replace(r"[\[\]]", "", regex=True)
    return pd.DataFrame(
        {"id": table["id"], "path": table["id"].map(files).fillna(""), "label": label}
    )


def _annotations(path: str, read, columns: set[str]):
    """An annotation file as a table. Raises UserError if it cannot be read or lacks a column."""
    try:
        table = read(path)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(
            f"annotations {path} cannot be read: {str(error).splitlines()[0]}"
        ) from None
    if missing := columns - set(table.columns):
        raise UserError(
            f"annotations {path} have no {', '.join(sorted(missing))}: check the file, and --from"
        )
    return table


OFFICIAL = {"kinetics": from_kinetics, "ssv2": from_ssv2}


def official(argv: list[str]) -> None:
    """The command line with --from: an official annotation file to a manifest, and a list of what is missing."""
    parser = Parser(
        "Turn an official annotation file into a manifest (path,label).",
        prog="python -m data.index",
    )
    parser.add_argument(
        "--from", dest="source", choices=OFFICIAL, required=True, help="the dataset"
    )
    parser.add_argument(
        "annotations",
        help="the official file of one split (Kinetics: .csv, Something-Something v2: .json)",
    )
    parser.add_argument("videos", help="folder of the videos, searched recursively")
    parser.add_argument("output", help="the manifest to write")
    args = parser.parse_args(argv)
    _check_folder(args.videos, "VIDEOS")
    table = OFFICIAL[args.source](
        args.annotations, {Path(path).stem: path for path in _walk(args.videos, VIDEO_EXTENSIONS)}
    )
    here, missing = table[table["path"] != ""], table[table["path"] == ""]
    if here.empty:
        raise UserError(
            f"none of the {len(table)} videos of {args.annotations} lies below {args.videos}: check the folder"
        )
    write_manifest(args.output, here["path"].tolist(), here["label"].tolist())
    print0(f"{args.output}: {len(here)} of {len(table)} videos, {table['label'].nunique()} classes")
    if len(missing):
        listing = Path(args.output).with_suffix(".missing.csv")
        missing[["id", "label"]].to_csv(listing, index=False)
        print0(f"{listing}: the {len(missing)} videos without a file")


def main(argv: list[str] | None = None) -> None:
    """`python -m data.index`: with --from the conversion of official annotations, else the data doctor (data/doctor.py)."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--from" for word in argv):
        official(argv)
    else:
        from data import doctor

        doctor.main(argv)


if __name__ == "__main__":
    run_script(main)
