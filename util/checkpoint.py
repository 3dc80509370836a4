"""Checkpoints of a run: written atomically, read with one line of reason when they cannot be. Encoders from other files.

A file holds `model`, `optimizer`, `scaler`, `epoch`, `step` (optimizer updates), `samples_consumed` (videos), `config`
(what the model is: constructor arguments, pixel mean and std) and `args` (the flags, a plain dict).
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_vit import SIZES, VideoEncoder
from util.dist import UserError, barrier, print0, rank


def save(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint so that `path` is always complete: temp file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing, damaged, or holds more than tensors and plain data."""
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} not found: check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the ancestors' `args`
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may stumble in any way over bytes that are no checkpoint
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {path} cannot be read ({reason[:200]}): damaged, or not a checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dictionary: not one of ours")
    return checkpoint


def own_checkpoint(args) -> Path:
    """Where this run's newest checkpoint lies, or will."""
    return Path(args.output_dir, f"{args.save_prefix}.pth")


def find_resume(args) -> Path | None:
    """The checkpoint that --resume asks for: a path, this run's own newest (auto), or None to start afresh.

    Raises UserError for a path that is missing, and for --resume '' over an existing run without --overwrite.
    """
    own = own_checkpoint(args)
    if args.resume == "auto":
        return own if own.exists() else None
    if args.resume:
        if not Path(args.resume).is_file():
            raise UserError(f"--resume {args.resume}: no such file")
        return Path(args.resume)
    if own.exists() and not args.overwrite:
        raise UserError(f"{own} exists and --resume '' would start over it: use another --save_prefix, or --overwrite")
    return None


def find_eval(args) -> Path | None:
    """The checkpoint that --eval and --extract_features read: --resume PATH, or (auto) this run's best, else its newest.

    None where there is none and --extract_features may take the encoder of --finetune. Raises UserError.
    """
    own = own_checkpoint(args)
    candidates = [own.with_name(f"{args.save_prefix}_best.pth"), own] if args.resume == "auto" else [Path(args.resume)]
    for path in candidates:
        if args.resume and path.is_file():
            return path
    if args.extract_features and args.finetune and args.resume in ("auto", ""):
        return None
    flag, cure = ("--extract_features", "--resume PATH or --finetune PATH") if args.extract_features else ("--eval", "--resume PATH")
    raise UserError(f"{flag} found no checkpoint at {' or '.join(map(str, candidates))}: give {cure}")


def known_config(args) -> dict | None:
    """The config of the checkpoint that a finetuning run evaluates or goes on from; None for a run from the start. Raises UserError."""
    path = find_eval(args) if args.eval or args.extract_features else find_resume(args)
    if path is None:
        return None
    config = load(path).get("config")
    if not isinstance(config, dict) or "classes" not in config:
        raise UserError(f"{path} is no checkpoint of a finetuning run (it has no classes): give one with --resume, or weights with --finetune")
    return config


def state_of(model: nn.Module, optimizer, scaler, args, config: dict, *, epoch: int, step: int, samples_consumed: int) -> dict:
    """Everything that a run needs to go on: the content of a checkpoint file."""
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "epoch": epoch,
        "step": step, "samples_consumed": samples_consumed, "config": config, "args": dict(sorted(vars(args).items())),
    }  # fmt: skip


def save_on_rank0(path: Path, checkpoint: dict) -> None:
    """`save` on rank 0 while the others wait."""
    if rank() == 0:
        save(path, checkpoint)
    barrier()


def check_config(path: str | Path, checkpoint: dict, config: dict) -> None:
    """Raises UserError when a checkpoint of ours describes another model than `config`."""
    changed = {key: (old, config.get(key)) for key, old in checkpoint["config"].items() if config.get(key) != old}
    if changed:
        listing = ", ".join(f"{key} {short(old)} -> {short(new)}" for key, (old, new) in sorted(changed.items()))
        raise UserError(f"{path} is another model ({listing}): give the flags of that run, or another --save_prefix")


def load_strictly(path: str | Path, model: nn.Module, config: dict) -> None:
    """Put a finetuned model's weights, head included, into a model of the same config. Raises UserError."""
    loaded = load(path)
    if not isinstance(loaded.get("config"), dict) or "model" not in loaded:
        raise UserError(f"{path} is no checkpoint of a finetuning run (no config): --eval needs one")
    check_config(path, loaded, config)
    model.load_state_dict(loaded["model"])
    print0(f"weights from {path}, update {loaded['step']}")


def short(value: object) -> str:
    """A value in at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def resume(path: Path, model: nn.Module, optimizer, scaler, args, config: dict) -> dict:
    """Put a run's state back. Returns the checkpoint.

    Flags that changed since are named; weight decay and betas follow the flags, not the file. Raises UserError when the
    file holds another architecture.
    """
    checkpoint = load(path)
    missing = {"model", "optimizer", "scaler", "step", "samples_consumed", "config", "args"} - checkpoint.keys()
    if missing:
        raise UserError(f"{path} is no checkpoint of a run (no {', '.join(sorted(missing))}): --resume needs one")
    check_config(path, checkpoint, config)
    now = dict(vars(args))
    for key, old in checkpoint["args"].items():
        if key in now and now[key] != old and not (isinstance(old, (list, tuple)) and list(old) == list(now[key])):
            print0(f"flag changed since the checkpoint: --{key} {old} -> {now[key]}")
    model.load_state_dict(checkpoint["model"])
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    scaler.load_state_dict(checkpoint["scaler"]) if scaler.is_enabled() and checkpoint["scaler"] else None
    print0(f"resumed from {path} at update {checkpoint['step']}")
    return checkpoint


# Encoders from checkpoints: ours, optimized-stmae's and mae_st's.

NOT_ENCODER = ("decoder_", "mask_token", "pred_head.", "head.")  # left behind: decoder and classifier
HEADS = {width: heads for width, _, heads in SIZES.values()}
READ_OUT = "global_pool"


def read_encoder(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """The encoder's weights of a checkpoint under our names, the weights left behind, and its config ({}: it has none).

    Takes our files, optimized-stmae's and mae_st's (`model` or `model_state`; q, k, v apart or fused). Raises UserError.
    """
    checkpoint = load(path)
    weights = next((checkpoint[key] for key in ("model", "model_state") if isinstance(checkpoint.get(key), dict)), checkpoint)
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix("module.").replace("_orig_mod.", "").replace("fc_norm.", "norm.")
        if ".attn.qkv." in name:
            renamed |= {name.replace("qkv", part): third for part, third in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name] = value
    embedding = renamed.get("patch_embed.proj.weight")
    if embedding is None:
        raise UserError(f"{path} holds no video encoder (no patch_embed.proj.weight): is it another kind of model?")
    if embedding.ndim != 5:
        raise UserError(f"{path} is an image model's (patch_embed.proj.weight has shape {tuple(embedding.shape)}): a video encoder's has 5 axes")
    left = {name: value for name, value in renamed.items() if name.startswith(NOT_ENCODER)}
    return {name: value for name, value in renamed.items() if name not in left}, left, checkpoint.get("config", {})


def sizes_of(weights: dict[str, Tensor], config: dict, path: str | Path, num_heads: int | None = None) -> dict:
    """VideoEncoder's arguments as the shapes of its weights tell them.

    The head count does not show in any shape: it comes from num_heads, the file's config, or the width, in this order.
    Raises UserError where neither knows.
    """
    width, _, t, p, _ = weights["patch_embed.proj.weight"].shape
    separate, class_token = "pos_embed_spatial" in weights, "cls_token" in weights
    num_heads = num_heads or config.get("num_heads") or HEADS.get(width)
    if num_heads is None:
        raise UserError(f"{path} does not say how many attention heads it has, and width {width} is none of {sorted(HEADS)}: give num_heads")
    if separate:
        side, steps = math.isqrt(weights["pos_embed_spatial"].shape[1]), weights["pos_embed_temporal"].shape[1]
    elif "img_size" in config:
        side, steps = config["img_size"] // p, config["num_frames"] // t
    else:
        raise UserError(f"{path} has joint positions and no config: its img_size and num_frames are unknown; use --finetune with the flags")
    return {
        "img_size": side * p, "patch_size": p, "embed_dim": width, "num_heads": num_heads, "num_frames": steps * t, "t_patch_size": t,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width, "sep_pos_embed": separate, "cls_embed": class_token,
        "no_qkv_bias": "blocks.0.attn.q.bias" not in weights,
    }  # fmt: skip


def resample_positions(name: str, value: Tensor, model: VideoEncoder, old_steps: int | None = None) -> Tensor:
    """Position embeddings (1, N, D) for the model's grid: bicubic in space, linear in time (Dosovitskiy et al. 2020, 3.2).

    old_steps: t' of joint positions, where it is known; else that or the size of the frames has to be the model's.
    Raises ValueError when the positions fit no square grid.
    """
    steps, h, w = model.grid
    if name == "pos_embed_temporal":
        return F.interpolate(value.transpose(1, 2), size=steps, mode="linear", align_corners=False).transpose(1, 2)
    joint = name == "pos_embed"
    rows = int(joint and model.cls_embed)
    head, value = value[:, :rows], value[:, rows:]
    count = value.shape[1]
    if not joint:
        old_steps = 1
    elif old_steps is None:
        old_steps = steps if steps * math.isqrt(count // steps) ** 2 == count else count / (h * w)
    if old_steps != int(old_steps) or math.isqrt(count // int(old_steps)) ** 2 * old_steps != count:
        raise ValueError(f"{count} positions: neither their frames nor their number of frames are the model's")
    old_steps, side = int(old_steps), math.isqrt(count // int(old_steps))
    maps = value.unflatten(1, (old_steps, side, side)).permute(0, 1, 4, 2, 3).flatten(0, 1)  # (t', D, h, w)
    if side != h:
        maps = F.interpolate(maps, size=(h, w), mode="bicubic", align_corners=False)
    if joint and old_steps != steps:
        maps = F.interpolate(maps.permute(2, 3, 1, 0).flatten(0, 1), size=steps, mode="linear", align_corners=False)  # (hw, D, t')
        maps = maps.unflatten(0, (h, w)).permute(3, 2, 0, 1)
    return torch.cat([head, maps.permute(0, 2, 3, 1).flatten(0, 2)[None]], dim=1)


def load_pretrained(path: str | Path, model: VideoEncoder) -> None:
    """Put the encoder of a checkpoint into a model and say what went where; what else the model has stays fresh.

    Positions are resampled to the model's grid; everything else has to fit exactly. Raises UserError with what does not.
    """
    weights, left, config = read_encoder(path)
    sizes = sizes_of(weights, config | {"img_size": 0, "num_frames": 0}, path, config.get("num_heads") or model.config["num_heads"])
    compared = sizes.keys() - {"img_size", "num_frames"} | ({READ_OUT} & config.keys() & model.config.keys())
    differing = {key: ((config if key == READ_OUT else sizes)[key], model.config[key]) for key in sorted(compared)}
    differing = [f"{key} {old}, not {new}" for key, (old, new) in differing.items() if old != new]
    if differing:
        raise UserError(f"{path} has {'; '.join(differing)}: give the flags that fit it, or another checkpoint")
    if "num_heads" not in config:
        print0(f"{path} does not say how many attention heads it has; taken for {model.config['num_heads']}, as in --model")
    target, resized = model.state_dict(), []
    old_steps = config["num_frames"] // config["t_patch_size"] if "num_frames" in config else None
    fresh = [name for name in target if name.startswith(NOT_ENCODER)]
    for name in weights.keys() & target.keys():
        if weights[name].shape != target[name].shape and "pos_embed" in name:
            old = tuple(weights[name].shape)
            try:
                weights[name] = resample_positions(name, weights[name].float(), model, old_steps)
            except ValueError as error:
                raise UserError(f"{path}: {name}: {error}") from None
            resized.append(f"{name} {old} -> {tuple(weights[name].shape)}")
    faults = [f"{name} is missing" for name in target if name not in weights and name not in fresh]
    faults += [f"{name} has no place" for name in weights if name not in target]
    faults += [f"{name} has shape {tuple(weights[name].shape)}, not {tuple(target[name].shape)}" for name in weights
               if name in target and weights[name].shape != target[name].shape]  # fmt: skip
    if faults:
        raise UserError(f"{path} does not fit the model: {len(faults)} tensors, {'; '.join(faults[:3])}{' ...' if faults[3:] else ''}")
    model.load_state_dict({name: target[name] for name in fresh} | weights)
    print0(f"weights from {path}")
    for kind, names in (("matched", [f"{len(weights) - len(resized)} tensors"]), ("resized", sorted(resized)), ("initialised", fresh),
                        ("unused", [f"{len(left)} tensors of decoder and head"] if left else [])):  # fmt: skip
        print0(f"  {kind:<12} {', '.join(names) or '-'}")


def load_encoder(path: str | Path, num_heads: int | None = None) -> VideoEncoder:
    """The encoder of a checkpoint (ours, optimized-stmae's, mae_st's) for use in other code, in evaluation mode.

        tokens = load_encoder("run.pth")(clips)  # (B, 3, T, H, W) float, normalised -> (B, [1 +] L, D)

    num_heads: for a file that does not say and whose width is not one of models_vit.SIZES. Raises UserError.
    """
    weights, _, config = read_encoder(path)
    encoder = VideoEncoder(**sizes_of(weights, config, path, num_heads))
    encoder.load_state_dict(weights)
    encoder.config |= {key: config[key] for key in ("mean", "std") if key in config}
    return encoder.eval()
