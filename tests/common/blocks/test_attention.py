import pytest
import torch

from common.blocks.attention import SelfAttention, TransformerBlock, attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 300])
def test_equals_softmax_of_scores(dtype, tokens):
    """Both ways of computing it, the fused kernel and the plain one for few tokens in 16 bits."""
    q, k, v = (torch.randn(2, 3, tokens, 8).to(dtype) for _ in range(3))
    scores = (q.double() @ k.double().transpose(-2, -1)) / 8**0.5
    expected = scores.softmax(-1) @ v.double()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    output = attention(q, k, v)
    assert output.dtype == dtype
    assert torch.allclose(output.double(), expected, atol=tolerance)


def test_gradients_of_both_ways_agree():
    base = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in base]
        attention(*(x.to(dtype) for x in leaves)).float().square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for exact, low in zip(*gradients, strict=True):
        assert torch.allclose(exact, low, atol=5e-2)


def test_equals_timm():
    from timm.models.vision_transformer import Block

    ours = TransformerBlock(16, 4, qkv_bias=True)
    theirs = Block(16, 4, qkv_bias=True, norm_layer=torch.nn.LayerNorm)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_attention_mixes_tokens_and_ignores_their_order():
    layer = SelfAttention(12, 3)
    x = torch.randn(1, 5, 12)
    order = torch.randperm(5)
    assert torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-5)
    moved = x.clone()
    moved[0, 4] += 1
    assert not torch.allclose(layer(moved)[0, 0], layer(x)[0, 0])
