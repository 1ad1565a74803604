import numpy as np
import pytest
import torch

from common.distributed import loss_and_gradient
from common.losses.barlow_twins import token_barlow_twins
from common.losses.vicreg import vicreg

X = torch.tensor([[1.0, 2], [0, 1], [2, 0]]).double()
Y = torch.tensor([[1.0, 1], [0, 2], [3, 0]]).double()


def slow(a, b):
    """Feature by feature."""
    terms = [np.mean([(p - q) ** 2 for p, q in zip(a.flat, b.flat, strict=True)]), 0.0, 0.0]
    for x in (a, b):
        width, mean = x.shape[1], x.mean(0)
        for i in range(width):
            for j in range(width):
                covariance = sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in x) / (len(x) - 1)
                if i == j:
                    terms[1] += max(0.0, 1 - (covariance + 1e-4) ** 0.5) / width / 2
                else:
                    terms[2] += covariance**2 / width
    return terms


def total(a, b, sync=True):
    terms = vicreg(a, b, sync)
    return 25 * terms.invariance + 25 * terms.variance + terms.covariance


@pytest.mark.parametrize(
    ("scale", "terms", "loss"),
    [(1, [0.5, 0, 2.5], 15.0), (0.25, [0.03125, 0.716847, 0.00976563], 18.712191)],
)
def test_the_specifications_cases(scale, terms, loss):
    assert [float(x) for x in vicreg(X * scale, Y * scale)] == pytest.approx(terms, abs=1e-6)
    assert slow(X.numpy() * scale, Y.numpy() * scale) == pytest.approx(terms, abs=1e-6)
    assert total(X * scale, Y * scale).item() == pytest.approx(loss, abs=1e-6)


def test_barlow_twins_of_the_specification():
    value = token_barlow_twins(X[:, None], Y[:, None], "feature", "sum", 5e-3)
    assert value.item() == pytest.approx(0.257475, abs=1e-6)


def test_equals_the_slow_form_has_its_gradient_and_its_floor():
    a, b = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_()
    assert [x.item() for x in vicreg(a, b)] == pytest.approx(slow(a.detach().numpy(), b.detach().numpy()), rel=1e-10)
    assert torch.autograd.gradcheck(total, (a, b))
    equal = torch.ones(6, 4).double()
    assert total(equal, equal).item() == pytest.approx(24.75, abs=1e-9)
    nothing = torch.zeros(4, 3, requires_grad=True)
    total(nothing, nothing.detach()).backward()
    assert torch.isfinite(nothing.grad).all()


def test_what_it_refuses():
    with pytest.raises(ValueError, match="at least two samples"):
        vicreg(X[:1], Y[:1])
    with pytest.raises(ValueError, match="one shape"):
        vicreg(X, Y[:2])


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    data = {"a": torch.randn(6, 5).double(), "b": torch.randn(6, 5).double()}
    weight = torch.randn(5, 5).double() / 3
    whole, gradient = loss_and_gradient(total, data, data, weight)
    jobs = [(total, {n: x[part] for n, x in data.items()}, [*data], weight) for part in (slice(0, 3), slice(3, 6))]
    for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
        assert value.item() == pytest.approx(whole.item(), abs=1e-9)
        assert torch.allclose(part_gradient, gradient, rtol=1e-8, atol=1e-10)
