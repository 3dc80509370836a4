"""Build the null GPU, and describe how to run Python on it.

The null GPU is a CUDA runtime, driver and cuBLAS for machines without a GPU (nullgpu.cpp). It
counts kernels, copies and syncs instead of computing. PyTorch's CUDA dispatch, allocator and
streams, Dynamo, Inductor, Triton and ptxas run on it as on an H100. Values are garbage, so it tests
structure and never numbers.

    python tests/nullgpu/build.py FOLDER SCRIPT ...   # builds it there and runs a Python script
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "nullgpu.cpp"
LIBRARY = "libcuda.so.1"
HEADER_FOLDERS = ("nvidia/*/include", "triton/backends/nvidia/include")  # of the wheels
HEADERS = ("cuda_runtime_api.h", "cublasLt.h", "cuda.h")


def header_folders() -> list[Path]:
    """Return the folders of CUDA headers beside torch, under the names of any CUDA version."""
    packages = Path(sysconfig.get_path("purelib"))
    return [path for pattern in HEADER_FOLDERS for path in sorted(packages.glob(pattern))]


def obstacle() -> str | None:
    """Return why the null GPU cannot be built or used here, or None if it can."""
    if sys.platform != "linux":
        return f"the null GPU needs Linux, not {sys.platform}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if torch.cuda.is_available() and "nullgpu" not in torch.cuda.get_device_name():
        return "a real GPU is here (tests/test_gpu.py)"
    if shutil.which("g++") is None:
        return "the null GPU needs g++"
    for header in HEADERS:
        if not any((folder / header).exists() for folder in header_folders()):
            return f"no {header} beside torch {torch.__version__}"
    return None


def build(folder: Path) -> Path:
    """Compile the library into a folder and return its path.

    Raises RuntimeError with the compiler's first error, in one line.
    """
    library = folder / LIBRARY
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++17", "-w"]
    command += [f"-I{path}" for path in header_folders()]
    command += [f"-Wl,-soname,{LIBRARY}", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line]
        raise RuntimeError((errors or lines or ["g++ printed nothing"])[0])
    return library


def environment(library: Path, gib: float = 79.1) -> dict[str, str]:
    """Return the environment of a Python process that sees the null GPU with this memory."""
    return os.environ | {
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "NULLGPU_GIB": str(gib),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def main() -> None:
    """Build the library and become Python on the null GPU."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    library = build(folder)
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(library))


if __name__ == "__main__":
    main()
