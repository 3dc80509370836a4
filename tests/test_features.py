"""--extract_features: against a plain loop over the files, and the same file for one and two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from launch import torchrun
from make_videos import write_folder
from PIL import Image
from test_finetune import SMALL, VIDEO, image_command, images, pretrained, video_command  # noqa: F401 (images is a fixture)
from test_validation import plain_clip, saved_model

import finetune
import finetune_on_image
from data.transforms import IMAGE_MEAN, IMAGE_STD, image_transform, normalize
from models_vit import VisionTransformer
from util.dist import UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eleven videos in class_0 and class_1."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 11))


def saved_classifier(path) -> VisionTransformer:
    """The model of a finetuning checkpoint."""
    state = torch.load(path, weights_only=True)
    model = VisionTransformer(
        **{
            key: value
            for key, value in state["config"].items()
            if key not in ("model", "mean", "std", "classes")
        }
    )
    model.load_state_dict(state["model"])
    return model.eval()


def test_features_of_a_finetuned_model_equal_a_plain_loop_on_any_number_of_processes(
    videos, tmp_path
):
    finetune.main(video_command(videos, tmp_path, "--max_steps", "4", "--batch_size_per_gpu", "4"))
    asked = [*VIDEO, "--val_dir", videos, "--extract_features", "--batch_size_per_gpu", "4"]
    finetune.main([*asked, "--output_dir", str(tmp_path)])  # auto: the best
    two = torchrun(
        "finetune.py",
        2,
        [*asked, "--output_dir", str(tmp_path / "two"), "--resume", str(tmp_path / "run_best.pth")],
    )
    assert two.returncode == 0, two.stderr[-2000:]
    assert (tmp_path / "run_features.npz").read_bytes() == (
        tmp_path / "two/run_features.npz"
    ).read_bytes()
    table, model = (
        np.load(tmp_path / "run_features.npz"),
        saved_classifier(tmp_path / "run_best.pth"),
    )
    assert table["features"].shape == (11, 64) and len(set(table["paths"].tolist())) == 11
    assert table["classes"].tolist() == ["class_0", "class_1"]
    for values, label, path in zip(table["features"], table["labels"], table["paths"], strict=True):
        assert Path(path).parent.name == f"class_{label}"
        with torch.no_grad():
            tokens = model.encode(plain_clip(str(path)))
        torch.testing.assert_close(
            torch.from_numpy(values),
            model.norm(tokens[0, 1:].mean(0)).detach(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_pretrained_checkpoint_and_videos_without_labels(videos, tmp_path):
    mae = pretrained(videos, tmp_path)
    manifest = tmp_path / "list.csv"
    listed = sorted(map(str, Path(videos).glob("*/*.mp4")))[:3]
    manifest.write_text(
        "path,label\n"
        + "".join(f"{path},{label}\n" for path, label in zip(listed, ("b", "", "a"), strict=True))
    )
    asked = [
        *VIDEO,
        "--val_csv",
        str(manifest),
        "--extract_features",
        "--finetune",
        mae,
        "--batch_size_per_gpu",
        "2",
        "--output_dir",
    ]
    finetune.main([*asked, str(tmp_path / "out"), "--img_size", "24", "--num_frames", "8"])
    table = np.load(tmp_path / "out/run_features.npz")
    assert (
        table["paths"].tolist() == listed
        and table["labels"].tolist() == [1, -1, 0]
        and table["classes"].tolist() == ["a", "b"]
    )
    model = saved_model(Path(mae))
    from data.decode import frame_indices, open_video, view_start
    from data.transforms import VIDEO_MEAN, VIDEO_STD, view_transform

    for values, path in zip(table["features"], listed, strict=True):
        with open_video(path, "pyav", 48) as video:
            shape = {"num_frames": 8, "sampling_rate": 2}
            start = view_start(video.num_frames, video.fps, **shape, view=0, views=1)
            frames = torch.from_numpy(
                video.read(frame_indices(video.num_frames, video.fps, **shape, start=start))
            )
        clip = normalize(
            view_transform(24, 1)(frames.permute(0, 3, 1, 2)).transpose(1, 2), VIDEO_MEAN, VIDEO_STD
        )
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(values),
                model.norm(model.encode(clip)[0, 1:].mean(0)),
                rtol=1e-4,
                atol=1e-5,
            )
    manifest.write_text("".join(f"{path}\n" for path in listed))
    finetune.main([*asked, str(tmp_path / "bare"), "--img_size", "24", "--num_frames", "8"])
    assert np.load(tmp_path / "bare/run_features.npz")["labels"].tolist() == [-1, -1, -1]


def test_the_runs_own_weights_come_before_those_of_finetune(videos, tmp_path, capsys):
    mae = pretrained(videos, tmp_path)
    size = ["--img_size", "24", "--num_frames", "8", "--batch_size_per_gpu", "4", "--finetune", mae]
    finetune.main(video_command(videos, tmp_path, *size, "--max_steps", "2"))
    said = []
    for resume in ("auto", ""):
        capsys.readouterr()
        finetune.main(
            video_command(videos, tmp_path, *size, "--extract_features", "--resume", resume)
        )
        said.append(capsys.readouterr().out)
    assert (
        "weights from " + str(tmp_path / "run_best.pth") in said[0]
        and f"weights from {mae}" in said[1]
    )


def test_features_of_images(images, tmp_path):  # noqa: F811
    finetune_on_image.main(
        image_command(images, tmp_path, "--max_steps", "2", "--batch_size_per_gpu", "5")
    )
    asked = [
        *SMALL,
        "--val_data_path",
        images,
        "--extract_features",
        "--batch_size_per_gpu",
        "5",
        "--resume",
        str(tmp_path / "run.pth"),
    ]
    finetune_on_image.main([*asked, "--output_dir", str(tmp_path / "one")])
    two = torchrun("finetune_on_image.py", 2, [*asked, "--output_dir", str(tmp_path / "two")])
    assert two.returncode == 0, two.stderr[-2000:]
    assert (tmp_path / "one/run_features.npz").read_bytes() == (
        tmp_path / "two/run_features.npz"
    ).read_bytes()
    table, model = (
        np.load(tmp_path / "one/run_features.npz"),
        saved_classifier(tmp_path / "run.pth"),
    )
    assert table["features"].shape == (12, 64)
    for values, label, path in zip(table["features"], table["labels"], table["paths"], strict=True):
        assert ("bright", "dark")[label] in str(path)
        clip = image_transform(32, train=False)(Image.open(path).convert("RGB"))[
            None, :, None
        ].expand(-1, -1, 4, -1, -1)
        with torch.no_grad():
            expected = model.norm(
                model.encode(normalize(clip, IMAGE_MEAN, IMAGE_STD))[0, 1:].mean(0)
            )
        torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_one_line(videos, tmp_path):
    mae = pretrained(videos, tmp_path)
    asked = [
        *VIDEO,
        "--val_dir",
        videos,
        "--output_dir",
        str(tmp_path / "out"),
        "--extract_features",
    ]
    cases = {
        "--extract_features found no checkpoint": [],
        "no checkpoint of a finetuning run": ["--resume", mae],
        "nowhere.pth: give": ["--resume", str(tmp_path / "nowhere.pth"), "--finetune", mae],
        "embed_dim 64": ["--finetune", mae, "--model", "vit_tiny_patch16"],
    }
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message) as error:
            finetune.main([*asked, *flags])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
