"""What all video readers have in common: their interface and the description of a file."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class VideoInfo(NamedTuple):
    """Properties of a video file, found without decoding more than its first frames."""

    frames: int  # number of frames that a player shows
    fps: float  # mean frame rate
    width: int  # pixels, of a frame as shown: upright, with square pixels
    height: int
    rotation: int  # degrees; width and height already account for it
    key_distance: float  # mean distance of keyframes, in frames
    codec: str
    unseen: int = 0  # number of leading frames that cannot be decoded; not counted in `frames`
    decord_reads: bool = False  # whether decord returns the right frames
    times: np.ndarray | None = None  # (frames,) display times in seconds, if the rate is variable
    first_frame: str = ""  # name of the first file of a folder of frames, see data/frame_folder.py


def fill_missing(found: dict[int, np.ndarray], indices: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the frames (T, H, W, 3) of non-decreasing indices (T,), and how many were replaced.

    found: the frames that could be decoded, by index; at least one. Any other frame is replaced by
    the nearest one before it, otherwise by the first one after it.
    """
    available = np.array(sorted(found))
    nearest_before = np.searchsorted(available, indices, side="right") - 1
    sources = available[np.maximum(nearest_before, 0)]
    replaced = int((sources != indices).sum())
    return np.stack([found[int(index)] for index in sources]), replaced


class VideoReader:
    """An open video whose frames are read by index; a context manager.

    Frames are indexed in display order, and only the frames that a player shows have an index.

    num_frames: number of frames that a player shows.
    fps: mean frame rate.
    times: display times (num_frames,) in seconds, None if the frame rate is constant.
    replaced: number of requested frames so far that could not be decoded; a neighbor replaced them.
    frame_pixels: width * height of the frames in the file, of which a decoder keeps several.
    """

    num_frames: int
    fps: float
    times: np.ndarray | None
    replaced: int
    frame_pixels: int = 0

    def seek(self, index: int) -> None:
        """Move to the keyframe before a frame. `read` does this by itself."""
        raise NotImplementedError

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the frames (T, H, W, 3) uint8 RGB of non-decreasing indices (T,).

        Raises ReadError.
        """
        raise NotImplementedError

    def read_tensor(self, indices: np.ndarray) -> "Tensor":
        """Return the frames of `read` as a tensor (T, C, H, W) uint8, with channels-last strides.

        Raises ReadError.
        """
        import torch  # here, since tools that read arrays do not need it

        return torch.from_numpy(self.read(indices)).permute(0, 3, 1, 2)

    def restart(self) -> bool:
        """Return to the state of a file just opened, without the cost of opening it.

        Returns False if that is impossible: then the file has to be opened again.
        """
        return False

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
