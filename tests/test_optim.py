"""Backward passes and updates with losses and gradients that are not finite (T14)."""

import pytest
import torch

from util.optim import backward, make_optimizer, residual_dtype, update

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def test_t14_a_nonfinite_loss_makes_even_finite_gradients_nan():
    weight = torch.ones(3, requires_grad=True)
    backward((weight * 2).sum() + torch.inf, SCALER, 1)
    assert weight.grad.isnan().all()


def test_a_finite_loss_is_divided_by_the_accumulation():
    weight = torch.ones(3, requires_grad=True)
    backward((weight * 2).sum(), SCALER, 2)
    assert torch.equal(weight.grad, torch.ones(3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_t14_a_nonfinite_gradient_skips_the_update(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "weight_decay": 0.1, "lr_scale": 1.0}]
    optimizer = make_optimizer(groups, [weight], betas=(0.9, 0.95))
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.tensor([1.0, bad, 1.0])
    norm, skipped = update(optimizer, SCALER, clip_grad=1.0)
    assert not norm.isfinite()
    assert skipped == 1
    assert torch.equal(weight, torch.ones(3))
    assert weight.grad is None
    weight.grad = torch.ones(3)
    norm, skipped = update(optimizer, SCALER, clip_grad=1.0)
    assert norm == pytest.approx(3**0.5)
    assert skipped == 0
    assert (weight < 1).all()
    assert optimizer.state[weight]["step"] == 1
    weight.grad = torch.full((3,), bad)
    update(optimizer, SCALER, clip_grad=1.0)
    before = weight.detach().clone()
    weight.grad = torch.ones(3)
    optimizer.step()  # without `update`: nothing of the skipped one is left
    assert (weight < before).all()


def test_a_bf16_residual_needs_bf16():
    assert residual_dtype(False, torch.float32) is None
    assert residual_dtype(True, torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="--amp bf16"):
        residual_dtype(True, torch.float32)


@pytest.mark.parametrize(("scale", "clip_grad"), [(0.01, 1.0), (100.0, 1.0), (1e-6, 1e-6)])
def test_clipping_inside_the_kernel_equals_torchs_clipping(scale, clip_grad):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    gradients = [scale * torch.randn(tensor.shape, generator=generator) for tensor in start]
    results = []
    for inside in (True, False):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        group = {"params": parameters, "weight_decay": 0.1, "lr_scale": 1.0, "lr": 0.01}
        optimizer = make_optimizer([group], parameters, betas=(0.9, 0.95))
        for clips in (True, True, False):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            if inside:
                norm, _ = update(optimizer, SCALER, clip_grad if clips else None)
            else:
                limit = clip_grad if clips else torch.inf
                expected_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
                optimizer.step()
        moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
        results.append([*parameters, *moments])
    assert torch.equal(norm, expected_norm)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-15)
