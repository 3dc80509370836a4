"""Validation loss, features and probes, against plain loops over the files (T18)."""

from pathlib import Path

import pytest
import torch
from launch import torchrun
from make_videos import write_folder
from runs import center_clip, log_records, pretrain_command, saved_model, saved_weights
from tiny import tiny_mae, tiny_vit

import pretrain
from data.clips import ClipSampling
from data.datasets import ViewDataset
from data.loader import WorkerSettings, collate, collate_readable, eval_loader
from data.manifest import find_videos
from data.transforms import view_transform
from models_vit import normalize
from util import evaluation
from util.dist import DistEnv, UserError
from util.evaluation import (
    evaluate,
    feature_rows,
    features,
    gather_readable,
    knn_classes,
    linear_classes,
    mean_features,
    predict,
    validation_loss,
)
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.seeds import derive_seed, fixed_noise

NOISE_STREAM = 5


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Return a labeled set of two classes, 13 videos in train and 11 in val.

    Neither is a multiple of the batch.
    """
    folder = tmp_path_factory.mktemp("unseen")
    write_folder(folder / "train", 13)
    write_folder(folder / "val", 11, size=(64, 64))
    return folder


def plain_knn(train, labels, val):
    """Return the classes by the 20 nearest neighbors, one sample at a time."""
    classes = []
    for row in val:
        cosines = []
        for other, label in zip(train, labels, strict=True):
            cosine = float(row @ other / row.norm() / other.norm())
            cosines.append((cosine, int(label)))
        votes = dict.fromkeys(labels.tolist(), 0.0)
        for cosine, label in sorted(cosines, reverse=True)[:20]:
            votes[label] += torch.tensor(cosine / 0.07, dtype=torch.float64).exp().item()
        classes.append(max(votes, key=votes.get))
    return torch.tensor(classes)


def plain_ridge(train, labels, val):
    """Return the classes by least squares, with rows sqrt(0.1 n) I below the data.

    These rows are the penalty; the bias has none.
    """
    n, width = train.shape
    num_classes = int(labels.max()) + 1
    data_rows = torch.cat([train, torch.ones(n, 1)], dim=1)
    penalty_rows = torch.cat([torch.eye(width) * (0.1 * n) ** 0.5, torch.zeros(width, 1)], dim=1)
    design = torch.cat([data_rows, penalty_rows]).double()
    one_hot = torch.eye(num_classes)[labels]
    targets = torch.cat([one_hot, torch.zeros(width, num_classes)]).double()
    solution = torch.linalg.lstsq(design, targets).solution
    val_rows = torch.cat([val, torch.ones(len(val), 1)], dim=1).double()
    return (val_rows @ solution).argmax(1)


@pytest.mark.parametrize(
    ("classify", "plain"), [(knn_classes, plain_knn), (linear_classes, plain_ridge)]
)
def test_a_probe_equals_a_plain_one(classify, plain):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)
    centers = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    train = centers[labels] + 1.5 * torch.randn(60, 10, generator=generator, dtype=torch.float64)
    train = train - train.mean(0)
    val = 1.5 * torch.randn(300, 10, generator=generator, dtype=torch.float64)
    classes = classify(train, labels, val)
    assert torch.equal(classes, plain(train, labels, val))
    assert len(classes.unique()) == 4


@torch.no_grad()
def test_features_are_means_of_patch_tokens_in_sample_order():
    model = tiny_mae()
    torch.nn.init.normal_(model.cls_token)
    clips = torch.randint(0, 256, (11, 1, 3, 8, 32, 32), dtype=torch.uint8)
    index = torch.randperm(11)
    batches = [{"clips": clips[part], "index": part, "bad": []} for part in index.split(9)]
    expected = []
    for clip in clips:
        tokens = model.encode(normalize(clip, VIDEO_MEAN, VIDEO_STD))
        expected.append(model.norm(tokens[0, 1:].mean(0)))
    features = mean_features(model, batches, torch.float32)
    torch.testing.assert_close(features, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_type", ["random", "tube", "temporal", "boundary"])
@torch.no_grad()
def test_validation_loss_is_the_mean_over_the_hidden_tokens(mask_type, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_ON_DEVICE", 2)
    model = tiny_mae()
    clips = torch.randint(0, 256, (40, 1, 3, 8, 32, 32), dtype=torch.uint8)
    noise = fixed_noise(range(40), model.num_tokens)
    batches = []
    losses = []
    for index in torch.randperm(40).split(8):
        batch = {"clips": clips[index], "noise": noise[index, None], "index": index, "bad": []}
        batches.append(batch)
        pixels = normalize(clips[index, 0], VIDEO_MEAN, VIDEO_STD)
        _, pred, mask = model(pixels, 0.75, mask_type, noise[index])
        target, _, _ = model.patch_targets(pixels)
        errors = (pred.flatten(0, 1) - target[mask]).square()
        losses.append(errors.view(pred.shape).mean(dim=(1, 2)))
    expected = torch.cat(losses).double().mean().item()
    loss = validation_loss(model, batches, 0.75, mask_type, torch.float32)
    assert loss == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def plain_validation_loss(model, paths: list[str]) -> float:
    """Return the mean loss of the videos' center clips, one at a time."""
    losses = []
    for index, path in enumerate(paths):
        generator = torch.Generator().manual_seed(derive_seed(index, NOISE_STREAM))
        noise = torch.rand(1, model.num_tokens, generator=generator)
        loss, _, _ = model(center_clip(path), 0.75, "random", noise)
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def plain_features(model, paths: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (n, D) of videos, one at a time, and the labels (n,) of their folders."""
    rows = []
    labels = []
    for path in paths:
        tokens = model.encode(center_clip(path))
        rows.append(model.norm(tokens[:, 1:].mean(1)))
        labels.append(int(Path(path).parent.name[-1]))
    return torch.cat(rows).double(), torch.tensor(labels)


def test_t18_validation_and_probes_equal_plain_loops(videos, unseen, tmp_path):
    flags = (
        f"--lr 0 --min_lr 0 --max_steps 1 --val_dirs {unseen / 'val'} --probe_dir {unseen} "
        "--batch_size_per_gpu"
    ).split()
    pretrain.main(pretrain_command(videos, tmp_path / "one", *flags, "4"))
    on_two = pretrain_command(videos, tmp_path / "two", *flags, "2")
    done = torchrun("pretrain.py", 2, on_two)
    assert done.returncode == 0, done.stderr[-2000:]
    (one,) = log_records(tmp_path / "one")
    (two,) = log_records(tmp_path / "two")
    for name in ("val_loss", "probe_knn_acc1", "probe_linear_acc1", "probe_attentive_acc1"):
        assert one[name] == two[name]  # to the last digit

    model = saved_model(tmp_path / "one/run.pth")
    train_paths = find_videos([str(unseen / "train")], "--probe_dir")
    val_paths = find_videos([str(unseen / "val")], "--probe_dir")
    assert len(val_paths) == 11
    assert one["val_loss"] == pytest.approx(plain_validation_loss(model, val_paths), rel=1e-6)
    train, labels = plain_features(model, train_paths)
    val, val_labels = plain_features(model, val_paths)
    mean = train.mean(0)
    std = ((train - mean) ** 2).mean(0).sqrt() + 1e-6
    for name, plain in (("knn", plain_knn), ("linear", plain_ridge)):
        classes = plain((train - mean) / std, labels, (val - mean) / std)
        correct = (classes == val_labels).sum().item()
        assert one[f"probe_{name}_acc1"] == pytest.approx(100 * correct / 11)


def read_views(paths: list[str], out, collate_fn):
    """Return batches of three videos with two 8-frame views each."""
    dataset = ViewDataset(
        paths=paths,
        labels=[0] * len(paths),
        sampling=ClipSampling(8, 1, 30),
        num_views=2,
        transform=view_transform(32, 1),
        decoder="pyav",
        short_side=48,
    )
    workers = WorkerSettings(0, False, 60, out / "quarantine.csv")
    env = DistEnv(torch.device("cpu"))
    return eval_loader(dataset, 3, workers, env, collate_fn)()


def mean_colors(clips: torch.Tensor) -> torch.Tensor:
    """Return the mean color (B, 3) of clips (B, 3, T, H, W) uint8."""
    return clips.float().mean((2, 3, 4))


def prepare_clips(clips: torch.Tensor) -> torch.Tensor:
    """Return normalized clips."""
    return normalize(clips, VIDEO_MEAN, VIDEO_STD)


@pytest.fixture
def with_broken(videos, tmp_path):
    """Return eight readable videos, and a list of them with five unreadable files in between."""
    readable = find_videos([videos], "videos")
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    missing = str(tmp_path / "missing.mp4")
    broken = [*readable[:1], str(text), *readable[1:5], missing, str(text), missing, *readable[5:]]
    return readable, [*broken, str(text)]


def test_unreadable_samples_are_left_out_of_features(with_broken, tmp_path):
    readable, broken = with_broken
    batches = read_views(readable, tmp_path, collate)
    expected = features(mean_colors, batches, 4, torch.float32)
    assert len(expected.unique(dim=0)) == 8
    batches = read_views(broken, tmp_path, collate_readable)
    skipped = {}

    def skip(batch):
        skipped.update(batch["unreadable"])

    rows = feature_rows(mean_colors, batches, 4, torch.float32, skip)
    table, unreadable = gather_readable(rows, skipped)
    assert torch.equal(table["features"], expected)
    assert table["index"].tolist() == [0, 2, 3, 4, 5, 9, 10, 11]
    assert list(unreadable) == [1, 6, 7, 8, 12]
    assert unreadable[6] == unreadable[8] == "No such file or directory"
    assert unreadable[1] == unreadable[7] == unreadable[12] != unreadable[6]


def test_unreadable_samples_are_left_out_of_predictions(with_broken, tmp_path):
    readable, broken = with_broken
    model = tiny_vit()
    batches = read_views(readable, tmp_path, collate)
    expected = evaluate(model, batches, 4, prepare_clips, torch.float32)
    batches = read_views(broken, tmp_path, collate_readable)
    table, unreadable = predict(model, batches, 4, prepare_clips, torch.float32)
    assert torch.equal(table["top"], expected.top)
    assert torch.equal(table["top_scores"], expected.top_scores)
    assert list(unreadable) == [1, 6, 7, 8, 12]


def test_a_pass_without_readable_samples_is_empty(with_broken, tmp_path):
    _, broken = with_broken
    batches = read_views(broken[6:9], tmp_path, collate_readable)
    table, unreadable = predict(tiny_vit(), batches, 4, prepare_clips, torch.float32)
    assert table == {}
    assert list(unreadable) == [0, 1, 2]


@pytest.mark.parametrize("collate_fn", [collate, collate_readable])
def test_an_unreadable_sample_ends_an_evaluation(collate_fn, with_broken, tmp_path):
    _, broken = with_broken
    batches = read_views(broken, tmp_path, collate_fn)
    with pytest.raises(UserError, match="validation file .*text.mp4 cannot be read"):
        evaluate(tiny_vit(), batches, 4, prepare_clips, torch.float32)


@pytest.mark.slow
def test_t18_validation_changes_no_weight(videos, unseen, tmp_path):
    flags = "--batch_size_per_gpu 4 --epochs 5".split()
    validation = f"--val_dirs {unseen / 'val'} --probe_dir {unseen} --val_every 2".split()
    pretrain.main(pretrain_command(videos, tmp_path / "without", *flags))
    pretrain.main(pretrain_command(videos, tmp_path / "with", *flags, *validation))
    without_validation = saved_weights(tmp_path / "without")
    with_validation = saved_weights(tmp_path / "with")
    for name in with_validation:
        assert torch.equal(without_validation[name], with_validation[name])
    measured = ["val_loss" in record for record in log_records(tmp_path / "with")]
    assert measured == [False, True, False, True, True]  # and at the end


def validation_losses(out) -> dict[int, float]:
    """Return {epoch: val_loss} of a run's validated epochs."""
    records = log_records(out)
    return {record["epoch"]: record["val_loss"] for record in records if "val_loss" in record}


@pytest.mark.slow
def test_t18_validations_of_a_resumed_run_are_the_same(videos, unseen, tmp_path):
    flags = (
        f"--batch_size_per_gpu 4 --lr 0.001 --min_lr 0.001 --val_dirs {unseen / 'val'} "
        f"--probe_dir {unseen} --val_every 2 --epochs"
    ).split()
    for epochs in ("1", "3", "5"):
        pretrain.main(pretrain_command(videos, tmp_path / "parts", *flags, epochs))
    pretrain.main(pretrain_command(videos, tmp_path / "once", *flags, "5"))
    parts = validation_losses(tmp_path / "parts")
    once = validation_losses(tmp_path / "once")
    assert once.keys() <= parts.keys()
    assert all(parts[epoch] == once[epoch] for epoch in once)
    assert len(set(once.values())) == 3
