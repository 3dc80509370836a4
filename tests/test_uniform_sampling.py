"""Uniform sampling takes a frame from each of T equal parts of a video, as in the papers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from clip_dataset import SEED, clip_dataset
from make_videos import frame_number, write_frames, write_video
from runs import log_records, pretrain_command, saved_weights, video_command
from tiny import same
from video_matrix import H264, IRREGULAR
from video_writer import Case, number_of, write_case

import finetune
import pretrain
from data.clips import ClipSampling, clip_indices, view_starts
from data.datasets import ViewDataset
from data.input_files import ReadError
from tools import extract_features, predict
from util.checkpoint import load
from util.dist import UserError
from util.seeds import derive_seed, fork_rng

UNIFORM = ClipSampling(num_frames=4, sampling_rate=2, method="uniform")
TOOL = "--device cpu --num_workers 0 --batch_size_per_gpu 4".split()


def steady(num_frames: int, fps: float = 30):
    """Return what the choice of frames needs of a video of constant rate."""
    return SimpleNamespace(num_frames=num_frames, fps=fps, times=None)


def views(video, num_frames: int, num_views: int, span=None) -> list[list[int]]:
    """Return the frames of each view of a uniform clip."""
    sampling = ClipSampling(num_frames, 4, method="uniform")
    starts = view_starts(video, sampling, num_views, span)
    return [clip_indices(video, sampling, start, span).tolist() for start in starts]


def paper_views(n: int, T: int, K: int) -> list[list[int]]:
    """Return the frames of K views by the formulas of TSN (K = 1) and VideoMAE (K = 2).

    With whole numbers: int(n / (2 T) + i n / T), and int(i n / T + k n / (K T)).
    """
    if K == 1:
        return [[(n + 2 * i * n) // (2 * T) for i in range(T)]]
    return [[(K * i * n + k * n) // (K * T) for i in range(T)] for k in range(K)]


def test_a_table_of_views():
    assert views(steady(40), 4, 1) == [[5, 15, 25, 35]]
    assert views(steady(40), 4, 2) == [[0, 10, 20, 30], [5, 15, 25, 35]]
    assert views(steady(10), 4, 1) == [[1, 3, 6, 8]]
    assert views(steady(10), 4, 2) == [[0, 2, 5, 7], [1, 3, 6, 8]]
    assert views(steady(3), 4, 1) == [[0, 1, 1, 2]]
    assert views(steady(1), 4, 2) == [[0] * 4] * 2
    dense = ClipSampling(num_frames=4, sampling_rate=2)
    starts = view_starts(steady(40), dense, 2, None)
    assert starts == [0.0, 1.0]
    indices = [clip_indices(steady(40), dense, start).tolist() for start in starts]
    assert indices == [[0, 2, 4, 7], [32, 34, 36, 39]]  # 8 frames, ends included
    assert view_starts(steady(40), dense, 1, None) == [0.5]


@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
def test_views_follow_the_formulas_for_any_length(num_views):
    for n in [*range(1, 200), 2997, 100_003]:
        for T in (1, 4, 7, 16):
            assert views(steady(n), T, num_views) == paper_views(n, T, num_views)


def test_training_draws_one_frame_of_each_part():
    drawn = set()
    draws = np.random.default_rng(0)
    for n, T in ((43, 4), (16, 16), (300, 16), (5, 8), (1, 2)):
        a = n // T
        for _ in range(200):
            u = draws.random(T)
            found = clip_indices(steady(n), ClipSampling(T, 4, method="uniform"), u).tolist()
            if a == 0:
                assert found == [min(int(i * n / T), n - 1) for i in range(T)]
                continue
            assert found == [i * a + int(u[i] * a) for i in range(T)]
            if n == 43:
                drawn |= set(found)
    assert drawn == set(range(40))  # each frame of each part


@pytest.mark.parametrize("fps", [12, 29.97, 60])
def test_spans_and_times_are_sampled_like_videos(fps):
    times = np.arange(240) / fps
    for first, last in ((0, 239), (7, 50), (100, 102), (239, 239)):
        span = (first / fps, (last + 1) / fps)
        n = last - first + 1
        uneven = SimpleNamespace(num_frames=240, fps=fps, times=times)
        for num_views in (1, 2, 5):
            expected = first + np.array(paper_views(n, 8, num_views))
            for video in (steady(240, fps), uneven):
                assert np.array_equal(views(video, 8, num_views, span), expected)
        u = np.random.default_rng(first).random(8)
        by_time = clip_indices(uneven, ClipSampling(8, 4, method="uniform"), u, span)
        assert by_time.tolist() == [first + int((i + u[i]) * n / 8 + 1e-9) for i in range(8)]
    whole = SimpleNamespace(num_frames=240, fps=fps, times=times)
    assert views(whole, 8, 2) == paper_views(240, 8, 2)
    with pytest.raises(ReadError, match="its part starts at"):
        views(steady(240, fps), 8, 1, (240 / fps, 250 / fps))


def test_parts_of_a_variable_rate_have_equal_durations():
    times = np.array([0.0, 0.1, 0.2, 3.0, 3.1, 3.9])  # it lasts 4 s: the median distance is 0.1
    video = SimpleNamespace(num_frames=6, fps=1.5, times=times)
    assert views(video, 4, 1) == [[2, 2, 2, 4]]  # shown at 0.5, 1.5, 2.5, 3.5 s
    assert views(video, 4, 2) == [[0, 2, 2, 3], [2, 2, 2, 4]]
    assert views(video, 2, 1, (0.15, 3.05)) == [[2, 2]]  # at 0.875 and 2.325 s
    assert views(video, 2, 2, (0.15, 3.05))[0] == [1, 2]


def shown(clips: torch.Tensor, read=frame_number) -> list[list[int]]:
    """Return the numbers that the frames of clips (R, C, T, H, W) show, clip by clip."""
    return [[read(frame) for frame in clip] for clip in clips.permute(0, 2, 3, 4, 1).numpy()]


def view_dataset(path: str, num_views: int, spans=None) -> ViewDataset:
    """Return uncropped views of one video or folder of frames."""
    return ViewDataset(
        paths=[path] * (len(spans) if spans else 1),
        labels=[-1] * (len(spans) if spans else 1),
        sampling=UNIFORM,
        num_views=num_views,
        transform=lambda frames: frames[None],
        decoder="pyav",
        short_side=64,
        spans=spans,
        frames_fps=30.0,
    )


@pytest.mark.parametrize("write", [write_video, write_frames])
def test_the_frames_read_are_those_of_the_parts(tmp_path, write):
    path = str(write(tmp_path / "v.mp4", frames=90))
    for num_views in (1, 2, 5):
        sample = view_dataset(path, num_views)[(0, 0)]
        assert shown(sample["clips"]) == paper_views(90, 4, num_views)
    data = view_dataset(path, 2, [(0, 1), (1, 2), (2, 9)])
    for index in range(3):
        expected = 30 * index + np.array(paper_views(30, 4, 2))
        assert shown(data[(0, index)]["clips"]) == expected.tolist()


def test_frames_of_a_variable_rate_are_shown_in_the_middle_of_parts(tmp_path):
    case = Case("uneven.mkv", "7 to 56 ms between frames", H264._replace(times_ms=IRREGULAR))
    path = str(write_case(case, tmp_path))
    times = np.array(case.seconds)
    duration = times[-1] + np.median(np.diff(times))
    middles = (np.arange(4) + 0.5) * duration / 4
    (clip,) = shown(view_dataset(path, 1)[(0, 0)]["clips"], number_of)
    for number, middle in zip(clip, middles, strict=True):
        assert number in {sum(times <= middle + error) - 1 for error in (-0.002, 0, 0.002)}


def test_a_clip_draws_its_parts_and_then_its_crop(tmp_path):
    path = str(write_frames(tmp_path / "v", frames=90))
    options = {"sampling": UNIFORM, "frames_fps": 30.0, "repeat_aug": 4, "repeat_windows": 2}
    whole = clip_dataset([path], **options, transform=lambda window: window)
    data = clip_dataset([path], **options)
    windows = whole[(1, 0)]["clips"]
    clips = data[(1, 0)]["clips"]
    for repeat in range(4):
        with fork_rng(derive_seed(SEED, 1, 0, repeat - repeat % 2)):
            u = torch.rand(4).double()
        assert shown(windows)[repeat] == [22 * i + int(u[i] * 22) for i in range(4)]
        with fork_rng(derive_seed(SEED, 1, 0, repeat)):
            torch.rand(4)
            crop = data.transform(windows[repeat].transpose(0, 1))
        assert torch.equal(clips[repeat], crop.transpose(0, 1))
    assert shown(windows)[0] != shown(windows)[2]


@pytest.fixture(scope="module")
def finetuned(videos, tmp_path_factory) -> str:
    """Return the checkpoint of a classifier of uniform clips."""
    out = tmp_path_factory.mktemp("uniform")
    finetune.main(uniform_command(videos, out))
    return f"{out}/run.pth"


def uniform_command(folder, out, *more) -> list[str]:
    """Return a finetuning command with uniform sampling, of two updates."""
    command = video_command(folder, out, "--sampling", "uniform", "--batch_size_per_gpu", "4")
    at = command.index("--sampling_rate")
    return [*command[:at], *command[at + 2 :], "--max_steps", "2", *more]


def test_a_stopped_run_of_uniform_clips_ends_the_same(finetuned, videos, tmp_path):
    finetune.main([*uniform_command(videos, tmp_path), "--max_steps", "1"])
    finetune.main(uniform_command(videos, tmp_path, "--num_workers", "2"))
    assert same(saved_weights(Path(finetuned).parent), saved_weights(tmp_path))


def test_the_checkpoint_records_its_sampling(finetuned, videos, tmp_path, capsys):
    assert load(finetuned)["args"]["sampling"] == "uniform"
    flags = ["--val_dir", videos, "--device", "cpu", "--num_workers", "0", "--short_side", "48"]
    evaluate = ["--eval", "--resume", finetuned, *flags, "--output_dir", str(tmp_path)]
    evaluate += ["--save_prefix", "run"]
    capsys.readouterr()
    finetune.main(evaluate)
    printed = capsys.readouterr().out
    assert "spread over the video" in printed
    expected = log_records(Path(finetuned).parent)[-1]["test_acc1"]
    assert f"top-1 {expected:.2f} %" in printed
    evaluated = pd.read_csv(tmp_path / "run_test_predictions.csv")
    source = ["--checkpoint", finetuned, videos, *TOOL, "--short_side", "48"]
    for name, more in (("uniform", []), ("dense", ["--sampling", "dense"])):
        predict.main([*source, "--output", str(tmp_path / f"{name}.csv"), *more])
    assert "uniform sampling" in capsys.readouterr().out
    scores = [pd.read_csv(tmp_path / f"{name}.csv")["score1"] for name in ("uniform", "dense")]
    assert evaluated["score1"].tolist() == pytest.approx(scores[0].tolist(), abs=1e-5)
    assert not np.allclose(*scores)
    finetune.main([*evaluate, "--sampling", "dense"])
    assert "--sampling dense replaces the uniform of" in capsys.readouterr().out
    pretrain_flags = pretrain_command(videos, tmp_path, "--max_steps", "1")
    at = pretrain_flags.index("--sampling_rate")
    del pretrain_flags[at : at + 2]
    pretrain.main([*pretrain_flags, "--sampling", "uniform"])
    start = ["--finetune", f"{tmp_path}/run.pth", "--max_steps", "1", "--save_prefix", "next"]
    command = uniform_command(videos, tmp_path, *start)
    at = command.index("--sampling")
    finetune.main(command[:at] + command[at + 2 :])
    assert load(tmp_path / "next.pth")["args"]["sampling"] == "uniform"


def test_a_rate_has_no_effect_on_uniform_clips(finetuned, videos, tmp_path):
    message = "has no effect on uniform sampling.* or pass --sampling dense"
    out = tmp_path / "out"
    for more in (["--sampling_rate", "2"], ["--target_fps", "25"]):
        with pytest.raises(UserError, match=f"{more[0]} .*{message}"):
            finetune.main(uniform_command(videos, out, *more))
        with pytest.raises(UserError, match=message):
            predict.main(["--checkpoint", finetuned, videos, *TOOL, *more])
    flags = ["--data_dir", videos, *TOOL, "--output", str(out / "f.npz")]
    with pytest.raises(UserError, match="--stride_seconds cuts .* --sampling dense"):
        extract_features.main([finetuned, *flags, "--stride_seconds", "1"])
    assert not out.exists()


def test_features_of_another_sampling_do_not_mix(finetuned, videos, tmp_path):
    flags = ["--data_dir", videos, *TOOL, "--short_side", "48", "--output"]
    extract_features.main([finetuned, *flags, f"{tmp_path}/uniform/"])
    extract_features.main([finetuned, *flags, f"{tmp_path}/uniform/"])
    extract_features.main([finetuned, *flags, f"{tmp_path}/dense/", "--sampling", "dense"])
    with pytest.raises(UserError, match="sampling_rate: None there"):
        extract_features.main([finetuned, *flags, f"{tmp_path}/uniform/", "--sampling", "dense"])
    with pytest.raises(UserError, match="sampling: None there, uniform now"):
        extract_features.main([finetuned, *flags, f"{tmp_path}/dense/"])
