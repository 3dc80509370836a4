"""Finetune a pretrained video encoder to classify images, each as a static clip; evaluate it.

one process    python finetune_on_image.py --train_data_path TRAIN --val_data_path VAL
               --finetune runs/a/PREFIX.pth --num_classes 1000
one machine    torchrun --standalone --nproc_per_node 8 finetune_on_image.py
               --train_data_path TRAIN --val_data_path VAL ...
smoke test     python finetune_on_image.py --train_data_path samples/images/train
               --val_data_path samples/images/val --num_classes 10 --model vit_micro_patch16
               --img_size 32 --num_frames 4 --max_steps 4 --batch_size_per_gpu 4

The same command resumes an interrupted run (--resume auto). More: docs/finetuning.md.
"""

import argparse
import os
from pathlib import Path

import engine_finetune
from data.datasets import SUBSTITUTES, ImageDataset
from data.loader import WorkerSettings, eval_loader, train_loader
from data.manifest import (
    IMAGE_EXTENSIONS,
    Samples,
    check_classes,
    class_indices,
    find_labeled,
    keep_subset,
    read_labeled,
    write_classes,
)
from data.samplers import EpochSampler, class_groups
from data.transforms import image_transform
from engine_finetune import EvalData, Split, TrainData
from util import args as flags
from util import dist
from util.dist import DistEnv, UserError, print0
from util.pixels import IMAGE_MEAN, IMAGE_STD
from util.train_state import dataset_fingerprint


def get_parser() -> flags.ScriptParser:
    """Return the parser of this script's flags."""
    parser = flags.ScriptParser(__doc__, retired=("--bias_wd",))
    model = flags.add_model(parser, model="vit_large_patch16", num_frames=32)
    model.add_argument(
        "--static_clip",
        choices=("exact", "folded"),
        default="exact",
        help="repeat the image, or embed it once by weights summed over time: "
        "same result, less work (default: exact)",
    )
    optimization = flags.add_optimization(parser, epochs=50, batch_size=64)
    flags.add_classifier(model, optimization, smoothing=0.0)
    group = parser.add_argument_group("data (changes results)")
    group.add_argument(
        "--train_data_path",
        default="",
        help="training images: a folder with one subfolder per class, or a manifest (path,label)",
    )
    group.add_argument("--val_data_path", default="", help="validation images, likewise")
    flags.add_labeled_data(group)
    flags.add_shared_data(group)
    flags.add_eval(flags.add_run(parser))
    flags.add_probe(optimization, flags.add_system(parser))
    return parser


def labeled_images(source: str, flag: str) -> Samples:
    """Return the images below a folder, or in a manifest. Raises UserError."""
    if not source:
        raise UserError(
            f"no images given: {flag} FOLDER with one subfolder per class, "
            "or a manifest with path,label lines"
        )
    if os.path.isfile(source):
        samples = read_labeled(source, flag)
        if samples.spans is not None:
            raise UserError(f"{flag} {source} has start and end: remove them, images have no parts")
        return samples
    return find_labeled(source, IMAGE_EXTENSIONS, flag)


def list_images(
    args: argparse.Namespace, known_classes: list[str] | None
) -> tuple[Split, Split, list[str]]:
    """Return training images, validation images and the class names. Call on one rank.

    known_classes: the class names of the checkpoint that is evaluated or resumed, or of
    --class_names.
    """
    val = labeled_images(args.val_data_path, "--val_data_path")
    if args.eval:
        assert known_classes is not None  # `setup` has found them
        classes = known_classes
        train_split = Split([], [])
    else:
        train = labeled_images(args.train_data_path, "--train_data_path")
        classes = check_classes(train.labels, val.labels, known_classes, args.val_data_path)
        write_classes(Path(args.output_dir, f"{args.save_prefix}_classes.json"), classes)
        labels = class_indices(train.labels, classes, args.train_data_path)
        kept = keep_subset(labels, args.frac_retained, args.shots, args.seed)
        train_split = Split([train.paths[i] for i in kept], [labels[i] for i in kept])
    val_split = Split(val.paths, class_indices(val.labels, classes, args.val_data_path))
    return train_split, val_split, classes


def worker_settings(args: argparse.Namespace) -> WorkerSettings:
    """Return how loader workers read files."""
    quarantine = Path(args.output_dir, "quarantine.csv")
    return WorkerSettings(args.num_workers, args.pin_mem, args.read_timeout, quarantine)


def center_images(args: argparse.Namespace, samples: Split, substitutes: int = 0) -> ImageDataset:
    """Return the center crops of images. substitutes: see `SampleDataset`."""
    return ImageDataset(
        paths=samples.paths,
        labels=samples.labels,
        transform=image_transform(args.img_size, train=False),
        seed=0,
        substitutes=substitutes,
        epochs_differ=False,
    )


def build_train_data(args: argparse.Namespace, env: DistEnv, train: Split) -> TrainData | None:
    """Return the training images, or None with --eval.

    Those of a probe are center crops, unless --probe_augment is given.
    """
    if args.eval:
        return None
    dataset = ImageDataset(
        paths=train.paths,
        labels=train.labels,
        transform=image_transform(args.img_size, True, args.flip, flags.augmentation(args)),
        seed=args.seed,
        substitutes=SUBSTITUTES,
    )
    sampler = EpochSampler(
        len(dataset),
        batch_size=args.batch_size_per_gpu,
        accum_iter=args.accum_iter,
        env=env,
        seed=args.seed,
        groups=class_groups(train.labels, args.balanced),
    )
    workers = worker_settings(args)
    views = None
    if args.probe:
        center = center_images(args, train, SUBSTITUTES)
        views = eval_loader(center, args.batch_size_per_gpu, workers, env)
        if not args.probe_augment:  # not `center`: each loader sets the watchdog of its data set
            dataset = center_images(args, train, SUBSTITUTES)
    steps = flags.total_steps(args, sampler.updates_per_epoch)
    return TrainData(
        fingerprint=dataset_fingerprint(
            train.paths, train.labels, weighting="--balanced" if args.balanced else ""
        ),
        paths=train.paths,
        updates_per_epoch=sampler.updates_per_epoch,
        batches=train_loader(dataset, sampler, steps, workers, env.device),
        views=views,
        order=sampler.micro_batches,
    )


def build_eval_data(
    args: argparse.Namespace, env: DistEnv, val: Split, classes: list[str]
) -> EvalData:
    """Return the validation images."""
    dataset = center_images(args, val)
    batches = eval_loader(dataset, args.batch_size_per_gpu, worker_settings(args), env)
    still_frames = args.num_frames if args.static_clip == "exact" else 1
    return EvalData(classes, val, batches, views=1, still_frames=still_frames)


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (default: sys.argv). Raises UserError for bad input."""
    args, env, start, known_classes = engine_finetune.setup(get_parser(), argv)
    train, val, classes = dist.on_rank0(lambda: list_images(args, known_classes))
    print0(
        f"{len(train.paths)} images to train on, {len(val.paths)} to validate on, "
        f"{len(classes)} classes"
    )
    model = engine_finetune.build_model(args, env, start, classes)
    train_data = build_train_data(args, env, train)
    eval_data = build_eval_data(args, env, val, classes)
    config = model.config | {"model": args.model, "classes": classes}
    if start.path is None:  # a new run: ImageNet's statistics, whatever the weights had
        config |= {"mean": IMAGE_MEAN, "std": IMAGE_STD}
    engine_finetune.run(args, env, model, config, (train_data, eval_data), start.path)


if __name__ == "__main__":
    dist.run_script(main)
