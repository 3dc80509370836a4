"""tools.visualize: a gallery from a pretraining checkpoint alone."""

import pytest
import torch
from make_videos import write_folder
from PIL import Image
from runs import center_clip
from torchvision.transforms.functional import pil_to_tensor

import pretrain
from data.manifest import find_videos
from tools import visualize
from util.dist import UserError
from util.pixels import VIDEO_MEAN, VIDEO_STD, denormalize
from util.seeds import fixed_noise

RUN = (
    "--model mae_vit_micro_patch16 --patch_size 8 --img_size 32 --num_frames 4 --pred_t_dim 4 "
    "--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --norm_pix_loss "
    "--short_side 48 --sampling_rate 2 --decoder pyav --mask_ratio 0.75 "
    "--max_steps 1 --batch_size_per_gpu 4 --repeat_aug 1 --lr 0.001 --recon_every 0 "
    "--num_workers 0 --device cpu --save_prefix run"
).split()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of five videos."""
    return str(write_folder(tmp_path_factory.mktemp("videos"), 5))


@pytest.fixture(scope="module")
def checkpoint(videos, tmp_path_factory):
    """Return a checkpoint of pretrain.py."""
    out = str(tmp_path_factory.mktemp("run"))
    pretrain.main([*RUN, "--data_dirs", videos, "--output_dir", out])
    return f"{out}/run.pth"


def draw(checkpoint, *flags) -> None:
    """Run the tool on the CPU."""
    visualize.main([checkpoint, "--device", "cpu", *map(str, flags)])


def names(folder) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


def sheet_rows(path, clips: int) -> torch.Tensor:
    """Return frames (clips x 5, 4, 3, 32, 32) of a contact sheet: five rows a clip."""
    picture = pil_to_tensor(Image.open(path))
    tiles = picture[:, -clips * 5 * 66 :, -4 * 66 :]
    cells = tiles.unflatten(2, (4, 66)).unflatten(1, (clips * 5, 66)).permute(1, 3, 0, 2, 4)
    return cells[..., :64:2, :64:2]


def test_a_checkpoint_and_videos_are_all_it_needs(checkpoint, videos, tmp_path):
    draw(checkpoint, "--data_dirs", videos, "--output_dir", tmp_path)
    assert names(tmp_path) == {"run_gallery_random_0.75.png", "run_gallery_random_0.75.webp"}


def test_a_gallery_equals_a_plain_loop_over_the_videos(checkpoint, videos, tmp_path):
    masks = ["random:0.75", "tube:0.5"]
    draw(
        checkpoint,
        *["--data_dirs", videos, "--output_dir", tmp_path, "--clips", 3, "--masks", *masks],
    )
    assert len(names(tmp_path)) == 4
    model, _ = visualize.load_model(checkpoint)
    paths = find_videos([videos], "--data_dirs")
    rows = sheet_rows(tmp_path / "run_gallery_tube_0.5.png", clips=3)
    for clip, index in enumerate((0, 2, 4)):
        noise = fixed_noise([index], 32)
        original, predicted, hidden = model.eval().reconstruct(
            center_clip(paths[index], num_frames=4, img_size=32), 0.5, "tube", noise
        )
        for row, frames in ((0, original), (4, predicted.where(hidden, original))):
            expected = denormalize(frames, VIDEO_MEAN, VIDEO_STD)[0].transpose(0, 1)
            difference = rows[clip * 5 + row].int() - expected.int()
            assert difference.abs().max() <= 1


def test_the_animation_has_all_frames(checkpoint, videos, tmp_path):
    draw(checkpoint, "--data_dirs", videos, "--output_dir", tmp_path, "--clips", 1)
    moving = Image.open(tmp_path / "run_gallery_random_0.75.webp")
    assert moving.n_frames == 4
    assert moving.is_animated


def test_existing_pictures_are_replaced_on_request_only(checkpoint, videos, tmp_path):
    flags = ["--data_dirs", videos, "--output_dir", tmp_path, "--clips"]
    draw(checkpoint, *flags, 2)
    picture = tmp_path / "run_gallery_random_0.75.png"
    before = picture.read_bytes()
    with pytest.raises(UserError, match=r"run_gallery_random_0.75.png exists.*--overwrite"):
        draw(checkpoint, *flags, 1)
    assert picture.read_bytes() == before
    draw(checkpoint, *flags, 1, "--overwrite")
    assert picture.read_bytes() != before
    draw(checkpoint, *flags, 1, "--save_prefix", "other", "--mask_type", "tube")
    assert (tmp_path / "other_gallery_tube_0.75.png").exists()


def test_a_manifest_replaces_folders(checkpoint, videos, tmp_path, capsys):
    manifest = tmp_path / "list.csv"
    manifest.write_text(find_videos([videos], "--data_dirs")[3] + "\n")
    draw(checkpoint, "--data_csv", manifest, "--output_dir", tmp_path)
    assert f"clip 1: {find_videos([videos], '--data_dirs')[3]}" in capsys.readouterr().out


BAD_INPUT = [
    ("not a pretraining checkpoint", ["BARE", "--data_dirs", "VIDEOS"]),
    ("nowhere.pth not found", ["nowhere.pth", "--data_dirs", "VIDEOS"]),
    ("no videos given", ["CKPT"]),
    ("not of the form TYPE:RATIO", ["CKPT", "--data_dirs", "VIDEOS", "--masks", "tube"]),
    ("mask type 'tub'", ["CKPT", "--data_dirs", "VIDEOS", "--masks", "tub:0.5"]),
    ("mask_ratio 2.0", ["CKPT", "--data_dirs", "VIDEOS", "--masks", "tube:2"]),
    ("text.mp4 cannot be read", ["CKPT", "--data_dirs", "FOLDER"]),
]


@pytest.mark.parametrize(("message", "flags"), BAD_INPUT)
def test_bad_input_is_one_line(message, flags, checkpoint, videos, tmp_path):
    torch.save({"model": {}}, tmp_path / "bare.pth")
    (tmp_path / "text.mp4").write_text("not a video")
    paths = {
        "CKPT": checkpoint,
        "BARE": str(tmp_path / "bare.pth"),
        "VIDEOS": videos,
        "FOLDER": str(tmp_path),
    }
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as error:
        draw(*[paths.get(flag, flag) for flag in flags], "--output_dir", out)
    assert "\n" not in str(error.value)
    assert not out.exists()
