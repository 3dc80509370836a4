"""Print the contents of a checkpoint file of any family.

python -m tools.inspect_checkpoint FILE
python -m tools.inspect_checkpoint FOLDER        a folder with model.safetensors

See docs/checkpoints.md.
"""

import argparse
import contextlib
import zipfile
from pathlib import Path

from torch import Tensor

from tools.convert_checkpoint import RUN_STATE, add_unrecorded_sizes
from tools.reading import given_sizes
from util.checkpoint import file_of, load, truncate
from util.checkpoint_formats import (
    ImportedModel,
    find_num_heads,
    is_attentive,
    parse_checkpoint,
    read_layout,
)
from util.cli import Parser
from util.dist import UserError, escaped, print0, run_script
from util.model_source import read_out_name

Rows = list[tuple[str, str]]  # (heading, text)
# Two guesses of the sizes that a file may not record. A checkpoint is parsed with either of them;
# what then differs is not in the file.
GUESSED = {"img_size": 224, "num_frames": 16, "t_patch_size": 2, "num_heads": 1}
OTHER_GUESS = {"img_size": 448, "num_frames": 64, "t_patch_size": 4, "num_heads": 1}
SHOWN_TENSORS = 10  # of an unknown layout
SHOWN_ENTRIES = 100  # other than tensors, flags and config


def inspect(path: str | Path, given: dict) -> Rows:
    """Return the contents of a checkpoint as rows. Raises UserError if it cannot be read."""
    checkpoint = load(path)
    rows = [("file", describe_file(path))]
    try:
        rows += model_rows(checkpoint, given, path)
    except UserError as error:
        rows.append(("model", f"not recognized: {str(error).removeprefix(f'{path}: ')}"))
        rows += tensor_rows(checkpoint)
    return rows + entry_rows(checkpoint)


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


def model_rows(checkpoint: dict, given: dict, path: str | Path) -> Rows:
    """Return the family, sizes and tensors of the model in a checkpoint.

    given: sizes by name that the file may not record. Those that are missing are named in their
    rows. Raises UserError if there is no model of a supported family.
    """
    layout = read_layout(checkpoint, path)
    found, other = (
        parse_checkpoint(checkpoint, guess | given, path) for guess in (GUESSED, OTHER_GUESS)
    )
    heads = f"not recorded; pass {flag_of('num_heads')}"
    with contextlib.suppress(UserError):
        num_heads, source = find_num_heads(layout.encoder, layout.config, given, path)
        heads = f"{num_heads} attention heads ({source})"
    rows = [("family", found.family), ("heads", heads)]
    rows += size_rows(found.sizes, other.sizes)
    rows += size_rows(found.decoder_sizes, other.decoder_sizes)
    if found.decoder and "decoder_num_heads" not in found.decoder_sizes:
        rows.append(("decoder_num_heads", "not recorded"))
    rows += [
        ("mean, std", f"{found.pixel_stats['mean']}, {found.pixel_stats['std']}"),
        ("encoder", describe_tensors(found.weights)),
        ("decoder", describe_tensors(found.decoder)),
        *head_rows(found),
        ("other tensors", describe_tensors(found.unused)),
    ]
    for name, what in found.synthesized.items():
        if other.synthesized[name] == what:
            rows.append((f"  {name}", f"not in the file: {what}"))
    return rows


def size_rows(sizes: dict, other_sizes: dict) -> Rows:
    """Return sizes as rows. Those that differ from `other_sizes` are not recorded."""
    rows = []
    for name, size in sizes.items():
        text = str(size)
        if other_sizes[name] != size:
            text = f"not recorded; pass {flag_of(name)}"
        if name != "num_heads":
            rows.append((name, text))
    return rows


def flag_of(name: str) -> str:
    """Return the flag for a size that is not recorded."""
    if name in GUESSED:
        return f"--{name}"
    return "--num_frames"  # the number of predicted frames depends on it


def head_rows(found: ImportedModel) -> Rows:
    """Return the shape, read-out and class names of a classifier's head, [] if there is none."""
    if not found.head:
        return []
    weight = found.head["head.weight"]
    read_out = "not recorded; pass --global_pool or --cls_token where it is used"
    if is_attentive(found.head):
        read_out = "reads all tokens by attention (attentive probe)"
    elif found.global_pool is not None:
        read_out = f"reads the {read_out_name(found.global_pool)}"
    classes = found.config.get("classes")
    names = "not recorded"
    if isinstance(classes, list):
        names = truncate(", ".join(str(name) for name in classes), 200)
    return [
        ("head", f"{len(weight)} classes, weight {tuple(weight.shape)}"),
        ("read-out", read_out),
        ("classes", names),
    ]


def tensor_rows(checkpoint: dict) -> Rows:
    """Return the keys of an unknown layout, and its first tensors with their shapes."""
    tensors = named_tensors(checkpoint)
    rows = [("keys", truncate(", ".join(str(key) for key in checkpoint), 200))]
    rows.append(("tensors", describe_tensors(tensors)))
    for name in list(tensors)[:SHOWN_TENSORS]:
        rows.append((f"  {name}", str(tuple(tensors[name].shape))))
    if len(tensors) > SHOWN_TENSORS:
        rows.append(("  ...", f"{len(tensors) - SHOWN_TENSORS} more"))
    return rows


def named_tensors(entries: dict) -> dict[str, Tensor]:
    """Return all tensors in a dictionary and the dictionaries in it, by their keys with dots.

    A dictionary that occurs several times, or in itself, counts once.
    """
    tensors = {}
    seen = {id(entries)}
    waiting = [(str(key), value) for key, value in reversed(entries.items())]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{name}.{key}", entry) for key, entry in reversed(value.items())]
    return tensors


def entry_rows(checkpoint: dict) -> Rows:
    """Return the entries of a checkpoint that are not tensors, flags and config one by one."""
    rows = []
    others = []
    for key, value in checkpoint.items():
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if key == "args" and isinstance(value, dict):
            rows += sorted((f"--{name}", truncate(flag)) for name, flag in value.items())
        elif key == "config" and isinstance(value, dict):
            rows += sorted((f"config {name}", truncate(entry)) for name, entry in value.items())
        elif not isinstance(value, (dict, Tensor)):
            others.append((truncate(key), truncate(value)))
        elif key in RUN_STATE:
            others.append((key, "present"))
    rows += others[:SHOWN_ENTRIES]
    if len(others) > SHOWN_ENTRIES:
        rows.append(("...", f"{len(others) - SHOWN_ENTRIES} more"))
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
        help="a checkpoint of any family: a file, a folder with model.safetensors, or hf:...",
    )
    add_unrecorded_sizes(parser)
    args = parser.parse_args(argv)
    given = given_sizes(args)
    rows = inspect(args.source, given)
    width = max(len(heading) for heading, _ in rows)
    for heading, text in rows:
        print0(escaped(f"{heading:<{width}}  {text}"))


if __name__ == "__main__":
    run_script(main)
