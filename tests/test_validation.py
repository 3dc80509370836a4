"""Validation loss, online probe and TensorBoard tags of pretraining, against plain loops over the files."""

import json
import re
from pathlib import Path

import pytest
import torch
from launch import ROOT, torchrun
from make_videos import write_folder
from test_pretrain import command, records, weights
from tiny import tiny_mae

import pretrain
from data.decode import frame_indices, open_video, view_start
from data.index import find_videos
from data.transforms import VIDEO_MEAN, VIDEO_STD, normalize, sample_seed, view_transform
from engine_eval import knn_classes, linear_classes, mean_features
from models_mae import MaskedAutoencoderViT
from util.dist import UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight training videos."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 8))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """A labelled set: 13 videos in train, 11 in val (neither a multiple of the batch), two classes each."""
    folder = tmp_path_factory.mktemp("unseen")
    write_folder(folder / "train", 13)
    write_folder(folder / "val", 11, size=(64, 64))
    return folder


def plain_clip(path: str) -> torch.Tensor:
    """The centre clip and crop (1, C, 4, 32, 32) of a video, normalised."""
    with open_video(path, "pyav", 48) as video:
        spacing = {"num_frames": 4, "sampling_rate": 2}
        start = view_start(video.num_frames, video.fps, **spacing, view=0, views=1)
        frames = torch.from_numpy(
            video.read(frame_indices(video.num_frames, video.fps, **spacing, start=start))
        )
    return normalize(
        view_transform(32, 1)(frames.permute(0, 3, 1, 2)).transpose(1, 2), VIDEO_MEAN, VIDEO_STD
    )


def saved_model(path: Path) -> MaskedAutoencoderViT:
    """The model of a checkpoint."""
    state = torch.load(path, weights_only=True)
    model = MaskedAutoencoderViT(
        **{
            key: value
            for key, value in state["config"].items()
            if key not in ("model", "mean", "std")
        }
    )
    model.load_state_dict(state["model"])
    return model.eval()


def plain_knn(train, labels, val):
    """Classes by the 20 nearest, one at a time."""
    classes = []
    for row in val:
        cosines = [
            (float(row @ other / row.norm() / other.norm()), int(label))
            for other, label in zip(train, labels, strict=True)
        ]
        votes = dict.fromkeys(labels.tolist(), 0.0)
        for cosine, label in sorted(cosines, reverse=True)[:20]:
            votes[label] += torch.tensor(cosine / 0.07, dtype=torch.float64).exp().item()
        classes.append(max(votes, key=votes.get))
    return torch.tensor(classes)


def plain_ridge(train, labels, val):
    """Classes by least squares on the data with rows sqrt(0.1 n) I below it, the bias not penalised."""
    n, width = train.shape
    design = torch.cat(
        [
            torch.cat([train, torch.ones(n, 1)], dim=1),
            torch.cat([torch.eye(width) * (0.1 * n) ** 0.5, torch.zeros(width, 1)], dim=1),
        ]
    )
    targets = torch.cat(
        [torch.eye(int(labels.max()) + 1)[labels], torch.zeros(width, int(labels.max()) + 1)]
    ).double()
    solution = torch.linalg.lstsq(design.double(), targets).solution
    return (torch.cat([val, torch.ones(len(val), 1)], dim=1).double() @ solution).argmax(1)


def test_both_probes_equal_plain_ones():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)
    centres = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    train = centres[labels] + 1.5 * torch.randn(60, 10, generator=generator, dtype=torch.float64)
    train = train - train.mean(0)
    val = 1.5 * torch.randn(300, 10, generator=generator, dtype=torch.float64)
    for ours, plain in ((knn_classes, plain_knn), (linear_classes, plain_ridge)):
        classes = ours(train, labels, val)
        assert torch.equal(classes, plain(train, labels, val)) and len(classes.unique()) == 4


def test_features_are_means_of_patch_tokens_in_the_order_of_the_samples():
    model, clips = tiny_mae(), torch.randint(0, 256, (11, 1, 3, 8, 32, 32), dtype=torch.uint8)
    index = torch.randperm(11)
    batches = [{"clips": clips[part], "index": part, "bad": []} for part in index.split(9)]
    with torch.no_grad():
        torch.nn.init.normal_(model.cls_token)
        expected = [
            model.norm(model.encode(normalize(clip, VIDEO_MEAN, VIDEO_STD))[0, 1:].mean(0))
            for clip in clips
        ]
    torch.testing.assert_close(
        mean_features(model, batches, torch.float32), torch.stack(expected), rtol=1e-4, atol=1e-5
    )


def test_t18_validation_and_probe_equal_a_plain_loop_on_one_and_two_processes(
    videos, unseen, tmp_path
):
    flags = [
        "--lr",
        "0",
        "--min_lr",
        "0",
        "--max_steps",
        "1",
        "--val_dirs",
        str(unseen / "val"),
        "--probe_dir",
        str(unseen),
    ]
    pretrain.main(command(videos, tmp_path / "one", *flags, "--batch_size_per_gpu", "4"))
    two = torchrun(
        "pretrain.py", 2, command(videos, tmp_path / "two", *flags, "--batch_size_per_gpu", "2")
    )
    assert two.returncode == 0, two.stderr[-2000:]
    (one,), (other,) = records(tmp_path / "one"), records(tmp_path / "two")
    names = ("val_loss", "probe_knn_acc1", "probe_linear_acc1")
    assert [one[name] for name in names] == [other[name] for name in names]  # to the last digit

    model = saved_model(tmp_path / "one/run.pth")
    losses = []
    with torch.no_grad():
        for number, path in enumerate(find_videos([str(unseen / "val")])):
            noise = torch.rand(
                1, model.num_tokens, generator=torch.Generator().manual_seed(sample_seed(number, 5))
            )
            losses.append(model(plain_clip(path), 0.75, "random", noise)[0].item())
        assert len(losses) == 11 and one["val_loss"] == pytest.approx(sum(losses) / 11, rel=1e-6)
        sets = []
        for part in ("train", "val"):
            paths = find_videos([str(unseen / part)])
            values = torch.cat(
                [model.norm(model.encode(plain_clip(path))[:, 1:].mean(1)) for path in paths]
            ).double()
            sets.append((values, torch.tensor([int(Path(path).parent.name[-1]) for path in paths])))
    (train, labels), (val, truth) = sets
    mean, deviation = train.mean(0), ((train - train.mean(0)) ** 2).mean(0).sqrt() + 1e-6
    train, val = (train - mean) / deviation, (val - mean) / deviation
    for name, plain in (("knn", plain_knn), ("linear", plain_ridge)):
        right = (plain(train, labels, val) == truth).sum().item()
        assert one[f"probe_{name}_acc1"] == pytest.approx(100 * right / 11)


@pytest.mark.slow
def test_t18_validation_changes_no_weight_and_resumes(videos, unseen, tmp_path):
    flags, seen = (
        ["--batch_size_per_gpu", "4"],
        ["--val_dirs", str(unseen / "val"), "--probe_dir", str(unseen), "--val_every", "2"],
    )
    pretrain.main(command(videos, tmp_path / "without", "--epochs", "5", *flags))
    pretrain.main(command(videos, tmp_path / "whole", "--epochs", "5", *flags, *seen))
    constant = ["--lr", "0.001", "--min_lr", "0.001"]
    for name, runs in (("parts", ("1", "3", "5")), ("once", ("5",))):
        for epochs in runs:
            pretrain.main(
                command(videos, tmp_path / name, "--epochs", epochs, *flags, *constant, *seen)
            )
    without, whole = weights(tmp_path / "without"), weights(tmp_path / "whole")
    assert all(torch.equal(without[name], whole[name]) for name in whole)
    assert ["val_loss" in record for record in records(tmp_path / "whole")] == [
        False,
        True,
        False,
        True,
        True,
    ]  # and at the end
    parts, once = (
        {r["epoch"]: r["val_loss"] for r in records(tmp_path / name) if "val_loss" in r}
        for name in ("parts", "once")
    )
    assert (
        once.keys() <= parts.keys()
        and all(parts[epoch] == once[epoch] for epoch in once)
        and len(set(once.values())) == 3
    )


def test_tensorboard_holds_the_tags_that_the_readme_names(videos, unseen, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = [
        "--val_dirs",
        str(unseen / "val"),
        "--probe_dir",
        str(unseen),
        "--recon_every",
        "1",
        "--max_steps",
        "2",
        "--batch_size_per_gpu",
        "4",
    ]
    pretrain.main(command(videos, tmp_path, *seen))
    events = EventAccumulator(str(tmp_path / "tb/run"))
    events.Reload()
    text = (ROOT / "README.md").read_text().split("## Pretraining")[1].split("## On a cluster")[0]
    named = set(re.findall(r"`((?:train|epoch)/\w+)`", text)) - {
        "train/skipped",
        "train/mfu",
    }  # written under a condition that the README states
    assert named == set(events.Tags()["scalars"])
    assert "`recon`" in text and events.Tags()["images"] == ["recon"]
    (record,) = records(tmp_path)
    assert {f"epoch/{name}" for name in record if name != "epoch"} == {
        tag for tag in named if tag.startswith("epoch/")
    }
    assert events.Scalars("epoch/val_loss")[0].value == pytest.approx(record["val_loss"])
    assert json.loads((tmp_path / "run_args.json").read_text())["probe_dir"] == str(unseen)


def test_bad_input_is_one_line(videos, unseen, tmp_path):
    broken = tmp_path / "broken"
    write_folder(broken / "train", 2)
    write_folder(broken / "val", 2)
    (broken / "val/class_1").rename(broken / "val/class_x")
    (broken / "val/class_x/text.mp4").write_text("no video")
    cases = {
        "unknown class 'class_x'": ["--probe_dir", str(broken)],
        "nowhere": ["--val_dirs", str(tmp_path / "nowhere")],
        "validation file .*text.mp4": ["--val_dirs", str(broken / "val")],
        "not found: check --probe_dir": ["--probe_dir", videos],
    }
    for number, (message, flags) in enumerate(cases.items()):
        with pytest.raises(UserError, match=message) as error:
            pretrain.main(
                command(
                    videos,
                    tmp_path / str(number),
                    "--max_steps",
                    "1",
                    "--batch_size_per_gpu",
                    "4",
                    *flags,
                )
            )
        assert "\n" not in str(error.value)
