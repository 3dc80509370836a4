"""Pretrained weights load strictly and with a report; what does not fit is refused (T08, T10)."""

import pytest
import torch
from foreign_models import SIZE, assert_close
from golden_files import golden, golden_path
from tiny import tiny_mae, tiny_vit

from models_mae import MaskedAutoencoderViT
from models_vit import normalize
from util.checkpoint import load
from util.dist import UserError
from util.pixels import VIDEO_MEAN
from util.pretrained import flags_for, load_encoder, load_pretrained, resample_positions


def test_t08_the_report_lists_every_tensor(tmp_path, capsys):
    mae = tiny_mae(img_size=48, num_frames=4, pred_t_dim=4)
    torch.save({"model": mae.state_dict(), "config": mae.config}, tmp_path / "mae.pth")
    model = tiny_vit()
    head = model.head.weight.clone()
    load_pretrained(tmp_path / "mae.pth", model)
    printed = capsys.readouterr().out
    for line in (
        "matched      38 tensors",
        "resized      pos_embed_spatial (1, 36, 64) -> (1, 16, 64), "
        "pos_embed_temporal (1, 2, 64) -> (1, 4, 64)",
        "initialized  head.weight, head.bias\n",
        "mask_token (1)",
        "decoder_blocks (32)",
    ):
        assert line in printed, (line, printed)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, mae.blocks[1].mlp.fc2.weight)
    assert model.config["mean"] == VIDEO_MEAN


def remove(name: str):
    """Return a change that removes a tensor."""
    return lambda weights: weights.pop(name)


def put(name: str, value: torch.Tensor):
    """Return a change that adds or replaces a tensor."""
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("blocks.1.norm2.bias"), "1 tensors, blocks.1.norm2.bias is missing"),
        (remove("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight.* is missing"),
        (remove("pos_embed_temporal"), "pos_embed_temporal.* is missing"),
        (remove("patch_embed.proj.weight"), "no video encoder"),
        (
            put("blocks.0.ls1.gamma", torch.ones(64)),
            "blocks.0.ls1.gamma is not in the model",
        ),
        (
            put("blocks.0.norm1.weight", torch.ones(8)),
            r"blocks.0.norm1.weight has shape \(8,\), not \(64,\)",
        ),
        (put("pos_embed_spatial", torch.ones(1, 12, 64)), "12 positions"),
        (put("pos_embed_spatial", torch.ones(16)), "another shape"),
        (put("fc_norm.weight", torch.ones(64)), "norm.weight twice after renaming"),
        (put("blocks.0.attn.qkv.weight", torch.ones(10, 64)), "not q, k and v"),
        (put("blocks.0.attn.qkv.weight", torch.ones(0, 64)), "not q, k and v"),
    ],
)
def test_t08_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
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


def test_another_number_of_heads_is_refused(tmp_path):
    checkpoint = {"model": tiny_vit(**SIZE).state_dict(), "config": {"num_heads": 8}}
    torch.save(checkpoint, tmp_path / "config.pth")
    assert load_encoder(tmp_path / "config.pth").blocks[0].attn.num_heads == 8
    with pytest.raises(UserError, match="num_heads 8, not 4"):
        load_encoder(tmp_path / "config.pth", num_heads=4)


def test_flags_for_names_what_fits_the_checkpoint():
    sizes = {
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "patch_size": 14,
        "cls_embed": False,
        "no_qkv_bias": False,
    }
    assert flags_for(["depth", "embed_dim"], sizes) == "--model vit_huge_patch14"
    assert flags_for(["patch_size", "cls_embed"], sizes) == "--patch_size 14 --no-cls_embed"
    assert flags_for(["no_qkv_bias"], sizes) == "no --no_qkv_bias"
    giant = sizes | {"embed_dim": 1408, "depth": 40}
    assert flags_for(["depth"], giant) == "--model vit_giant_patch14"
    assert flags_for(["depth"], giant | {"patch_size": 16}) == "--model vit_giant_patch14"
    assert flags_for(["depth"], sizes | {"depth": 7}) == "num_heads in your own code"


def test_joint_positions_of_constant_value_stay_constant():
    model = tiny_vit(sep_pos_embed=False)  # 4 steps of 4 x 4 tokens and a class token
    for steps, side, known in ((2, 4, None), (4, 6, None), (2, 6, 2)):
        old = torch.full((1, 1 + steps * side**2, 64), 3.0)
        new = resample_positions("pos_embed", old, model, known)
        assert new.shape == (1, 65, 64)
        torch.testing.assert_close(new, torch.full_like(new, 3.0))
    for count, known in ((3 * 25, None), (16, 0), (0, None)):
        with pytest.raises(ValueError, match=f"{count} positions"):
            resample_positions("pos_embed", torch.ones(1, 1 + count, 64), model, known)


@pytest.mark.parametrize("name", ["checkpoint_optimized_stmae.pth", "checkpoint_mae_st.pyth"])
def test_t10_the_ancestors_checkpoints_give_their_losses(name):
    expected = golden("checkpoint_expected.npz")
    path = golden_path(name)
    clips = torch.from_numpy(expected["input"])
    noise = torch.from_numpy(expected["noise"])
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
    loss, _, _ = mae(clips, float(expected["mask_ratio"]), "random", noise)
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-5)
    encoder = load_encoder(path, num_heads=4)
    assert torch.equal(encoder(clips), mae.norm(mae.encode(clips)))
    assert encoder.config["img_size"] == 16
    pixels = torch.randint(0, 256, clips.shape, dtype=torch.uint8)
    normalized = normalize(pixels, encoder.config["mean"], encoder.config["std"])
    assert torch.equal(encoder(pixels), encoder(normalized))


def test_t10_a_checkpoint_of_our_first_version_still_loads():
    """The file was written by the code of commit 0ba1f24."""
    expected = golden("checkpoint_older.npz")
    path = golden_path("checkpoint_older.pth")
    clips = torch.from_numpy(expected["input"])
    noise = torch.from_numpy(expected["noise"])
    encoder = load_encoder(path)
    with torch.no_grad():
        assert_close(encoder(clips), torch.from_numpy(expected["features"]), 1e-5)
    assert encoder.config["num_heads"] == 2
    assert encoder.config["mean"] == VIDEO_MEAN
    state = load(path)
    recorded = state["config"].items()
    not_sizes = ("model", "mean", "std")
    mae = MaskedAutoencoderViT(**{key: value for key, value in recorded if key not in not_sizes})
    load_pretrained(path, mae)
    loss, _, _ = mae(clips, float(expected["mask_ratio"]), "random", noise)
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert state["step"] == 2
    assert state["optimizer"]["state"]
    assert state["args"]["lr"] == 1e-3
