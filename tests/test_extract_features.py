"""tools.extract_features: against a plain loop over the files, for every kind of checkpoint."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from launch import torchrun_tool
from make_videos import write_folder, write_video
from PIL import Image
from runs import center_clip
from tiny import tiny_mae, tiny_vit

import finetune
import finetune_on_image
import pretrain
from data.clips import ClipSampling, frame_indices
from data.datasets import ViewDataset
from data.decode import open_video
from data.input_files import ReadError
from data.transforms import image_transform, view_transform
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, normalize
from tools import data_doctor, extract_features, feature_clips
from util.dist import UserError
from util.pixels import IMAGE_MEAN, IMAGE_STD, VIDEO_MEAN, VIDEO_STD

SHARED = (
    "--patch_size 8 --num_workers 0 --device cpu --lr 0.001 --max_steps 1 --batch_size_per_gpu 4 "
    "--save_prefix run"
)
VIDEO = f"{SHARED} --short_side 48 --sampling_rate 2 --decoder pyav"
STRIDE = ["--stride_seconds", 0.5]
CLASSIFIER = "--model vit_micro_patch16 --img_size 32 --num_frames 4 --num_classes 2"
MAE = (
    "--model mae_vit_micro_patch16 --img_size 24 --num_frames 8 --pred_t_dim 8 --repeat_aug 1 "
    "--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --recon_every 0"
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of seven videos in class_0 and class_1."""
    return write_folder(tmp_path_factory.mktemp("videos"), 7)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of seven images in bright and dark."""
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for index in range(7):
        name = ("dark", "bright")[index % 2]
        pixels = draws.integers(0, 100, (40, 48, 3)) + 150 * (index % 2)
        path = folder / name / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Return a folder of a long video, a short one, an unreadable file, and a video of a class."""
    folder = tmp_path_factory.mktemp("mixed")
    write_video(folder / "long.mp4", frames=100)
    write_video(folder / "short.mp4", frames=5)
    write_video(folder / "a" / "long.mp4", frames=40)
    (folder / "broken.mp4").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def pretrained(videos, tmp_path_factory):
    """Return a checkpoint of pretrain.py, 24 pixels and 8 frames."""
    out = str(tmp_path_factory.mktemp("pretrained"))
    pretrain.main([*VIDEO.split(), *MAE.split(), "--data_dirs", str(videos), "--output_dir", out])
    return f"{out}/run.pth"


@pytest.fixture(scope="module")
def finetuned(videos, tmp_path_factory):
    """Return a checkpoint of finetune.py that classifies the class token."""
    out = str(tmp_path_factory.mktemp("finetuned"))
    folders = ["--train_dir", str(videos), "--val_dir", str(videos), "--output_dir", out]
    finetune.main([*VIDEO.split(), *CLASSIFIER.split(), "--cls_token", *folders])
    return f"{out}/run.pth"


def finetuned_on_images(images, out, static_clip: str) -> str:
    """Return a checkpoint of finetune_on_image.py."""
    flags = f"{SHARED} {CLASSIFIER} --train_data_path {images} --val_data_path {images}"
    finetune_on_image.main([*flags.split(), "--static_clip", static_clip, "--output_dir", str(out)])
    return f"{out}/run.pth"


def extract(checkpoint, *flags) -> None:
    """Run the tool on the CPU."""
    flags = ["--device", "cpu", "--num_workers", 0, "--batch_size_per_gpu", 4, *flags]
    extract_features.main([str(checkpoint), *map(str, flags)])


def saved_model(path, model_class, *not_sizes: str):
    """Return the model of a checkpoint."""
    state = torch.load(path, weights_only=True)
    names = state["config"].keys() - {"model", "mean", "std", *not_sizes}
    model = model_class(**{name: state["config"][name] for name in names})
    model.load_state_dict(state["model"])
    return model.eval()


def assert_close(features: np.ndarray, expected: torch.Tensor) -> None:
    """Compare one sample's features."""
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-4, atol=1e-5)


def test_a_finetuned_model_equals_a_plain_loop(finetuned, videos, tmp_path):
    extract(finetuned, "--data_dir", videos, "--output", tmp_path / "out.npz")
    table = np.load(tmp_path / "out.npz")
    model = saved_model(finetuned, VisionTransformer, "classes")
    assert table["features"].shape == (7, 64)
    assert table["features"].dtype == np.float32
    assert table["labels"].dtype == np.int64
    assert table["classes"].tolist() == ["class_0", "class_1"]
    assert sorted(table["paths"]) == sorted(map(str, videos.glob("*/*.mp4")))
    for path, label, features in zip(
        table["paths"], table["labels"], table["features"], strict=True
    ):
        assert Path(path).parent.name == f"class_{label}"
        clip = center_clip(str(path), num_frames=4, img_size=32)
        with torch.no_grad():
            assert_close(features, model.norm(model.encode(clip)[0, 0]))  # the class token


def test_a_pretrained_model_is_read_out_by_the_mean(pretrained, videos, tmp_path):
    extract(pretrained, "--data_dir", videos, "--output", tmp_path / "out.npz")
    table = np.load(tmp_path / "out.npz")
    model = saved_model(pretrained, MaskedAutoencoderViT)
    for path, features in zip(table["paths"], table["features"], strict=True):
        clip = center_clip(str(path), num_frames=8, img_size=24)
        with torch.no_grad():
            assert_close(features, model.norm(model.encode(clip)[0, 1:].mean(0)))


def test_given_sizes_replace_those_of_the_checkpoint(pretrained, videos, tmp_path, capsys):
    flags = ["--data_dir", videos, "--output", tmp_path / "out.npz"]
    extract(pretrained, *flags, "--img_size", 32, "--num_frames", 4, "--sampling_rate", 1)
    assert "pos_embed_spatial (1, 9, 64) -> (1, 16, 64)" in capsys.readouterr().out
    extract(pretrained, *flags, "--overwrite", "--num_frames", 4, "--sampling_rate", 1)
    assert "pos_embed_temporal (1, 4, 64) -> (1, 2, 64)" in capsys.readouterr().out


def extract_on_two_processes(checkpoint, *flags) -> str:
    """Run the tool on the CPU with two processes, and return what it prints."""
    process = torchrun_tool("extract_features", [checkpoint, *flags])
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize("kind", ["video", "image"])
def test_two_processes_write_the_same_file(kind, finetuned, pretrained, mixed, images, tmp_path):
    flags = {"video": ["--data_dir", mixed, *STRIDE], "image": ["--data_dir", images]}[kind]
    checkpoint = {"video": finetuned, "image": pretrained}[kind]
    extract(checkpoint, *flags, "--output", tmp_path / "one.npz")
    extract_on_two_processes(checkpoint, *flags, "--output", tmp_path / "two.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("static_clip", ["exact", "folded"])
def test_images_are_static_clips(static_clip, images, tmp_path):
    checkpoint = finetuned_on_images(images, tmp_path, static_clip)
    extract(checkpoint, "--data_dir", images)
    table = np.load(tmp_path / "run_features.npz")  # beside the checkpoint by default
    model = saved_model(checkpoint, VisionTransformer, "classes")
    assert table["features"].shape == (7, 64)
    for path, label, features in zip(
        table["paths"], table["labels"], table["features"], strict=True
    ):
        assert Path(path).parent.name == ("bright", "dark")[label]
        image = image_transform(32, train=False)(Image.open(path).convert("RGB"))
        clip = normalize(image[None, :, None].repeat(1, 1, 4, 1, 1), IMAGE_MEAN, IMAGE_STD)
        with torch.no_grad():
            assert_close(features, model.norm(model.encode(clip)[0, 1:].mean(0)))


def test_a_manifest_may_lack_labels(pretrained, videos, tmp_path):
    paths = sorted(map(str, videos.glob("*/*.mp4")))[:3]
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,label\n{paths[0]},b\n{paths[1]},\n{paths[2]},a\n")
    extract(pretrained, "--data_csv", manifest, "--output", tmp_path / "some.npz")
    table = np.load(tmp_path / "some.npz")
    assert table["paths"].tolist() == paths
    assert table["labels"].tolist() == [1, -1, 0]
    assert table["classes"].tolist() == ["a", "b"]
    manifest.write_text("\n".join(paths))
    extract(pretrained, "--data_csv", manifest, "--output", tmp_path / "none.npz")
    table = np.load(tmp_path / "none.npz")
    assert table["labels"].tolist() == [-1, -1, -1]
    assert table["classes"].tolist() == []


def test_a_folder_may_have_no_subfolders(finetuned, videos, tmp_path):
    extract(finetuned, "--data_dir", videos / "class_1", "--output", tmp_path / "out.npz")
    table = np.load(tmp_path / "out.npz")
    assert table["labels"].tolist() == [-1, -1, -1]
    assert table["classes"].tolist() == ["class_0", "class_1"]  # the checkpoint's


def test_labels_index_the_classes_of_the_checkpoint(videos):
    folder = str(videos)
    own = feature_clips.list_inputs(folder, "", ["class_1", "class_0"])
    assert own.labels == [1, 1, 1, 1, 0, 0, 0]
    other = feature_clips.list_inputs(folder, "", ["class_1", "else"])
    assert other.labels == [0, 0, 0, 0, 1, 1, 1]
    assert other.classes == ["class_0", "class_1"]


def test_an_existing_file_is_replaced_on_request_only(pretrained, videos, tmp_path):
    target = tmp_path / "out.npz"
    target.write_text("kept")
    flags = ["--data_dir", videos / "class_1", "--output", target]
    with pytest.raises(UserError, match="exists"):
        extract(pretrained, *flags)
    assert target.read_text() == "kept"
    extract(pretrained, *flags, "--overwrite")
    assert np.load(target)["features"].shape == (3, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def spans_of(path, stride: float = 0.5) -> list[float]:
    """Return the starts of the clips along a video of 30 frames/s."""
    with open_video(str(path)) as video:
        count = -(-video.num_frames // round(stride * 30))
    return [k * stride for k in range(count)]


def clip_from(path, start: float) -> torch.Tensor:
    """Return the clip (1, 3, 8, 24, 24) from a time in seconds on, frames 2 apart, normalized."""
    first = round(start * 30)
    with open_video(str(path), "pyav", 48) as video:
        left = video.num_frames - first
        indices = first + frame_indices(left, 30, ClipSampling(8, 2), start=0)
        frames = video.read_tensor(indices)
    return normalize(view_transform(24, 1)(frames).transpose(1, 2), VIDEO_MEAN, VIDEO_STD)


def test_clips_along_videos_equal_a_plain_loop(pretrained, mixed, tmp_path):
    extract(pretrained, "--data_dir", mixed, *STRIDE, "--output", tmp_path / "out.npz")
    table = np.load(tmp_path / "out.npz")
    model = saved_model(pretrained, MaskedAutoencoderViT)
    paths = [str(mixed / name) for name in ("long.mp4", "short.mp4", "a/long.mp4")]
    assert table["paths"].tolist() == paths
    assert table["labels"].tolist() == [-1, -1, 0]
    assert table["unreadable"].tolist() == [str(mixed / "broken.mp4")]
    expected = [(video, start) for video in range(3) for start in spans_of(paths[video])]
    assert table["video"].tolist() == [video for video, _ in expected]
    assert table["start"].tolist() == [start for _, start in expected]
    assert np.allclose(table["end"] - table["start"], 16 / 30)
    assert len(expected) == 7 + 1 + 3
    for (video, start), features in zip(expected, table["features"], strict=True):
        with torch.no_grad():
            tokens = model.encode(clip_from(paths[video], start))
            assert_close(features, model.norm(tokens[0, 1:].mean(0)))


def test_parts_of_a_manifest_equal_the_clips_along_a_video(pretrained, mixed, tmp_path, capsys):
    video = mixed / "long.mp4"
    times = [(1.5, 1.5 + 16 / 30), (90, 95), (0.5, 0.5 + 16 / 30), (100, "")]
    rows = [f"{video},b,{start},{end}\n" for start, end in times]
    manifest = tmp_path / "parts.csv"
    manifest.write_text("path,label,start,end\n" + "".join(rows) + f"{mixed}/short.mp4,a,,\n")
    extract(pretrained, "--data_csv", manifest, "--output", tmp_path / "parts.npz")
    extract(pretrained, "--data_dir", mixed, *STRIDE, "--output", tmp_path / "along.npz")
    table = np.load(tmp_path / "parts.npz")
    along = np.load(tmp_path / "along.npz")["features"]
    assert np.allclose(table["features"], along[[3, 1, 7]], atol=1e-5)
    assert table["paths"].tolist() == [str(video), str(video), str(mixed / "short.mp4")]
    assert (table["start"].tolist(), table["end"][2]) == ([1.5, 0.5, 0], np.inf)
    assert table["labels"].tolist() == [1, 1, 0]
    assert table["unreadable"].tolist() == [f"{video}#t=90,95", f"{video}#t=100"]
    assert f"2 of 5 files cannot be read:\n  {video}#t=90,95: the video" in capsys.readouterr().out


def test_a_folder_holds_the_rows_of_the_table(pretrained, mixed, tmp_path, capsys):
    flags = ["--data_dir", mixed, *STRIDE, "--output"]
    extract(pretrained, *flags, tmp_path / "out.npz")
    extract(pretrained, *flags, f"{tmp_path}/folder.1/")
    folder = tmp_path / "folder.1"
    table = np.load(tmp_path / "out.npz")
    index = pd.read_csv(folder / "index.csv", keep_default_na=False)
    assert index["path"].tolist() == table["paths"].tolist()
    assert index["label"].tolist() == ["", "", "a"]
    for video, (file, windows) in enumerate(zip(index["file"], index["windows"], strict=True)):
        rows = table["features"][table["video"] == video]
        assert len(rows) == windows
        assert np.load(folder / file).tobytes() == rows.tobytes()
    settings = json.loads((folder / "features.json").read_text())
    assert settings["stride_seconds"] == 0.5
    assert settings["clip_seconds"] == 16 / 30
    assert (settings["layer"], settings["tokens"], settings["shape"]) == (2, "mean", [64])
    assert "broken.mp4: not a video" in capsys.readouterr().out
    assert pd.read_csv(folder / "unreadable.csv")["path"].tolist() == [str(mixed / "broken.mp4")]


def contents(folder) -> dict[str, bytes]:
    """Return the files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_interrupted_folder_is_continued(pretrained, mixed, tmp_path, monkeypatch):
    flags = ["--data_dir", mixed, *STRIDE, "--batch_size_per_gpu", 2, "--output"]
    extract(pretrained, *flags, tmp_path / "whole")
    read_clips = ViewDataset.read_clips
    reads = []

    def counted(self, key, path, span, info):
        reads.append(path)
        if len(reads) == 10:
            raise KeyboardInterrupt
        return read_clips(self, key, path, span, info)

    monkeypatch.setattr(ViewDataset, "read_clips", counted)
    with pytest.raises(KeyboardInterrupt):
        extract(pretrained, *flags, tmp_path / "parts")
    left = contents(tmp_path / "parts")
    assert sorted(left) == [".lock", "features.json", "long.mp4.npy"]
    extract(pretrained, *flags, tmp_path / "parts")
    assert set(reads[10:]) == {str(mixed / "short.mp4"), str(mixed / "a/long.mp4")}
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    extract(pretrained, *flags, tmp_path / "parts")
    assert len(reads) == 10 + 1 + 3  # nothing is read again


def test_two_processes_fill_the_same_folder(pretrained, mixed, tmp_path):
    flags = ["--data_dir", mixed, *STRIDE, "--tokens", "none", "--layer", 1, "--output"]
    extract(pretrained, *flags, tmp_path / "one")
    printed = extract_on_two_processes(pretrained, *flags, tmp_path / "two")
    assert "1 of 4 files cannot be read" in printed
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("output", ["out.npz", "folder"])
def test_a_video_with_an_unreadable_clip_is_left_out(
    output, pretrained, mixed, tmp_path, monkeypatch, capsys
):
    read_clips = ViewDataset.read_clips

    def failing(self, key, path, span, info):
        if key[1] == 3:
            raise ReadError("nothing there")
        return read_clips(self, key, path, span, info)

    monkeypatch.setattr(ViewDataset, "read_clips", failing)
    extract(pretrained, "--data_dir", mixed, *STRIDE, "--output", tmp_path / output)
    assert f"{mixed}/long.mp4: from 1.5 s on: nothing there" in capsys.readouterr().out
    expected = [str(mixed / name) for name in ("short.mp4", "a/long.mp4")]
    if output == "folder":
        paths = pd.read_csv(tmp_path / "folder/index.csv")["path"].tolist()
    else:
        table = np.load(tmp_path / output)
        paths = table["paths"].tolist()
        assert table["video"].tolist() == [0, 1, 1, 1]
        assert table["start"].tolist() == [0, 0, 0.5, 1]
    assert paths == expected


def test_every_layer_can_be_read(pretrained, videos, tmp_path):
    folder = videos / "class_1"
    model = saved_model(pretrained, MaskedAutoencoderViT)
    (first, *_) = sorted(map(str, folder.glob("*.mp4")))
    clip = center_clip(first, num_frames=8, img_size=24)
    with torch.no_grad():
        x, delta = model.embed(clip)
        for layer in range(3):
            if layer > 0:
                x, delta = model.blocks[layer - 1](x, delta)
            patches = (x + delta)[0, 1:]
            pooled = patches.mean(0)
            if layer == 2:
                patches = model.norm(patches)
                pooled = model.norm(pooled)
            flags = ["--data_dir", folder, "--layer", layer, "--overwrite", "--output"]
            extract(pretrained, *flags, tmp_path / "mean.npz")
            extract(pretrained, *flags, tmp_path / "all.npz", "--tokens", "none")
            tokens = np.load(tmp_path / "all.npz")["features"]
            assert tokens.shape == (3, 4, 3, 3, 64)
            assert tokens.dtype == np.float32
            assert_close(tokens[0], patches.view(4, 3, 3, 64))
            assert_close(np.load(tmp_path / "mean.npz")["features"][0], pooled)


def test_the_class_token_is_read_at_every_layer(finetuned, videos, tmp_path):
    folder = videos / "class_1"
    flags = ["--data_dir", folder, "--layer", 1, "--output", tmp_path / "out.npz"]
    extract(finetuned, *flags, "--tokens", "mean")
    model = saved_model(finetuned, VisionTransformer, "classes")
    (first, *_) = sorted(map(str, folder.glob("*.mp4")))
    with torch.no_grad():
        x, delta = model.blocks[0](*model.embed(center_clip(first)))
    assert_close(np.load(tmp_path / "out.npz")["features"][0], (x + delta)[0, 0])


@pytest.mark.parametrize(
    ("num_classes", "global_pool", "cls_embed", "kind"),
    [
        (5, False, True, extract_features.CLASS_TOKEN),
        (5, True, True, "mean"),
        (5, None, True, "mean"),  # with a note
        (None, False, True, "mean"),  # pretrained
        (None, None, False, "mean"),
    ],
)
def test_only_a_classifier_reads_its_class_token(num_classes, global_pool, cls_embed, kind, capsys):
    source = SimpleNamespace(
        path="a.pth",
        sizes={"depth": 2, "cls_embed": cls_embed},
        num_classes=num_classes,
        global_pool=global_pool,
        attentive=False,
        flags={},
    )
    args = extract_features.get_parser().parse_args(["a.pth", "--data_dir", "videos"])
    assert extract_features.choose_read_out(source, args).kind == kind
    noted = "does not record its read-out" in capsys.readouterr().out
    assert noted == (num_classes is not None and global_pool is None)


def test_images_have_tokens_too(pretrained, images, tmp_path):
    flags = ["--data_dir", images, "--tokens", "none", "--output", tmp_path / "folder"]
    extract(pretrained, *flags)
    index = pd.read_csv(tmp_path / "folder/index.csv")
    assert index["windows"].tolist() == [1] * 7
    assert np.load(tmp_path / "folder" / index["file"][0]).shape == (1, 4, 3, 3, 64)


def test_a_manifest_may_name_a_file_twice(pretrained, videos, tmp_path):
    path = str(videos / "class_1/clip_1.mp4")
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"{path},a\n{path},b\n")
    extract(pretrained, "--data_csv", manifest, "--output", tmp_path / "folder")
    index = pd.read_csv(tmp_path / "folder/index.csv")
    assert index["file"].tolist() == ["clip_1.mp4.npy"] * 2
    assert index["label"].tolist() == ["a", "b"]


def test_an_index_saves_opening_the_files(pretrained, mixed, tmp_path, monkeypatch):
    manifest = tmp_path / "list.csv"
    data_doctor.main([str(mixed), "--write", str(manifest), "--workers", "0"])
    flags = [*STRIDE, "--output"]
    extract(pretrained, "--data_dir", mixed, *flags, tmp_path / "opened.npz")
    monkeypatch.setattr(feature_clips, "probe_files", lambda paths, *_: [] if not paths else None)
    read_clips = ViewDataset.read_clips

    def with_info(self, key, path, span, info):
        assert info is not None
        return read_clips(self, key, path, span, info)

    monkeypatch.setattr(ViewDataset, "read_clips", with_info)
    extract(pretrained, "--data_csv", manifest, *flags, tmp_path / "indexed.npz")
    opened = np.load(tmp_path / "opened.npz")
    indexed = np.load(tmp_path / "indexed.npz")
    for name in ("features", "video", "start"):
        assert np.array_equal(opened[name], indexed[name])


def test_the_default_output_is_beside_the_checkpoint():
    assert extract_features.default_output("runs/a.pth") == Path("runs/a_features.npz")
    assert extract_features.default_output("runs/b.v2/") == Path("runs/b.v2_features.npz")
    assert extract_features.default_output("hf:owner/name") == Path("name_features.npz")
    assert extract_features.default_output("hf:o/n/a.pth@v1") == Path("a_features.npz")
    assert extract_features.default_output("hf:o/name-1.5") == Path("name-1.5_features.npz")
    here = Path.cwd()
    assert extract_features.default_output(".") == here.with_name(f"{here.name}_features.npz")


BAD_INPUT = [
    ("--data_dir --data_csv is required", ["MAE"]),
    ("nowhere.pth not found", ["nowhere.pth", "--data_dir", "VIDEOS"]),
    ("text.pth cannot be read", ["TEXT", "--data_dir", "VIDEOS"]),
    ("contains no video encoder", ["OTHER", "--data_dir", "VIDEOS"]),
    ("num_heads 2, not 4", ["MAE", "--data_dir", "VIDEOS", "--num_heads", "4"]),
    ("'nowhere' not found: check --data_dir", ["MAE", "--data_dir", "nowhere"]),
    ("has no videos and no images", ["MAE", "--data_dir", "EMPTY"]),
    ("has 1 images", ["MAE", "--data_csv", "MIXED"]),
    ("positive number", ["MAE", "--data_dir", "VIDEOS", "--stride_seconds", "0"]),
    ("positive number", ["MAE", "--data_dir", "VIDEOS", "--target_fps", "0"]),
    ("--stride_seconds 0.01 is too", ["MAE", "--data_dir", "VIDEOS", "--stride_seconds", "0.01"]),
    ("--layer 3: .* has 2 blocks", ["MAE", "--data_dir", "VIDEOS", "--layer", "3"]),
    ("--stride_seconds is for", ["MAE", "--data_dir", "IMAGES", "--stride_seconds", "1"]),
    ("none of the 1 files can be read .*broken.mp4", ["MAE", "--data_csv", "BROKEN"]),
]


@pytest.mark.parametrize(("message", "flags"), BAD_INPUT)
def test_bad_input_is_one_line(message, flags, pretrained, videos, images, tmp_path):
    paths = {"MAE": pretrained, "VIDEOS": str(videos), "IMAGES": str(images)}
    texts = {
        "TEXT": ("text.pth", "not a checkpoint"),
        "MIXED": ("mixed.csv", "a.mp4\nb.png\n"),
        "BROKEN": ("broken.csv", "broken.mp4\n"),
    }
    for name, (file, text) in texts.items():
        (tmp_path / file).write_text(text)
        paths[name] = str(tmp_path / file)
    (tmp_path / "broken.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    paths |= {"EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other.pth")}
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as error:
        extract(*[paths.get(flag, flag) for flag in flags], "--output", out / "features.npz")
    assert "\n" not in str(error.value)
    assert not out.exists()


BAD_OUTPUT = [
    ("does not end in .npz", ["features.npy"]),
    ("is a file, but not an .npz", ["taken"]),
    ("is not empty, and has no features.json", ["others"]),
    ("--overwrite does not apply to a folder", ["empty", "--overwrite"]),
    ("exists. Choose another", ["exists.npz"]),
    ("taken is a file", ["taken/features.npz"]),
    ("taken is a file", ["taken/deep/features"]),
    ("folder.npz is a folder", ["folder.npz", "--overwrite"]),
]


@pytest.mark.parametrize(("message", "flags"), BAD_OUTPUT)
def test_a_wrong_output_is_refused(message, flags, pretrained, videos, tmp_path):
    for name in ("taken", "exists.npz", "others/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("kept")
    for name in ("empty", "folder.npz"):
        (tmp_path / name).mkdir()
    before = contents(tmp_path)
    output, *more = flags
    with pytest.raises(UserError, match=message):
        extract(pretrained, "--data_dir", videos, "--output", tmp_path / output, *more)
    assert contents(tmp_path) == before


def test_other_settings_do_not_mix_in_a_folder(pretrained, finetuned, videos, tmp_path):
    flags = ["--data_dir", videos / "class_1", "--output", tmp_path / "folder"]
    extract(pretrained, *flags)
    for more in (["--layer", 1], ["--tokens", "none"], ["--sampling_rate", 1], STRIDE):
        with pytest.raises(UserError, match="other settings"):
            extract(pretrained, *flags, *more)
    with pytest.raises(UserError, match="other settings .weights"):
        extract(finetuned, *flags)


def test_videos_of_two_folders_do_not_mix_in_a_folder(pretrained, videos, tmp_path):
    names = sorted(path.name for path in Path(videos / "class_1").iterdir())
    for index in (0, 1):
        folder = tmp_path / f"data_{index}"
        folder.mkdir()
        os.symlink(videos / "class_1" / names[index], folder / "same.mp4")
        (tmp_path / f"data_{index}.csv").write_text(f"data_{index}/same.mp4\n")
    output = ["--output", tmp_path / "folder"]
    extract(pretrained, "--data_dir", tmp_path / "data_0", *output)
    for flags in (["--data_dir", tmp_path / "data_1"], ["--data_csv", tmp_path / "data_1.csv"]):
        with pytest.raises(UserError, match="data: .*data_0 there, .*data_1 now"):
            extract(pretrained, *flags, *output)
    extract(pretrained, "--data_csv", tmp_path / "data_0.csv", *output)


@pytest.mark.parametrize("changed", [{"num_heads": 4}, {"mean": (0.5, 0.5, 0.5)}])
def test_the_same_weights_are_not_the_same_model(changed, pretrained, videos, tmp_path):
    state = torch.load(pretrained, weights_only=True)
    state["config"] |= changed
    torch.save(state, tmp_path / "changed.pth")
    flags = ["--data_dir", videos / "class_1", "--output", tmp_path / "folder"]
    extract(pretrained, *flags)
    with pytest.raises(UserError, match=f"other settings .{next(iter(changed))}: "):
        extract(tmp_path / "changed.pth", *flags)


@pytest.mark.parametrize("make", [tiny_mae, tiny_vit])
def test_weights_without_a_record_of_a_run_suffice(make, videos, tmp_path):
    torch.save({"model": make().state_dict()}, tmp_path / "bare.pth")
    extract(tmp_path / "bare.pth", "--data_dir", videos / "class_1", "--num_heads", 2)
    assert np.load(tmp_path / "bare_features.npz")["features"].shape == (3, 64)
