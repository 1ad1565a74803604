import math

import pytest
import torch

from common.losses.text import masked_cross_entropy

LOGITS = torch.tensor([[math.log(3), 0, 0, 0], [0, 0, math.log(5), 0]])
TARGETS = torch.tensor([0, 2])


def test_numbers_by_hand():
    """R5 of the specification: the mean over hidden tokens."""
    assert float(masked_cross_entropy(LOGITS, TARGETS, sync=False)) == pytest.approx(0.581575, abs=1e-6)


def test_nothing_hidden_gives_zero_with_a_graph():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = masked_cross_entropy(logits, torch.zeros(0, dtype=torch.long), sync=False)
    loss.backward()
    assert loss.item() == 0


def test_gradient_is_softmax_minus_one_hot_over_the_count():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 6, 6, 1])
    masked_cross_entropy(logits, targets, sync=False).backward()
    expected = (logits.softmax(1) - torch.nn.functional.one_hot(targets, 7)) / 5
    assert torch.allclose(logits.grad, expected, atol=1e-12)


def test_half_precision_is_scored_in_single():
    logits = torch.randn(4, 9)
    targets = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_cross_entropy(logits.bfloat16(), targets, sync=False)
    assert loss.dtype == torch.float32


def loss_and_gradient(logits, targets):
    leaf = logits.clone().requires_grad_()
    loss = masked_cross_entropy(leaf, targets)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.ddp
@pytest.mark.parametrize("cut", [4, 1, 6])
def test_two_ranks_equal_one(rank_pool, cut):
    """Ranks that hide different numbers of words, or none: a mean of means would differ."""
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    whole, whole_gradient = loss_and_gradient(logits, targets)
    results = rank_pool.run(loss_and_gradient, [(logits[:cut], targets[:cut]), (logits[cut:], targets[cut:])])
    for loss, _ in results:
        assert torch.allclose(loss, whole, atol=1e-12)
    # The gradient of a reduced sum reaches every rank as often as there are ranks, which DDP's mean divides by.
    assert torch.allclose(torch.cat([gradient for _, gradient in results]) / 2, whole_gradient, atol=1e-12)
