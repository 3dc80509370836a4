"""Official annotation files of data sets: their videos, labels, and the order of the classes.

Readers return a table of strings with the columns name and label. A name is that of a video's file
without its extension, with the folder of the file where the annotations give it. For parts of
videos there are the columns start and end, in seconds.
"""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from data.manifest import read_manifest
from util.class_names import read_class_names
from util.dist import UserError

HMDB51_PARTS = {"train": "1", "test": "2"}  # 0: a video that the split leaves out


def read_kinetics(path: str) -> pd.DataFrame:
    """Return the videos of a Kinetics split: ID_START_END in seconds of six digits each.

    The column other_name has the ID alone, which a file may be named by, if it has one row.
    """
    table = _read_table(path, _read_csv, {"label", "youtube_id"}, "kinetics")
    identifier = table["youtube_id"]
    name = identifier
    for column in ("time_start", "time_end"):
        if column in table:
            name = name + "_" + table[column].str.zfill(6)
    other_name = identifier.where(~identifier.duplicated(keep=False), "")
    return pd.DataFrame({"name": name, "label": table["label"], "other_name": other_name})


def read_ssv2(path: str) -> pd.DataFrame:
    """Return the videos of Something-Something v2; a label is the template without brackets."""
    if _first_character(path) in "[{":
        table = _read_table(path, _read_json, {"id", "template"}, "ssv2").astype(str)
    else:
        table = _read_semicolons(path, "ssv2").rename(columns={"name": "id", "label": "template"})
    label = table["template"].str.replace(r"[\[\]]", "", regex=True)
    return pd.DataFrame({"name": table["id"], "label": label})


def read_ucf101(path: str) -> pd.DataFrame:
    """Return the videos of trainlist01.txt or testlist01.txt; a label is a video's folder.

    The column number has the class number, from 1, that train lists give, else "".
    """
    matches = _match_lines(path, r"((\w+)/\S+)\.\w+(?:\s+(\d+))?", "ucf101")
    rows = [(match[1], match[2], match[3] or "") for match in matches]
    return pd.DataFrame(rows, columns=["name", "label", "number"])


def read_hmdb51(folder: str, split: str) -> pd.DataFrame:
    """Return the videos of a split, such as train1, from the files CLASS_test_split1.txt."""
    part, number = split[:-1], split[-1]
    ending = f"_test_split{number}.txt"
    files = sorted(Path(folder).glob(f"*{ending}"))
    if not files:
        raise UserError(f"annotations {folder} have no files CLASS{ending}. {reads_only('hmdb51')}")
    rows = []
    for file in files:
        label = file.name.removesuffix(ending)
        for match in _match_lines(str(file), r"(.+)\.\w+\s+([012])", "hmdb51"):
            if match[2] == HMDB51_PARTS[part]:
                rows.append((f"{label}/{match[1]}", label))
    return pd.DataFrame(rows, columns=["name", "label"])


def read_diving48(path: str) -> pd.DataFrame:
    """Return the videos of Diving48; the labels are the class numbers."""
    table = _read_table(path, _read_json, {"vid_name", "label"}, "diving48").astype(str)
    return pd.DataFrame({"name": table["vid_name"], "label": table["label"]})


def read_jester(path: str) -> pd.DataFrame:
    """Return the videos of a Jester split."""
    return _read_semicolons(path, "jester")


def read_epic(path: str, column: str) -> pd.DataFrame:
    """Return the actions of a split of EPIC-Kitchens-100; a label is the number in a column.

    The columns are verb_class and noun_class, which the test split lacks.
    """
    source = "epic_verb" if column == "verb_class" else "epic_noun"
    stamps = ["start_timestamp", "stop_timestamp"]
    table = _read_table(path, _read_csv, {"video_id", *stamps}, source)
    columns = {"name": table["video_id"], "label": table.get(column, "")}
    for name, stamp in zip(("start", "end"), stamps, strict=True):
        seconds = pd.to_timedelta(table[stamp], errors="coerce").dt.total_seconds()
        if seconds.isna().any():
            row = int(seconds.isna().argmax())
            error = ValueError(f"{stamp} {table[stamp][row]!r} in row {row} is no HH:MM:SS.ss")
            raise _unreadable(path, error, source)
        columns[name] = seconds
    return pd.DataFrame(columns)


def read_imagenet(path: str) -> pd.DataFrame:
    """Return the images of LOC_val_solution.csv; a label is a synset, such as n01440764."""
    if re.fullmatch(r"\d+", _first_line(path)):
        raise UserError(
            f"annotations {path} have numbers from 1 to 1000 in the order of the devkit's "
            "meta.mat, which is not that of the sorted synsets. Use LOC_val_solution.csv."
        )
    table = _read_table(path, _read_csv, {"ImageId", "PredictionString"}, "imagenet")
    label = table["PredictionString"].str.partition(" ")[0]
    return pd.DataFrame({"name": table["ImageId"], "label": label})


def read_videomae(path: str) -> pd.DataFrame:
    """Return the videos of a list of VideoMAE, mae_st or optimized-stmae: path and number."""
    samples = read_manifest(path)
    names = [os.path.splitext(video)[0] for video in samples.paths]
    return pd.DataFrame({"name": names, "label": samples.labels})


def read_classind(path: str) -> list[str]:
    """Return the class names of UCF101's classInd.txt, which counts from 1."""
    matches = _match_lines(path, r"(\d+)\s+(\w+)", "ucf101")
    numbers = [int(match[1]) for match in matches]
    if numbers != list(range(1, len(matches) + 1)):
        raise UserError(f"{path} does not number its classes from 1, in order. Pass classInd.txt.")
    return [match[2] for match in matches]


def read_epic_classes(path: str) -> list[str]:
    """Return the class names of EPIC_100_verb_classes.csv or EPIC_100_noun_classes.csv."""
    table = _read_table(path, _read_csv, {"id", "key"}, "epic_verb")
    if table["id"].tolist() != [str(number) for number in range(len(table))]:
        raise UserError(f"{path} does not number its classes from 0, in order.")
    return table["key"].tolist()


def read_synsets(path: str) -> list[str]:
    """Return the sorted synsets of LOC_synset_mapping.txt: the first word of each line."""
    return sorted(match[1] for match in _match_lines(path, r"(n\d{8})\s.*", "imagenet"))


EPIC_FILES = "EPIC_100_train.csv with video_id, start_timestamp, stop_timestamp, verb_class"


class DataSet(NamedTuple):
    """How the annotations of a data set are read."""

    read: Callable[..., pd.DataFrame]
    files: str  # the annotation files, for messages
    class_file: str = ""  # the usual name of the file that numbers the classes
    read_classes: Callable[[str], list[str]] = read_class_names
    needs_classes: bool = False  # the numbers cannot be found without that file


DATA_SETS = {
    "kinetics": DataSet(read_kinetics, "train.csv or val.csv with label and youtube_id"),
    "ssv2": DataSet(
        read_ssv2,
        "train.json or validation.json with id and template, or test-answers.csv (id;template)",
        "labels.json",
    ),
    "ucf101": DataSet(
        read_ucf101,
        "trainlist01.txt or testlist01.txt (Class/v_Class_g01_c01.avi), with classInd.txt",
        "classInd.txt",
        read_classind,
        needs_classes=True,
    ),
    "hmdb51": DataSet(read_hmdb51, "the folder of CLASS_test_split1.txt (FILE.avi 1)"),
    "diving48": DataSet(read_diving48, "Diving48_V2_train.json with vid_name and label"),
    "jester": DataSet(
        read_jester,
        "jester-v1-train.csv or jester-v1-validation.csv (id;label), with jester-v1-labels.csv",
        "jester-v1-labels.csv",
        needs_classes=True,
    ),
    "epic_verb": DataSet(
        partial(read_epic, column="verb_class"),
        EPIC_FILES,
        "EPIC_100_verb_classes.csv",
        read_epic_classes,
    ),
    "epic_noun": DataSet(
        partial(read_epic, column="noun_class"),
        EPIC_FILES,
        "EPIC_100_noun_classes.csv",
        read_epic_classes,
    ),
    "imagenet": DataSet(
        read_imagenet,
        "LOC_val_solution.csv with ImageId and PredictionString, and LOC_synset_mapping.txt",
        "LOC_synset_mapping.txt",
        read_synsets,
    ),
    "videomae": DataSet(read_videomae, "a list of paths and class numbers"),
}


def reads_only(source: str) -> str:
    """Return the sentence that names the files which --from SOURCE reads."""
    return f"--from {source} reads {DATA_SETS[source].files}."


def load_classes(source: str, annotations: str, class_names: str) -> list[str] | None:
    """Return the class names in their official order, None if no file numbers them.

    class_names: the file to read, "" for that of the usual name beside the annotations. A list in
    JSON, such as this tool writes, serves for every data set. Raises UserError.
    """
    data_set = DATA_SETS[source]
    if class_names.endswith(".json"):
        return read_class_names(class_names)
    if class_names:
        return data_set.read_classes(class_names)
    if data_set.class_file:
        beside = Path(annotations).parent / data_set.class_file
        if beside.exists():
            return data_set.read_classes(str(beside))
    if data_set.needs_classes:
        raise UserError(
            f"--from {source} needs {data_set.class_file}, which numbers the classes: "
            f"put it beside {annotations}, or pass --class_names FILE"
        )
    return None


def _read_table(
    path: str, read: Callable[[str], pd.DataFrame], columns: set[str], source: str
) -> pd.DataFrame:
    """Return read(path). Raises UserError if the file cannot be read, or lacks a column or rows."""
    try:
        table = read(path)
    except (OSError, ValueError) as error:  # the errors of pandas and json are ValueErrors
        raise _unreadable(path, error, source) from None
    missing = columns - set(table.columns)
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"annotations {path} have no {names}. {reads_only(source)}")
    return table


def _unreadable(path: str, error: Exception, source: str) -> UserError:
    """Return the error for annotations that cannot be read."""
    reason = str(error).splitlines()[0]
    return UserError(f"annotations {path} cannot be read: {reason}. {reads_only(source)}")


def _read_csv(path: str) -> pd.DataFrame:
    """Return a CSV file as a table of strings, "NA" and empty fields included."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _read_json(path: str) -> pd.DataFrame:
    """Return a JSON list of records as a table. Raises ValueError for other JSON."""
    records = json.loads(Path(path).read_text("utf-8-sig"))
    if not isinstance(records, list) or not all(isinstance(row, dict) for row in records):
        raise ValueError("not a list of records")
    return pd.DataFrame(records)


def _read_semicolons(path: str, source: str) -> pd.DataFrame:
    """Return the rows name;label of a file. Raises UserError."""
    matches = _match_lines(path, r"(\d+);(.+)", source)
    return pd.DataFrame([(match[1], match[2]) for match in matches], columns=["name", "label"])


def _match_lines(path: str, pattern: str, source: str) -> list[re.Match]:
    """Return the match of each line that is not blank. Raises UserError for another line."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error, source) from None
    matches = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(pattern, line.strip())
        if match is None:
            raise UserError(f"{path}, line {number}: {line[:80]!r}. {reads_only(source)}")
        matches.append(match)
    return matches


def _first_line(path: str) -> str:
    """Return the first line of a file, stripped; "" if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.readline(1000).strip()
    except OSError:
        return ""


def _first_character(path: str) -> str:
    """Return the first character of a file that is not a space; "[" if there is none."""
    return _first_line(path)[:1] or "["
