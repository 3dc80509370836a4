"""Probes: heads on a frozen encoder, against plain loops; which clips are decoded, and when."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from launch import torchrun
from plain_probe import PlainPool, trained_plainly
from runs import (
    VIDEO_FLAGS,
    assert_same_run,
    center_clip,
    image_command,
    log_records,
    output_flags,
    pretrained_checkpoint,
    saved_weights,
    video_command,
)
from signals import count_and_signal
from tiny import same, tiny_vit
from torch import nn

import finetune
import finetune_on_image
from data.datasets import SUBSTITUTES, ImageDataset, SampleDataset, ViewDataset
from engine_finetune import Split
from models_vit import AttentivePool, VisionTransformer
from tools import convert_checkpoint, extract_features, inspect_checkpoint, predict
from util import evaluation, frozen_features, train_loop
from util.checkpoint import load
from util.dist import UserError
from util.pretrained import load_classifier, load_encoder
from util.probe_heads import ProbeHeads
from util.seeds import derive_seed

LRS = (0.003, 0.02)
EPOCHS = 3
BATCH = 4
ORDER_STREAM = 3


@pytest.fixture(scope="module")
def encoder(videos, tmp_path_factory) -> str:
    """Return the path of a pretraining checkpoint: 8 frames of 24 pixels.

    Its last norm is a random one, so that it matters whether the head's input is normalized.
    """
    path = pretrained_checkpoint(videos, tmp_path_factory.mktemp("mae"))
    state = load(path)
    generator = torch.Generator().manual_seed(0)
    for name in ("norm.weight", "norm.bias"):
        state["model"][name] = 0.5 + torch.rand(64, generator=generator)
    torch.save(state, path)
    return path


def without_lr(command: list[str]) -> list[str]:
    """Return a command without its --lr, which probes refuse."""
    at = command.index("--lr")
    return command[:at] + command[at + 2 :]


def probe_command(videos, out, encoder: str, *more) -> list[str]:
    """Return a command line of a small probe that validates on its training videos."""
    flags = (
        f"--finetune {encoder} --img_size 24 --num_frames 8 --batch_size_per_gpu {BATCH} "
        f"--epochs {EPOCHS} --probe_lrs {' '.join(map(str, LRS))}"
    )
    return without_lr(video_command(videos, out, *flags.split(), *more))


def epoch_batches(n: int) -> list:
    """Return the indices of each update of a run of EPOCHS on n samples."""
    batches = []
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(derive_seed(0, epoch, ORDER_STREAM))
        order = torch.randperm(n, generator=generator)
        batches += order[: n // BATCH * BATCH].split(BATCH)
    return batches


@torch.no_grad()
def plain_tokens(encoder: str, paths: list[str]) -> torch.Tensor:
    """Return the tokens before the norm (n, 1 + L, D) of each video's center clip."""
    model = load_encoder(encoder)
    clips = [center_clip(path, num_frames=8, img_size=24) for path in paths]
    return torch.cat([model.encode(clip) for clip in clips])


def new_head(encoder: str, kind: str) -> VisionTransformer:
    """Return a classifier whose head is as at the start of a run with seed 0."""
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_frames")
    config = load(encoder)["config"]
    sizes = {name: config[name] for name in (*names, "t_patch_size")}
    torch.manual_seed(derive_seed(0))
    return VisionTransformer(
        **sizes, num_classes=2, dropout=0.0, drop_path_rate=0.0, attentive_pool=kind == "attentive"
    )


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_equals_a_plain_loop_for_each_learning_rate(kind, videos, encoder, tmp_path):
    finetune.main(probe_command(videos, tmp_path, encoder, "--probe", kind))
    paths = pd.read_csv(tmp_path / "run_train.csv")["path"].tolist()
    labels = torch.tensor([int(Path(path).parent.name[-1]) for path in paths])
    norm = load_encoder(encoder).norm.requires_grad_(False)
    tokens = plain_tokens(encoder, paths)
    features = norm(tokens)
    if kind == "linear":
        features = norm(tokens[:, 1:].mean(1))
        features = nn.BatchNorm1d(64, eps=1e-6, affine=False)(features)
    accuracies = {}
    losses = {}
    logits = {}
    for lr in LRS:
        start = new_head(encoder, kind)
        head = start.head
        if kind == "attentive":
            head = PlainPool(start.attentive_pool, start.head)
        head = trained_plainly(head, features, labels, lr, epoch_batches(len(paths)))
        with torch.no_grad():
            logits[lr] = head(features)
        accuracies[lr] = 100 * (logits[lr].argmax(1) == labels).double().mean().item()
        losses[lr] = F.cross_entropy(logits[lr], labels).item()
    record = log_records(tmp_path)[-1]
    assert {lr: record[f"test_lr{lr:g}_acc1"] for lr in LRS} == pytest.approx(accuracies)
    best = max(LRS, key=lambda lr: (accuracies[lr], -losses[lr]))
    assert record["test_acc1"] == pytest.approx(accuracies[best])
    assert record["test_loss"] == pytest.approx(losses[best], rel=1e-3)
    assert not torch.allclose(*logits.values(), rtol=0.1)

    model = load_classifier(tmp_path / "run.pth")
    clips = torch.cat([center_clip(path, num_frames=8, img_size=24) for path in paths])
    with torch.no_grad():
        torch.testing.assert_close(model(clips), logits[best], rtol=1e-2, atol=2e-3)
    before = load(encoder)["model"]
    after = saved_weights(tmp_path)
    shared = before.keys() & after.keys()
    assert len(shared) == 40
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_a_linear_probe_normalizes_like_batch_norm():
    """Also features that are constant but for rounding, whose noise must not be amplified."""
    features = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    features *= torch.logspace(-9, 2, 64)
    features += 3
    heads = ProbeHeads(tiny_vit(), 1)
    heads.standardize_by(features)
    head = heads.heads[0].head
    normalized = nn.BatchNorm1d(64, eps=1e-6, affine=False)(features)
    torch.testing.assert_close(heads(features)[:, 0], head(normalized), rtol=1e-3, atol=1e-3)


def test_an_attentive_pool_is_torchs_attention_of_one_query():
    torch.manual_seed(0)
    pool = AttentivePool(24, 3, 2.0)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)
    plain = PlainPool(pool, nn.Linear(24, 24)).double()
    with torch.no_grad():
        plain.head.weight.copy_(torch.eye(24))
        plain.head.bias.zero_()
    pool.double()
    tokens = torch.randn(5, 7, 24, dtype=torch.float64)
    gradients = []
    for module in (pool, plain):
        values = module(tokens)
        values.square().mean().backward()
        gradients.append(values)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    gradient = plain.attention.in_proj_weight.grad
    maps = torch.cat([pool.q.weight.grad, pool.k.weight.grad, pool.v.weight.grad])
    torch.testing.assert_close(maps, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pool.query.grad, plain.query.grad, rtol=1e-9, atol=1e-9)


def count_reads(monkeypatch) -> Counter:
    """Return a counter of the files that data sets read, by path."""
    original = SampleDataset._read
    reads: Counter = Counter()

    def read(self, key, candidate):
        reads[type(self).__name__, self.paths[candidate]] += 1
        return original(self, key, candidate)

    monkeypatch.setattr(SampleDataset, "_read", read)
    return reads


def read_counts(reads: Counter, dataset: type) -> set[int]:
    """Return the numbers of times that files were read by a data set of this type."""
    counts = {count for (name, _), count in reads.items() if name == dataset.__name__}
    reads.clear()
    return counts


def test_each_clip_is_decoded_once_unless_the_tokens_are_too_large(
    videos, encoder, tmp_path, monkeypatch, capsys
):
    """The files are those of both sets: once for each set is twice."""
    reads = count_reads(monkeypatch)
    finetune.main(probe_command(videos, tmp_path / "linear", encoder, "--probe", "linear"))
    assert read_counts(reads, ViewDataset) == {2}
    assert "each clip is encoded once" in capsys.readouterr().out
    finetune.main(probe_command(videos, tmp_path / "kept", encoder, "--probe", "attentive"))
    assert read_counts(reads, ViewDataset) == {2}
    again = probe_command(videos, tmp_path / "again", encoder, "--probe", "attentive")
    finetune.main([*again, "--cache_gib", "0.0001"])
    assert read_counts(reads, ViewDataset) == {2 * EPOCHS}
    # 37 tokens of 64 floats, of 16 clips
    printed = capsys.readouterr().out
    assert "need 0.000141 GiB on a machine, of --cache_gib 0.0001; too much" in printed
    assert same(saved_weights(tmp_path / "kept"), saved_weights(tmp_path / "again"))
    assert log_records(tmp_path / "kept") == log_records(tmp_path / "again")


def test_a_substitute_is_the_same_in_each_epoch_of_a_probe(videos, images):
    """Otherwise features that are kept would differ from those that are encoded again."""
    args = finetune.get_parser().parse_args(
        without_lr(video_command(videos, "unused", "--img_size", "24"))
    )
    for maker, folder, more in (
        (finetune.center_views, videos, [""]),
        (finetune_on_image.center_images, images, []),
    ):
        paths = [str(path) for path in sorted(Path(folder).glob("*/*"))][:4]
        split = Split(["missing", *paths], [0] * 5)
        dataset = maker(args, split, *more, substitutes=SUBSTITUTES)
        read = [dataset[epoch, 0]["path"] for epoch in range(6)]
        assert set(read) <= set(paths)
        assert len(set(read)) == 1


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_heads_trained_at_once_equal_heads_trained_alone(kind, videos, encoder, tmp_path):
    finetune.main(probe_command(videos, tmp_path / "both", encoder, "--probe", kind))
    both = saved_weights(tmp_path / "both")
    for index, lr in enumerate(LRS):
        flags = ["--probe", kind, "--probe_lrs", str(lr)]
        finetune.main(probe_command(videos, tmp_path / f"{lr}", encoder, *flags))
        alone = saved_weights(tmp_path / f"{lr}")
        names = [name for name in alone if name.startswith("probe_heads.heads.0.")]
        assert len(names) == (2 if kind == "linear" else 18)
        for name in names:
            assert torch.equal(alone[name], both[name.replace("heads.0", f"heads.{index}")])


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_stopped_at_any_point_resumes_exactly(kind, videos, encoder, tmp_path, monkeypatch):
    """Stop while the clips are encoded, in the first update, and in the first validation."""
    flags = ["--probe", kind, "--accum_iter", "2", "--batch_size_per_gpu", "2"]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    finetune.main(probe_command(videos, whole, encoder, *flags))
    command = probe_command(videos, parts, encoder, *flags)
    updates = count_and_signal(monkeypatch, train_loop, "update", at=1)
    encoded = count_and_signal(monkeypatch, frozen_features, "padded_batches", at=1)
    validated = count_and_signal(monkeypatch, evaluation, "padded_batches", at=1)
    done = []
    for start in range(4):
        finetune.main(command)
        done.append((len(updates), len(validated), (parts / "run.PREEMPTED").exists()))
        if start == 1:
            with pytest.raises(UserError, match="run.pth has no classifier yet: it is a probe"):
                load_classifier(parts / "run.pth")
    updates_per_epoch = 2
    assert done == [
        (0, 0, True),
        (1, 0, True),
        (updates_per_epoch, 1, True),
        (EPOCHS * updates_per_epoch, EPOCHS + 1, False),
    ]
    assert len(encoded) == 7  # the first start encodes one set, the others both
    assert_same_run(parts, whole)
    tables = [(out / "run_probe.csv").read_bytes() for out in (parts, whole)]
    assert tables[0] == tables[1]


def test_two_processes_train_the_same_probe(videos, encoder, tmp_path):
    flags = ["--probe", "attentive", "--probe_lrs", "0.001", "0.0001"]
    finetune.main(probe_command(videos, tmp_path / "one", encoder, *flags))
    flags += ["--batch_size_per_gpu", str(BATCH // 2)]
    done = torchrun("finetune.py", 2, probe_command(videos, tmp_path / "two", encoder, *flags))
    assert done.returncode == 0, done.stderr[-2000:]
    one = saved_weights(tmp_path / "one")
    two = saved_weights(tmp_path / "two")
    torch.testing.assert_close(one, two, rtol=1e-3, atol=5e-4)
    records = zip(log_records(tmp_path / "one"), log_records(tmp_path / "two"), strict=True)
    for first, second in records:
        assert first["test_acc1"] == second["test_acc1"]
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probes_checkpoint_is_a_classifier_for_every_reader(
    kind, videos, encoder, tmp_path, capsys
):
    out = tmp_path / "probe"
    finetune.main(probe_command(videos, out, encoder, "--probe", kind))
    table = pd.read_csv(out / "run_probe.csv")
    assert table["lr"].tolist() == list(LRS)
    acc1 = table["test_acc1"].max()
    assert acc1 == max(record["test_acc1"] for record in log_records(out))

    test = ["--val_dir", videos, "--eval", *output_flags(out), "--batch_size_per_gpu", "4"]
    sizes = {"--img_size", "--num_frames", "--patch_size", "--model", "--num_classes"}
    flags = VIDEO_FLAGS[:]
    for name in sizes | {"--lr"}:
        at = flags.index(name)
        del flags[at : at + 2]
    finetune.main([*flags, *test])
    printed = capsys.readouterr().out
    assert f"top-1 {acc1:.2f} %" in printed
    assert "\n  initialized  -\n" in printed
    trained = pd.read_csv(out / "run_predictions.csv").set_index("path")
    tested = pd.read_csv(out / "run_test_predictions.csv").set_index("path")
    pd.testing.assert_frame_equal(trained, tested.loc[trained.index], atol=2e-5)

    convert_checkpoint.main([f"{out}/run_best.pth", f"{out}/hub", "--to", "safetensors"])
    predictions = f"{tmp_path}/predictions.csv"
    predict.main(
        [videos, "--checkpoint", f"{out}/hub", "--output", predictions]
        + "--device cpu --num_workers 0 --short_side 48 --decoder pyav".split()
    )
    predicted = pd.read_csv(predictions).set_index("path")
    expected = trained.loc[predicted.index]
    assert predicted["top1"].tolist() == expected["top1"].tolist()
    assert predicted["score1"].tolist() == pytest.approx(expected["score1"].tolist(), abs=2e-5)
    capsys.readouterr()
    inspect_checkpoint.main([f"{out}/run.pth"])
    read_out = {"linear": "mean of the patch tokens", "attentive": "all tokens by attention"}
    printed = capsys.readouterr().out
    assert read_out[kind] in printed
    assert f"config probe        {kind}".replace(" ", "") in printed.replace(" ", "")

    again = ["--finetune", f"{out}/run_best.pth", "--max_steps", "1", "--batch_size_per_gpu", "4"]
    sizes_of_run = ["--img_size", "24", "--num_frames", "8"]
    finetune.main(video_command(videos, tmp_path / "tuned", *again, *sizes_of_run))
    kept = {"linear": "is kept: it has the same 2 classes", "attentive": "is an attentive probe"}
    assert kept[kind] in capsys.readouterr().out
    assert load_encoder(out / "run_best.pth").num_tokens == 36

    extract_features.main(
        [f"{out}/run_best.pth", "--data_dir", videos, "--output", f"{out}/features.npz"]
        + "--device cpu --num_workers 0 --short_side 48 --decoder pyav".split()
    )
    printed = capsys.readouterr().out
    assert ("the mean of the patch tokens, without its pool" in printed) == (kind == "attentive")


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_an_augmented_probe_draws_new_clips_in_each_epoch(
    kind, videos, encoder, tmp_path, monkeypatch
):
    reads = count_reads(monkeypatch)
    flags = f"--probe {kind} --probe_augment --repeat_aug 2 --mixup 0.8 --rand_aug".split()
    finetune.main(probe_command(videos, tmp_path / "whole", encoder, *flags))
    views = {name: count for (name, _), count in reads.items() if name == "ViewDataset"}
    clips = {name: count for (name, _), count in reads.items() if name == "ClipDataset"}
    assert clips == {"ClipDataset": EPOCHS}
    assert views == {"ViewDataset": 2 if kind == "linear" else 1}
    plain = ["--probe", kind]
    finetune.main(probe_command(videos, tmp_path / "plain", encoder, *plain))
    drawn = saved_weights(tmp_path / "whole")
    fixed = saved_weights(tmp_path / "plain")
    if kind == "linear":
        assert torch.equal(drawn["probe_heads.mean"], fixed["probe_heads.mean"])
    assert not torch.allclose(
        drawn["probe_heads.heads.0.head.weight"], fixed["probe_heads.heads.0.head.weight"]
    )
    command = probe_command(videos, tmp_path / "parts", encoder, *flags)
    count_and_signal(monkeypatch, train_loop, "update", at=3)
    for _ in range(2):
        finetune.main(command)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("static_clip", ["exact", "folded"])
def test_images_are_probed_like_videos(static_clip, images, tmp_path, monkeypatch):
    reads = count_reads(monkeypatch)
    flags = f"--probe attentive --epochs 4 --batch_size_per_gpu 6 --static_clip {static_clip}"
    finetune_on_image.main(without_lr(image_command(images, tmp_path, *flags.split())))
    assert read_counts(reads, ImageDataset) == {2}
    assert log_records(tmp_path)[-1]["test_acc1"] == 100  # dark and bright images
    count = count_reads(monkeypatch)
    more = [*flags.split(), "--probe_augment"]
    finetune_on_image.main(without_lr(image_command(images, tmp_path / "augmented", *more)))
    assert read_counts(count, ImageDataset) == {1 + 4}


REFUSED = {
    "--lr 1": "--lr has no effect with --probe linear",
    "--ema 0.9": "--ema has no effect with --probe linear",
    "--freeze_backbone": "--freeze_backbone has no effect with --probe linear",
    "--no-flip": "--flip has no effect with --probe. Drop it, or add --probe_augment",
    "--mixup 0.8": "--mixup has no effect with --probe. Drop it, or add --probe_augment",
    "--cache_gib 1": "--cache_gib has no effect with --probe linear",
    "--probe attentive --cls_token": "--global_pool or --cls_token has no effect with --probe att",
    "--probe_lrs 1 0.1 1.0000001": "--probe_lrs 1 0.1 1 has a learning rate twice",
    "--probe_lrs 0": "0 is not a positive number",
    "--eval": "--probe has no effect with --eval",
    "--probe=": "--probe_lrs has no effect without --probe. Drop it, or choose a probe",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_a_probe_cannot_use_are_refused(flags, videos, encoder, tmp_path):
    flags_of_run = ["--probe", "linear", *flags.split()]
    with pytest.raises(UserError) as raised:
        finetune.main(probe_command(videos, tmp_path, encoder, *flags_of_run))
    assert REFUSED[flags] in str(raised.value)
    assert not (tmp_path / "run.pth").exists()


def test_a_run_keeps_its_kind_of_probe(videos, encoder, tmp_path, capsys):
    finetune.main(probe_command(videos, tmp_path, encoder, "--probe", "linear"))
    saved = (tmp_path / "run.pth").read_bytes()
    other = probe_command(videos, tmp_path, encoder, "--probe", "attentive")
    with pytest.raises(UserError, match="is of a run with --probe linear, not attentive"):
        finetune.main(other)
    with pytest.raises(UserError, match="is of a run with --probe linear, not ''"):
        finetune.main(video_command(videos, tmp_path))
    lrs = ["--probe", "linear", "--probe_lrs", "1", "2"]
    with pytest.raises(UserError, match="different settings .*probe_lrs"):
        finetune.main(probe_command(videos, tmp_path, encoder, *lrs))
    assert (tmp_path / "run.pth").read_bytes() == saved
    flags = "--probe linear --max_steps 1 --batch_size_per_gpu 4".split()
    finetune.main(without_lr(video_command(videos, tmp_path / "random", *flags)))
    assert "reads an encoder that was never trained" in capsys.readouterr().out
    too_large = ["--probe", "linear", "--probe_lrs", "1e38"]
    with pytest.raises(UserError, match="not finite at update 2 .*: lower --probe_lrs and"):
        finetune.main(probe_command(videos, tmp_path / "large", encoder, *too_large))
