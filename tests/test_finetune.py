"""The video finetuning script: the ancestor's command, encoders from files, bad input."""

import shutil

import pytest
import torch
from launch import torchrun
from make_videos import write_folder, write_video
from runs import (
    ancestor_flags,
    check_ancestor_run,
    pretrained_checkpoint,
    saved_weights,
    video_command,
)

import finetune
from util.dist import UserError

ANCESTOR_COMMAND = (
    "--train_dir TRAIN_DIR --val_dir VAL_DIR --datafile_dir DATAFILE_DIR "
    "--save_prefix INFORMATIVE_SAVE_PREFIX --output_dir OUTPUT_DIR "
    "--finetune SPATIOTEMPORAL_MAE_CHECKPOINT --num_classes 174 --model vit_huge_patch14 "
    "--batch_size_per_gpu 4 --accum_iter 1 --epochs 100000 --num_frames 16 --input_size 224 "
    "--pin_mem --t_patch_size 2 --repeat_aug 1 --sampling_rate 8 --blr 0.0024 --clip_grad 5.0 "
    "--mixup 0 --cutmix 0.0"
)
BATCH = ["--batch_size_per_gpu", "4"]


def test_the_ancestors_command_runs_with_smaller_sizes(videos, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    finetune.main(ancestor_flags(ANCESTOR_COMMAND, videos, one))
    done = torchrun("finetune.py", 2, ancestor_flags(ANCESTOR_COMMAND, videos, two))
    assert done.returncode == 0, done.stderr[-2000:]
    for out in (one, two):
        check_ancestor_run(out, ["class_0", "class_1"])


def test_a_frozen_backbone_keeps_its_weights_and_the_head_learns(videos, tmp_path):
    mae = pretrained_checkpoint(videos, tmp_path)
    flags = f"--max_steps 3 --freeze_backbone --finetune {mae} --img_size 24 --num_frames 8"
    finetune.main(video_command(videos, tmp_path, *BATCH, *flags.split()))
    before = torch.load(mae, weights_only=True)["model"]
    after = saved_weights(tmp_path)
    shared = before.keys() & after.keys()
    assert len(shared) > 20
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert after["head.bias"].abs().max() > 0


def test_finetune_loads_the_encoder_and_resamples_positions(videos, tmp_path, capsys):
    mae = pretrained_checkpoint(videos, tmp_path)
    flags = f"--max_steps 1 --batch_size_per_gpu 8 --lr 1e-9 --finetune {mae}".split()
    finetune.main(video_command(videos, tmp_path, *flags))
    printed = capsys.readouterr().out
    assert "pos_embed_spatial (1, 9, 64) -> (1, 16, 64)" in printed
    assert "pos_embed_temporal (1, 4, 64) -> (1, 2, 64)" in printed
    assert "initialized  head.weight, head.bias" in printed
    assert "decoder" in printed
    name = "blocks.1.mlp.fc1.weight"
    before = torch.load(mae, weights_only=True)["model"][name]
    torch.testing.assert_close(saved_weights(tmp_path)[name], before, atol=1e-6, rtol=0)


def test_a_video_of_one_frame_is_usable(tmp_path):
    short = write_folder(tmp_path / "short", 1, codec="mpeg4")
    for name in ("class_0", "class_1"):
        write_video(short / name / "one_frame.mp4", frames=1)
    flags = "--max_steps 1 --batch_size_per_gpu 2".split()
    finetune.main(video_command(short, tmp_path / "out", *flags))
    assert (tmp_path / "out/run.pth").exists()


@pytest.fixture(scope="module")
def bad_inputs(videos, tmp_path_factory):
    """Return a folder of unusable videos, manifests and checkpoints."""
    folder = tmp_path_factory.mktemp("bad_inputs")
    shutil.copytree(videos, folder / "empty_class")
    (folder / "empty_class/class_9").mkdir()
    shutil.copytree(videos, folder / "other_classes")
    (folder / "other_classes/class_1").rename(folder / "other_classes/class_x")
    (folder / "list.csv").write_text(f"{videos}/class_0/clip_0.mp4\n")
    (folder / "text.pth").write_text("hello")
    image_weights = {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}
    torch.save({"model": image_weights}, folder / "image.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, folder / "other.pth")
    pretrained_checkpoint(videos, folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_dir BAD/empty_class", "class folder .*class_9"),
        ("--val_dir BAD/other_classes", "unknown class 'class_x'"),
        ("--num_classes 1", "--num_classes is 1"),
        ("--finetune BAD/text.pth", "text.pth cannot be read"),
        ("--finetune BAD/image.pth", "image MAE or timm ViT, but 'pos_embed' is missing"),
        ("--finetune BAD/other.pth", "no video encoder"),
        ("--finetune BAD/nowhere.pth", "nowhere.pth not found"),
        ("--finetune BAD/mae.pth --model vit_tiny_patch16", "embed_dim 192, .* has embed_dim 64"),
        ("--finetune BAD/mae.pth --patch_size 16", "--patch_size is 16, but the checkpoint has 8"),
        ("--rand_aug --aa auto", "--aa"),
        ("--train_dir= --train_csv BAD/list.csv", "no label"),
        ("--train_dir=", "no train videos given"),
        ("--eval", "--eval found no checkpoint"),
    ],
)
def test_bad_input_is_one_line(flags, message, bad_inputs, videos, tmp_path):
    words = flags.replace("BAD", str(bad_inputs)).split()
    with pytest.raises(UserError, match=message) as raised:
        finetune.main(video_command(videos, tmp_path, *BATCH, *words))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.pth"))


def test_another_pooling_than_the_checkpoints_is_one_line(videos, tmp_path):
    finetune.main(video_command(videos, tmp_path, *BATCH, "--max_steps", "1"))
    resumed = [*BATCH, *"--max_steps 2 --cls_token".split()]
    with pytest.raises(UserError, match="global_pool: True in the checkpoint, False now"):
        finetune.main(video_command(videos, tmp_path, *resumed))
    started = [*BATCH, *f"--finetune {tmp_path}/run.pth --cls_token".split()]
    with pytest.raises(UserError, match="--global_pool is False, but the checkpoint has True"):
        finetune.main(video_command(videos, tmp_path / "new", *started))


def test_bad_input_is_one_line_under_torchrun_too(videos, tmp_path):
    failed = torchrun("finetune.py", 1, video_command(videos, tmp_path, "--num_classes", "1"))
    assert "error: the training set has 2 classes" in failed.stderr
