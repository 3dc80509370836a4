"""Classification: training that resumes exactly, the best checkpoint, exact evaluation."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from launch import torchrun
from make_videos import write_folder
from runs import (
    VIDEO_FLAGS,
    assert_same_run,
    image_command,
    log_records,
    saved_weights,
    video_command,
)
from signals import count_and_signal
from tiny import tiny_vit

import finetune
import finetune_on_image
from data.clips import ClipSampling, clip_slack, frame_indices, view_start
from data.decode import open_video
from data.transforms import view_transform
from engine_finetune import EvalData, Split, prediction_table
from models_vit import VisionTransformer, normalize
from util import checkpoint, evaluation, train_loop
from util.checkpoint import load
from util.dist import UserError
from util.evaluation import Scores
from util.pixels import VIDEO_MEAN, VIDEO_STD

BATCH = ["--batch_size_per_gpu", "4"]
SPACING = ClipSampling(num_frames=4, sampling_rate=2)


def saved_classifier(path: Path) -> VisionTransformer:
    """Return the model of a finetuning checkpoint, in evaluation mode."""
    state = torch.load(path, weights_only=True)
    others = ("model", "mean", "std", "classes")
    config = {key: value for key, value in state["config"].items() if key not in others}
    model = VisionTransformer(**config)
    model.load_state_dict(state["model"])
    return model.eval()


@torch.no_grad()
def mean_probabilities(
    model: VisionTransformer, path: str, num_clips: int, num_crops: int
) -> torch.Tensor:
    """Return the mean of a video's views' probabilities (K,), computed one view at a time."""
    probabilities = []
    with open_video(path, "pyav", 48) as video:
        slack = clip_slack(video.num_frames, video.fps, SPACING)
        for index in range(num_clips):
            start = view_start(slack, index, num_clips)
            indices = frame_indices(video.num_frames, video.fps, SPACING, start)
            frames = torch.from_numpy(video.read(indices)).permute(0, 3, 1, 2)
            for crop in view_transform(32, num_crops)(frames):  # (T, C, H, W)
                clip = normalize(crop.transpose(0, 1)[None], VIDEO_MEAN, VIDEO_STD)
                probabilities.append(model(clip).softmax(1)[0])
    return torch.stack(probabilities).mean(0)


@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 1), (5, 3)])
def test_t18_evaluation_equals_a_plain_loop_on_any_number_of_ranks(num_clips, num_crops, tmp_path):
    folder = tmp_path / "videos"
    out = tmp_path / "out"
    write_folder(folder, 17)
    finetune.main(video_command(folder, out, *BATCH, "--max_steps", "2"))
    views = f"--test_num_clips {num_clips} --test_num_crops {num_crops}"
    flags = f"--val_dir {folder} --eval {views} --resume {out}/run.pth --output_dir".split()
    command = [*VIDEO_FLAGS, *BATCH, *flags]
    finetune.main([*command, str(tmp_path / "one")])
    done = torchrun("finetune.py", 2, [*command, str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"17 samples, {num_clips * num_crops} views each" in done.stdout
    one = pd.read_csv(tmp_path / "one/run_test_predictions.csv")
    two = pd.read_csv(tmp_path / "two/run_test_predictions.csv")
    assert len(one) == 17 and one["path"].is_unique
    pd.testing.assert_frame_equal(one, two, check_exact=True)

    model = saved_classifier(out / "run.pth")
    for row in one.itertuples():
        mean = mean_probabilities(model, row.path, num_clips, num_crops)
        assert row.score1 == pytest.approx(mean.max().item(), abs=2e-6)
        assert row.top1 == f"class_{mean.argmax().item()}"
        assert row.label == Path(row.path).parent.name


def test_training_repeats_resumes_exactly_and_keeps_the_best(videos, tmp_path):
    flags = "--repeat_aug 2 --rand_aug --mixup 0.8 --cutmix 1 --min_lr 0.001 --epochs".split()
    finetune.main(video_command(videos, tmp_path / "whole", *BATCH, *flags, "4"))
    finetune.main(video_command(videos, tmp_path / "parts", *BATCH, *flags, "2"))
    finetune.main(video_command(videos, tmp_path / "parts", *BATCH, *flags, "4"))
    whole = saved_weights(tmp_path / "whole")
    parts = saved_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    whole_log = log_records(tmp_path / "whole")
    parts_log = log_records(tmp_path / "parts")
    assert [r["test_loss"] for r in whole_log] == [r["test_loss"] for r in parts_log]
    best = torch.load(tmp_path / "parts/run_best.pth", weights_only=True)
    accuracies = [record["test_acc1"] for record in parts_log]
    assert best["best_acc1"] == max(accuracies)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert best["config"]["classes"] == ["class_0", "class_1"]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_t02_stops_in_training_and_in_validation_change_nothing(
    kind, videos, images, tmp_path, monkeypatch
):
    """Send SIGTERM in the first update, then in the first validation, then finish.

    Dropout, drop path and mixing are on.
    """
    flags = (
        "--epochs 3 --batch_size_per_gpu 2 --mixup 0.8 --rand_aug --drop_path_rate 0.2 "
        "--accum_iter 2"
    ).split()
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    if kind == "video":
        main = finetune.main
        updates_per_epoch = 2
        commands = {out: video_command(videos, out, *flags) for out in (whole, parts)}
    else:
        main = finetune_on_image.main
        updates_per_epoch = 3
        commands = {out: image_command(images, out, *flags) for out in (whole, parts)}
    main(commands[whole])
    updates = count_and_signal(monkeypatch, train_loop, "update", at=1)
    count_and_signal(monkeypatch, evaluation, "padded_batches", at=1)
    steps = []
    preempted = []
    for _ in range(3):
        main(commands[parts])
        steps.append(load(parts / "run.pth")["step"])
        preempted.append((parts / "run.PREEMPTED").exists())
    assert steps == [1, updates_per_epoch, 3 * updates_per_epoch]
    assert preempted == [True, True, False]
    assert_same_run(parts, whole)
    assert len(log_records(parts)) == 3
    predictions = "run_predictions.csv"
    assert (parts / predictions).read_bytes() == (whole / predictions).read_bytes()
    main(commands[parts])  # the run is complete: nothing is repeated
    assert log_records(parts) == log_records(whole)
    assert len(updates) == 3 * updates_per_epoch


def test_a_best_checkpoint_without_room_is_written_later(images, tmp_path, monkeypatch):
    original = checkpoint.save
    failed = []

    def save(path, state, keep=1):
        if path.name == "run_best.pth" and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        original(path, state, keep)

    monkeypatch.setattr(checkpoint, "save", save)
    flags = "--epochs 4 --batch_size_per_gpu 6 --dropout 0 --min_lr 0.001".split()
    finetune_on_image.main(image_command(images, tmp_path, *flags))
    accuracies = [record["test_acc1"] for record in log_records(tmp_path)]
    best = load(tmp_path / "run_best.pth")
    assert failed
    assert best["epoch"] >= 1
    assert best["best_acc1"] == max(accuracies[1:])


def test_flags_that_group_parameters_otherwise_are_refused(videos, tmp_path):
    flags = [*BATCH, "--max_steps"]
    finetune.main(video_command(videos, tmp_path, *flags, "1"))
    message = "run.pth does not fit .*group the parameters as in that run"
    for change in ("--layer_decay 1", "--weight_decay 0", "--freeze_backbone"):
        with pytest.raises(UserError, match=message) as raised:
            finetune.main(video_command(videos, tmp_path, *flags, "2", *change.split()))
        assert "\n" not in str(raised.value)


def test_each_epoch_requests_its_own_batches(videos, tmp_path, monkeypatch):
    train_loader = finetune.train_loader
    requests = []

    def recording_loader(*arguments):
        batches = train_loader(*arguments)

        def epoch_batches(epoch, updates_done):
            requests.append((epoch, updates_done))
            return batches(epoch, updates_done)

        return epoch_batches

    monkeypatch.setattr(finetune, "train_loader", recording_loader)
    flags = [*BATCH, "--max_steps"]  # two updates per epoch
    finetune.main(video_command(videos, tmp_path, *flags, "3"))
    finetune.main(video_command(videos, tmp_path, *flags, "6"))
    assert requests == [(0, 0), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("sep_pos_embed", [True, False])
def test_folded_static_clips_equal_exact_ones_in_values_and_gradients(sep_pos_embed):
    images = torch.randn(3, 3, 1, 32, 32, dtype=torch.float64)
    model = tiny_vit(sep_pos_embed=sep_pos_embed).double().eval()

    def logits_and_gradients(clips):
        model.zero_grad()
        logits = model(clips)
        logits.square().sum().backward()
        return [logits, *[parameter.grad.clone() for parameter in model.parameters()]]

    exact = logits_and_gradients(images.expand(-1, -1, 8, -1, -1))
    folded = logits_and_gradients(images)
    torch.testing.assert_close(exact, folded, rtol=1e-9, atol=1e-11)


def test_predictions_of_parts_have_the_times_of_the_manifest():
    spans = np.array([[0, math.inf], [1 / 3, 2.5], [3, math.inf]])
    samples = Split(["a.mp4", "b.mp4", "b.mp4"], [0, 1, 1], spans)
    scores = Scores(
        loss=0.0,
        acc1=0.0,
        acc5=0.0,
        labels=torch.tensor([0, 1, 1]),
        top=torch.tensor([[0, 1]] * 3),
        top_scores=torch.tensor([[0.75, 0.25]] * 3),
    )
    columns = prediction_table(scores, EvalData(["run", "jump"], samples, iter, views=1))
    assert list(columns)[:5] == ["path", "start", "end", "label", "top1"]
    assert columns["start"] == ["0.0", "0.3333333333333333", "3.0"]
    assert columns["end"] == ["", "2.5", ""]
