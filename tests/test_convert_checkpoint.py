"""tools/convert_checkpoint.py and tools/inspect_checkpoint.py."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from foreign_models import CLIPS, INSTALL, hugging_face_videomae, timm_vit
from launch import ROOT
from tiny import clips_and_noise, same, tiny_mae, tiny_vit

from tools.convert_checkpoint import main as convert
from tools.inspect_checkpoint import main as inspect
from util.checkpoint import load
from util.dist import UserError
from util.pixels import IMAGE_MEAN, VIDEO_MEAN
from util.pretrained import load_encoder


@pytest.fixture
def run_file(tmp_path):
    """Return the path of a checkpoint of a pretraining run."""
    mae = tiny_mae()
    state = {
        "model": mae.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "epoch": 1,
        "step": 7,
        "samples_consumed": 9,
        "config": mae.config | {"mean": VIDEO_MEAN, "std": (0.2, 0.2, 0.2), "model": "micro"},
        "args": {"lr": 0.1, "data_dirs": ["a"]},
    }
    torch.save(state, tmp_path / "run.pth")
    return tmp_path / "run.pth"


def test_native_to_safetensors_and_back_loses_nothing(run_file, tmp_path):
    pytest.importorskip("safetensors", reason=INSTALL)
    folder = tmp_path / "folder"
    back = tmp_path / "back.pth"
    convert([str(run_file), str(folder), "--to", "safetensors"])
    convert([str(folder), str(back), "--to", "native"])
    state = load(run_file)
    returned = load(back)
    assert returned.keys() == state.keys() - {"optimizer", "scaler"}
    assert same(dict(sorted(returned["model"].items())), dict(sorted(state["model"].items())))
    assert all(returned[key] == state[key] for key in returned if key != "model")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["config"]["num_heads"] == 2
    clips, _ = clips_and_noise()
    assert torch.equal(load_encoder(folder)(clips), load_encoder(run_file)(clips))


def test_converting_another_family_keeps_features_and_pixels(tmp_path):
    model = hugging_face_videomae("VideoMAEForVideoClassification")
    model.save_pretrained(tmp_path / "hf")
    convert([str(tmp_path / "hf"), str(tmp_path / "ours.pth"), "--to", "native"])
    direct = load_encoder(tmp_path / "hf")
    converted = load_encoder(tmp_path / "ours.pth")
    assert torch.equal(direct(CLIPS), converted(CLIPS))
    assert converted.config["mean"] == IMAGE_MEAN
    assert converted.config["num_heads"] == 4


def test_nothing_is_overwritten(run_file, tmp_path):
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", run_file):
        with pytest.raises(UserError, match="exists"):
            convert([str(run_file), str(target), "--to", "safetensors"])
    with pytest.raises(UserError, match=r"Use a name that ends in \.pth"):
        convert([str(run_file), str(tmp_path / "a.safetensors"), "--to", "native"])


def fail_to_write(*arguments, **options):
    """Fail as safetensors does on a full disk."""
    raise pytest.importorskip("safetensors").SafetensorError("I/O error: No space left")


def test_a_failed_conversion_leaves_no_files(run_file, tmp_path, monkeypatch):
    safetensors_torch = pytest.importorskip("safetensors.torch", reason=INSTALL)
    (tmp_path / "folder.tmp").mkdir()  # the user's
    monkeypatch.setattr(safetensors_torch, "save_file", fail_to_write)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        convert([str(run_file), str(tmp_path / "folder"), "--to", "safetensors"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out cannot be written"):
        convert([str(run_file), str(tmp_path / "file/out"), "--to", "native"])
    with pytest.raises(UserError, match="nowhere.pth not found"):
        convert([str(tmp_path / "nowhere.pth"), str(tmp_path / "new/out"), "--to", "native"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["file", "folder.tmp", "run.pth"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_files_have_the_modes_of_the_umask(umask, run_file, tmp_path):
    pytest.importorskip("safetensors", reason=INSTALL)
    before = os.umask(umask)
    try:
        convert([str(run_file), str(tmp_path / "folder"), "--to", "safetensors"])
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder").iterdir()}
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_missing_arguments_are_named(run_file):
    with pytest.raises(UserError, match="required: OUT, --to"):
        convert([str(run_file)])


def test_a_missing_safetensors_package_is_one_line(run_file, tmp_path):
    arguments = [str(run_file), str(tmp_path / "folder"), "--to", "safetensors"]
    program = f"""
import sys
sys.modules["safetensors"] = None
sys.path.insert(0, {str(ROOT)!r})
from tools.convert_checkpoint import main
from util.dist import run_script
run_script(lambda: main({arguments!r}))
"""
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "pip install safetensors" in failed.stderr
    assert not (tmp_path / "folder").exists()


def test_inspect_lists_sizes_flags_and_counters(run_file, capsys):
    inspect([str(run_file)])
    printed = capsys.readouterr().out
    assert "checksums of all records are right" in printed
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert lines >= {
        "family ours",
        "step 7",
        "--lr 0.1",
        "optimizer present",
        "config depth 2",
        "depth 2",
        "heads 2 attention heads (its config)",
    }


def inspected(path, capsys, *flags: str) -> set[str]:
    """Return the rows that inspect prints, with single spaces."""
    inspect([str(path), *flags])
    return {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}


def test_inspect_lists_the_tensors_of_an_unknown_layout(tmp_path, capsys):
    old_format = {"_use_new_zipfile_serialization": False}
    weights = {f"layer{index}": torch.zeros(index, 3) for index in range(12)}
    torch.save({"net": {"part": weights}, "step": 5}, tmp_path / "a.pth", **old_format)
    rows = inspected(tmp_path / "a.pth", capsys)
    assert rows >= {
        f"file {tmp_path}/a.pth, 0.0 MB, old format, without checksums",
        "keys net, step",
        "tensors 12 tensors, 0.00 M parameters",
        "net.part.layer9 (9, 3)",
        "... 2 more",
        "step 5",
    }
    assert "net.part.layer10 (10, 3)" not in rows
    assert any("contains no video encoder" in row for row in rows)


def test_inspect_shows_odd_dictionaries(tmp_path, capsys):
    state: dict = {"args": {1: 2, "lr": 3, None: 4}, "a": {"w": torch.zeros(2)}}
    state["again"] = state["a"]
    state |= {index: index for index in range(200)}
    torch.save(state, tmp_path / "a.pth")
    rows = inspected(tmp_path / "a.pth", capsys)
    assert rows >= {"tensors 1 tensors, 0.00 M parameters", "a.w (2,)", "--1 2", "--None 4"}
    assert rows >= {"99 99", "... 100 more"}


def test_inspect_prints_one_line_per_row(tmp_path, capsys):
    torch.save({"name": "a\nb\x1b[31m"}, tmp_path / "a.pth")
    assert r"name a\nb\x1b[31m" in inspected(tmp_path / "a.pth", capsys)


def test_a_part_of_a_checkpoint_is_refused_with_the_cure(tmp_path):
    parts = [tmp_path / f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    for part in parts:
        part.write_bytes(b"")
    for path in (tmp_path, parts[1]):
        with pytest.raises(UserError, match="is a part of .* Save them as one file: .*save_pre"):
            inspect([str(path)])


def test_inspect_names_the_sizes_that_an_image_model_lacks(tmp_path, capsys):
    torch.save(timm_vit().state_dict(), tmp_path / "image.pth")
    rows = inspected(tmp_path / "image.pth", capsys)
    assert rows >= {
        "family image MAE or timm ViT",
        "heads not recorded; pass --num_heads",
        "num_frames not recorded; pass --num_frames",
        "t_patch_size not recorded; pass --t_patch_size",
        "img_size 32",
        "head 5 classes, weight (5, 32)",
        "read-out reads the class token",
        "pos_embed_temporal not in the file: zero",
    }
    flags = ("--num_frames", "4", "--t_patch_size", "2", "--num_heads", "4")
    rows = inspected(tmp_path / "image.pth", capsys, *flags)
    assert rows >= {"num_frames 4", "t_patch_size 2"}
    assert not any("pass --num" in row for row in rows)


def test_inspect_shows_what_shapes_give_of_joint_positions(tmp_path, capsys):
    model = tiny_mae(sep_pos_embed=False)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    assert inspected(tmp_path / "mae.pth", capsys) >= {
        "img_size not recorded; pass --img_size",
        "pred_t_dim not recorded; pass --num_frames",
        "decoder_num_heads not recorded",
        "heads 2 attention heads (usual for its width)",
        "depth 2",
        "decoder 41 tensors, 0.04 M parameters",
    }


def test_inspect_shows_head_and_classes(tmp_path, capsys):
    model = tiny_vit()
    config = model.config | {"classes": ["a", "b", "c", "d", "e"]}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "vit.pth")
    assert inspected(tmp_path / "vit.pth", capsys) >= {
        "head 5 classes, weight (5, 64)",
        "read-out reads the mean of the patch tokens",
        "classes a, b, c, d, e",
    }
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    assert inspected(tmp_path / "vit.pth", capsys) >= {
        "read-out not recorded; pass --global_pool or --cls_token where it is used",
        "classes not recorded",
    }


def test_inspect_names_v_jepa_in_one_line(tmp_path, capsys):
    weights = {"module.backbone.blocks.0.norm1.weight": torch.ones(3)}
    torch.save({"target_encoder": weights}, tmp_path / "vjepa.pt")
    rows = inspected(tmp_path / "vjepa.pt", capsys)
    assert "model not recognized: V-JEPA 2: rotary positions are not supported" in rows


def test_inspect_runs_from_the_command_line(tmp_path):
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "a.pth")
    command = [sys.executable, "-m", "tools.inspect_checkpoint", str(tmp_path / "a.pth")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "usual for its width" in shown.stdout
