"""Videos whose frames are files: a folder of numbered JPEG or PNG images.

The names of the frames are one prefix and a number of any width, such as frame_0000000001.jpg,
00001.jpg or ID_000001.png. The first number is arbitrary, and none may be missing. The frame rate
is constant; no file records it.
"""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.frame_geometry import scaled_size
from data.images import image_size, read_image
from data.input_files import ReadError
from data.video import VideoInfo, VideoReader, fill_missing
from util.dist import UserError, print0

FRAME_FOLDER = "frame folder"  # the codec in the description of such a video
FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png")
DIGITS = "0123456789"
NO_RATE = "a folder: pass --frames_fps RATE to read its numbered images as frames"


class FrameName(NamedTuple):
    """The parts of the name of a frame, such as frame_0012.jpg."""

    prefix: str  # "frame_"
    digits: str  # "0012"
    extension: str  # ".jpg"

    @property
    def number(self) -> int:
        """The number of the frame."""
        return int(self.digits)

    def following(self, start: int, count: int) -> list[str]:
        """Return the names whose numbers are larger by `start`, `start` + 1, and so on.

        They are padded with zeros likewise.
        """
        begin = self.number + start
        width = len(self.digits)
        return [
            f"{self.prefix}{number:0{width}d}{self.extension}"
            for number in range(begin, begin + count)
        ]


def is_frame(name: str) -> bool:
    """Return whether a file's name is that of a JPEG or PNG image that is not hidden."""
    return name.lower().endswith(FRAME_EXTENSIONS) and not name.startswith(".")


def parse_frame_name(name: str) -> FrameName | None:
    """Return the parts of an image's name, or None if it has no number before its extension."""
    stem, extension = os.path.splitext(name)
    prefix = stem.rstrip(DIGITS)
    digits = stem[len(prefix) :]
    if not digits:
        return None
    return FrameName(prefix, digits, extension)


def has_frames(names: list[str]) -> bool:
    """Return whether some of the files of a folder, given by name, are numbered images."""
    return any(is_frame(name) and parse_frame_name(name) for name in names)


def list_frames(folder: str) -> list[str]:
    """Return the names of the frames in a folder, in the order of their numbers.

    Raises ReadError if there are none, or if they are not numbered without gaps after one prefix.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if is_frame(name))
    except OSError as error:
        raise ReadError(error.strerror or "cannot be listed") from None
    if _are_regular(names):
        return names
    parsed = {name: parse_frame_name(name) for name in names}
    numbered = {name: parts for name, parts in parsed.items() if parts is not None}
    if not numbered:
        raise ReadError("no numbered JPEG or PNG images")
    if len(numbered) < len(names):
        name = min(name for name in names if name not in numbered)
        raise ReadError(f"{name} has no number, but {min(numbered)} has: remove one of them")
    first_of = {parts.prefix: name for name, parts in sorted(numbered.items(), reverse=True)}
    if len(first_of) > 1:
        shown = " and ".join(sorted(first_of.values())[:2])
        raise ReadError(f"frames of {len(first_of)} names, {shown}: keep one of them")
    frames = sorted(numbered, key=lambda name: (numbered[name].number, name))
    _check_numbers(frames, [numbered[name] for name in frames])
    return frames


def _are_regular(names: list[str]) -> bool:
    """Return whether the names of frames follow from the first one, counting by one."""
    first = parse_frame_name(names[0]) if names else None
    return first is not None and first.following(0, len(names)) == names


def _check_numbers(names: list[str], parts: list[FrameName]) -> None:
    """Raise ReadError unless sorted frames have consecutive numbers."""
    steps = np.diff([part.number for part in parts])
    wrong = np.flatnonzero(steps != 1)
    if not len(wrong):
        return
    index = int(wrong[0])
    if steps[index] == 0:
        raise ReadError(f"{names[index]} and {names[index + 1]} have the same number")
    raise ReadError(f"{parts[index].following(1, 1)[0]} is missing")


def check_frame_folders(
    paths: list[str], frames_fps: float | None, of_any_name: bool = False
) -> None:
    """Raise UserError if a path is a folder, but --frames_fps is not given.

    Prints a note if it is given, but no path is a folder. Paths whose name has an extension are
    taken for files, since asking the file system for each of a million would take long; reading
    such a folder without a rate is an error too. of_any_name: ask for these as well.
    """
    paths = list(dict.fromkeys(paths))
    asked = (path for path in paths if of_any_name or not os.path.splitext(path)[1])
    folder = next(filter(os.path.isdir, asked), None)
    if frames_fps is None and folder is not None:
        raise UserError(f"{folder} is {NO_RATE}")
    if frames_fps is not None and folder is None and not any(map(os.path.isdir, paths)):
        print0(
            f"note: --frames_fps has no effect on these {len(paths)} videos, "
            "none of which is a folder of frames"
        )


class FrameFolder(VideoReader):
    """A folder of numbered frames, of which only the wanted ones are decoded.

    All frames get the size of the first one whose header can be read, reduced to `short_side`.
    """

    times = None  # the rate is constant

    def __init__(self, path: str, short_side: int | None, fps: float, info: VideoInfo | None):
        """Open the folder; without the names of its frames in `info`, list it. Raises ReadError."""
        self.path = path
        self.short_side = short_side
        self.fps = fps
        self.replaced = 0
        self.first_name = None
        if info is not None and info.first_frame:
            self.first_name = parse_frame_name(info.first_frame)
        if info is None or self.first_name is None:
            self.names = list_frames(path)
            self.num_frames = len(self.names)
        else:
            self.num_frames = info.frames
        if info is None:
            self.size = self._first_size()
        else:
            self.size = info.width, info.height

    def frame_path(self, index: int) -> str:
        """Return the path of a frame."""
        if self.first_name is None:
            name = self.names[index]
        else:
            (name,) = self.first_name.following(index, 1)
        return os.path.join(self.path, name)

    def _first_size(self) -> tuple[int, int]:
        """Return width and height of the first frame whose header can be read.

        Raises ReadError for the first frame, if there is no other.
        """
        first_error = None
        for index in range(self.num_frames):
            try:
                return image_size(self.frame_path(index))
            except ReadError as error:
                first_error = first_error or error
        raise ReadError(f"none of the {self.num_frames} frames can be read: {first_error}")

    def seek(self, index: int) -> None:
        """Do nothing: every frame is a file."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the frames (T, H, W, 3) uint8 RGB of non-decreasing indices (T,).

        A frame that cannot be read is replaced as by PyAVVideo, and counted in `replaced`. Raises
        ReadError if none can be read.
        """
        indices = np.clip(indices, 0, self.num_frames - 1)
        found: dict[int, np.ndarray] = {}
        reason = ""
        for index in np.unique(indices).tolist():
            try:
                found[index] = self._read_frame(index)
            except ReadError as error:
                reason = str(error)
        if not found:
            raise ReadError(f"none of the wanted frames can be read ({reason})")
        frames, replaced = fill_missing(found, indices)
        self.replaced += replaced
        return frames

    def _read_frame(self, index: int) -> np.ndarray:
        """Return a frame (H, W, 3) uint8 RGB. Raises ReadError."""
        image = read_image(self.frame_path(index))
        size = scaled_size(*self.size, self.short_side) or self.size
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)  # as PyAVVideo does
        return np.asarray(image)

    def restart(self) -> bool:
        """Return to the state of a folder just opened."""
        self.replaced = 0
        return True

    def close(self) -> None:
        """Do nothing: no file is open."""


def describe_frames(path: str, fps: float) -> VideoInfo:
    """Return the properties of a folder of frames. Raises ReadError.

    The first name stands for all of them, if theirs differ in the number alone.
    """
    video = FrameFolder(path, None, fps, None)
    width, height = video.size
    first_frame = ""
    if _are_regular(video.names):
        first_frame = video.names[0]
    return VideoInfo(
        frames=video.num_frames,
        fps=fps,
        width=width,
        height=height,
        rotation=0,
        key_distance=1.0,
        codec=FRAME_FOLDER,
        first_frame=first_frame,
    )
