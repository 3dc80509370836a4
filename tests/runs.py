"""Command lines of tiny runs, and what these runs leave behind."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import same

import pretrain
from data.clips import ClipSampling, clip_slack, frame_indices, view_start
from data.decode import open_video
from data.transforms import view_transform
from models_mae import MaskedAutoencoderViT
from models_vit import normalize
from util.checkpoint import load
from util.pixels import VIDEO_MEAN, VIDEO_STD

SCRIPTS = ("pretrain", "finetune", "finetune_on_image")

PRETRAIN_FLAGS = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 32 --num_frames 4 --pred_t_dim 4 "
    "--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --short_side 48 "
    "--num_workers 0 --repeat_aug 2 --sampling_rate 2 --decoder pyav --device cpu --log_every 1 "
    "--recon_every 0 --mask_ratio 0.75 --lr 0.001"
).split()
CLASSIFIER_FLAGS = (
    "--model vit_micro_patch16 --patch_size 8 --img_size 32 --num_frames 4 --num_workers 0 "
    "--device cpu --log_every 1 --lr 0.001 --num_classes 2 --save_prefix run"
).split()
VIDEO_FLAGS = [*CLASSIFIER_FLAGS, *"--short_side 48 --sampling_rate 2 --decoder pyav".split()]
LARGER_PRETRAIN_FLAGS = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 24 --num_frames 8 --pred_t_dim 8 "
    "--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --short_side 48 "
    "--num_workers 0 --repeat_aug 1 --decoder pyav --device cpu --recon_every 0 "
    "--mask_ratio 0.75 --lr 0.001 --batch_size_per_gpu 4 --max_steps 1 --save_prefix mae"
).split()


def output_flags(out) -> list[str]:
    """Return flags that keep all files of a run in one folder."""
    return ["--output_dir", str(out), "--datafile_dir", str(out)]


def pretrain_command(videos, out, *more) -> list[str]:
    """Return a small pretraining command line."""
    data = ["--data_dirs", str(videos), "--save_prefix", "run"]
    return [*PRETRAIN_FLAGS, *data, *output_flags(out), *more]


def video_command(folder, out, *more) -> list[str]:
    """Return a small video finetuning command line that validates on its training videos."""
    data = ["--train_dir", str(folder), "--val_dir", str(folder)]
    return [*VIDEO_FLAGS, *data, *output_flags(out), *more]


def image_command(folder, out, *more) -> list[str]:
    """Return a small image finetuning command line that validates on its training images."""
    data = ["--train_data_path", str(folder), "--val_data_path", str(folder)]
    return [*CLASSIFIER_FLAGS, *data, "--output_dir", str(out), *more]


def ancestor_flags(command: str, folder: str, out) -> list[str]:
    """Return an ancestor's finetuning command from scratch, for one epoch at small sizes."""
    smaller = {
        "TRAIN_DIR": folder,
        "VAL_DIR": folder,
        "DATAFILE_DIR": str(out),
        "OUTPUT_DIR": str(out),
        "SPATIOTEMPORAL_MAE_CHECKPOINT": "",
        "vit_huge_patch14": "vit_micro_patch16",
        "100000": "1",
        "224": "32",
    }
    return [smaller.get(word, word) for word in command.split()]


def check_ancestor_run(out, classes: list[str]) -> None:
    """Check the files that an ancestor's finetuning command of one epoch leaves."""
    prefix = "INFORMATIVE_SAVE_PREFIX"
    (line,) = Path(out, f"{prefix}_log.txt").read_text().splitlines()
    record = json.loads(line)
    assert 0 <= record["test_acc1"] <= 100
    assert record["train_loss"] > 0
    assert Path(out, f"{prefix}_confusion.png").stat().st_size > 100
    assert json.loads(Path(out, f"{prefix}_classes.json").read_text()) == classes


def pretrained_checkpoint(folder, out) -> str:
    """Pretrain the small model at 24 pixels and 8 frames; return the path of its checkpoint."""
    pretrain.main([*LARGER_PRETRAIN_FLAGS, "--data_dirs", str(folder), *output_flags(out)])
    return f"{out}/mae.pth"


def write_images(folder: Path) -> str:
    """Write twelve dark and bright images in two class folders, one of them nested."""
    draw = np.random.default_rng(0)
    for index in range(12):
        bright = index % 2
        inner = "deep" if index == 0 else ""
        path = folder / ("dark", "bright")[bright] / inner / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 100, (40, 48, 3), dtype=np.uint8) + np.uint8(150 * bright)
        Image.fromarray(pixels).save(path)
    return str(folder)


def saved_weights(out, name: str = "run.pth") -> dict:
    """Return the weights that a run saved."""
    return torch.load(Path(out, name), weights_only=True)["model"]


def saved_state(out, name: str = "run.pth") -> dict:
    """Return a run's checkpoint without what may differ: the flags, which name folders."""
    return {key: value for key, value in load(Path(out, name)).items() if key != "args"}


def saved_model(path: Path) -> MaskedAutoencoderViT:
    """Return the model of a pretraining checkpoint, in evaluation mode."""
    state = torch.load(path, weights_only=True)
    others = ("model", "mean", "std")
    config = {key: value for key, value in state["config"].items() if key not in others}
    model = MaskedAutoencoderViT(**config)
    model.load_state_dict(state["model"])
    return model.eval()


def log_records(out) -> list[dict]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in Path(out, "run_log.txt").read_text().splitlines()]


def assert_same_run(out, other) -> None:
    """Check that two runs ended with the same checkpoint and log, bit for bit."""
    assert same(saved_state(out), saved_state(other))
    assert log_records(out) == log_records(other)


def recorded_steps(out, rank: int) -> list[dict]:
    """Return what a rank trained on under tests/faulty.py: [{index, loss}] per micro-step."""
    return [json.loads(line) for line in Path(out, f"used_{rank}.jsonl").read_text().splitlines()]


def steps_of_both_ranks(out) -> list[list[dict]]:
    """Return `recorded_steps` of ranks 0 and 1."""
    return [recorded_steps(out, rank) for rank in (0, 1)]


def center_clip(
    path: str, num_frames: int = 4, img_size: int = 32, sampling_rate: int = 2
) -> torch.Tensor:
    """Return a video's center clip and crop (1, 3, T, H, W), normalized; decoded at 48 pixels."""
    sampling = ClipSampling(num_frames, sampling_rate)
    with open_video(path, "pyav", 48) as video:
        start = view_start(clip_slack(video.num_frames, video.fps, sampling), 0, 1)
        indices = frame_indices(video.num_frames, video.fps, sampling, start)
        frames = video.read_tensor(indices)
    crops = view_transform(img_size, 1)(frames)  # (1, T, 3, H, W)
    return normalize(crops.transpose(1, 2), VIDEO_MEAN, VIDEO_STD)
