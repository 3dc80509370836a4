"""Small videos for the tests: each frame shows its index as blocks of black and white."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8
FPS = 30


def numbered_frame(number: int, width: int, height: int, speed: int = 3) -> np.ndarray:
    """Return a moving gradient (H, W, 3) whose top quarter shows `number` in BITS blocks.

    speed: motion of the red channel, in gray levels per frame.
    """
    y, x = np.mgrid[:height, :width]
    red = (x * 2 + number * speed) % 256
    green = (y * 2 + number) % 256
    blue = (x + y) % 256
    frame = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    block_width = width // BITS
    for bit in range(BITS):
        left = bit * block_width
        frame[: height // 4, left : left + block_width] = 255 * (number >> bit & 1)
    return frame


def frame_number(frame: np.ndarray) -> int:
    """Return the number that a decoded (H, W, 3) frame shows."""
    height, width = frame.shape[:2]
    block_width = width // BITS
    margin = block_width // 4
    rows = frame[height // 16 : height // 6]
    number = 0
    for bit in range(BITS):
        left = bit * block_width
        middle = rows[:, left + margin : left + block_width - margin]
        if middle.mean() > 127:
            number |= 1 << bit
    return number


def write_video(
    path: Path,
    *,
    frames: int = 40,
    first: int = 0,
    size: tuple[int, int] = (96, 64),
    gop: int = 12,
    codec: str = "libx264",
    b_frames: int = 2,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Encode `frames` frames of `size` (width, height), numbered from `first`; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width = width
        stream.height = height
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for number in range(first, first + frames):
            image = numbered_frame(number, width, height)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(
    folder: Path,
    *,
    frames: int = 40,
    first: int = 0,
    name: str = "{:05d}.png",
    size: tuple[int, int] = (96, 64),
) -> Path:
    """Write the frames of `write_video` to a folder of files, from number 1 on; return the folder.

    name: the format of a file's name.
    """
    folder.mkdir(parents=True)
    for index in range(frames):
        image = Image.fromarray(numbered_frame(first + index, *size))
        image.save(folder / name.format(index + 1))
    return folder


def write_folder(folder: Path, videos: int = 8, **options) -> Path:
    """Write `videos` videos of 20, 24, 28, ... frames into two subfolders; return the folder."""
    for index in range(videos):
        path = folder / f"class_{index % 2}" / f"clip_{index}.mp4"
        write_video(path, frames=20 + 4 * index, **options)
    return folder
