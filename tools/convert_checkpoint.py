"""Convert a checkpoint of any family to our own layout or to safetensors.

python -m tools.convert_checkpoint IN OUT.pth --to native
python -m tools.convert_checkpoint IN FOLDER --to safetensors

See docs/checkpoints.md.
"""

import json
import os
import shutil
from pathlib import Path

from util.checkpoint import import_safetensors, load, save
from util.checkpoint_formats import given_sizes, parse_checkpoint
from util.cli import Parser
from util.dist import UserError, print0, run_script
from util.files import fsync_path, sha256_of

RUN_STATE = ("optimizer", "scaler")  # not part of a converted file


def to_our_layout(path: str | Path, given: dict) -> dict:
    """Return a checkpoint in our layout.

    Our own checkpoints lose their optimizer; other families keep the encoder, and the decoder if
    it is ours. given: sizes by name that the file does not record. Raises UserError.
    """
    checkpoint = load(path)
    found = parse_checkpoint(checkpoint, given, path)
    if found.family == "ours":
        return {key: value for key, value in checkpoint.items() if key not in RUN_STATE}
    print0(
        f"{path} ({found.family}): {found.num_heads_source}; "
        f"left out: {', '.join(sorted(found.unused)) or 'nothing'}"
    )
    config = found.sizes | found.decoder_sizes | found.pixel_stats
    if found.targets != "pixels" and found.decoder:
        config["targets"] = found.targets
    if found.head:
        config["num_classes"] = len(found.head["head.weight"])
        recorded = {"global_pool": found.global_pool, "classes": found.config.get("classes")}
        config |= {name: value for name, value in recorded.items() if value is not None}
    return {
        "model": found.weights | found.decoder | found.head,
        "config": config,
        "args": found.flags,
        "converted_from": found.family,
    }


def write_safetensors(folder: Path, checkpoint: dict) -> None:
    """Write a folder with model.safetensors and config.json, completely or not at all.

    config.json holds everything but the tensors, and the SHA-256 of model.safetensors. Raise
    UserError if safetensors is not installed.
    """
    safetensors_torch = import_safetensors("--to safetensors")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights_path = temporary / "model.safetensors"
    config_path = temporary / "config.json"
    weights = checkpoint["model"].items()
    tensors = {name: value.contiguous().clone() for name, value in weights}  # share no memory
    safetensors_torch.save_file(tensors, weights_path, metadata={"format": "pt"})
    described = {key: value for key, value in checkpoint.items() if key != "model"}
    described["sha256"] = sha256_of(weights_path)
    config_path.write_text(json.dumps(described, indent=1) + "\n")
    for path in (weights_path, config_path, temporary):
        fsync_path(path)
    os.replace(temporary, folder)


def add_size_flags(parser: Parser) -> None:
    """Add the flags for sizes that a file may not record."""
    parser.add_argument(
        "--num_heads",
        type=int,
        help="attention heads: only for files that do not record it, like the next three",
    )
    parser.add_argument("--img_size", type=int, help="frame side in pixels")
    parser.add_argument("--num_frames", type=int, help="frames per clip")
    parser.add_argument("--t_patch_size", type=int, help="frames per tubelet")


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input."""
    parser = Parser(__doc__, prog="python -m tools.convert_checkpoint")
    parser.add_argument(
        "source",
        metavar="IN",
        help="a checkpoint of any family: a file, or a folder with model.safetensors",
    )
    parser.add_argument(
        "target", metavar="OUT", help="the .pth to write, or for safetensors the folder"
    )
    parser.add_argument(
        "--to", choices=("native", "safetensors"), required=True, help="the layout to write"
    )
    add_size_flags(parser)
    args = parser.parse_args(argv)
    target = Path(args.target)
    if target.exists():
        raise UserError(f"{target} exists. Use another name: nothing is overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    given = given_sizes(args.num_heads, args.img_size, args.num_frames, args.t_patch_size)
    checkpoint = to_our_layout(args.source, given)
    if args.to == "safetensors":
        write_safetensors(target, checkpoint)
    else:
        save(target, checkpoint)
    print0(f"{target}: {len(checkpoint['model'])} tensors")


if __name__ == "__main__":
    run_script(main)
