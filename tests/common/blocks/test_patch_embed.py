import pytest
import torch

from common.blocks.patch_embed import PatchEmbed, conv_to_linear, grid_of, linear_to_conv, patchify, unpatchify


@pytest.mark.parametrize(
    ("image", "patch"), [((2, 3, 8, 12), (4, 3)), ((2, 4, 8, 6, 4), (4, 2, 2)), ((1, 2, 12), (3,))]
)
def test_round_trip(image, patch):
    x = torch.randn(image)
    patches = patchify(x, patch)
    assert torch.equal(unpatchify(patches, grid_of(image[2:], patch), patch), x)


def test_order_is_position_major_and_channel_first():
    """Upstream's decoder is modality-major against a position-major target, so the two do not correspond."""
    x = torch.arange(2 * 2 * 2 * 4).reshape(1, 2, 2, 2, 4).float()
    patches = patchify(x, (2, 2, 2))
    assert patches.shape == (1, 2, 16)
    first = [x[0, c, i, j, k].item() for c in range(2) for i in range(2) for j in range(2) for k in range(2)]
    assert patches[0, 0].tolist() == first


@pytest.mark.parametrize(("size", "patch", "conv"), [((16, 8), 4, torch.nn.Conv2d), ((8, 8, 4), 4, torch.nn.Conv3d)])
def test_equals_a_convolution_both_ways(size, patch, conv):
    layer = conv(3, 6, patch, patch)
    embed = PatchEmbed(3, size, patch, 6)
    embed.load_state_dict({"proj.weight": conv_to_linear(layer.weight), "proj.bias": layer.bias})
    x = torch.randn(2, 3, *size)
    expected = layer(x).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(embed.patchify(x)), expected, atol=1e-5)
    assert torch.equal(linear_to_conv(embed.proj.weight, 3, embed.patch_size), layer.weight)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="cannot be cut"):
        PatchEmbed(1, (30, 32, 32), 16, 4)
    with pytest.raises(ValueError, match=r"Expected an input of \(1, 32, 32, 32\)"):
        PatchEmbed(1, (32, 32, 32), 16, 4).patchify(torch.zeros(1, 2, 32, 32, 32))
