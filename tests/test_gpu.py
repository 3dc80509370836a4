"""GPU checks: equality with the CPU, precision, compilation, no sync in the step, determinism."""

import argparse
import warnings

import pytest
import torch
from tiny import clips_and_noise, tiny_mae, tiny_vit

import models_vit
from data.loader import on_device
from engine_pretrain import micro_step
from models_vit import SDPA_BACKENDS
from util.ema import WeightAverage
from util.optim import autocast, make_optimizer, pretrain_param_groups, set_learning_rate, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
CUDA = torch.device("cuda")


def gradients(model, clips, noise) -> list[torch.Tensor]:
    """Return all gradients of one masked reconstruction, on the CPU."""
    model.zero_grad()
    model(clips, 0.75, noise=noise)[0].backward()
    return [parameter.grad.float().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("attn", list(SDPA_BACKENDS))
def test_every_backend_agrees_with_the_cpu(attn):
    clips, noise = clips_and_noise()
    expected = gradients(tiny_mae(), clips, noise)
    largest = max(gradient.abs().max() for gradient in expected)
    model = tiny_mae(attn=attn)
    model.set_attention("cuda", torch.bfloat16)  # raises where it cannot run
    with torch.autocast("cuda", torch.bfloat16):
        ours = gradients(model.to(CUDA), clips.to(CUDA), noise.to(CUDA))
    assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) < 0.05 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attn", ["auto", "sdpa", "math"])
def test_f15_set_attention_names_the_kernel_that_runs(attn, dtype):
    model = tiny_vit(attn=attn).to(CUDA)
    (line,) = model.set_attention("cuda", dtype)
    with torch.profiler.profile(acc_events=True) as profile, autocast(CUDA, dtype):
        model(torch.randn(1, 3, 8, 32, 32, device=CUDA))
    name = line.partition("PyTorch's ")[2].partition(" (")[0]
    operators = {
        kernel: f"aten::_scaled_dot_product_{kernel.replace(' ', '_')}"
        for kernel in ("cudnn attention", "flash attention", "efficient attention")
    } | {"math": "aten::_scaled_dot_product_attention_math"}
    expected = {operators[name]} if name else set()  # the flash-attn package
    ran = {event.name for event in profile.events()}
    assert ran & set(operators.values()) == expected


@pytest.mark.skipif(
    models_vit.flash_attn_qkvpacked_func is None, reason="the flash-attn package is not installed"
)
def test_the_flash_attn_package_agrees_with_sdpa():
    qkv = torch.randn(2, 65, 3, 4, 32, device=CUDA, dtype=torch.bfloat16)
    torch.testing.assert_close(
        models_vit.attend(qkv, "flash_attn"), models_vit.attend(qkv, "math"), atol=2e-2, rtol=2e-2
    )


@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile itself
def test_compiled_in_bf16_is_close_to_eager_in_fp32():
    clips, noise = (tensor.to(CUDA) for tensor in clips_and_noise())
    plain = tiny_mae().to(CUDA)
    compiled = tiny_mae().to(CUDA)
    compiled.compile_parts()
    with torch.autocast("cuda", torch.bfloat16):
        loss = compiled(clips, 0.75, noise=noise)[0]
    assert loss.item() == pytest.approx(plain(clips, 0.75, noise=noise)[0].item(), rel=2e-2)


def test_the_step_does_not_synchronize():
    model = tiny_mae().to(CUDA)
    groups = pretrain_param_groups(model, 0.05)
    optimizer = make_optimizer(groups, model.parameters(), (0.9, 0.95))
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    ema = WeightAverage(model, 0.5)
    batch = {
        "clips": torch.randint(0, 256, (2, 2, 3, 8, 32, 32), dtype=torch.uint8),
        "noise": torch.rand(2, 2, 64),
    }
    batch = {key: value.pin_memory() for key, value in batch.items()}
    args = argparse.Namespace(
        mask_ratio=0.75,
        mask_type="random",
        decoder_mask_ratio=0.5,
        decoder_mask_type="cell",
        accum_iter=1,
    )

    def steps() -> None:
        for moved in on_device([batch] * 3, CUDA):
            set_learning_rate(optimizer, 1e-3)
            micro_step(model, moved, args, scaler, torch.bfloat16)
            _, skipped = update(optimizer, scaler, 1.0)
            ema.update(skipped)

    steps()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps()
    torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in caught]
    assert [message for message in messages if "synchroniz" in message] == []


def test_deterministic_kernels_repeat_bit_by_bit(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    clips, noise = (tensor.to(CUDA) for tensor in clips_and_noise())
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            first = gradients(tiny_mae().to(CUDA), clips, noise)
            second = gradients(tiny_mae().to(CUDA), clips, noise)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_static_clip_on_the_gpu():
    model = tiny_vit().to(CUDA).eval()
    image = torch.randn(2, 3, 1, 32, 32, device=CUDA)
    torch.testing.assert_close(
        model(image), model(image.expand(-1, -1, 8, -1, -1)), atol=1e-4, rtol=1e-4
    )
