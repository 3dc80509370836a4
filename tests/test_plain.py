"""Compare the models with the plain ones in float64: loss to 1e-12, gradients to 1e-10."""

import pytest
import torch
from plain_model import PlainMAE, PlainViT
from tiny import clips_and_noise, tiny_mae, tiny_vit

from models_mae import make_mask

MAE_CASES = {
    "default": {},
    "norm_pix": {"norm_pix_loss": True},
    "half_of_the_frames": {"pred_t_dim": 4},
    "joint": {"sep_pos_embed": False},
    "no_class_token": {"cls_embed": False},
    "joint_no_class_token": {"sep_pos_embed": False, "cls_embed": False},
    "no_bias": {"no_qkv_bias": True},
}
VIT_CASES = {
    "pooled": {},
    "class_token": {"global_pool": False},
    "joint": {"sep_pos_embed": False},
    "no_class_token": {"cls_embed": False},
}


def agree(ours: torch.nn.Module, plain: torch.nn.Module, losses: list[torch.Tensor]) -> None:
    """Compare two losses and all gradients."""
    assert abs(losses[0] - losses[1]) <= 1e-12 * abs(losses[1])
    for loss in losses:
        loss.backward()
    expected = dict(plain.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in expected.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-10 * largest, name


@pytest.mark.parametrize("case", MAE_CASES)
@pytest.mark.parametrize("sdpa", [False, True])
def test_masked_autoencoder(case, sdpa):
    ours = tiny_mae(**MAE_CASES[case]).double()
    plain = PlainMAE(ours.config, sdpa).double()
    plain.load_state_dict(ours.state_dict())
    clips, noise = clips_and_noise(dtype=torch.float64)
    for ratio in (0.5, 0.9):
        ours.zero_grad()
        plain.zero_grad()
        agree(ours, plain, [ours(clips, ratio, noise=noise)[0], plain(clips, noise, ratio)])


@pytest.mark.parametrize("case", ["default", "norm_pix", "joint_no_class_token"])
@pytest.mark.parametrize("decoder_mask_type", ["cell", "random"])
def test_masked_decoder(decoder_mask_type, case):
    ours = tiny_mae(**MAE_CASES[case]).double()
    plain = PlainMAE(ours.config).double()
    plain.load_state_dict(ours.state_dict())
    clips, noise = clips_and_noise(dtype=torch.float64)
    for mask_type, ratio in (("random", 0.5), ("tube", 0.75)):
        ours.zero_grad()
        plain.zero_grad()
        loss, pred, mask = ours(clips, 0.75, mask_type, noise, ratio, decoder_mask_type)
        visible, hidden = make_mask(noise, ours.grid, 0.75, mask_type)
        predicted = mask.nonzero()[:, 1].view(2, -1)
        assert pred.shape[1] == predicted.shape[1] == int(48 * (1 - ratio))
        assert not mask.gather(1, visible).any() and mask.gather(1, hidden).any()
        agree(ours, plain, [loss, plain.decoder_masked_loss(clips, visible, predicted)])


@pytest.mark.parametrize("case", VIT_CASES)
def test_classifier(case):
    ours = tiny_vit(**VIT_CASES[case]).double().eval()
    plain = PlainViT(ours.config).double()
    plain.load_state_dict(ours.state_dict())
    clips, _ = clips_and_noise(dtype=torch.float64)
    agree(ours, plain, [model(clips).square().mean() for model in (ours, plain)])
