"""Position embeddings resampled to another size, against the ancestor's and against interpolate."""

import pytest
import torch
from golden_files import golden
from tiny import tiny_vit

from util.pretrained import resample_positions


def test_spatial_positions_are_resampled_like_the_ancestors():
    file = golden("pos_embed_interp.npz")
    before = torch.from_numpy(file["before"])
    expected = torch.from_numpy(file["after"])
    model = tiny_vit(img_size=72, patch_size=8)  # 9 x 9 patches
    resampled = resample_positions("pos_embed_spatial", before, model)
    torch.testing.assert_close(resampled, expected, rtol=1e-4, atol=1e-5)


def test_joint_positions_are_resampled_along_space_and_time():
    model = tiny_vit(img_size=72, num_frames=12, sep_pos_embed=False)  # 6 x 9 x 9 patches
    space = torch.randn(36, 64)
    time = torch.linspace(0, 1, 4)
    cls_row = torch.randn(1, 1, 64)
    joint = (time[:, None, None] + space).flatten(0, 1)[None]
    value = torch.cat([cls_row, joint], 1)
    resampled = resample_positions("pos_embed", value, model, old_steps=4)
    assert resampled.shape == (1, 1 + 6 * 81, 64)
    assert torch.equal(resampled[:, :1], cls_row)

    new_space = resample_positions("pos_embed_spatial", space[None], model)
    new_time = torch.nn.functional.interpolate(
        time[None, None], size=6, mode="linear", align_corners=False
    )[0, 0]
    expected = (new_time[:, None, None] + new_space[0]).flatten(0, 1)
    torch.testing.assert_close(resampled[0, 1:], expected, rtol=1e-4, atol=1e-4)

    temporal = time[None, :, None].expand(1, 4, 64)
    resampled = resample_positions("pos_embed_temporal", temporal, model)
    torch.testing.assert_close(resampled[0, :, 0], new_time)


def test_joint_positions_of_an_unknown_grid_are_an_error():
    model = tiny_vit(img_size=72, num_frames=12, sep_pos_embed=False)
    with pytest.raises(ValueError, match="144 positions"):
        resample_positions("pos_embed", torch.randn(1, 1 + 4 * 36, 64), model)
