"""Checkpoints of every family give the features of the models that they come from."""

import argparse

import numpy as np
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
from tiny import clips_and_noise, tiny_mae, tiny_vit

from models_vit import VideoEncoder
from util.checkpoint_formats import FAMILIES, parse_checkpoint, sinusoid
from util.dist import UserError
from util.pixels import IMAGE_MEAN
from util.pretrained import load_encoder, load_pretrained


def layouts_of_our_names(mae) -> dict[str, dict]:
    """Return the files in which the families that use our names store an autoencoder."""
    weights = mae.state_dict()
    decoder = ("decoder", "mask_token")
    encoder = {name: value for name, value in weights.items() if not name.startswith(decoder)}
    other_decoder = {
        "decoder_pos_embed": torch.zeros(1, 65, 32),
        "decoder_embed.weight": torch.zeros(32, 64),
        "mask_token": torch.zeros(1, 1, 32),
        "pred_head.transforms.0.0.attn.qkv.weight": torch.zeros(96, 32),
        "pred_head.projections.0.weight": torch.zeros(128, 32),
    }
    head = {"head.projection.weight": torch.zeros(5, 64)}
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    return {
        "ours": {"model": weights, "config": mae.config},
        "mae_st demo": {"model": fuse_qkv(weights)},
        "released mae_st": {"model_state": encoder | other_decoder},
        "SlowFast": {"model_state": fuse_qkv(encoder) | head},
        "ddp and compile": {"model": wrapped, "args": argparse.Namespace(lr=1)},
    }


@pytest.mark.parametrize(
    ("layout", "has_our_decoder"),
    [
        ("ours", True),
        ("mae_st demo", True),
        ("released mae_st", False),
        ("SlowFast", False),
        ("ddp and compile", True),
    ],
)
def test_layouts_with_our_names_load(layout, has_our_decoder, tmp_path):
    mae = randomized(tiny_mae())
    torch.save(layouts_of_our_names(mae)[layout], tmp_path / "file.pth")
    clips, _ = clips_and_noise()
    with torch.no_grad():
        expected = mae.norm(mae.encode(clips))
        assert_close(load_encoder(tmp_path / "file.pth")(clips), expected, 1e-6)
    other = tiny_mae(trunc_init=True)
    load_pretrained(tmp_path / "file.pth", other)
    loaded = torch.equal(other.decoder_pred.weight, mae.decoder_pred.weight)
    assert loaded == has_our_decoder


@pytest.mark.parametrize("form", ["folder", "file", "torch"])
def test_hugging_face_videomae_features(form, tmp_path, capsys):
    model = hugging_face_videomae("VideoMAEForPreTraining")
    model.save_pretrained(tmp_path / "hf")
    torch.save(model.state_dict(), tmp_path / "hf.pth")  # without its config.json
    path = tmp_path / "hf"
    sizes = {}
    if form == "file":
        path = tmp_path / "hf/model.safetensors"
    elif form == "torch":
        path = tmp_path / "hf.pth"
        sizes = {"num_heads": 4, "img_size": 32, "num_frames": 4}
    encoder = load_encoder(path, **sizes)
    with torch.no_grad():
        expected = model.videomae(CLIPS.transpose(1, 2)).last_hidden_state
        assert_close(encoder(CLIPS), expected)
    assert encoder.config["num_heads"] == 4
    assert encoder.config["mean"] == IMAGE_MEAN
    assert not encoder.config["cls_embed"]
    assert ("its config" in capsys.readouterr().out) == (form != "torch")


def test_hugging_face_classifier_features_and_report(tmp_path, capsys):
    model = hugging_face_videomae("VideoMAEForVideoClassification")
    model.save_pretrained(tmp_path)
    ours = tiny_vit(**SIZE, cls_embed=False, sep_pos_embed=False).eval()
    load_pretrained(tmp_path, ours)
    with torch.no_grad():
        pooled = model.videomae(CLIPS.transpose(1, 2)).last_hidden_state.mean(1)
        assert_close(ours.forward_features(CLIPS), model.fc_norm(pooled))
    printed = capsys.readouterr().out
    synthesized = "blocks.*.attn.k.bias: zero (2), pos_embed: sinusoid over 2 x 4 x 4 tokens"
    assert f"initialized  head.weight, head.bias, {synthesized}" in printed
    assert "unused       head (2)" in printed
    assert "0.485" in printed


def test_sinusoid_positions_fit_another_image_size(tmp_path, capsys):
    hugging_face_videomae("VideoMAEForVideoClassification").save_pretrained(tmp_path)
    larger = load_encoder(tmp_path, img_size=64)
    assert larger.config["img_size"] == 64
    assert larger.pos_embed.shape == (1, 128, 32)
    assert "pos_embed (1, 32, 32) -> (1, 128, 32)" in capsys.readouterr().out


@pytest.mark.parametrize("recorded", ["config", "args"])
def test_sinusoid_positions_keep_their_grid(recorded, tmp_path):
    model = randomized(VideoEncoder(**SIZE, cls_embed=False, sep_pos_embed=False))
    entries = {
        "config": {"img_size": 32, "num_frames": 4, "num_heads": 4},
        "args": {"input_size": 32, "num_frames": 4},
    }
    torch.save({"model": videomae_file(model, ""), recorded: entries[recorded]}, tmp_path / "v.pth")
    maps = sinusoid(32, 32)[0].unflatten(0, (2, 4, 4)).permute(0, 3, 1, 2)
    maps = torch.nn.functional.interpolate(maps, size=(2, 2), mode="bicubic")  # (2, D, 2, 2)
    for num_frames in (2, 16):  # 1 x 2 x 2 tokens, and 8 x 2 x 2, which are as many as 2 x 4 x 4
        steps = num_frames // 2
        series = maps.flatten(1).T[None]  # (1, D 2 2, t')
        expected = torch.nn.functional.interpolate(series, size=steps, mode="linear")
        expected = expected[0].T.unflatten(1, (32, 4)).transpose(1, 2).reshape(1, -1, 32)
        encoder = load_encoder(tmp_path / "v.pth", num_heads=4, img_size=16, num_frames=num_frames)
        assert_close(encoder.pos_embed.detach(), expected, 1e-5)


@pytest.mark.parametrize(
    ("top", "prefix"),
    [("model", "encoder."), ("module", "backbone."), ("model", "_orig_mod."), ("model", "")],
)
def test_videomae_features(top, prefix, tmp_path):
    reference = randomized(VideoEncoder(**SIZE, cls_embed=False, sep_pos_embed=False))
    path = tmp_path / "videomae.pth"
    torch.save({top: videomae_file(reference, prefix)}, path)
    encoder = load_encoder(path, num_heads=4, img_size=32, num_frames=4)
    with torch.no_grad():
        assert_close(encoder(CLIPS), reference(CLIPS), 1e-5)
    with pytest.raises(UserError, match="does not record its num_frames"):
        load_encoder(path, num_heads=4, img_size=32)
    with pytest.raises(UserError, match=r"--no-cls_embed --no-sep_pos_embed"):
        load_pretrained(path, tiny_vit(**SIZE))


def test_sinusoid_values():
    expected = [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)]
    assert sinusoid(3, 4)[0, 1].tolist() == pytest.approx(expected)


def test_timm_class_token_features_on_a_static_clip(tmp_path, capsys):
    """In a single tubelet, a static clip has as many tokens as the image."""
    image = timm_vit(class_token=True, global_pool="token", fc_norm=False)
    torch.save(image.state_dict(), tmp_path / "vit.pth")
    encoder = load_encoder(tmp_path / "vit.pth", num_heads=4, num_frames=2, t_patch_size=2)
    still = CLIPS[:, :, 0]
    with torch.no_grad():
        ours = encoder(still[:, :, None].repeat(1, 1, 2, 1, 1))
        assert_close(ours, image.forward_features(still), 1e-5)
    assert encoder.config["mean"] == IMAGE_MEAN
    printed = capsys.readouterr().out
    assert "patch_embed.proj.weight (32, 3, 8, 8) -> (32, 3, 2, 8, 8)" in printed
    with pytest.raises(UserError, match="does not record its num_frames and t_patch_size"):
        load_encoder(tmp_path / "vit.pth", num_heads=4)


def test_timm_features_without_class_token_on_a_static_clip(tmp_path):
    """Copies of a patch in several tubelets do not change the attention's average."""
    image = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    torch.save({"model": image.state_dict()}, tmp_path / "vit.pth")
    encoder = load_encoder(tmp_path / "vit.pth", num_heads=4, num_frames=4, t_patch_size=2)
    still = CLIPS[:, :, 0]
    with torch.no_grad():
        ours = encoder(still[:, :, None].repeat(1, 1, 4, 1, 1))
        theirs = image.forward_features(still).repeat(1, 2, 1)
    assert_close(ours, theirs, 1e-5)


def test_pooled_image_mae_features_before_the_head(tmp_path):
    image = timm_vit(global_pool="avg")
    torch.save({"model": image.state_dict()}, tmp_path / "mae.pth")
    ours = tiny_vit(**SIZE | {"num_frames": 2}).eval()
    load_pretrained(tmp_path / "mae.pth", ours)
    with torch.no_grad():
        theirs = image.forward_head(image.forward_features(CLIPS[:, :, 0]), pre_logits=True)
        features = ours.forward_features(CLIPS[:, :, :1].repeat(1, 1, 2, 1, 1))
    assert_close(features, theirs, 1e-5)
    assert ours.config["mean"] == IMAGE_MEAN


@pytest.mark.parametrize(
    ("recorded", "given", "num_heads", "source"),
    [
        ({"num_heads": 8}, {}, 8, "its config"),
        ({"num_heads": 8}, {"num_heads": 4}, 8, "its config"),
        ({}, {"num_heads": 2}, 2, "from --model or num_heads"),
    ],
)
def test_num_heads_come_from_the_config_then_the_caller(recorded, given, num_heads, source):
    checkpoint = {"model": tiny_vit(**SIZE).state_dict(), "config": recorded}
    found = parse_checkpoint(checkpoint, given, "x.pth")
    assert found.sizes["num_heads"] == num_heads
    assert found.num_heads_source == source


def test_num_heads_come_from_the_width_last():
    found = parse_checkpoint({"model": tiny_vit().state_dict()}, {}, "x.pth")
    assert found.num_heads_source == "usual for its width"
    with pytest.raises(UserError, match="width 32 is none of"):
        parse_checkpoint({"model": tiny_vit(**SIZE).state_dict()}, {}, "x.pth")


def test_every_family_has_its_own_signature():
    assert len({family.signature for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("change", [{"depth": 10**9}, {"embed_dim": 128}, {"decoder_depth": 3}])
def test_a_config_must_have_the_sizes_of_the_weights(change):
    mae = tiny_mae()
    file = {"model": mae.state_dict(), "config": mae.config}
    assert parse_checkpoint(file, {}, "x.pth").sizes["depth"] == 2
    with pytest.raises(UserError, match=f"x.pth has {next(iter(change))} .* in its config, but"):
        parse_checkpoint(file | {"config": mae.config | change}, {}, "x.pth")
