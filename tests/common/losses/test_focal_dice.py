import math

import pytest
import torch

from common.losses.focal_dice import IGNORED, FocalDice


def logits_of(probabilities):
    """Return the logits of two classes whose softmax gives the second these probabilities, ``(1, 2, 1, W)``."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([torch.zeros_like(p), (p / (1 - p)).log()])[None, :, None]


def label_of(values):
    return torch.tensor(values, dtype=torch.float64)[None, None, None]


def slow_focal(logits, label):
    """Sum over real pixels and classes, pixel by pixel, over their number."""
    total, count = 0.0, 0
    for b in range(logits.shape[0]):
        for r in range(logits.shape[2]):
            for c in range(logits.shape[3]):
                if label[b, 0, r, c] == IGNORED:
                    continue
                for k in range(logits.shape[1]):
                    p = 1 / (1 + math.exp(-logits[b, k, r, c]))
                    right = p if label[b, 0, r, c] == k else 1 - p
                    total -= 0.5 * (1 - right) ** 2 * math.log(right)
                    count += 1
    return total / count


def slow_dice(logits, label):
    """Mean over samples of the foreground's Dice loss, over two classes."""
    losses = []
    for sample, truth in zip(logits, label, strict=True):
        product = squares = 0.0
        for r in range(sample.shape[1]):
            for c in range(sample.shape[2]):
                if truth[0, r, c] != IGNORED:
                    p = math.exp(sample[1, r, c]) / (math.exp(sample[0, r, c]) + math.exp(sample[1, r, c]))
                    t = float(truth[0, r, c])
                    product, squares = product + p * t, squares + p * p + t * t
        losses.append((1 - (2 * product + 1) / (squares + 1)) / 2)
    return sum(losses) / len(losses)


def batch(size=4):
    """Two samples with different numbers of pixels that count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, 2, 5, 6, dtype=torch.float64, generator=generator)
    label = torch.randint(0, 2, (size, 1, 5, 6), generator=generator).double()
    label[0, :, 3:] = IGNORED
    label[1, :, :, 5] = IGNORED
    return logits, label


def test_dice_by_hand():
    """R10 of the specification; two classes halve it."""
    loss = FocalDice(focal_weight=0.0)(logits_of([0.8, 0.5, 0.2, 0.1]), label_of([1, 1, 0, 0]))
    assert loss.item() == pytest.approx(0.0862944 / 2, abs=1e-7)


def test_ignored_pixels_are_as_if_they_were_not_there():
    padded = FocalDice()(logits_of([0.8, 0.5, 0.2, 0.1, 0.7, 0.9]), label_of([1, 1, 0, 0, IGNORED, IGNORED]))
    plain = FocalDice()(logits_of([0.8, 0.5, 0.2, 0.1]), label_of([1, 1, 0, 0]))
    assert padded.item() == pytest.approx(plain.item(), abs=1e-12)


def test_both_terms_equal_a_slow_reference():
    logits, label = batch()
    assert FocalDice(1.0, 0.0)(logits, label).item() == pytest.approx(slow_focal(logits, label), abs=1e-12)
    assert FocalDice(0.0, 1.0)(logits, label).item() == pytest.approx(slow_dice(logits, label), abs=1e-12)
    whole = 2 * slow_focal(logits, label) + slow_dice(logits, label)
    assert FocalDice()(logits, label).item() == pytest.approx(whole, abs=1e-12)


def test_ignored_pixels_get_no_gradient():
    logits, label = batch()
    logits.requires_grad_()
    FocalDice()(logits, label).backward()
    real = (label != IGNORED).expand_as(logits)
    assert (logits.grad[~real] == 0).all()
    assert (logits.grad[real] != 0).all()


def test_nothing_but_padding_gives_zero_with_a_graph():
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = FocalDice()(logits, torch.full((1, 1, 2, 2), float(IGNORED)))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_half_precision_is_scored_in_single():
    logits, label = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = FocalDice()(logits.bfloat16(), label.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(FocalDice()(logits.bfloat16().double(), label).item(), rel=1e-5)


def loss_and_gradient(logits, label):
    leaf = logits.clone().requires_grad_()
    loss = FocalDice()(leaf, label)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    """Ranks whose images have different numbers of pixels: a mean of means would differ."""
    logits, label = batch()
    whole, whole_gradient = loss_and_gradient(logits, label)
    results = rank_pool.run(loss_and_gradient, [(logits[:2], label[:2]), (logits[2:], label[2:])])
    for loss, _ in results:
        assert torch.allclose(loss, whole, atol=1e-12)
    # The gradient of a reduced sum reaches every rank as often as there are ranks, which DDP's mean divides by.
    assert torch.allclose(torch.cat([gradient for _, gradient in results]) / 2, whole_gradient, atol=1e-12)
