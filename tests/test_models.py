"""Models against rules: masks, initialization, token order, precision, compilation, errors."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import clips_and_noise, tiny_mae, tiny_vit

import models_vit
from models_mae import MaskedAutoencoderViT, make_mask, unpatchify
from models_vit import (
    SDPA_BACKENDS,
    SIZES,
    LinearFunction,
    VideoEncoder,
    choose_attention,
    drop_path_scales,
    mlp_hidden,
    model_names,
    named_size,
    normalize,
    patchify,
)
from util.pixels import IMAGE_MEAN, IMAGE_STD

GRID = (4, 3, 3)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_named_models_have_the_sizes_of_the_table():
    assert named_size("mae_vit_huge_patch14") == {
        "patch_size": 14,
        "embed_dim": 1280,
        "depth": 32,
        "num_heads": 16,
        "mlp_ratio": 4.0,
    }
    for name in model_names():
        _, size, patch = name.split("_")
        sizes = named_size(name)
        assert (sizes["embed_dim"], sizes["depth"], sizes["num_heads"]) == SIZES[size]
        assert patch == f"patch{sizes['patch_size']}"
        assert named_size(f"mae_{name}", 8) == sizes | {"patch_size": 8}
    assert len(model_names()) == len(SIZES) + 1  # huge has two patch sizes
    for wrong in ("vit_giant_patch16", "vit_large_patch14", "resnet50", "large", "vit_patch16"):
        with pytest.raises(ValueError, match="vit_large_patch16, .*vit_giant_patch14"):
            named_size(wrong)


def test_the_giant_has_the_published_layers():
    """Compare with VideoMAE v2's: a billion parameters, arXiv 2303.16727."""
    clip = {"img_size": 224, "num_frames": 16, "t_patch_size": 2}
    decoder = {"decoder_embed_dim": 512, "decoder_depth": 4, "decoder_num_heads": 8}
    with torch.device("meta"):
        giant = VideoEncoder(**named_size("vit_giant_patch14"), **clip)
        autoencoder = MaskedAutoencoderViT(
            **named_size("mae_vit_giant_patch14"), **clip, **decoder, pred_t_dim=16
        )
    assert giant.blocks[39].mlp.fc1.weight.shape == (6144, 1408)
    assert autoencoder.decoder_blocks[3].mlp.fc1.weight.shape == (2234, 512)
    assert giant.num_tokens == 2048
    assert giant.blocks[0].attn.head_dim == 88
    assert round(sum(p.numel() for p in giant.parameters()) / 1e9, 2) == 1.01


def test_a_ratio_from_shapes_gives_the_same_hidden_width():
    for width in (176, 208, 512, 1408):
        for hidden in range(width, 6 * width, 16):
            assert mlp_hidden(width, hidden / width) == hidden
    assert mlp_hidden(512, 48 / 11) == 2234  # truncated, as in VideoMAE v2's decoder


def test_published_configuration_has_the_counted_parameters():
    with torch.device("meta"):
        model = MaskedAutoencoderViT(
            **named_size("mae_vit_huge_patch14"),
            img_size=224,
            num_frames=16,
            t_patch_size=2,
            decoder_embed_dim=512,
            decoder_depth=4,
            decoder_num_heads=16,
            pred_t_dim=16,
        )
    assert model.num_tokens == 2048
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 645.5


@pytest.mark.parametrize("mask_type", ["random", "tube", "temporal", "boundary"])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.85])
def test_masks_follow_their_rule(mask_type, ratio):
    noise = torch.rand(5, 36)
    visible, hidden = make_mask(noise, GRID, ratio, mask_type)
    partition = torch.cat([visible, hidden], 1).sort(1).values
    assert torch.equal(partition, torch.arange(36).expand(5, 36))
    assert (visible.diff(dim=1) > 0).all() and (hidden.diff(dim=1) > 0).all()  # in token order
    keep = int(9 * (1 - ratio)) * 4 if mask_type == "tube" else int(36 * (1 - ratio))
    assert visible.shape == (5, keep)
    if mask_type == "random":
        largest_visible = noise.gather(1, visible).max(1).values
        assert (largest_visible < noise.gather(1, hidden).min(1).values).all()
    elif mask_type == "tube":
        positions = visible.view(5, 4, -1) % 9
        assert (positions == positions[:, :1]).all()
        hidden_positions = hidden.view(5, 4, -1)[:, 0]
        largest_visible = noise.gather(1, positions[:, 0]).max(1).values
        assert (largest_visible < noise.gather(1, hidden_positions).min(1).values).all()
    elif mask_type == "temporal":
        assert torch.equal(visible[0], torch.arange(keep))
    else:
        from_the_ends = sorted(range(36), key=lambda i: min(i, 35 - i))
        assert set(visible[0].tolist()) == set(from_the_ends[:keep])


def test_equal_noise_keeps_the_first_tokens():
    visible, _ = make_mask(torch.zeros(1, 36), GRID, 0.75, "random")
    assert visible.tolist() == [list(range(9))]


def test_2048_tokens_at_090_keep_204():
    assert make_mask(torch.rand(1, 2048), (8, 16, 16), 0.9, "random")[0].shape[1] == 204


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [(0.0, "random"), (1.0, "random"), (0.99, "random"), (0.9, "tube"), (0.5, "cube")],
)
def test_impossible_masks_are_refused(ratio, kind):
    with pytest.raises(ValueError, match="mask"):
        make_mask(torch.rand(1, 36), GRID, ratio, kind)


def test_patchify_equals_convolution_and_has_an_inverse():
    frames = torch.rand(2, 3, 8, 12, 12)
    cut = patchify(frames, 2, 4)  # (B, L, C, t, p, p)
    kernel = torch.rand(7, 3, 2, 4, 4)
    expected = F.conv3d(frames, kernel, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cut.flatten(2) @ kernel.flatten(1).T, expected)
    ids = torch.randint(36, (2, 5))
    assert torch.equal(patchify(frames, 2, 4, ids), cut[torch.arange(2)[:, None], ids])
    values = cut.permute(0, 1, 3, 4, 5, 2).flatten(2)
    assert torch.equal(unpatchify(values, GRID, 2, 4), frames)


@pytest.mark.parametrize("trunc_init", [False, True])
def test_initialization_table(trunc_init):
    model = tiny_mae(trunc_init=trunc_init, embed_dim=256, num_heads=4, decoder_embed_dim=256)
    std = {name: parameter.std(correction=0).item() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or name == "decoder_cls_token":
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name == "patch_embed.proj.weight":
            fan_in, fan_out = parameter[0].numel(), len(parameter)
            expected = (2 / (fan_in + fan_out)) ** 0.5
            if trunc_init:
                expected = 0.88  # std of a normal distribution truncated at +-2
            assert std[name] == pytest.approx(expected, rel=0.03)
        elif parameter.ndim == 2:
            fan_out, fan_in = parameter.shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            expected = bound / 3**0.5
            if trunc_init:
                expected = 0.02
            assert std[name] == pytest.approx(expected, rel=0.03), name
            assert trunc_init or parameter.abs().max() <= bound
        else:
            assert std[name] == pytest.approx(0.02, rel=0.15), name


def test_classifier_starts_like_the_encoder():
    model = tiny_vit(num_classes=400)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert (model.head.bias == 0).all()
    torch.testing.assert_close(
        model.blocks[0].mlp.fc1.weight.std().item(), (2 / 320) ** 0.5, rtol=0.03, atol=0
    )


def test_reconstruct_predicts_what_the_loss_sees():
    model = tiny_mae().eval()
    clips, noise = clips_and_noise()
    loss, pred, mask = model(clips, 0.75, "random", noise)
    original, predicted, hidden = model.reconstruct(clips, 0.75, "random", noise)
    assert torch.equal(original, clips)
    torch.testing.assert_close((predicted - clips)[hidden].square().mean(), loss)
    values = patchify(predicted, 2, 8).permute(0, 1, 3, 4, 5, 2).flatten(2)
    torch.testing.assert_close(values[mask].view_as(pred), pred)


def test_norm_pix_reconstruction_gets_its_patch_statistics_back():
    model = tiny_mae(norm_pix_loss=True).eval()
    clips, noise = clips_and_noise()
    loss, _, mask = model(clips, 0.75, "random", noise)
    _, predicted, _ = model.reconstruct(clips, 0.75, "random", noise)
    true = patchify(clips, 2, 8).flatten(2)[mask]
    ours = patchify(predicted, 2, 8).flatten(2)[mask]
    std = (true.var(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(((ours - true) / std).square().mean(), loss)


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": 30},
        {"num_frames": 7},
        {"pred_t_dim": 5},
        {"num_heads": 3},
        {"decoder_num_heads": 5},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        tiny_mae(**changes)


def test_wrong_clip_size_and_unknown_argument_are_refused():
    with pytest.raises(ValueError, match="this model takes"):
        tiny_mae()(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match="this model takes"):
        tiny_vit()(torch.zeros(1, 3, 1, 16, 16))  # a static clip
    with pytest.raises(TypeError):
        tiny_mae(decoder_heads=4)
    with pytest.raises(ValueError, match="class token"):
        tiny_vit(cls_embed=False, global_pool=False)


@pytest.mark.slow
def test_compiled_model_is_the_same_model():
    plain = tiny_mae()
    compiled = tiny_mae()
    names = list(compiled.state_dict())
    compiled.compile_parts()
    assert list(compiled.state_dict()) == names
    clips, noise = clips_and_noise()
    for model in (plain, compiled):
        model(clips, 0.75, "random", noise)[0].backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_copy_of_a_compiled_model_uses_its_own_weights():
    model = tiny_mae()
    model.compile_parts()
    copied = copy.deepcopy(model)
    plain = tiny_mae()
    plain.load_state_dict(copied.state_dict())
    for parameters in (copied.parameters(), plain.parameters()):
        for parameter in parameters:
            parameter.data.mul_(0.5)
    clips, noise = clips_and_noise()
    assert torch.equal(copied(clips, 0.75, noise=noise)[1], plain(clips, 0.75, noise=noise)[1])


def test_drop_path_keeps_the_mean_and_drops_whole_clips():
    torch.manual_seed(0)
    scales = drop_path_scales(torch.tensor([1.0, 0.75, 0.5]), 4000)
    assert scales.shape == (3, 2, 4000, 1, 1)
    assert (scales[0] == 1).all()
    assert set(scales[2].unique().tolist()) == {0.0, 2.0}
    for branch in scales.flatten(0, 1):
        assert branch.mean().item() == pytest.approx(1, abs=0.06)
    assert not torch.equal(scales[2, 0], scales[2, 1])


def test_drop_path_rates_grow_linearly_and_only_in_training():
    model = tiny_vit(drop_path_rate=0.5, depth=3)
    torch.testing.assert_close(model.keep_probs, torch.tensor([1.0, 0.75, 0.5]))
    assert "keep_probs" not in model.state_dict()
    clips, _ = clips_and_noise()
    plain = tiny_vit(drop_path_rate=0.0, depth=3)
    assert torch.equal(model.eval()(clips), plain.eval()(clips))
    assert not torch.equal(model.train().encode(clips), plain.train().encode(clips))
    one_block = tiny_vit(drop_path_rate=0.5, depth=1).train()  # nothing to drop
    assert torch.equal(one_block.encode(clips), tiny_vit(depth=1).train().encode(clips))


def test_a_dropped_block_passes_the_tokens_on():
    block = tiny_vit().blocks[0]
    x, delta = torch.randn(2, 3, 5, 64)
    kept_x, kept_delta = block(x, delta)
    scales = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 0.5]])[:, :, None, None]
    new_x, new_delta = block(x, delta, scales)
    torch.testing.assert_close(new_x[1], x[1] + delta[1])  # both branches of this clip are dropped
    torch.testing.assert_close(new_delta[1], torch.zeros_like(delta[1]))
    torch.testing.assert_close((new_x[0], new_delta[0]), (kept_x[0], kept_delta[0]))
    stream = x + delta
    torch.testing.assert_close(new_x[2] - stream[2], 2 * (kept_x[2] - stream[2]))


def test_drop_path_keeps_the_dtype_of_the_tokens():
    block = tiny_vit().blocks[0].bfloat16()
    x, delta = torch.randn(2, 3, 5, 64, dtype=torch.bfloat16)
    new_x, new_delta = block(x, delta, drop_path_scales(torch.tensor([1.0, 0.5]), 3)[1])
    assert new_x.dtype == torch.bfloat16
    assert new_delta.dtype == torch.bfloat16


def test_checkpointed_blocks_are_computed_twice_with_the_same_drops():
    clips, _ = clips_and_noise(batch=4)
    gradients = []
    counts = []
    for recompute in (False, True):
        calls: list[None] = []
        model = tiny_vit(drop_path_rate=0.5, dropout=0.0).train()
        model.activation_checkpointing = recompute
        model.blocks[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        torch.manual_seed(0)
        model(clips).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        counts.append(len(calls))
    assert counts == [1, 2]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_impossible_drop_path_rates_are_refused(rate):
    with pytest.raises(ValueError, match=f"drop_path_rate {rate}"):
        tiny_vit(drop_path_rate=rate)


def test_uint8_clips_are_normalized_after_the_gathering():
    model = tiny_mae(norm_pix_loss=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    _, noise = clips_and_noise()
    expected = model(normalize(pixels, *model.pixel_stats), 0.75, noise=noise)
    for a, b in zip(model(pixels, 0.75, noise=noise), expected, strict=True):
        assert torch.equal(a, b)
    model.pixel_stats = None
    with pytest.raises(ValueError, match="pixel_stats"):
        model(pixels, 0.75, noise=noise)


@pytest.mark.parametrize("num_frames", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_any_dtype_takes_uint8_clips(dtype, num_frames):
    model = tiny_vit().eval().to(dtype)
    model.pixel_stats = (IMAGE_MEAN, IMAGE_STD)
    generator = torch.Generator().manual_seed(0)
    size = (2, 3, num_frames, 32, 32)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    expected = model(normalize(pixels, IMAGE_MEAN, IMAGE_STD).to(dtype))
    assert expected.dtype == dtype
    assert torch.equal(model(pixels), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_linear_function_equals_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    output_gradient = torch.randn(3, 5, 6, generator=generator, dtype=dtype)
    results = []
    for function in (LinearFunction.apply, F.linear):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        if function is F.linear:
            output = F.linear(*(tensor.to(dtype) for tensor in inputs))
        else:
            output = function(*inputs, dtype)
        gradients = torch.autograd.grad(output, inputs, output_gradient)
        results.append((output, *gradients))
    tolerance = {}
    if dtype == torch.bfloat16:  # torch's bias gradient is rounded to bfloat16
        tolerance = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(*results, **tolerance)


def test_the_bias_gradient_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    output_gradient = torch.randn(16, 64, 6, generator=generator).bfloat16()
    bias = torch.zeros(6, requires_grad=True)
    output = LinearFunction.apply(torch.zeros(16, 64, 8), torch.zeros(6, 8), bias, torch.bfloat16)
    (gradient,) = torch.autograd.grad(output, bias, output_gradient)
    torch.testing.assert_close(gradient, output_gradient.float().sum((0, 1)), rtol=1e-5, atol=1e-4)


def test_attention_kernels_agree():
    qkv = torch.randn(2, 17, 3, 4, 8, dtype=torch.float64)
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, A, N, K)
    expected = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2)
    for kernel in ("sdpa", "math"):
        torch.testing.assert_close(models_vit.attend(qkv, kernel), expected)


HALF = ("cuda", torch.bfloat16, 80)
UNSUITABLE = [
    ("cpu", torch.bfloat16, 80),
    ("cuda", torch.float32, 80),
    ("cuda", torch.bfloat16, 36),
]


def packed_attention(qkv, deterministic=False):
    """Stand in for the flash-attn package: (B, N, 3, A, K) -> (B, N, A, K), half precision only."""
    assert qkv.dtype in (torch.float16, torch.bfloat16)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.fixture
def package(monkeypatch):
    """Stand in for an installed flash-attn package."""
    monkeypatch.setattr(models_vit, "flash_attn_qkvpacked_func", packed_attention)


@pytest.fixture
def no_package(monkeypatch):
    """Hide the flash-attn package."""
    monkeypatch.setattr(models_vit, "flash_attn_qkvpacked_func", None)


@pytest.fixture
def hopper(monkeypatch):
    """Stand in for a GPU of compute capability 9.0 with cuDNN."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(models_vit, "cudnn_obstacle", lambda *tensors: None)


def test_attention_choice_without_the_package(no_package):
    assert choose_attention("auto", *HALF)[0] == "sdpa"
    assert choose_attention("math", *HALF)[0] == "math"
    with pytest.raises(ValueError, match="not installed"):
        choose_attention("flash_attn", *HALF)
    with pytest.raises(ValueError, match="auto, flash_attn, sdpa"):
        choose_attention("xformers", *HALF)


def test_attention_choice_with_the_package(package):
    assert choose_attention("auto", *HALF)[0] == "flash_attn"
    assert choose_attention("sdpa", *HALF)[0] == "sdpa"
    for other in UNSUITABLE:
        assert choose_attention("auto", *other)[0] == "sdpa"
        with pytest.raises(ValueError, match="flash-attn"):
            choose_attention("flash_attn", *other)


def test_attention_that_cannot_run_is_refused_at_build(no_package):
    with pytest.raises(ValueError, match="not installed"):
        tiny_vit(attn="flash_attn")
    with pytest.raises(ValueError, match="auto, flash_attn, sdpa"):
        tiny_vit(attn="xformers")


def test_auto_takes_the_fastest_measured_attention():
    measured = json.loads((RESULTS / "attention_cuda.json").read_text())
    dtype = getattr(torch, measured["dtype"].removeprefix("torch."))
    capability = tuple(measured["capability"])
    assert (capability, dtype) in models_vit.FASTEST_ATTENTION
    for row in measured["shapes"].values():
        fastest = min(row, key=lambda name: row[name].get("ms", float("inf")))
        chosen = models_vit.FASTEST_ATTENTION[capability, dtype]
        assert SDPA_BACKENDS[chosen][0].name.lower().startswith(fastest)


def test_auto_follows_the_table_of_attention(hopper, package):
    assert choose_attention("auto", *HALF)[0] == "cudnn"
    assert choose_attention("auto", "cuda", torch.float16, 80)[0] == "flash_attn"
    assert choose_attention("auto", "cpu", torch.bfloat16, 80)[0] == "sdpa"


def test_auto_names_what_keeps_it_from_cudnn(hopper, no_package, monkeypatch):
    monkeypatch.setattr(models_vit, "cudnn_obstacle", lambda *tensors: "no cuDNN here")
    kernel, reason = choose_attention("auto", *HALF)
    assert kernel == "sdpa" and reason.startswith("no cuDNN here; ")
    with pytest.raises(ValueError, match=r"'cudnn' cannot run: no cuDNN here\. Use --attn auto"):
        choose_attention("cudnn", *HALF)


def test_cudnn_is_not_used_where_it_must_not_be():
    with torch.backends.cudnn.flags(enabled=False):
        assert "switched off" in models_vit.cudnn_obstacle(*HALF)
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in models_vit.cudnn_obstacle(*HALF)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "needs CUDA" in models_vit.cudnn_obstacle("cpu", torch.bfloat16, 80)


def test_cudnn_that_fails_its_trial_is_not_used(monkeypatch):
    ones = torch.ones  # on a CPU, where cuDNN's attention fails
    monkeypatch.setattr(torch, "ones", lambda size, device, **options: ones(size, **options))
    obstacle = models_vit.cudnn_obstacle(*HALF)
    assert "does not run here: " in obstacle and "\n" not in obstacle


def test_set_attention_chooses_for_every_block(package):
    model = tiny_mae()  # head widths: encoder 32, decoder 8
    kernels = [block.attn.kernel for block in (*model.blocks, *model.decoder_blocks)]
    assert set(kernels) == {"sdpa"}  # before the choice
    lines = model.set_attention("cuda", torch.bfloat16)
    assert [line.partition(" (")[0] for line in lines] == [
        "attention with head width 32: the flash-attn package",
        "attention with head width 8: the flash-attn package",
    ]
    kernels = [block.attn.kernel for block in (*model.blocks, *model.decoder_blocks)]
    assert set(kernels) == {"flash_attn"}
    with pytest.raises(ValueError, match="needs CUDA"):
        tiny_mae(attn="flash_attn").set_attention("cpu", torch.float32)


@pytest.mark.parametrize("attn", ["auto", "math"])
def test_f15_set_attention_names_the_kernel_that_runs(attn):
    model = tiny_vit(attn=attn)
    (line,) = model.set_attention("cpu", torch.float32)
    with torch.profiler.profile(acc_events=True) as profile:
        model(torch.randn(1, 3, 8, 32, 32))
    name = line.partition("PyTorch's ")[2].partition(" (")[0]
    operators = {
        "flash attention": "aten::_scaled_dot_product_flash_attention_for_cpu",
        "math": "aten::_scaled_dot_product_attention_math",
    }
    ran = {event.name for event in profile.events()}
    assert ran & set(operators.values()) == {operators[name]}


def test_flash_attn_branch_gets_the_packed_product(monkeypatch):
    seen = []

    def record(qkv, deterministic=False):
        seen.append((tuple(qkv.shape), qkv.dtype))
        return packed_attention(qkv, deterministic)

    monkeypatch.setattr(models_vit, "flash_attn_qkvpacked_func", record)
    layer = models_vit.Attention(64, 4, True, "auto")
    x = torch.randn(2, 9, 64)
    layer.kernel = "flash_attn"
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
    (gradient,) = torch.autograd.grad(ours.float().square().sum(), layer.q.weight)
    assert seen == [((2, 9, 3, 4, 16), torch.bfloat16)]
    layer.kernel = "sdpa"
    torch.testing.assert_close(ours.float(), layer(x), rtol=0.05, atol=0.02)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.q.weight)
    assert (gradient - expected).abs().max() <= 0.05 * expected.abs().max()


def test_a_bf16_residual_stays_bf16_and_close():
    clips, noise = clips_and_noise()
    losses = []
    for dtype in (None, torch.bfloat16):
        model = tiny_mae()
        model.residual_dtype = dtype
        with torch.autocast("cpu", torch.bfloat16):
            x, _, _, _ = model.encode_and_decode(clips, 0.75, "random", noise)
            losses.append(model(clips, 0.75, noise=noise)[0].item())
        assert x.dtype == dtype or dtype is None and x.dtype == torch.float32
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
