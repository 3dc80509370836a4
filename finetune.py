"""Finetune a pretrained encoder to classify videos, or train one from scratch; evaluate it.

one process    python finetune.py --train_dir TRAIN --val_dir VAL --num_classes 174
               --finetune runs/a/PREFIX.pth --output_dir runs/b
one machine    torchrun --standalone --nproc_per_node 8 finetune.py --train_dir TRAIN --val_dir VAL
               ...
test, 5 x 3    python finetune.py --val_dir VAL --output_dir runs/b --eval
views          --test_num_clips 5 --test_num_crops 3
smoke test     python finetune.py --train_dir samples/videos/train --val_dir samples/videos/val
               --num_classes 3 --model vit_micro_patch16 --img_size 32 --num_frames 4
               --max_steps 4 --batch_size_per_gpu 4

The same command resumes an interrupted run (--resume auto). More: docs/finetuning.md.
"""

import argparse
from pathlib import Path

import engine_finetune
from data.clips import ClipSampling
from data.datasets import SUBSTITUTES, ClipDataset, ViewDataset
from data.frame_folder import check_frame_folders
from data.loader import WorkerSettings, eval_loader, train_loader
from data.manifest import (
    VIDEO_EXTENSIONS,
    Samples,
    check_classes,
    class_indices,
    describe_count,
    find_labeled,
    keep_subset,
    read_labeled,
    read_manifest,
    write_classes,
    write_manifest,
)
from data.samplers import EpochSampler, class_groups
from data.transforms import decode_short_side, train_transform, view_transform
from data.video_index import copy_index, load_index
from engine_finetune import EvalData, Split, TrainData
from util import args as flags
from util import dist
from util.cli import positive_int
from util.dist import DistEnv, UserError, print0
from util.model_flags import Start, lists_again, note_kept_list
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.train_state import dataset_fingerprint


def get_parser() -> flags.ScriptParser:
    """Return the parser of this script's flags."""
    parser = flags.ScriptParser(__doc__, retired=("--bias_wd",))
    model = flags.add_model(parser, model="vit_large_patch16", num_frames=32)
    factors = f"{flags.EFFECTIVE_BATCH} * repeat_aug"
    optimization = flags.add_optimization(parser, epochs=50, batch_size=64, effective=factors)
    flags.add_classifier(model, optimization, smoothing=0.1)
    group = flags.add_video(parser, sampling_rate=2, repeat_aug=1, scales=(0.2, 1.0))
    group.add_argument("--train_dir", default="", help="training videos, one subfolder per class")
    group.add_argument("--val_dir", default="", help="validation videos, the same subfolders")
    group.add_argument(
        "--train_csv",
        default="",
        help="a manifest (path,label[,start,end] per line) instead of --train_dir",
    )
    group.add_argument("--val_csv", default="", help="a manifest instead of --val_dir")
    flags.add_labeled_data(group)
    group.add_argument(
        "--test_num_clips",
        type=positive_int,
        default=1,
        help="with --eval: time windows per video (default: %(default)s)",
    )
    group.add_argument(
        "--test_num_crops",
        type=int,
        choices=(1, 3),
        default=1,
        help="with --eval: crops per window (default: %(default)s)",
    )
    flags.add_eval(flags.add_run(parser))
    flags.add_probe(optimization, flags.add_system(parser))
    return parser


def labeled_videos(folder: str, manifest: str, kind: str, frames_fps: float | None) -> Samples:
    """Return the samples of --{kind}_dir or --{kind}_csv. Raises UserError."""
    if folder and manifest:
        print0(f"note: --{kind}_dir is given, so --{kind}_csv is not used")
    if folder:
        return find_labeled(folder, VIDEO_EXTENSIONS, f"--{kind}_dir", frames_fps is not None)
    if not manifest:
        raise UserError(
            f"no {kind} videos given: --{kind}_dir FOLDER with one subfolder per class, "
            f"or --{kind}_csv FILE with path,label lines"
        )
    return read_labeled(manifest, f"--{kind}_csv")


def list_videos(
    args: argparse.Namespace, start: Start, known_classes: list[str] | None
) -> tuple[Split, Split, list[str]]:
    """Return training videos, validation videos and the class names. Call on one rank.

    known_classes: the class names of the checkpoint that is evaluated or resumed, or of
    --class_names. The run saves its lists as manifests, which a resumed run reads instead of the
    folders.
    """
    val_manifest = flags.manifest_path(args, "val")
    source = args.val_dir or args.val_csv or str(val_manifest)
    if args.eval:
        assert known_classes is not None  # `setup` has found them
        val = labeled_videos(args.val_dir, args.val_csv, "val", args.frames_fps)
        return Split([], []), with_class_indices(val, known_classes, source), known_classes
    train_manifest = flags.manifest_path(args, "train")
    if start.path and known_classes and train_manifest.exists() and val_manifest.exists():
        train = resumed_training_videos(args, start, train_manifest)
        classes = known_classes
        if lists_again(args, start, ("val_dir", "val_csv")):
            val, classes = list_validation(args, train.labels, classes)
        else:
            val = read_manifest(val_manifest)
    else:
        train = labeled_videos(args.train_dir, args.train_csv, "train", args.frames_fps)
        val, classes = list_validation(args, train.labels, known_classes)
        train = keep_labeled_subset(args, train, classes)
        write_manifest(train_manifest, train)
        copy_index(args.train_csv, train_manifest, train.paths)
        write_classes(Path(args.datafile_dir, f"{args.save_prefix}_classes.json"), classes)
    val_split = with_class_indices(val, classes, source)
    return with_class_indices(train, classes, source), val_split, classes


def resumed_training_videos(args: argparse.Namespace, start: Start, manifest: Path) -> Samples:
    """Return the training videos of a resumed run. Raises UserError if flags choose others."""
    check_same_subset(args, start, manifest)
    note_kept_list(args, start, ("train_dir", "train_csv"))
    return read_manifest(manifest)


def list_validation(
    args: argparse.Namespace, train_labels: list[str], known_classes: list[str] | None
) -> tuple[Samples, list[str]]:
    """Return the validation videos, listed in the run's own manifest, and the class names."""
    manifest = flags.manifest_path(args, "val")
    val = labeled_videos(args.val_dir, args.val_csv, "val", args.frames_fps)
    classes = check_classes(train_labels, val.labels, known_classes, args.val_dir or args.val_csv)
    write_manifest(manifest, val)
    copy_index(args.val_csv, manifest, val.paths)
    return val, classes


def keep_labeled_subset(args: argparse.Namespace, train: Samples, classes: list[str]) -> Samples:
    """Return the training samples that --shots or --frac_retained keeps."""
    labels = class_indices(train.labels, classes, "the training set")
    return train.select(keep_subset(labels, args.frac_retained, args.shots, args.seed))


def check_same_subset(args: argparse.Namespace, start: Start, manifest: Path) -> None:
    """Raise UserError if the flags choose another subset than the manifest of a resumed run has."""
    assert start.source is not None  # the checkpoint of start.path
    for name, default in (("shots", None), ("frac_retained", 1.0)):
        current = getattr(args, name)
        made_with = start.source.flags.get(name, default)
        if current != made_with:
            raise UserError(
                f"--{name} is {current}, but {manifest} of the resumed run was made with "
                f"{made_with} (None: all). Restore it, or use another --save_prefix."
            )


def with_class_indices(samples: Samples, classes: list[str], source: str) -> Split:
    """Return samples with the indices of their classes. Raises UserError, see `class_indices`."""
    return Split(samples.paths, class_indices(samples.labels, classes, source), samples.spans)


def clip_sampling(args: argparse.Namespace) -> ClipSampling:
    """Return which frames a clip consists of."""
    return ClipSampling(args.num_frames, args.sampling_rate, args.target_fps, args.sampling)


def worker_settings(args: argparse.Namespace) -> WorkerSettings:
    """Return how loader workers read files."""
    quarantine = Path(args.output_dir, "quarantine.csv")
    return WorkerSettings(args.num_workers, args.pin_mem, args.read_timeout, quarantine)


def center_views(
    args: argparse.Namespace,
    samples: Split,
    manifest: str | Path,
    views: tuple[int, int] = (1, 1),
    substitutes: int = 0,
) -> ViewDataset:
    """Return fixed views of videos.

    views: number of time windows, and of crops of each. substitutes: see `SampleDataset`.
    """
    clips, crops = views
    return ViewDataset(
        paths=samples.paths,
        labels=samples.labels,
        num_views=clips,
        transform=view_transform(args.img_size, crops),
        substitutes=substitutes,
        known=load_index(manifest, samples.paths),
        spans=samples.spans,
        sampling=clip_sampling(args),
        decoder=args.decoder,
        frames_fps=args.frames_fps,
        short_side=args.short_side or decode_short_side(args.img_size),
    )


def build_eval_data(
    args: argparse.Namespace, env: DistEnv, val: Split, classes: list[str]
) -> EvalData:
    """Return the views of the validation videos: one each, with --eval windows x crops."""
    clips = args.test_num_clips if args.eval else 1
    crops = args.test_num_crops if args.eval else 1
    manifest = args.val_csv if args.eval else flags.manifest_path(args, "val")
    dataset = center_views(args, val, manifest, (clips, crops))
    videos_per_batch = max(1, args.batch_size_per_gpu // (clips * crops))
    batches = eval_loader(dataset, videos_per_batch, worker_settings(args), env)
    return EvalData(classes, val, batches, views=clips * crops)


def random_clips(args: argparse.Namespace, train: Split) -> ClipDataset:
    """Return random clips of the training videos."""
    return ClipDataset(
        paths=train.paths,
        labels=train.labels,
        spans=train.spans,
        sampling=clip_sampling(args),
        repeat_aug=args.repeat_aug,
        repeat_windows=args.repeat_windows,
        decoder=args.decoder,
        frames_fps=args.frames_fps,
        seed=args.seed,
        noise_tokens=0,
        transform=train_transform(
            args.img_size,
            args.jitter_scales_relative,
            args.jitter_aspect_relative,
            args.flip,
            args.color_jitter,
            flags.augmentation(args),
        ),
        short_side=args.short_side or decode_short_side(args.img_size),
        known=load_index(flags.manifest_path(args, "train"), train.paths),
    )


def build_train_data(args: argparse.Namespace, env: DistEnv, train: Split) -> TrainData | None:
    """Return the training clips, or None with --eval.

    Those of a probe are center views, unless --probe_augment is given.
    """
    if args.eval:
        return None
    sampler = EpochSampler(
        len(train.paths),
        batch_size=args.batch_size_per_gpu,
        accum_iter=args.accum_iter,
        env=env,
        seed=args.seed,
        groups=class_groups(train.labels, args.balanced),
    )
    total_steps = flags.total_steps(args, sampler.updates_per_epoch)
    workers = worker_settings(args)
    manifest = flags.manifest_path(args, "train")
    dataset: ClipDataset | ViewDataset = random_clips(args, train)
    views = None
    if args.probe:
        center = center_views(args, train, manifest, substitutes=SUBSTITUTES)
        views = eval_loader(center, args.batch_size_per_gpu, workers, env)
        if not args.probe_augment:  # not `center`: each loader sets the watchdog of its data set
            dataset = center_views(args, train, manifest, substitutes=SUBSTITUTES)
    return TrainData(
        fingerprint=dataset_fingerprint(
            train.paths, train.labels, train.spans, "--balanced" if args.balanced else ""
        ),
        paths=train.paths,
        updates_per_epoch=sampler.updates_per_epoch,
        batches=train_loader(dataset, sampler, total_steps, workers, env.device),
        repeats=args.repeat_aug,
        views=views,
        order=sampler.micro_batches,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (default: sys.argv). Raises UserError for bad input."""
    args, env, start, known_classes = engine_finetune.setup(get_parser(), argv)
    train, val, classes = dist.on_rank0(lambda: list_videos(args, start, known_classes))
    print0(
        f"{describe_count(train.paths, train.spans)} to train on, "
        f"{describe_count(val.paths, val.spans)} to validate on, {len(classes)} classes"
    )
    check_frame_folders(train.paths + val.paths, args.frames_fps)
    model = engine_finetune.build_model(args, env, start, classes)
    eval_data = build_eval_data(args, env, val, classes)
    train_data = build_train_data(args, env, train)
    pixels = {"mean": VIDEO_MEAN, "std": VIDEO_STD}  # unless the weights have others
    config = pixels | model.config | {"model": args.model, "classes": classes}
    engine_finetune.run(args, env, model, config, (train_data, eval_data), start.path)


if __name__ == "__main__":
    dist.run_script(main)
