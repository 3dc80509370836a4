"""Finetune a pretrained encoder to classify videos, or train the classifier from scratch; evaluate it.

one process       python finetune.py --train_dir TRAIN --val_dir VAL --finetune runs/a/PREFIX.pth --num_classes 174 --output_dir runs/b
one machine       torchrun --standalone --nproc_per_node 8 finetune.py --train_dir TRAIN --val_dir VAL --finetune runs/a/PREFIX.pth ...
test, 5 x 3 views python finetune.py --val_dir VAL --output_dir runs/b --num_classes 174 --eval --test_num_clips 5 --test_num_crops 3
smoke test (CPU)  python finetune.py --train_dir samples/videos/train --val_dir samples/videos/val --num_classes 3 --model vit_micro_patch16
                  --img_size 32 --num_frames 4 --max_steps 4 --batch_size_per_gpu 4

The same command continues an interrupted run (--resume auto).
"""

from pathlib import Path

import torch

import engine_finetune
from data.index import VIDEO_EXTENSIONS, check_classes, class_numbers, find_labelled, read_manifest, write_classes, write_manifest
from data.loaders import ClipDataset, EpochSampler, ShareSampler, ViewDataset, make_loader, on_device
from data.transforms import VIDEO_MEAN, VIDEO_STD, sample_seed, train_transform, view_transform
from engine_finetune import Task
from models_vit import VisionTransformer, named_size
from util import args as flags
from util import checkpoint, dist
from util.dist import UserError, print0
from util.tracking import say_versions


def get_parser() -> flags.Parser:
    """The flags of this script."""
    parser = flags.Parser(__doc__, retired=("--bias_wd",))
    model = flags.add_model(parser, model="vit_large_patch16", num_frames=32)
    factors = "batch_size_per_gpu * accum_iter * processes * repeat_aug"
    flags.add_classifier(model, flags.add_optimisation(parser, epochs=50, batch_size=64, effective=factors), smoothing=0.1)
    group = flags.add_video(parser, sampling_rate=2, repeat_aug=1, scales=(0.2, 1.0))
    group.add_argument("--train_dir", default="", help="training videos, one subfolder per class")
    group.add_argument("--val_dir", default="", help="validation videos, the same subfolders")
    group.add_argument("--train_csv", default="", help="a manifest (path,label per line) instead of --train_dir")
    group.add_argument("--val_csv", default="", help="a manifest instead of --val_dir")
    group.add_argument("--test_num_clips", type=flags.positive, default=1, help="with --eval: time windows per video (default: %(default)s)")
    group.add_argument("--test_num_crops", type=int, choices=(1, 3), default=1, help="with --eval: crops per window (default: %(default)s)")
    flags.add_eval(flags.add_run(parser))
    flags.add_system(parser)
    return parser


def labelled(folder: str, manifest: str, kind: str) -> tuple[list[str], list[str]]:
    """Paths and class names from --{kind}_dir or --{kind}_csv. Raises UserError."""
    if folder:
        return find_labelled(folder, VIDEO_EXTENSIONS, f"--{kind}_dir")
    if not manifest:
        raise UserError(f"no {kind} videos given: --{kind}_dir FOLDER with one subfolder per class, or --{kind}_csv FILE with path,label lines")
    paths, labels = read_manifest(manifest)
    if "" in labels:
        raise UserError(f"--{kind}_csv {manifest}: {paths[labels.index('')]} has no label: give path,label on each line")
    return paths, labels


def list_videos(args, known: dict | None) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]], list[str]]:
    """Training and validation videos (paths, class numbers) and the class names; by way of the run's own manifests.

    known: the config of the checkpoint that the run goes on from or evaluates, whose classes stay valid. A resumed run
    reads its manifests again instead of the folders.
    """
    lists = {kind: Path(args.datafile_dir, f"{args.save_prefix}_{kind}.csv") for kind in ("train", "val")}

    def write() -> list[str]:
        if known and not args.eval and all(path.exists() for path in lists.values()):
            return known["classes"]
        val_source = args.val_dir or args.val_csv
        val = labelled(args.val_dir, args.val_csv, "val")
        if args.eval:
            classes = known["classes"]
            class_numbers(val[1], classes, val_source)
        else:
            train = labelled(args.train_dir, args.train_csv, "train")
            classes = check_classes(train[1], val[1], args.num_classes, val_source)
            write_manifest(lists["train"], *train)
            write_classes(Path(args.datafile_dir, f"{args.save_prefix}_classes.json"), classes)
        write_manifest(lists["val"], *val)
        return classes

    classes = dist.on_rank0(write)
    sets = [read_manifest(lists[kind]) if kind == "val" or not args.eval else ([], []) for kind in ("train", "val")]
    train, val = ((paths, class_numbers(labels, classes, f"{args.save_prefix}'s manifest")) for paths, labels in sets)
    return train, val, classes


def build_model(args, device: torch.device) -> VisionTransformer:
    """The classifier that the flags describe, initialised from --seed, on the device."""
    torch.manual_seed(sample_seed(args.seed))
    try:
        model = VisionTransformer(
            **named_size(args.model, args.patch_size), img_size=args.img_size, num_frames=args.num_frames,
            t_patch_size=args.t_patch_size, num_classes=args.num_classes, dropout=args.dropout,
            drop_path_rate=0.0 if args.freeze_backbone else args.drop_path_rate, global_pool=args.global_pool,
            sep_pos_embed=args.sep_pos_embed, cls_embed=args.cls_embed, no_qkv_bias=args.no_qkv_bias, attn=args.attn,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not args.freeze_backbone or name.startswith("head.")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"model {args.model}: {trained / 1e6:.1f} M parameters to train, {model.num_tokens} tokens per clip")
    return model.to(device)


def build_task(args, place: dist.Place, train, val, classes: list[str]) -> Task:
    """Loaders of the training and validation videos."""
    shared = {"num_frames": args.num_frames, "sampling_rate": args.sampling_rate, "target_fps": args.target_fps, "decoder": args.decoder,
              "short_side": args.short_side or max(256, -(-args.img_size * 256 // 224))}  # fmt: skip
    clips, crops = (args.test_num_clips, args.test_num_crops) if args.eval else (1, 1)
    views = ViewDataset(paths=val[0], labels=val[1], num_views=clips, transform=view_transform(args.img_size, crops), **shared)
    pin = args.pin_mem and place.device.type == "cuda"
    videos_at_once = max(1, args.batch_size_per_gpu // (clips * crops))
    val_loader = make_loader(views, ShareSampler(len(views), place.rank, place.world_size), videos_at_once, args.num_workers, pin)
    task = Task(classes, 0, 0, None, lambda: on_device(val_loader, place.device), val[0], args.repeat_aug, clips * crops)
    if args.eval:
        return task
    try:
        transform = train_transform(args.img_size, args.jitter_scales_relative, args.jitter_aspect_relative, args.flip, args.color_jitter,
                                    flags.augmentation(args))  # fmt: skip
    except ValueError as error:
        raise UserError(f"--aa: {error}") from error
    dataset = ClipDataset(paths=train[0], labels=train[1], repeat_aug=args.repeat_aug, repeat_windows=args.repeat_windows,
                          transform=transform, seed=args.seed, noise_tokens=0, **shared)  # fmt: skip
    sampler = EpochSampler(len(dataset), args.batch_size_per_gpu, args.accum_iter, place.rank, place.world_size, args.seed)
    loader = make_loader(dataset, sampler, args.batch_size_per_gpu, args.num_workers, pin)

    def train_batches(epoch: int, done: int):
        sampler.set_position(epoch, done)
        return on_device(loader, place.device)

    return task._replace(train_size=len(dataset), updates_per_epoch=sampler.updates_per_epoch, train_batches=train_batches)


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (sys.argv by default). Raises UserError for bad input."""
    args = flags.parse(get_parser(), argv)
    place = dist.setup(args.device)
    say_versions()
    args.compile = place.device.type == "cuda" if args.compile is None else args.compile
    model = build_model(args, place.device)
    known = dist.on_rank0(lambda: checkpoint.known_config(args))
    train, val, classes = list_videos(args, known)
    print0(f"{len(train[0])} videos to train on, {len(val[0])} to validate on, {len(classes)} classes")
    config = model.config | {"model": args.model, "mean": VIDEO_MEAN, "std": VIDEO_STD, "classes": classes}
    task = build_task(args, place, train, val, classes)
    (engine_finetune.test if args.eval else engine_finetune.run)(args, place, model, config, task)


if __name__ == "__main__":
    dist.run_script(main)
