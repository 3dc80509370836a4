"""Pictures of what a pretrained model predicts: original, what the encoder sees, prediction, prediction pasted into it.

Shapes as in models_mae.py; F predicted frames.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from data.transforms import VIDEO_MEAN, VIDEO_STD, denormalize, normalize
from models_mae import MaskedAutoencoderViT
from util import checkpoint
from util.dist import UserError, print0, rank
from util.tracking import Run

OF_RUN = (
    "sampling_rate",
    "target_fps",
    "short_side",
    "decoder",
    "mask_ratio",
    "mask_type",
)  # flags that a gallery takes from the checkpoint


@torch.no_grad()
def reconstructions(
    model: nn.Module,
    clips: Tensor,
    noise: Tensor,
    mask_ratio: float,
    mask_type: str,
    amp: torch.dtype,
) -> dict[str, Tensor]:
    """Frames (B, C, F, H, W) uint8 by label. model: unwrapped; clips (B, C, T, H, W) uint8 and noise (B, L) on its device.

    A model with norm_pix_loss predicts patches of mean 0 and deviation 1: shown are these as they are, on a fixed scale, and
    with the mean and deviation of the true patches, which the model does not know.
    """
    model.eval()
    clips, told = (
        normalize(clips, VIDEO_MEAN, VIDEO_STD),
        "\n+ true mean, deviation" if model.norm_pix_loss else "",
    )
    with (
        torch.autocast(clips.device.type, amp, enabled=amp != torch.float32),
        torch.compiler.set_stance("force_eager"),
    ):
        original, predicted, hidden = model.reconstruct(clips, mask_ratio, mask_type, noise)
        bare = (
            model.reconstruct(clips, mask_ratio, mask_type, noise, true_statistics=False)[1]
            if told
            else None
        )
    rows = {
        "original": original,
        f"{mask_type} mask\n{mask_ratio:.0%} hidden": original.where(
            ~hidden, torch.zeros_like(original)
        ),
    }
    rows |= {"prediction alone\n(normalised patches)": bare} if told else {}
    rows |= {"prediction" + told: predicted, "pasted" + told: predicted.where(hidden, original)}
    return {
        label: denormalize(frames, VIDEO_MEAN, VIDEO_STD).cpu() for label, frames in rows.items()
    }


def board(cells: Tensor, left: list[str], top: list[str], least: int) -> Image.Image:
    """Pictures (M, N, C, H, W) uint8 as a board, with labels for its rows and columns; small ones are enlarged to `least` pixels."""
    scale = max(1, -(-least // cells.shape[-1]))
    cells = (
        cells.repeat_interleave(scale, -1)
        .repeat_interleave(scale, -2)
        .permute(0, 1, 3, 4, 2)
        .numpy()
    )  # (M, N, H, W, C)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [[measure.multiline_textbbox((0, 0), text) for text in texts] for texts in (left, top)]
    margin, head = (
        int(max(box[2] for box in boxes[0])) + 12,
        int(max(box[3] for box in boxes[1])) + 8,
    )
    high, wide = cells.shape[2] + 2, cells.shape[3] + 2
    picture = Image.new("RGB", (margin + len(top) * wide, head + len(left) * high), "white")
    draw = ImageDraw.Draw(picture)
    for column, text in enumerate(top):
        draw.multiline_text(
            (margin + (column + 0.5) * wide, head / 2),
            text,
            fill="black",
            anchor="mm",
            align="center",
        )
    for row, text in enumerate(left):
        draw.multiline_text(
            (margin - 6, head + (row + 0.5) * high), text, fill="black", anchor="rm", align="right"
        )
        for column in range(len(top)):
            picture.paste(
                Image.fromarray(cells[row, column]), (margin + column * wide, head + row * high)
            )
    return picture


def sheet(rows: dict[str, Tensor], most: int | None = None) -> Image.Image:
    """One picture: per clip a row for each label, all frames side by side, or `most` of them, evenly spread."""
    frames = torch.stack(list(rows.values()), dim=1).transpose(2, 3)  # (B, rows, F, C, H, W)
    count = frames.shape[2]
    chosen = torch.linspace(0, count - 1, min(count, most or count)).long()
    return board(
        frames[:, :, chosen].flatten(0, 1),
        len(frames) * list(rows),
        [f"frame {number + 1}" for number in chosen.tolist()],
        64,
    )


def animation(rows: dict[str, Tensor]) -> list[Image.Image]:
    """A picture per frame: a row for each clip, a column for each label."""
    frames = torch.stack(list(rows.values()), dim=1)  # (B, rows, C, F, H, W)
    return [
        board(frames[:, :, :, f], [str(clip + 1) for clip in range(len(frames))], list(rows), 128)
        for f in range(frames.shape[3])
    ]


def save_picture(
    model: nn.Module, dataset, args, amp: torch.dtype, run: Run, epoch: int, device: torch.device
) -> None:
    """The run's own picture: four fixed training clips, spread over the dataset, with fixed masks; on rank 0."""
    if rank() != 0:
        return
    indices = torch.linspace(0, len(dataset) - 1, min(4, len(dataset))).long().tolist()
    samples = [
        sample
        for sample in (dataset[(0, index)] for index in indices)
        if sample["clips"] is not None
    ]
    if samples:
        clips, noise = (
            torch.stack([sample[key][0] for sample in samples]).to(device)
            for key in ("clips", "noise")
        )
        picture = sheet(
            reconstructions(model, clips, noise, args.mask_ratio, args.mask_type, amp), most=8
        )
        run.picture("recon", torch.from_numpy(np.array(picture)).permute(2, 0, 1), epoch)


def load_model(path: str) -> tuple[MaskedAutoencoderViT, dict]:
    """The model of a pretraining run's checkpoint, and the flags of that run that a gallery goes by. Raises UserError."""
    state = checkpoint.load(path)
    config, of_run, weights = (state.get(key) for key in ("config", "args", "model"))
    if (
        not all(isinstance(part, dict) for part in (config, of_run, weights))
        or "decoder_embed_dim" not in config
    ):
        raise UserError(
            f"--visualize {path} is no checkpoint of a pretraining run of ours (no config with a decoder, or no args)"
        )
    checkpoint.check_sizes(path, config, weights)
    try:
        model = MaskedAutoencoderViT(
            **{key: value for key, value in config.items() if key not in ("model", "mean", "std")}
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--visualize {path} describes no model of ours ({checkpoint.reason(error)})"
        ) from None
    checkpoint.load_weights(path, model, weights)
    return model, {"save_prefix": Path(path).stem} | {
        key: of_run[key] for key in OF_RUN if key in of_run
    }


def parse_mask(text: str) -> tuple[str, float]:
    """ "tube:0.9" -> ("tube", 0.9). Raises UserError."""
    kind, _, ratio = text.partition(":")
    try:
        return kind, float(ratio)
    except ValueError:
        raise UserError(
            f"--visualize_masks {text!r} is not of the form TYPE:RATIO, such as tube:0.9"
        ) from None


def write(
    model: nn.Module,
    clips: Tensor,
    noise: Tensor,
    masks: list[tuple[str, float]],
    args,
    amp: torch.dtype,
) -> None:
    """{prefix}_gallery_{mask}_{ratio}.png and .webp (4 frames a second) for each mask, in --output_dir. Raises UserError, before
    anything is written, for a mask that the model cannot make and for a file that exists, without --overwrite."""
    folder, names = (
        Path(args.output_dir),
        {mask: f"{args.save_prefix}_gallery_{mask[0]}_{mask[1]:g}" for mask in masks},
    )
    for (kind, ratio), name in names.items():
        try:
            model.check_mask(ratio, kind)
        except ValueError as error:
            raise UserError(f"--visualize_masks {kind}:{ratio}: {error}") from error
        for path in (folder / f"{name}.png", folder / f"{name}.webp"):
            if path.exists() and not args.overwrite:
                raise UserError(
                    f"{path} exists: give another --output_dir or --save_prefix, or --overwrite"
                )
    folder.mkdir(parents=True, exist_ok=True)
    for (kind, ratio), name in names.items():
        rows = reconstructions(model, clips, noise, ratio, kind, amp)
        first, *rest = animation(rows)
        moving = {
            "save_all": True,
            "append_images": rest,
            "duration": 250,
            "loop": 0,
            "quality": 90,
        }
        for picture, suffix, more in (
            (sheet(rows), "png", {"optimize": True}),
            (first, "webp", moving),
        ):
            temporary = folder / f"{name}.tmp.{suffix}"
            picture.save(temporary, **more)
            os.replace(temporary, folder / f"{name}.{suffix}")
            print0(f"wrote {folder / name}.{suffix}")
