"""Folders of numbered frames are read like video files of the same frames."""

import os
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from make_videos import frame_number, numbered_frame, write_frames, write_video
from PIL import Image
from runs import log_records, pretrain_command, saved_state, saved_weights, video_command
from tiny import same

import finetune
import pretrain
from data import frame_folder
from data.clips import ClipSampling
from data.datasets import ViewDataset
from data.decode import describe, open_video
from data.frame_folder import FRAME_FOLDER, check_frame_folders
from data.images import read_image
from data.input_files import ReadError
from data.manifest import find_labeled, find_videos, read_manifest, unlabeled, walk, write_manifest
from data.video_index import index_path, load_index, new_index
from tools import data_doctor, extract_features, predict, reencode, visualize
from tools.data_doctor import build_index
from util.dist import UserError

FPS = 12.0
RATE = ["--frames_fps", "30"]
WHOLE = ["--short_side", "64"]  # the size of the frames: nothing is scaled
QUICK = [*"--device cpu --num_workers 0 --batch_size_per_gpu 4".split(), *WHOLE]


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """Return a folder of four lossless videos in two classes, and one of their frames."""
    folder = tmp_path_factory.mktemp("twins")
    for index in range(4):
        name = f"class_{index % 2}/clip_{index}"
        count = 20 + 4 * index
        path = folder / "videos" / f"{name}.mkv"
        write_video(path, frames=count, codec="ffv1", pix_fmt="bgr0", b_frames=0)
        write_frames(folder / "frames" / name, frames=count)
    return folder / "videos", folder / "frames"


def numbers_of(frames: np.ndarray) -> list[int]:
    """Return the numbers that frames (T, H, W, 3) show."""
    return [frame_number(frame) for frame in frames]


@pytest.mark.parametrize(
    "name", ["frame_{:010d}.jpg", "{:05d}.png", "img{}.JPG", "v1_ID_{:06d}.jpeg", "7-{:02d}.PNG"]
)
@pytest.mark.parametrize("indexed", [False, True])
def test_frames_are_those_of_the_names_in_order(tmp_path, name, indexed):
    folder = str(write_frames(tmp_path / "v.mp4", frames=120, name=name))
    for number in range(1, 9):
        os.remove(Path(folder, name.format(number)))
    Path(folder, "notes.txt").touch()
    Path(folder, ".00003.jpg").touch()
    info = describe(folder, FPS)
    assert info[:7] == (112, FPS, 96, 64, 0, 1.0, FRAME_FOLDER)
    assert info.first_frame == name.format(9)
    indices = np.array([0, 0, 1, 50, 90, 91, 110, 111, 111])
    with open_video(folder, info=info if indexed else None, frames_fps=FPS) as video:
        assert (video.num_frames, video.fps, video.times) == (112, FPS, None)
        frames = video.read(indices)
    assert numbers_of(frames) == (8 + indices).tolist()
    assert frames.dtype == np.uint8
    if name.endswith(("png", "PNG")):
        expected = np.stack([numbered_frame(8 + index, 96, 64) for index in indices])
        assert np.array_equal(frames, expected)


def test_names_without_a_rule_are_listed_every_time(tmp_path):
    folder = write_frames(tmp_path / "v", frames=12, name="{:03d}.jpg")
    (folder / "005.jpg").rename(folder / "5.jpeg")
    info = describe(str(folder), FPS)
    assert info.first_frame == ""
    with open_video(str(folder), info=info, frames_fps=FPS) as video:
        assert numbers_of(video.read(np.arange(12))) == list(range(12))


FAULTS = [
    ([], "no numbered JPEG or PNG images"),
    (["cover.jpg", "notes01.txt"], "no numbered JPEG or PNG images"),
    (["1.jpg", "cover.jpg"], "cover.jpg has no number, but 1.jpg has"),
    (["img_1.jpg", "flow_x_1.jpg", "flow_y_1.jpg"], "of 3 names, flow_x_1.jpg and flow_y_1.jpg"),
    (["01.jpg", "1.jpg", "2.jpg"], "01.jpg and 1.jpg have the same number"),
    (["3.jpg", "3.png"], "3.jpg and 3.png have the same number"),
    (["f_08.jpg", "f_09.jpg", "f_12.jpg", "f_15.jpg"], "f_10.jpg is missing"),
    (["8.jpg", "9.jpg", "11.jpg"], "10.jpg is missing"),
    (["1.jpg", "2.jpg"], "none of the 2 frames can be read: empty file"),
]


@pytest.mark.parametrize(("names", "message"), FAULTS)
def test_other_folders_are_read_errors(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    for read in (describe, lambda path, fps: open_video(path, frames_fps=fps)):
        with pytest.raises(ReadError, match=message):
            read(str(tmp_path), FPS)
        with pytest.raises(ReadError, match="a folder: pass --frames_fps"):
            read(str(tmp_path), None)


def test_frames_are_reduced_like_those_of_video_files(tmp_path):
    folder = str(write_frames(tmp_path / "v", frames=2, size=(320, 240)))
    image = numbered_frame(1, 320, 240)
    image = av.VideoFrame.from_ndarray(image, format="rgb24")
    expected = image.reformat(64, 48, interpolation="BICUBIC").to_ndarray().astype(int)
    with open_video(folder, short_side=48, frames_fps=FPS) as video:
        (frame,) = video.read(np.array([1]))
    assert frame.shape == (48, 64, 3)
    assert np.abs(frame - expected).mean() < 1.5
    with open_video(folder, short_side=640, frames_fps=FPS) as video:
        assert video.read(np.array([1])).shape == (1, 240, 320, 3)


def test_unreadable_frames_are_replaced_and_counted(tmp_path):
    folder = write_frames(tmp_path / "v", frames=8)
    for number in (1, 4, 5):
        content = (folder / f"0000{number}.png").read_bytes()
        (folder / f"0000{number}.png").write_bytes(
            content[: len(content) // 2] if number > 1 else b""
        )
    Image.fromarray(numbered_frame(7, 48, 32)).save(folder / "00008.png")
    info = describe(str(folder), FPS)
    assert (info.width, info.height) == (96, 64)  # of frame 2: the first has no header
    with open_video(str(folder), info=info, frames_fps=FPS) as video:
        frames = video.read(np.array([0, 1, 2, 3, 4, 4, 7]))
        assert numbers_of(frames) == [1, 1, 2, 2, 2, 2, 7]
        assert frames.shape == (7, 64, 96, 3)  # also the last one, which is smaller
        assert video.replaced == 4
        with pytest.raises(ReadError, match="none of the wanted frames can be read .not an image"):
            video.read(np.array([3, 4]))
        assert video.restart()
        assert video.replaced == 0


def test_gray_images_of_16_bits_keep_their_shades(tmp_path):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name in ("1.png", "1.tif", "1.pgm"):
        Image.fromarray(257 * shades).save(tmp_path / name)
        read = np.asarray(read_image(str(tmp_path / name)))
        assert (read == shades[..., None]).all()
    for dtype in (np.int32, np.float32):
        Image.fromarray(shades.astype(dtype)).save(tmp_path / "1.tif")
        with pytest.raises(ReadError, match="gray levels of unknown range: save it with 8 bits"):
            read_image(str(tmp_path / "1.tif"))


def test_only_the_wanted_frames_are_decoded(tmp_path, monkeypatch):
    folder = str(write_frames(tmp_path / "v", frames=30))
    info = describe(folder, FPS)
    decoded = []
    read_image = frame_folder.read_image
    monkeypatch.setattr(
        frame_folder, "read_image", lambda path: decoded.append(path) or read_image(path)
    )
    monkeypatch.setattr(os, "listdir", None)  # the index spares the list of names
    with open_video(folder, info=info, frames_fps=FPS) as video:
        video.read(np.array([3, 3, 20]))
    assert [Path(path).name for path in decoded] == ["00004.png", "00021.png"]


def test_the_index_does_not_depend_on_the_rate(twins, tmp_path, monkeypatch):
    _, frames = twins
    manifest = tmp_path / "m.csv"
    write_manifest(manifest, unlabeled(find_videos([str(frames)], "VIDEOS", frames=True)))
    paths = read_manifest(manifest).paths
    build_index(paths, index_path(manifest), 0, 30, 30.0)
    index = load_index(manifest, paths)
    for row, path in enumerate(paths):
        assert index.info(row, path) == describe(path, 30.0)
    monkeypatch.setattr(data_doctor, "describe", None)
    index = build_index(paths, index_path(manifest), 0, 30, FPS)
    assert index.rows["fps"].tolist() == [FPS] * 4
    assert index.row_to_info(0) == describe(paths[0], FPS)
    with open_video(paths[0], info=describe(paths[0], 30.0), frames_fps=FPS) as video:
        assert video.fps == FPS
    folder = write_frames(tmp_path / "v", frames=3)
    index = new_index([str(folder)], None)
    index.set_row(0, describe(str(folder), FPS))
    (folder / "00003.png").unlink()
    assert index.info(0, str(folder)) is None
    write_frames(tmp_path / "long", frames=1, name="x" * 80 + "{}.png")
    index.set_row(0, describe(str(tmp_path / "long"), FPS))
    assert index.row_to_info(0).first_frame == ""


def test_clips_go_by_the_rate_that_is_given(tmp_path):
    path = str(write_frames(tmp_path / "v", frames=120))
    spans = [(0, 2), (5, 7), (9, 20), (10, 11)]
    data = ViewDataset(
        paths=[path] * 4,
        labels=[-1] * 4,
        sampling=ClipSampling(4, 10),
        num_views=1,
        transform=lambda frames: frames[None],
        decoder="auto",
        short_side=64,
        spans=spans,
        frames_fps=FPS,
    )
    samples = [data[(0, index)] for index in range(4)]
    shown = [numbers_of(sample["clips"][0].permute(1, 2, 3, 0).numpy()) for sample in samples[:3]]
    # a clip lasts 4/3 s, 16 frames; it is centered in spans of 24, 24 and 12 frames
    offsets = np.linspace(0, 15, 4).astype(int)
    assert shown[:2] == [(4 + offsets).tolist(), (64 + offsets).tolist()]
    assert shown[2] == np.minimum(108 + offsets, 119).tolist()
    assert samples[3]["bad"][0][1] == "the video ends at 10.000 s, its part starts at 10.000 s"


def test_a_folder_of_frames_is_one_sample(twins, tmp_path, capsys):
    videos, frames = twins
    found, labels, *_ = find_labeled(str(frames), (".mp4",), "--train_dir", frames=True)
    assert [path.rpartition("/")[2] for path in found] == ["clip_0", "clip_2", "clip_1", "clip_3"]
    assert labels == ["class_0", "class_0", "class_1", "class_1"]
    assert walk(found[0], (".png",), frames=True) == [found[0]]
    images = walk(found[0], (".png",))
    assert [Path(image).parent for image in images] == [Path(found[0])] * 20
    (tmp_path / "both").mkdir()
    os.symlink(videos, tmp_path / "both" / "a")
    os.symlink(frames, tmp_path / "both" / "b")
    both = [str(tmp_path / "both")]
    assert len(find_videos(both, "--data_dirs", frames=True)) == 8
    assert capsys.readouterr().out == ""
    assert len(find_videos(both, "--data_dirs")) == 4
    assert "4 folders of numbered images are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="class_0 has no files of .mp4"):
        find_labeled(str(frames), (".mp4",), "--train_dir")
    assert "2 folders of numbered images are left out" in capsys.readouterr().out


def test_a_rate_that_is_missing_or_useless_is_reported(twins, capsys):
    videos, frames = twins
    files = find_videos([str(videos)], "VIDEOS")
    folders = find_videos([str(frames)], "VIDEOS", frames=True)
    check_frame_folders(files, None)
    check_frame_folders(files + folders, FPS)
    assert capsys.readouterr().out == ""
    check_frame_folders(files, FPS)
    assert "--frames_fps has no effect on these 4 videos" in capsys.readouterr().out
    with pytest.raises(UserError, match="clip_0 is a folder: pass --frames_fps"):
        check_frame_folders(files + folders, None)


def test_training_on_frames_is_training_on_their_video(twins, tmp_path, capsys):
    videos, frames = twins
    steps = ["--max_steps", "2", "--batch_size_per_gpu", "2", *WHOLE]
    of_videos = pretrain_command(videos, tmp_path / "videos", *steps)
    pretrain.main([*of_videos, "--val_dirs", str(videos)])
    of_frames = pretrain_command(frames, tmp_path / "frames", *steps, *RATE)
    of_frames += ["--val_dirs", str(frames), "--num_workers", "2"]
    pretrain.main(of_frames)
    states = [saved_state(tmp_path / name) for name in ("videos", "frames")]
    for state in states:
        del state["data"]  # the fingerprint of the paths
    assert same(*states)
    assert log_records(tmp_path / "videos") == log_records(tmp_path / "frames")
    capsys.readouterr()
    with pytest.raises(UserError, match="no videos below"):
        pretrain.main(pretrain_command(frames, tmp_path / "without", *steps))
    assert "Training with --frames_fps RATE reads each" in capsys.readouterr().out
    manifest = tmp_path / "frames" / "run_train.csv"
    command = pretrain_command(frames, tmp_path / "without", *steps)
    with pytest.raises(UserError, match="clip_0 is a folder: pass --frames_fps"):
        pretrain.main([*command, "--data_csv", str(manifest)])


@pytest.fixture(scope="module")
def finetuned(twins, tmp_path_factory) -> tuple[Path, Path]:
    """Return the folders of two finetuning runs: on videos, and on their frames."""
    folder = tmp_path_factory.mktemp("finetuned")
    steps = ["--max_steps", "2", "--batch_size_per_gpu", "2", *WHOLE]
    for name, data, rate in zip(("videos", "frames"), twins, ([], RATE), strict=True):
        finetune.main(video_command(data, folder / name, *steps, *rate))
    return folder / "videos", folder / "frames"


def test_finetuning_and_evaluation_read_frames(twins, finetuned):
    _, frames = twins
    on_videos, on_frames = finetuned
    assert same(saved_weights(on_videos), saved_weights(on_frames))
    views = ["--eval", "--test_num_clips", "2", "--test_num_crops", "3", *WHOLE]
    tables = []
    for data, out, rate in zip(twins, finetuned, ([], RATE), strict=True):
        finetune.main(video_command(data, out, *views, *rate))
        tables.append(pd.read_csv(out / "run_test_predictions.csv"))
    assert tables[1]["path"].tolist() == [
        f"{frames}/class_{index % 2}/clip_{index}" for index in (0, 2, 1, 3)
    ]
    pd.testing.assert_frame_equal(*(table.drop(columns="path") for table in tables))


def test_tools_read_frames(twins, finetuned, tmp_path):
    checkpoint = str(finetuned[1] / "run.pth")
    tables = []
    features = []
    for name, data, rate in zip(("videos", "frames"), twins, ([], RATE), strict=True):
        flags = ["--checkpoint", checkpoint, *QUICK, *rate]
        output = tmp_path / f"{name}.csv"
        segments = ["--segment_seconds", "0.4", "--output", str(output)]
        predict.main([*flags, str(data), *segments])
        tables.append(pd.read_csv(output).drop(columns="path"))
        output = output.with_suffix(".npz")
        stride = ["--stride_seconds", "0.3", "--data_dir", str(data), "--output", str(output)]
        extract_features.main([*flags[1:], *stride])
        features.append(np.load(output))
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) > 4
    assert np.array_equal(features[0]["features"], features[1]["features"])
    assert len(features[0]["features"]) > 4
    with pytest.raises(UserError, match="no videos below"):
        reencode.main([str(twins[1]), str(tmp_path / "dst")])
    write_manifest(tmp_path / "m.csv", unlabeled([str(twins[1] / "class_0" / "clip_0")]))
    with pytest.raises(UserError, match="lists the folder .*clip_0, but only files are converted"):
        reencode.main([str(tmp_path / "m.csv"), str(tmp_path / "dst")])
    assert not (tmp_path / "dst").exists()


def test_without_a_rate_numbered_images_remain_images(twins, finetuned, tmp_path):
    flags = ["--checkpoint", str(finetuned[1] / "run.pth"), *QUICK]
    output = ["--output", str(tmp_path / "p.csv")]
    folder = str(twins[1] / "class_0" / "clip_0")
    predict.main([*flags, folder, *output])
    assert len(pd.read_csv(tmp_path / "p.csv")) == 20
    write_manifest(tmp_path / "m.csv", unlabeled([folder]))
    for main, words in (
        (predict.main, [*flags, str(tmp_path / "m.csv"), "--segment_seconds", "1"]),
        (visualize.main, [*flags, "--data_csv", str(tmp_path / "m.csv"), "--attention"]),
        (extract_features.main, [*flags[1:], "--data_csv", str(tmp_path / "m.csv")]),
        (data_doctor.main, [str(tmp_path / "m.csv")]),
    ):
        with pytest.raises(UserError, match="clip_0 is a folder: pass --frames_fps"):
            main(words)
    dotted = write_frames(tmp_path / "clip.2.mp4", frames=4)
    write_manifest(tmp_path / "dotted.csv", unlabeled([str(dotted)]))
    with pytest.raises(UserError, match="clip.2.mp4 is a folder: pass --frames_fps"):
        data_doctor.main([str(tmp_path / "dotted.csv")])
    assert not index_path(tmp_path / "dotted.csv").exists()


def test_the_doctor_describes_folders_of_frames(twins, tmp_path, capsys):
    manifest = str(tmp_path / "m.csv")
    flags = "--num_frames 4 --img_size 32 --files 1 --workers 0".split()
    data_doctor.main([str(twins[1]), "--write", manifest, *flags, "--frames_fps", "10"])
    printed = capsys.readouterr().out
    assert "4 of 4 readable, 0 GB and 4 folders of frames" in printed
    assert "durations   2.0 to 3.2 s" in printed
    assert "frame folder 4" in printed
    assert "no need to re-encode" in printed
    data_doctor.main([manifest, *flags, "--frames_fps", "20"])
    assert "durations   1.0 to 1.6 s" in capsys.readouterr().out
