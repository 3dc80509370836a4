"""Manifests: which samples a dataset consists of, and their classes.

A manifest is a CSV file of one sample per line, path[,label[,start,end]]: a file, or the part of a
video between two times in seconds. Files are found in folders or listed in manifests. A label is a
class name; its index is its position in the list of classes. A column source, which only a header
can name, numbers the sources of a mixture from 0 on. n: number of samples.

Names are those of the file system: bytes that are not UTF-8 are surrogates in a str (os.fsdecode).
"""

import csv
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.frame_folder import has_frames
from util.dist import UserError, print0
from util.files import atomic_write, span_columns

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
COLUMNS = {  # names in a header
    "path": ("path", "video", "file", "filename", "filepath", "video_path", "name"),
    "label": ("label", "class", "target"),
    "start": ("start",),
    "end": ("end",),
    "source": ("source",),
}
WITHOUT_HEADER = ["path", "label", "start", "end"]
NO_SPAN = (0.0, math.inf)  # seconds: the whole file
SEPARATOR_ROWS = 20  # number of first rows by which the separator is recognized
SEPARATOR_CHARACTERS = 1 << 18  # these rows have fewer, since a path has at most 4,096 bytes
EXACT_START = '"path"'  # of a manifest whose fields are all quoted, as they are to be read
URL_START = r"[A-Za-z][A-Za-z0-9+.-]+:"
VIDEOMAE_VIDEO = ["0", "-1"]  # what follows the path of a video in VideoMAE v2's pretraining lists
SHOWN_CLASSES = 5  # class names in an error message
SHOWN_CHARACTERS = 120  # of a malformed line in an error message
FolderKey = tuple[int, int]  # see `_folder_key`


class Samples(NamedTuple):
    """The samples of a data set, in order."""

    paths: list[str]  # absolute; samples may share a file
    labels: list[str]  # class names, "" for none
    spans: np.ndarray | None = None  # (n, 2) start and end in seconds; None: all are whole files
    sources: np.ndarray | None = None  # (n,) index of each sample's source; None: they have one

    def select(self, indices: list[int] | range) -> "Samples":
        """Return the samples with these indices."""
        spans = None
        if self.spans is not None:
            spans = self.spans[list(indices)]
        sources = None
        if self.sources is not None:
            sources = self.sources[list(indices)]
        paths = [self.paths[i] for i in indices]
        return Samples(paths, [self.labels[i] for i in indices], spans, sources)


def part_name(path: str, span: tuple[float, float] | np.ndarray | None) -> str:
    """Return the name of a sample for lists of files: its path, and of a part also its times.

    The notation, a.mp4#t=8,8.5, is that of W3C's Media Fragments URI 1.0.
    """
    start, end = NO_SPAN if span is None else span
    if (start, end) == NO_SPAN:
        return path
    name = f"{path}#t={start:.10g}"
    return name if end == math.inf else f"{name},{end:.10g}"


def unlabeled(paths: list[str]) -> Samples:
    """Return samples of whole files without labels."""
    return Samples(paths, [""] * len(paths))


def describe_count(paths: list[str], spans: np.ndarray | None) -> str:
    """Return the number of samples in words. spans: (n, 2) seconds, None: whole videos."""
    if spans is None:
        return f"{len(paths)} videos"
    return f"{len(paths)} parts of {len(set(paths))} videos"


class Found(NamedTuple):
    """The files below a folder, in order."""

    paths: list[str]  # absolute paths of files, and of folders of frames if these are wanted
    unread: list[str]  # folders of frames that are not wanted
    repeated: list[str]  # folders left out, since they are or contain one that is searched


def walk(folder: str, extensions: tuple[str, ...], frames: bool = False) -> list[str]:
    """Return the absolute paths of the files below a folder with these extensions, sorted.

    Extensions match in any case. Hidden files and folders are left out. Links to folders are
    followed, but each real folder is searched once, at its first place; a note says if others are
    left out. frames: a folder of numbered frames is a path too, in place of all files in it. Raises
    UserError for such a folder that holds videos as well.
    """
    found = find_below(folder, extensions, frames, set())
    note_repeated(found.repeated)
    return found.paths


def find_below(
    folder: str, extensions: tuple[str, ...], frames: bool, searched: set[FolderKey]
) -> Found:
    """Return the paths of `walk`, and what is not among them.

    searched: folders to leave out, to which those below this one are added.
    """
    found = Found([], [], [])
    real_path = Path(os.path.realpath(folder))
    above = {_folder_key(str(parent)) for parent in real_path.parents}
    keys = {folder: _folder_key(folder)}  # of folders that the walk will come to
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        key = keys.pop(parent)
        if key in searched or key in above:
            found.repeated.append(os.path.abspath(parent))
            subfolders.clear()
            continue
        searched.add(key)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            path = os.path.join(parent, name)
            keys[path] = _folder_key(path)
        _add_files(found, os.path.abspath(parent), files, extensions, frames)
    return found


def _folder_key(path: str) -> FolderKey:
    """Return what is equal for all paths of one folder: its device and its number there."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _add_files(
    found: Found, folder: str, files: list[str], extensions: tuple[str, ...], frames: bool
) -> None:
    """Add the files of a folder, or a folder of frames itself, to what is found."""
    names = sorted(name for name in files if not name.startswith("."))
    if has_frames(names) and frames:
        _check_no_videos(folder, names)
        found.paths.append(folder)
        return
    wanted = [name for name in names if name.lower().endswith(extensions)]
    found.paths.extend(os.path.join(folder, name) for name in wanted)
    if not wanted and has_frames(names):
        found.unread.append(folder)


def _check_no_videos(folder: str, names: list[str]) -> None:
    """Raise UserError if a folder of frames holds videos as well. names: those of its files."""
    videos = [name for name in names if name.lower().endswith(VIDEO_EXTENSIONS)]
    if videos:
        raise UserError(
            f"folder {folder} holds numbered images and videos ({videos[0]}). Move the videos, "
            "or drop --frames_fps to leave out the images."
        )


def note_unread_frames(folders: list[str]) -> None:
    """Print a note about folders of frames that are left out, if there are any."""
    if folders:
        print0(
            f"note: {len(folders)} folders of numbered images are left out (first: {folders[0]}). "
            "Training with --frames_fps RATE reads each as a video."
        )


def note_repeated(folders: list[str]) -> None:
    """Print a note about folders that are searched at another place, if there are any."""
    if folders:
        print0(
            f"note: {len(folders)} folders are left out, since links lead to them twice or to a "
            f"folder above (first: {folders[0]})."
        )


def is_image(path: str) -> bool:
    """Return whether a file's name is that of an image."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


def check_folder(folder: str, flag: str) -> None:
    """Raise UserError unless `folder`, which was given as `flag`, is a folder."""
    if not os.path.exists(folder):
        raise UserError(f"folder {folder!r} not found: check {flag}")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder} is not a folder: give the folder that holds the files")


def find_videos(folders: list[str], flag: str, frames: bool = False) -> list[str]:
    """Return the absolute paths of all videos below the folders.

    The folders' order is kept; the videos of each folder are sorted. flag: how the folders were
    given, for messages. frames: see `walk`. Raises UserError if a folder does not exist or there
    are no videos.
    """
    found = []
    unread = []
    repeated = []
    searched: set[FolderKey] = set()
    for folder in folders:
        check_folder(folder, flag)
        below = find_below(folder, VIDEO_EXTENSIONS, frames, searched)
        found += below.paths
        unread += below.unread
        repeated += below.repeated
    note_unread_frames(unread)
    note_repeated(repeated)
    if not found:
        raise UserError(
            f"no videos below {', '.join(folders)}: check {flag} "
            f"(searched for {' '.join(VIDEO_EXTENSIONS)} in any case, subfolders included)"
        )
    return found


def find_labeled(
    folder: str, extensions: tuple[str, ...], flag: str, frames: bool = False
) -> Samples:
    """Return the files of a folder with one subfolder per class.

    Files may be nested more deeply. Links from one class to the folder of another are not followed.
    flag: how the folder was given, for messages. frames: see `walk`. Raises UserError for a class
    without files.
    """
    check_folder(folder, flag)
    entries = [entry for entry in os.scandir(folder) if entry.is_dir()]
    names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    if not names:
        raise UserError(f"{flag} {folder} has no subfolders: make one per class")
    class_folders = _class_folders(folder, names)
    searched = set(class_folders)
    found = Found([], [], [])
    labels = []
    for key, name in class_folders.items():
        class_folder = os.path.join(folder, name)
        searched.remove(key)
        below = find_below(class_folder, extensions, frames, searched)
        for collected, added in zip(found, below, strict=True):
            collected += added
        if not below.paths:
            break
        labels += [name] * len(below.paths)
    note_unread_frames(found.unread)
    note_repeated(found.repeated)
    if not below.paths:
        raise UserError(
            f"class folder {class_folder} has no files of {' '.join(extensions)}: "
            "add some or remove the folder"
        )
    return Samples(found.paths, labels)


def _class_folders(folder: str, names: list[str]) -> dict[FolderKey, str]:
    """Return the names of class folders by their keys. Raises UserError if two are one folder."""
    name_of: dict[FolderKey, str] = {}
    for name in names:
        key = _folder_key(os.path.join(folder, name))
        if key in name_of:
            raise UserError(
                f"class folders {name_of[key]} and {name} in {folder} are one folder: "
                "remove one of the links"
            )
        name_of[key] = name
    return name_of


def class_names(labels: list[str]) -> list[str]:
    """Return the class names in the order of their indices: the distinct labels, sorted.

    If all labels are whole numbers below a million (7, but not 007), each is its own index.
    """
    distinct = sorted(set(labels))
    if all(re.fullmatch("0|[1-9][0-9]{0,5}", label) for label in distinct):
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
    where the validation set comes from, for messages. Prints a note if the validation set lacks a
    class of the training set, as parts of downloads do. Raises UserError if either set has an
    unknown class.
    """
    classes = known_classes or class_names(train)
    class_indices(train, classes, "the training set")  # raises for an unknown class
    class_indices(val, classes, val_source)
    absent = sorted(set(train) - set(val))
    if absent:
        print0(
            f"note: {val_source} has no samples of {len(absent)} training classes "
            f"(first: {absent[0]!r}); their accuracy is not measured"
        )
    return classes


def write_classes(path: Path, classes: list[str]) -> None:
    """Write the class names as a JSON list in the order of their indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(classes, indent=0, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        # The surrogates of a name that is not UTF-8 become JSON's own escapes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def keep_fraction(samples: Samples, share: float) -> Samples:
    """Return the first ceil(n * share) of n samples, or of the n samples of each source."""
    if samples.sources is None:
        return samples.select(range(math.ceil(len(samples.paths) * share)))
    kept: list[int] = []
    for source in np.unique(samples.sources):
        indices = np.flatnonzero(samples.sources == source).tolist()
        kept += indices[: math.ceil(len(indices) * share)]
    return samples.select(sorted(kept))


def keep_stratified(labels: list[int], share: float, seed: int) -> list[int]:
    """Return the sorted indices of a random subset of the samples.

    Of the n samples of each class ceil(n * share) are kept, the same for the same seed.
    """
    return _keep_of_each_class(labels, lambda count: math.ceil(count * share), seed)


def keep_shots(labels: list[int], shots: int, seed: int) -> list[int]:
    """Return the sorted indices of `shots` random samples of each class; all if it has fewer.

    The same seed gives the same samples, and those of fewer shots are among those of more.
    """
    return _keep_of_each_class(labels, lambda count: min(count, shots), seed)


def keep_subset(labels: list[int], share: float, shots: int | None, seed: int) -> list[int]:
    """Return the sorted indices of the samples that --frac_retained or --shots keeps.

    labels: class indices. share: the value of --frac_retained, 1 for all. shots: that of --shots,
    or None. Prints a line about what is left. Raises UserError if both are given.
    """
    if shots is None:
        kept = keep_stratified(labels, share, seed)
        if len(kept) < len(labels):
            print0(
                f"--frac_retained {share}: {len(kept)} of {len(labels)} samples, "
                "at least one per class"
            )
        return kept
    if share < 1:
        raise UserError(
            f"--shots {shots} and --frac_retained {share} both choose a subset of the training "
            "set: pass one of them"
        )
    kept = keep_shots(labels, shots, seed)
    sizes = Counter(labels).values()
    print0(f"--shots {shots}: {len(kept)} of {len(labels)} samples of {len(sizes)} classes")
    fewer = sum(size < shots for size in sizes)
    if fewer:
        print0(f"note: {fewer} of the {len(sizes)} classes have fewer samples and keep all of them")
    return kept


def _keep_of_each_class(labels: list[int], kept_of: Callable[[int], int], seed: int) -> list[int]:
    """Return the sorted indices of kept_of(n) random samples of the n of each class.

    Every number of samples is the beginning of the same permutation, so a subset contains all
    smaller ones.
    """
    label_of = np.array(labels)
    generator = np.random.default_rng(seed)
    kept: list[int] = []
    for label in np.unique(label_of):
        indices = np.flatnonzero(label_of == label)
        kept += generator.permutation(indices)[: kept_of(len(indices))].tolist()
    return sorted(kept)


def write_manifest(path: str | Path, samples: Samples) -> None:
    """Write a manifest with the columns path and, if there are any, label, start, end, source.

    Make its folder. If a field has characters that a reader might drop or change, all fields are
    quoted.
    """
    header = ["path"]
    columns = [samples.paths]
    if any(samples.labels):
        header.append("label")
        columns.append(samples.labels)
    if samples.spans is not None:
        times = span_columns(samples.spans)
        header += times
        columns += times.values()
    if samples.sources is not None:
        header.append("source")
        columns.append(list(map(str, samples.sources.tolist())))
    rows = list(zip(*columns, strict=True))
    quoting: Literal[0, 1] = csv.QUOTE_MINIMAL
    if not all(_is_plain(field) for row in rows for field in row):
        quoting = csv.QUOTE_ALL
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, quoting=quoting, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _is_plain(field: str) -> bool:
    """Return whether a field has neither control characters, surrogates nor spaces around it."""
    return field.isprintable() and field == field.strip()


def read_manifest(path: str | Path) -> Samples:
    """Return the samples of a manifest, path[,label[,start,end]] per line.

    Fields are separated by comma, tab, semicolon or spaces and may be quoted. A header is optional;
    with one, columns have any order. Relative paths start at the manifest's folder. If all labels
    are whole numbers, 3.0 is 3. No start or end is that of the file. Whether the videos exist is
    not checked. Raises UserError with file and line for a malformed row.
    """
    text = _read_text(path)
    folder = os.path.dirname(os.path.abspath(path))
    rows = _parse_rows(text, _separator(text[:SEPARATOR_CHARACTERS]), path)
    first_rows = list(itertools.islice(rows, 2))
    columns = _header_columns(first_rows, folder, path)
    if columns is not None:
        del first_rows[0]
    if not first_rows:
        raise UserError(f"manifest {path} has a header but no videos: list one video per line")
    may_be_foreign = not (_is_utf8(text) or text.startswith(EXACT_START))
    paths = []
    labels = []
    spans = []
    sources = []
    for line, row in itertools.chain(first_rows, rows):
        fields = _fields(row, columns)
        problem = _row_problem(row, fields, folder, columns is not None)
        if may_be_foreign and not problem:
            problem = _encoding_problem(row, fields["path"], folder)
        if problem:
            raise UserError(f"manifest {path}, line {line}: {problem}: {_shown(row)}")
        paths.append(_absolute(fields["path"], folder))
        labels.append(fields.get("label", ""))
        spans.append(_parse_span(fields))
        sources.append(fields.get("source", ""))
    table = None
    if any(span != NO_SPAN for span in spans):
        table = np.array(spans)
    return Samples(paths, _whole_numbers(labels), table, _parse_sources(sources, path))


def read_labeled(path: str | Path, flag: str) -> Samples:
    """Return the samples of a manifest, given as `flag`, whose rows all have a label.

    Raises UserError, also for a row without one.
    """
    samples = read_manifest(path)
    if "" in samples.labels:
        name = samples.paths[samples.labels.index("")]
        raise UserError(f"{flag} {path}: {name} has no label: give path,label on each line")
    return samples


def _fields(row: list[str], columns: list[str] | None) -> dict[str, str]:
    """Return the fields of a row by column. columns: those of the header, None without one.

    Fields at the end of a row may be absent. Cuts VideoMAE's `PATH 0 -1` to the path.
    """
    if columns is None:
        if row[1:] == VIDEOMAE_VIDEO:
            del row[1:]
        columns = WITHOUT_HEADER
    return dict(zip(columns, row, strict=False))


def _parse_span(fields: dict[str, str]) -> tuple[float, float]:
    """Return start and end of a row in seconds, those of the file if absent.

    Raises ValueError if a field is not a number.
    """
    start, end = NO_SPAN
    if fields.get("start"):
        start = float(fields["start"])
    if fields.get("end"):
        end = float(fields["end"])
    return start, end


def _parse_sources(sources: list[str], path: str | Path) -> np.ndarray | None:
    """Return the column `source` of a manifest (n,), or None if it is empty. Raises UserError."""
    if not any(sources):
        return None
    numbers = {str(number) for number in range(len(set(sources)))}
    wrong = set(sources) - numbers
    if wrong:
        raise UserError(
            f"manifest {path}: source {min(wrong)!r} is not one of the numbers 0 to "
            f"{len(numbers) - 1}. Number the sources from 0 on without gaps, or drop the column."
        )
    return np.array(sources).astype(np.int64)


def _span_problem(fields: dict[str, str]) -> str:
    """Return what is wrong with start and end of a row, "" for nothing."""
    try:
        start, end = _parse_span(fields)
    except ValueError:
        return "start and end must be seconds, such as 12.5"
    if not 0 <= start < end:  # also if one is not a number
        return "the start must be 0 or more, and before the end (seconds)"
    if (start, end) != NO_SPAN and is_image(fields["path"]):
        return "an image has no start and end (leave them empty)"
    return ""


def _shown(row: list[str]) -> str:
    """Return a row for a message: in one line, and not too long."""
    return repr(",".join(row)[:SHOWN_CHARACTERS])


def _absolute(item: str, folder: str) -> str:
    """Return a path of a manifest, which is in `folder`, as an absolute path."""
    if os.path.isabs(item):
        return item
    return os.path.normpath(os.path.join(folder, item))


def _read_text(path: str | Path) -> str:
    """Return the text of a manifest. Raises UserError if it is unreadable or empty."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"manifest {path} not found: check the path") from None
    except OSError as error:
        raise UserError(
            f"manifest {path} cannot be read ({error}): give a text file in UTF-8"
        ) from None
    if b"\0" in content:
        raise UserError(
            f"manifest {path} cannot be read (it is binary or in UTF-16): give a text file in UTF-8"
        )
    text = content.decode("utf-8-sig", "surrogateescape")
    if not text.strip():
        raise UserError(f"manifest {path} is empty: list one video per line, path or path,label")
    return text


def _csv_reader(text: str, separator: str, strict: bool):
    """Return a csv.reader of a text; strict: raise csv.Error for a quote that is not closed."""
    lines = io.StringIO(text, newline="")  # keep the line ends within quotes
    return csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=strict)


def _separator(text: str) -> str:
    """Return the column separator of a manifest, recognized by its first rows.

    It is that of a known header, else the one by which all rows have a path and a label. For a
    semicolon the label must not be the name of a file, for spaces neither have slash nor dot unless
    it is a number. Rows may also have four fields of which the last two are numbers. Otherwise it
    is a comma or tab that occurs anywhere outside quotes. If there is none, there is one column,
    and the comma serves as well.
    """
    rows_by = {separator: _first_rows(text, separator) for separator in "\t,; "}
    for separator, rows in rows_by.items():
        header = rows[0]
        if len(header) > 1 and header[1].isidentifier() and "path" in _column_names(header):
            return separator
    for separator, rows in rows_by.items():
        if all(len(row) == 4 and _are_numbers(row[2:]) for row in rows):
            return separator
        if all(len(row) == 2 and _is_label(row[1], separator) for row in rows):
            return separator
    if all(len(row) == 3 and _are_integers(row[1:]) for row in rows_by[" "]):
        return " "  # a list of VideoMAE
    for separator in ",\t":
        if any(len(row) > 1 for row in rows_by[separator]):
            return separator
    return ","


def _first_rows(text: str, separator: str) -> list[list[str]]:
    """Return the first rows that are not blank; spaces at the end of a line are no field."""
    rows = filter(any, _csv_reader(text, separator, strict=False))
    first_rows = []
    try:
        for row in itertools.islice(rows, SEPARATOR_ROWS):
            if separator == " " and row[-1] == "":
                row.pop()
            first_rows.append(row)
    except csv.Error:  # a field without end: `_parse_rows` reports it
        first_rows.append([text[:SHOWN_CHARACTERS]])
    return first_rows


def _is_label(field: str, separator: str) -> bool:
    """Return whether the second field of a row can be a label, see `_separator`."""
    if separator == ";":
        return not field.lower().endswith(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)
    if separator == " ":
        return bool(re.fullmatch(r"[^/.]+|\d+\.\d*", field))
    return True


def _are_integers(fields: list[str]) -> bool:
    """Return whether all fields are integers."""
    return all(re.fullmatch(r"-?\d+", field) for field in fields)


def _are_numbers(fields: list[str]) -> bool:
    """Return whether all fields are numbers."""
    try:
        list(map(float, fields))
    except ValueError:
        return False
    return True


def _parse_rows(text: str, separator: str, path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank with their line numbers from 1.

    Empty fields at the end of a row are dropped. Spaces around fields are too, unless all fields
    are quoted. Raises UserError if the text cannot be parsed.
    """
    reader = _csv_reader(text, separator, strict=True)
    is_exact = text.startswith(EXACT_START)
    line = 1
    try:
        for row in reader:
            if not is_exact:
                row = [field.strip(" \t") for field in row]
            while row and row[-1] == "":
                row.pop()
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"manifest {path}, line {line}: {error}. Quote whole fields, and double the quotes "
            "inside them."
        ) from None


def _column_names(header: list[str]) -> list[str]:
    """Return which of COLUMNS each field of a header names, "" for none."""
    known = {name: column for column, names in COLUMNS.items() for name in names}
    return [known.get(field.lower(), "") for field in header]


def _header_columns(
    rows: list[tuple[int, list[str]]], folder: str, path: str | Path
) -> list[str] | None:
    """Return which of COLUMNS each column is, by a header; None if the first row is none.

    It is a header if its first field is a usual name of the path, or all are names of COLUMNS with
    the path among them. It also is if no file of the first field's name exists, nor could by its
    extension, while that of the second row does. Raises UserError for a column that is unknown or
    occurs twice.
    """
    header = rows[0][1]
    columns = _column_names(header)
    is_known = columns[0] == "path" or (all(columns) and "path" in columns)
    if not is_known and not _is_unknown_header(rows, folder):
        return None
    if not is_known:
        print0(f"note: the first line of {path} is read as a header: {_shown(header)}")
        columns[0] = "path"
    if len(columns) == 1:
        return [*columns, "label"]  # rows may have a label all the same
    if not columns[1] and "label" not in columns:
        columns[1] = "label"
    for field, column in zip(header, columns, strict=True):
        if not column or columns.count(column) > 1:
            raise UserError(
                f"manifest {path}: column {field!r} of its header is unknown or occurs twice. "
                "Columns are path, label, start and end, in any order."
            )
    return columns


def _is_unknown_header(rows: list[tuple[int, list[str]]], folder: str) -> bool:
    """Return whether the first row names no file while the second one does."""
    first = rows[0][1][0]
    if len(rows) == 1 or first.lower().endswith(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS):
        return False
    following = rows[1][1][0]
    return not _exists(first, folder) and following != "" and _exists(following, folder)


def _exists(item: str, folder: str) -> bool:
    """Return whether a path of a manifest, which is in `folder`, exists."""
    return os.path.exists(_absolute(item, folder))


def _row_problem(row: list[str], fields: dict[str, str], folder: str, has_header: bool) -> str:
    """Return what is malformed in a row, "" for nothing. fields: the row's, by column.

    Without a header a row has one, two or four fields.
    """
    name = fields.get("path", "")
    if not name:
        return "no path"
    if len(row) == 3 and not has_header and _are_integers(row[1:]):
        return (
            "two numbers after the path, as in VideoMAE's lists of frame folders "
            "(list path,label, or add the header path,start,end)"
        )
    if len(row) > len(fields) or (len(row) == 3 and not has_header):
        return "too many fields (quote a path that contains the separator)"
    if ":" in name and re.match(URL_START, name) and not _exists(name, folder):
        return "a URL or protocol, not a file (download it first)"
    return _span_problem(fields)


def _encoding_problem(row: list[str], name: str, folder: str) -> str:
    """Return what is wrong in a row: it is not UTF-8, nor is its path that of a file; else ""."""
    if _is_utf8("".join(row)) or (not _is_utf8(name) and _exists(name, folder)):
        return ""
    return "not UTF-8, nor the name of a file (save the list as UTF-8)"


def _is_utf8(text: str) -> bool:
    """Return whether a decoded text has no surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _whole_numbers(labels: list[str]) -> list[str]:
    """Return labels; if all are whole numbers and some are written like 3.0, all like 3."""
    distinct = set(labels) - {""}
    if not all(re.fullmatch(r"[0-9]+(\.0*)?", label) for label in distinct):
        return labels
    if not any("." in label for label in distinct):
        return labels
    digits = {label: str(int(label.partition(".")[0])) for label in distinct}
    return [digits.get(label, "") for label in labels]
