"""Read what the null GPU has counted, inside a process that runs on it."""

import ctypes
import tempfile
from typing import NamedTuple

import torch

_library = ctypes.CDLL(None)  # preloaded


class Row(NamedTuple):
    """A kernel ("kernel ..."), matrix product ("gemm ..."), copy or sync, and how often it ran."""

    name: str
    calls: int
    bytes: int
    flops: float


def start() -> None:
    """Initialize CUDA, without what the null GPU lacks: cuDNN."""
    torch.cuda.init()
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def reset() -> None:
    """Forget all counts."""
    _library.nullgpu_reset()


def rows() -> list[Row]:
    """Return what was counted since the last reset."""
    with tempfile.NamedTemporaryFile(mode="r") as file:
        _library.nullgpu_report(file.name.encode())
        lines = file.read().splitlines()
    result = []
    for line in lines:
        calls, size, flops, name = line.split("\t")
        result.append(Row(name, int(calls), int(size), float(flops)))
    return result
