"""Write features of videos or images: the pooled tokens that enter a classifier, or all tokens.

python -m tools.extract_features CKPT --data_dir FOLDER [--output FILE.npz]
python -m tools.extract_features CKPT --data_csv FILE --stride_seconds 1 --output FOLDER/
torchrun --standalone --nproc_per_node 8 -m tools.extract_features CKPT --data_dir FOLDER

CKPT is a checkpoint of any family. A finetuned model uses its own read-out, any other the mean of
the patch tokens. Frame size and frame spacing are the checkpoint's unless given. Images become
static clips. A subfolder of the data is a class; files directly in it have no label.

A video gives its center clip, or with --stride_seconds S a clip from every S seconds on. FILE.npz
holds the features of all clips. FOLDER/ gets a file per video, and a call that was interrupted is
continued by the same command. See docs/finetuning.md. Unreadable files are left out and listed.
The files are the same on any number of processes.

Letters as in models_vit.py.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.datasets import ImageDataset, SampleDataset
from data.frame_folder import check_frame_folders
from data.loader import collate_readable, eval_loader
from data.manifest import part_name
from data.transforms import decode_short_side, image_transform
from models_vit import VideoEncoder, token_grid
from tools.data_doctor import Progress
from tools.feature_clips import (
    Clips,
    Inputs,
    clips_along,
    index_files,
    list_inputs,
    one_clip_each,
)
from tools.feature_files import (
    ClipRows,
    common_folder,
    count_clips,
    file_names,
    open_folder,
    save_table,
    write_files,
    write_lists,
)
from tools.output_files import check_writable, checkpoint_name, refuse_existing
from tools.reading import (
    CLIP_FLAGS,
    add_clip_flags,
    add_device_flags,
    add_loader_flags,
    add_size_flags,
    center_clips,
    check_seconds,
    clip_reading,
    given_sizes,
    nothing_readable,
    parse_again,
    print_unreadable,
    worker_settings,
)
from util import dist, same_run
from util.cli import Parser, nonnegative_int, positive_float
from util.dist import DistEnv, UserError, print0
from util.evaluation import feature_rows, gather_readable
from util.hub import is_hub_path
from util.model_source import ModelSource, describe_checkpoint
from util.optim import amp_dtype
from util.pretrained import load_encoder

INFORMATIVE = ("checkpoint",)  # settings of a folder that may differ: the weights are compared
GRID_SIZES = ("img_size", "patch_size", "num_frames", "t_patch_size")  # of `token_grid`
CLASS_TOKEN = "class token"  # a read-out that no flag names
CLIPS_PER_FILE = 1 << 32  # more than any file has, for one number per clip


class ReadOut(NamedTuple):
    """Which features to take of a clip's tokens."""

    kind: str  # "mean" of the patch tokens, CLASS_TOKEN, or "none": all patch tokens
    layer: int  # number of blocks that the tokens have passed
    repeats_frame: bool  # whether an image is repeated for all frames


def get_parser() -> Parser:
    """Return the flags of this tool."""
    parser = Parser(__doc__, prog="python -m tools.extract_features")
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a checkpoint of any family: a file, a folder with model.safetensors, or hf:...",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", default="", help="folder of videos or of images")
    source.add_argument(
        "--data_csv",
        default="",
        help="a manifest (path[,label[,start,end]] per line) instead of --data_dir",
    )
    parser.add_argument(
        "--output",
        help="the .npz to write, or a folder (default: CKPT_features.npz beside the checkpoint)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing .npz")
    parser.add_argument(
        "--layer",
        type=nonnegative_int,
        help="take the tokens after this block; 0: the embedding (default: the last, and the norm)",
    )
    parser.add_argument(
        "--tokens",
        choices=("mean", "none"),
        default="mean",
        help="mean: pool the patch tokens, or as a finetuned model does; none: keep all of them",
    )
    parser.add_argument(
        "--stride_seconds",
        type=positive_float,
        metavar="S",
        help="take a clip from every S seconds of a video on (default: the center clip)",
    )
    add_size_flags(parser)
    add_clip_flags(parser)
    add_loader_flags(parser)
    add_device_flags(parser)
    return parser


def default_output(checkpoint: str) -> Path:
    """Return CKPT_features.npz beside the checkpoint; of a remote one, in the current folder."""
    name = f"{checkpoint_name(checkpoint)}_features.npz"
    source = Path(checkpoint)
    if is_hub_path(checkpoint):
        return Path(name)
    if source.name in ("", ".."):  # the current folder, or the one above
        source = source.absolute().resolve()
    return source.with_name(name)


def output_path(args: argparse.Namespace) -> Path:
    """Return the file or folder to write; a folder's name has no ending, or a / after it.

    Raises UserError for other endings, for an existing file, and if it cannot be made.
    """
    if args.output is None:
        path = default_output(args.checkpoint)
    else:
        path = Path(args.output)
    if path.suffix == ".npz" and not path.is_dir():
        refuse_existing(path, args.overwrite, "--output")
        return path
    if path.suffix == ".npz":
        raise UserError(f"--output {path} is a folder. Choose a name without .npz for a folder.")
    is_folder = path.is_dir() or str(args.output).endswith("/")
    if path.suffix and not is_folder:
        raise UserError(
            f"--output {path} does not end in .npz. Choose such a name, or a folder: {path}/"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file, but not an .npz. Choose another name.")
    if args.overwrite:
        raise UserError(
            f"--overwrite does not apply to a folder: complete files in {path} are kept. "
            "Remove the folder, or choose another --output."
        )
    check_writable(path, "--output")
    return path


def check_samples(samples: Inputs, args: argparse.Namespace, output: Path) -> None:
    """Raise UserError for flags that do not fit the samples: images, or parts of videos."""
    if samples.are_images and args.stride_seconds is not None:
        raise UserError("--stride_seconds is for videos, but the files are images. Drop it.")
    if args.sampling == "uniform" and args.stride_seconds is not None:
        raise UserError(
            "--stride_seconds cuts videos into clips of --sampling_rate, which uniform sampling "
            "does not have. Drop it, or pass --sampling dense."
        )
    if samples.spans is None:
        return
    if args.stride_seconds is not None:
        raise UserError(
            f"--stride_seconds cuts whole videos, but {args.data_csv} has start and end already. "
            "Drop one of them."
        )
    if output.suffix != ".npz":
        raise UserError(
            f"--output {output} is a folder of a file per video, but {args.data_csv} has parts of "
            "videos. Choose a name that ends in .npz."
        )


def choose_read_out(source: ModelSource, args: argparse.Namespace) -> ReadOut:
    """Return what to take of the tokens. Raises UserError for a layer that the model lacks.

    A class token is read only by a classifier that was trained to.
    """
    depth = source.sizes["depth"]
    layer = depth if args.layer is None else args.layer
    if layer > depth:
        raise UserError(
            f"--layer {layer}: {source.path} has {depth} blocks. "
            f"Choose 0 (the embedding) to {depth} (the last block)."
        )
    kind = args.tokens
    if kind == "mean" and source.num_classes is not None:
        if source.attentive:
            print0(
                f"note: {source.path} is an attentive probe; the features are the mean of the "
                "patch tokens, without its pool."
            )
        elif source.global_pool is None:
            print0(
                f"note: {source.path} does not record its read-out; the features are the mean of "
                "the patch tokens."
            )
        elif not source.global_pool and source.sizes["cls_embed"]:
            kind = CLASS_TOKEN
    repeats_frame = source.flags.get("static_clip", "exact") != "folded"
    return ReadOut(kind, layer, repeats_frame)


def read_tokens(encoder: VideoEncoder, clips: Tensor, read_out: ReadOut) -> Tensor:
    """Return the features of clips (B, 3, T, H, W) uint8: (B, D), or all tokens (B, t', h, w, D).

    After the last block the norm is applied as in the classifier: to the pooled token, or to all.
    The tokens of earlier blocks are not normalized.
    """
    blocks = encoder.blocks[: read_out.layer]
    x, delta = encoder.run_blocks(blocks, *encoder.embed(clips))
    tokens = x + delta  # (B, [1 +] L, D)
    patches = tokens[:, int(encoder.cls_embed) :]
    if read_out.kind == "mean":
        values = patches.mean(dim=1)
    elif read_out.kind == CLASS_TOKEN:
        values = tokens[:, 0]
    else:
        values = patches.unflatten(1, encoder.grid)
    if read_out.layer == len(encoder.blocks):
        values = encoder.norm(values)
    return values


def make_read_out(
    encoder: VideoEncoder, read_out: ReadOut, are_images: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function from clips (B, 3, T, H, W) uint8 to features; T = 1 for images."""
    num_frames = encoder.config["num_frames"]
    repeats_frame = are_images and read_out.repeats_frame

    @torch.no_grad()
    def read(clips: Tensor) -> Tensor:
        if repeats_frame:
            clips = clips.expand(-1, -1, num_frames, -1, -1)
        return read_tokens(encoder, clips, read_out)

    return read


class Extraction:
    """Computes the features of files on this process.

    unreadable: {file: reason} so far.
    """

    def __init__(
        self,
        *,
        encoder: VideoEncoder,
        read_out: ReadOut,
        samples: Inputs,
        args: argparse.Namespace,
        env: DistEnv,
        quarantine: Path,
    ):
        self.config = encoder.config
        self.read = make_read_out(encoder, read_out, samples.are_images)
        self.samples = samples
        self.args = args
        self.env = env
        self.amp = amp_dtype(args.amp, env.device)
        self.workers = worker_settings(args, quarantine)
        self.unreadable: dict[int, str] = {}

    @property
    def clip_seconds(self) -> float:
        """How long a clip lasts."""
        return self.args.sampling_rate * self.config["num_frames"] / self.args.target_fps

    def find_clips(self, files: list[int]) -> Clips:
        """Return the clips of this process's share of the files."""
        share = files[self.env.rank :: self.env.world_size]
        stride = self.args.stride_seconds
        if stride is None:
            return one_clip_each(share, self.samples)
        index = index_files(
            share,
            self.samples,
            self.workers.num_workers,
            self.workers.read_timeout,
            self.args.frames_fps,
        )
        return clips_along(share, self.samples, index, self.clip_seconds, stride)

    def rows(self, clips: Clips) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (indices of some clips (b,), their features (b, ...) float32), in order.

        Unreadable clips are left out; `unreadable` names their files.
        """
        self.unreadable |= clips.unreadable
        total = len(clips.file)
        if total == 0:
            return

        def note_unreadable(batch: dict) -> None:
            for index, reason in batch["unreadable"].items():
                if self.args.stride_seconds is not None:
                    assert clips.spans is not None
                    reason = f"from {clips.spans[index, 0]:g} s on: {reason}"
                self.unreadable.setdefault(int(clips.file[index]), reason)

        batch_size = self.args.batch_size_per_gpu
        alone = self.env._replace(rank=0, world_size=1)  # the clips are this process's own
        dataset = self.make_dataset(clips)
        batches = eval_loader(dataset, batch_size, self.workers, alone, collate_readable)()
        progress = Progress("computing features", total)
        done = 0
        for row in feature_rows(self.read, batches, batch_size, self.amp, note_unreadable):
            indices = row["index"].cpu().numpy()
            yield indices, row["features"].cpu().numpy()
            done = int(indices[-1]) + 1
            progress.show(done)
        if done < total:  # the last ones are unreadable
            progress.show(total)

    def spans(self, rows: ClipRows) -> np.ndarray | None:
        """Return the parts (m, 2) of their files that clips are, in seconds; None: whole files."""
        stride = self.args.stride_seconds
        if stride is not None:
            start = rows.clip * stride
            return np.stack([start, start + self.clip_seconds], axis=1)
        if self.samples.spans is not None:
            return self.samples.spans[rows.file]
        return None

    def make_dataset(self, clips: Clips) -> SampleDataset:
        """Return the center crops of clips of videos, or of images, at the size of the model."""
        paths = [self.samples.paths[file] for file in clips.file.tolist()]
        if not self.samples.are_images:
            reading = clip_reading(self.args)
            return center_clips(paths, self.config, reading, clips.known, clips.spans)
        return ImageDataset(
            paths=paths,
            labels=[-1] * len(paths),
            transform=image_transform(self.config["img_size"], train=False),
            seed=0,
            substitutes=0,
        )


def write_table(output: Path, extraction: Extraction) -> None:
    """Write the features of all files to an .npz. Raises UserError if none can be read."""
    samples = extraction.samples
    clips = extraction.find_clips(list(range(len(samples.paths))))
    keys = torch.from_numpy(clips.file * CLIPS_PER_FILE + clips.clip)
    rows = (
        {"index": keys[indices], "features": torch.from_numpy(values)}
        for indices, values in extraction.rows(clips)
    )
    table, unreadable = gather_readable(rows, extraction.unreadable)
    reasons = by_name(samples, unreadable)
    if len(unreadable) == len(samples.paths):
        raise nothing_readable(reasons, len(samples.paths))
    file, clip = divmod(table["index"].numpy(), CLIPS_PER_FILE)
    kept = ~np.isin(file, list(unreadable))
    values = table["features"].numpy()[kept]
    if extraction.env.rank == 0:
        rows_to_save = ClipRows(file[kept], clip[kept], values)
        spans = extraction.spans(rows_to_save)
        save_table(output, rows_to_save, samples._asdict(), reasons, spans)
    print_unreadable(reasons, len(samples.paths))
    shape = " x ".join(map(str, values.shape))
    print0(f"wrote {output}: features {shape}, {len(samples.classes)} classes")


def write_folder(folder: Path, extraction: Extraction, settings: dict) -> None:
    """Write the features of each file to a folder. Raises UserError if none can be read."""
    samples = extraction.samples
    shape = tuple(settings["shape"])
    names = file_names(samples.paths, extraction.args.data_dir)
    dist.on_rank0(lambda: open_folder(folder, settings, INFORMATIVE))
    pending = dist.on_rank0(lambda: find_pending(folder, names, shape))
    clips = extraction.find_clips(pending)
    rows = (
        (int(clips.file[index]), features)
        for indices, values in extraction.rows(clips)
        for index, features in zip(indices, values, strict=True)
    )
    targets = {file: folder / names[file] for file in pending}
    write_files(rows, Counter(clips.file.tolist()), targets)
    _, unreadable = gather_readable([], extraction.unreadable)
    listing = [
        (path, name, samples.label(file))
        for file, (path, name) in enumerate(zip(samples.paths, names, strict=True))
    ]
    reasons = by_name(samples, unreadable)
    count = dist.on_rank0(lambda: write_lists(folder, listing, shape, reasons))
    print_unreadable(reasons, len(samples.paths))
    if count == 0:
        raise nothing_readable(reasons, len(samples.paths))
    present = len(set(names)) - len(pending)
    print0(
        f"wrote {folder}: features of {count} of {len(names)} files ({present} were there already)"
    )


def find_pending(folder: Path, names: list[str], shape: tuple[int, ...]) -> list[int]:
    """Return the indices of the files whose features are not in the folder; duplicates once."""
    first_of = {name: file for file, name in reversed(list(enumerate(names)))}
    pending = [file for name, file in first_of.items() if count_clips(folder / name, shape) == 0]
    return sorted(pending)


def by_name(samples: Inputs, unreadable: dict[int, str]) -> dict[str, str]:
    """Return {name: reason} for {file: reason}. See `part_name` for the names."""
    names = {}
    for file, reason in unreadable.items():
        span = None if samples.spans is None else samples.spans[file]
        names[part_name(samples.paths[file], span)] = reason
    return names


def sha256_of_weights(encoder: VideoEncoder) -> str:
    """Return the SHA-256 of an encoder's weights, on the CPU, whatever file they come from."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_settings(extraction: Extraction, read_out: ReadOut, weights: str) -> dict:
    """Return the settings on which features and their file names depend.

    weights: their SHA-256.
    """
    args = extraction.args
    config = extraction.config
    shape = [config["embed_dim"]]
    if read_out.kind == "none":
        shape = [*token_grid(*(config[name] for name in GRID_SIZES)), *shape]
    return {
        "checkpoint": args.checkpoint,
        "weights": weights,
        "num_heads": config["num_heads"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "data": common_folder(extraction.samples.paths, args.data_dir),
        "layer": read_out.layer,
        "tokens": read_out.kind,
        "shape": shape,
        "img_size": config["img_size"],
        "num_frames": config["num_frames"],
        **frame_settings(extraction),
        "frames_fps": args.frames_fps,
        "stride_seconds": args.stride_seconds,
        "short_side": args.short_side or decode_short_side(config["img_size"]),
        "amp": str(extraction.amp).removeprefix("torch."),
    }


def frame_settings(extraction: Extraction) -> dict:
    """Return the settings that choose the frames of a clip. Uniform clips have no rate."""
    args = extraction.args
    if args.sampling == "uniform":
        absent = dict.fromkeys(("sampling_rate", "target_fps", "clip_seconds"))
        return {"sampling": args.sampling, **absent}
    return {
        "sampling_rate": args.sampling_rate,
        "target_fps": args.target_fps,
        "clip_seconds": extraction.clip_seconds,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input."""
    parser = get_parser()
    args = parser.parse_args(argv)
    source = describe_checkpoint(args.checkpoint, given_sizes(args))
    args = parse_again(parser, argv, source.flags, CLIP_FLAGS)
    check_seconds("stride_seconds", args.stride_seconds, args.target_fps)
    env = dist.setup(args.device)
    same_run.compare_commands(vars(args))
    output = dist.on_rank0(lambda: output_path(args))
    frames = args.frames_fps is not None
    samples = dist.on_rank0(
        lambda: list_inputs(args.data_dir, args.data_csv, source.classes, frames)
    )
    check_frame_folders(samples.paths, args.frames_fps)
    check_samples(samples, args, output)
    read_out = choose_read_out(source, args)
    encoder = load_encoder(args.checkpoint, **given_sizes(args))
    in_table = output.suffix == ".npz"
    weights = ""
    if not in_table:
        weights = dist.on_rank0(lambda: sha256_of_weights(encoder))
    folder = output.parent if in_table else output
    extraction = Extraction(
        encoder=encoder.to(env.device),
        read_out=read_out,
        samples=samples,
        args=args,
        env=env,
        quarantine=folder / "quarantine.csv",
    )
    if in_table:
        write_table(output, extraction)
    else:
        write_folder(output, extraction, folder_settings(extraction, read_out, weights))


if __name__ == "__main__":
    dist.run_script(main)
