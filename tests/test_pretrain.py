"""The pretraining script itself: the seed's command, processes, resuming, files, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import torchrun
from make_videos import write_folder, write_video

import pretrain
from util.dist import UserError

ROOT = Path(__file__).parent.parent
SMALL = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 32 --num_frames 4 --pred_t_dim 4 --decoder_embed_dim 32 --decoder_depth 1 "
    "--decoder_num_heads 2 --short_side 48 --num_workers 0 --repeat_aug 2 --sampling_rate 2 --decoder pyav --device cpu --log_every 1 "
    "--recon_every 0 --mask_ratio 0.75 --lr 0.001"
).split()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of eight videos."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


def command(videos, out, *more) -> list[str]:
    """A small pretraining command line."""
    return [
        *SMALL,
        "--data_dirs",
        videos,
        "--output_dir",
        str(out),
        "--datafile_dir",
        str(out),
        "--save_prefix",
        "run",
        *more,
    ]


def weights(out, name="run.pth") -> dict:
    """The weights that a run saved."""
    return torch.load(Path(out, name), weights_only=True)["model"]


def records(out) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in Path(out, "run_log.txt").read_text().splitlines()]


def test_the_seed_command_runs_with_sizes_and_paths_reduced(videos, tmp_path):
    seed = (
        "--data_dirs DATA_DIRS --datafile_dir DATAFILE_DIR --save_prefix INFORMATIVE_SAVE_PREFIX --output_dir OUTPUT_DIR "
        "--model mae_vit_huge_patch14 --batch_size_per_gpu 1 --accum_iter 1 --epochs 100000 --num_frames 16 --img_size 224 "
        "--decoder_embed_dim 512 --decoder_depth 4 --pin_mem --t_patch_size 2 --repeat_aug 16 --sampling_rate 8 --lr 0.0001 "
        "--weight_decay 0.05 --mask_ratio 0.9 --pred_t_dim 16 --clip_grad 0.1"
    )
    smaller = {
        "DATA_DIRS": videos,
        "DATAFILE_DIR": str(tmp_path / "lists"),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "mae_vit_huge_patch14": "mae_vit_micro_patch16",
        "100000": "1",
        "224": "32",
        "512": "32",
    }
    pretrain.main([smaller.get(word, word) for word in seed.split()])
    log = [
        json.loads(line)
        for line in (tmp_path / "out" / "INFORMATIVE_SAVE_PREFIX_log.txt").read_text().splitlines()
    ]
    assert [record["epoch"] for record in log] == [0]
    assert log[0]["step"] == 8 and 0 < log[0]["train_loss"] < 10
    checkpoint = torch.load(tmp_path / "out" / "INFORMATIVE_SAVE_PREFIX.pth", weights_only=True)
    assert checkpoint["samples_consumed"] == 8 and checkpoint["config"]["num_heads"] == 2
    assert (
        len((tmp_path / "lists" / "INFORMATIVE_SAVE_PREFIX_train.csv").read_text().splitlines())
        == 9
    )
    assert len(list((tmp_path / "out").glob("*_recon_*.png"))) == 1


def test_training_is_reproducible_and_learns(tmp_path):
    real = str(ROOT / "samples/videos/train")
    for name in ("a", "b"):
        pretrain.main(
            command(
                real,
                tmp_path / name,
                "--epochs",
                "10",
                "--batch_size_per_gpu",
                "6",
                "--lr",
                "0.005",
            )
        )
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [record["train_loss"] for record in records(tmp_path / "a")]
    assert losses == [record["train_loss"] for record in records(tmp_path / "b")]
    assert losses[-1] < 0.7 * losses[0]


def test_stopping_and_resuming_changes_nothing(videos, tmp_path):
    """Six epochs of two updates at once, or killed by SIGKILL after the fourth epoch's checkpoint and started again."""
    flags = ["--epochs", "6", "--batch_size_per_gpu", "2", "--accum_iter", "2"]
    pretrain.main(command(videos, tmp_path / "whole", *flags))
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import pretrain
from util import checkpoint
save = checkpoint.save
def save_and_die(path, state, *more):
    save(path, state, *more)
    if state["epoch"] == 3: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_and_die
pretrain.main({command(videos, tmp_path / "parts", *flags)!r})""",
        ],
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -9
    assert torch.load(tmp_path / "parts/run.pth", weights_only=True)["step"] == 8
    pretrain.main(command(videos, tmp_path / "parts", *flags))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [r["train_loss"] for r in records(tmp_path / "whole")] == [
        r["train_loss"] for r in records(tmp_path / "parts")
    ]


def test_a_run_that_ends_inside_an_epoch_goes_on_there(videos, tmp_path):
    flags = [
        "--batch_size_per_gpu",
        "2",
        "--lr",
        "0.001",
        "--min_lr",
        "0.001",
    ]  # constant rate: the horizon does not matter
    pretrain.main(command(videos, tmp_path / "whole", "--max_steps", "6", *flags))
    pretrain.main(command(videos, tmp_path / "parts", "--max_steps", "3", *flags))
    pretrain.main(command(videos, tmp_path / "parts", "--max_steps", "6", *flags))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_processes_equal_one(videos, tmp_path):
    flags = [
        "--epochs",
        "2",
        "--lr",
        "0.0001",
    ]  # Adam turns the rounding of a tiny gradient into a share of the rate
    pretrain.main(command(videos, tmp_path / "one", *flags, "--batch_size_per_gpu", "4"))
    two = torchrun(
        "pretrain.py", 2, command(videos, tmp_path / "two", *flags, "--batch_size_per_gpu", "2")
    )
    assert two.returncode == 0, two.stderr[-2000:]
    accumulated = torchrun(
        "pretrain.py",
        2,
        command(videos, tmp_path / "acc", *flags, "--batch_size_per_gpu", "1", "--accum_iter", "2"),
    )
    assert accumulated.returncode == 0, accumulated.stderr[-2000:]
    assert two.stdout.count("update 4/4") == 1  # only rank 0 speaks
    expected = weights(tmp_path / "one")
    for name in ("two", "acc"):
        ours = weights(tmp_path / name)
        off = {
            key: float((ours[key] - expected[key]).abs().max())
            for key in expected
            if not key.endswith("attn.k.bias")
        }
        assert max(off.values()) <= 1e-6, max(off.items(), key=lambda item: item[1])
        for a, b in zip(records(tmp_path / "one"), records(tmp_path / name), strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)


def test_unreadable_videos_are_listed_and_too_many_stop_the_run(videos, tmp_path):
    folder = tmp_path / "mixed"
    write_folder(folder, 7)
    (folder / "text.mp4").write_text("no video at all")
    flags = ["--epochs", "2", "--batch_size_per_gpu", "2"]
    pretrain.main(command(str(folder), tmp_path / "out", *flags, "--max_bad_frac", "0.2"))
    lines = (tmp_path / "out" / "bad_videos.csv").read_text().splitlines()
    assert len(lines) == 2 and "text.mp4" in lines[1] and "not a video" in lines[1]
    assert records(tmp_path / "out")[-1]["unreadable_videos"] == 1
    with pytest.raises(UserError, match="--max_bad_frac"):
        pretrain.main(command(str(folder), tmp_path / "out2", *flags, "--max_bad_frac", "0.1"))
    for video in folder.glob("class*/*"):
        video.write_text("broken")
    with pytest.raises(UserError, match="no readable file"):
        pretrain.main(command(str(folder), tmp_path / "out3", *flags, "--max_bad_frac", "1"))
    assert len((tmp_path / "out3" / "bad_videos.csv").read_text().splitlines()) > 1


def test_a_non_finite_update_is_skipped_on_the_device(videos, tmp_path, monkeypatch):
    """Weights and moments stay as they were, the update is counted, and too many in a row stop the run."""
    import engine_pretrain

    honest = engine_pretrain.micro_step

    def poisoned(model, *rest):
        loss = honest(model, *rest)
        poisoned.calls += 1
        if poisoned.calls in (2, 3):
            model.norm.weight.grad[0] = float("nan")
        return loss

    poisoned.calls = 0
    monkeypatch.setattr(engine_pretrain, "micro_step", poisoned)
    flags = ["--batch_size_per_gpu", "4", "--min_lr", "0.001"]
    pretrain.main(command(videos, tmp_path / "a", *flags, "--epochs", "2"))
    assert [record["skipped_steps"] for record in records(tmp_path / "a")] == [1, 1]
    state = torch.load(tmp_path / "a" / "run.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {2.0}
    poisoned.calls = 0
    with pytest.raises(UserError, match="2 updates in a row"):
        pretrain.main(
            command(videos, tmp_path / "b", *flags, "--epochs", "2", "--max_bad_steps", "2")
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "mae_vit_giant_patch14"], "mae_vit_giant_patch14"),
        (["--img_size", "30"], "img_size 30"),
        (["--num_frames", "5"], "num_frames 5"),
        (["--pred_t_dim", "3"], "pred_t_dim 3"),
        (["--mask_ratio", "1.5"], "mask_ratio 1.5"),
        (["--data_dirs", "/no/such/folder"], "/no/such/folder"),
        (["--data_csv", "/no/such/list.csv"], "/no/such/list.csv"),
        (["--batch_size_per_gpu", "64"], "8 samples are fewer"),
        (["--resume", "/no/such.pth"], "/no/such.pth"),
        (["--data_frac", "0"], "--data_frac"),
        (["--epochs", "0"], "--epochs"),
        (["--epoch", "3"], "--epoch"),
        (["--attn", "flash_attn"], "flash-attn"),
        (["--repeat_windows", "3"], "--repeat_windows 3"),
        (["--save_prefix", "a/b"], "--save_prefix"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line_that_names_it(videos, tmp_path, more, said):
    with pytest.raises(UserError) as raised:
        pretrain.main(command(videos, tmp_path / "out", *more))
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "run.pth").exists()


def test_bad_input_exits_with_2_and_no_traceback(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "pretrain.py"),
            "--data_dirs",
            str(empty),
            "--output_dir",
            str(tmp_path / "o"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no videos below") and done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_an_existing_run_is_not_started_over_by_accident(videos, tmp_path):
    flags = ["--max_steps", "1", "--batch_size_per_gpu", "4"]
    pretrain.main(command(videos, tmp_path, *flags))
    before = (tmp_path / "run.pth").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        pretrain.main(command(videos, tmp_path, *flags, "--resume", ""))
    with pytest.raises(UserError, match="depth|embed_dim"):
        pretrain.main(command(videos, tmp_path, *flags, "--model", "mae_vit_tiny_patch16"))
    assert (tmp_path / "run.pth").read_bytes() == before
    pretrain.main(command(videos, tmp_path, *flags, "--resume", "", "--overwrite", "--seed", "5"))
    assert (tmp_path / "run.pth").read_bytes() != before


def test_damaged_checkpoints_are_one_line(videos, tmp_path):
    for content in (b"", b"text", b"PK\x03\x04 half a zip"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(UserError, match="bad.pth cannot be read") as raised:
            pretrain.main(command(videos, tmp_path / "out", "--resume", str(tmp_path / "bad.pth")))
        assert "\n" not in str(raised.value)


def test_retired_flags_are_accepted_and_said(videos, tmp_path, capsys):
    retired = [
        "--local_rank",
        "0",
        "--dist_on_itp",
        "--num_checkpoint_del",
        "20",
        "--beta",
        "1",
        "2",
    ]
    pretrain.main(command(videos, tmp_path, "--max_steps", "1", *retired))
    said = capsys.readouterr().out
    for flag in ("--local_rank", "--dist_on_itp", "--num_checkpoint_del", "--beta"):
        assert f"{flag} has no effect" in said


def test_csv_input_and_fraction(videos, tmp_path):
    path = write_video(tmp_path / "one.mp4", frames=12)
    (tmp_path / "list.csv").write_text(f"{path}\n{path}\none.mp4\n")
    flags = [
        "--data_csv",
        str(tmp_path / "list.csv"),
        "--data_frac",
        "0.5",
        "--max_steps",
        "1",
        "--batch_size_per_gpu",
        "2",
    ]
    pretrain.main(command(videos, tmp_path, *flags))
    assert (tmp_path / "run_train.csv").read_text().splitlines() == ["path", str(path), str(path)]
