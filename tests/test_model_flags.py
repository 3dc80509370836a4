"""A checkpoint says what its model is: the scripts need no model flags beside it."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import (
    image_command,
    log_records,
    output_flags,
    pretrain_command,
    pretrained_checkpoint,
    saved_weights,
    video_command,
    write_images,
)
from tiny import same, tiny_mae, tiny_vit

import finetune
import finetune_on_image
import pretrain
from util.args import parse
from util.dist import UserError
from util.model_flags import find_start

FINETUNE = (
    "--batch_size_per_gpu 4 --num_workers 0 --device cpu --lr 0.001 --max_steps 1 --decoder pyav"
).split()
MODEL_FLAGS = ("model", "patch_size", "img_size", "num_frames", "sampling_rate")


@pytest.fixture(scope="module")
def mae(videos, tmp_path_factory):
    """Return a pretraining checkpoint: 24 pixels, 8 frames, every fourth, patch 8."""
    return pretrained_checkpoint(videos, tmp_path_factory.mktemp("mae"))


@pytest.fixture(scope="module")
def finetuned(videos, tmp_path_factory):
    """Return a finetuning checkpoint: 32 pixels, 4 frames, every second, patch 8, class token."""
    out = tmp_path_factory.mktemp("finetuned")
    more = "--max_steps 1 --cls_token --batch_size_per_gpu 4".split()
    finetune.main(video_command(videos, out, *more))
    return f"{out}/run.pth"


def bare_command(videos, out, *more) -> list[str]:
    """Return a finetuning command line without model flags."""
    data = ["--train_dir", str(videos), "--val_dir", str(videos)]
    return [*FINETUNE, *data, *output_flags(out), *more]


def config_of(path) -> dict:
    """Return what a checkpoint records about its model."""
    return torch.load(path, weights_only=True)["config"]


def flags_of(path) -> dict:
    """Return the flags that a run recorded."""
    return torch.load(path, weights_only=True)["args"]


def test_f16_finetuning_takes_the_model_of_a_pretraining_checkpoint(mae, videos, tmp_path, capsys):
    finetune.main(bare_command(videos, tmp_path, "--finetune", mae))
    path = tmp_path / "vit_micro_patch16.pth"
    flags = flags_of(path)
    assert [flags[name] for name in MODEL_FLAGS] == ["vit_micro_patch16", 8, 24, 8, 4]
    ours = config_of(path)
    same_entries = [name for name, value in config_of(mae).items() if ours.get(name) == value]
    assert len(same_entries) == 13  # eleven sizes, mean and std
    printed = capsys.readouterr().out
    assert "vit_micro_patch16, patch 8, 8 frames of 24 x 24 pixels, every 4 frames" in printed
    assert "resized      -" in printed


def test_given_sizes_win_and_are_printed(mae, videos, tmp_path, capsys):
    given = "--img_size 32 --num_frames 4 --sampling_rate 2".split()
    finetune.main(bare_command(videos, tmp_path, "--finetune", mae, *given))
    flags = flags_of(tmp_path / "vit_micro_patch16.pth")
    assert [flags[name] for name in MODEL_FLAGS] == ["vit_micro_patch16", 8, 32, 4, 2]
    printed = capsys.readouterr().out
    for line in (f"--img_size 32 replaces the 24 of {mae}", "--num_frames 4 replaces the 8 of"):
        assert line in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model vit_tiny_patch16", "--model vit_tiny_patch16 has .*embed_dim 192"),
        ("--patch_size 4", "--patch_size is 4, but the checkpoint has 8"),
        ("--t_patch_size 4", "--t_patch_size is 4, but the checkpoint has 2"),
        ("--no-cls_embed", "--cls_embed is False, but the checkpoint has True"),
        ("--no-sep_pos_embed", "--sep_pos_embed is False"),
        ("--no_qkv_bias", "--no_qkv_bias is True"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_names_both(flags, message, mae, videos, tmp_path):
    for more in (flags.split(), [*flags.split(), "--save_prefix", "other"]):
        with pytest.raises(UserError, match=message):
            finetune.main(bare_command(videos, tmp_path, "--finetune", mae, *more))
    with pytest.raises(UserError, match=message):
        command = ["--data_dirs", str(videos), *output_flags(tmp_path), "--device", "cpu"]
        pretrain.main([*command, "--init_from", mae, *flags.split()])
    assert not list(tmp_path.glob("*.pth"))


def test_f16_evaluation_needs_no_model_flags(finetuned, videos, tmp_path, capsys):
    evaluate = ["--eval", "--val_dir", str(videos), "--num_workers", "0", "--device", "cpu"]
    evaluate += ["--decoder", "pyav", "--short_side", "48"]
    finetune.main([*evaluate, "--resume", finetuned, *output_flags(tmp_path)])
    printed = capsys.readouterr().out
    assert "patch 8, 4 frames of 32 x 32 pixels, every 2 frames" in printed
    expected = log_records(finetuned.removesuffix("/run.pth"))[0]["test_acc1"]
    assert f"top-1 {expected:.2f} %" in printed
    folder = output_flags(finetuned.removesuffix("/run.pth"))
    finetune.main([*evaluate, *folder])  # the only run of its folder
    assert f"top-1 {expected:.2f} %" in capsys.readouterr().out
    finetune.main([*evaluate, "--resume", finetuned, "--img_size", "16", *output_flags(tmp_path)])
    assert "--img_size 16 replaces the 32" in capsys.readouterr().out
    for flags, message in (
        ("--num_classes 5", "--num_classes is 5, but the checkpoint has 2"),
        ("--global_pool", "classifies the class token, not the mean of the patch tokens"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.main([*evaluate, "--resume", finetuned, *flags.split()])


def test_evaluating_a_pretraining_checkpoint_is_one_line(mae, videos, tmp_path):
    command = ["--eval", "--val_dir", str(videos), "--device", "cpu", "--resume", mae]
    with pytest.raises(UserError, match="has no classifier: it is a pretraining checkpoint"):
        finetune.main([*command, *output_flags(tmp_path)])


def test_the_head_is_kept_for_the_same_classes_only(finetuned, videos, tmp_path, capsys):
    slow = ["--lr", "1e-9", "--min_lr", "0"]
    finetune.main(bare_command(videos, tmp_path / "same", "--finetune", finetuned, *slow))
    assert "is kept: it has the same 2 classes" in capsys.readouterr().out
    config = config_of(tmp_path / "same/vit_micro_patch16.pth")
    assert config["num_classes"] == 2
    assert config["global_pool"] is False
    before = torch.load(finetuned, weights_only=True)["model"]["head.weight"]
    after = saved_weights(tmp_path / "same", "vit_micro_patch16.pth")["head.weight"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    names = tmp_path / "names.txt"
    names.write_text("class_1\nclass_0\n")  # another order
    more = ["--finetune", finetuned, *slow, "--class_names", str(names), "--num_classes", "2"]
    finetune.main(bare_command(videos, tmp_path / "other", *more))
    assert "the head is new" in capsys.readouterr().out
    after = saved_weights(tmp_path / "other", "vit_micro_patch16.pth")["head.weight"]
    assert (after - before).abs().max() > 1e-3
    assert config_of(tmp_path / "other/vit_micro_patch16.pth")["classes"] == ["class_1", "class_0"]


def test_class_names_keep_a_head_that_has_none(finetuned, videos, tmp_path, capsys):
    state = torch.load(finetuned, weights_only=True)
    del state["config"]["classes"]
    start = str(tmp_path / "nameless.pth")
    torch.save({"model": state["model"], "config": state["config"]}, start)
    names = tmp_path / "names.txt"
    names.write_text("class_0\nclass_1\n")
    command = bare_command(videos, tmp_path, "--finetune", start, "--num_classes", "2")
    finetune.main([*command, "--save_prefix", "new"])
    assert (
        "nameless.pth, of 2 classes, does not record the names of its classes"
        in capsys.readouterr().out
    )
    command += ["--class_names", str(names), "--save_prefix", "kept"]
    finetune.main(command)
    assert "is kept: it has the same 2 classes" in capsys.readouterr().out
    names.write_text("class_1\nclass_0\n")
    with pytest.raises(UserError, match="contradicts the names in .*kept.pth"):
        finetune.main([*command, "--max_steps", "2"])


def test_a_resumed_run_needs_no_model_flags(videos, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    length = "--batch_size_per_gpu 4 --epochs 2 --checkpoint_every_steps 1".split()
    finetune.main(video_command(videos, one, *length))
    finetune.main(video_command(videos, two, *length, "--max_steps", "3"))
    (two / "run_best.pth").unlink()
    data = ["--train_dir", str(videos), "--val_dir", str(videos), "--save_prefix", "run"]
    system = "--num_workers 0 --device cpu --decoder pyav --short_side 48 --log_every 1".split()
    more = [*length, "--max_steps", "4", "--lr", "0.001", *output_flags(two)]
    finetune.main([*data, *system, *more])
    finetune.main(video_command(videos, one, *length, "--max_steps", "4"))
    assert same(saved_weights(one).keys(), saved_weights(two).keys())
    assert flags_of(two / "run.pth")["num_frames"] == 4
    with pytest.raises(UserError, match="img_size: 32 in the checkpoint, 16 now"):
        finetune.main([*data, *system, *more, "--img_size", "16"])


def test_the_decoder_of_a_checkpoint_fits_its_own_tubelets(tmp_path):
    model = tiny_mae(num_frames=8, t_patch_size=4, pred_t_dim=8)
    torch.save({"model": model.state_dict(), "config": model.config}, tmp_path / "mae.pth")
    words = ["--init_from", str(tmp_path / "mae.pth"), "--num_frames", "16"]
    args, given = parse(pretrain.get_parser(), [*words, "--output_dir", str(tmp_path)])
    start = find_start(args, given, args.init_from)
    assert (start.sizes["t_patch_size"], start.sizes["num_frames"]) == (4, 16)
    assert args.pred_t_dim == 16  # 4 frames of each tubelet, as in the checkpoint


def test_pretraining_starts_from_a_checkpoint_at_another_size(mae, videos, tmp_path, capsys):
    command = ["--data_dirs", str(videos), *output_flags(tmp_path), "--device", "cpu"]
    command += "--num_workers 0 --lr 1e-9 --min_lr 0 --max_steps 1 --recon_every 0".split()
    command += "--batch_size_per_gpu 2 --decoder pyav --save_prefix run".split()
    pretrain.main([*command, "--init_from", mae, "--img_size", "32", "--num_frames", "4"])
    printed = capsys.readouterr().out
    for name in ("pos_embed_spatial (1, 9, 64)", "decoder_pos_embed_temporal (1, 4, 32)"):
        assert name in printed
    config = config_of(tmp_path / "run.pth")
    assert (config["img_size"], config["num_frames"], config["pred_t_dim"]) == (32, 4, 4)
    assert config["decoder_embed_dim"] == 32
    state = torch.load(tmp_path / "run.pth", weights_only=True)
    assert state["step"] == 1
    before = torch.load(mae, weights_only=True)["model"]
    same_shape = [name for name in before if before[name].shape == state["model"][name].shape]
    assert "decoder_blocks.0.mlp.fc1.weight" in same_shape
    for name in same_shape:
        torch.testing.assert_close(state["model"][name], before[name], rtol=0, atol=1e-6)
    pretrain.main([*command, "--init_from", "gone.pth", "--max_steps", "2"])  # resumes
    assert torch.load(tmp_path / "run.pth", weights_only=True)["step"] == 2


def test_pretraining_from_itself_goes_on_with_its_loss(videos, tmp_path):
    pretrain.main(pretrain_command(videos, tmp_path / "a", "--max_steps", "4"))
    start = f"{tmp_path}/a/run.pth"
    more = ["--max_steps", "1", "--val_dirs", str(videos), "--lr", "1e-9", "--min_lr", "0"]
    pretrain.main(pretrain_command(videos, tmp_path / "b", *more, "--init_from", start))
    pretrain.main(pretrain_command(videos, tmp_path / "c", *more))
    resumed = pretrain_command(videos, tmp_path / "a", "--val_dirs", str(videos), "--max_steps")
    pretrain.main([*resumed, "5", "--lr", "1e-9", "--min_lr", "0"])
    loss = {name: log_records(tmp_path / name)[-1]["val_loss"] for name in "abc"}
    assert loss["b"] == pytest.approx(loss["a"], rel=1e-4)
    assert abs(loss["c"] - loss["a"]) > 1e-3 * loss["a"]


def test_an_image_classifier_needs_no_model_flags(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    finetune_on_image.main(
        image_command(images, tmp_path / "a", *"--max_steps 1 --batch_size_per_gpu 4".split())
    )
    start = f"{tmp_path}/a/run.pth"
    data = ["--train_data_path", images, "--val_data_path", images, *FINETUNE[:-2]]
    finetune_on_image.main([*data, "--finetune", start, "--output_dir", str(tmp_path / "b")])
    printed = capsys.readouterr().out
    assert "the same 2 classes" in printed
    finetune_on_image.main(
        ["--eval", "--val_data_path", images, "--resume", start, *FINETUNE[2:6]]
        + ["--output_dir", str(tmp_path / "c")]
    )
    assert f"top-1 {log_records(tmp_path / 'a')[0]['test_acc1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--cls_token"])
def test_a_head_of_unknown_read_out_is_kept_on_request(flags, finetuned, videos, tmp_path, capsys):
    weights = torch.load(finetuned, weights_only=True)["model"]
    torch.save(weights, tmp_path / "bare.pth")
    manifest = tmp_path / "list.csv"
    paths = sorted(map(str, Path(videos).glob("*/*.mp4")))
    manifest.write_text("".join(f"{path},{index % 2}\n" for index, path in enumerate(paths)))
    data = ["--train_csv", str(manifest), "--val_csv", str(manifest), *output_flags(tmp_path)]
    finetune.main([*FINETUNE, *data, *flags.split(), "--finetune", f"{tmp_path}/bare.pth"])
    printed = capsys.readouterr().out
    assert ("is kept: it has the same 2 classes" in printed) == bool(flags)
    assert ("does not record its read-out" in printed) != bool(flags)


def start_of(script, flags, pretrained):
    """Return the flags of a command line as the checkpoint completes them."""
    args, given = parse(script.get_parser(), flags)
    find_start(args, given, pretrained)
    return args


def newest_checkpoints(out) -> list:
    """Return the newest checkpoints of the runs in a folder."""
    others = ("_best", "_previous1")
    return [path for path in out.glob("*.pth") if not path.stem.endswith(others)]


@pytest.mark.parametrize("model", ["", "--model mae_vit_micro_patch16 --patch_size 8"])
def test_the_same_command_finds_its_run_without_a_prefix(model, mae, videos, tmp_path):
    start = shutil.copy(mae, tmp_path / "start.pth")
    command = bare_command(videos, tmp_path / "out", "--finetune", str(start), *model.split())
    finetune.main(command)
    os.remove(start)
    finetune.main([*command, "--max_steps", "2"])
    (checkpoint,) = newest_checkpoints(tmp_path / "out")
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    with pytest.raises(UserError, match="start.pth not found"):
        finetune.main([*command, "--output_dir", str(tmp_path / "new")])


def test_a_run_resumed_from_a_path_finds_itself_without_a_prefix(mae, videos, tmp_path):
    start = shutil.copy(mae, tmp_path / "start.pth")
    command = ["--data_dirs", str(videos), *output_flags(tmp_path / "out"), "--device", "cpu"]
    command += "--num_workers 0 --recon_every 0 --mask_ratio 0.75 --repeat_aug 1".split()
    command += ["--batch_size_per_gpu", "4", "--resume", str(start)]
    pretrain.main([*command, "--max_steps", "2"])
    os.remove(start)
    pretrain.main([*command, "--max_steps", "3"])
    (checkpoint,) = newest_checkpoints(tmp_path / "out")
    assert checkpoint.name == "mae_vit_micro_patch16.pth"
    lines = (tmp_path / "out/mae_vit_micro_patch16_log.txt").read_text().splitlines()
    assert len(lines) == 2  # one per run: the second went on


def test_a_resumed_run_refuses_another_patch_size(mae, videos, tmp_path):
    command = ["--data_dirs", str(videos), *output_flags(tmp_path), "--device", "cpu"]
    command += ["--resume", mae, "--patch_size", "4", "--mask_ratio", "0.75"]
    with pytest.raises(UserError, match="patch_size: 8 in the checkpoint, 4 now"):
        pretrain.main(command)


@pytest.mark.parametrize(
    ("changes", "flags", "pred_t_dim"),
    [
        ({"t_patch_size": 4}, "--num_frames 16", 16),
        ({"t_patch_size": 4, "pred_t_dim": 4}, "--num_frames 4", 2),
        ({"pred_t_dim": 4}, "", 4),
    ],
)
def test_the_decoder_predicts_as_many_frames_of_a_tubelet(changes, flags, pred_t_dim, tmp_path):
    model = tiny_mae(**changes)
    path = tmp_path / "mae.pth"
    torch.save({"model": model.state_dict(), "config": model.config}, path)
    args = start_of(pretrain, flags.split(), str(path))
    assert args.pred_t_dim == pred_t_dim
    with pytest.raises(UserError, match=f"--pred_t_dim is 32, but the checkpoint has {pred_t_dim}"):
        start_of(pretrain, [*flags.split(), "--pred_t_dim", "32"], str(path))


@pytest.mark.parametrize(
    ("flags", "pred_t_dim"), [("", 8), ("--num_frames 6", 6), ("--pred_t_dim 4", 4)]
)
def test_a_new_decoder_predicts_all_frames(flags, pred_t_dim, tmp_path):
    model = tiny_vit()
    path = tmp_path / "vit.pth"
    torch.save({"model": model.state_dict(), "config": model.config}, path)
    assert start_of(pretrain, flags.split(), str(path)).pred_t_dim == pred_t_dim


def test_unknown_heads_of_a_decoder_must_be_given(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(tiny_mae().state_dict(), path)
    with pytest.raises(UserError, match="width 32 is unusual. Pass --decoder_num_heads"):
        start_of(pretrain, [], str(path))
    args = start_of(pretrain, ["--decoder_num_heads", "4"], str(path))
    assert (args.decoder_num_heads, args.decoder_embed_dim) == (4, 32)
