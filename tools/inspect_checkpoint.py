"""Print the contents of a checkpoint file of any family.

python -m tools.inspect_checkpoint FILE
python -m tools.inspect_checkpoint FOLDER        a folder with model.safetensors

See docs/checkpoints.md.
"""

import argparse
import zipfile
from pathlib import Path

from torch import Tensor

from tools.convert_checkpoint import RUN_STATE, add_size_flags
from util.checkpoint import file_of, load, truncate
from util.checkpoint_formats import given_sizes, parse_checkpoint
from util.cli import Parser
from util.dist import UserError, print0, run_script

Rows = list[tuple[str, str]]  # (heading, text)


def inspect(path: str | Path, given: dict) -> Rows:
    """Return the contents of a checkpoint as rows. Raises UserError if it cannot be read."""
    checkpoint = load(path)
    return [
        ("file", describe_file(path)),
        *encoder_rows(checkpoint, given, path),
        *entry_rows(checkpoint),
    ]


def describe_file(path: str | Path) -> str:
    """Return the path and size of a file that `load` accepted, and the checksums compared."""
    file = file_of(path)
    sidecar = file.with_name("config.json")
    if file.suffix != ".safetensors" and zipfile.is_zipfile(file):
        checked = "checksums of all records are right"
    elif file.suffix != ".safetensors":
        checked = "old format, without checksums"
    elif sidecar.is_file() and "sha256" in sidecar.read_text():
        checked = "sha256 is right"
    else:
        checked = "no checksum"
    return f"{path}, {file.stat().st_size / 1e6:.1f} MB, {checked}"


def encoder_rows(checkpoint: dict, given: dict, path: str | Path) -> Rows:
    """Return the family, sizes and tensors of the encoder in a checkpoint, if there is one."""
    try:
        found = parse_checkpoint(checkpoint, given, path)
    except UserError as error:
        return [("encoder", f"none read: {error}")]
    rows = [("family", found.family), ("heads", found.num_heads_source)]
    for name, size in found.sizes.items():
        if name != "num_heads":
            rows.append((name, str(size)))
    rows += [
        ("mean, std", f"{found.pixel_stats['mean']}, {found.pixel_stats['std']}"),
        ("encoder", describe_tensors(found.weights)),
        ("beside it", describe_tensors(found.unused)),
    ]
    rows += [(f"  {name}", f"not in the file: {what}") for name, what in found.synthesized.items()]
    return rows


def entry_rows(checkpoint: dict) -> Rows:
    """Return the entries of a checkpoint that are not tensors, flags and config one by one."""
    rows = []
    for key, value in checkpoint.items():
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if key == "args" and isinstance(value, dict):
            rows += [(f"--{name}", truncate(flag)) for name, flag in sorted(value.items())]
        elif key == "config" and isinstance(value, dict):
            rows += [(f"config {name}", truncate(entry)) for name, entry in sorted(value.items())]
        elif not isinstance(value, (dict, Tensor)):
            rows.append((str(key), truncate(value)))
        elif key in RUN_STATE:
            rows.append((key, "present"))
    return rows


def describe_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the number of tensors and parameters."""
    parameters = sum(value.numel() for value in tensors.values())
    return f"{len(tensors)} tensors, {parameters / 1e6:.2f} M parameters"


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input."""
    parser = Parser(__doc__, prog="python -m tools.inspect_checkpoint")
    parser.add_argument(
        "source",
        metavar="FILE",
        help="a checkpoint of any family: a file, or a folder with model.safetensors",
    )
    add_size_flags(parser)
    args = parser.parse_args(argv)
    given = given_sizes(args.num_heads, args.img_size, args.num_frames, args.t_patch_size)
    rows = inspect(args.source, given)
    width = max(len(heading) for heading, _ in rows)
    print0("\n".join(f"{heading:<{width}}  {text}" for heading, text in rows))


if __name__ == "__main__":
    run_script(main)
