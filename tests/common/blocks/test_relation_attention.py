"""Cases 2, 3, 5 and 7 of the specification, and what no numbers show."""

import math

import pytest
import torch

from common.blocks.attention import TransformerBlock, attention, relation_masked_attention, relations_of


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)[None, None]


Q = rows([1, 0], [0, 1], [1, 1], [0, 0])
K = rows([1, 0], [0, 2], [1, 1], [-1, 0])
V = rows([1, 0], [0, 1], [2, 2], [-1, 3])


def run(ratio, rule, q=Q, k=K, v=V, **settings):
    return relation_masked_attention(q, k, v, ratio, tie_rule=rule, **settings)[0, 0]


def close(value, expected, tolerance=1e-7):
    assert torch.allclose(value, torch.tensor(expected, dtype=torch.float64), atol=tolerance), value


def test_self_block_by_hand():
    close(relations_of(Q, K, 0.0).weights[0, 0], [
        [0.36547231, 0.18020295, 0.36547231, 0.08885243], [0.12282952, 0.50522857, 0.24911239, 0.12282952],
        [0.18870251, 0.38271038, 0.38271038, 0.04587674], [0.25] * 4,
    ])  # fmt: skip
    half = [[-0.08885243, 0.44676025], [0, 0.36848856], [0.14282577, 0.13763021], [0.25, 1.25]]
    most = [[-0.08885243, 0.2665573], [-0.12282952, 0.36848856], [-0.04587674, 0.13763021], [-0.25, 0.75]]
    none = [[1.00756449, 1.17770487], [0.49822478, 1.37194191], [0.90824653, 1.28576135], [0.5, 1.5]]
    close(run(0.5, "rank"), half)
    close(run(0.5, "threshold"), [*half[:3], [0, 0]])
    close(run(0.75, "rank"), most)
    close(run(0.75, "threshold"), [most[0], [0, 0], most[2], [0, 0]])
    close(run(0.0, "rank"), none)
    close(run(0.5, "rank", renormalize=True)[0], [-0.33023845, 1.6604769])


def test_kept_mass_and_the_identity_for_fused_kernels():
    relations = relations_of(Q, K, 0.5, tie_rule="rank")
    mass = (relations.weights * relations.keep).sum(-1)[0, 0]
    close(mass, [0.26905539, 0.24565904, 0.23457924, 0.5])
    scores = Q @ K.transpose(-2, -1) / math.sqrt(2)
    kept = scores.masked_fill(~relations.keep, -math.inf)
    identity = (kept.logsumexp(-1) - scores.logsumexp(-1)).exp()
    assert torch.allclose(identity[0, 0], mass, atol=1e-15)
    assert torch.allclose(identity[..., None] * (kept.softmax(-1) @ V), relations.apply(V), atol=1e-15)


def test_cross_by_hand():
    out = run(0.75, "threshold", rows([1, 0], [0, 1], [1, -1]), rows([2, 0], [0, 1], [1, 1], [-1, -1]),
              rows([1, 2], [3, 4], [5, 6], [7, 8]))  # fmt: skip
    close(out, [[0.45209387, 0.51667871], [0.62196704, 0.71081947], [0.22390776, 0.29854367]])
    keys = rows([1, 0], [0, 1], [1, 1])
    out = run(0.5, "threshold", rows([1, 1], [0, 2], [1, 0], [-1, 1]), keys, keys)
    close(out[[0, 3]], [[0.24825508, 0.24825508], [0.42402465, 0.28399541]])
    close(out[[1, 2]], [[0.10838345, 0], [0, 0.19777581]])


def test_removed_logits_get_their_gradient():
    """Case 5: hiding logits behind -inf would renormalise and lose it."""
    scores = (Q @ K.transpose(-2, -1) / math.sqrt(2)).requires_grad_()
    keep = relations_of(Q, K, 0.5).keep
    (scores.softmax(-1).masked_fill(~keep, 0) @ V)[0, 0, 0, 0].backward()
    expected = scores.grad[0, 0, 0]
    close(expected, [0.03247310, 0.01601147, 0.03247310, -0.08095767])
    q = Q.clone().requires_grad_()
    run(0.5, "threshold", q=q)[0, 0].backward()
    assert torch.allclose(q.grad[0, 0, 0], expected @ K[0, 0] / math.sqrt(2), atol=1e-12)
    values = torch.autograd.gradcheck(
        lambda q, k, v: relation_masked_attention(q, k, v, 0.5),
        [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)],
    )
    assert values


def naive(q, k, v, ratio):
    """The equations as one would write them down first: a sort of the largest, and zeros put in their places."""
    relation = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    largest = relation.topk(int(ratio * k.shape[2]), dim=-1).indices
    return relation.scatter(-1, largest, 0.0) @ v


@pytest.mark.parametrize(("tokens", "ratio"), [(197, 0.75), (144, 0.5)])
def test_is_bit_equal_to_the_naive_form(tokens, ratio):
    base = [torch.randn(2, 3, tokens, 16) for _ in range(3)]
    results = []
    for function in (relation_masked_attention, naive):
        leaves = [x.clone().requires_grad_() for x in base]
        out = function(*leaves, ratio)
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_low_precision_chooses_in_single_and_returns_its_own():
    """In 16 bits scores tie, and the threshold rule would remove more than it should."""
    q, k, v = (torch.randn(2, 4, 197, 16).bfloat16() for _ in range(3))
    relations = relations_of(q, k, 0.75)
    assert relations.weights.dtype == torch.float32
    assert ((~relations.keep).float().mean() - 147 / 197).abs() < 1e-4
    out = relation_masked_attention(q, k, v, 0.75)
    assert out.dtype == torch.bfloat16
    exact = relation_masked_attention(q.float(), k.float(), v.float(), 0.75)
    assert torch.allclose(out.float(), exact, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = relations_of(q.float(), k.float(), 0.75)
    assert inside.weights.dtype == torch.float32
    assert torch.equal(inside.keep, relations.keep)


def test_padded_keys_change_nothing():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    real = torch.tensor([[True, True, True, True, False, False]])
    for ratio in (0.0, 0.5):
        inner = relation_masked_attention(q, k[:, :, :4], v[:, :, :4], ratio)
        assert torch.allclose(relation_masked_attention(q, k, v, ratio, key_mask=real), inner, atol=1e-6)
    assert torch.allclose(attention(q, k, v, real), attention(q, k[:, :, :4], v[:, :, :4]), atol=1e-6)


def test_a_block_can_return_some_tokens_only():
    block, x = TransformerBlock(12, 3), torch.randn(2, 7, 12)
    assert torch.allclose(block.transform(x, queries=slice(2, 5)), block(x)[:, 2:5], atol=1e-6)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[:, 5:] = False
    assert torch.allclose(block.transform(x, real)[:, :5], block(x[:, :5]), atol=1e-6)
