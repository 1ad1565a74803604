import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.blocks.co_attention import CoAttentionFusion, PostNormAttention


def slow_attention(block, x, context, mask):
    """One head, one query at a time."""
    heads, width = block.num_heads, x.shape[2] // block.num_heads
    q, k, v = block.query(x), block.key(context), block.value(context)
    rows = []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            parts = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                scores = k[b, :, part] @ q[b, i, part] / width**0.5
                if mask is not None:
                    scores = scores.masked_fill(~mask[b], float("-inf"))
                parts.append(scores.softmax(0) @ v[b, :, part])
            rows.append(block.norm(x[b, i] + block.proj(torch.cat(parts))))
    return torch.stack(rows).reshape(x.shape)


def test_attention_is_post_norm():
    block = PostNormAttention(8, 2).eval()
    x, context, mask = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    for given in (mask, None):
        assert torch.allclose(block(x, context, given), slow_attention(block, x, context, given), atol=1e-5)
    weights = block.weights(x, context, mask)
    assert weights.shape == (2, 2, 3, 5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 3))
    assert (weights[0, :, :, 3:] == 0).all()
    with pytest.raises(ValueError, match="not a multiple of 3"):
        PostNormAttention(8, 3)


def test_both_streams_read_the_layer_before():
    """x' and y' from the same x and y: the update is parallel."""
    fusion = CoAttentionFusion(8, depth=2, num_heads=2).eval()
    nn.init.normal_(fusion.text_layers[0].fc1.weight)
    x, y, mask = torch.randn(2, 4, 8), torch.randn(2, 3, 8), torch.tensor([[True] * 4, [True, True, False, False]])
    text, image, before = fusion(x, y, mask)

    def layer(part, own, other, own_mask, other_mask):
        a = slow_attention(part.self_attention, own, own, own_mask)
        a = slow_attention(part.cross_attention, a, other, other_mask)
        return part.norm(a + part.fc2(F.gelu(part.fc1(a))))

    slow_x, slow_y = x, y
    for t, i in zip(fusion.text_layers, fusion.image_layers, strict=True):
        slow_x, slow_y = layer(t, slow_x, slow_y, mask, None), layer(i, slow_y, slow_x, None, mask)
    assert torch.allclose(text, slow_x, atol=1e-4)
    assert torch.allclose(image, slow_y, atol=1e-4)
    assert torch.equal(before[0], y)
    assert len(before) == 2


def test_padding_changes_nothing():
    fusion = CoAttentionFusion(8, depth=2, num_heads=2).eval()
    x, y = torch.randn(1, 4, 8), torch.randn(1, 3, 8)
    short = fusion(x[:, :2], y, torch.ones(1, 2, dtype=torch.bool))
    long = fusion(x, y, torch.tensor([[True, True, False, False]]))
    assert torch.allclose(short[0], long[0][:, :2], atol=1e-5)
    assert torch.allclose(short[1], long[1], atol=1e-5)


def test_map_from_text_to_image():
    fusion = CoAttentionFusion(8, depth=2, num_heads=2).eval()
    seen = fusion.text_to_image(torch.randn(2, 4, 8), torch.randn(2, 3, 8), None)
    assert seen.shape == (2, 4, 3)
    assert torch.allclose(seen.sum(-1), torch.ones(2, 4), atol=1e-5)
