"""The pretraining script: the ancestor's command, processes, files of a run, bad input."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from launch import ROOT, script_command, torchrun
from make_videos import write_folder, write_video
from runs import assert_same_run, log_records, pretrain_command, saved_weights

import engine_pretrain
import pretrain
from util import preemption
from util.dist import UserError

ANCESTOR_COMMAND = (
    "--data_dirs DATA_DIRS --datafile_dir DATAFILE_DIR --save_prefix INFORMATIVE_SAVE_PREFIX "
    "--output_dir OUTPUT_DIR --model mae_vit_huge_patch14 --batch_size_per_gpu 1 --accum_iter 1 "
    "--epochs 100000 --num_frames 16 --img_size 224 --decoder_embed_dim 512 --decoder_depth 4 "
    "--pin_mem --t_patch_size 2 --repeat_aug 16 --sampling_rate 8 --lr 0.0001 --weight_decay 0.05 "
    "--mask_ratio 0.9 --pred_t_dim 16 --clip_grad 0.1"
)
ONE_UPDATE = "--max_steps 1 --batch_size_per_gpu 4".split()
KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pretrain
from util import checkpoint

original = checkpoint.save

def save(path, state, *rest):
    original(path, state, *rest)
    if state["epoch"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save = save
pretrain.main({flags!r})
"""


def assert_same_weights(out, other) -> None:
    """Check that two runs ended with the same weights, bit for bit."""
    ours = saved_weights(out)
    theirs = saved_weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def train_losses(out) -> list[float]:
    """Return the training loss of each epoch."""
    return [record["train_loss"] for record in log_records(out)]


def test_the_ancestors_command_runs_with_smaller_sizes(videos, tmp_path):
    lists = tmp_path / "lists"
    out = tmp_path / "out"
    smaller = {
        "DATA_DIRS": videos,
        "DATAFILE_DIR": str(lists),
        "OUTPUT_DIR": str(out),
        "mae_vit_huge_patch14": "mae_vit_micro_patch16",
        "100000": "1",
        "224": "32",
        "512": "32",
    }
    pretrain.main([smaller.get(word, word) for word in ANCESTOR_COMMAND.split()])
    prefix = "INFORMATIVE_SAVE_PREFIX"
    lines = (out / f"{prefix}_log.txt").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in log] == [0]
    assert log[0]["step"] == 8
    assert 0 < log[0]["train_loss"] < 10
    checkpoint = torch.load(out / f"{prefix}.pth", weights_only=True)
    assert checkpoint["samples_consumed"] == 8
    assert checkpoint["config"]["num_heads"] == 2
    assert len((lists / f"{prefix}_train.csv").read_text().splitlines()) == 9
    assert len(list(out.glob("*_recon_*.png"))) == 1


def test_training_is_reproducible_and_learns(tmp_path):
    real = ROOT / "samples/videos/train"
    flags = "--epochs 10 --batch_size_per_gpu 6 --lr 0.005".split()
    for name in ("a", "b"):
        pretrain.main(pretrain_command(real, tmp_path / name, *flags))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    losses = train_losses(tmp_path / "a")
    assert losses == train_losses(tmp_path / "b")
    assert losses[-1] < 0.7 * losses[0]


def test_a_killed_run_that_resumes_ends_as_if_uninterrupted(videos, tmp_path):
    """Kill the run after the checkpoint of the fourth of six epochs of two updates."""
    flags = "--epochs 6 --batch_size_per_gpu 2 --accum_iter 2".split()
    pretrain.main(pretrain_command(videos, tmp_path / "whole", *flags))
    command = pretrain_command(videos, tmp_path / "parts", *flags)
    code = KILLED_RUN.format(root=str(ROOT), flags=command)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "parts/run.pth", weights_only=True)["step"] == 8
    pretrain.main(command)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert train_losses(tmp_path / "parts") == train_losses(tmp_path / "whole")


def test_f13_a_stop_after_the_last_update_changes_nothing(videos, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    flags = ["--val_dirs", videos, *ONE_UPDATE]
    pretrain.main(pretrain_command(videos, whole, *flags, "--warmup_epochs", "0"))
    command = pretrain_command(videos, parts, *flags, "--warmup_epochs", "0")

    def stop(*_arguments) -> None:
        raise preemption.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(engine_pretrain, "measure", stop)
        pretrain.main(command)
    assert (parts / "run.PREEMPTED").exists()
    pretrain.main(command)
    assert_same_run(parts, whole)


def test_a_run_that_ends_inside_an_epoch_resumes_there(videos, tmp_path):
    # the rate is constant, since a shorter run has another schedule
    flags = "--batch_size_per_gpu 2 --lr 0.001 --min_lr 0.001 --max_steps".split()
    pretrain.main(pretrain_command(videos, tmp_path / "whole", *flags, "6"))
    pretrain.main(pretrain_command(videos, tmp_path / "parts", *flags, "3"))
    pretrain.main(pretrain_command(videos, tmp_path / "parts", *flags, "6"))
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_two_processes_equal_one(videos, tmp_path):
    # Adam turns the rounding of a tiny gradient into a share of the rate: it must be small
    flags = "--epochs 2 --lr 0.0001".split()
    batches = {
        "one": "--batch_size_per_gpu 4",
        "two": "--batch_size_per_gpu 2",
        "accumulated": "--batch_size_per_gpu 1 --accum_iter 2",
    }
    commands = {
        name: pretrain_command(videos, tmp_path / name, *flags, *batch.split())
        for name, batch in batches.items()
    }
    pretrain.main(commands["one"])
    two = torchrun("pretrain.py", 2, commands["two"])
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.count("update 4/4") == 1  # only rank 0 prints
    accumulated = torchrun("pretrain.py", 2, commands["accumulated"])
    assert accumulated.returncode == 0, accumulated.stderr[-2000:]
    expected = saved_weights(tmp_path / "one")
    for name in ("two", "accumulated"):
        weights = saved_weights(tmp_path / name)
        for key in expected:
            if not key.endswith("attn.k.bias"):  # its gradient is rounding alone
                assert (weights[key] - expected[key]).abs().max() <= 1e-6, key
        losses = pytest.approx(train_losses(tmp_path / "one"), abs=1e-6)
        assert train_losses(tmp_path / name) == losses


def test_unreadable_videos_are_listed_and_too_many_are_an_error(tmp_path):
    folder = tmp_path / "mixed"
    write_folder(folder, 7)
    (folder / "text.mp4").write_text("no video at all")
    flags = "--epochs 2 --batch_size_per_gpu 2 --max_bad_frac".split()
    pretrain.main(pretrain_command(folder, tmp_path / "out", *flags, "0.2"))
    lines = (tmp_path / "out/bad_videos.csv").read_text().splitlines()
    assert len(lines) == 2
    assert "text.mp4" in lines[1] and "not a video" in lines[1]
    assert log_records(tmp_path / "out")[-1]["unreadable_videos"] == 1
    with pytest.raises(UserError, match="--max_bad_frac"):
        pretrain.main(pretrain_command(folder, tmp_path / "out2", *flags, "0.1"))
    for video in folder.glob("class*/*"):
        video.write_text("broken")
    with pytest.raises(UserError, match="no readable file"):
        pretrain.main(pretrain_command(folder, tmp_path / "out3", *flags, "1"))
    assert len((tmp_path / "out3/bad_videos.csv").read_text().splitlines()) > 1


def test_unreadable_parts_of_one_video_count_one_by_one(tmp_path):
    video = write_video(tmp_path / "a.mp4")  # 1.33 s
    rows = [f"{video},{start},{start + 0.25}" for start in (0, 0.25, 0.5, 0.75, 2, 3.125, 4, 5)]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,start,end", *rows]))
    flags = f"--data_csv {manifest} --epochs 2 --batch_size_per_gpu 2 --max_bad_frac".split()
    pretrain.main(pretrain_command(tmp_path, tmp_path / "out", *flags, "0.5"))
    assert log_records(tmp_path / "out")[-1]["unreadable_videos"] == 4
    listed = (tmp_path / "out/bad_videos.csv").read_text()
    assert f'{video}#t=3.125,3.375","the video ends at 1.333 s' in listed
    with pytest.raises(UserError, match=r"4 files .* more than --max_bad_frac allows.*#t="):
        pretrain.main(pretrain_command(tmp_path, tmp_path / "out2", *flags, "0.4"))


NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--model mae_vit_giant_patch16", "mae_vit_giant_patch16"),
        ("--img_size 30", "img_size 30"),
        ("--num_frames 5", "num_frames 5"),
        ("--pred_t_dim 3", "pred_t_dim 3"),
        ("--mask_ratio 1.5", "mask_ratio 1.5"),
        ("--decoder_mask_ratio 1", "decoder_mask_ratio 1"),
        ("--decoder_mask_ratio -0.5", "decoder_mask_ratio -0.5"),
        ("--decoder_mask_ratio nan", "decoder_mask_ratio nan"),
        ("--mask_ratio 0.05 --decoder_mask_ratio 0.8", "none of 2 hidden tokens"),
        ("--decoder_mask_type tube", "--decoder_mask_type"),
        ("--data_dirs /no/such/folder", "/no/such/folder"),
        ("--data_csv /no/such/list.csv", "/no/such/list.csv"),
        ("--batch_size_per_gpu 64", "8 samples are fewer"),
        ("--resume /no/such.pth", "/no/such.pth"),
        ("--data_frac 0", "--data_frac"),
        ("--epochs 0", "--epochs"),
        ("--epoch 3", "--epoch"),
        ("--attn flash_attn", "flash-attn"),
        ("--attn cudnn --device cpu", "cuDNN"),
        ("--repeat_windows 3", "--repeat_windows 3"),
        ("--save_prefix a/b", "--save_prefix"),
        pytest.param("--device cuda", "--device cuda", marks=NEEDS_NO_GPU),
    ],
)
def test_bad_input_is_one_line_that_names_it(videos, tmp_path, flags, named):
    with pytest.raises(UserError) as raised:
        pretrain.main(pretrain_command(videos, tmp_path / "out", *flags.split()))
    message = str(raised.value)
    assert named in message and "\n" not in message
    assert not (tmp_path / "out/run.pth").exists()


def test_bad_input_exits_with_2_and_no_traceback(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = f"--data_dirs {empty} --output_dir {tmp_path / 'out'}".split()
    command = script_command("pretrain.py", flags)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no videos below") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_validation_input_is_one_line(videos, tmp_path):
    broken = tmp_path / "broken"
    write_folder(broken / "train", 2)
    write_folder(broken / "val", 2)
    (broken / "val/class_1").rename(broken / "val/class_x")
    (broken / "val/class_x/text.mp4").write_text("no video")
    nowhere = tmp_path / "nowhere"
    cases = {
        "unknown class 'class_x'": f"--probe_dir {broken}",
        "nowhere' not found: check --val_dirs": f"--val_dirs {nowhere}",
        "validation file .*text.mp4": f"--val_dirs {broken / 'val'}",
        "not found: check --probe_dir": f"--probe_dir {videos}",
    }
    for index, (message, flags) in enumerate(cases.items()):
        command = pretrain_command(videos, tmp_path / str(index), *ONE_UPDATE, *flags.split())
        with pytest.raises(UserError, match=message) as raised:
            pretrain.main(command)
        assert "\n" not in str(raised.value)


def test_an_existing_run_is_not_overwritten_by_accident(videos, tmp_path):
    command = pretrain_command(videos, tmp_path, *ONE_UPDATE)
    pretrain.main(command)
    before = (tmp_path / "run.pth").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        pretrain.main([*command, "--resume", ""])
    with pytest.raises(UserError, match="depth|embed_dim"):
        pretrain.main([*command, "--model", "mae_vit_tiny_patch16"])
    assert (tmp_path / "run.pth").read_bytes() == before
    pretrain.main([*command, "--resume", "", "--overwrite", "--seed", "5"])
    assert (tmp_path / "run.pth").read_bytes() != before


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_a_corrupt_checkpoint_is_one_line(content, videos, tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.pth cannot be read") as raised:
        pretrain.main(pretrain_command(videos, tmp_path / "out", "--resume", str(path)))
    assert "\n" not in str(raised.value)


def test_retired_flags_are_accepted_and_named(videos, tmp_path, capsys):
    retired = "--local_rank 0 --dist_on_itp --num_checkpoint_del 20 --beta 1 2".split()
    pretrain.main(pretrain_command(videos, tmp_path, "--max_steps", "1", *retired))
    printed = capsys.readouterr().out
    for flag in ("--local_rank", "--dist_on_itp", "--num_checkpoint_del", "--beta"):
        assert f"{flag} no longer has an effect" in printed


def test_a_fraction_of_a_csv_list_is_used(videos, tmp_path):
    path = write_video(tmp_path / "one.mp4", frames=12)
    csv = tmp_path / "list.csv"
    csv.write_text(f"{path}\n{path}\none.mp4\n")
    flags = f"--data_csv {csv} --data_frac 0.5 --max_steps 1 --batch_size_per_gpu 2".split()
    pretrain.main(pretrain_command(videos, tmp_path, *flags))
    manifest = (tmp_path / "run_train.csv").read_text().splitlines()
    assert manifest == ["path", str(path), str(path)]
