"""Golden files of the ancestor: losses, predictions, gradients, a trajectory, schedules, groups."""

import json

import numpy as np
import pytest
import torch
from golden_files import golden

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.optim import (
    Schedule,
    finetune_param_groups,
    layer_lr_scale,
    make_optimizer,
    pretrain_param_groups,
    set_learning_rate,
    update,
    warmup_cosine,
)

MAE = ("base", "norm_pix", "pred_t_half", "joint_pos_no_cls", "no_qkv_bias", "temporal", "boundary")


def arrays(file, prefix: str) -> dict[str, torch.Tensor]:
    """Return the arrays of a file whose names begin with "PREFIX.", under the rest of the name."""
    return {
        key.removeprefix(prefix + "."): torch.from_numpy(file[key])
        for key in file.files
        if key.startswith(prefix + ".")
    }


def build(config: dict) -> MaskedAutoencoderViT:
    """Return the model of a golden config."""
    own = (
        "img_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "decoder_embed_dim",
        "decoder_depth",
        "decoder_num_heads",
        "num_frames",
        "t_patch_size",
        "pred_t_dim",
        "norm_pix_loss",
        "sep_pos_embed",
        "cls_embed",
        "no_qkv_bias",
    )
    return MaskedAutoencoderViT(**{key: config[key] for key in own if key in config})


def close(ours: torch.Tensor, golden_value: torch.Tensor, tolerance: float) -> bool:
    """Return whether tensors are equal up to `tolerance` of the largest golden value."""
    return bool((ours - golden_value).abs().max() <= tolerance * golden_value.abs().max())


@pytest.mark.parametrize("case", MAE)
def test_mae_loss_predictions_and_gradients(case):
    file = golden(f"mae_{case}.npz")
    config = json.loads(str(file["config"]))
    model = build(config)
    assert list(model.state_dict()) == list(arrays(file, "param"))  # names and their order
    model.load_state_dict(arrays(file, "param"))
    noise = torch.from_numpy(file["noise"])
    loss, pred, mask = model(
        torch.from_numpy(file["input"]), config["mask_ratio"], config["mask_type"], noise
    )
    loss.backward()
    expected_mask = torch.from_numpy(file["mask"]).bool()
    assert torch.equal(mask, expected_mask)
    assert abs(loss.item() - file["loss"]) <= 1e-5 * abs(file["loss"])
    expected = torch.from_numpy(file["pred"])
    assert close(pred, expected[expected_mask].view_as(pred), 1e-4)
    gradients = arrays(file, "grad")
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if name.endswith("attn.k.bias"):  # truly zero: only rounding is left
            assert parameter.grad.abs().max() <= 1e-5 * scale
        else:
            assert close(parameter.grad, gradients[name], 1e-5), name


@pytest.mark.parametrize("case", ["base", "joint_pos"])
@pytest.mark.parametrize("read_out", ["cls_token", "global_pool"])
def test_vit_logits_and_gradients(case, read_out):
    file = golden(f"vit_{case}.npz")
    config = json.loads(str(file["config"]))
    config.pop("batch")
    model = VisionTransformer(**config, global_pool=read_out == "global_pool").eval()
    model.load_state_dict(arrays(file, "param"))
    logits = model(torch.from_numpy(file["input"]))
    assert close(logits, torch.from_numpy(file[f"logits_{read_out}"]), 1e-4)
    if read_out == "cls_token":
        logits.square().mean().backward()
        gradients = arrays(file, "grad_cls_token")
        scale = max(gradient.abs().max() for gradient in gradients.values())
        for name, parameter in model.named_parameters():
            tolerance = 1e-5 * (
                scale if name.endswith("attn.k.bias") else gradients[name].abs().max()
            )
            assert (parameter.grad - gradients[name]).abs().max() <= tolerance, name


def test_pretraining_trajectory():
    file = golden("pretrain_trajectory.npz")
    config = json.loads(str(file["config"]))
    model = build(config)
    model.load_state_dict(arrays(file, "param0"))
    optimizer = make_optimizer(
        pretrain_param_groups(model, config["weight_decay"]),
        model.parameters(),
        tuple(config["betas"]),
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    lrs = []
    norms = []
    for micro in range(len(file["inputs"])):
        if micro % config["accum_iter"] == 0:
            progress = micro / config["steps_per_epoch"]
            settings = {key: config[key] for key in ("lr", "min_lr", "warmup_epochs", "epochs")}
            lrs.append(warmup_cosine(progress, **settings))
            set_learning_rate(optimizer, lrs[-1])
        clips = torch.from_numpy(file["inputs"][micro])
        noise = torch.from_numpy(file["noise"][micro])
        loss, _, _ = model(clips, config["mask_ratio"], "random", noise)
        (loss / config["accum_iter"]).backward()
        losses.append(loss.item())
        if (micro + 1) % config["accum_iter"] == 0:
            norms.append(update(optimizer, scaler, config["clip_grad"])[0].item())
    np.testing.assert_allclose(losses, file["losses"], rtol=1e-4)
    np.testing.assert_allclose(lrs, file["lrs"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(norms, file["grad_norms"], rtol=1e-4)
    for name, expected in arrays(file, "param1").items():
        if not name.endswith("attn.k.bias"):
            assert close(model.state_dict()[name], expected, 1e-4), name


def test_schedule():
    for row in golden("schedules_and_groups.json")["cosine_warmup"]:
        settings = {key: row[key] for key in ("lr", "min_lr", "warmup_epochs", "epochs")}
        assert warmup_cosine(row["epoch"], **settings) == pytest.approx(
            row["lr_plain"], rel=1e-9, abs=1e-15
        )


def test_schedule_of_a_run_counts_updates():
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_epochs=2.0, steps_per_epoch=4, total_steps=18)
    rates = [schedule.learning_rate(step) for step in range(19)]
    assert rates[:9] == [step / 8 for step in range(9)]  # linear warm-up over two epochs
    assert rates[13] == pytest.approx(0.55)  # halfway from update 8 to 18
    assert rates[18] == pytest.approx(0.1)
    assert [schedule.end_of_epoch(epoch) for epoch in range(5)] == [4, 8, 12, 16, 18]


@pytest.mark.parametrize("bias_wd", [False, True])
def test_pretraining_weight_decay(bias_wd):
    table = golden("schedules_and_groups.json")[f"pretrain_groups_bias_wd_{bias_wd}"]
    model = build(json.loads(str(golden("mae_base.npz")["config"])))
    groups = pretrain_param_groups(model, 0.05, bias_wd)
    decay = {
        id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]
    }
    ours = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    shared = table.keys() & ours.keys()
    assert len(shared) > 20
    assert {name: ours[name] for name in shared} == {name: table[name] for name in shared}


def test_layer_decay():
    table = golden("schedules_and_groups.json")["layer_decay"]
    for name, row in table["params"].items():
        assert layer_lr_scale(name, table["depth"], table["layer_decay"]) == pytest.approx(
            row["lr_scale"], rel=1e-9
        ), name
    config = json.loads(str(golden("vit_base.npz")["config"]))
    config.pop("batch")
    model = VisionTransformer(**config | {"depth": table["depth"]})
    groups = finetune_param_groups(model, table["depth"], 0.05, table["layer_decay"])
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    shared = table["params"].keys() & dict(model.named_parameters()).keys()
    assert len(shared) > 20
    for name, parameter in model.named_parameters():
        if name in shared:
            group, row = found[id(parameter)], table["params"][name]
            assert group["lr_scale"] == pytest.approx(row["lr_scale"], rel=1e-9), name
            assert (group["weight_decay"] > 0) == (row["weight_decay"] > 0), name
