"""Make a manifest (path,label[,start,end]) from the official annotation files of a data set.

    python -m tools.make_manifest --from kinetics train.csv VIDEOS out.csv
    python -m tools.make_manifest --from ssv2 train.json VIDEOS out.csv
    python -m tools.make_manifest --from ucf101 trainlist01.txt VIDEOS out.csv
    python -m tools.make_manifest --from hmdb51 SPLITS VIDEOS out.csv --split train1
    python -m tools.make_manifest --from epic_verb EPIC_100_train.csv VIDEOS out.csv
    python -m tools.make_manifest --from folders VIDEOS out.csv
    python -m tools.make_manifest --from folders VIDEOS out.csv --segment_seconds 10
    python -m tools.make_manifest --from frame_folders VIDEOS out.csv

VIDEOS is searched recursively. The labels are class names; out_classes.json lists them in their
official order, for --class_names of the finetuning scripts. Videos without a file are listed in
out.missing.csv. See docs/data.md.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd

from data.clips import check_spans
from data.frame_folder import check_frame_folders
from data.manifest import (
    IMAGE_EXTENSIONS,
    NO_SPAN,
    VIDEO_EXTENSIONS,
    Samples,
    check_folder,
    class_names,
    find_labeled,
    find_videos,
    is_image,
    walk,
    write_classes,
    write_manifest,
)
from data.spans import index_durations, split_duration
from data.video_index import distinct, index_path
from tools.annotations import DATA_SETS, load_classes, reads_only
from tools.data_doctor import build_index
from tools.reading import check_seconds
from util.args import add_frames_fps
from util.cli import Parser, positive_float, positive_int
from util.dist import UserError, available_cpus, print0, run_script
from util.files import save_csv

# Values of --from for plain folders, which need no annotations.
FOLDERS = "folders"
FRAME_FOLDERS = "frame_folders"
WITHOUT_ANNOTATIONS = (FOLDERS, FRAME_FOLDERS)
LARGEST_FPS = 30  # frames/s, by which --segment_seconds must be at least half a frame
READ_SECONDS = 60  # that a file may take, with --segment_seconds
SPLITS = [f"{part}{number}" for number in (1, 2, 3) for part in ("train", "test")]


def get_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(__doc__, prog="python -m tools.make_manifest")
    parser.add_argument(
        "--from",
        dest="source",
        choices=(*DATA_SETS, *WITHOUT_ANNOTATIONS),
        required=True,
        help="the data set",
    )
    parser.add_argument(
        "annotations", help="its annotations (not with --from folders, frame_folders)"
    )
    parser.add_argument("videos", help="folder of the videos or images, searched recursively")
    parser.add_argument("output", nargs="?", help="the manifest to write")
    parser.add_argument(
        "--class_names",
        metavar="FILE",
        default="",
        help="the file that numbers the classes (default: that of the data set's own name beside "
        "the annotations: labels.json, classInd.txt, ...)",
    )
    parser.add_argument("--split", choices=SPLITS, help="of HMDB51")
    parser.add_argument(
        "--segment_seconds",
        type=positive_float,
        metavar="S",
        help="cut each video into samples of about S seconds; reads all files, and writes their "
        "index for training (default: whole videos)",
    )
    add_frames_fps(parser)
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=available_cpus(),
        help="processes for --segment_seconds (default: the cores, %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not fit the data set."""
    plain = args.source in WITHOUT_ANNOTATIONS
    if plain == (args.output is not None):
        expected = "VIDEOS OUTPUT" if plain else "ANNOTATIONS VIDEOS OUTPUT"
        raise UserError(f"--from {args.source} takes {expected}")
    if plain and args.class_names:
        raise UserError(
            f"--class_names has no use with --from {args.source}: folders are the classes"
        )
    if args.source == "hmdb51" and args.split is None:
        raise UserError(f"--from hmdb51 needs --split, one of {', '.join(SPLITS)}")
    check_seconds("segment_seconds", args.segment_seconds, LARGEST_FPS)
    if args.frames_fps is not None and args.segment_seconds is None:
        raise UserError(
            "--frames_fps is needed for --segment_seconds only: pass it to the scripts instead"
        )
    if args.source != "hmdb51" and args.split is not None:
        raise UserError(f"--split has no use with --from {args.source}: give the split's own file")


def output_files(output: str, inputs: list[str], overwrite: bool) -> tuple[Path, Path, Path]:
    """Return the paths of the manifest, the list of classes and the list of missing videos.

    Raises UserError if one exists, unless `overwrite`, or is one of the inputs.
    """
    manifest = Path(output)
    files = (
        manifest,
        manifest.with_name(f"{manifest.stem}_classes.json"),
        manifest.with_suffix(".missing.csv"),
    )
    for file in files:
        if any(os.path.exists(name) and file.exists() and file.samefile(name) for name in inputs):
            raise UserError(f"{file} is an input. Choose another name for the manifest.")
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists. Choose another name, or pass --overwrite.")
    return files


def files_by_stem(folder: str, extensions: tuple[str, ...], frames: bool) -> dict[str, list[str]]:
    """Return the files below a folder by their names without extension. frames: see `walk`."""
    by_stem: dict[str, list[str]] = {}
    for path in walk(folder, extensions, frames):
        by_stem.setdefault(Path(path).stem, []).append(path)
    return by_stem


def common_folders(path: str, wanted: list[str]) -> int:
    """Return how many folders of a path, from its file upwards, are those of `wanted`."""
    folders = Path(path).parts[-2::-1]
    count = 0
    for folder, name in zip(folders, wanted, strict=False):
        if folder != name:
            break
        count += 1
    return count


def best_files(name: str, label: str, candidates: list[str], need_folder: bool) -> list[str]:
    """Return the candidates whose folders are most like those of `name`; several are copies.

    A name without a folder is looked for in the folder of its class. need_folder: a file in
    another folder than that of `name` is a different one.
    """
    wanted = list(Path(name).parts[-2::-1]) or [label]
    common = [common_folders(path, wanted) for path in candidates]
    most = max(common, default=0)
    if need_folder and most == 0:
        return []
    return [path for path, count in zip(candidates, common, strict=True) if count == most]


def find_files(
    table: pd.DataFrame, folder: str, extensions: tuple[str, ...], frames: bool = False
) -> list[str]:
    """Return the file of each row of a table of annotations below a folder, "" for none.

    frames: see `walk`. Prints a note if there are several for a row.
    """
    by_stem = files_by_stem(folder, extensions, frames)
    stems = table["name"].map(os.path.basename)
    need_folder = table["name"].str.contains("/") & stems.duplicated(keep=False)
    other_names = table.get("other_name", stems)
    found = []
    copied = []
    columns = (table["name"], table["label"], stems, need_folder, other_names)
    for name, label, stem, strict, other_name in zip(*columns, strict=True):
        candidates = by_stem.get(stem) or by_stem.get(other_name, [])
        best = best_files(name, label, candidates, strict)
        found.append(best[0] if best else "")
        if len(best) > 1:
            copied.append(best)
    if copied:
        print0(
            f"note: {len(copied)} rows have several files, of which the first is taken, "
            f"such as {' and '.join(copied[0])}"
        )
    return found


def annotated_files(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str] | None]:
    """Return the table name, label, path, and the class names in official order or None."""
    data_set = DATA_SETS[args.source]
    more = [args.split] if args.split else []
    table = data_set.read(args.annotations, *more)
    if table.empty:
        raise UserError(f"annotations {args.annotations} are empty. {reads_only(args.source)}")
    classes = load_classes(args.source, args.annotations, args.class_names)
    table, classes = with_class_names(table, classes, args)
    check_folder(args.videos, "VIDEOS")
    extensions: tuple[str, ...] = VIDEO_EXTENSIONS
    if args.source == "imagenet":
        extensions = IMAGE_EXTENSIONS
    table["path"] = find_files(table, args.videos, extensions)
    if args.source != "imagenet":
        add_frame_folders(table, args.videos)
    if (table["path"] == "").all():
        raise UserError(nothing_found(table, args))
    return table, classes


def add_frame_folders(table: pd.DataFrame, folder: str) -> None:
    """Set the paths of rows without a file to the folders of their frames, and print their number.

    A folder is looked for like a file, by its name.
    """
    absent = table["path"] == ""
    if not absent.any():
        return
    table.loc[absent, "path"] = find_files(table[absent], folder, (), frames=True)
    count = int((table["path"][absent] != "").sum())
    if count:
        print0(f"note: {count} videos are folders of frames. Training on them needs --frames_fps.")


def with_class_names(
    table: pd.DataFrame, classes: list[str] | None, args: argparse.Namespace
) -> tuple[pd.DataFrame, list[str] | None]:
    """Return a table whose labels are names of `classes`, and these in their official order.

    Without a list they are the sorted labels, or for numbers all up to the largest; None for
    Something-Something, whose order is neither. Raises UserError for a label that is not in
    the list.
    """
    labels = table["label"]
    unlabeled = labels == ""
    if unlabeled.all():
        return table, None
    if unlabeled.any():
        name = table["name"][unlabeled].iloc[0]
        raise UserError(f"annotations {args.annotations}: {name} has no label, others have one")
    if classes is None:
        return table, None if args.source == "ssv2" else class_names(labels.tolist())
    if not set(labels) <= set(classes) and labels.str.fullmatch("[0-9]{1,6}").all():
        names = dict(enumerate(classes))
        labels = labels.map(lambda number: names.get(int(number), number))
    foreign = labels[~labels.isin(classes)]
    if len(foreign):
        raise UserError(
            f"annotations {args.annotations}: class {foreign.iloc[0]!r} is none of the "
            f"{len(classes)} in the list of classes ({classes[0]!r}, ...). "
            "Check that both files belong to the same data set."
        )
    check_numbers(table, classes, args.annotations)
    return table.assign(label=labels), classes


def check_numbers(table: pd.DataFrame, classes: list[str], annotations: str) -> None:
    """Raise UserError if class numbers from 1 in the annotations contradict the list of classes."""
    if "number" not in table:
        return
    numbers = {name: str(number) for number, name in enumerate(classes, 1)}
    expected = table["label"].map(numbers)
    wrong = table[(table["number"] != "") & (table["number"] != expected)]
    if len(wrong):
        first = wrong.iloc[0]
        raise UserError(
            f"annotations {annotations} give class {first['label']} the number {first['number']}, "
            f"the list of classes {numbers[first['label']]}. Use the files of one download."
        )


def nothing_found(table: pd.DataFrame, args: argparse.Namespace) -> str:
    """Return the message for annotations of which no file exists."""
    message = f"none of the {len(table)} videos of {args.annotations} is below {args.videos}. "
    return message + "Check the folder."


def labeled_folders(folder: str, frames: bool) -> pd.DataFrame:
    """Return the table path, label of a folder with one subfolder per class.

    The videos of a folder without subfolders have no labels. frames: see `walk`; otherwise images
    are samples if there are no videos. Raises UserError.
    """
    check_folder(folder, "VIDEOS")
    if not frames and not any(entry.is_dir() for entry in os.scandir(folder)):
        return pd.DataFrame({"path": find_videos([folder], "VIDEOS"), "label": ""})
    extensions: tuple[str, ...] = VIDEO_EXTENSIONS
    if not frames and not walk(folder, VIDEO_EXTENSIONS):
        extensions = IMAGE_EXTENSIONS
    samples = find_labeled(folder, extensions, "VIDEOS", frames)
    return pd.DataFrame({"path": samples.paths, "label": samples.labels})


def summary(table: pd.DataFrame, found: pd.DataFrame, classes: list[str] | None) -> str:
    """Return how many videos and classes were found, and the smallest and largest class."""
    text = f"{len(found)} of {len(table)} files"
    if (found["label"] == "").all():
        return f"{text}, without labels"
    names = classes or class_names(table["label"].tolist())
    counts = found["label"].value_counts().reindex(names, fill_value=0)
    return (
        f"{text}, {len(names)} classes, from {counts.min()} ({counts.idxmin()}) "
        f"to {counts.max()} ({counts.idxmax()}) files"
    )


def cut_videos(samples: Samples, target: Path, args: argparse.Namespace) -> Samples:
    """Return the parts of --segment_seconds of all videos. Writes the videos' index to `target`.

    An unreadable video stays a single sample, which training lists. Raises UserError if the
    annotations have parts already.
    """
    if samples.spans is not None:
        raise UserError(
            f"--segment_seconds cuts whole videos, but {args.annotations} gives parts of videos. "
            "Drop it."
        )
    paths = distinct(samples.paths)
    if is_image(paths[0]):
        raise UserError(f"--segment_seconds is for videos, but {paths[0]} is an image. Drop it.")
    check_frame_folders(paths, args.frames_fps)
    index = build_index(paths, target, args.workers, READ_SECONDS, args.frames_fps)
    durations = index_durations(index)
    spans_of = {path: [NO_SPAN] for path in paths}
    for path, duration in zip(paths, durations, strict=True):
        if not np.isnan(duration):
            spans_of[path] = split_duration(duration, args.segment_seconds)
    rows = [i for i, path in enumerate(samples.paths) for _ in spans_of[path]]
    spans = [span for path in samples.paths for span in spans_of[path]]
    unreadable = int(np.isnan(durations).sum())
    print0(
        f"{len(spans)} parts of {len(paths)} videos, {np.nansum(durations) / 3600:.1f} hours, "
        f"{unreadable} of them unreadable"
    )
    return samples.select(rows)._replace(spans=np.array(spans))


def list_files(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str] | None]:
    """Return the table of files with their labels, and the class names in order or None."""
    if args.source not in WITHOUT_ANNOTATIONS:
        return annotated_files(args)
    table = labeled_folders(args.annotations, args.source == FRAME_FOLDERS)
    if (table["label"] == "").all():
        return table, None
    return table, class_names(table["label"].tolist())


def make_samples(found: pd.DataFrame, target: Path, args: argparse.Namespace) -> Samples:
    """Return the samples of a table of files, cut by --segment_seconds; see `cut_videos`."""
    samples = Samples(found["path"].tolist(), found["label"].tolist())
    if "start" in found:
        spans = check_spans(found[["start", "end"]].to_numpy(dtype=float), len(found))
        samples = samples._replace(spans=spans)
    if args.segment_seconds is not None:
        return cut_videos(samples, target, args)
    return samples


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input, or if no video is found."""
    args = get_parser().parse_args(argv)
    check_arguments(args)
    output = args.output or args.videos
    inputs = [args.annotations, args.class_names]
    manifest, class_list, listing = output_files(output, inputs, args.overwrite)
    table, classes = list_files(args)
    found = table[table["path"] != ""]
    missing = table[table["path"] == ""]
    print0(f"{manifest}: {summary(table, found, classes)}")
    samples = make_samples(found, index_path(manifest), args)
    write_manifest(manifest, samples)
    class_list.unlink(missing_ok=True)
    listing.unlink(missing_ok=True)
    if classes is not None:
        write_classes(class_list, classes)
        print0(
            f"{class_list}: {len(classes)} classes in the order of their numbers, for --class_names"
        )
    elif any(samples.labels):
        print0("note: no list of classes, since their order is in labels.json: pass --class_names")
    if len(missing):
        rows = missing[["name", "label"]].rename(columns={"name": "id"})
        save_csv(rows, listing)
        print0(f"{listing}: the {len(missing)} rows without a file")


if __name__ == "__main__":
    run_script(main)
