"""Pretrain a spatiotemporal masked autoencoder on a folder of videos.

one process   python pretrain.py --data_dirs VIDEOS --output_dir runs/a
one machine   torchrun --standalone --nproc_per_node 8 pretrain.py --data_dirs VIDEOS
              --output_dir runs/a
smoke test    python pretrain.py --data_dirs samples/videos/train --model mae_vit_micro_patch16
              --img_size 32 --max_steps 4

The same command resumes an interrupted run (--resume auto). More: docs/pretraining.md.
"""

import argparse
from pathlib import Path

import torch

import engine_pretrain
from data.clips import ClipSampling
from data.datasets import ClipDataset, ViewDataset
from data.frame_folder import check_frame_folders
from data.loader import WorkerSettings, eval_loader, train_loader
from data.manifest import (
    VIDEO_EXTENSIONS,
    Samples,
    class_indices,
    class_names,
    describe_count,
    find_labeled,
    find_videos,
    keep_fraction,
    read_manifest,
    unlabeled,
    write_manifest,
)
from data.mixtures import check_mixture, join_sources, print_mixture, source_groups
from data.samplers import EpochSampler, SampleGroups
from data.transforms import decode_short_side, train_transform, view_transform
from data.video_index import copy_indices, load_index
from engine_pretrain import PretrainData, Validation
from models_mae import DECODER_MASK_TYPES, MASK_TYPES, MaskedAutoencoderViT
from util import args as flags
from util import dist, preemption, same_run
from util.attentive_probe import attentive_accuracy, features_and_tokens, tokens_fit
from util.cli import fraction, nonnegative_int, positive_float, positive_int
from util.dist import DistEnv, UserError, print0
from util.evaluation import EVAL_CLIPS_PER_FORWARD, mean_features, probe, validation_loss
from util.logger import print_versions
from util.model_flags import Start, find_start, lists_again, note_kept_list
from util.optim import amp_dtype
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.pretrained import load_pretrained
from util.seeds import derive_seed
from util.train_state import dataset_fingerprint


def get_parser() -> flags.ScriptParser:
    """Return the parser of this script's flags."""
    parser = flags.ScriptParser(__doc__)
    add_model_and_optimization(parser)
    add_data(parser)
    add_validation(flags.add_run(parser))
    flags.add_system(parser)
    return parser


def add_model_and_optimization(parser: flags.ScriptParser) -> None:
    """Add the flags of the model and of its optimization."""
    group = flags.add_model(parser, model="mae_vit_large_patch16", num_frames=16)
    default = "(default: the checkpoint's, else %(default)s)"
    group.add_argument(
        "--decoder_embed_dim", type=positive_int, default=512, help=f"decoder width {default}"
    )
    group.add_argument(
        "--decoder_depth", type=positive_int, default=8, help=f"decoder blocks {default}"
    )
    group.add_argument(
        "--decoder_num_heads", type=positive_int, default=16, help=f"its attention heads {default}"
    )
    group.add_argument(
        "--pred_t_dim",
        type=positive_int,
        default=16,
        help=f"frames to predict per clip {default}",
    )
    group.add_argument(
        "--mask_ratio",
        type=float,
        default=0.9,
        help="share of tokens hidden (default: %(default)s)",
    )
    group.add_argument(
        "--mask_type",
        choices=MASK_TYPES,
        default="random",
        help="which tokens are hidden (default: %(default)s)",
    )
    group.add_argument(
        "--decoder_mask_ratio",
        type=float,
        default=0.0,
        help="share of the hidden tokens that training leaves out of decoder and loss, for speed; "
        "0 = none, VideoMAE v2: 0.5 (default: %(default)s)",
    )
    group.add_argument(
        "--decoder_mask_type",
        choices=DECODER_MASK_TYPES,
        default="cell",
        help="which hidden tokens are left out; cell: VideoMAE v2's running cells "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--norm_pix_loss",
        action=flags.BoolFlag,
        default=False,
        help="normalize each patch's target pixels (default: off)",
    )
    group.add_argument(
        "--init_from",
        default="",
        metavar="PATH",
        help="start from this checkpoint's encoder, and its decoder if it has one; positions are "
        "resampled for another --img_size or --num_frames (default: from scratch)",
    )
    group.add_argument("--trunc_init", action="store_true", help="truncated normal initialization")
    group = flags.add_optimization(parser, epochs=100, batch_size=4)
    group.add_argument(
        "--bias_wd", action="store_true", help="let 1-d parameters other than biases decay"
    )


def add_data(parser: flags.ScriptParser) -> None:
    """Add the flags of the training videos."""
    group = flags.add_video(
        parser, sampling_rate=4, repeat_aug=4, scales=(0.5, 1.0), several_rates=True
    )
    group.add_argument(
        "--data_dirs", nargs="+", default=[], help="folders of videos, searched recursively"
    )
    group.add_argument(
        "--data_csv",
        nargs="+",
        default=[],
        help="manifests (path[,label[,start,end]] per line) instead of --data_dirs",
    )
    group.add_argument(
        "--data_weights",
        nargs="+",
        type=positive_float,
        default=[],
        metavar="WEIGHT",
        help="share of an epoch of each --data_csv or --data_dirs, in any unit "
        "(default: by their numbers of samples)",
    )
    group.add_argument(
        "--data_frac",
        type=fraction,
        default=1.0,
        help="share of the videos to use, from the start of the list; in a mixture, of each "
        "source's list (default: %(default)s)",
    )


def add_validation(group: argparse._ArgumentGroup) -> None:
    """Add the flags of validation and probes."""
    group.add_argument(
        "--val_dirs",
        nargs="+",
        default=[],
        help="folders of videos for a validation loss: center clip and crop, fixed masks",
    )
    group.add_argument("--val_csv", default="", help="a manifest instead of --val_dirs")
    group.add_argument(
        "--probe_dir",
        default="",
        metavar="DIR",
        help="labeled videos, DIR/train/CLASS and DIR/val/CLASS: "
        "frozen features of train classify val (k-NN, linear, attentive)",
    )
    group.add_argument(
        "--val_every",
        type=positive_int,
        default=1,
        help="epochs between validations and probes (default: %(default)s)",
    )
    group.add_argument(
        "--recon_every",
        type=nonnegative_int,
        default=5,
        help="epochs between reconstruction pictures, 0 = none (default: %(default)s)",
    )


def find_samples(folders: list[str], csv: str, flag: str, frames_fps: float | None) -> Samples:
    """Return the videos below folders, or the samples of a manifest if there is one.

    flag: how the folders were given, for messages. frames_fps: see `open_video`. Raises UserError
    if neither is given.
    """
    if csv:
        return read_manifest(csv)
    if not folders:
        raise UserError("no videos given: --data_dirs FOLDER [FOLDER ...], or --data_csv FILE")
    return unlabeled(find_videos(folders, flag, frames_fps is not None))


def find_training_samples(args: argparse.Namespace) -> Samples:
    """Return the samples of --data_csv or --data_dirs, in a mixture with their sources."""
    flag = "--data_csv" if args.data_csv else "--data_dirs"
    entries = args.data_csv or args.data_dirs
    if args.data_csv and args.data_dirs:
        print0("note: --data_csv is given, so --data_dirs is not used")
    if not args.data_csv and not (is_mixture(args) and entries):
        return find_samples(entries, "", flag, args.frames_fps)
    if is_mixture(args) and len(entries) > 1:
        check_mixture(len(entries), args.data_weights, sampling_rates(args), flag)
    if args.data_csv:
        parts = [read_manifest(csv) for csv in entries]
    else:
        parts = [find_samples([folder], "", flag, args.frames_fps) for folder in entries]
    joined = join_sources(parts)
    return joined if is_mixture(args) else joined._replace(sources=None)


def is_mixture(args: argparse.Namespace) -> bool:
    """Return whether the sources of training videos differ in weight or sampling rate."""
    return bool(args.data_weights) or len(sampling_rates(args)) > 1


def sampling_rates(args: argparse.Namespace) -> list[int]:
    """Return the sampling rate of each source, or the one of all."""
    if isinstance(args.sampling_rate, list):
        return args.sampling_rate
    return [args.sampling_rate]


def list_samples(args: argparse.Namespace, kind: str, start: Start) -> Samples:
    """Return the "train" or "val" samples. Call on every rank.

    Rank 0 lists them in the run's own manifest. A resumed run reads it instead of the folders,
    unless the flags of its validation set have changed.
    """
    manifest = flags.manifest_path(args, kind)
    known = start.path is not None and manifest.exists()
    if known and kind == "train":
        note_kept_list(args, start, ("data_dirs", "data_csv", "data_frac"))
    elif known:
        known = not lists_again(args, start, ("val_dirs", "val_csv"))
    if not known:
        dist.on_rank0(lambda: save_manifest(args, kind))
    samples = read_manifest(manifest)
    same_run.compare_data({str(manifest): fingerprint(args, samples)})
    check_frame_folders(samples.paths, args.frames_fps)
    return samples


def save_manifest(args: argparse.Namespace, kind: str) -> None:
    """Write the run's own manifest, and copy the index of the videos."""
    if kind == "train":
        csvs = args.data_csv
        found = find_training_samples(args)
        kept = keep_fraction(found, args.data_frac)
    else:
        csvs = [args.val_csv] if args.val_csv else []
        found = find_samples(args.val_dirs, args.val_csv, "--val_dirs", args.frames_fps)
        kept = found
    manifest = flags.manifest_path(args, kind)
    write_manifest(manifest, kept)
    copy_indices(csvs, manifest, kept.paths)
    print0(
        f"{describe_count(kept.paths, kept.spans)} of {describe_count(found.paths, found.spans)}, "
        f"listed in {manifest}"
    )


def clip_sampling(args: argparse.Namespace) -> ClipSampling:
    """Return which frames a clip consists of; in a mixture, those of the first source."""
    return ClipSampling(args.num_frames, sampling_rates(args)[0], args.target_fps, args.sampling)


def build_model(args: argparse.Namespace, env: DistEnv, start: Start) -> MaskedAutoencoderViT:
    """Build the model from the flags, on the device.

    It is initialized from --seed, then from --init_from unless a checkpoint is resumed.
    """
    torch.manual_seed(derive_seed(args.seed))
    try:
        model = MaskedAutoencoderViT(
            **start.sizes,
            decoder_embed_dim=args.decoder_embed_dim,
            decoder_depth=args.decoder_depth,
            decoder_num_heads=args.decoder_num_heads,
            pred_t_dim=args.pred_t_dim,
            norm_pix_loss=args.norm_pix_loss,
            trunc_init=args.trunc_init,
            attn=args.attn,
        )
        attention = flags.apply_system_flags(args, model, env.device)
        model.check_mask(args.mask_ratio, args.mask_type, args.decoder_mask_ratio)
    except ValueError as error:
        raise UserError(str(error)) from error
    for line in attention:
        print0(line)
    parameters = sum(p.numel() for p in model.parameters())
    print0(
        f"model {args.model}: {parameters / 1e6:.1f} M parameters, "
        f"{model.num_tokens} tokens per clip"
    )
    model.pixel_stats = (VIDEO_MEAN, VIDEO_STD)
    if start.source is not None:
        model.pixel_stats = (start.source.mean_std["mean"], start.source.mean_std["std"])
    if start.source is not None and start.path is None:
        load_pretrained(start.source.path, model)
        if start.source.decoder and start.source.targets != "pixels":
            print0(
                "note: the decoder was trained on VideoMAE's targets, pixels normalized per patch "
                "and color. Its loss on this model's targets starts high."
            )
    return model.to(env.device)


def print_decoder_mask(
    args: argparse.Namespace, given: set[str], model: MaskedAutoencoderViT
) -> None:
    """Print what --decoder_mask_ratio comes to, or that --decoder_mask_type does nothing."""
    _, hidden = model.mask_sizes(args.mask_ratio, args.mask_type)
    _, predicted = model.mask_sizes(args.mask_ratio, args.mask_type, args.decoder_mask_ratio)
    if args.decoder_mask_ratio:
        print0(
            f"decoder masking ({args.decoder_mask_type}): training decodes and predicts "
            f"{predicted} of {hidden} hidden tokens; validation and pictures use all of them"
        )
    elif "decoder_mask_type" in given:
        print0("note: --decoder_mask_type has no effect without --decoder_mask_ratio.")


def training_clips(args: argparse.Namespace, samples: Samples, noise_tokens: int) -> ClipDataset:
    """Return the data set of training clips. noise_tokens: see `ClipDataset`."""
    rates = sampling_rates(args)
    return ClipDataset(
        paths=samples.paths,
        labels=None,
        spans=samples.spans,
        sources=samples.sources,
        sampling=clip_sampling(args),
        sampling_rates=rates if len(rates) > 1 else None,
        repeat_aug=args.repeat_aug,
        repeat_windows=args.repeat_windows,
        decoder=args.decoder,
        frames_fps=args.frames_fps,
        seed=args.seed,
        noise_tokens=noise_tokens,
        transform=train_transform(
            args.img_size,
            args.jitter_scales_relative,
            args.jitter_aspect_relative,
            args.flip,
            args.color_jitter,
        ),
        short_side=args.short_side or decode_short_side(args.img_size),
        known=load_index(flags.manifest_path(args, "train"), samples.paths),
    )


def build_data(
    args: argparse.Namespace, env: DistEnv, model: MaskedAutoencoderViT, start: Start
) -> PretrainData:
    """Return the training clips and the validations. Call on every rank."""
    samples = list_samples(args, "train", start)
    rates = sampling_rates(args)
    groups = mixture_groups(args, samples, resuming=start.path is not None)
    dataset = training_clips(args, samples, model.num_tokens)
    sampler = EpochSampler(
        len(dataset),
        batch_size=args.batch_size_per_gpu,
        accum_iter=args.accum_iter,
        env=env,
        seed=args.seed,
        groups=groups,
    )
    print_mixture(samples.sources, groups, sampler.samples_per_epoch, rates)
    steps = flags.total_steps(args, sampler.updates_per_epoch)
    return PretrainData(
        dataset=dataset,
        fingerprint=fingerprint(args, samples),
        updates_per_epoch=sampler.updates_per_epoch,
        batches=train_loader(dataset, sampler, steps, worker_settings(args), env.device),
        validations=build_validations(args, env, model, start),
    )


def mixture_groups(
    args: argparse.Namespace, samples: Samples, resuming: bool
) -> SampleGroups | None:
    """Return the sources as groups of the sampler, None without --data_weights.

    Raises UserError unless there is one weight and one sampling rate for each, and if the run that
    is resumed had no sources.
    """
    origin = str(flags.manifest_path(args, "train"))
    num_sources = 1
    if samples.sources is not None:
        num_sources = len(set(samples.sources.tolist()))
    elif resuming and is_mixture(args):
        raise UserError(
            f"--data_weights and several values of --sampling_rate need sources, but {origin} of "
            "the resumed run has none. Drop them, or use another --save_prefix."
        )
    check_mixture(num_sources, args.data_weights, sampling_rates(args), origin)
    return source_groups(samples.sources, args.data_weights)


def fingerprint(args: argparse.Namespace, samples: Samples) -> dict:
    """Return the `dataset_fingerprint` of the training samples."""
    sources = None
    if samples.sources is not None:
        sources = samples.sources.tolist()
    weighting = ""
    if args.data_weights:
        weighting = " ".join(["--data_weights", *(f"{weight:g}" for weight in args.data_weights)])
    return dataset_fingerprint(samples.paths, sources, samples.spans, weighting)


def worker_settings(args: argparse.Namespace) -> WorkerSettings:
    """Return how loader workers read files."""
    quarantine = Path(args.output_dir, "quarantine.csv")
    return WorkerSettings(args.num_workers, args.pin_mem, args.read_timeout, quarantine)


def build_validations(
    args: argparse.Namespace, env: DistEnv, model: MaskedAutoencoderViT, start: Start
) -> list[Validation]:
    """Return the validations that the flags ask for. Call on every rank.

    They measure val_loss, and probe_knn_acc1, probe_linear_acc1 and probe_attentive_acc1 (percent).
    They do not affect training.
    """
    amp = amp_dtype(args.amp, env.device)
    validations = []
    if args.val_dirs or args.val_csv:
        samples = list_samples(args, "val", start)

        def measure_loss(batches) -> dict[str, float]:
            loss = validation_loss(model, batches, args.mask_ratio, args.mask_type, amp)
            return {"val_loss": loss}

        batches = center_clips(args, env, samples, model.num_tokens)
        validations.append(Validation(batches, measure_loss))
    if args.probe_dir:
        validations.append(build_probe(args, env, model))
    return validations


def build_probe(args: argparse.Namespace, env: DistEnv, model: MaskedAutoencoderViT) -> Validation:
    """Return the probes of --probe_dir: those of `probe`, and an attentive one."""
    frames = args.frames_fps is not None
    train, val = [
        find_labeled(str(Path(args.probe_dir, kind)), VIDEO_EXTENSIONS, "--probe_dir", frames)
        for kind in ("train", "val")
    ]
    source = f"--probe_dir {args.probe_dir}/val"
    labels = class_indices(train.labels + val.labels, class_names(train.labels), source)
    found = dataset_fingerprint(train.paths + val.paths, labels)
    same_run.compare_data({f"the videos of --probe_dir {args.probe_dir}": found})
    size = len(train.paths)
    amp = amp_dtype(args.amp, env.device)
    has_tokens = tokens_fit(model, len(labels), amp)

    def measure_probes(batches) -> dict[str, float]:
        if not has_tokens:
            return probe(mean_features(model, batches, amp), labels, size)
        features, tokens = features_and_tokens(model, batches, len(labels), amp)
        with preemption.slow_work():
            accuracy = dist.on_rank0(lambda: attentive_accuracy(model, tokens, labels, size, amp))
            return probe(features, labels, size) | {"probe_attentive_acc1": accuracy}

    batches = center_clips(args, env, unlabeled(train.paths + val.paths))
    return Validation(batches, measure_probes)


def center_clips(args: argparse.Namespace, env: DistEnv, samples: Samples, noise_tokens: int = 0):
    """Return a function that starts a pass over the center clip and crop of each sample.

    noise_tokens: see `ViewDataset`.
    """
    dataset = ViewDataset(
        paths=samples.paths,
        labels=[-1] * len(samples.paths),
        spans=samples.spans,
        num_views=1,
        transform=view_transform(args.img_size, 1),
        sampling=clip_sampling(args),
        decoder=args.decoder,
        frames_fps=args.frames_fps,
        short_side=args.short_side or decode_short_side(args.img_size),
        noise_tokens=noise_tokens,
    )
    return eval_loader(dataset, EVAL_CLIPS_PER_FORWARD, worker_settings(args), env)


def main(argv: list[str] | None = None) -> None:
    """Run the script on a command line (default: sys.argv). Raises UserError for bad input."""
    args, given = flags.parse(get_parser(), argv)
    env = dist.setup(args.device, args.deterministic)
    same_run.compare_commands(vars(args))
    preemption.install_signal_handlers()
    print_versions()
    flags.resolve_compile(args, env.device)
    start = find_start(args, given, args.init_from)
    model = build_model(args, env, start)
    print_decoder_mask(args, given, model)
    data = build_data(args, env, model, start)
    engine_pretrain.train(args, env, model, data, start.path)


if __name__ == "__main__":
    dist.run_script(main)
