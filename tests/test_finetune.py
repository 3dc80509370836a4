"""The finetuning scripts: the seed's commands, exact evaluation, loading encoders, resuming, bad input."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from launch import ROOT, torchrun
from make_videos import write_folder, write_video
from tiny import same, tiny_vit

import engine_finetune
import finetune
import finetune_on_image
import pretrain
from data.decode import frame_indices, open_video, view_start
from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize, view_transform
from models_vit import VisionTransformer
from util import checkpoint
from util.checkpoint import load
from util.dist import UserError

SMALL = (
    "--model vit_micro_patch16 --patch_size 8 --img_size 32 --num_frames 4 --num_workers 0 --device cpu --log_every 1 --lr 0.001 "
    "--num_classes 2 --save_prefix run"
).split()
VIDEO = [*SMALL, *"--short_side 48 --sampling_rate 2 --decoder pyav".split()]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of eight videos in class_0 and class_1."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve dark and bright images in two classes, one file nested."""
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(12):
        path = (
            folder
            / ("dark", "bright")[number % 2]
            / ("deep" if number == 0 else "")
            / f"{number}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 100, (40, 48, 3), dtype=np.uint8) + np.uint8(150 * (number % 2))
        Image.fromarray(pixels).save(path)
    return str(folder)


def video_command(folder, out, *more) -> list[str]:
    """A small video finetuning command line that validates on its training videos."""
    return [
        *VIDEO,
        "--train_dir",
        folder,
        "--val_dir",
        folder,
        "--output_dir",
        str(out),
        "--datafile_dir",
        str(out),
        *more,
    ]


def image_command(folder, out, *more) -> list[str]:
    """A small image finetuning command line that validates on its training images."""
    return [
        *SMALL,
        "--train_data_path",
        folder,
        "--val_data_path",
        folder,
        "--output_dir",
        str(out),
        *more,
    ]


def weights(out, name="run.pth") -> dict:
    """The weights that a run saved."""
    return torch.load(Path(out, name), weights_only=True)["model"]


def records(out) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in Path(out, "run_log.txt").read_text().splitlines()]


def pretrained(folder, out) -> str:
    """A pretrained checkpoint of the small model, at 24 pixels and 8 frames."""
    pretrain.main(
        f"--model mae_vit_micro_patch16 --patch_size 8 --img_size 24 --num_frames 8 --pred_t_dim 8 --decoder_embed_dim 32 --decoder_depth 1 "
        f"--decoder_num_heads 2 --short_side 48 --num_workers 0 --repeat_aug 1 --decoder pyav --device cpu --recon_every 0 --mask_ratio 0.75 "
        f"--lr 0.001 --batch_size_per_gpu 4 --max_steps 1 --data_dirs {folder} --output_dir {out} --datafile_dir {out} --save_prefix mae".split()
    )
    return f"{out}/mae.pth"


SEED_VIDEO = (
    "--train_dir TRAIN_DIR --val_dir VAL_DIR --datafile_dir DATAFILE_DIR --save_prefix INFORMATIVE_SAVE_PREFIX --output_dir OUTPUT_DIR "
    "--finetune SPATIOTEMPORAL_MAE_CHECKPOINT --num_classes 174 --model vit_huge_patch14 --batch_size_per_gpu 4 --accum_iter 1 "
    "--epochs 100000 --num_frames 16 --input_size 224 --pin_mem --t_patch_size 2 --repeat_aug 1 --sampling_rate 8 --blr 0.0024 "
    "--clip_grad 5.0 --mixup 0 --cutmix 0.0"
)
SEED_IMAGE = (
    "--train_data_path TRAIN_DIR --val_data_path VAL_DIR --save_prefix INFORMATIVE_SAVE_PREFIX --output_dir OUTPUT_DIR "
    "--finetune SPATIOTEMPORAL_MAE_CHECKPOINT --num_classes 1000 --model vit_huge_patch14 --batch_size_per_gpu 4 --accum_iter 1 "
    "--epochs 100000 --num_frames 16 --input_size 224 --pin_mem --t_patch_size 2 --blr 0.0024 --clip_grad 5.0 --mixup 0 --cutmix 0.0"
)


def reduced(seed: str, folder: str, out, checkpoint: str) -> list[str]:
    """A seed command with sizes and paths reduced."""
    smaller = {
        "TRAIN_DIR": folder,
        "VAL_DIR": folder,
        "DATAFILE_DIR": str(out),
        "OUTPUT_DIR": str(out),
        "SPATIOTEMPORAL_MAE_CHECKPOINT": checkpoint,
        "vit_huge_patch14": "vit_micro_patch16",
        "100000": "1",
        "224": "32",
    }
    return [smaller.get(word, word) for word in seed.split()]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_the_seed_commands_run_with_sizes_and_paths_reduced(kind, videos, images, tmp_path):
    script, seed, folder = (
        (finetune, SEED_VIDEO, videos)
        if kind == "video"
        else (finetune_on_image, SEED_IMAGE, images)
    )
    script.main(reduced(seed, folder, tmp_path / "one", ""))
    processes = torchrun(f"{script.__name__}.py", 2, reduced(seed, folder, tmp_path / "two", ""))
    assert processes.returncode == 0, processes.stderr[-2000:]
    for out in ("one", "two"):
        log = [
            json.loads(line)
            for line in (tmp_path / out / "INFORMATIVE_SAVE_PREFIX_log.txt")
            .read_text()
            .splitlines()
        ]
        assert len(log) == 1 and 0 <= log[0]["test_acc1"] <= 100 and log[0]["train_loss"] > 0
        assert (tmp_path / out / "INFORMATIVE_SAVE_PREFIX_confusion.png").stat().st_size > 100
        classes = json.loads((tmp_path / out / "INFORMATIVE_SAVE_PREFIX_classes.json").read_text())
        assert classes == (["class_0", "class_1"] if kind == "video" else ["bright", "dark"])


@pytest.mark.parametrize("views", [(1, 1), (5, 3)])
def test_t18_evaluation_is_exact_on_any_number_of_ranks_and_equals_a_plain_loop(views, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    write_folder(folder, 17)
    finetune.main(video_command(str(folder), out, "--max_steps", "2", "--batch_size_per_gpu", "4"))
    test = [
        "--val_dir",
        str(folder),
        "--eval",
        "--test_num_clips",
        str(views[0]),
        "--test_num_crops",
        str(views[1]),
        "--batch_size_per_gpu",
        "4",
        "--resume",
        str(out / "run.pth"),
    ]
    finetune.main([*VIDEO, *test, "--output_dir", str(tmp_path / "one")])
    two = torchrun("finetune.py", 2, [*VIDEO, *test, "--output_dir", str(tmp_path / "two")])
    assert two.returncode == 0, two.stderr[-2000:]
    assert f"17 samples, {views[0] * views[1]} views each" in two.stdout
    one, other = (
        pd.read_csv(tmp_path / name / "run_test_predictions.csv") for name in ("one", "two")
    )
    assert len(one) == 17 and one["path"].is_unique
    pd.testing.assert_frame_equal(one, other, check_exact=True)

    state = torch.load(out / "run.pth", weights_only=True)
    config = {
        key: value
        for key, value in state["config"].items()
        if key not in ("model", "mean", "std", "classes")
    }
    model = VisionTransformer(**config).eval()
    model.load_state_dict(state["model"])
    for row in one.itertuples():
        probabilities = []
        with open_video(row.path, "pyav", 48) as video, torch.no_grad():
            for view in range(views[0]):
                spacing = {"num_frames": 4, "sampling_rate": 2}
                start = view_start(
                    video.num_frames, video.fps, **spacing, view=view, views=views[0]
                )
                frames = torch.from_numpy(
                    video.read(frame_indices(video.num_frames, video.fps, **spacing, start=start))
                )
                for crop in view_transform(32, views[1])(frames.permute(0, 3, 1, 2)):
                    clip = normalize(crop.transpose(0, 1)[None], VIDEO_MEAN, VIDEO_STD)
                    probabilities.append(model(clip).softmax(1)[0])
        mean = torch.stack(probabilities).mean(0)
        assert row.score1 == pytest.approx(mean.max().item(), abs=2e-6)
        assert (
            row.top1 == f"class_{mean.argmax().item()}" and row.label == Path(row.path).parent.name
        )


def test_training_is_reproducible_resumes_exactly_and_keeps_the_best(videos, tmp_path):
    flags = [
        "--batch_size_per_gpu",
        "4",
        "--repeat_aug",
        "2",
        "--rand_aug",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--min_lr",
        "0.001",
    ]
    finetune.main(video_command(videos, tmp_path / "whole", "--epochs", "4", *flags))
    finetune.main(video_command(videos, tmp_path / "parts", "--epochs", "2", *flags))
    finetune.main(video_command(videos, tmp_path / "parts", "--epochs", "4", *flags))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [r["test_loss"] for r in records(tmp_path / "whole")] == [
        r["test_loss"] for r in records(tmp_path / "parts")
    ]
    best = torch.load(tmp_path / "parts/run_best.pth", weights_only=True)
    accuracies = [record["test_acc1"] for record in records(tmp_path / "parts")]
    assert best["best_acc1"] == max(accuracies) and best["epoch"] == accuracies.index(
        max(accuracies)
    )
    assert best["config"]["classes"] == ["class_0", "class_1"]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_t02_stops_in_training_and_in_validation_change_nothing(
    kind, videos, images, tmp_path, monkeypatch
):
    """SIGTERM in the middle of an epoch, in a validation, and there once more at once; with dropout, drop path and mixing."""
    flags = [
        "--epochs",
        "3",
        "--batch_size_per_gpu",
        "2",
        "--mixup",
        "0.8",
        "--rand_aug",
        "--drop_path_rate",
        "0.2",
        "--accum_iter",
        "2",
    ]
    script, start = (
        (finetune, lambda out: video_command(videos, out, *flags))
        if kind == "video"
        else (finetune_on_image, lambda out: image_command(images, out, *flags))
    )
    script.main(start(tmp_path / "whole"))
    out, calls = tmp_path / "parts", {"update": 0, "in_full_batches": 0}

    def signalling(name: str, at: int):
        honest = getattr(engine_finetune, name)

        def call(*arguments):
            calls[name] += 1
            if calls[name] == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return honest(*arguments)

        monkeypatch.setattr(engine_finetune, name, call)

    signalling("update", 1)
    signalling("in_full_batches", 1)
    steps = []
    for _ in range(3):
        script.main(start(out))
        steps.append(load(out / "run.pth")["step"])
        assert (out / "run.PREEMPTED").exists() == (len(steps) < 3)
    per_epoch = {"video": 2, "image": 3}[kind]
    assert steps == [1, per_epoch, 3 * per_epoch]
    whole, parts = (
        {key: value for key, value in load(folder / "run.pth").items() if key != "args"}
        for folder in (tmp_path / "whole", out)
    )
    assert (
        same(parts, whole)
        and records(out) == records(tmp_path / "whole")
        and len(records(out)) == 3
    )
    assert (out / "run_predictions.csv").read_bytes() == (
        tmp_path / "whole/run_predictions.csv"
    ).read_bytes()
    script.main(start(out))  # complete: nothing is done again
    assert records(out) == records(tmp_path / "whole") and calls["update"] == 3 * per_epoch


def test_a_best_checkpoint_that_found_no_room_is_written_at_the_next_chance(
    images, tmp_path, monkeypatch
):
    honest, failed = checkpoint.save, []

    def save(path, state, keep=1):
        if path.name == "run_best.pth" and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        honest(path, state, keep)

    monkeypatch.setattr(checkpoint, "save", save)
    flags = ["--epochs", "4", "--batch_size_per_gpu", "6", "--dropout", "0", "--min_lr", "0.001"]
    finetune_on_image.main(image_command(images, tmp_path, *flags))
    accuracies = [record["test_acc1"] for record in records(tmp_path)]
    assert (
        failed
        and load(tmp_path / "run_best.pth")["epoch"] >= 1
        and load(tmp_path / "run_best.pth")["best_acc1"] == max(accuracies[1:])
    )


def test_flags_that_group_the_parameters_otherwise_are_refused_in_one_line(videos, tmp_path):
    flags = ["--batch_size_per_gpu", "4", "--max_steps"]
    finetune.main(video_command(videos, tmp_path, *flags, "1"))
    for change in (["--layer_decay", "1"], ["--weight_decay", "0"], ["--freeze_backbone"]):
        with pytest.raises(
            UserError, match="run.pth does not fit .*group the parameters as in that run"
        ) as error:
            finetune.main(video_command(videos, tmp_path, *flags, "2", *change))
        assert "\n" not in str(error.value)


def test_each_epoch_asks_for_its_own_batches(videos, tmp_path, monkeypatch):
    asked, honest = [], finetune.train_feed

    def recording(dataset, args, place):
        updates, batches = honest(dataset, args, place)
        return updates, lambda epoch, done: asked.append((epoch, done)) or batches(epoch, done)

    monkeypatch.setattr(finetune, "train_feed", recording)
    flags = ["--batch_size_per_gpu", "4"]  # two updates per epoch
    finetune.main(video_command(videos, tmp_path, *flags, "--max_steps", "3"))
    finetune.main(video_command(videos, tmp_path, *flags, "--max_steps", "6"))
    assert asked == [(0, 0), (1, 0), (1, 1), (2, 0)]


def test_it_learns_what_can_be_learned(images, tmp_path):
    finetune_on_image.main(
        image_command(
            images, tmp_path, "--epochs", "10", "--batch_size_per_gpu", "6", "--dropout", "0"
        )
    )
    assert records(tmp_path)[-1]["test_acc1"] == 100
    assert records(tmp_path)[-1]["train_acc1"] > 90


def test_a_frozen_backbone_keeps_its_weights_and_the_head_moves(videos, tmp_path):
    mae = pretrained(videos, tmp_path)
    size = ["--img_size", "24", "--num_frames", "8"]
    finetune.main(
        video_command(
            videos,
            tmp_path,
            "--max_steps",
            "3",
            "--batch_size_per_gpu",
            "4",
            "--freeze_backbone",
            "--finetune",
            mae,
            *size,
        )
    )
    before, after = torch.load(mae, weights_only=True)["model"], weights(tmp_path)
    shared = before.keys() & after.keys()
    assert len(shared) > 20 and all(torch.equal(before[name], after[name]) for name in shared)
    assert after["head.bias"].abs().max() > 0


def test_finetune_takes_the_encoder_and_resamples_positions(videos, tmp_path, capsys):
    mae = pretrained(videos, tmp_path)
    finetune.main(
        video_command(
            videos,
            tmp_path,
            "--max_steps",
            "1",
            "--batch_size_per_gpu",
            "8",
            "--lr",
            "1e-9",
            "--finetune",
            mae,
        )
    )
    printed = capsys.readouterr().out
    assert (
        "pos_embed_spatial (1, 9, 64) -> (1, 16, 64)" in printed
        and "pos_embed_temporal (1, 4, 64) -> (1, 2, 64)" in printed
    )
    assert "initialised  head.weight, head.bias" in printed and "decoder" in printed
    before, after = torch.load(mae, weights_only=True)["model"], weights(tmp_path)
    torch.testing.assert_close(
        after["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"], atol=1e-6, rtol=0
    )


def test_static_clips_folded_equal_exact_in_logits_and_gradients():
    for positions in (True, False):
        images = torch.randn(3, 3, 1, 32, 32, dtype=torch.float64)
        model = tiny_vit(sep_pos_embed=positions).double().eval()
        results = []
        for clips in (images.expand(-1, -1, 8, -1, -1), images):
            model.zero_grad()
            logits = model(clips)
            logits.square().sum().backward()
            results.append([logits, *[parameter.grad.clone() for parameter in model.parameters()]])
        for exact, folded in zip(*results, strict=True):
            torch.testing.assert_close(exact, folded, rtol=1e-9, atol=1e-11)


def test_a_static_clip_flag_changes_nothing_but_the_work(images, tmp_path):
    for way in ("exact", "folded"):
        flags = ["--epochs", "2", "--batch_size_per_gpu", "4", "--lr", "1e-4", "--static_clip", way]
        finetune_on_image.main(image_command(images, tmp_path / way, *flags))
    for exact, folded in zip(
        records(tmp_path / "exact"), records(tmp_path / "folded"), strict=True
    ):
        assert exact["train_loss"] == pytest.approx(folded["train_loss"], abs=1e-5)


def test_frac_retained_keeps_a_part_of_each_class(images, tmp_path, capsys):
    finetune_on_image.main(
        image_command(
            images,
            tmp_path,
            "--frac_retained",
            "0.01",
            "--max_steps",
            "1",
            "--batch_size_per_gpu",
            "2",
        )
    )
    assert "2 of 12 images" in capsys.readouterr().out


def test_broken_images_are_skipped_in_training_and_an_error_in_evaluation(images, tmp_path):
    train = tmp_path / "train"
    shutil.copytree(images, train)
    (train / "dark" / "broken.png").write_bytes(b"\x89PNG no image")
    command = [
        *SMALL,
        "--train_data_path",
        str(train),
        "--output_dir",
        str(tmp_path),
        "--batch_size_per_gpu",
        "13",
        "--epochs",
        "1",
    ]
    finetune_on_image.main([*command, "--val_data_path", images])
    assert "broken.png" in (tmp_path / "bad_videos.csv").read_text()
    with pytest.raises(UserError, match="validation file .*broken.png"):
        finetune_on_image.main([*command, "--val_data_path", str(train), "--save_prefix", "other"])


def test_bad_input_is_one_line(videos, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "videos"
    shutil.copytree(videos, folder)
    short = write_folder(tmp_path / "short", 1, codec="mpeg4")
    for name in ("class_0", "class_1"):
        write_video(short / name / "one_frame.mp4", frames=1)
    finetune.main(
        video_command(
            str(short), tmp_path / "fine", "--max_steps", "1", "--batch_size_per_gpu", "2"
        )
    )  # one frame is a video
    mae = pretrained(videos, tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    torch.save(
        {"model": {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}}, tmp_path / "image.pth"
    )
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    other = tmp_path / "other_classes"
    shutil.copytree(videos, other)
    (other / "class_1").rename(other / "class_x")
    (folder / "class_9").mkdir()
    lines = tmp_path / "list.csv"
    lines.write_text(f"{videos}/class_0/clip_0.mp4\n")
    cases = {
        "class folder .*class_9": ["--train_dir", str(folder)],
        "unknown class 'class_x'": ["--val_dir", str(other)],
        "--num_classes is 1": ["--num_classes", "1"],
        "text.pth cannot be read": ["--finetune", str(tmp_path / "text.pth")],
        "image MAE or timm ViT, but 'pos_embed' is missing": [
            "--finetune",
            str(tmp_path / "image.pth"),
        ],
        "no video encoder": ["--finetune", str(tmp_path / "other.pth")],
        "nowhere.pth not found": ["--finetune", str(tmp_path / "nowhere.pth")],
        "embed_dim 64, not 192": ["--finetune", mae, "--model", "vit_tiny_patch16"],
        "patch_size 8, not 16": ["--finetune", mae, "--patch_size", "16"],
        "--aa": ["--rand_aug", "--aa", "auto"],
        "no label": ["--train_dir", "", "--train_csv", str(lines)],
        "no train videos given": ["--train_dir", ""],
        "--eval found no checkpoint": ["--eval"],
    }
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message) as error:
            finetune.main(video_command(videos, out, "--batch_size_per_gpu", "4", *flags))
        assert "\n" not in str(error.value)
    assert not list(out.glob("*.pth"))
    finetune.main(video_command(videos, out, "--max_steps", "1", "--batch_size_per_gpu", "4"))
    with pytest.raises(UserError, match="global_pool True -> False"):
        finetune.main(
            video_command(
                videos, out, "--max_steps", "2", "--batch_size_per_gpu", "4", "--cls_token"
            )
        )
    with pytest.raises(UserError, match="global_pool True, not False"):
        finetune.main(
            video_command(
                videos,
                tmp_path / "new",
                "--finetune",
                str(out / "run.pth"),
                "--batch_size_per_gpu",
                "4",
                "--cls_token",
            )
        )
    failed = torchrun(
        "finetune.py", 1, video_command(videos, tmp_path / "new", "--num_classes", "1")
    )
    assert "error: the training set has 2 classes" in failed.stderr
    assert (ROOT / "samples").exists()
