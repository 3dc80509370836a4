"""Finetune a pretrained encoder to classify videos, or train the classifier from scratch; evaluate it.

one process       python finetune.py --train_dir TRAIN --val_dir VAL --finetune runs/a/PREFIX.pth --num_classes 174 --output_dir runs/b
one machine       torchrun --standalone --nproc_per_node 8 finetune.py --train_dir TRAIN --val_dir VAL --finetune runs/a/PREFIX.pth ...
test, 5 x 3 views python finetune.py --val_dir VAL --output_dir runs/b --num_classes 174 --eval --test_num_clips 5 --test_num_crops 3
features as .npz  python finetune.py --val_dir VAL --output_dir runs/b --finetune runs/a/PREFIX.pth --extract_features
smoke test (CPU)  python finetune.py --train_dir samples/videos/train --val_dir samples/videos/val --num_classes 3 --model vit_micro_patch16
                  --img_size 32 --num_frames 4 --max_steps 4 --batch_size_per_gpu 4

The same command continues an interrupted run (--resume auto).
"""

from pathlib import Path

import engine_finetune
from data import probe
from data.index import (
    VIDEO_EXTENSIONS,
    check_classes,
    class_names,
    class_numbers,
    find_labelled,
    read_manifest,
    write_classes,
    write_manifest,
)
from data.loaders import ClipDataset, ViewDataset, eval_feed, train_feed
from data.transforms import VIDEO_MEAN, VIDEO_STD, train_transform, view_transform
from engine_finetune import Task
from util import args as flags
from util import dist
from util.cli import positive
from util.dist import UserError, print0
from util.saver import digest


def get_parser() -> flags.ScriptParser:
    """The flags of this script."""
    parser = flags.ScriptParser(__doc__, retired=("--bias_wd",))
    model = flags.add_model(parser, model="vit_large_patch16", num_frames=32)
    optimisation = flags.add_optimisation(
        parser, epochs=50, batch_size=64, effective=f"{flags.EFFECTIVE} * repeat_aug"
    )
    flags.add_classifier(model, optimisation, smoothing=0.1)
    group = flags.add_video(parser, sampling_rate=2, repeat_aug=1, scales=(0.2, 1.0))
    group.add_argument("--train_dir", default="", help="training videos, one subfolder per class")
    group.add_argument("--val_dir", default="", help="validation videos, the same subfolders")
    group.add_argument(
        "--train_csv", default="", help="a manifest (path,label per line) instead of --train_dir"
    )
    group.add_argument("--val_csv", default="", help="a manifest instead of --val_dir")
    group.add_argument(
        "--test_num_clips",
        type=positive,
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
    flags.add_system(parser)
    return parser


def labelled(
    folder: str, manifest: str, kind: str, unlabelled: bool = False
) -> tuple[list[str], list[str]]:
    """Paths and class names from --{kind}_dir or --{kind}_csv; unlabelled: "" is a label too. Raises UserError."""
    if folder:
        return find_labelled(folder, VIDEO_EXTENSIONS, f"--{kind}_dir")
    if not manifest:
        raise UserError(
            f"no {kind} videos given: --{kind}_dir FOLDER with one subfolder per class, or --{kind}_csv FILE with path,label lines"
        )
    paths, labels = read_manifest(manifest)
    if "" in labels and not unlabelled:
        raise UserError(
            f"--{kind}_csv {manifest}: {paths[labels.index('')]} has no label: give path,label on each line"
        )
    return paths, labels


def list_videos(
    args, known: dict | None
) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]], list[str]]:
    """Training and validation videos (paths, class numbers) and the class names; call on one rank.

    known: the config of the checkpoint that the run goes on from or evaluates, whose classes stay valid. A run keeps its
    lists as manifests; when it is resumed, it reads these again instead of the folders.
    """
    lists = {
        kind: Path(args.datafile_dir, f"{args.save_prefix}_{kind}.csv") for kind in ("train", "val")
    }
    val_source = args.val_dir or args.val_csv or str(lists["val"])
    if args.eval or args.extract_features:
        paths, labels = labelled(
            args.val_dir, args.val_csv, "val", unlabelled=args.extract_features
        )
        given = sorted(set(labels) - {""})
        classes = known["classes"] if known else class_names(given) if given else []
        numbers = dict(zip(given, class_numbers(given, classes, val_source), strict=True)) | {
            "": -1
        }
        return ([], []), (paths, [numbers[label] for label in labels]), classes
    if known and all(path.exists() for path in lists.values()):
        train, val, classes = (
            read_manifest(lists["train"]),
            read_manifest(lists["val"]),
            known["classes"],
        )
    else:
        train, val = (
            labelled(args.train_dir, args.train_csv, "train"),
            labelled(args.val_dir, args.val_csv, "val"),
        )
        classes = check_classes(train[1], val[1], args.num_classes, val_source)
        for kind, videos, source in (("train", train, args.train_csv), ("val", val, args.val_csv)):
            write_manifest(lists[kind], *videos)
            probe.carry_over(source, lists[kind], videos[0])
        write_classes(Path(args.datafile_dir, f"{args.save_prefix}_classes.json"), classes)
    train, val = (
        (paths, class_numbers(labels, classes, val_source)) for paths, labels in (train, val)
    )
    return train, val, classes


def build_task(args, place: dist.Place, train, val, classes: list[str]) -> Task:
    """Loaders of the training and validation videos."""
    shared = {
        "num_frames": args.num_frames,
        "sampling_rate": args.sampling_rate,
        "target_fps": args.target_fps,
        "decoder": args.decoder,
        "short_side": args.short_side or max(256, -(-args.img_size * 256 // 224)),
    }
    only_reads = args.eval or args.extract_features
    known = {
        kind: args.val_csv
        if only_reads
        else Path(args.datafile_dir, f"{args.save_prefix}_{kind}.csv")
        for kind in ("train", "val")
    }
    clips, crops = (args.test_num_clips, args.test_num_crops) if args.eval else (1, 1)
    views = ViewDataset(
        paths=val[0],
        labels=val[1],
        num_views=clips,
        transform=view_transform(args.img_size, crops),
        known=probe.load(known["val"], val[0]),
        **shared,
    )
    val_batches = eval_feed(views, max(1, args.batch_size_per_gpu // (clips * crops)), args, place)
    task = Task(classes, val[0], val_batches, clips * crops, val[1])
    if only_reads:
        return task
    transform = train_transform(
        args.img_size,
        args.jitter_scales_relative,
        args.jitter_aspect_relative,
        args.flip,
        args.color_jitter,
        flags.augmentation(args),
    )
    dataset = ClipDataset(
        paths=train[0],
        labels=train[1],
        repeat_aug=args.repeat_aug,
        repeat_windows=args.repeat_windows,
        transform=transform,
        seed=args.seed,
        noise_tokens=0,
        known=probe.load(known["train"], train[0]),
        **shared,
    )
    updates_per_epoch, train_batches = train_feed(dataset, args, place)
    return task._replace(
        data=digest(*train),
        updates_per_epoch=updates_per_epoch,
        train_batches=train_batches,
        repeats=args.repeat_aug,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (sys.argv by default). Raises UserError for bad input."""
    args = flags.parse(get_parser(), argv)
    place, path, known = engine_finetune.prepare(args)
    train, val, classes = dist.on_rank0(lambda: list_videos(args, known))
    print0(
        f"{len(train[0])} videos to train on, {len(val[0])} to validate on, {len(classes)} classes"
    )
    model = engine_finetune.build_model(args, place.device, known)
    config = (
        {"mean": VIDEO_MEAN, "std": VIDEO_STD}
        | model.config
        | {"model": args.model, "classes": classes}
    )  # pixels as the weights know them
    task = build_task(args, place, train, val, classes)
    engine_finetune.work(args, place, model, config, task, path)


if __name__ == "__main__":
    dist.run_script(main)
