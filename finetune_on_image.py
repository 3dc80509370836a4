"""Finetune a pretrained video encoder to classify images, each shown as a static clip; evaluate it.

one process       python finetune_on_image.py --train_data_path TRAIN --val_data_path VAL --finetune runs/a/PREFIX.pth --num_classes 1000
one machine       torchrun --standalone --nproc_per_node 8 finetune_on_image.py --train_data_path TRAIN --val_data_path VAL ...
smoke test (CPU)  python finetune_on_image.py --train_data_path samples/images/train --val_data_path samples/images/val --num_classes 10
                  --model vit_micro_patch16 --img_size 32 --num_frames 4 --max_steps 4 --batch_size_per_gpu 4

The same command continues an interrupted run (--resume auto).
"""

from pathlib import Path

import engine_finetune
from data.index import (
    IMAGE_EXTENSIONS,
    check_classes,
    class_names,
    class_numbers,
    find_labelled,
    keep_stratified,
    write_classes,
)
from data.loaders import SUBSTITUTES, ImageDataset, eval_feed, train_feed
from data.transforms import IMAGE_MEAN, IMAGE_STD, image_transform
from engine_finetune import Task
from util import args as flags
from util import dist
from util.cli import fraction
from util.dist import UserError, print0
from util.saver import digest


def get_parser() -> flags.ScriptParser:
    """The flags of this script."""
    parser = flags.ScriptParser(__doc__, retired=("--bias_wd",))
    model = flags.add_model(parser, model="vit_large_patch16", num_frames=32)
    model.add_argument(
        "--static_clip",
        choices=("exact", "folded"),
        default="exact",
        help="repeat the image, or embed it once by weights summed over time: same result, less work (default: exact)",
    )
    flags.add_classifier(
        model, flags.add_optimisation(parser, epochs=50, batch_size=64), smoothing=0.0
    )
    group = parser.add_argument_group("data (changes results)")
    group.add_argument(
        "--train_data_path", default="", help="training images, one subfolder per class"
    )
    group.add_argument("--val_data_path", default="", help="validation images, the same subfolders")
    group.add_argument(
        "--frac_retained",
        type=fraction,
        default=1.0,
        help="train on this part of each class (default: %(default)s)",
    )
    flags.add_shared_data(group)
    flags.add_eval(flags.add_run(parser))
    flags.add_system(parser)
    return parser


def list_images(
    args, known: dict | None
) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]], list[str]]:
    """Training and validation images (paths, class numbers) and the class names; call on one rank.

    known: the config of the checkpoint that the run goes on from or evaluates, whose classes stay valid.
    """
    for flag, folder in (
        ("--val_data_path", args.val_data_path),
        ("--train_data_path", args.train_data_path),
    ):
        if not folder and not (
            (args.eval or args.extract_features) and flag == "--train_data_path"
        ):
            raise UserError(f"no images given: {flag} FOLDER with one subfolder per class")
    val = find_labelled(args.val_data_path, IMAGE_EXTENSIONS, "--val_data_path")
    if args.eval or args.extract_features:
        classes = known["classes"] if known else class_names(val[1])
        return ([], []), (val[0], class_numbers(val[1], classes, args.val_data_path)), classes
    paths, labels = find_labelled(args.train_data_path, IMAGE_EXTENSIONS, "--train_data_path")
    classes = check_classes(labels, val[1], args.num_classes, args.val_data_path)
    write_classes(Path(args.output_dir, f"{args.save_prefix}_classes.json"), classes)
    numbers = class_numbers(labels, classes, args.train_data_path)
    kept = keep_stratified(numbers, args.frac_retained, args.seed)
    if len(kept) < len(paths):
        print0(
            f"--frac_retained {args.frac_retained}: {len(kept)} of {len(paths)} images, at least one of each class"
        )
    train = [paths[place] for place in kept], [numbers[place] for place in kept]
    return train, (val[0], class_numbers(val[1], classes, args.val_data_path)), classes


def build_task(args, place: dist.Place, train, val, classes: list[str]) -> Task:
    """Loaders of the training and validation images."""
    views = ImageDataset(
        paths=val[0],
        labels=val[1],
        transform=image_transform(args.img_size, train=False),
        seed=0,
        substitutes=0,
    )
    still_frames = args.num_frames if args.static_clip == "exact" else 1
    task = Task(
        classes,
        val[0],
        eval_feed(views, args.batch_size_per_gpu, args, place),
        1,
        val[1],
        still_frames,
    )
    if args.eval or args.extract_features:
        return task
    transform = image_transform(args.img_size, True, args.flip, flags.augmentation(args))
    dataset = ImageDataset(
        paths=train[0],
        labels=train[1],
        transform=transform,
        seed=args.seed,
        substitutes=SUBSTITUTES,
    )
    updates_per_epoch, train_batches = train_feed(dataset, args, place)
    return task._replace(
        data=digest(*train), updates_per_epoch=updates_per_epoch, train_batches=train_batches
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (sys.argv by default). Raises UserError for bad input."""
    args = flags.parse(get_parser(), argv)
    place, path, known = engine_finetune.prepare(args)
    train, val, classes = dist.on_rank0(lambda: list_images(args, known))
    print0(
        f"{len(train[0])} images to train on, {len(val[0])} to validate on, {len(classes)} classes"
    )
    model = engine_finetune.build_model(args, place.device, known)
    config = model.config | {
        "model": args.model,
        "mean": IMAGE_MEAN,
        "std": IMAGE_STD,
        "classes": classes,
    }
    task = build_task(args, place, train, val, classes)
    engine_finetune.work(args, place, model, config, task, path)


if __name__ == "__main__":
    dist.run_script(main)
