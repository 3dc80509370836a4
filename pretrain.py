"""Pretrain a spatiotemporal masked autoencoder on a folder of videos.

one process       python pretrain.py --data_dirs VIDEOS --output_dir runs/a
one machine       torchrun --standalone --nproc_per_node 8 pretrain.py --data_dirs VIDEOS --output_dir runs/a
smoke test (CPU)  python pretrain.py --data_dirs samples/videos/train --model mae_vit_micro_patch16 --img_size 32 --max_steps 4
what it predicts  python pretrain.py --visualize runs/a/PREFIX.pth --data_dirs UNSEEN_VIDEOS --output_dir pictures

The same command continues an interrupted run (--resume auto).
"""

from collections.abc import Callable
from pathlib import Path

import torch

import gallery
from data.index import (
    VIDEO_EXTENSIONS,
    class_names,
    class_numbers,
    find_labelled,
    find_videos,
    keep_fraction,
    read_manifest,
    write_manifest,
)
from data.loaders import ClipDataset, ViewDataset, eval_feed, train_feed
from data.probe import carry_over
from data.probe import load as load_index
from data.transforms import VIDEO_MEAN, VIDEO_STD, sample_seed, train_transform, view_transform
from engine_eval import SIZE, fixed_noise, mean_features, probe, validation_loss
from engine_pretrain import SUMS, train_one_epoch
from models_mae import MASK_TYPES, MaskedAutoencoderViT
from models_vit import choose_attention, named_size
from util import args as flags
from util import checkpoint, dist, stop
from util.cli import fraction, natural, positive
from util.dist import UserError, print0
from util.optim import Plan, amp_dtype, make_optimizer, pretrain_groups
from util.saver import Saver, digest
from util.tracking import Run, Tally, say_versions


def get_parser() -> flags.ScriptParser:
    """The flags of this script."""
    parser = flags.ScriptParser(__doc__)
    group = flags.add_model(parser, model="mae_vit_large_patch16", num_frames=16)
    group.add_argument(
        "--decoder_embed_dim", type=positive, default=512, help="(default: %(default)s)"
    )
    group.add_argument("--decoder_depth", type=positive, default=8, help="(default: %(default)s)")
    group.add_argument(
        "--decoder_num_heads", type=positive, default=16, help="(default: %(default)s)"
    )
    group.add_argument(
        "--pred_t_dim",
        type=positive,
        default=16,
        help="frames to predict per clip (default: %(default)s)",
    )
    group.add_argument(
        "--mask_ratio",
        type=float,
        default=0.9,
        help="share of tokens hidden (default: %(default)s)",
    )
    group.add_argument(
        "--mask_type", choices=MASK_TYPES, default="random", help="(default: %(default)s)"
    )
    group.add_argument(
        "--norm_pix_loss",
        action=flags.SWITCH,
        default=False,
        help="normalise each patch's target pixels (default: off)",
    )
    group.add_argument("--trunc_init", action="store_true", help="truncated normal initialisation")
    group = flags.add_optimisation(parser, epochs=100, batch_size=4)
    group.add_argument(
        "--bias_wd", action="store_true", help="let 1-d parameters other than biases decay"
    )
    group = flags.add_video(parser, sampling_rate=4, repeat_aug=4, scales=(0.5, 1.0))
    group.add_argument(
        "--data_dirs", nargs="+", default=[], help="folders of videos, searched recursively"
    )
    group.add_argument(
        "--data_csv", default="", help="a manifest (path[,label] per line) instead of --data_dirs"
    )
    group.add_argument(
        "--data_frac",
        type=fraction,
        default=1.0,
        help="use the first part of the sorted videos (default: %(default)s)",
    )
    group = flags.add_run(parser)
    group.add_argument(
        "--val_dirs",
        nargs="+",
        default=[],
        help="folders of videos for a validation loss: centre clip and crop, fixed masks",
    )
    group.add_argument("--val_csv", default="", help="a manifest instead of --val_dirs")
    group.add_argument(
        "--probe_dir",
        default="",
        metavar="DIR",
        help="labelled videos, DIR/train/CLASS and DIR/val/CLASS: frozen features of train classify val (k-NN, linear)",
    )
    group.add_argument(
        "--val_every",
        type=positive,
        default=1,
        help="epochs between validations and probes (default: %(default)s)",
    )
    group.add_argument(
        "--recon_every",
        type=natural,
        default=5,
        help="epochs between reconstruction pictures, 0 = none (default: %(default)s)",
    )
    group.add_argument(
        "--visualize",
        default="",
        metavar="CKPT",
        help="no training: pictures of what this checkpoint predicts on --data_dirs; model, spacing, mask are its run's",
    )
    group.add_argument(
        "--visualize_masks",
        nargs="+",
        default=[],
        metavar="TYPE:RATIO",
        help="masks to show (default: --mask_type:--mask_ratio)",
    )
    group.add_argument(
        "--visualize_clips",
        type=positive,
        default=4,
        help="videos to show, evenly spread (default: %(default)s)",
    )
    flags.add_system(parser)
    return parser


def list_videos(
    args, kind: str, folders: list[str], csv: str, share: float, resuming: bool
) -> list[str]:
    """Paths of the training or validation videos, by way of the run's own manifest: rank 0 writes it, a resumed run reuses it."""
    manifest = Path(args.datafile_dir, f"{args.save_prefix}_{kind}.csv")

    def write() -> None:
        if resuming and manifest.exists():
            return
        paths = find_paths(folders, csv)
        kept = keep_fraction(paths, share)
        write_manifest(manifest, kept)
        carry_over(csv, manifest, kept)
        print0(f"{len(kept)} of {len(paths)} videos, listed in {manifest}")

    dist.on_rank0(write)
    return read_manifest(manifest)[0]


def find_paths(folders: list[str], csv: str) -> list[str]:
    """Paths of the videos below the folders, or in a manifest. Raises UserError if neither is given."""
    if not folders and not csv:
        raise UserError("no videos given: --data_dirs FOLDER [FOLDER ...], or --data_csv FILE")
    return read_manifest(csv)[0] if csv else find_videos(folders)


def build_model(args, device: torch.device) -> MaskedAutoencoderViT:
    """The model that the flags describe, initialised from --seed, on the device."""
    torch.manual_seed(sample_seed(args.seed))
    try:
        model = MaskedAutoencoderViT(
            **named_size(args.model, args.patch_size),
            img_size=args.img_size,
            num_frames=args.num_frames,
            t_patch_size=args.t_patch_size,
            decoder_embed_dim=args.decoder_embed_dim,
            decoder_depth=args.decoder_depth,
            decoder_num_heads=args.decoder_num_heads,
            pred_t_dim=args.pred_t_dim,
            norm_pix_loss=args.norm_pix_loss,
            sep_pos_embed=args.sep_pos_embed,
            cls_embed=args.cls_embed,
            no_qkv_bias=args.no_qkv_bias,
            trunc_init=args.trunc_init,
            attn=args.attn,
        )
        model.check_mask(args.mask_ratio, args.mask_type)
        amp = amp_dtype(args.amp, device)
        for part, blocks in (("encoder", model.blocks), ("decoder", model.decoder_blocks)):
            head_dim = blocks[0].norm1.normalized_shape[0] // blocks[0].attn.num_heads
            kernel, reason = choose_attention(args.attn, device.type, amp, head_dim)
            print0(f"attention of the {part}: {kernel} ({reason})")
    except ValueError as error:
        raise UserError(str(error)) from error
    model.activation_checkpointing = args.activation_checkpointing
    print0(
        f"model {args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.num_tokens} tokens per clip"
    )
    return model.to(device)


def build_data(args, paths: list[str], num_tokens: int) -> ClipDataset:
    """The training clips."""
    return ClipDataset(
        paths=paths,
        labels=None,
        num_frames=args.num_frames,
        sampling_rate=args.sampling_rate,
        target_fps=args.target_fps,
        repeat_aug=args.repeat_aug,
        repeat_windows=args.repeat_windows,
        decoder=args.decoder,
        seed=args.seed,
        noise_tokens=num_tokens,
        transform=train_transform(
            args.img_size,
            args.jitter_scales_relative,
            args.jitter_aspect_relative,
            args.flip,
            args.color_jitter,
        ),
        short_side=decoded_side(args),
        known=load_index(Path(args.datafile_dir, f"{args.save_prefix}_train.csv"), paths),
    )


def decoded_side(args) -> int:
    """The short side at which videos are decoded, in pixels."""
    return args.short_side or max(256, -(-args.img_size * 256 // 224))


def fixed_clips(args, paths: list[str], labels: list[int]) -> ViewDataset:
    """The centre clip and centre crop of each video."""
    return ViewDataset(
        paths=paths,
        labels=labels,
        num_views=1,
        transform=view_transform(args.img_size, 1),
        num_frames=args.num_frames,
        sampling_rate=args.sampling_rate,
        target_fps=args.target_fps,
        decoder=args.decoder,
        short_side=decoded_side(args),
    )


def build_validation(
    args, model: MaskedAutoencoderViT, place: dist.Place, amp: torch.dtype, resuming: bool
) -> list[tuple[Callable, Callable]]:
    """What the flags ask for of val_loss, probe_knn_acc1 and probe_linear_acc1 (percent): pairs of () -> batches and batches -> results.

    They draw nothing and keep nothing: training is the same with and without them.
    """
    measures = []
    if args.val_dirs or args.val_csv:
        paths = list_videos(args, "val", args.val_dirs, args.val_csv, 1.0, resuming)
        feed = eval_feed(fixed_clips(args, paths, [-1] * len(paths)), SIZE, args, place)
        measures.append(
            (feed, lambda batches: {"val_loss": validation_loss(model, batches, args, amp)})
        )
    if args.probe_dir:
        train, val = (
            find_labelled(str(Path(args.probe_dir, part)), VIDEO_EXTENSIONS, "--probe_dir")
            for part in ("train", "val")
        )
        labels = class_numbers(
            train[1] + val[1], class_names(train[1]), f"--probe_dir {args.probe_dir}/val"
        )
        feed = eval_feed(fixed_clips(args, train[0] + val[0], labels), SIZE, args, place)
        measures.append(
            (feed, lambda batches: probe(mean_features(model, batches, amp), labels, len(train[0])))
        )
    return measures


def validate(measures: list[tuple[Callable, Callable]], saver: Saver) -> dict:
    """The results of `build_validation`'s measures for the model as it is now. Raises Stopped. A collective call."""
    results = {}
    for batches, measure in measures:
        results |= measure(saver.interruptible(batches()))
    return results


def visualize(argv: list[str] | None) -> None:
    """--visualize: a gallery of what a checkpoint predicts. Flags that are not given are those of its run."""
    parser = get_parser()
    model, of_run = gallery.load_model(parser.parse_args(argv).visualize)
    parser.set_defaults(**of_run)
    args = flags.parse(parser, argv)
    args.img_size, args.num_frames = model.config["img_size"], model.config["num_frames"]
    masks = [gallery.parse_mask(mask) for mask in args.visualize_masks] or [
        (args.mask_type, args.mask_ratio)
    ]
    place = dist.setup(args.device, args.deterministic)
    paths = find_paths(args.data_dirs, args.data_csv)
    chosen = torch.linspace(0, len(paths) - 1, min(args.visualize_clips, len(paths))).long()
    dataset = fixed_clips(args, paths, [-1] * len(paths))
    samples = [dataset[(0, number)] for number in chosen.tolist()]
    for video, reason in (bad for sample in samples for bad in sample["bad"]):
        raise UserError(f"{video} cannot be read ({reason}): repair it or take it out of the set")
    for number, index in enumerate(chosen.tolist(), 1):
        print0(f"clip {number}: {paths[index]}")
    clips = torch.cat([sample["clips"] for sample in samples]).to(place.device)
    noise = fixed_noise(chosen.to(place.device), model.num_tokens)
    if place.rank == 0:
        gallery.write(
            model.to(place.device), clips, noise, masks, args, amp_dtype(args.amp, place.device)
        )


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (sys.argv by default). Raises UserError for bad input."""
    args = flags.parse(get_parser(), argv)
    if args.visualize:
        visualize(argv)
        return
    place = dist.setup(args.device, args.deterministic)
    stop.listen()
    say_versions()
    args.compile = place.device.type == "cuda" if args.compile is None else args.compile
    resume_from = dist.on_rank0(lambda: checkpoint.find_resume(args))
    model = build_model(args, place.device)
    paths = list_videos(
        args,
        "train",
        args.data_dirs,
        args.data_csv,
        args.data_frac,
        resuming=resume_from is not None,
    )
    dataset = build_data(args, paths, model.num_tokens)
    updates_per_epoch, batches = train_feed(dataset, args, place)
    config = model.config | {"model": args.model, "mean": VIDEO_MEAN, "std": VIDEO_STD}
    total_steps = args.max_steps or args.epochs * updates_per_epoch
    lr = flags.effective_lr(args, place.world_size, {})
    plan = Plan(
        lr,
        updates_per_epoch,
        total_steps,
        amp_dtype(args.amp, place.device),
        args.max_bad_frac * len(paths),
        model.flops_per_clip(args.mask_ratio, args.mask_type),
    )

    optimizer = make_optimizer(
        pretrain_groups(model, args.weight_decay, args.bias_wd),
        model.parameters(),
        betas=(0.9, 0.95),
    )
    scaler = torch.amp.GradScaler(place.device.type, enabled=plan.amp == torch.float16)
    validations, run = (
        build_validation(args, model, place, plan.amp, resuming=resume_from is not None),
        Run(args),
    )
    saver = Saver(
        args, model, optimizer, scaler, plan, config, digest(paths), Tally(SUMS, place.device), run
    )
    saver.resume(resume_from)
    if args.compile:
        model.compile_parts()
    wrapped = dist.wrap(model, place, static_graph=args.accum_iter == 1)

    with saver.until_stopped():
        while saver.unfinished():
            epoch, done = saver.position()
            record = train_one_epoch(
                wrapped, batches(epoch, done), optimizer, scaler, args, plan, run, place, saver
            )
            record["unreadable_videos"] = run.gather_unreadable()
            last = saver.step >= plan.total_steps
            if validations and (last or (epoch + 1) % args.val_every == 0):
                results = validate(validations, saver)
                record |= results
                run.epoch_line(
                    f"epoch {epoch}: "
                    + "  ".join(f"{name} {value:.4g}" for name, value in results.items()),
                    last,
                )
            if args.recon_every and (last or (epoch + 1) % args.recon_every == 0):
                gallery.save_picture(model, dataset, args, plan.amp, run, epoch, place.device)
            saver.close_epoch(record)
    run.close()


if __name__ == "__main__":
    dist.run_script(main)
