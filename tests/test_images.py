"""Images of all depths, and images that a library cannot read."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import ImageDataset
from data.decode import open_video
from data.images import read_image
from data.input_files import ReadError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP_RAMP = RAMP.astype(np.uint16) * 257  # the same gray levels with 16 bits
SHORT = 3  # the type of all entries of a TIFF folder


def write_tiff_of_12_bits(path: Path, pixels: np.ndarray) -> None:
    """Write levels (H, W) below 4096 as packed pairs; W is even."""
    first = pixels[:, ::2].astype(np.uint32)
    second = pixels[:, 1::2].astype(np.uint32)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    height, width = pixels.shape
    begin = 8  # bytes of the header
    data = packed.astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: begin, 277: 1, 278: height}
    tags[279] = len(data)
    entries = [struct.pack("<HHIHH", tag, SHORT, 1, value, 0) for tag, value in tags.items()]
    header = b"II" + struct.pack("<HI", 42, begin + len(data))
    folder = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    path.write_bytes(header + data + folder)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "big_endian.tif", "12_bits.tif"])
def test_f10_deep_gray_images_are_scaled_to_8_bits(name, tmp_path):
    path = tmp_path / name
    if name == "12_bits.tif":
        write_tiff_of_12_bits(path, DEEP_RAMP >> 4)
    elif name == "big_endian.tif":
        Image.fromarray(DEEP_RAMP.astype(">u2")).save(path)
    elif name == "a.pgm":
        Image.fromarray(DEEP_RAMP.astype(np.int32)).save(path)
    else:
        Image.fromarray(DEEP_RAMP).save(path)
    pixels = np.asarray(read_image(str(path)))
    assert np.array_equal(pixels, np.stack([RAMP] * 3, axis=-1))


def test_f10_frames_of_16_bits_are_scaled_too(tmp_path):
    Image.fromarray(DEEP_RAMP).save(tmp_path / "00001.png")
    with open_video(str(tmp_path), "pyav", frames_fps=10) as video:
        (frame,) = video.read(np.zeros(1, dtype=int))
    assert np.array_equal(frame, np.stack([RAMP] * 3, axis=-1))


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_f10_gray_levels_without_a_range_are_refused(kind, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(DEEP_RAMP.astype(kind)).save(path)
    with pytest.raises(ReadError, match="unknown range: save it with 8 bits"):
        read_image(str(path))


@pytest.mark.parametrize("error", [RuntimeError("odd file"), MemoryError(), KeyError(258)])
def test_f01_any_error_of_pillow_costs_one_frame(error, tmp_path, monkeypatch):
    for number in range(3):
        Image.fromarray(RAMP + number).save(tmp_path / f"{number}.png")
    load = Image.Image.convert

    def load_or_raise(image, mode):
        if image.filename.endswith("1.png"):
            raise error
        return load(image, mode)

    with open_video(str(tmp_path), "pyav", frames_fps=10) as video:
        monkeypatch.setattr(Image.Image, "convert", load_or_raise)
        assert video.read(np.arange(3)).shape == (3, 16, 16, 3)
        assert video.replaced == 1
    with pytest.raises(ReadError, match="^not an image: "):
        read_image(str(tmp_path / "1.png"))


def test_f01_names_with_nul_and_extreme_shapes_are_read_errors(tmp_path):
    long = tmp_path / "long.png"
    Image.new("L", (60_000, 1)).save(long)
    good = tmp_path / "good.png"
    Image.fromarray(RAMP).save(good)
    paths = [str(long), str(tmp_path / "a\0.png"), str(good)]
    dataset = ImageDataset(
        paths=paths, labels=[0] * 3, transform=shrink_or_fail, seed=0, substitutes=9
    )
    for index in range(2):
        sample = dataset[(0, index)]
        assert sample["path"] == str(good)
        assert paths[index] in dict(sample["bad"])


def shrink_or_fail(image: Image.Image) -> torch.Tensor:
    """Return an image (3, 4, 4); an allocation for a long one fails."""
    if max(image.size) > 10_000:
        raise MemoryError
    return torch.zeros(3, 4, 4, dtype=torch.uint8)
