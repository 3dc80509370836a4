"""Convert a checkpoint of any family to our own layout or to safetensors.

python -m tools.convert_checkpoint IN OUT.pth --to native
python -m tools.convert_checkpoint IN FOLDER --to safetensors

FOLDER can be uploaded to the Hugging Face Hub: it has a model card, README.md. See
docs/checkpoints.md.
"""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from tools.model_card import model_card, without_folders
from tools.reading import given_sizes
from util.checkpoint import first_line, import_safetensors, load, save
from util.checkpoint_formats import describe_num_heads, parse_checkpoint
from util.cli import Parser
from util.dist import UserError, print0, run_script
from util.ema import averaged_checkpoint, has_ema
from util.files import fsync_path, sha256_of

RUN_STATE = ("optimizer", "scaler", "ema")  # not part of a converted file
TRAINED_HEADS = "probe_heads."  # nor are these: the best of them is the model's head
UNPUBLISHED = ("model", "unreadable")  # not part of config.json; the latter names the user's files


def to_our_layout(path: str | Path, given: dict, averaged: bool = False) -> dict:
    """Return a checkpoint in our layout.

    Our own checkpoints lose their optimizer, and one of their two sets of weights if they have an
    EMA; other families keep the encoder, and the decoder if it is ours. given: sizes by name that
    the file does not record. averaged: keep the EMA instead of the weights. Raises UserError.
    """
    checkpoint = load(path)
    if averaged:
        checkpoint = averaged_checkpoint(path, checkpoint)
    elif has_ema(checkpoint):
        print0(f"{path} has an EMA beside the weights: it is left out (--ema takes it instead)")
    found = parse_checkpoint(checkpoint, given, path)
    if found.family == "ours":
        weights = checkpoint["model"].items()
        model = {name: value for name, value in weights if not name.startswith(TRAINED_HEADS)}
        kept = {key: value for key, value in checkpoint.items() if key not in RUN_STATE}
        return kept | {"model": model}
    print0(
        f"{path} ({found.family}): {describe_num_heads(found)}; "
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


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a .safetensors file. Raises UserError, also if safetensors is not installed."""
    safetensors_torch = import_safetensors("--to safetensors")
    from safetensors import SafetensorError

    try:
        safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # for example a full disk
        raise UserError(f"{path} cannot be written ({first_line(error)})") from error


def write_safetensors(folder: Path, checkpoint: dict, card: str) -> None:
    """Write a folder with model.safetensors, config.json and README.md, or nothing.

    config.json holds everything but the tensors, and the SHA-256 of model.safetensors. Paths in
    it, which are flags of the run, lose their folders. card: the text of README.md. Raises OSError
    and UserError.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        weights_path = temporary / "model.safetensors"
        config_path = temporary / "config.json"
        card_path = temporary / "README.md"
        weights = checkpoint["model"].items()
        tensors = {name: value.contiguous().clone() for name, value in weights}  # share no memory
        save_tensors(weights_path, tensors)
        described = {key: value for key, value in checkpoint.items() if key not in UNPUBLISHED}
        if "args" in described:
            described["args"] = without_folders(described["args"])
        described["sha256"] = sha256_of(weights_path)
        config_path.write_text(json.dumps(described, indent=1, default=str) + "\n")
        card_path.write_text(card)
        shutil.copymode(config_path, weights_path)  # safetensors leaves the umask out
        for path in (weights_path, config_path, card_path, temporary):
            fsync_path(path)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def add_unrecorded_sizes(parser: Parser) -> None:
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
        help="a checkpoint of any family: a file, a folder with model.safetensors, or hf:...",
    )
    parser.add_argument(
        "target", metavar="OUT", help="the .pth to write, or for safetensors the folder"
    )
    parser.add_argument(
        "--to", choices=("native", "safetensors"), required=True, help="the layout to write"
    )
    parser.add_argument(
        "--ema", action="store_true", help="keep the EMA of a run with --ema instead of its weights"
    )
    add_unrecorded_sizes(parser)
    args = parser.parse_args(argv)
    target = Path(args.target)
    if target.exists():
        raise UserError(f"{target} exists. Use another name: nothing is overwritten.")
    if args.to == "native" and target.suffix == ".safetensors":
        raise UserError(f"{target} would be a file of torch.save. Use a name that ends in .pth.")
    given = given_sizes(args)
    checkpoint = to_our_layout(args.source, given, args.ema)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if args.to == "safetensors":
            write_safetensors(target, checkpoint, model_card(checkpoint, args.source))
        else:
            save(target, checkpoint)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({first_line(error)})") from error
    print0(f"{target}: {len(checkpoint['model'])} tensors")
    if args.to == "safetensors":
        print0(f"fill in the license in {target / 'README.md'} before you publish the folder")


if __name__ == "__main__":
    run_script(main)
