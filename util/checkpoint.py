"""Checkpoint files: save, rotate, load, check. For encoders of other projects: util/pretrained.py.

A checkpoint of a run has the keys `model`, `optimizer`, `scaler`, `epoch`, `step` (optimizer
updates), `samples_consumed` (videos), `config` (constructor arguments of the model, mean and std
of the pixels), `args` (the flags, a plain dict), and the rest of `TrainState.state_dict`.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from util.checkpoint_schema import SchemaError, all_tensors, check_contents, check_values
from util.dist import UserError
from util.file_kind import ZIP_START, kind_of_file
from util.files import fsync_path, sha256_of
from util.hub import PREFERRED, WEIGHT_SUFFIXES, local_path, refuse_parts

# In the message of torch's RuntimeError for too little memory, and for a file that it cannot open.
SYSTEM_ERROR = re.compile("alloc|unable to (open|mmap)")
RUN_PARTS = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "step": int,
    "samples_consumed": int,
    "config": dict,
    "args": dict,
}


class CorruptCheckpoint(UserError):
    """A file that exists and can be read, but is not a complete and valid checkpoint."""


# Writing


def previous(path: Path, index: int) -> Path:
    """Return the path of the `index`-th checkpoint before `path`: run.pth -> run_previous1.pth."""
    return path.with_name(f"{path.stem}_previous{index}{path.suffix}")


def temporary_of(path: Path) -> Path:
    """Return the path that a checkpoint is written to before it replaces `path`."""
    return path.with_name(path.name + ".tmp")


def save(path: Path, state: dict, keep: int = 1) -> None:
    """Write a checkpoint: temporary file, fsync, rename, fsync of the folder.

    keep: number of checkpoints to keep, this one included; the older ones are `previous`. `path`
    is complete at any time, even if the process is killed (without hard links: or its `previous`).
    Raises OSError if the file cannot be written; all existing checkpoints then stay as they were.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        for cause in (error, error.__cause__, error.__context__):
            if isinstance(cause, OSError):  # torch.save may wrap the OSError
                raise cause from None
        raise
    if keep > 1 and path.exists():
        rotate(path, keep)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some file systems cannot fsync a folder
        fsync_path(path.parent)


def rotate(path: Path, keep: int) -> None:
    """Make `path` also its first `previous`; move the others up by one, keep - 1 of them at most.

    `path` exists at any time, except for a moment on file systems without hard links.
    """
    first_previous = previous(path, 1)
    if first_previous.exists() and os.path.samefile(first_previous, path):
        return  # a save that crashed has rotated already
    for index in range(keep - 1, 1, -1):
        younger = previous(path, index - 1)
        if younger.exists():
            os.replace(younger, previous(path, index))
    second_name = previous(temporary_of(path), 1)
    second_name.unlink(missing_ok=True)
    try:
        os.link(path, second_name)
    except OSError:  # a file system without hard links
        second_name = path
    os.replace(second_name, first_previous)


def remove_stale_tmp(path: Path) -> None:
    """Remove the temporary files of a `save` that crashed."""
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    previous(temporary, 1).unlink(missing_ok=True)


def rename_aside(path: Path, ending: str) -> Path:
    """Append `ending` to a file's name, and an index if that name is taken. Return the new path."""
    for index in count():
        free = path.with_name(f"{path.name}{ending}{index or ''}")
        if not free.exists():
            break
    os.replace(path, free)
    return free


# Reading


def load(path: str | Path, check: bool = True, lazily: bool = False) -> dict:
    """Read a checkpoint onto the CPU: a file, a folder, or hf:OWNER/REPO[/FILE][@REVISION].

    The file is of torch.save or .safetensors; for folders see `file_of`, for hf: util/hub.py.
    check: compare the file's checksums first. lazily: leave the tensors of a .pth file on the
    disk until they are used. A .safetensors file, and pytorch_model.bin, gives {"model": tensors}
    and the entries of config.json beside it. Only tensors and plain data are read: no code of the
    file is run, and only what util/checkpoint_schema.py allows is returned.
    Raises UserError if the file is missing, unreadable or not a dictionary; CorruptCheckpoint, a
    UserError, if it is truncated or corrupt, or has a part that cannot be right.
    """
    file = file_of(path)
    try:
        if file.suffix == ".safetensors":
            state = _read_safetensors(file, check)
        else:
            state = _read_pth(file, check, lazily)
        if isinstance(state, dict) and file.name == "pytorch_model.bin":  # of Hugging Face
            state = _read_sidecar(file) | {"model": state}
    except UserError:
        raise
    except Exception as error:  # unpickling or parsing garbage can raise anything
        raise _unreadable(path, file, error) from error
    if not isinstance(state, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(state).__name__}, not a dictionary. "
            "Pass a checkpoint of a model."
        )
    try:
        check_contents(state)
        if zipfile.is_zipfile(file):
            _check_records(file, state)
    except SchemaError as error:
        raise CorruptCheckpoint(
            f"checkpoint {path} cannot be used ({error}): corrupt or wrongly written, pass another"
        ) from None
    return state


def check_resumable(path: Path) -> None:
    """Check a run's checkpoint, checksums and values of all tensors included.

    Raises UserError if it is missing or unreadable; CorruptCheckpoint, a UserError, if it is
    corrupt or a run cannot continue from it.
    """
    state = load(path, lazily=True)
    try:
        check_values(state)
    except SchemaError as error:
        raise CorruptCheckpoint(f"checkpoint {path} cannot be used ({error})") from error


def file_of(path: str | Path) -> Path:
    """Return the file of a checkpoint that is given as a file, a folder or hf:...

    In a folder it is the first of util.hub.PREFERRED that exists. Raises UserError if there is no
    such file.
    """
    file = local_path(path)
    if file.is_dir():
        names = [name for name in PREFERRED if (file / name).is_file()]
        if not names:
            others = sorted(each.name for each in file.iterdir() if each.suffix in WEIGHT_SUFFIXES)
            refuse_parts(path, others)
            cure = "Pass a file of weights."
            if others:
                cure = f"Pass one of its files ({truncate(', '.join(others))})."
            raise UserError(f"checkpoint {path} is a folder without {PREFERRED[0]}. {cure}")
        file = file / names[0]
    if file.exists() and not file.is_file():
        raise UserError(f"checkpoint {path} is not a regular file: pass a file of weights")
    if not file.is_file():
        raise UserError(f"checkpoint {path} not found: check the path")
    refuse_parts(path, [file.name])
    return file


def _read_pth(path: Path, check: bool, lazily: bool) -> Any:
    """Read a file of torch.save. Raise BadZipFile if a checksum is wrong."""
    zipped = zipfile.is_zipfile(path)  # the format of torch before 1.6 is not
    if check and zipped:  # torch.load does not compare the checksums
        with zipfile.ZipFile(path) as archive:
            corrupt_record = archive.testzip()
        if corrupt_record:
            raise zipfile.BadZipFile(f"the checksum of {corrupt_record} is wrong")
    with (
        torch.serialization.safe_globals([argparse.Namespace]),  # the ancestors' `args`
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)  # what fails is reported as an error
        mapped = lazily and zipped and str(path).isprintable()  # torch maps UTF-8 names only
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_records(path: Path, state: dict) -> None:
    """Raise SchemaError if a tensor of a file of torch.save has more memory than was saved for it.

    With mmap torch reads beyond the end of a record.
    """
    with zipfile.ZipFile(path) as archive:
        records = [
            each for each in archive.infolist() if each.filename.split("/")[-2:-1] == ["data"]
        ]
    saved = Counter(record.file_size for record in records)
    storages = [tensor.untyped_storage() for tensor in all_tensors(state)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    for size in Counter(sizes.values()) - saved:
        raise SchemaError(f"a tensor is of {size} bytes, which no record of the file has")


def _read_safetensors(path: Path, check: bool) -> dict:
    """Read a .safetensors file and config.json beside it. Raises ValueError if a hash is wrong."""
    safetensors_torch = import_safetensors(str(path))
    described = _read_sidecar(path)
    expected_hash = described.pop("sha256", None)
    if check and expected_hash is not None and expected_hash != sha256_of(path):
        raise ValueError("its sha256 is not the one in config.json")
    return described | {"model": safetensors_torch.load_file(path)}


def _read_sidecar(path: Path) -> dict:
    """Return the entries of config.json beside a file of weights, {} if there is none.

    Raises UserError if it does not contain a JSON object.
    """
    sidecar = path.with_name("config.json")
    if not sidecar.is_file():
        return {}
    try:
        described = json.loads(sidecar.read_text())
    except ValueError as error:
        raise UserError(f"{sidecar} is not valid JSON ({first_line(error)}). Repair it.") from None
    if not isinstance(described, dict):
        raise UserError(f"{sidecar} holds a {type(described).__name__}, not an object. Repair it.")
    if not isinstance(described.get("config", {}), dict):
        raise UserError(f"{sidecar} has a config that is not an object. Repair it.")
    if described.get("model_type") == "videomae":  # written by Hugging Face transformers
        described = {"config": _translate_videomae_config(described)}
    config = described.get("config")
    if isinstance(config, dict):
        for key in ("mean", "std"):
            if key in config:
                config[key] = tuple(config[key])  # JSON has no tuples
    return described


def _translate_videomae_config(described: dict) -> dict:
    """Return what a config.json of Hugging Face VideoMAE records, under our names."""
    names = {
        "img_size": "image_size",
        "num_frames": "num_frames",
        "num_heads": "num_attention_heads",
        "decoder_num_heads": "decoder_num_attention_heads",
    }
    config = {ours: described[theirs] for ours, theirs in names.items() if theirs in described}
    labels = described.get("id2label")
    if isinstance(labels, dict) and labels:
        classes = [labels.get(str(index)) for index in range(len(labels))]
        placeholders = [f"LABEL_{index}" for index in range(len(labels))]
        if None not in classes and classes != placeholders:
            config["classes"] = classes
    return config


def import_safetensors(needed_by: str) -> ModuleType:
    """Return the module safetensors.torch. Raises UserError if it is not installed."""
    try:
        from safetensors import torch as safetensors_torch
    except ImportError:
        raise UserError(
            f"{needed_by} needs safetensors, which is not installed: pip install safetensors"
        ) from None
    return safetensors_torch


def _unreadable(path: str | Path, file: Path, error: Exception) -> UserError:
    """Return the error to raise for a failed read: CorruptCheckpoint if the bytes are at fault.

    path: as given, of this file. Lack of memory and failures of the disk or network do not mean
    that the file is corrupt, nor do objects in it that are not loaded.
    """
    message = f"checkpoint {path} cannot be read"
    if _is_system_error(error):
        return UserError(f"{message} ({first_line(error)}): check memory, disk and permissions")
    refused = _refused_class(error)
    kind = kind_of_file(file)
    if refused:
        message += (
            f" (it contains {refused}, which is not loaded for safety): "
            "save its weights again, as tensors and plain data"
        )
        return UserError(message)
    if kind:
        message += f" ({kind}): not a checkpoint"
    else:
        message += f" ({_reason(file, error)}): corrupt or not a checkpoint"
    if zipfile.is_zipfile(file) and (kind or file.suffix == ".safetensors"):
        return UserError(message)  # the file of another program
    return CorruptCheckpoint(message)


def _is_system_error(error: Exception) -> bool:
    """Return whether memory, disk or network are at fault for a failed read."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and SYSTEM_ERROR.search(str(error)) is not None


def _refused_class(error: Exception) -> str | None:
    """Return the class or function that torch.load refused to load with weights_only, or None."""
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    if match is None or not isinstance(error, pickle.UnpicklingError):
        return None
    return match[1]


def _reason(file: Path, error: Exception) -> str:
    """Return why a file cannot be read, without the advice that torch adds."""
    with open(file, "rb") as opened:
        truncated = opened.read(len(ZIP_START)) == ZIP_START and not zipfile.is_zipfile(file)
    if truncated:
        return "its end is missing"
    if isinstance(error, pickle.UnpicklingError):
        return "not tensors and plain data that torch.save wrote"
    return first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if there is no message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def truncate(value: object, length: int = 60) -> str:
    """Return a value as text of at most `length` characters."""
    text = str(value)
    if len(text) <= length:
        return text
    return text[: length - 3] + "..."


# Checking


def require_parts(path: str | Path, state: dict, names: Iterable[str]) -> None:
    """Raise UserError unless a checkpoint has these parts, each of its type in RUN_PARTS."""
    names = list(names)
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of a run (no {', '.join(missing)}). "
            "Pass a file that a training script saved."
        )
    for name in names:
        if not isinstance(state[name], RUN_PARTS[name]):
            raise UserError(
                f"{path} is not a checkpoint of a run ({name} is of type "
                f"{type(state[name]).__name__}). Pass a file that a training script saved."
            )


def check_config(path: str | Path, state: dict, config: dict) -> None:
    """Raise UserError if the checkpoint's config differs from `config`, this run's."""
    changes = []
    for key, saved in sorted(state["config"].items()):
        current = config.get(key)
        if current != saved:
            changes.append(f"{key}: {truncate(saved)} in the checkpoint, {truncate(current)} now")
    if changes:
        raise UserError(
            f"{path} was saved with different settings ({'; '.join(changes)}). "
            "Use the flags of that run, or another --save_prefix."
        )


def load_weights(path: str | Path, model: nn.Module, weights: dict) -> None:
    """Copy weights that were read from `path` into a model, strictly. Raises UserError."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        if not faults:
            faults = [first_line(error)]
        raise UserError(
            f"{path} does not fit the model ({len(faults)} faults): {truncate(faults[0], 200)}"
        ) from None
