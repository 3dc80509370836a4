"""Videos made for the tests: each frame carries its own number in blocks of black and white, so a test can tell which were read."""

from pathlib import Path

import av
import numpy as np

BITS = 8


def numbered_frame(number: int, width: int, height: int, speed: int = 3) -> np.ndarray:
    """A moving gradient (H, W, 3) whose top quarter shows `number` in BITS black or white blocks."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack(
        [(x * 2 + number * speed) % 256, (y * 2 + number) % 256, (x + y) % 256], axis=-1
    ).astype(np.uint8)
    block = width // BITS
    for bit in range(BITS):
        frame[: height // 4, bit * block : (bit + 1) * block] = 255 * (number >> bit & 1)
    return frame


def frame_number(frame: np.ndarray) -> int:
    """The number that a decoded (H, W, 3) frame shows."""
    height, width = frame.shape[:2]
    block = width // BITS
    middles = [
        frame[
            height // 16 : height // 6, bit * block + block // 4 : (bit + 1) * block - block // 4
        ].mean()
        for bit in range(BITS)
    ]
    return sum(1 << bit for bit, value in enumerate(middles) if value > 127)


def write_video(
    path: Path,
    frames: int = 40,
    size: tuple[int, int] = (96, 64),
    fps: int = 30,
    gop: int = 12,
    codec: str = "libx264",
    b_frames: int = 2,
) -> Path:
    """Encode `frames` numbered frames of (width, height) `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        for number in range(frames):
            stream_frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            container.mux(stream.encode(stream_frame))
        container.mux(stream.encode())
    return path


def write_folder(folder: Path, videos: int = 8, **options) -> Path:
    """A folder of that many videos, in two subfolders."""
    for number in range(videos):
        write_video(
            folder / f"class_{number % 2}" / f"clip_{number}.mp4", frames=20 + 4 * number, **options
        )
    return folder
