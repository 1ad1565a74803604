import math
from functools import partial

import numpy as np
import pytest
import torch

from common.distributed import loss_and_gradient
from common.losses.contrastive import (
    cosine_regression,
    nt_xent,
    query_key_info_nce,
    retrieval_accuracy,
    symmetric_info_nce,
)

F_ROWS = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
G_ROWS = torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def slow(a, b, temperature):
    """Both directions, one pair at a time."""
    a = [row / row.norm() for row in a]
    b = [row / row.norm() for row in b]
    total = 0.0
    for first, second in ((a, b), (b, a)):
        for i, row in enumerate(first):
            scores = [float(row @ other) / temperature for other in second]
            total += -scores[i] + math.log(sum(math.exp(score) for score in scores))
    return total / (2 * len(a))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.491157), (0.1, 0.186529)])
def test_the_specifications_cases(temperature, expected):
    assert symmetric_info_nce(F_ROWS, G_ROWS, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert slow(F_ROWS, G_ROWS, temperature) == pytest.approx(expected, abs=1e-6)


def test_known_values():
    eye = torch.eye(3)
    assert symmetric_info_nce(eye, eye, 1.0).item() == pytest.approx(0.551445, abs=1e-6)
    equal = torch.ones(3, 7)
    assert symmetric_info_nce(equal, equal, 1.0).item() == pytest.approx(math.log(3), abs=1e-6)
    assert symmetric_info_nce(equal[:1], equal[:1], 1.0).item() == 0.0


@pytest.mark.parametrize(("n", "temperature", "lowest"), [(3, 1.0, 0.368981), (24, 1.0, 2.208410), (24, 0.1, 0.000676)])
def test_the_lowest_reachable_value(n, temperature, lowest):
    """Pairs that agree, at the corners of a regular simplex."""
    corners = torch.eye(n, dtype=torch.float64) - 1 / n
    assert symmetric_info_nce(corners, corners, temperature).item() == pytest.approx(lowest, abs=1e-6)


def test_equals_the_slow_form_and_ignores_length_and_order():
    a, b = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    value = symmetric_info_nce(a, b, 0.2).item()
    assert value == pytest.approx(slow(a, b, 0.2), rel=1e-12)
    assert symmetric_info_nce(b, a, 0.2).item() == pytest.approx(value, rel=1e-12)
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.5
    order = torch.randperm(5)
    assert symmetric_info_nce((a * lengths)[order], b[order], 0.2).item() == pytest.approx(value, rel=1e-12)


def test_gradient():
    a = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: symmetric_info_nce(x, y, 0.5), (a, b))


def test_lower_precision_computes_in_float32():
    a, b = torch.randn(4, 16), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        value = symmetric_info_nce(a, b, 0.1)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(symmetric_info_nce(a, b, 0.1).item(), rel=1e-6)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="temperature"):
        symmetric_info_nce(F_ROWS, G_ROWS, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        symmetric_info_nce(F_ROWS, G_ROWS[:1], 1.0)


def test_retrieval():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert retrieval_accuracy(a, a * 3).item() == 1.0
    assert retrieval_accuracy(a, a[[1, 0, 2]]).item() == pytest.approx(1 / 3)


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    """Negatives are those of the joined batch; so are loss and gradient."""
    a, b = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    weight = torch.randn(5, 5, dtype=torch.float64)
    whole, gradient = loss_and_gradient(symmetric_info_nce, {"a": a, "b": b}, ["a", "b"], weight, temperature=0.3)
    loss = partial(symmetric_info_nce, temperature=0.3)
    jobs = [(loss, {"a": a[part], "b": b[part]}, ["a", "b"], weight) for part in (slice(0, 3), slice(3, 6))]
    for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
        assert value.item() == pytest.approx(whole.item(), rel=1e-10)
        assert torch.allclose(part_gradient, gradient, rtol=1e-9, atol=1e-12)


A, B = torch.tensor([[1.0, 0, 0], [0, 2, 0]]).double(), torch.tensor([[1.0, 1, 0], [0, 1, 1]]).double()
Q2, K1 = torch.tensor([[2.0, 1, 0], [0, 1, 1]]).double(), torch.tensor([[1.0, 0, 1], [0, 1, 0]]).double()


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def slow_nt_xent(a, b, temperature):
    rows = unit(np.concatenate([a, b]))
    n, total = len(a), 0.0
    for i, row in enumerate(rows):
        scores = {j: math.exp(row @ other / temperature) for j, other in enumerate(rows) if j != i}
        total -= math.log(scores[(i + n) % (2 * n)] / sum(scores.values()))
    return total / (2 * n)


def slow_query_key(q, k, temperature):
    q, k = unit(q), unit(k)
    rows = [np.exp(row @ k.T / temperature) for row in q]
    return -2 * temperature * np.mean([math.log(row[i] / row.sum()) for i, row in enumerate(rows)])


@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 0.706676), (0.1, 0.392252)])
def test_nt_xent_of_the_specification(temperature, expected):
    assert nt_xent(A, B, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert slow_nt_xent(A.numpy(), B.numpy(), temperature) == pytest.approx(expected, abs=1e-6)


def test_moco_and_byol_of_the_specification():
    first, second = query_key_info_nce(A, B, 0.2).item(), query_key_info_nce(Q2, K1, 0.2).item()
    assert [first, second] == pytest.approx([0.144375, 0.127495], abs=1e-6)
    assert slow_query_key(A.numpy(), B.numpy(), 0.2) == pytest.approx(first, abs=1e-12)
    warm = query_key_info_nce(A, B, 1.0) + query_key_info_nce(Q2, K1, 1.0)
    assert warm.item() == pytest.approx(2.293736, abs=1e-6)
    mirrored = [cosine_regression(A, B).item(), cosine_regression(Q2, K1).item()]
    assert mirrored == pytest.approx([0.585786, 0.660438], abs=1e-6)


LOSSES = [partial(nt_xent, temperature=0.3), partial(query_key_info_nce, temperature=0.3), cosine_regression]


@pytest.mark.parametrize("loss", LOSSES, ids=["nt_xent", "query_key", "cosine"])
def test_losses_between_views(loss):
    a, b = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    inputs = (lambda x, y: loss(x, y), (a, b)) if loss is LOSSES[0] else (lambda x: loss(x, b), (a,))
    assert torch.autograd.gradcheck(*inputs)
    for nothing in (torch.zeros(4, 3), torch.zeros(4, 3).double()):
        leaf = nothing.requires_grad_()
        loss(leaf, nothing.detach()).backward()
        assert torch.isfinite(leaf.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(torch.randn(4, 3), torch.randn(4, 3)).dtype == torch.float32


def test_equal_vectors_give_the_floors():
    equal = torch.ones(5, 7).double()
    assert nt_xent(equal, equal, 0.2).item() == pytest.approx(math.log(9), abs=1e-9)
    assert query_key_info_nce(equal, equal, 0.2).item() == pytest.approx(0.4 * math.log(5), abs=1e-9)
    assert cosine_regression(equal, equal).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.ddp
@pytest.mark.parametrize("loss", LOSSES, ids=["nt_xent", "query_key", "cosine"])
def test_views_on_two_ranks_equal_one(rank_pool, loss):
    names = ("a", "b") if loss is LOSSES[0] else ("query", "key")
    data = {name: torch.randn(6, 5).double() for name in names}
    weight = torch.randn(5, 5).double()
    whole, gradient = loss_and_gradient(loss, data, names, weight)
    jobs = [(loss, {n: x[part] for n, x in data.items()}, names, weight) for part in (slice(0, 3), slice(3, 6))]
    for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
        assert value.item() == pytest.approx(whole.item(), abs=1e-9)
        assert torch.allclose(part_gradient, gradient, rtol=1e-8, atol=1e-10)
