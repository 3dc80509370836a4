"""The command line of checkpoint files: convert one of any family to our own layout or to safetensors, or say what is in it.

python -m util.checkpoint convert IN OUT.pth --to native
python -m util.checkpoint convert IN FOLDER --to safetensors
python -m util.checkpoint inspect IN
"""

import argparse
import json
import os
import shutil
import zipfile
from pathlib import Path

from torch import Tensor

from util import importer
from util.checkpoint import save, short
from util.cli import Parser
from util.dist import UserError, print0

RUN_STATE = ("optimizer", "scaler")  # what a converted file leaves behind


def exportable(path: str | Path, given: dict) -> dict:
    """A checkpoint in our layout: ours without its optimizer, or the encoder (and decoder of our kind) of another family.

    given: sizes for what the file does not say. Raises UserError.
    """
    checkpoint = importer.read_file(path)
    found = importer.read(checkpoint, given, path)
    if found.family == "ours":
        return {key: value for key, value in checkpoint.items() if key not in RUN_STATE}
    decoder = {
        name: value
        for name, value in found.left.items()
        if found.has_our_decoder and not name.startswith("head.")
    }
    print0(
        f"{path} ({found.family}): {found.heads_from}; left behind: {', '.join(sorted(found.left.keys() - decoder.keys())) or 'nothing'}"
    )
    return {
        "model": found.weights | decoder,
        "config": found.sizes | found.pixels,
        "converted_from": found.family,
    }


def write_safetensors(folder: Path, checkpoint: dict) -> None:
    """Write model.safetensors and config.json (all but the tensors, and the sha256 of their file), whole or not at all."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(
            "--to safetensors needs safetensors, which is not installed: pip install safetensors"
        ) from None
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {
        name: value.contiguous().clone() for name, value in checkpoint["model"].items()
    }  # it refuses tensors that share memory
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    described = {key: value for key, value in checkpoint.items() if key != "model"}
    described["sha256"] = importer.digest(temporary / "model.safetensors")
    (temporary / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    for path in (temporary / "model.safetensors", temporary / "config.json", temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.replace(temporary, folder)


def inspect(path: str | Path, given: dict) -> list[tuple[str, str]]:
    """What is in a checkpoint, as (heading, text) rows. Raises UserError if it cannot be read."""
    checkpoint = importer.read_file(path)
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    described = file.with_name("config.json") if file.suffix == ".safetensors" else None
    if described is None:
        checked = (
            "checksums of all records are right"
            if zipfile.is_zipfile(path)
            else "old format, without checksums"
        )
    else:
        checked = (
            "sha256 is right"
            if described.is_file() and "sha256" in described.read_text()
            else "no checksum"
        )
    rows = [("file", f"{file}, {file.stat().st_size / 1e6:.1f} MB, {checked}")]
    try:
        found = importer.read(checkpoint, given, path)
        rows += [
            ("family", found.family),
            ("heads", found.heads_from),
            *((key, str(value)) for key, value in found.sizes.items() if key != "num_heads"),
            ("mean, std", f"{found.pixels['mean']}, {found.pixels['std']}"),
            ("encoder", count(found.weights)),
            ("beside it", count(found.left)),
            *((f"  {name}", f"not in the file: {what}") for name, what in found.made.items()),
        ]
    except UserError as error:
        rows.append(("encoder", f"none read: {error}"))
    for key, value in checkpoint.items():
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if key in ("args", "config") and isinstance(value, dict):
            rows += [
                (f"{key} {name}" if key == "config" else f"--{name}", short(part))
                for name, part in sorted(value.items())
            ]
        elif not isinstance(value, (dict, Tensor)):
            rows.append((str(key), short(value)))
        elif key in RUN_STATE:
            rows.append((key, "here"))
    return rows


def count(tensors: dict[str, Tensor]) -> str:
    """How many tensors and parameters."""
    return f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values()) / 1e6:.2f} M parameters"


def main(argv: list[str] | None = None) -> None:
    """The command line. Raises UserError for bad input."""
    parser = Parser("Convert or inspect a checkpoint file.", prog="python -m util.checkpoint")
    parser.add_argument(
        "command",
        choices=("convert", "inspect"),
        help="write it in our layout, without the optimizer; or say what is in it",
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="a checkpoint of any family: a file, or a folder with model.safetensors",
    )
    parser.add_argument(
        "target",
        metavar="OUT",
        nargs="?",
        help="convert: the .pth to write, or for safetensors the folder; it must not exist",
    )
    parser.add_argument(
        "--to", choices=("native", "safetensors"), help="convert: into which layout"
    )
    parser.add_argument(
        "--num_heads",
        type=int,
        help="attention heads: only for files that do not say it, likewise the next three",
    )
    parser.add_argument("--img_size", type=int, help="frame side in pixels")
    parser.add_argument("--num_frames", type=int, help="frames per clip")
    parser.add_argument("--t_patch_size", type=int, help="frames per tubelet")
    args = parser.parse_args(argv)
    sizes = {
        "num_heads": args.num_heads,
        "img_size": args.img_size,
        "num_frames": args.num_frames,
        "t_patch_size": args.t_patch_size,
    }
    given = {key: value for key, value in sizes.items() if value is not None}
    if (args.command == "convert") != bool(args.target and args.to):
        raise UserError(
            "the commands are: convert IN OUT --to native, convert IN OUT --to safetensors, inspect IN"
        )
    if args.command == "inspect":
        rows = inspect(args.source, given)
        width = max(len(heading) for heading, _ in rows)
        print0("\n".join(f"{heading:<{width}}  {text}" for heading, text in rows))
        return
    target = Path(args.target)
    if target.exists():
        raise UserError(f"{target} exists: give another name, nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = exportable(args.source, given)
    write_safetensors(target, checkpoint) if args.to == "safetensors" else save(target, checkpoint)
    print0(f"{target}: {len(checkpoint['model'])} tensors")
