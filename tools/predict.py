"""Classify unlabeled videos and images with a finetuned checkpoint of any family.

python -m tools.predict --checkpoint CKPT VIDEOS IMAGES --output predictions.csv
python -m tools.predict --checkpoint CKPT a.mp4 b.png list.csv --views 5x3
python -m tools.predict --checkpoint CKPT long.mp4 --segment_seconds 10 --output segments.csv
torchrun --standalone --nproc_per_node 8 -m tools.predict --checkpoint CKPT VIDEOS --output p.csv

Folders are searched recursively; .csv and .txt files are manifests (path[,label[,start,end]] per
line). Model, frame size and frame spacing are the checkpoint's unless given. Images become static
clips.

The five best classes of the first files are printed, as far as the terminal is wide. --output
writes those of all files: path, [start, end,] top1, score1, ..., reason (why a file cannot be read,
else empty). The file is the same on any number of processes. See docs/finetuning.md.
"""

import argparse
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.clips import ClipSampling, Span, video_duration
from data.datasets import ImageDataset, SampleDataset, ViewDataset
from data.frame_folder import check_frame_folders
from data.loader import collate_readable, eval_loader
from data.manifest import (
    IMAGE_EXTENSIONS,
    NO_SPAN,
    VIDEO_EXTENSIONS,
    is_image,
    read_manifest,
    walk,
)
from data.spans import split_duration
from data.transforms import decode_short_side, image_transform, view_transform
from data.video_index import VideoIndex, new_index
from engine_finetune import model_input
from models_vit import VisionTransformer
from tools.data_doctor import Probed, Progress, probe_files
from tools.output_files import refuse_existing
from tools.prediction_tables import (
    Prediction,
    Sample,
    prediction_table,
    table_lines,
    unreadable_files,
)
from tools.reading import (
    CLIP_FLAGS,
    add_clip_flags,
    add_device_flags,
    add_loader_flags,
    add_size_flags,
    check_seconds,
    given_sizes,
    nothing_readable,
    parse_again,
    print_unreadable,
    worker_settings,
)
from util import dist, same_run
from util.cli import Parser, positive_float
from util.dist import DistEnv, UserError, print0
from util.evaluation import predict
from util.files import save_csv
from util.model_source import ModelSource, describe_checkpoint, require_head
from util.optim import amp_dtype
from util.pretrained import load_classifier

MANIFEST_EXTENSIONS = (".csv", ".txt")


class Views(NamedTuple):
    """The views of a video over which probabilities are averaged."""

    windows: int  # spread over time
    crops: int  # of each window


class Inputs(NamedTuple):
    """All samples in the order of the input."""

    all: list[Sample]
    known: VideoIndex | None = None  # of the videos among them, if they were opened

    @property
    def segmented(self) -> bool:
        """Whether there are segments of videos among the samples."""
        return any(sample.span for sample in self.all)


class Pass(NamedTuple):
    """One pass of the model: over the videos, or over the images among the samples."""

    activity: str  # for the progress line
    indices: list[int]  # in the list of all samples
    dataset: SampleDataset
    views: int = 1  # clips per sample
    still_frames: int = 1  # repeat each image to this many frames


def parse_views(text: str) -> Views:
    """Return Views(5, 3) for "5x3". Raises ArgumentTypeError."""
    match = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form CxK, such as 5x3: C time windows, K = 1 or 3 crops"
        )
    return Views(int(match[1]), int(match[2]))


def get_parser() -> Parser:
    """Return the flags of this tool."""
    parser = Parser(__doc__, prog="python -m tools.predict")
    parser.add_argument(
        "source",
        nargs="+",
        metavar="FILE|FOLDER|CSV",
        help="videos, images, folders of both, manifests (.csv, .txt); duplicates are kept once",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="a finetuned checkpoint of any family: a file, or a folder with model.safetensors",
    )
    parser.add_argument("--output", metavar="CSV", help="write all predictions to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--views",
        type=parse_views,
        default=Views(1, 1),
        metavar="CxK",
        help="of videos: C time windows with K crops (1 or 3) each, averaged (default: 1x1)",
    )
    parser.add_argument(
        "--segment_seconds",
        type=positive_float,
        metavar="S",
        help="of videos: classify each S seconds; a rest shorter than S/2 joins the segment "
        "before it (default: whole videos)",
    )
    parser.add_argument(
        "--class_names",
        default="",
        metavar="FILE",
        help="names of the classes, for files that do not record them",
    )
    parser.add_argument(
        "--global_pool",
        action="store_true",
        default=None,
        help="the classifier reads the mean of the patch tokens, for files that do not record it",
    )
    parser.add_argument(
        "--cls_token",
        action="store_false",
        dest="global_pool",
        help="the classifier reads the class token, for files that do not record it",
    )
    add_size_flags(parser)
    add_clip_flags(parser)
    add_loader_flags(parser)
    add_device_flags(parser)
    return parser


def given_flags(args: argparse.Namespace) -> dict:
    """Return the sizes and the read-out that are given, by name."""
    given: dict = given_sizes(args)
    if args.global_pool is not None:
        given["global_pool"] = args.global_pool
    return given


def check_output(output: Path | None, sources: list[str], overwrite: bool) -> None:
    """Raise UserError unless the file to write ends in .csv, can be made, and is no input."""
    if output is None:
        return
    if output.suffix != ".csv":
        raise UserError(f"--output {output} does not end in .csv. Choose such a name.")
    if output.exists():
        for source in sources:
            if os.path.exists(source) and output.samefile(source):
                raise UserError(f"--output {output} is one of the inputs. Choose another name.")
    refuse_existing(output, overwrite, "--output")


def find_files(sources: list[str], frames: bool) -> list[Sample]:
    """Return all files to classify, or their segments, in the order given, each once.

    frames: see `walk`. Paths are absolute. Print a note about duplicates. Raises UserError for a
    source without files.
    """
    found = []
    for source in sources:
        found += samples_of(source, frames)
    distinct = list(dict.fromkeys(found))
    duplicates = len(found) - len(distinct)
    if duplicates:
        print0(f"note: {duplicates} of {len(found)} files are duplicates; each file is kept once")
    return distinct


def samples_of(source: str, frames: bool) -> list[Sample]:
    """Return the samples of a manifest, the files of a folder, or the file itself.

    frames: see `walk`. Raises UserError.
    """
    if os.path.isfile(source) and source.lower().endswith(MANIFEST_EXTENSIONS):
        listed = read_manifest(source)
        spans: list = [None] * len(listed.paths)
        if listed.spans is not None:
            spans = [tuple(span) if span != [*NO_SPAN] else None for span in listed.spans.tolist()]
        return [Sample(*pair) for pair in zip(listed.paths, spans, strict=True)]
    return [Sample(os.path.abspath(path)) for path in files_of(source, frames)]


def files_of(source: str, frames: bool) -> list[str]:
    """Return the files of a folder, or the file itself. Raises UserError. frames: see `walk`."""
    if os.path.isdir(source):
        extensions = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
        paths = walk(source, extensions, frames)
        if not paths:
            raise UserError(
                f"folder {source} has no videos and no images (looked for {' '.join(extensions)})"
            )
        return paths
    if not os.path.exists(source):
        raise UserError(
            f"{source} not found: give videos, images, folders of both, or manifests (.csv, .txt)"
        )
    return [source]


def index_videos(paths: list[str], args: argparse.Namespace, env: DistEnv) -> VideoIndex:
    """Return the index of videos, each of which one rank opens. Call on every rank."""
    share = range(env.rank, len(paths), env.world_size)
    progress = Progress("looking at videos", len(share))
    found: dict[int, Probed] = {}  # by row of the index
    own_paths = [paths[row] for row in share]
    for batch in probe_files(own_paths, args.num_workers, args.read_timeout, args.frames_fps):
        for file in batch:
            found[share[file.path_index]] = file
        progress.show(len(found))
    index = new_index(paths, None)
    for files in dist.all_gather_object(found):
        for row, file in files.items():
            index.set_row(row, file.info, file.reason)
    return index


def split_videos(paths: list[str], length: float, index: VideoIndex) -> Inputs:
    """Return all segments of `length` seconds of the videos, and the images as they are.

    index: of the videos. An unreadable video stays a single sample.
    """
    samples = []
    videos = 0
    for path in paths:
        if is_image(path):
            samples.append(Sample(path))
            continue
        spans: list[Span | None] = [None]
        info = index.info(videos, path)
        if info is not None:
            duration = video_duration(info.frames, info.fps, info.times)
            spans = [*split_duration(duration, length)]
        samples += [Sample(path, span) for span in spans]
        videos += 1
    return Inputs(samples, index)


def list_inputs(found: list[Sample], args: argparse.Namespace, env: DistEnv) -> Inputs:
    """Return the samples to classify, or the segments of the videos. Call on every rank.

    Raises UserError for segments that would be cut again.
    """
    inputs = Inputs(found)
    if args.segment_seconds is None:
        return inputs
    if inputs.segmented:
        raise UserError(
            "--segment_seconds cuts whole videos, but a manifest has start and end already. "
            "Drop one of them."
        )
    paths = [sample.path for sample in found]
    videos = [path for path in paths if not is_image(path)]
    return split_videos(paths, args.segment_seconds, index_videos(videos, args, env))


def video_pass(samples: Inputs, config: dict, args: argparse.Namespace) -> Pass:
    """Return the pass over the videos among the samples, at the size of the model."""
    indices = [index for index, sample in enumerate(samples.all) if not is_image(sample.path)]
    videos = [samples.all[index] for index in indices]
    spans = None
    if samples.segmented:
        spans = [video.span or NO_SPAN for video in videos]
    dataset = ViewDataset(
        paths=[video.path for video in videos],
        labels=[-1] * len(videos),
        num_views=args.views.windows,
        transform=view_transform(config["img_size"], args.views.crops),
        sampling=clip_sampling(config, args),
        decoder=args.decoder,
        frames_fps=args.frames_fps,
        short_side=args.short_side or decode_short_side(config["img_size"]),
        known=samples.known,
        spans=spans,
    )
    return Pass("classifying videos", indices, dataset, views=args.views.windows * args.views.crops)


def image_pass(samples: Inputs, config: dict, static_clip: str) -> Pass:
    """Return the pass over the images among the samples, at the size of the model.

    static_clip: "exact": the model gets an image as all frames of a clip, "folded": as one frame.
    """
    indices = [index for index, sample in enumerate(samples.all) if is_image(sample.path)]
    dataset = ImageDataset(
        paths=[samples.all[index].path for index in indices],
        labels=[-1] * len(indices),
        transform=image_transform(config["img_size"], train=False),
        seed=0,
        substitutes=0,
    )
    still_frames = 1
    if static_clip == "exact":
        still_frames = config["num_frames"]
    return Pass("classifying images", indices, dataset, still_frames=still_frames)


def with_progress(batches: Iterator[dict], activity: str, total: int, step: int) -> Iterator[dict]:
    """Yield the batches and print the progress: `step` of `total` samples per batch."""
    progress = Progress(activity, total)
    for done, batch in enumerate(batches, 1):
        yield batch
        progress.show(min(done * step, total))


def classify(
    model: VisionTransformer, data: Pass, args: argparse.Namespace, env: DistEnv
) -> dict[int, Prediction]:
    """Return the predictions of the samples of a pass by their indices. Call on every rank."""
    if not data.indices:
        return {}
    workers = worker_settings(args)
    samples_per_batch = max(1, args.batch_size_per_gpu // data.views)
    batches = eval_loader(data.dataset, samples_per_batch, workers, env, collate_readable)()
    step = samples_per_batch * env.world_size
    batches = with_progress(batches, data.activity, len(data.indices), step)
    prepare = partial(model_input, config=model.config, still_frames=data.still_frames)
    amp = amp_dtype(args.amp, env.device)
    table, unreadable = predict(model, batches, args.batch_size_per_gpu, prepare, amp)
    classes = model.config["classes"]
    predictions = {}
    for index, reason in unreadable.items():
        predictions[data.indices[index]] = Prediction([], [], reason)
    if table:
        columns = [table[name].tolist() for name in ("index", "top", "top_scores")]
        for index, top, scores in zip(*columns, strict=True):
            names = [classes[label] for label in top]
            predictions[data.indices[index]] = Prediction(names, scores)
    return predictions


def clip_sampling(config: dict, args: argparse.Namespace) -> ClipSampling:
    """Return which frames a clip consists of."""
    return ClipSampling(config["num_frames"], args.sampling_rate, args.target_fps, args.sampling)


def describe_task(samples: list[Sample], config: dict, args: argparse.Namespace) -> list[str]:
    """Return the lines that state what is classified, and how."""
    images = sum(is_image(sample.path) for sample in samples)
    unit = "videos"
    if args.segment_seconds is not None:
        unit = "segments of videos"
    elif any(sample.span for sample in samples):
        unit = "videos or parts of them"
    side = config["img_size"]
    sampling = clip_sampling(config, args)
    spacing = f"sampling rate {args.sampling_rate} at {args.target_fps:g} frames/s"
    if sampling.method == "uniform":
        spacing = "uniform sampling"
    lines = [
        f"{len(samples) - images} {unit}, {images} images; clips of {config['num_frames']} frames "
        f"of {side} x {side} pixels, {spacing}, {args.views.windows} x {args.views.crops} views"
    ]
    if sampling.method == "uniform" or args.segment_seconds is None:
        return lines
    if args.segment_seconds < sampling.seconds:
        lines.append(
            f"note: a clip takes {sampling.seconds:.3g} s, longer than --segment_seconds "
            f"{args.segment_seconds:g}; the last frame of a segment repeats"
        )
    return lines


def report(samples: list[Sample], predictions: list[Prediction], output: Path | None) -> None:
    """Write the predictions, and print the first ones and the unreadable files.

    Raises UserError if no file can be read.
    """
    num_files = len({sample.path for sample in samples})
    unreadable = unreadable_files(samples, predictions)
    if all(prediction.reason for prediction in predictions):
        raise nothing_readable(unreadable, num_files)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_csv(prediction_table(samples, predictions), output)
    print0(*table_lines(samples, predictions), sep="\n")
    print_unreadable(unreadable, num_files)
    if output is not None:
        print0(f"wrote {output}: {len(predictions)} rows")


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, ModelSource]:
    """Return the flags, by default those of the checkpoint's run, and what the checkpoint records.

    Raises UserError for bad flags, and for a checkpoint without a classifier.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    source = describe_checkpoint(args.checkpoint, given_flags(args))
    require_head(source)
    args = parse_again(parser, argv, source.flags, CLIP_FLAGS)
    check_seconds("segment_seconds", args.segment_seconds, args.target_fps)
    return args, source


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for bad input, before anything is written."""
    args, source = parse_flags(argv)
    output = Path(args.output) if args.output else None
    env = dist.setup(args.device)
    same_run.compare_commands(vars(args))
    dist.on_rank0(lambda: check_output(output, args.source, args.overwrite))
    frames = args.frames_fps is not None
    found = dist.on_rank0(lambda: find_files(args.source, frames))
    check_frame_folders([sample.path for sample in found], args.frames_fps)
    model = load_classifier(
        args.checkpoint, given=given_flags(args), class_names=args.class_names
    ).to(env.device)
    config = model.config
    samples = list_inputs(found, args, env)
    print0(*describe_task(samples.all, config, args), sep="\n")

    static_clip = source.flags.get("static_clip", "exact")
    by_index = classify(model, video_pass(samples, config, args), args, env)
    by_index |= classify(model, image_pass(samples, config, static_clip), args, env)
    predictions = [by_index[index] for index in range(len(samples.all))]
    dist.on_rank0(lambda: report(samples.all, predictions, output))


if __name__ == "__main__":
    dist.run_script(main)
