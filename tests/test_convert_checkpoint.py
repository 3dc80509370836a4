"""tools/convert_checkpoint.py and tools/inspect_checkpoint.py."""

import json
import subprocess
import sys

import pytest
import torch
from foreign_models import CLIPS, INSTALL, hugging_face_videomae
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
        "optimizer": {"state": {}},
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
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
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


def test_inspect_describes_files_without_an_encoder(tmp_path, capsys):
    old_format = {"_use_new_zipfile_serialization": False}
    torch.save({"weight": torch.zeros(3), "step": 5}, tmp_path / "a.pth", **old_format)
    inspect([str(tmp_path / "a.pth")])
    printed = capsys.readouterr().out
    assert "old format, without checksums" in printed
    assert "none read: " in printed
    assert "contains no video encoder" in printed


def test_inspect_runs_from_the_command_line(tmp_path):
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "a.pth")
    command = [sys.executable, "-m", "tools.inspect_checkpoint", str(tmp_path / "a.pth")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "usual for its width" in shown.stdout
