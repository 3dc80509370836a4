"""tools.visualize: pictures of reconstructions and of attention from a checkpoint alone."""

import pytest
import torch
from foreign_models import hugging_face_videomae
from make_videos import write_folder
from PIL import Image
from runs import center_clip
from tiny import tiny_vit
from torchvision.transforms.functional import pil_to_tensor

import pretrain
from data.manifest import find_videos
from tools import visualize
from util.attention_maps import attention_maps, overlay
from util.checkpoint import load
from util.dist import UserError
from util.pixels import VIDEO_MEAN, VIDEO_STD, denormalize
from util.pretrained import load_autoencoder, load_encoder
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
    visualize.main([str(checkpoint), "--device", "cpu", *map(str, flags)])


def names(folder) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


def sheet_rows(path, rows: int) -> torch.Tensor:
    """Return frames (rows, 4, 3, 32, 32) of a contact sheet."""
    picture = pil_to_tensor(Image.open(path))
    tiles = picture[:, -rows * 66 :, -4 * 66 :]
    cells = tiles.unflatten(2, (4, 66)).unflatten(1, (rows, 66)).permute(1, 3, 0, 2, 4)
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
    model = load_autoencoder(checkpoint)
    paths = find_videos([videos], "--data_dirs")
    rows = sheet_rows(tmp_path / "run_gallery_tube_0.5.png", rows=3 * 5)
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
    video = find_videos([videos], "--data_dirs")[3]
    manifest.write_text(f"path,start,end\n{video},,\n{video},0.25,0.5\n")
    draw(checkpoint, "--data_csv", manifest, "--output_dir", tmp_path)
    assert f"clip 1: {video}\nclip 2: {video}#t=0.25,0.5\n" in capsys.readouterr().out


def test_the_checkpoint_is_given_with_or_without_its_flag(checkpoint, videos, tmp_path):
    visualize.main(
        f"--device cpu --checkpoint {checkpoint} --data_dirs {videos} "
        f"--output_dir {tmp_path} --clips 1".split()
    )
    draw(checkpoint, "--data_dirs", videos, "--output_dir", tmp_path / "two", "--clips", 1)
    name = "run_gallery_random_0.75.png"
    assert (tmp_path / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def save_encoder(path, **changes) -> str:
    """Write a classifier, which has no decoder; return the path."""
    model = tiny_vit(num_frames=4, **changes)
    torch.save({"model": model.state_dict(), "config": model.config}, path)
    return str(path)


def without_run(checkpoint, path) -> str:
    """Write the weights and the config of a checkpoint alone; return the path."""
    state = load(checkpoint)
    torch.save({"model": state["model"], "config": state["config"]}, path)
    return str(path)


def test_a_file_without_flags_gets_those_of_the_tool(checkpoint, videos, tmp_path):
    bare = without_run(checkpoint, tmp_path / "bare.pth")
    out = tmp_path / "out"
    draw(bare, "--data_dirs", videos, "--output_dir", out, "--clips", 1, "--short_side", 48)
    assert names(out) == {"bare_gallery_random_0.9.png", "bare_gallery_random_0.9.webp"}
    original = sheet_rows(out / "bare_gallery_random_0.9.png", rows=5)[0]
    path = find_videos([videos], "--data_dirs")[0]
    expected = denormalize(center_clip(path, sampling_rate=4), VIDEO_MEAN, VIDEO_STD)
    difference = original.int() - expected[0].transpose(0, 1).int()
    assert difference.abs().max() <= 1


def test_a_hugging_face_videomae_is_drawn(videos, tmp_path, capsys):
    hugging_face_videomae("VideoMAEForPreTraining").save_pretrained(tmp_path / "videomae")
    out = tmp_path / "out"
    draw(tmp_path / "videomae", "--data_dirs", videos, "--output_dir", out, "--clips", 2)
    still = "videomae_gallery_random_0.9.png"
    assert names(out) == {still, still.replace("png", "webp")}
    rows = sheet_rows(out / still, rows=2 * 5)  # the normalized prediction has its own
    assert not torch.equal(rows[2], rows[3])
    capsys.readouterr()
    draw(tmp_path / "videomae", "--data_dirs", videos, "--output_dir", out, "--attention")
    assert (out / "videomae_attention_layer2.png").exists()


@pytest.mark.parametrize("classifier", [False, True])
def test_attention_rows_equal_the_maps_over_the_frames(classifier, checkpoint, videos, tmp_path):
    path = checkpoint
    if classifier:
        path = save_encoder(tmp_path / "run.pth")
    spacing = "--sampling_rate 2 --short_side 48 --decoder pyav".split()
    chosen = ["--attention", "--layers", 2, 1, "--heads", 2, "--percentile", 95, *spacing]
    draw(path, "--data_dirs", videos, "--output_dir", tmp_path / "out", "--clips", 2, *chosen)
    name = "run_attention_layer1-2_head2"
    assert names(tmp_path / "out") == {f"{name}.png", f"{name}.webp"}
    rows = sheet_rows(tmp_path / "out" / f"{name}.png", rows=2 * 3)
    encoder = load_encoder(path)
    paths = find_videos([videos], "--data_dirs")
    for clip, video in enumerate((paths[0], paths[4])):
        frames = center_clip(video)
        pixels = denormalize(frames, VIDEO_MEAN, VIDEO_STD)
        maps = attention_maps(encoder, frames, [0, 1], True, torch.float32)
        expected = [pixels, *(overlay(pixels, maps[:, layer, 1], 95) for layer in (0, 1))]
        for row, picture in enumerate(expected):
            difference = rows[clip * 3 + row].int() - picture[0].transpose(0, 1).int()
            assert difference.abs().max() <= 2


def test_attention_is_drawn_for_the_last_layer_by_default(checkpoint, videos, tmp_path):
    flags = ["--data_dirs", videos, "--output_dir", tmp_path, "--clips", 1, "--attention"]
    draw(checkpoint, *flags)
    draw(checkpoint, *flags, "--query", "mean", "--layers", "all", "--heads", "all")
    stills = {"run_attention_layer2.png", "run_attention_layer1-2_head1-2_mean.png"}
    assert {name for name in names(tmp_path) if name.endswith(".png")} == stills
    assert Image.open(tmp_path / "run_attention_layer2.webp").n_frames == 4
    with pytest.raises(UserError, match=r"run_attention_layer2.png exists.*--overwrite"):
        draw(checkpoint, *flags)


BAD_INPUT = [
    ("has no decoder.*--attention", ["BARE", "--data_dirs", "VIDEOS"]),
    ("0 checkpoints given", ["--overwrite", "--data_dirs", "VIDEOS"]),
    ("2 checkpoints given", ["CKPT", "--checkpoint", "CKPT", "--data_dirs", "VIDEOS"]),
    ("--layers 3: the encoder has 2", ["CKPT", "--attention", "--layers", "1", "3"]),
    ("--layers 0: the encoder has 2", ["CKPT", "--attention", "--layers", "0"]),
    ("--heads all: the encoder has 2", ["CKPT", "--attention", "--heads", "1", "all"]),
    ("no class token", ["POOLED", "--attention", "--query", "class"]),
    ("--layers has no effect", ["CKPT", "--layers", "1"]),
    ("--masks has no effect", ["CKPT", "--attention", "--masks", "tube:0.5"]),
    ("not in .0, 100.", ["CKPT", "--attention", "--percentile", "0"]),
    ("no videos below", ["CKPT", "--data_dirs", "EMPTY", "--attention"]),
    ("text.mp4 cannot be read", ["CKPT", "--data_dirs", "FOLDER", "--attention"]),
    ("nowhere.pth not found", ["nowhere.pth", "--data_dirs", "VIDEOS"]),
    ("no videos given", ["CKPT"]),
    ("not of the form TYPE:RATIO", ["CKPT", "--data_dirs", "VIDEOS", "--masks", "tube"]),
    ("mask type 'tub'", ["CKPT", "--data_dirs", "VIDEOS", "--masks", "tub:0.5"]),
    ("mask_ratio 2.0", ["CKPT", "--data_dirs", "VIDEOS", "--masks", "tube:2"]),
    ("text.mp4 cannot be read", ["CKPT", "--data_dirs", "FOLDER"]),
]


@pytest.mark.parametrize(("message", "flags"), BAD_INPUT)
def test_bad_input_is_one_line(message, flags, checkpoint, videos, tmp_path):
    save_encoder(tmp_path / "bare.pth")
    save_encoder(tmp_path / "pooled.pth", cls_embed=False)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    paths = {
        "CKPT": checkpoint,
        "BARE": str(tmp_path / "bare.pth"),
        "POOLED": str(tmp_path / "pooled.pth"),
        "EMPTY": str(tmp_path / "empty"),
        "VIDEOS": videos,
        "FOLDER": str(tmp_path),
    }
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as error:
        draw(*[paths.get(flag, flag) for flag in flags], "--output_dir", out)
    assert "\n" not in str(error.value)
    assert not out.exists()
