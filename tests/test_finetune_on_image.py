"""The image finetuning script: the ancestor's command, static clips, parts of a data set."""

import shutil

import pytest
from launch import torchrun
from runs import CLASSIFIER_FLAGS, ancestor_flags, check_ancestor_run, image_command, log_records

import finetune_on_image
from util.dist import UserError

ANCESTOR_COMMAND = (
    "--train_data_path TRAIN_DIR --val_data_path VAL_DIR --save_prefix INFORMATIVE_SAVE_PREFIX "
    "--output_dir OUTPUT_DIR --finetune SPATIOTEMPORAL_MAE_CHECKPOINT --num_classes 1000 "
    "--model vit_huge_patch14 --batch_size_per_gpu 4 --accum_iter 1 --epochs 100000 "
    "--num_frames 16 --input_size 224 --pin_mem --t_patch_size 2 --blr 0.0024 --clip_grad 5.0 "
    "--mixup 0 --cutmix 0.0"
)


def test_the_ancestors_command_runs_with_smaller_sizes(images, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    finetune_on_image.main(ancestor_flags(ANCESTOR_COMMAND, images, one))
    done = torchrun("finetune_on_image.py", 2, ancestor_flags(ANCESTOR_COMMAND, images, two))
    assert done.returncode == 0, done.stderr[-2000:]
    for out in (one, two):
        check_ancestor_run(out, ["bright", "dark"])


def test_it_learns_what_can_be_learned(images, tmp_path):
    flags = "--epochs 10 --batch_size_per_gpu 6 --dropout 0".split()
    finetune_on_image.main(image_command(images, tmp_path, *flags))
    last = log_records(tmp_path)[-1]
    assert last["test_acc1"] == 100
    assert last["train_acc1"] > 90


def test_folded_static_clips_train_like_exact_ones(images, tmp_path):
    losses = {}
    for way in ("exact", "folded"):
        flags = f"--epochs 2 --batch_size_per_gpu 4 --lr 1e-4 --static_clip {way}".split()
        finetune_on_image.main(image_command(images, tmp_path / way, *flags))
        losses[way] = [record["train_loss"] for record in log_records(tmp_path / way)]
    assert losses["exact"] == pytest.approx(losses["folded"], abs=1e-5)


def test_frac_retained_keeps_a_part_of_each_class(images, tmp_path, capsys):
    flags = "--frac_retained 0.01 --max_steps 1 --batch_size_per_gpu 2".split()
    finetune_on_image.main(image_command(images, tmp_path, *flags))
    assert "2 of 12 samples" in capsys.readouterr().out


def test_broken_images_are_skipped_in_training_only(images, tmp_path):
    train = tmp_path / "train"
    shutil.copytree(images, train)
    (train / "dark/broken.png").write_bytes(b"\x89PNG no image")
    flags = f"--train_data_path {train} --output_dir {tmp_path} --batch_size_per_gpu 13 --epochs 1"
    command = [*CLASSIFIER_FLAGS, *flags.split()]
    finetune_on_image.main([*command, "--val_data_path", images])
    assert "broken.png" in (tmp_path / "bad_videos.csv").read_text()
    with pytest.raises(UserError, match="validation file .*broken.png"):
        finetune_on_image.main([*command, "--val_data_path", str(train), "--save_prefix", "other"])
