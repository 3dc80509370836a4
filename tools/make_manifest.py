"""Make a manifest (path,label) from an official annotation file.

    python -m tools.make_manifest --from kinetics train.csv VIDEOS k400_train.csv
    python -m tools.make_manifest --from ssv2 train.json VIDEOS ssv2_train.csv

VIDEOS is searched recursively. Videos without a file are listed in OUTPUT.missing.csv.
See docs/data.md.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from data.manifest import VIDEO_EXTENSIONS, check_folder, walk, write_manifest
from util.cli import Parser
from util.dist import UserError, print0, run_script


def from_kinetics(annotations: str, files: dict[str, str]) -> pd.DataFrame:
    """Return the videos of a Kinetics split as a table with the columns id, path and label.

    annotations: a CSV file with label, youtube_id and perhaps time_start, time_end (seconds).
    files: {name without extension: path}. The name of a video is YOUTUBEID_START_END (six digits
    each) or YOUTUBEID; the path of a missing one is "". Raises UserError.
    """
    table = load_annotations(annotations, _read_csv, {"label", "youtube_id"})
    name = table["youtube_id"]
    for column in ("time_start", "time_end"):
        if column in table:
            name = name + "_" + table[column].str.zfill(6)
    path = name.map(files)
    path = path.fillna(table["youtube_id"].map(files))
    path = path.fillna("")
    label = table["label"]
    return pd.DataFrame({"id": name, "path": path, "label": label})


def from_ssv2(annotations: str, files: dict[str, str]) -> pd.DataFrame:
    """Return the videos of a Something-Something v2 split as a table: id, path and label.

    annotations: a JSON list of records with id and template. The label is the template without
    its brackets. files: {name without extension: path}; the name of a video is its id, and the
    path of a missing one is "". Raises UserError.
    """
    table = load_annotations(annotations, _read_json, {"id", "template"}).astype(str)
    name = table["id"]
    path = name.map(files)
    path = path.fillna("")
    label = table["template"].str.replace(r"[\[\]]", "", regex=True)
    return pd.DataFrame({"id": name, "path": path, "label": label})


FORMATS = {"kinetics": from_kinetics, "ssv2": from_ssv2}


def _read_csv(path: str) -> pd.DataFrame:
    """Return a CSV file as a table of strings, "NA" and empty fields included."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _read_json(path: str) -> pd.DataFrame:
    """Return a JSON list of records as a table."""
    text = Path(path).read_text("utf-8")
    records = json.loads(text)
    return pd.DataFrame(records)


def load_annotations(
    path: str,
    read: Callable[[str], pd.DataFrame],
    columns: set[str],
) -> pd.DataFrame:
    """Return read(path). Raises UserError if the file cannot be read or lacks a column."""
    try:
        table = read(path)
    except (OSError, ValueError) as error:  # the errors of pandas and json are ValueErrors
        reason = str(error).splitlines()[0]
        raise UserError(f"annotations {path} cannot be read: {reason}") from None
    missing = columns - set(table.columns)
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"annotations {path} have no {names}. Check the file, and --from.")
    return table


def get_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(__doc__, prog="python -m tools.make_manifest")
    parser.add_argument(
        "--from",
        dest="source",
        choices=FORMATS,
        required=True,
        help="the data set",
    )
    parser.add_argument(
        "annotations",
        help="the official file of one split (Kinetics: .csv, Something-Something v2: .json)",
    )
    parser.add_argument("videos", help="folder of the videos, searched recursively")
    parser.add_argument("output", help="the manifest to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input, or if no video is found."""
    args = get_parser().parse_args(argv)
    check_folder(args.videos, "VIDEOS")
    paths = walk(args.videos, VIDEO_EXTENSIONS)
    files = {Path(path).stem: path for path in paths}
    table = FORMATS[args.source](args.annotations, files)
    found = table[table["path"] != ""]
    missing = table[table["path"] == ""]
    if found.empty:
        raise UserError(
            f"none of the {len(table)} videos of {args.annotations} is below {args.videos}. "
            "Check the folder."
        )
    found_paths = found["path"].tolist()
    found_labels = found["label"].tolist()
    write_manifest(args.output, found_paths, found_labels)
    num_classes = table["label"].nunique()
    print0(f"{args.output}: {len(found)} of {len(table)} videos, {num_classes} classes")
    if len(missing):
        listing = Path(args.output).with_suffix(".missing.csv")
        missing[["id", "label"]].to_csv(listing, index=False)
        print0(f"{listing}: the {len(missing)} videos without a file")


if __name__ == "__main__":
    run_script(main)
