"""Write the features of videos or images: the pooled tokens that enter a classifier.

python -m tools.extract_features CKPT --data_dir FOLDER [--output FILE.npz]
python -m tools.extract_features CKPT --data_csv FILE [--output FILE.npz]
torchrun --standalone --nproc_per_node 8 -m tools.extract_features CKPT --data_dir FOLDER

CKPT is a checkpoint of any family. A finetuned model uses its own read-out, any other the mean of
the patch tokens. Frame size and frame spacing are the checkpoint's unless given. Images become
static clips. A subfolder of FOLDER is a class; files directly in FOLDER have no label.

FILE.npz holds features (n, D) float32, labels (n,) int64 (-1: none), paths (n,) and classes (the
names of the labels). It is the same on any number of processes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.datasets import ImageDataset, SampleDataset
from data.loader import WorkerSettings, eval_loader
from data.manifest import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    check_folder,
    class_indices,
    class_names,
    read_manifest,
    walk,
)
from data.transforms import image_transform
from data.video_index import load_index
from models_vit import VideoEncoder, normalize
from tools.reading import (
    CLIP_FLAGS,
    add_clip_flags,
    add_device_flags,
    add_loader_flags,
    add_size_flags,
    center_clips,
    clip_reading,
)
from tools.visualize import run_flags
from util import dist
from util.checkpoint import load
from util.cli import Parser
from util.dist import UserError, print0
from util.evaluation import features
from util.files import atomic_write
from util.optim import amp_dtype
from util.pretrained import load_encoder


class Samples(NamedTuple):
    """The files to read."""

    paths: list[str]
    labels: list[int]  # class indices, -1: none
    classes: list[str]
    are_images: bool


class RunRecord(NamedTuple):
    """What a checkpoint records about the run that wrote it."""

    classes: list[str] | None  # of a finetuning run
    global_pool: bool  # read-out: mean of the patch tokens, else the class token
    static_clip: str  # "folded": the model sees one frame of a static clip, "exact": all
    flags: dict  # values of CLIP_FLAGS


def get_parser() -> Parser:
    """Return the flags of this tool."""
    parser = Parser(__doc__, prog="python -m tools.extract_features")
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a checkpoint of any family: a file, or a folder with model.safetensors",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", default="", help="folder of videos or of images")
    source.add_argument(
        "--data_csv", default="", help="a manifest (path[,label] per line) instead of --data_dir"
    )
    parser.add_argument(
        "--output", help="the .npz to write (default: CKPT_features.npz beside the checkpoint)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_size_flags(parser)
    add_clip_flags(parser)
    add_loader_flags(parser)
    add_device_flags(parser)
    return parser


def read_record(path: str) -> RunRecord:
    """Return what a checkpoint records about its run; the defaults for one that records nothing.

    Raises UserError for a file that cannot be read.
    """
    state = load(path, check=False, lazily=True)  # `load_encoder` compares the checksums
    config = state.get("config")
    if not isinstance(config, dict):
        config = {}
    flags = run_flags(state, (*CLIP_FLAGS, "static_clip"))
    static_clip = flags.pop("static_clip", "exact")
    global_pool = config.get("global_pool", True)
    return RunRecord(config.get("classes"), global_pool, static_clip, flags)


def output_path(output: str | None, checkpoint: str, overwrite: bool) -> Path:
    """Return the file to write. Raises UserError for another ending, and for an existing file."""
    source = Path(checkpoint)
    path = source.with_name(f"{source.stem}_features.npz")
    if output is not None:
        path = Path(output)
    if path.suffix != ".npz":
        raise UserError(f"--output {path} does not end in .npz. Choose such a name.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists. Choose another --output, or pass --overwrite.")
    return path


def find_files(folder: str) -> tuple[list[str], list[str]]:
    """Return all videos and images below a folder and their labels. Raises UserError for none.

    The label of a file is the name of the subfolder of `folder` that holds it, "" if none does.
    """
    check_folder(folder, "--data_dir")
    extensions = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
    paths = walk(folder, extensions)
    if not paths:
        raise UserError(
            f"--data_dir {folder} has no videos and no images (looked for {' '.join(extensions)})"
        )
    root = Path(folder).absolute()
    labels = []
    for path in paths:
        subfolders = Path(path).relative_to(root).parts[:-1]
        labels.append("".join(subfolders[:1]))
    return paths, labels


def check_kind(paths: list[str], source: str) -> bool:
    """Return whether the files are images, not videos. Raises UserError for a mixture."""
    images = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
    if images and len(images) < len(paths):
        raise UserError(
            f"{source} has {len(images)} images (first: {images[0]}) and "
            f"{len(paths) - len(images)} videos. Extract their features separately."
        )
    return bool(images)


def list_samples(folder: str, csv: str, known_classes: list[str] | None) -> Samples:
    """Return the files of a folder or a manifest with their class indices.

    known_classes: the classes of a finetuned model. Labels index them, or the data's own classes
    if a label is not among them. Raises UserError.
    """
    if csv:
        paths, labels = read_manifest(csv)
    else:
        paths, labels = find_files(folder)
    source = csv or folder
    are_images = check_kind(paths, source)
    distinct = sorted(set(labels) - {""})
    classes = []
    if distinct:
        classes = class_names(distinct)
    if known_classes is not None:
        unknown = [name for name in distinct if name not in known_classes]
        if not unknown:
            classes = known_classes
        else:
            print0(
                f"note: {unknown[0]!r} is not a class of the checkpoint. "
                f"The labels are indices of the {len(classes)} classes of {source}."
            )
    indices = dict(zip(distinct, class_indices(distinct, classes, source), strict=True))
    return Samples(paths, [indices.get(label, -1) for label in labels], classes, are_images)


def pool(encoder: VideoEncoder, clips: Tensor, global_pool: bool) -> Tensor:
    """Return features (B, D) of clips (B, 3, T, H, W) float: what enters a classifier's head."""
    tokens = encoder.encode(clips)  # (B, [1 +] L, D)
    if global_pool:
        pooled = tokens[:, int(encoder.cls_embed) :].mean(dim=1)
    else:
        pooled = tokens[:, 0]
    return encoder.norm(pooled)


def make_read_out(
    encoder: VideoEncoder, record: RunRecord, are_images: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function from clips (B, 3, T, H, W) uint8 to features (B, D); T = 1 for images."""
    mean = encoder.config["mean"]
    std = encoder.config["std"]
    num_frames = encoder.config["num_frames"]
    repeats_frame = are_images and record.static_clip == "exact"

    def read_out(clips: Tensor) -> Tensor:
        clips = normalize(clips, mean, std)
        if repeats_frame:
            clips = clips.expand(-1, -1, num_frames, -1, -1)
        return pool(encoder, clips, record.global_pool)

    return read_out


def save_features(path: Path, values: Tensor, samples: Samples) -> None:
    """Write the features (n, D), with labels, paths and class names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        np.savez(
            temporary,
            features=values.numpy(),
            labels=np.array(samples.labels, np.int64),
            paths=np.array(samples.paths),
            classes=np.array(samples.classes, str),
        )


def make_dataset(samples: Samples, config: dict, manifest: str, reading: dict) -> SampleDataset:
    """Return center clips of videos, or center crops of images, at the size of the model.

    manifest: where the paths come from, "" for none. reading: see `clip_reading`.
    """
    if not samples.are_images:
        known = load_index(manifest, samples.paths)
        return center_clips(samples.paths, config, reading, known)
    return ImageDataset(
        paths=samples.paths,
        labels=samples.labels,
        transform=image_transform(config["img_size"], train=False),
        seed=0,
        substitutes=0,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input."""
    parser = get_parser()
    args = parser.parse_args(argv)
    path = args.checkpoint
    record = read_record(path)
    parser.set_defaults(**record.flags)
    args = parser.parse_args(argv)
    env = dist.setup(args.device)
    output = dist.on_rank0(lambda: output_path(args.output, path, args.overwrite))
    samples = dist.on_rank0(lambda: list_samples(args.data_dir, args.data_csv, record.classes))
    encoder = load_encoder(
        path,
        num_heads=args.num_heads,
        img_size=args.img_size,
        num_frames=args.num_frames,
        t_patch_size=args.t_patch_size,
    ).to(env.device)
    dataset = make_dataset(samples, encoder.config, args.data_csv, clip_reading(args))
    workers = WorkerSettings(
        num_workers=args.num_workers,
        pin_memory=True,
        read_timeout=args.read_timeout,
        quarantine=output.parent / "quarantine.csv",
    )
    batches = eval_loader(dataset, args.batch_size_per_gpu, workers, env)()
    read_out = make_read_out(encoder, record, samples.are_images)
    amp = amp_dtype(args.amp, env.device)
    values = features(read_out, batches, args.batch_size_per_gpu, amp)
    if env.rank == 0:
        save_features(output, values, samples)
    count, width = values.shape
    print0(f"wrote {output}: features {count} x {width}, {len(samples.classes)} classes")


if __name__ == "__main__":
    dist.run_script(main)
