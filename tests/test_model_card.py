"""tools/model_card.py: the README.md of a converted checkpoint."""

import json
import re

import pytest
import torch
from foreign_models import INSTALL, hugging_face_videomae
from tiny import tiny_mae, tiny_vit

from tools.convert_checkpoint import main as convert
from tools.model_card import model_card, without_folders
from util.pixels import VIDEO_MEAN, VIDEO_STD
from util.pretrained import load_classifier, load_encoder

PRIVATE = "/home/somebody/secret"


def run_state(model, **more) -> dict:
    """Return a checkpoint of a run whose flags have private folders."""
    flags = {
        "data_dirs": [f"{PRIVATE}/kinetics/", f"{PRIVATE}/ssv2"],
        "finetune": f"{PRIVATE}/weights.pth",
        "output_dir": f"{PRIVATE}/out",
        "save_prefix": "run",
        "lr": 0.25,
        "num_workers": 7,
        "embed_dim": 64,
        "jitter_scales_relative": (0.5, 1.0),
    }
    state = {
        "model": model.state_dict(),
        "config": model.config | {"mean": VIDEO_MEAN, "std": VIDEO_STD, "model": "vit_own"},
        "args": flags,
        "step": 20,
        "data": {"samples": 1234, "sha256": "0"},
        "unreadable": {f"{PRIVATE}/a.mp4": "broken"},
    }
    return state | more


def classifier_state() -> dict:
    """Return a checkpoint of a finetuning run."""
    classes = ["run", "walk", "a|b", "sit", "stand"]
    state = run_state(tiny_vit(), best_acc1=61.5)
    state["config"]["classes"] = classes
    return state


def converted(state: dict, tmp_path):
    """Return the folder that a checkpoint is converted to."""
    pytest.importorskip("safetensors", reason=INSTALL)
    torch.save(state, tmp_path / "run_best.pth")
    convert([str(tmp_path / "run_best.pth"), str(tmp_path / "folder"), "--to", "safetensors"])
    return tmp_path / "folder"


def test_no_folder_of_the_user_is_published(tmp_path):
    folder = converted(classifier_state(), tmp_path)
    for name in ("README.md", "config.json"):
        text = (folder / name).read_text()
        assert "somebody" not in text and "secret" not in text
        assert str(tmp_path) not in text
    flags = json.loads((folder / "config.json").read_text())["args"]
    assert flags["data_dirs"] == ["kinetics", "ssv2"]
    assert flags["lr"] == 0.25


def test_paths_lose_their_folders_and_nothing_else_changes():
    values = {"a": "/x/y/", "b": ["C:\\u\\v.csv", 1, None], "c": "hf:a/b", "d": "https://a/b"}
    values |= {"e": "file:///home/u/x", "f": "s3://private/y", "g": "https://me:key@host/z"}
    assert without_folders(values) == {
        "a": "y",
        "b": ["v.csv", 1, None],
        "c": "hf:a/b",
        "d": "https://a/b",
        "e": "x",
        "f": "y",
        "g": "z",
    }


def test_the_front_matter_is_valid():
    hub = pytest.importorskip("huggingface_hub", reason=INSTALL)
    for model, tag in ((tiny_mae(), None), (tiny_vit(), "video-classification")):
        card = hub.ModelCard(model_card(run_state(model), "run.pth"))
        assert card.data.license == "other"
        assert card.data.library_name == "st-mae"
        assert card.data.pipeline_tag == tag
        assert "video" in card.data.tags


@pytest.mark.parametrize("kind", ["mae", "classifier"])
def test_the_loading_code_runs(kind, tmp_path):
    state = classifier_state()
    expected = load_classifier
    if kind == "mae":
        state = run_state(tiny_mae())
        expected = load_encoder
    folder = converted(state, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    clips = torch.randint(0, 256, (1, 3, 8, 32, 32), dtype=torch.uint8)
    names = {"clips": clips}
    exec(code.replace("hf:OWNER/REPO", str(folder)), names)
    result = names["logits" if kind == "classifier" else "tokens"]
    assert torch.equal(result, expected(folder)(clips))


def test_the_card_has_architecture_data_recipe_and_results(tmp_path):
    records = [{"step": 10}, {"step": 20, "train_loss": 1.25, "test_acc1": 61.5}, {"step": 30}]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "run_log.txt").write_text("\n".join([*lines, '{"step": 2']))
    card = model_card(classifier_state(), tmp_path / "run_best.pth")
    for row in (
        "# vit_own",
        "| parameters | 0.1 M |",
        "| num_heads | 2 |",
        "| num_classes | 5 |",
        "| classes | run, walk, a\\|b, sit, stand |",
        "| --data_dirs | kinetics, ssv2 |",
        "| training samples | 1234 |",
        "| --lr | 0.25 |",
        "| --jitter_scales_relative | 0.5, 1.0 |",
        "| best validation top-1 (%) | 61.50 |",
        "| step | 20 |",
        "| training loss | 1.25 |",
        "| validation top-1 (%) | 61.5 |",
    ):
        assert row in card.splitlines()
    assert "num_workers" not in card  # does not change results
    assert "--embed_dim" not in card  # is in the architecture
    assert "Training started from `weights.pth`" in card


def test_the_card_of_weights_alone_has_no_empty_sections():
    model = tiny_mae()
    state = {"model": model.state_dict(), "config": model.config}
    headings = re.findall(r"^## (.*)$", model_card(state, "hf:a/b"), flags=re.M)
    assert headings == ["Use", "Architecture", "License"]


def test_results_that_are_not_numbers_are_left_out(tmp_path):
    record = {"step": 10, "train_loss": None, "test_acc1": "high", "test_loss": 0.5}
    (tmp_path / "run_log.txt").write_text(json.dumps(record) + "\n")
    card = model_card(run_state(tiny_vit(), best_acc1=None), tmp_path / "run_best.pth")
    assert "| validation loss | 0.5 |" in card
    assert "top-1" not in card and "training loss" not in card


def test_the_license_of_another_family_is_named(tmp_path):
    hugging_face_videomae("VideoMAEForVideoClassification").save_pretrained(tmp_path / "hf")
    convert([str(tmp_path / "hf"), str(tmp_path / "folder"), "--to", "safetensors"])
    card = (tmp_path / "folder/README.md").read_text()
    assert "converted from Hugging Face VideoMAE: the license of the original weights" in card
