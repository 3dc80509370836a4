"""tools.extract_features: against a plain loop over the files, for every kind of checkpoint."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, clean_environment
from make_videos import write_folder
from PIL import Image
from runs import center_clip
from tiny import tiny_mae, tiny_vit

import finetune
import finetune_on_image
import pretrain
from data.transforms import image_transform
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer, normalize
from tools import extract_features
from util.dist import UserError
from util.pixels import IMAGE_MEAN, IMAGE_STD

SHARED = (
    "--patch_size 8 --num_workers 0 --device cpu --lr 0.001 --max_steps 1 --batch_size_per_gpu 4 "
    "--save_prefix run"
)
VIDEO = f"{SHARED} --short_side 48 --sampling_rate 2 --decoder pyav"
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


@pytest.mark.parametrize("kind", ["video", "image"])
def test_two_processes_write_the_same_file(kind, finetuned, pretrained, videos, images, tmp_path):
    sources = {"video": (finetuned, videos), "image": (pretrained, images)}
    checkpoint, folder = sources[kind]
    extract(checkpoint, "--data_dir", folder, "--output", tmp_path / "one.npz")
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m"
    flags = "--device cpu --num_workers 0 --batch_size_per_gpu 4"
    files = [checkpoint, "--data_dir", str(folder), "--output", str(tmp_path / "two.npz")]
    process = subprocess.run(
        [*command.split(), "tools.extract_features", *flags.split(), *files],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
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
    own = extract_features.list_samples(folder, "", ["class_1", "class_0"])
    assert own.labels == [1, 1, 1, 1, 0, 0, 0]
    other = extract_features.list_samples(folder, "", ["class_1", "else"])
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


BAD_INPUT = [
    ("--data_dir --data_csv is required", ["MAE"]),
    ("nowhere.pth not found", ["nowhere.pth", "--data_dir", "VIDEOS"]),
    ("text.pth cannot be read", ["TEXT", "--data_dir", "VIDEOS"]),
    ("contains no video encoder", ["OTHER", "--data_dir", "VIDEOS"]),
    ("num_heads 2, not 4", ["MAE", "--data_dir", "VIDEOS", "--num_heads", "4"]),
    ("'nowhere' not found: check --data_dir", ["MAE", "--data_dir", "nowhere"]),
    ("has no videos and no images", ["MAE", "--data_dir", "EMPTY"]),
    ("has 1 images", ["MAE", "--data_csv", "MIXED"]),
    ("broken.mp4 cannot be read", ["MAE", "--data_csv", "BROKEN"]),
]


@pytest.mark.parametrize(("message", "flags"), BAD_INPUT)
def test_bad_input_is_one_line(message, flags, pretrained, videos, tmp_path):
    paths = {"MAE": pretrained, "VIDEOS": str(videos)}
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


def test_the_output_must_be_an_npz(pretrained, videos, tmp_path):
    with pytest.raises(UserError, match="does not end in .npz"):
        extract(pretrained, "--data_dir", videos, "--output", tmp_path / "features.npy")


@pytest.mark.parametrize("make", [tiny_mae, tiny_vit])
def test_weights_without_a_record_of_a_run_suffice(make, videos, tmp_path):
    torch.save({"model": make().state_dict()}, tmp_path / "bare.pth")
    extract(tmp_path / "bare.pth", "--data_dir", videos / "class_1", "--num_heads", 2)
    assert np.load(tmp_path / "bare_features.npz")["features"].shape == (3, 64)
