"""tools.predict: against plain loops over the files, for videos, images and segments."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from foreign_models import hugging_face_videomae
from launch import ROOT, clean_environment, torchrun_tool
from make_videos import write_video
from PIL import Image
from runs import image_command, pretrained_checkpoint, video_command

import finetune
import finetune_on_image
from data.clips import ClipSampling, clip_slack, frame_indices, view_start
from data.datasets import ViewDataset
from data.decode import open_video
from data.transforms import image_transform, view_transform
from models_vit import VisionTransformer, normalize
from tools import predict
from tools.prediction_tables import (
    Prediction,
    Sample,
    table_lines,
    unreadable_files,
    width_of,
)
from util.dist import UserError
from util.pixels import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD

ONE_STEP = "--max_steps 1 --batch_size_per_gpu 4".split()
SPACING = ClipSampling(num_frames=4, sampling_rate=2)


@pytest.fixture(scope="module")
def finetuned(videos, tmp_path_factory) -> str:
    """Return a checkpoint of finetune.py: 4 frames of 32 pixels, sampling rate 2, two classes."""
    out = tmp_path_factory.mktemp("finetuned")
    finetune.main(video_command(videos, out, *ONE_STEP))
    return f"{out}/run.pth"


@pytest.fixture(scope="module")
def pretrained(videos, tmp_path_factory) -> str:
    """Return a checkpoint of pretrain.py."""
    return pretrained_checkpoint(videos, tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def broken(tmp_path) -> Path:
    """Return a folder of unreadable files: a text and an empty video, a text as image."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    (folder / "text.png").write_text("not an image")
    return folder


def video_paths(folder) -> list[str]:
    """Return the videos of a folder in the order of the tool."""
    return sorted(map(str, Path(folder).glob("*/*.mp4")))


def run_predict(checkpoint, *words) -> None:
    """Run the tool on the CPU."""
    flags = ["--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "4"]
    predict.main(["--checkpoint", str(checkpoint), *map(str, words), *flags])


def predicted(checkpoint, out: Path, *words) -> pd.DataFrame:
    """Run the tool and return the file that it writes."""
    run_predict(checkpoint, *words, "--output", out / "predictions.csv")
    return pd.read_csv(out / "predictions.csv")


def saved_classifier(path) -> VisionTransformer:
    """Return the model of a finetuning checkpoint."""
    state = torch.load(path, weights_only=True)
    names = state["config"].keys() - {"model", "mean", "std", "classes"}
    model = VisionTransformer(**{name: state["config"][name] for name in names})
    model.load_state_dict(state["model"])
    return model.eval()


@torch.no_grad()
def plain_probabilities(model, path: str, windows: int = 1, crops: int = 1) -> torch.Tensor:
    """Return the mean probabilities (K,) of a video's views, each decoded by itself."""
    rows = []
    for window in range(windows):
        with open_video(path, "pyav", 48) as video:
            slack = clip_slack(video.num_frames, video.fps, SPACING)
            start = view_start(slack, window, windows)
            indices = frame_indices(video.num_frames, video.fps, SPACING, start)
            views = view_transform(32, crops)(video.read_tensor(indices))  # (crops, T, 3, S, S)
        for view in views.transpose(1, 2):
            rows.append(model(normalize(view[None], VIDEO_MEAN, VIDEO_STD)).softmax(1)[0])
    return torch.stack(rows).mean(0)


def assert_predicted(row: pd.Series, probabilities: torch.Tensor, classes: list[str]) -> None:
    """Compare a row of the file with the probabilities (K,) of all classes."""
    scores, best = probabilities.sort(descending=True)
    assert pd.isna(row["reason"])
    for rank, (score, index) in enumerate(zip(scores, best, strict=True), 1):
        assert row[f"top{rank}"] == classes[index]
        assert row[f"score{rank}"] == pytest.approx(score.item(), abs=2e-6)


@pytest.mark.parametrize(("windows", "crops"), [(1, 1), (2, 3)])
def test_predictions_equal_a_plain_loop(windows, crops, finetuned, videos, tmp_path):
    table = predicted(finetuned, tmp_path, videos, "--views", f"{windows}x{crops}")
    model = saved_classifier(finetuned)
    assert table.columns.tolist() == ["path", "top1", "score1", "top2", "score2", "reason"]
    assert table["path"].tolist() == video_paths(videos)
    for _, row in table.iterrows():
        probabilities = plain_probabilities(model, row["path"], windows, crops)
        assert_predicted(row, probabilities, ["class_0", "class_1"])
    assert table["score1"].nunique() == 8


def test_predictions_are_those_of_an_evaluation(finetuned, videos, tmp_path):
    views = "--eval --test_num_clips 2 --test_num_crops 3 --batch_size_per_gpu 4".split()
    command = video_command(videos, tmp_path, *views, "--resume", finetuned)
    finetune.main(command)
    evaluated = pd.read_csv(tmp_path / "run_test_predictions.csv", dtype=str)
    run_predict(finetuned, videos, "--views", "2x3", "--output", tmp_path / "own.csv")
    own = pd.read_csv(tmp_path / "own.csv", dtype=str)
    columns = ["path", "top1", "score1", "top2", "score2"]
    assert own[columns].equals(evaluated[columns])


def test_videos_and_images_keep_the_order_given(finetuned, videos, images, tmp_path):
    some = [Path(images, "dark", "2.png"), video_paths(videos)[3], Path(images, "bright", "1.png")]
    table = predicted(finetuned, tmp_path, *some, "--views", "2x1")
    assert table["path"].tolist() == list(map(str, some))
    model = saved_classifier(finetuned)
    classes = ["class_0", "class_1"]
    assert_predicted(table.iloc[1], plain_probabilities(model, str(some[1]), 2), classes)
    for row in (0, 2):
        image = image_transform(32, train=False)(Image.open(some[row]).convert("RGB"))
        clip = normalize(image[None, :, None].repeat(1, 1, 4, 1, 1), VIDEO_MEAN, VIDEO_STD)
        with torch.no_grad():
            assert_predicted(table.iloc[row], model(clip).softmax(1)[0], classes)


@pytest.mark.parametrize(("static_clip", "frames"), [("exact", 4), ("folded", 1)])
def test_a_model_of_images_classifies_static_clips(
    static_clip, frames, images, tmp_path, monkeypatch
):
    flags = [*ONE_STEP, "--static_clip", static_clip]
    finetune_on_image.main(image_command(images, tmp_path / "run", *flags))
    checkpoint = tmp_path / "run" / "run.pth"
    shapes = []
    model_input = predict.model_input

    def record_shape(*arguments, **options):
        clips = model_input(*arguments, **options)
        shapes.append(clips.shape)
        return clips

    monkeypatch.setattr(predict, "model_input", record_shape)
    table = predicted(checkpoint, tmp_path, images)
    assert set(shapes) == {(4, 3, frames, 32, 32)}
    model = saved_classifier(checkpoint)
    assert len(table) == 12
    for _, row in table.iterrows():
        image = image_transform(32, train=False)(Image.open(row["path"]).convert("RGB"))
        clip = normalize(image[None, :, None].repeat(1, 1, 4, 1, 1), IMAGE_MEAN, IMAGE_STD)
        with torch.no_grad():
            assert_predicted(row, model(clip).softmax(1)[0], ["bright", "dark"])


def test_segments_equal_clips_that_were_cut(finetuned, images, tmp_path):
    bounds = [0, 36, 72, 100]  # frames: segments of 1.2 s, and 0.93 s that remain
    whole = write_video(tmp_path / "whole.avi", frames=100, codec="ffv1", b_frames=0)
    cuts = []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        path = tmp_path / f"cut_{first}.avi"
        options = {"first": first, "frames": end - first, "codec": "ffv1", "b_frames": 0}
        cuts.append(write_video(path, **options))
    image = Path(images, "dark", "2.png")
    words = ["--segment_seconds", "1.2", "--views", "2x3"]
    table = predicted(finetuned, tmp_path, whole, image, *words)
    expected = predicted(finetuned, tmp_path, *cuts, image, "--views", "2x3", "--overwrite")
    assert table.columns.tolist()[:3] == ["path", "start", "end"]
    assert table["path"].tolist() == [str(whole)] * 3 + [str(image)]
    assert table["start"].tolist()[:3] == [0, 1.2, 2.4]
    assert table["end"].tolist()[:3] == [1.2, 2.4, 3.333]
    assert table.loc[3, ["start", "end"]].isna().all()
    best = ["top1", "score1", "top2", "score2"]
    assert table[best].equals(expected[best])
    assert table["score1"].nunique() == 4


def test_parts_in_a_manifest_equal_segments(finetuned, videos, tmp_path, capsys):
    video = video_paths(videos)[-1]
    views = ["--views", "2x3"]
    segments = predicted(finetuned, tmp_path, video, "--segment_seconds", "0.4", *views)
    whole = predicted(finetuned, tmp_path, video, *views, "--overwrite")
    times = zip(segments["start"], segments["end"], strict=True)
    rows = [f"{video},{start},{end}" for start, end in times]
    rows[-1] = rows[-1].rpartition(",")[0]  # until the end of the file
    manifest = tmp_path / "parts.csv"
    manifest.write_text("\n".join(["path,start,end", *reversed(rows), f"{video},0,", rows[0]]))
    capsys.readouterr()
    parts = predicted(finetuned, tmp_path, manifest, *views, "--overwrite")
    assert f"{len(rows) + 1} videos or parts of them, 0 images" in capsys.readouterr().out
    columns = ["top1", "score1", "top2", "score2"]
    expected = pd.concat([segments[::-1], whole], ignore_index=True)[columns]
    pd.testing.assert_frame_equal(parts[columns], expected, atol=2e-6)


def test_segments_are_read_without_describing_the_file_again(
    finetuned, videos, broken, images, tmp_path, monkeypatch
):
    described = []
    read_clips = ViewDataset.read_clips

    def record(self, key, path, span, info):
        described.append((path, info.frames))
        return read_clips(self, key, path, span, info)

    monkeypatch.setattr(ViewDataset, "read_clips", record)
    sources = [broken, images, *video_paths(videos)[:3]]
    predicted(finetuned, tmp_path, *sources, "--segment_seconds", "0.4")
    paths = video_paths(videos)[:3]
    frames = [20, 20, 28, 28, 36, 36, 36]
    assert described == [(paths[i], n) for i, n in zip([0, 0, 1, 1, 2, 2, 2], frames, strict=True)]


def test_a_short_last_part_joins_the_segment_before():
    assert predict.split_duration(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert predict.split_duration(9.9, 4) == [(0, 4), (4, 9.9)]
    assert predict.split_duration(8, 4) == [(0, 4), (4, 8)]
    assert predict.split_duration(1, 4) == [(0, 1)]


def test_two_processes_write_the_same_file(finetuned, videos, images, broken, tmp_path):
    sources = [videos, str(broken), images]
    words = ["--segment_seconds", "0.4", "--views", "2x1"]
    run_predict(finetuned, *sources, *words, "--output", tmp_path / "one.csv")
    output = ["--output", tmp_path / "two.csv"]
    done = torchrun_tool("predict", ["--checkpoint", finetuned, *sources, *words, *output])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 of 23 files cannot be read") == 1
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    table = pd.read_csv(tmp_path / "one.csv")
    segments = [predict.split_duration(frames / 30, 0.4) for frames in range(20, 52, 4)]
    assert table["start"].notna().sum() == sum(map(len, segments))
    assert table["reason"].notna().sum() == 3


def test_any_batch_size_gives_the_same_predictions(finetuned, videos, tmp_path):
    table = predicted(finetuned, tmp_path, videos)
    flags = ["--device", "cpu", "--num_workers", "1", "--batch_size_per_gpu", "3"]
    output = ["--output", str(tmp_path / "other.csv")]
    predict.main([videos, "--checkpoint", finetuned, *flags, *output])
    other = pd.read_csv(tmp_path / "other.csv")
    assert other["top1"].equals(table["top1"])
    assert other["score1"].to_numpy() == pytest.approx(table["score1"].to_numpy(), abs=2e-6)


def test_unreadable_files_are_listed_with_reasons(finetuned, videos, broken, tmp_path, capsys):
    first, second = video_paths(videos)[:2]
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,label\n{second},class_0\nmissing.mp4,class_1\n")
    table = predicted(finetuned, tmp_path, first, broken, __file__, manifest)
    names = [os.path.basename(path) for path in table["path"]]
    bad = ["empty.mp4", "text.mp4", "text.png", "test_predict.py", "missing.mp4"]
    assert names == [os.path.basename(first), *bad[:4], os.path.basename(second), bad[4]]
    readable = table["reason"].isna()
    assert readable.tolist() == [True, False, False, False, False, True, False]
    assert table.loc[~readable, ["top1", "score1", "top2", "score2"]].isna().all(axis=None)
    assert table.loc[readable, ["top1", "score1", "top2", "score2"]].notna().all(axis=None)
    printed = capsys.readouterr().out
    _, listed = printed.split("5 of 7 files cannot be read:\n")
    for name, reason in zip(table["path"], table["reason"], strict=True):
        assert (f"  {name}: {reason}\n" in listed) == isinstance(reason, str)
    assert f"{broken}/empty.mp4: empty file" in listed
    assert f"{tmp_path}/missing.mp4: No such file or directory" in listed


def test_a_file_that_kills_its_reader_is_listed(finetuned, videos, tmp_path, monkeypatch, capfd):
    deadly = video_paths(videos)[2]
    read_clips = ViewDataset.read_clips

    def die(self, key, path, span, info):
        if path == deadly:
            os._exit(1)
        return read_clips(self, key, path, span, info)

    monkeypatch.setattr(ViewDataset, "read_clips", die)
    output = ["--output", str(tmp_path / "predictions.csv")]
    flags = ["--checkpoint", finetuned, "--device", "cpu", "--num_workers", "1"]
    predict.main([videos, *flags, *output])
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.loc[table["reason"].notna(), "path"].tolist() == [deadly]
    reason = "killed its reader twice (exit code 1)"
    assert table["reason"][2] == reason
    assert f"quarantined: {deadly} {reason}\n" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def run_program(*words) -> subprocess.CompletedProcess:
    """Run the tool in a process of its own."""
    flags = ["--device", "cpu", "--num_workers", "0"]
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tools.predict", *map(str, words), *flags],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_exit_code_is_0_if_any_file_is_readable(finetuned, videos, broken):
    done = run_program("--checkpoint", finetuned, broken, video_paths(videos)[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "clip_0.mp4  class_" in done.stdout
    assert "3 of 4 files cannot be read" in done.stdout


def test_the_exit_code_is_2_if_no_file_is_readable(finetuned, broken, tmp_path):
    output = tmp_path / "predictions.csv"
    done = run_program("--checkpoint", finetuned, broken, "--output", output)
    assert done.returncode == 2
    expected = f"error: none of the 3 files can be read (first: {broken}/empty.mp4: empty"
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1
    assert not output.exists()


def test_class_names_of_a_file_without_any(finetuned, videos, tmp_path, capsys):
    state = torch.load(finetuned, weights_only=True)
    del state["config"]["classes"]
    torch.save(state, tmp_path / "bare.pth")
    (tmp_path / "names.txt").write_text("up\ndown\n")
    run = (tmp_path / "bare.pth", tmp_path, video_paths(videos)[0])
    numbered = predicted(*run)
    named = predicted(*run, "--class_names", tmp_path / "names.txt", "--overwrite")
    assert {"0": "up", "1": "down"}[str(numbered["top1"][0])] == named["top1"][0]
    assert numbered["score1"].equals(named["score1"])
    assert "up" in capsys.readouterr().out


def test_given_flags_replace_those_of_the_run(finetuned, videos, tmp_path, capsys):
    video = video_paths(videos)[4]
    own = predicted(finetuned, tmp_path, video)
    same = predicted(finetuned, tmp_path, video, "--sampling_rate", 2, "--overwrite")
    assert own.equals(same)
    other = predicted(finetuned, tmp_path, video, "--sampling_rate", 1, "--overwrite")
    assert own["score1"][0] != other["score1"][0]
    capsys.readouterr()
    run_predict(finetuned, video, "--img_size", 48, "--num_frames", 8)
    printed = capsys.readouterr().out
    assert "pos_embed_spatial (1, 16, 64) -> (1, 36, 64)" in printed
    assert "clips of 8 frames of 48 x 48 pixels, sampling rate 2 at 30 frames/s" in printed


def test_segments_shorter_than_a_clip_are_noted(finetuned, videos, capsys):
    run_predict(finetuned, video_paths(videos)[0], "--segment_seconds", "0.2")
    note = "note: a clip takes 0.267 s, longer than --segment_seconds 0.2"
    assert note in capsys.readouterr().out


def test_duplicates_are_kept_once_with_a_note(finetuned, videos, tmp_path, capsys):
    first, second = video_paths(videos)[:2]
    manifest = tmp_path / "list.txt"
    manifest.write_text(f"{second}\n{os.path.relpath(first, tmp_path)}\n")
    table = predicted(finetuned, tmp_path, second, os.path.relpath(first), manifest)
    assert table["path"].tolist() == [second, first]
    assert "note: 2 of 4 files are duplicates; each file is kept once" in capsys.readouterr().out


def test_a_video_model_of_hugging_face_predicts(videos, tmp_path):
    model = hugging_face_videomae("VideoMAEForVideoClassification")
    model.config.id2label = {0: "zero", 1: "one"}
    model.save_pretrained(tmp_path / "model")
    table = predicted(tmp_path / "model", tmp_path, video_paths(videos)[0])
    assert sorted(table.loc[0, ["top1", "top2"]]) == ["one", "zero"]
    assert table.loc[0, ["score1", "score2"]].sum() == pytest.approx(1, abs=1e-5)


def test_weights_without_a_read_out_need_a_flag(finetuned, videos, tmp_path):
    state = torch.load(finetuned, weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "bare.pth")
    words = [video_paths(videos)[0], "--num_heads", 2, "--sampling_rate", 2, "--short_side", 48]
    with pytest.raises(UserError, match="Pass --global_pool or --cls_token"):
        run_predict(tmp_path / "bare.pth", *words)
    own = predicted(finetuned, tmp_path, video_paths(videos)[0])
    pooled = predicted(tmp_path / "bare.pth", tmp_path, *words, "--global_pool", "--overwrite")
    assert pooled["score1"].equals(own["score1"])
    token = predicted(tmp_path / "bare.pth", tmp_path, *words, "--cls_token", "--overwrite")
    assert not token["score1"].equals(own["score1"])


def test_an_existing_file_is_replaced_on_request_only(finetuned, videos, tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("kept")
    words = [video_paths(videos)[0], "--output", target]
    with pytest.raises(UserError, match="exists"):
        run_predict(finetuned, *words)
    assert target.read_text() == "kept"
    run_predict(finetuned, *words, "--overwrite")
    assert len(pd.read_csv(target)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


BAD_INPUT = [
    ("has no classifier: it is a pretraining checkpoint", "PRETRAINED VIDEO"),
    ("nowhere.pth not found", "nowhere.pth VIDEO"),
    ("nowhere.mp4 not found: give videos", "FINETUNED nowhere.mp4"),
    ("has no videos and no images", "FINETUNED EMPTY"),
    ("empty.csv is empty", "FINETUNED BLANK"),
    ("FILE|FOLDER|CSV", "FINETUNED"),
    ("--views: '5x2' is not of the form CxK", "FINETUNED VIDEO --views 5x2"),
    ("--views: '0x1' is not of the form CxK", "FINETUNED VIDEO --views 0x1"),
    ("0 is not a positive number", "FINETUNED VIDEO --segment_seconds 0"),
    ("--segment_seconds 0.001 is too short", "FINETUNED VIDEO --segment_seconds 0.001"),
    ("list.csv is a file", "FINETUNED VIDEO --output LIST/p.csv"),
    ("folder.csv is a folder", "FINETUNED VIDEO --overwrite --output EMPTY"),
    ("nan is not a positive number", "FINETUNED VIDEO --segment_seconds nan"),
    ("--target_fps: 0 is not a positive", "FINETUNED VIDEO --target_fps 0"),
    ("p.txt does not end in .csv", "FINETUNED VIDEO --output p.txt"),
    ("is one of the inputs", "FINETUNED LIST --overwrite --output LIST"),
    ("contradicts the names", "FINETUNED VIDEO --class_names OTHER"),
    ("not the class token", "FINETUNED VIDEO --cls_token"),
]


@pytest.mark.parametrize(("message", "words"), BAD_INPUT)
def test_bad_input_is_one_line(message, words, finetuned, pretrained, videos, tmp_path):
    video = video_paths(videos)[0]
    paths = {"FINETUNED": finetuned, "PRETRAINED": pretrained, "VIDEO": video}
    contents = {"empty.csv": "", "list.csv": video, "other.csv": "up\ndown"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for word, name in {"BLANK": "empty.csv", "LIST": "list.csv", "OTHER": "other.csv"}.items():
        paths[word] = str(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    paths["EMPTY"] = str(tmp_path / "folder.csv")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        words = words.replace("LIST", paths["LIST"])
        run_predict(*[paths.get(word, word) for word in words.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_printed_table_fits_and_shows_file_names(monkeypatch):
    classes = ["pushing something from left to right", "c1", "c2", "c3", "c4"]
    scores = [0.5, 0.2, 0.1, 0.1, 0.1]
    folder = "/data/a_long_folder/with_many/subfolders/below_it"
    samples = [Sample(f"{folder}/{index}.mp4") for index in range(30)]
    samples.insert(0, Sample("/data/bad.mp4"))
    samples.insert(1, Sample("/data/long.mp4", (3.0, 6.66667)))
    predictions = [Prediction(classes, scores)] * 32
    predictions[0] = Prediction([], [], "not a video")
    monkeypatch.setenv("COLUMNS", "200")
    lines = table_lines(samples, predictions)
    assert len(lines) == 22
    assert lines[0].split() == "file top 1 top 2 top 3 top 4 top 5".split()
    assert lines[1].startswith("long.mp4 3-6.67 s ")
    assert lines[2].startswith("...r/with_many/subfolders/below_it/0.mp4  pushing")
    assert lines[2].endswith(
        "pushing something from left... 50.0%  c1 20.0%  c2 10.0%  c3 10.0%  c4 10.0%"
    )
    assert lines[21] == "... 11 more (--output FILE.csv writes all)"
    assert unreadable_files(samples, predictions) == {"/data/bad.mp4": "not a video"}
    for width in (95, 60, 10):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = table_lines(samples, predictions)
        assert max(map(len, lines)) <= max(width, 80)
        assert all("something" in line for line in lines[1:21])


def test_wide_and_combining_letters_keep_the_columns_aligned(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["a.mp4", 30 * "\u65e5" + ".mp4", "e\u0301.mp4"]
    samples = [Sample(f"/data/{name}") for name in names]
    lines = table_lines(samples, [Prediction(["run"], [0.5])] * 3)
    assert lines[2].startswith("..." + 16 * "\u65e5" + ".mp4  run")
    ends = [width_of(line.removesuffix("run 50.0%")) for line in lines[1:]]
    assert ends == [41, 41, 41]


def test_names_that_are_no_text_are_printed_and_written(finetuned, videos, tmp_path, capsys):
    name = os.fsdecode(b"one\xff\n\r.mp4")
    path = tmp_path / name
    os.symlink(video_paths(videos)[0], path)
    run_predict(finetuned, path, "--output", tmp_path / "out.csv")
    assert r"one\udcff\n\r.mp4" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out.csv", encoding_errors="surrogateescape")
    assert table["path"].tolist() == [str(path)]
