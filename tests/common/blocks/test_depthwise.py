import pytest
import torch
from torch import nn

from common.blocks.depthwise import DepthwiseConv3d


def passed(layer, x):
    y = layer(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y, torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["first", "last"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_it_is_the_plain_convolution(kernel, layout):
    ours = DepthwiseConv3d(6, kernel).to(torch.float64, memory_format=layout)
    plain = nn.Conv3d(6, 6, kernel, padding=kernel // 2, groups=6).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 7, 5, 9, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    (y, gradients), (wanted, others) = passed(ours, x), passed(plain, x)
    assert torch.allclose(y, wanted, rtol=1e-12)
    for gradient, other in zip(gradients, others, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(ours(x), wanted, rtol=1e-12)


def test_mixed_precision_computes_in_float32():
    layer, x = DepthwiseConv3d(4, 3), torch.randn(1, 4, 6, 6, 6, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    half.float().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32


def test_what_needs_no_gradient_gets_none():
    layer, x = DepthwiseConv3d(4, 3), torch.randn(1, 4, 6, 6, 6)
    layer.bias.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.bias.grad is None
    assert layer.weight.grad is not None
