import pytest
import torch

from common.blocks.residual_unet import ResidualUNetDecoder, ResidualUNetEncoder
from common.blocks.uniformer import UniFormer3D, UpsamplingDecoder

TINY = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "head_dim": 8}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_the_papers():
    with torch.device("meta"):
        encoder = UniFormer3D(channels_last=False)
        decoder = UpsamplingDecoder(encoder)
    stages = [
        (count(encoder.get_submodule(f"patch_embed{i}")), count(encoder.get_submodule(f"blocks{i}")))
        for i in range(1, 5)
    ]
    assert stages == [(704, 154_560), (65_920, 739_840), (328_640, 9_935_360), (1_312_256, 9_500_160)]
    assert count(encoder.norm) == 1_024
    assert count(encoder) == 22_038_464
    assert count(decoder) == 1_736_769


def test_the_unets_parameters_are_the_papers():
    with torch.device("meta"):
        encoder = ResidualUNetEncoder()
        decoder = ResidualUNetDecoder(encoder)
    assert count(encoder) + count(decoder) == 18_799_937


def test_maps_and_tokens():
    encoder = UniFormer3D(2, (32, 16, 32), **TINY)
    x = torch.randn(2, 2, 32, 16, 32)
    maps = encoder.stages(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 8, 16), (8, 8, 4, 8), (16, 4, 2, 4), (16, 2, 1, 2)]
    assert UpsamplingDecoder(encoder)(maps[-1]).shape == (2, 1, 32, 16, 32)
    encoder.eval()
    assert torch.allclose(encoder.forward_features(x)[0, :, 3], encoder(x)[0, 3].flatten())


def test_the_unets_maps():
    encoder = ResidualUNetEncoder(1, (16, 16, 8), width=8, depths=(1, 1, 1, 1))
    maps = encoder.stages(torch.randn(1, 1, 16, 16, 8))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16, 8), (16, 8, 8, 4), (32, 4, 4, 2), (64, 2, 2, 1)]
    decoder = ResidualUNetDecoder(encoder)
    assert decoder(maps[-1]).shape == (1, 1, 16, 16, 8)
    assert not torch.allclose(decoder.levels(maps)[-1], decoder.levels(maps[-1:])[-1])


def test_the_unet_on_patches():
    encoder = ResidualUNetEncoder(1, (16, 16, 16), width=8, depths=(1, 1), patch_size=2)
    maps = encoder.stages(torch.randn(1, 1, 16, 16, 16))
    assert [m.shape[-1] for m in maps] == [8, 4]
    assert ResidualUNetDecoder(encoder)(maps[-1]).shape == (1, 1, 16, 16, 16)


def test_memory_layout_and_recomputing_change_nothing():
    results = []
    for settings in ({}, {"channels_last": False}, {"recompute_stages": 2}):
        torch.manual_seed(0)
        encoder = UniFormer3D(1, (16, 16, 16), **TINY, **settings).double()
        x = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        loss = encoder(x).square().sum()
        loss.backward()
        results.append((loss.item(), encoder.blocks1[0].attn.weight.grad, encoder.blocks1[0].norm1.running_mean))
    for value, gradient, mean in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-12)
        assert torch.allclose(gradient, results[0][1], rtol=1e-10)
        assert torch.allclose(mean, results[0][2], rtol=1e-12)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="multiple of 16"):
        UniFormer3D(1, (40, 32, 32), **TINY)
    with pytest.raises(ValueError, match="heads of 8"):
        UniFormer3D(1, (32, 32, 32), embed_dims=(8, 8, 12, 16), depths=(1, 1, 1, 1), head_dim=8)
    with pytest.raises(ValueError, match="multiple of 8"):
        ResidualUNetEncoder(1, (20, 16, 16))
