"""The clips to compute features of: which files, and where in each video."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.manifest import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Samples,
    check_folder,
    class_indices,
    class_names,
    is_image,
    read_manifest,
    walk,
)
from data.spans import cut_into_spans, index_durations
from data.video_index import UNKNOWN, VideoIndex, distinct, load_index, new_index
from tools.data_doctor import probe_files
from util.dist import UserError, print0


class Inputs(NamedTuple):
    """The files to read, or parts of them."""

    paths: list[str]
    labels: list[int]  # class indices, -1: none
    classes: list[str]
    are_images: bool
    manifest: str  # where the paths come from, "" for a folder
    spans: np.ndarray | None  # (n, 2) seconds, None: whole files

    def label(self, index: int) -> str:
        """Return the class name of a file, "" for none."""
        if self.labels[index] < 0:
            return ""
        return self.classes[self.labels[index]]


class Clips(NamedTuple):
    """The clips of some files, in order."""

    file: np.ndarray  # (m,) int64 index of the file of each clip
    clip: np.ndarray  # (m,) int64 index of the clip in its file
    spans: np.ndarray | None  # (m, 2) seconds, None for the center clips of whole files
    known: VideoIndex | None  # of the files that have clips
    unreadable: dict[int, str]  # reason by file, of files that have no clips


def find_files(folder: str, frames: bool) -> Samples:
    """Return all videos and images below a folder and their labels. Raises UserError for none.

    frames: see `walk`. The label of a file is the name of the subfolder of `folder` that holds it,
    "" if none does.
    """
    check_folder(folder, "--data_dir")
    extensions = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
    paths = walk(folder, extensions, frames)
    if not paths:
        raise UserError(
            f"--data_dir {folder} has no videos and no images (looked for {' '.join(extensions)})"
        )
    root = Path(folder).absolute()
    labels = []
    for path in paths:
        subfolders = Path(path).relative_to(root).parts[:-1]
        labels.append("".join(subfolders[:1]))
    return Samples(paths, labels)


def check_kind(paths: list[str], source: str) -> bool:
    """Return whether the files are images, not videos. Raises UserError for a mixture."""
    images = [path for path in paths if is_image(path)]
    if images and len(images) < len(paths):
        raise UserError(
            f"{source} has {len(images)} images (first: {images[0]}) and "
            f"{len(paths) - len(images)} videos. Extract their features separately."
        )
    return bool(images)


def list_inputs(
    folder: str, csv: str, known_classes: list[str] | None, frames: bool = False
) -> Inputs:
    """Return the files of a folder, or the samples of a manifest, with their class indices.

    frames: see `walk`. known_classes: the classes of a finetuned model. Labels index them, or the
    data's own classes if a label is not among them. Raises UserError.
    """
    paths, labels, spans, _ = read_manifest(csv) if csv else find_files(folder, frames)
    source = csv or folder
    are_images = check_kind(paths, source)
    names = sorted(set(labels) - {""})
    classes = []
    if names:
        classes = class_names(names)
    if known_classes is not None:
        unknown = [name for name in names if name not in known_classes]
        if not unknown:
            classes = known_classes
        else:
            print0(
                f"note: {unknown[0]!r} is not a class of the checkpoint. "
                f"The labels are indices of the {len(classes)} classes of {source}."
            )
    indices = dict(zip(names, class_indices(names, classes, source), strict=True))
    label_indices = [indices.get(label, -1) for label in labels]
    return Inputs(paths, label_indices, classes, are_images, csv, spans)


def index_files(
    files: list[int],
    samples: Inputs,
    num_workers: int,
    read_timeout: float,
    frames_fps: float | None,
) -> VideoIndex:
    """Return the video index of some files; those that the manifest's index lacks are opened.

    num_workers processes open them, each file for at most read_timeout seconds.
    frames_fps: see `open_video`.
    """
    paths = distinct([samples.paths[file] for file in files])
    index = new_index(paths, known_rows(files, samples), frames_fps)
    unknown = np.flatnonzero(index.rows["state"] == UNKNOWN).tolist()
    unknown_paths = [paths[row] for row in unknown]
    for batch in probe_files(unknown_paths, num_workers, read_timeout, frames_fps):
        for file in batch:
            index.set_row(unknown[file.path_index], file.info, file.reason)
    return index


def known_rows(files: list[int], samples: Inputs) -> VideoIndex | None:
    """Return the rows of some files in the index of the manifest, None if it has none."""
    if samples.are_images:
        return None
    known = load_index(samples.manifest, samples.paths)
    if known is None:
        return None
    return known.of_files([samples.paths[file] for file in files])


def one_clip_each(files: list[int], samples: Inputs) -> Clips:
    """Return a clip of each file, or of each part."""
    file = np.array(files, dtype=np.int64)
    known = known_rows(files, samples)
    spans = None
    if samples.spans is not None:
        spans = samples.spans[file]
    return Clips(file, np.zeros_like(file), spans, known, {})


def clips_along(
    files: list[int], samples: Inputs, index: VideoIndex, seconds: float, stride: float
) -> Clips:
    """Return clips of `seconds` from every `stride` seconds of each video on.

    index: of the files.
    """
    paths = [samples.paths[file] for file in files]
    row_of = {path: row for row, path in enumerate(distinct(paths))}
    rows = np.array([row_of[path] for path in paths], dtype=np.int64)  # of the index
    position, spans = cut_into_spans(index_durations(index)[rows], seconds, stride)
    with_clips = np.unique(position)  # positions in `files`, as those of the clips
    absent = np.setdiff1d(np.arange(len(files)), with_clips).tolist()
    reasons = index.rows["reason"][rows]
    return Clips(
        file=np.array(files, dtype=np.int64)[position],
        clip=np.rint(spans[:, 0] / stride).astype(np.int64),
        spans=spans,
        known=index.of_files([paths[i] for i in with_clips]),
        unreadable={files[i]: reasons[i].decode(errors="replace") for i in absent},
    )
