"""Checkpoints of every family give the features of the models that they come from; what does not fit, or is damaged, is refused in one line."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_files import golden, golden_path
from launch import ROOT
from tiny import clips_and_noise, same, tiny_mae, tiny_vit

from data.transforms import IMAGE_MEAN, VIDEO_MEAN
from models_mae import MaskedAutoencoderViT
from models_vit import VideoEncoder
from util.checkpoint import load
from util.dist import UserError
from util.export import main as export
from util.importer import load_encoder, load_pretrained, sinusoid

SIZE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_frames": 4,
    "t_patch_size": 2,
}
CLIPS = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(2))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode with every parameter moved, so that none is zero or one by accident."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` of the largest value."""
    assert (
        ours.shape == theirs.shape and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    )


def fused(weights: dict) -> dict:
    """q, k, v as one tensor, attn.qkv."""
    result = {
        name: value
        for name, value in weights.items()
        if not any(f".attn.{part}." in name for part in "qkv")
    }
    for name in [name for name in weights if ".attn.q." in name]:
        result[name.replace(".q.", ".qkv.")] = torch.cat(
            [weights[name.replace(".q.", f".{part}.")] for part in "qkv"]
        )
    return result


@pytest.mark.parametrize(
    "layout", ["ours", "mae_st demo", "released mae_st", "SlowFast", "ddp and compile"]
)
def test_layouts_with_our_names(layout, tmp_path):
    mae = randomised(tiny_mae())
    weights, clips = mae.state_dict(), clips_and_noise()[0]
    encoder = {
        name: value
        for name, value in weights.items()
        if not name.startswith(("decoder", "mask_token"))
    }
    released = {
        "decoder_pos_embed": torch.zeros(1, 65, 32),
        "decoder_embed.weight": torch.zeros(32, 64),
        "mask_token": torch.zeros(1, 1, 32),
        "pred_head.transforms.0.0.attn.qkv.weight": torch.zeros(96, 32),
        "pred_head.projections.0.weight": torch.zeros(128, 32),
    }
    files = {
        "ours": {"model": weights, "config": mae.config},
        "mae_st demo": {"model": fused(weights)},
        "released mae_st": {"model_state": encoder | released},
        "SlowFast": {
            "model_state": fused(encoder) | {"head.projection.weight": torch.zeros(5, 64)}
        },
        "ddp and compile": {
            "model": {f"module._orig_mod.{name}": value for name, value in weights.items()},
            "args": argparse.Namespace(lr=1),
        },
    }
    torch.save(files[layout], tmp_path / "file.pth")
    with torch.no_grad():
        close(load_encoder(tmp_path / "file.pth")(clips), mae.norm(mae.encode(clips)), 1e-6)
    other = tiny_mae(trunc_init=True)  # a decoder of our kind comes along, another one stays out
    load_pretrained(tmp_path / "file.pth", other)
    ours = layout not in ("released mae_st", "SlowFast")
    assert (
        torch.equal(other.state_dict()["decoder_pred.weight"], weights["decoder_pred.weight"])
        == ours
    )


def hugging_face(kind: str):
    """A small random Hugging Face VideoMAE: pretraining (norm over the tokens) or classification (pooled)."""
    transformers = pytest.importorskip(
        "transformers", reason="a development dependency: pip install -r requirements-dev.txt"
    )
    pytest.importorskip("safetensors")
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        decoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        use_mean_pooling=kind == "VideoMAEForVideoClassification",
        attn_implementation="eager",
    )
    return randomised(getattr(transformers, kind)(config))


@pytest.mark.parametrize("form", ["folder", "file", "torch"])
def test_hugging_face_videomae_features(form, tmp_path, capsys):
    model = hugging_face("VideoMAEForPreTraining")
    model.save_pretrained(tmp_path / "hf")
    path = {
        "folder": tmp_path / "hf",
        "file": tmp_path / "hf/model.safetensors",
        "torch": tmp_path / "hf.pth",
    }[form]
    torch.save(model.state_dict(), tmp_path / "hf.pth")  # no config beside it
    encoder = load_encoder(
        path, **({"num_heads": 4, "img_size": 32, "num_frames": 4} if form == "torch" else {})
    )
    with torch.no_grad():
        close(encoder(CLIPS), model.videomae(CLIPS.transpose(1, 2)).last_hidden_state)
    assert (
        encoder.config["num_heads"] == 4
        and encoder.config["mean"] == IMAGE_MEAN
        and not encoder.config["cls_embed"]
    )
    assert ("its config" in capsys.readouterr().out) == (form != "torch")


def test_hugging_face_classifier_features_and_positions_of_another_size(tmp_path, capsys):
    model = hugging_face("VideoMAEForVideoClassification")
    model.save_pretrained(tmp_path)
    ours = tiny_vit(**SIZE, cls_embed=False, sep_pos_embed=False).eval()
    load_pretrained(tmp_path, ours)
    with torch.no_grad():
        pooled = model.videomae(CLIPS.transpose(1, 2)).last_hidden_state.mean(1)
        close(ours.forward_features(CLIPS), model.fc_norm(pooled))
    printed = capsys.readouterr().out
    assert (
        "initialised  head.weight, head.bias, blocks.*.attn.k.bias: zero (2), pos_embed: sinusoid over 2 x 4 x 4 tokens"
        in printed
    )
    assert "unused       classifier (2)" in printed and "0.485" in printed
    larger = load_encoder(tmp_path, img_size=64)
    assert larger.config["img_size"] == 64 and larger.pos_embed.shape == (1, 128, 32)
    assert "pos_embed (1, 32, 32) -> (1, 128, 32)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("top", "prefix"),
    [("model", "encoder."), ("module", "backbone."), ("model", "_orig_mod."), ("model", "")],
)
def test_videomae_features(top, prefix, tmp_path):
    """A file of VideoMAE's own layout against the same equations in our encoder's names."""
    reference = randomised(VideoEncoder(**SIZE, cls_embed=False, sep_pos_embed=False))
    weights = reference.state_dict()
    file = {
        f"{prefix}{name}": value
        for name, value in fused(weights).items()
        if name != "pos_embed" and ".qkv.bias" not in name
    }
    for block in range(2):
        weights[f"blocks.{block}.attn.k.bias"].zero_()
        file |= {
            f"{prefix}blocks.{block}.attn.{part}_bias": weights[f"blocks.{block}.attn.{part}.bias"]
            for part in "qv"
        }
    position, column = np.arange(32)[:, None], np.arange(32)[None]
    angle = position / np.power(10000, 2 * (column // 2) / 32)
    weights["pos_embed"].copy_(
        torch.from_numpy(np.where(column % 2, np.cos(angle), np.sin(angle)))[None]
    )
    file |= {
        "decoder.blocks.0.norm1.weight": torch.ones(16),
        "encoder_to_decoder.weight": torch.ones(16, 32),
        "mask_token": torch.ones(1, 1, 16),
    }
    torch.save({top: file}, tmp_path / "videomae.pth")
    sizes = {"num_heads": 4, "img_size": 32, "num_frames": 4}
    encoder = load_encoder(tmp_path / "videomae.pth", **sizes)
    with torch.no_grad():
        close(encoder(CLIPS), reference(CLIPS), 1e-5)
    with pytest.raises(UserError, match="does not say its num_frames"):
        load_encoder(tmp_path / "videomae.pth", num_heads=4, img_size=32)
    with pytest.raises(UserError, match=r"--no-cls_embed --no-sep_pos_embed"):
        load_pretrained(tmp_path / "videomae.pth", tiny_vit(**SIZE))
    assert sinusoid(3, 4)[0, 1].tolist() == pytest.approx(
        [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)]
    )


@pytest.mark.parametrize("token", [True, False])
def test_timm_image_features_on_a_static_clip(token, tmp_path, capsys):
    """Copies of a patch in several tubelets change no attention without a class token; with one, in a single tubelet."""
    timm = pytest.importorskip(
        "timm.models.vision_transformer",
        reason="a development dependency: pip install -r requirements-dev.txt",
    )
    image = randomised(
        timm.VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=5,
            class_token=token,
            global_pool="token" if token else "avg",
            fc_norm=False,
        )
    )
    torch.save(image.state_dict() if token else {"model": image.state_dict()}, tmp_path / "vit.pth")
    frames = 2 if token else 4
    encoder = load_encoder(tmp_path / "vit.pth", num_heads=4, num_frames=frames, t_patch_size=2)
    still = CLIPS[:, :, 0]
    with torch.no_grad():
        ours, theirs = (
            encoder(still[:, :, None].repeat(1, 1, frames, 1, 1)),
            image.forward_features(still),
        )
    close(ours, theirs if token else theirs.repeat(1, 2, 1), 1e-5)
    assert (
        encoder.config["mean"] == IMAGE_MEAN
        and "patch_embed.proj.weight (32, 3, 8, 8) -> (32, 3, 2, 8, 8)" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="does not say its num_frames and t_patch_size"):
        load_encoder(tmp_path / "vit.pth", num_heads=4)


def test_a_pooled_image_model_and_its_classifier(tmp_path):
    timm = pytest.importorskip(
        "timm.models.vision_transformer",
        reason="a development dependency: pip install -r requirements-dev.txt",
    )
    image = randomised(
        timm.VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=5,
            global_pool="avg",
        )
    )
    torch.save({"model": image.state_dict()}, tmp_path / "mae.pth")
    ours = tiny_vit(**SIZE | {"num_frames": 2}).eval()
    load_pretrained(tmp_path / "mae.pth", ours)
    with torch.no_grad():
        theirs = image.forward_head(image.forward_features(CLIPS[:, :, 0]), pre_logits=True)
        close(ours.forward_features(CLIPS[:, :, :1].repeat(1, 1, 2, 1, 1)), theirs, 1e-5)
    assert ours.config["mean"] == IMAGE_MEAN


def test_head_counts_come_from_the_config_else_the_caller_else_the_width(tmp_path, capsys):
    weights = tiny_vit(**SIZE).state_dict()
    torch.save({"model": weights, "config": {"num_heads": 8}}, tmp_path / "config.pth")
    torch.save({"model": weights}, tmp_path / "bare.pth")
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "micro.pth")
    assert load_encoder(tmp_path / "config.pth").blocks[0].attn.num_heads == 8
    assert load_encoder(tmp_path / "bare.pth", num_heads=2).blocks[0].attn.num_heads == 2
    assert load_encoder(tmp_path / "micro.pth").blocks[0].attn.num_heads == 2
    printed = capsys.readouterr().out
    assert all(
        words in printed
        for words in (
            "8 attention heads (its config)",
            "2 attention heads (as --model",
            "2 attention heads (usual",
        )
    )
    with pytest.raises(UserError, match="width 32 is none of"):
        load_encoder(tmp_path / "bare.pth")
    with pytest.raises(UserError, match="num_heads 8, not 4"):
        load_encoder(tmp_path / "config.pth", num_heads=4)


def test_t08_what_goes_where_is_listed(tmp_path, capsys):
    mae = tiny_mae(img_size=48, num_frames=4, pred_t_dim=4)
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "mae.pth")
    model = tiny_vit()
    head = model.head.weight.clone()
    load_pretrained(tmp_path / "mae.pth", model)
    printed = capsys.readouterr().out
    for line in (
        "matched      38 tensors",
        "pos_embed_spatial (1, 36, 64) -> (1, 16, 64), pos_embed_temporal (1, 2, 64) -> (1, 4, 64)",
        "initialised  head.weight, head.bias\n",
        "mask_token (1)",
        "decoder_blocks (32)",
    ):
        assert line in printed, (line, printed)
    assert torch.equal(model.head.weight, head) and torch.equal(
        model.blocks[1].mlp.fc2.weight, mae.blocks[1].mlp.fc2.weight
    )
    assert model.config["mean"] == VIDEO_MEAN


def without(name: str):
    """A change that takes a tensor out."""
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.norm2.bias"), "1 tensors, blocks.1.norm2.bias is missing"),
        (without("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight.* is missing"),
        (without("pos_embed_temporal"), "pos_embed_temporal.* is missing"),
        (without("patch_embed.proj.weight"), "no video encoder"),
        (
            lambda weights: weights.update({"blocks.0.ls1.gamma": torch.ones(64)}),
            "blocks.0.ls1.gamma has no place",
        ),
        (
            lambda weights: weights.update({"blocks.0.norm1.weight": torch.ones(8)}),
            r"blocks.0.norm1.weight has shape \(8,\), not \(64,\)",
        ),
        (
            lambda weights: weights.update({"pos_embed_spatial": torch.ones(1, 12, 64)}),
            "12 positions",
        ),
        (lambda weights: weights.update({"pos_embed_spatial": torch.ones(16)}), "another shape"),
        (
            lambda weights: weights.update({"fc_norm.weight": torch.ones(64)}),
            "two tensors for norm.weight",
        ),
        (
            lambda weights: weights.update({"blocks.0.attn.qkv.weight": torch.ones(10, 64)}),
            "not q, k and v",
        ),
    ],
)
def test_t08_missing_extra_and_wrong_tensors_stop_with_one_line(change, message, tmp_path):
    weights = tiny_mae().state_dict()
    change(weights)
    torch.save({"model": weights}, tmp_path / "bad.pth")
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for attempt in (
        lambda: load_pretrained(tmp_path / "bad.pth", model),
        lambda: load_encoder(tmp_path / "bad.pth"),
    ):
        with pytest.raises(UserError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["checkpoint_optimized_stmae.pth", "checkpoint_mae_st.pyth"])
def test_t10_the_ancestors_checkpoints_give_their_losses(name):
    expected = golden("checkpoint_expected.npz")
    path, clips = golden_path(name), torch.from_numpy(expected["input"])
    with pytest.raises(UserError, match="attention heads"):
        load_encoder(path)
    mae = MaskedAutoencoderViT(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        decoder_embed_dim=24,
        decoder_depth=1,
        decoder_num_heads=3,
        num_frames=8,
        t_patch_size=2,
        pred_t_dim=8,
    )
    load_pretrained(path, mae)
    loss = mae(clips, float(expected["mask_ratio"]), "random", torch.from_numpy(expected["noise"]))[
        0
    ].item()
    assert loss == pytest.approx(float(expected["loss"]), rel=1e-5)
    encoder = load_encoder(path, num_heads=4)
    assert (
        torch.equal(encoder(clips), mae.norm(mae.encode(clips)))
        and encoder.config["img_size"] == 16
    )


def test_t10_a_checkpoint_of_our_first_version_gives_its_features_and_loss():
    expected, path = (
        golden("checkpoint_older.npz"),
        golden_path("checkpoint_older.pth"),
    )  # written by the code of commit 0ba1f24
    clips, noise = torch.from_numpy(expected["input"]), torch.from_numpy(expected["noise"])
    encoder = load_encoder(path)
    with torch.no_grad():
        close(encoder(clips), torch.from_numpy(expected["features"]), 1e-5)
    assert encoder.config["num_heads"] == 2 and encoder.config["mean"] == VIDEO_MEAN
    state = load(path)
    mae = MaskedAutoencoderViT(
        **{
            key: value
            for key, value in state["config"].items()
            if key not in ("model", "mean", "std")
        }
    )
    load_pretrained(path, mae)
    assert mae(clips, float(expected["mask_ratio"]), "random", noise)[0].item() == pytest.approx(
        float(expected["loss"]), rel=1e-5
    )
    assert state["step"] == 2 and state["optimizer"]["state"] and state["args"]["lr"] == 1e-3


class Payload:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "place",
    ["top", "beside the weights", "in a Namespace", "in a plain pickle", "in the old format"],
)
def test_t19_a_payload_is_refused_and_not_run(place, tmp_path):
    path, payload = tmp_path / "hostile.pth", Payload(tmp_path / "ran")
    model = {"model": tiny_vit().state_dict()}
    content = {
        "top": payload,
        "beside the weights": model | {"epoch": payload},
        "in a Namespace": model | {"args": argparse.Namespace(lr=payload)},
        "in a plain pickle": argparse.Namespace(lr=payload),
        "in the old format": model | {"args": argparse.Namespace(lr=payload)},
    }[place]
    if place == "in a plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "in the old format")
    for attempt in (
        load,
        load_encoder,
        lambda path: export(["inspect", str(path)]),
        lambda path: export(["convert", str(path), f"{path}.out", "--to", "native"]),
    ):
        with pytest.raises(UserError, match="hostile.pth cannot be read") as error:
            attempt(path)
        assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hostile.pth"]
    torch.load(
        path, weights_only=False
    ) if place == "top" else None  # the payload does run where nobody is careful
    assert (tmp_path / "ran").exists() == (place == "top")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_t19_damaged_files_are_refused(kind, tmp_path):
    """Truncated anywhere, empty, or a bit flipped anywhere: an error of one line, or (padding) not a bit less."""
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    weights = dict(VideoEncoder(**SIZE | {"depth": 1}).state_dict())
    whole = {"model": weights, "config": VideoEncoder(**SIZE | {"depth": 1}).config, "step": 3}
    torch.save(whole, tmp_path / "whole.pth")
    path = tmp_path / "whole.pth"
    if kind == "safetensors":
        export(["convert", str(path), str(tmp_path / "folder"), "--to", "safetensors"])
        path = tmp_path / "folder/model.safetensors"
    data = path.read_bytes()
    read = load if kind == "pth" else lambda path: load_encoder(path).state_dict()
    good, refused = read(path), 0
    draw = np.random.default_rng(0)
    damaged = [b"", data[:1], data[: len(data) // 2], data[:-1], data[1:], b"x" * 1000]
    places = draw.integers(0, len(data), 150)
    flips = [bytes([data[place] ^ (1 << draw.integers(8))]) for place in places]
    damaged += [
        data[:place] + flip + data[place + 1 :] for place, flip in zip(places, flips, strict=True)
    ]
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            assert same(read(path), good), number
        except UserError as error:
            assert (
                "cannot be read" in str(error) and "\n" not in str(error) and "()" not in str(error)
            )
            refused += 1
    assert refused >= 6 + (150 if kind == "safetensors" else 100)


def test_native_to_safetensors_and_back(tmp_path, capsys):
    pytest.importorskip("safetensors")
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
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    export(["convert", str(tmp_path / "run.pth"), str(folder), "--to", "safetensors"])
    export(["convert", str(folder), str(back), "--to", "native"])
    returned = load(back)
    assert sorted(returned) == sorted(state.keys() - {"optimizer", "scaler"})
    assert same(dict(sorted(returned["model"].items())), dict(sorted(state["model"].items())))
    assert all(returned[key] == state[key] for key in returned if key != "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["config"]["num_heads"] == 2
    clips = clips_and_noise()[0]
    assert torch.equal(load_encoder(folder)(clips), load_encoder(tmp_path / "run.pth")(clips))
    for target in (folder, back):
        with pytest.raises(UserError, match="exists"):
            export(["convert", str(back), str(target), "--to", "safetensors"])
    with pytest.raises(UserError, match="the commands are"):
        export(["convert", str(back)])
    capsys.readouterr()
    export(["inspect", str(tmp_path / "run.pth")])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "family ours",
        "step 7",
        "--lr 0.1",
        "optimizer here",
        "heads 2 attention heads (its config)",
    } <= lines
    assert any("checksums of all records are right" in line for line in lines)


def test_converting_another_family_keeps_its_features_and_pixels(tmp_path):
    model = hugging_face("VideoMAEForVideoClassification")
    model.save_pretrained(tmp_path / "hf")
    export(["convert", str(tmp_path / "hf"), str(tmp_path / "ours.pth"), "--to", "native"])
    direct, converted = load_encoder(tmp_path / "hf"), load_encoder(tmp_path / "ours.pth")
    assert (
        torch.equal(direct(CLIPS), converted(CLIPS))
        and converted.config["mean"] == IMAGE_MEAN
        and converted.config["num_heads"] == 4
    )


def test_the_command_line_and_a_missing_safetensors(tmp_path):
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "a.pth")
    hidden = f"import sys; sys.modules['safetensors'] = None; sys.path.insert(0, {str(ROOT)!r}); "
    hidden += "from util.export import main; from util.dist import run_script; "
    hidden += f"run_script(lambda: main(['convert', {str(tmp_path / 'a.pth')!r}, {str(tmp_path / 'b')!r}, '--to', 'safetensors']))"
    failed = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert (
        failed.returncode == 2
        and failed.stderr.count("\n") == 1
        and "pip install safetensors" in failed.stderr
        and not (tmp_path / "b").exists()
    )
    shown = subprocess.run(
        [sys.executable, "-m", "util.checkpoint", "inspect", str(tmp_path / "a.pth")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "usual for its width" in shown.stdout, shown.stderr
