"""Checkpoint files of a run: written whole or not at all, checked when read, the last few kept. Encoders from other files: util/importer.py.

A file holds `model`, `optimizer`, `scaler`, `epoch`, `step` (optimizer updates), `samples_consumed` (videos), `config`
(what the model is: constructor arguments, pixel mean and std), `args` (the flags, a plain dict), and what util/saver.py adds.
"""

import argparse
import contextlib
import fcntl
import os
import pickle
import time
import zipfile
import zlib
from itertools import count
from pathlib import Path

import torch
from torch import nn

from util.dist import UserError, print0, run_script

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    pickle.UnpicklingError,
)  # what readers say of bytes that are no whole checkpoint
_locks = {}  # the lock files that this process holds


class Damaged(UserError):
    """A file that is there and can be read, but is no whole checkpoint."""


def previous(path: Path, number: int) -> Path:
    """Where the `number`-th checkpoint before `path`'s lies: run.pth -> run_previous1.pth."""
    return path.with_name(f"{path.stem}_previous{number}{path.suffix}")


def temporary_of(path: Path) -> Path:
    """Where a checkpoint is written before it takes its place."""
    return path.with_name(path.name + ".tmp")


def save(path: Path, checkpoint: dict, keep: int = 1) -> None:
    """Write a checkpoint so that `path` is always complete: temp file, fsync, rename, fsync of the folder. Raises OSError, and then
    leaves everything as it was.

    keep: how many there are to be, this one included; the ones before are `previous`. Killed at any point, this leaves a complete one.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = next(
            (e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None
        )
        if cause is not None:  # torch.save may say in its own words that the disk is full
            raise cause from None
        raise
    if keep > 1 and path.exists():
        rotate(path, keep)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not all file systems know it of folders
        os.fsync(folder)
    os.close(folder)


def rotate(path: Path, keep: int) -> None:
    """Make `path` also the first of its `previous`, which move up by one, up to keep - 1 of them. There is a `path` at any time."""
    first, second_name = previous(path, 1), previous(temporary_of(path), 1)
    if first.exists() and os.path.samefile(first, path):
        return  # done before a crash
    for number in range(keep - 1, 1, -1):
        if previous(path, number - 1).exists():
            os.replace(previous(path, number - 1), previous(path, number))
    second_name.unlink(missing_ok=True)
    try:
        os.link(path, second_name)
    except OSError:  # a file system without hard links: here there is no `path` for a moment
        second_name = path
    os.replace(second_name, first)


def sweep(path: Path) -> None:
    """Remove what a crash inside `save` left half written."""
    for left in (temporary_of(path), previous(temporary_of(path), 1)):
        left.unlink(missing_ok=True)


def load(path: str | Path, check: bool = True, lazily: bool = False) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing, damaged, or holds more than tensors and plain data.

    check: compare the checksums of its records first. lazily: leave tensors in the file until they are used.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} not found: check the path")
    try:
        if check and zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the ancestors' `args`
            checkpoint = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=lazily and zipfile.is_zipfile(path),
            )
    except (
        Exception
    ) as error:  # the unpickler may stumble in any way over bytes that are no checkpoint
        damaged = (
            isinstance(error, DAMAGE)
            or "PytorchStreamReader" in str(error)
            or not zipfile.is_zipfile(path)
        )
        kind = Damaged if damaged and not isinstance(error, (OSError, MemoryError)) else UserError
        raise kind(
            f"checkpoint {path} cannot be read ({reason(error)}): damaged, or not a checkpoint"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary: not one of ours"
        )
    return checkpoint


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def own_checkpoint(args) -> Path:
    """Where this run's newest checkpoint lies, or will."""
    return Path(args.output_dir, f"{args.save_prefix}.pth")


def claim(args, patience: float = 60) -> None:
    """Make sure that no other process writes this run: a lock on {output_dir}/.{save_prefix}.lock for as long as this process lives.

    patience: seconds to wait for one that is about to end. Raises UserError. Does nothing where the file system has no locks.
    """
    path = own_checkpoint(args).with_name(f".{args.save_prefix}.lock")
    if path in _locks:
        return
    file, deadline = open(path, "a"), time.monotonic() + patience  # noqa: SIM115 (it stays open)
    while True:
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # ends with the process; forked loaders do not inherit it
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process writes {own_checkpoint(args)} (it holds {path}): end it, or use another --save_prefix"
                ) from None
            time.sleep(0.2)
            continue
        except OSError:  # no locks here
            pass
        _locks[path] = file
        return


def started_again() -> bool:
    """Whether torchrun or SLURM has started this command before, so that it must not begin anew."""
    return any(
        os.environ.get(name, "0") != "0"
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def find_resume(args) -> Path | None:
    """The checkpoint that a training run goes on from: --resume PATH, its own newest that can be read (auto), or None to start afresh.

    Given again, a command with --resume PATH goes on from what it has saved since. Raises UserError for a PATH that is missing or
    damaged, if none of the run's own can be read, and for what would start over an existing run without --overwrite.
    """
    own = own_checkpoint(args)
    if own.parent.is_dir():
        claim(args)
    newest = newest_readable(own)
    if args.resume == "auto" or newest and started_again():
        return newest
    path = Path(args.resume) if args.resume else None
    if path and not path.is_file():
        raise UserError(f"--resume {path}: no such file")
    if newest and not args.overwrite:
        if path and (
            path == own
            or load(newest, check=False, lazily=True).get("args", {}).get("resume") == args.resume
        ):
            return newest
        raise UserError(
            f"{own} exists and --resume {args.resume or repr('')} would start over it: use another --save_prefix, or --overwrite"
        )
    if path:
        load(path, lazily=True)
    return path


def newest_readable(own: Path) -> Path | None:
    """The newest checkpoint of a run that can be read; damaged ones before it are set aside. None if there is none at all. Raises UserError."""
    candidates, damaged = (
        [
            path
            for path in (own, *(previous(own, number) for number in range(1, 100)))
            if path.exists()
        ],
        [],
    )
    for path in candidates:
        try:
            load(path, lazily=True)
        except Damaged as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:
            print0(
                f"warning: {error}; set aside as {set_aside(bad, '.damaged').name}, going on from {path}"
            )
        return path
    if damaged:
        raise UserError(
            f"{damaged[0][1]}; nor can any before it: start over with another --save_prefix"
        )
    return None


def set_aside(path: Path, ending: str) -> Path:
    """Give a file another name, which no other file has; returns it."""
    names = (path.with_name(f"{path.name}{ending}{number or ''}") for number in count())
    free = next(name for name in names if not name.exists())
    os.replace(path, free)
    return free


def find_eval(args) -> Path | None:
    """The checkpoint that --eval and --extract_features read: --resume PATH, or (auto) this run's best, else its newest.

    None where there is none and --extract_features may take the encoder of --finetune. Raises UserError.
    """
    own = own_checkpoint(args)
    candidates = (
        [own.with_name(f"{args.save_prefix}_best.pth"), own]
        if args.resume == "auto"
        else [Path(args.resume)]
    )
    for path in candidates:
        if args.resume and path.is_file():
            return path
    if args.extract_features and args.finetune and args.resume in ("auto", ""):
        return None
    flag, cure = (
        ("--extract_features", "--resume PATH or --finetune PATH")
        if args.extract_features
        else ("--eval", "--resume PATH")
    )
    raise UserError(
        f"{flag} found no checkpoint at {' or '.join(map(str, candidates))}: give {cure}"
    )


def known_config(path: Path | None) -> dict | None:
    """The config of the checkpoint that a finetuning run evaluates or goes on from; None for a run from the start. Raises UserError."""
    if path is None:
        return None
    state = load(path, check=False, lazily=True)
    config = state.get("config")
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("classes"), list)
        or not isinstance(state.get("model"), dict)
    ):
        raise UserError(
            f"{path} is no checkpoint of a finetuning run (it has no classes): give one with --resume, or weights with --finetune"
        )
    return config


def check_config(path: str | Path, checkpoint: dict, config: dict) -> None:
    """Raises UserError when a checkpoint of ours describes another model than `config`."""
    changed = {
        key: (old, config.get(key))
        for key, old in checkpoint["config"].items()
        if config.get(key) != old
    }
    if changed:
        listing = ", ".join(
            f"{key} {short(old)} -> {short(new)}" for key, (old, new) in sorted(changed.items())
        )
        raise UserError(
            f"{path} is another model ({listing}): give the flags of that run, or another --save_prefix"
        )


def load_weights(path: str | Path, model: nn.Module, weights: dict) -> None:
    """Put weights that were read from `path` into a model, strictly. Raises UserError."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]] or [reason(error)]
        raise UserError(
            f"{path} does not fit the model ({len(faults)} faults): {short(faults[0], 200)}"
        ) from None


def check_sizes(path: str | Path, config: dict, weights: dict) -> None:
    """Raises UserError where a config asks for another width or depth than its weights have, before a model of that size is built."""
    first, blocks = (
        weights.get("norm.weight"),
        sum(
            str(name).startswith("blocks.") and str(name).endswith(".norm1.weight")
            for name in weights
        ),
    )
    deep = sum(
        str(name).startswith("decoder_blocks.") and str(name).endswith(".norm1.weight")
        for name in weights
    )
    told = {
        "embed_dim": len(first) if isinstance(first, torch.Tensor) and first.ndim == 1 else None,
        "depth": blocks,
        "decoder_depth": deep,
    }
    for key, value in told.items():
        if key in config and config[key] != value:
            raise UserError(
                f"{path} has a config of {key} {short(config[key])}, but weights of {value}: damaged, or not one of ours"
            )


def load_strictly(path: str | Path, model: nn.Module, config: dict) -> None:
    """Put a finetuned model's weights, head included, into a model of the same config. Raises UserError."""
    loaded = load(path)
    if not isinstance(loaded.get("config"), dict) or not isinstance(loaded.get("model"), dict):
        raise UserError(
            f"{path} is no checkpoint of a finetuning run (no config): --eval needs one"
        )
    check_config(path, loaded, config)
    load_weights(path, model, loaded["model"])
    print0(f"weights from {path}, update {loaded['step']}")


def short(value: object, most: int = 60) -> str:
    """A value in at most so many characters."""
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


if __name__ == "__main__":
    from util.export import main

    run_script(main)
