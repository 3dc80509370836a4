"""Attention maps: against softmax written out, a weight that is known, and scales by hand."""

import pytest
import torch
import torch.nn.functional as F
from tiny import clips_and_noise, tiny_mae, tiny_vit

from util import attention_maps as maps_module
from util.attention_maps import attention_maps, label_maps, overlay, scale_maps


def plain_weights(model, clips: torch.Tensor) -> torch.Tensor:
    """Return the attention weights (B, depth, A, N, N) of all blocks, head by head."""
    x, tokens = model.embed(clips)
    x = x + tokens
    weights_of_layers = []
    for block in model.blocks:
        normalized = F.layer_norm(x, x.shape[2:], block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (part(normalized) for part in (block.attn.q, block.attn.k, block.attn.v))
        weights = []
        outputs = []
        for start in range(0, x.shape[2], 32):  # of a head
            columns = slice(start, start + 32)
            scores = torch.einsum("bnd,bmd->bnm", q[..., columns], k[..., columns])
            weights.append(torch.softmax(scores / 32**0.5, dim=2))
            outputs.append(weights[-1] @ v[..., columns])
        weights_of_layers.append(torch.stack(weights, dim=1))
        x = x + block.attn.proj(torch.cat(outputs, dim=2))
        x = x + block.mlp(block.norm2(x))
    return torch.stack(weights_of_layers, dim=1)


@pytest.mark.parametrize("queries_at_once", [7, 256])
@pytest.mark.parametrize(
    ("cls_embed", "class_query"), [(True, True), (True, False), (False, False)]
)
@torch.no_grad()
def test_maps_equal_plain_softmax(cls_embed, class_query, queries_at_once, monkeypatch):
    monkeypatch.setattr(maps_module, "QUERIES_AT_ONCE", queries_at_once)
    model = tiny_mae(cls_embed=cls_embed)
    clips, _ = clips_and_noise()
    maps = attention_maps(model, clips, [0, 1], class_query, torch.float32)
    assert maps.shape == (2, 2, 2, 4, 4, 4)
    weights = plain_weights(model, clips)
    first_patch = int(cls_embed)
    rows = weights[:, :, :, first_patch:]
    if class_query:
        rows = weights[:, :, :, :1]
    torch.testing.assert_close(maps.flatten(3), rows.mean(3)[..., first_patch:])


def test_layers_may_be_left_out():
    model = tiny_vit()
    clips, _ = clips_and_noise()
    both = attention_maps(model, clips, [0, 1], True, torch.float32)
    for index in range(2):
        (alone,) = attention_maps(model, clips, [index], True, torch.float32).unbind(dim=1)
        assert torch.equal(alone, both[:, index])


def test_a_model_without_class_token_gives_all_weight_to_patches():
    clips, _ = clips_and_noise()
    maps = attention_maps(tiny_mae(cls_embed=False), clips, [1], False, torch.float32)
    torch.testing.assert_close(maps.flatten(3).sum(3), torch.ones(2, 1, 2))


def test_static_clips_have_maps_of_all_tubelets():
    model = tiny_vit()
    frame = clips_and_noise()[0][:, :, :1]
    maps = attention_maps(model, frame, [1], True, torch.float32)
    repeated = attention_maps(model, frame.repeat(1, 1, 8, 1, 1), [1], True, torch.float32)
    torch.testing.assert_close(maps, repeated)


@torch.no_grad()
def looking_at(token: int):
    """Return a model whose only block gives all weight to one patch token, in both heads."""
    model = tiny_mae(sep_pos_embed=False, depth=1)
    model.patch_embed.proj.weight.zero_()
    model.cls_token.zero_()
    model.pos_embed.zero_()
    one_per_head = torch.tensor([0, 32])
    model.pos_embed[0, 1 + token, one_per_head] = 1
    attention = model.blocks[0].attn
    attention.k.weight.copy_(torch.eye(64))
    attention.q.weight.zero_()
    attention.q.bias[one_per_head] = 100
    return model


@pytest.mark.parametrize("class_query", [True, False])
@pytest.mark.parametrize(("step", "row", "column"), [(0, 0, 0), (2, 1, 3), (3, 3, 2)])
def test_the_brightest_pixels_are_those_of_the_seen_token(step, row, column, class_query):
    model = looking_at((step * 4 + row) * 4 + column)
    gray = torch.full((1, 3, 8, 32, 32), 128, dtype=torch.uint8)
    maps = attention_maps(model, gray, [0], class_query, torch.float32)
    assert maps[0, 0, :, step, row, column].tolist() == pytest.approx([1, 1])
    for head in range(2):
        drawn = overlay(gray, maps[:, 0, head], percentile=100)
        brightness = drawn[0].int().sum(0)  # (T, H, W)
        frames, rows, columns = torch.where(brightness == brightness.max())
        assert set(frames.tolist()) == {2 * step, 2 * step + 1}
        assert set((rows // 8).tolist()) == {row}
        assert set((columns // 8).tolist()) == {column}


def test_each_map_has_its_own_scale():
    maps = torch.arange(1.0, 9.0).view(1, 2, 2, 2).repeat(2, 1, 1, 1)
    maps[1] *= 100
    scaled = scale_maps(maps, percentile=100)
    assert torch.equal(scaled[0], maps[0] / 8)
    assert torch.equal(scaled[0], scaled[1])
    median = scale_maps(maps, percentile=50)
    torch.testing.assert_close(median[0], (maps[0] / 4.5).clamp(max=1))


def test_a_percentile_of_zero_gives_way_to_the_maximum():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 1, 2, 3] = 0.5
    assert torch.equal(scale_maps(maps, percentile=90), 2 * maps)


def test_a_pixel_is_half_frame_and_half_color():
    frames = torch.randint(0, 256, (1, 3, 4, 8, 8), dtype=torch.uint8)
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, 0, 0] = 1
    drawn = overlay(frames, maps, percentile=100)
    inferno = {0: (0, 0, 4), 1: (252, 255, 164)}
    for pixel, weight in (((0, 0, 0), 1), ((1, 0, 0), 1), ((2, 0, 0), 0), ((0, 7, 7), 0)):
        colors = (0, slice(None), *pixel)
        expected = (frames[colors] + torch.tensor(inferno[weight])) / 2
        assert (drawn[colors] - expected).abs().max() <= 1


def test_rows_are_the_mean_or_some_heads():
    maps = torch.rand(1, 2, 3, 2, 4, 4)
    mean = label_maps(maps, [0, 5], None)
    assert list(mean) == ["layer 1\nmean of heads", "layer 6\nmean of heads"]
    torch.testing.assert_close(mean["layer 6\nmean of heads"], maps[:, 1].mean(1))
    some = label_maps(maps, [0, 5], [0, 2])
    assert [label.replace("\n", " ") for label in some] == [
        "layer 1 head 1",
        "layer 1 head 3",
        "layer 6 head 1",
        "layer 6 head 3",
    ]
    assert torch.equal(some["layer 6\nhead 3"], maps[:, 1, 2])
