"""tools.visualize --losses: against the model's own loss, and the same however it is computed."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from foreign_models import hugging_face_videomae
from launch import torchrun_tool
from make_videos import write_folder
from runs import center_clip, pretrain_command

import pretrain
from data.manifest import find_videos
from models_mae import make_mask
from models_vit import normalize
from tools import visualize
from util.dist import UserError
from util.evaluation import clip_losses
from util.pixels import IMAGE_MEAN, IMAGE_STD
from util.pretrained import load_autoencoder
from util.seeds import derive_seed, fixed_noise, mask_noise


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of five videos."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 5))


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    """Return the folder of a pretraining run with a validation loss."""
    out = tmp_path_factory.mktemp("run")
    flags = "--norm_pix_loss --max_steps 1 --batch_size_per_gpu 4".split()
    pretrain.main(pretrain_command(videos, out, *flags, "--val_dirs", videos))
    return out


def measure(run, out: Path, *flags) -> list[dict]:
    """Run the tool and return the rows that it writes."""
    small = "--device cpu --num_workers 0".split()
    words = [run / "run.pth", "--losses", out, *small, *flags]
    visualize.main([str(word) for word in words])
    with open(out, newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def losses(rows: list[dict]) -> list[float]:
    """Return the column of that name."""
    return [float(row["loss"]) for row in rows]


def test_seed_0_has_the_mean_of_the_validation_loss(run, videos, tmp_path):
    rows = measure(run, tmp_path / "losses.csv", "--data_dirs", videos)
    assert list(rows[0]) == ["path", "seed", "mask_type", "mask_ratio", "loss"]
    assert [row["path"] for row in rows] == find_videos([videos], "--data_dirs")
    assert {(row["seed"], row["mask_type"], row["mask_ratio"]) for row in rows} == {
        ("0", "random", "0.75")
    }
    record = json.loads((run / "run_log.txt").read_text().splitlines()[-1])
    assert sum(losses(rows)) / 5 == pytest.approx(record["val_loss"], rel=1e-6)


def test_losses_of_parts_have_the_times_of_the_manifest(run, videos, tmp_path, capsys):
    video = find_videos([videos], "--data_dirs")[-1]
    times = [["0.1", "0.30000000000000004"], ["0.5", ""], ["0.0", ""]]
    manifest = tmp_path / "parts.csv"
    manifest.write_text("path,start,end\n" + "".join(f"{video},{s},{e}\n" for s, e in times))
    rows = measure(run, tmp_path / "losses.csv", "--data_csv", manifest, "--mask_seeds", 2)
    assert [[row["start"], row["end"]] for row in rows[::2]] == times
    assert len({row["loss"] for row in rows}) == 6
    with open(manifest, "a") as file:
        file.write(f"{video},9,\n")
    capsys.readouterr()
    assert measure(run, tmp_path / "more.csv", "--data_csv", manifest) == rows[::2]
    assert f"1 of 4 files cannot be read:\n  {video}#t=9: " in capsys.readouterr().out


def test_every_seed_has_noise_of_its_own_and_seed_0_the_usual_one():
    assert torch.equal(fixed_noise([7], 32), mask_noise([derive_seed(7, 5)], 32))
    draws = torch.stack([fixed_noise([7, 8], 32, draw) for draw in range(3)]).flatten(0, 1)
    assert len(draws.unique(dim=0)) == 6


def test_losses_equal_a_plain_loop(run, videos, tmp_path):
    masks = ["--masks", "random:0.5", "tube:0.75", "--mask_seeds", 2]
    rows = measure(run, tmp_path / "losses.csv", "--data_dirs", videos, *masks)
    assert len(rows) == 5 * 2 * 2
    paths = find_videos([videos], "--data_dirs")
    model = load_autoencoder(run / "run.pth")
    for row in rows:
        index = paths.index(row["path"])
        noise = fixed_noise([index], 32, draw=int(row["seed"]))
        with torch.no_grad():
            loss, _, _ = model(
                center_clip(row["path"]), float(row["mask_ratio"]), row["mask_type"], noise
            )
        assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    by_seed = [losses([row for row in rows if row["seed"] == seed]) for seed in "01"]
    assert all(one != other for one, other in zip(*by_seed, strict=True))


def test_the_batch_size_does_not_matter(run, videos, tmp_path):
    tables = []
    for size in (1, 3, 16):
        flags = ["--data_dirs", videos, "--batch_size_per_gpu", size, "--mask_seeds", 2]
        tables.append(losses(measure(run, tmp_path / f"{size}.csv", *flags)))
    assert tables[0] == pytest.approx(tables[1], rel=1e-5)
    assert tables[0] == pytest.approx(tables[2], rel=1e-5)


def test_two_processes_write_the_same_rows(run, videos, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    flags = ["--data_dirs", videos, str(tmp_path), "--mask_seeds", "2"]
    expected = measure(run, tmp_path / "one.csv", *flags)
    words = [run / "run.pth", "--losses", tmp_path / "two.csv", *flags]
    process = torchrun_tool("visualize", words)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.count("text.mp4: not a video") == 1
    with open(tmp_path / "two.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{**row, "loss": None} for row in rows] == [{**row, "loss": None} for row in expected]
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-5)


def test_unreadable_videos_are_listed_and_left_out(run, videos, tmp_path, capsys):
    (tmp_path / "a_text.mp4").write_text("not a video")
    rows = measure(run, tmp_path / "losses.csv", "--data_dirs", tmp_path, videos)
    expected = measure(run, tmp_path / "expected.csv", "--data_dirs", videos)
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    assert losses(rows) != losses(expected)  # the masks depend on the index in the list
    printed = capsys.readouterr().out
    assert f"1 of 6 files cannot be read:\n  {tmp_path / 'a_text.mp4'}: not a video" in printed
    assert "5 of 6 videos" in printed


def test_no_readable_video_is_an_error(run, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match="none of the 1 files can be read"):
        measure(run, tmp_path / "losses.csv", "--data_dirs", tmp_path)
    assert not (tmp_path / "losses.csv").exists()


def test_an_existing_table_is_replaced_on_request_only(run, videos, tmp_path):
    table = tmp_path / "losses.csv"
    table.write_text("kept")
    with pytest.raises(UserError, match="losses.csv exists"):
        measure(run, table, "--data_dirs", videos)
    assert table.read_text() == "kept"
    with pytest.raises(UserError, match="losses.csv is a file"):
        measure(run, table / "losses.csv", "--data_dirs", videos)
    assert len(measure(run, table, "--data_dirs", videos, "--overwrite")) == 5


def test_names_that_are_no_text_are_written(run, videos, tmp_path):
    good, bad = (tmp_path / os.fsdecode(name) for name in (b"one\xff.mp4", b"two\xff.mp4"))
    os.symlink(find_videos([videos], "--data_dirs")[0], good)
    bad.write_text("not a video")
    rows = measure(run, tmp_path / "losses.csv", "--data_dirs", tmp_path)
    assert [row["path"] for row in rows] == [str(good)]


@pytest.mark.parametrize(
    ("message", "name", "flags"),
    [
        ("does not end in .csv", "losses", []),
        ("no effect on losses", "losses.csv", ["--clips", 2]),
        ("two runs", "losses.csv", ["--attention"]),
        ("tube:2", "losses.csv", ["--masks", "tube:2"]),
        ("not a positive integer", "losses.csv", ["--mask_seeds", 0]),
    ],
)
def test_bad_input_is_one_line(message, name, flags, run, videos, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        measure(run, tmp_path / "out" / name, "--data_dirs", videos, *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_videomae_losses_equal_those_of_hugging_face(tmp_path):
    theirs = hugging_face_videomae("VideoMAEForPreTraining")
    theirs.save_pretrained(tmp_path / "videomae")
    ours = load_autoencoder(tmp_path / "videomae")
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    noise = torch.rand(2, 32)
    visible, _ = make_mask(noise, (2, 4, 4), 0.75, "random")
    mask = torch.ones(2, 32, dtype=torch.bool).scatter_(1, visible, False)
    frames = normalize(clips, IMAGE_MEAN, IMAGE_STD).transpose(1, 2)
    with torch.no_grad():
        values = clip_losses(ours, clips, noise, 0.75, "random", torch.float32)
        for index in range(2):
            part = slice(index, index + 1)
            expected = theirs(frames[part], bool_masked_pos=mask[part]).loss
            assert values[index].item() == pytest.approx(expected.item(), rel=1e-4)
