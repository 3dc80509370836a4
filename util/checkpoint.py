"""Checkpoints of a run: written atomically, read with one line of reason when they cannot be. Encoders from other files: util/importer.py.

A file holds `model`, `optimizer`, `scaler`, `epoch`, `step` (optimizer updates), `samples_consumed` (videos), `config`
(what the model is: constructor arguments, pixel mean and std) and `args` (the flags, a plain dict).
"""

import argparse
import os
import zipfile
from pathlib import Path

import torch
from torch import nn

from util.dist import UserError, barrier, print0, rank, run_script


def save(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is always complete: temp file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing, damaged, or holds more than tensors and plain data."""
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} not found: check the path")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise ValueError(f"the checksum of {wrong} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the ancestors' `args`
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may stumble in any way over bytes that are no checkpoint
        raise UserError(f"checkpoint {path} cannot be read ({reason(error)}): damaged, or not a checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary: not one of ours")
    return checkpoint


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def own_checkpoint(args) -> Path:
    """Where this run's newest checkpoint lies, or will."""
    return Path(args.output_dir, f"{args.save_prefix}.pth")


def find_resume(args) -> Path | None:
    """The checkpoint that --resume asks for: a path, this run's own newest (auto), or None to start afresh.

    Raises UserError for a path that is missing, and for --resume '' over an existing run without --overwrite.
    """
    own = own_checkpoint(args)
    if args.resume == "auto":
        return own if own.exists() else None
    if args.resume:
        if not Path(args.resume).is_file():
            raise UserError(f"--resume {args.resume}: no such file")
        return Path(args.resume)
    if own.exists() and not args.overwrite:
        raise UserError(f"{own} exists and --resume '' would start over it: use another --save_prefix, or --overwrite")
    return None


def find_eval(args) -> Path | None:
    """The checkpoint that --eval and --extract_features read: --resume PATH, or (auto) this run's best, else its newest.

    None where there is none and --extract_features may take the encoder of --finetune. Raises UserError.
    """
    own = own_checkpoint(args)
    candidates = [own.with_name(f"{args.save_prefix}_best.pth"), own] if args.resume == "auto" else [Path(args.resume)]
    for path in candidates:
        if args.resume and path.is_file():
            return path
    if args.extract_features and args.finetune and args.resume in ("auto", ""):
        return None
    flag, cure = ("--extract_features", "--resume PATH or --finetune PATH") if args.extract_features else ("--eval", "--resume PATH")
    raise UserError(f"{flag} found no checkpoint at {' or '.join(map(str, candidates))}: give {cure}")


def known_config(args) -> dict | None:
    """The config of the checkpoint that a finetuning run evaluates or goes on from; None for a run from the start. Raises UserError."""
    path = find_eval(args) if args.eval or args.extract_features else find_resume(args)
    if path is None:
        return None
    config = load(path).get("config")
    if not isinstance(config, dict) or "classes" not in config:
        raise UserError(f"{path} is no checkpoint of a finetuning run (it has no classes): give one with --resume, or weights with --finetune")
    return config


def state_of(model: nn.Module, optimizer, scaler, args, config: dict, *, epoch: int, step: int, samples_consumed: int) -> dict:
    """Everything that a run needs to go on: the content of a checkpoint file."""
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "epoch": epoch,
        "step": step, "samples_consumed": samples_consumed, "config": config, "args": dict(sorted(vars(args).items())),
    }  # fmt: skip


def save_on_rank0(path: Path, checkpoint: dict) -> None:
    """`save` on rank 0 while the others wait."""
    if rank() == 0:
        save(path, checkpoint)
    barrier()


def check_config(path: str | Path, checkpoint: dict, config: dict) -> None:
    """Raises UserError when a checkpoint of ours describes another model than `config`."""
    changed = {key: (old, config.get(key)) for key, old in checkpoint["config"].items() if config.get(key) != old}
    if changed:
        listing = ", ".join(f"{key} {short(old)} -> {short(new)}" for key, (old, new) in sorted(changed.items()))
        raise UserError(f"{path} is another model ({listing}): give the flags of that run, or another --save_prefix")


def load_strictly(path: str | Path, model: nn.Module, config: dict) -> None:
    """Put a finetuned model's weights, head included, into a model of the same config. Raises UserError."""
    loaded = load(path)
    if not isinstance(loaded.get("config"), dict) or "model" not in loaded:
        raise UserError(f"{path} is no checkpoint of a finetuning run (no config): --eval needs one")
    check_config(path, loaded, config)
    model.load_state_dict(loaded["model"])
    print0(f"weights from {path}, update {loaded['step']}")


def short(value: object) -> str:
    """A value in at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def resume(path: Path, model: nn.Module, optimizer, scaler, args, config: dict) -> dict:
    """Put a run's state back. Returns the checkpoint.

    Flags that changed since are named; weight decay and betas follow the flags, not the file. Raises UserError when the
    file holds another architecture.
    """
    checkpoint = load(path)
    missing = {"model", "optimizer", "scaler", "step", "samples_consumed", "config", "args"} - checkpoint.keys()
    if missing:
        raise UserError(f"{path} is no checkpoint of a run (no {', '.join(sorted(missing))}): --resume needs one")
    check_config(path, checkpoint, config)
    now = dict(vars(args))
    for key, old in checkpoint["args"].items():
        if key in now and now[key] != old and not (isinstance(old, (list, tuple)) and list(old) == list(now[key])):
            print0(f"flag changed since the checkpoint: --{key} {old} -> {now[key]}")
    model.load_state_dict(checkpoint["model"])
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    scaler.load_state_dict(checkpoint["scaler"]) if scaler.is_enabled() and checkpoint["scaler"] else None
    print0(f"resumed from {path} at update {checkpoint['step']}")
    return checkpoint


if __name__ == "__main__":
    from util.export import main

    run_script(main)
