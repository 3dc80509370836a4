"""Classifiers and decoders of every family compute what their own code computes."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from foreign_models import (
    CLIPS,
    SIZE,
    assert_close,
    fuse_qkv,
    hugging_face_videomae,
    randomized,
    timm_vit,
    videomae_file,
)
from golden_files import golden
from tiny import tiny_mae, tiny_vit

from models_vit import VisionTransformer
from util.checkpoint_formats import parse_checkpoint
from util.dist import UserError
from util.pixels import IMAGE_MEAN, VIDEO_MEAN, VIDEO_STD
from util.pretrained import load_autoencoder, load_classifier, load_encoder

STILL = CLIPS[:, :, :1]  # an image as a clip of one frame
HEADS = {"num_heads": 4}


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equal logits up to 1e-4, and the same order of the best five."""
    assert_close(ours, theirs)
    count = min(5, ours.shape[1])
    assert torch.equal(ours.topk(count).indices, theirs.topk(count).indices)


@pytest.mark.parametrize("named", [True, False])
def test_hugging_face_logits_and_class_names(named, tmp_path):
    model = hugging_face_videomae("VideoMAEForVideoClassification")
    if named:
        model.config.id2label = {0: "run", 1: "sit"}
    model.save_pretrained(tmp_path)
    ours = load_classifier(tmp_path)
    with torch.no_grad():
        assert_same_logits(ours(CLIPS), model(CLIPS.transpose(1, 2)).logits)
    assert ours.config["classes"] == (["run", "sit"] if named else ["0", "1"])
    assert ours.config["mean"] == IMAGE_MEAN
    names = tmp_path / "names.txt"
    names.write_text("sit\nrun")
    if named:
        with pytest.raises(UserError, match="in 2 of 2 classes .class 0 is 'sit', not 'run'"):
            load_classifier(tmp_path, class_names=str(names))
    else:
        assert load_classifier(tmp_path, class_names=str(names)).config["classes"] == ["sit", "run"]


@pytest.mark.parametrize("read_out", ["token", "avg"])
def test_timm_logits_of_an_image(read_out, tmp_path):
    image = timm_vit(global_pool=read_out)
    torch.save(image.state_dict(), tmp_path / "vit.pth")
    ours = load_classifier(tmp_path / "vit.pth", given=HEADS)
    with torch.no_grad():
        assert_same_logits(ours(STILL), image(STILL[:, :, 0]))
    assert ours.config["global_pool"] == (read_out == "avg")
    assert ours.config["num_frames"] == 2  # one tubelet has the tokens of the image


def test_timm_without_class_token_and_fc_norm_is_refused(tmp_path):
    """It normalizes the tokens before it averages them."""
    image = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    torch.save(image.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="no fc_norm and no class token"):
        load_classifier(tmp_path / "vit.pth", given=HEADS | {"global_pool": True})


def golden_classifier() -> tuple[dict, dict, dict]:
    """Return the ancestor's weights, expected logits by read-out, and model arguments."""
    file = golden("vit_base.npz")
    weights = {
        name.removeprefix("param."): torch.from_numpy(file[name])
        for name in file.files
        if name.startswith("param.")
    }
    clips = torch.from_numpy(file["input"])
    logits = {
        True: torch.from_numpy(file["logits_global_pool"]),
        False: torch.from_numpy(file["logits_cls_token"]),
    }
    return weights, {"clips": clips, "logits": logits}, json.loads(str(file["config"]))


def slowfast_names(weights: dict) -> dict:
    """Return the weights with SlowFast's names: fused qkv, and a projection in the head."""
    return {
        name.replace("head.", "head.projection."): value
        for name, value in fuse_qkv(weights).items()
    }


@pytest.mark.parametrize(
    ("layout", "global_pool"),
    [
        ("mae_st", True),
        ("mae_st released", True),
        ("SlowFast", True),
        ("optimized-stmae", False),
        ("bare with --global_pool", True),
        ("bare with --cls_token", False),
    ],
)
def test_the_ancestors_logits(layout, global_pool, tmp_path):
    weights, expected, config = golden_classifier()
    given = {"num_heads": config["num_heads"]}
    files = {
        "mae_st": {"model": weights, "args": argparse.Namespace(lr=0.1)},
        "mae_st released": {"model_state": weights},
        "SlowFast": {"model_state": slowfast_names(weights)},
        "optimized-stmae": {"model": weights, "args": argparse.Namespace(save_prefix="x")},
    }
    torch.save(files.get(layout, weights), tmp_path / "file.pth")
    if layout.startswith("bare"):
        with pytest.raises(UserError, match="Pass --global_pool or --cls_token"):
            load_classifier(tmp_path / "file.pth", given=given)
        given["global_pool"] = global_pool
    ours = load_classifier(tmp_path / "file.pth", given=given)
    with torch.no_grad():
        assert_same_logits(ours(expected["clips"]), expected["logits"][global_pool])


def test_our_read_out_is_recorded_and_a_contradiction_refused(tmp_path):
    model = tiny_vit(global_pool=False)
    torch.save({"model": model.state_dict(), "config": model.config}, tmp_path / "run.pth")
    assert load_classifier(tmp_path / "run.pth").config["global_pool"] is False
    with pytest.raises(UserError, match="classifies the class token, not the mean of the patch"):
        load_classifier(tmp_path / "run.pth", given={"global_pool": True})


def save_with_classes(recorded: object, path: Path) -> None:
    """Save a classifier of five outputs that records something as its class names."""
    model = tiny_vit()
    config = model.config | {"mean": VIDEO_MEAN, "std": VIDEO_STD, "classes": recorded}
    torch.save({"model": model.state_dict(), "config": config}, path)


def test_more_recorded_class_names_than_outputs_become_numbers(tmp_path):
    save_with_classes(["too", "many", "names", "for", "the", "head"], tmp_path / "run.pth")
    classes = load_classifier(tmp_path / "run.pth").config["classes"]
    assert classes == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("recorded", [[7, None, "run"], "run", {"run": 0}], ids=str)
def test_recorded_class_names_that_are_no_list_of_texts_are_refused(recorded, tmp_path):
    save_with_classes(recorded, tmp_path / "run.pth")
    with pytest.raises(UserError, match="config.classes is .* not a list of text"):
        load_classifier(tmp_path / "run.pth")


def test_the_args_of_a_pretraining_run_tell_no_read_out():
    flags = argparse.Namespace(save_prefix="x")
    found = parse_checkpoint({"model": tiny_mae().state_dict(), "args": flags}, {}, "x.pth")
    assert found.global_pool is None
    assert found.decoder_sizes["decoder_embed_dim"] == 32


def videomae_classifier(tmp_path, with_norm: bool) -> VisionTransformer:
    """Write a finetuned file of VideoMAE's own layout; return the model that computes it."""
    reference = randomized(
        VisionTransformer(
            **SIZE | HEADS, num_classes=7, cls_embed=False, sep_pos_embed=False, dropout=0.0
        )
    )
    tensors = videomae_file(reference, "")
    for part in ("weight", "bias"):
        norm = tensors.pop(f"norm.{part}")
        if with_norm:
            tensors[f"fc_norm.{part}"] = norm
    flags = argparse.Namespace(input_size=32, num_frames=4, sampling_rate=4)
    torch.save({"module": tensors, "args": flags}, tmp_path / "videomae.pth")
    return reference


def test_videomae_logits_with_the_sizes_of_its_flags(tmp_path):
    reference = videomae_classifier(tmp_path, with_norm=True)
    ours = load_classifier(tmp_path / "videomae.pth", given=HEADS)
    with torch.no_grad():
        assert_same_logits(ours(CLIPS), reference(CLIPS))


def test_videomae_without_a_final_norm_starts_it_fresh(tmp_path, capsys):
    videomae_classifier(tmp_path, with_norm=False)
    with pytest.raises(UserError, match="no fc_norm and no class token"):
        load_classifier(tmp_path / "videomae.pth", given=HEADS)
    encoder = load_encoder(tmp_path / "videomae.pth", num_heads=4)
    assert encoder.norm.weight.eq(1).all()
    assert "norm.weight: one (1), norm.bias: zero (1)" in capsys.readouterr().out


def test_hugging_face_predictions_of_hidden_tokens(tmp_path):
    model = hugging_face_videomae("VideoMAEForPreTraining")
    model.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    noise = torch.rand(1, ours.num_tokens).expand(2, -1)  # its mask has one size for all clips
    with torch.no_grad():
        _, pred, mask = ours(CLIPS, 0.75, "random", noise)
        assert_close(pred, model(CLIPS.transpose(1, 2), bool_masked_pos=mask).logits)
    assert ours.config["targets"] == "videomae"
    larger = load_autoencoder(tmp_path, given={"num_frames": 8})
    assert larger.config["pred_t_dim"] == 8
    assert larger.decoder_pos_embed.shape == (1, 64, 16)


def test_our_decoder_needs_its_number_of_heads(tmp_path):
    mae = tiny_mae()
    torch.save({"model": mae.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="attention heads of its decoder, and width 32 is unusual"):
        load_autoencoder(tmp_path / "bare.pth")
    ours = load_autoencoder(tmp_path / "bare.pth", given={"decoder_num_heads": 4})
    noise = torch.rand(2, 64)
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(clips, noise=noise)[0], mae.eval()(clips, noise=noise)[0])
    assert "targets" not in ours.config


def test_a_classifier_has_no_decoder_and_a_pretrained_model_no_head(tmp_path):
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "vit.pth")
    torch.save({"model": tiny_mae().state_dict()}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="has no decoder"):
        load_autoencoder(tmp_path / "vit.pth")
    with pytest.raises(UserError, match="has no classifier: it is a pretraining checkpoint"):
        load_classifier(tmp_path / "mae.pth")


def test_vjepa_is_refused_also_with_stored_positions():
    tensors = {"module.backbone.pos_embed": torch.zeros(1, 4, 8)}
    for key in ("encoder", "target_encoder", "ema_encoder"):
        with pytest.raises(UserError, match="V-JEPA 2: rotary positions are not supported"):
            parse_checkpoint({key: tensors, "epoch": 1}, {}, "x.pt")
