import pytest
import torch

from common.distributed import loss_and_gradient
from common.losses.barlow_twins import (
    correlation_to_identity,
    cross_correlation,
    sample_barlow_twins,
    token_barlow_twins,
)

Z3 = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
Z3_MASKED = torch.tensor([[[1.0, 0], [1, 1], [0, 2]]])


def slow_position(a, b, reduction, weight):
    """Eqs. 4 and 8 in loops."""
    batch, n, width = a.shape
    on = off = 0.0
    for i in range(n):
        for j in range(n):
            product = sum(float(a[s, i, d] * b[s, j, d]) for s in range(batch) for d in range(width))
            norm_a = sum(float(a[s, i, d] ** 2) for s in range(batch) for d in range(width)) ** 0.5
            norm_b = sum(float(b[s, j, d] ** 2) for s in range(batch) for d in range(width)) ** 0.5
            c = product / (norm_a * norm_b)
            if i == j:
                on += (1 - c) ** 2
            else:
                off += c**2
    return on + weight * off if reduction == "sum" else on / n + weight * off / (n * (n - 1))


def slow_feature(a, b, weight):
    """Classical Barlow Twins (Zbontar et al., algorithm 1) with biased statistics, mean form."""
    x, y = a.flatten(0, 1), b.flatten(0, 1)
    rows, width = x.shape
    on = off = 0.0
    for i in range(width):
        u = (x[:, i] - x[:, i].mean()) / (x[:, i].var(unbiased=False) + 1e-5).sqrt()
        for j in range(width):
            v = (y[:, j] - y[:, j].mean()) / (y[:, j].var(unbiased=False) + 1e-5).sqrt()
            c = float((u * v).sum() / rows)
            on, off = (on + (1 - c) ** 2, off) if i == j else (on, off + c**2)
    return on / width + weight * off / (width * (width - 1))


def test_worked_example_of_one_sample():
    """R3: rows are the clean branch; the matrix is not symmetric."""
    r = 0.707107
    expected = torch.tensor([[1, r, 0], [0, r, 1], [r, 1, r]])
    assert torch.allclose(cross_correlation(Z3, Z3_MASKED), expected, atol=1e-5)
    assert token_barlow_twins(Z3, Z3_MASKED, reduction="sum").item() == pytest.approx(3.171573, abs=1e-5)
    assert token_barlow_twins(Z3, Z3_MASKED).item() == pytest.approx(0.557191, abs=1e-5)


def test_worked_example_of_a_batch():
    """R4: sums run over batch and features; averaging per-sample matrices would give other numbers."""
    z = torch.tensor([[[1.0, 0], [0, 1]], [[2, 1], [0, 1]]])
    z_masked = torch.tensor([[[1.0, 1], [0, 1]], [[1, 0], [1, 1]]])
    expected = torch.tensor([[0.707107, 0.707107], [0.408248, 0.816497]])
    assert torch.allclose(cross_correlation(z, z_masked), expected, atol=1e-5)
    total = token_barlow_twins(z, z_masked, reduction="sum").item()
    assert total == pytest.approx(0.119460 + 0.666667, abs=1e-5)
    averaged = torch.tensor([[0.800767, 0.474342], [0.353553, 0.853553]])
    assert abs(total - correlation_to_identity(averaged, "sum").item()) > 0.1


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 9, 3)])
def test_position_form_equals_loops(reduction, shape):
    """The second shape has more tokens than features: the N x N matrix is never formed there."""
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    fast = token_barlow_twins(a, b, reduction=reduction, off_diagonal_weight=0.3)
    assert fast.item() == pytest.approx(slow_position(a, b, reduction, 0.3), rel=1e-5)


def test_feature_form_equals_loops():
    a, b = torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    assert token_barlow_twins(a, b, axis="feature", off_diagonal_weight=0.5).item() == pytest.approx(
        slow_feature(a, b, 0.5), rel=1e-6
    )


def test_identical_views_cost_nothing_on_the_diagonal():
    """MONAI's unbiased std would cost 0.0625 per feature at four rows."""
    a = torch.randn(1, 4, 3, dtype=torch.float64)
    assert token_barlow_twins(a, a, axis="feature", off_diagonal_weight=0).item() < 1e-8
    assert token_barlow_twins(a, a, off_diagonal_weight=0).item() < 1e-8


def test_floor_of_more_tokens_than_features():
    """R9: no matrix of rank B D can be the identity of a larger n; the summed loss has a floor of n - B D."""
    a = torch.nn.functional.normalize(torch.randn(1, 180, 77, dtype=torch.float64), dim=2)
    assert token_barlow_twins(a, a, reduction="sum").item() >= 180**2 / 77 - 180
    b = torch.randn(1, 180, 77, dtype=torch.float64)
    assert token_barlow_twins(a, b, reduction="sum").item() >= 180 - 77


def test_both_ways_of_computing_agree():
    a, b = torch.randn(1, 30, 8, dtype=torch.float64), torch.randn(1, 30, 8, dtype=torch.float64)
    direct = correlation_to_identity(cross_correlation(a, b))
    assert token_barlow_twins(a, b).item() == pytest.approx(direct.item(), rel=1e-6)


def test_mean_and_sum_correspond():
    a, b = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    mean = token_barlow_twins(a, b, off_diagonal_weight=0.1 * 5)
    assert mean.item() == pytest.approx(
        token_barlow_twins(a, b, reduction="sum", off_diagonal_weight=0.1).item() / 6, rel=1e-5
    )


def test_invariance():
    a, b = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    order = torch.randperm(6)
    loss = token_barlow_twins(a, b).item()
    assert token_barlow_twins(a[:, order], b[:, order]).item() == pytest.approx(loss, rel=1e-5)
    assert token_barlow_twins(3 * a, 0.5 * b).item() == pytest.approx(loss, rel=1e-4)
    assert token_barlow_twins(a + 2, b, axis="feature").item() == pytest.approx(
        token_barlow_twins(a, b, axis="feature").item(), rel=1e-4
    )


def test_one_token_does_not_divide_by_zero():
    loss = token_barlow_twins(torch.ones(2, 1, 3), torch.ones(2, 1, 3))
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_dead_tokens_keep_gradients_finite():
    a = torch.zeros(2, 4, 3, requires_grad=True)
    b = torch.randn(2, 4, 3, requires_grad=True)
    for axis in ("position", "feature"):
        token_barlow_twins(a + 0 * b, b, axis=axis).backward()
        assert torch.isfinite(b.grad).all()
        b.grad = None


def test_centring():
    a, b = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    loss = token_barlow_twins(a, b, center=True).item()
    shifted = token_barlow_twins(a + torch.randn(1, 4, 1), b, center=True).item()
    assert shifted == pytest.approx(loss, rel=1e-4)


def test_one_matrix_per_sample():
    a, b = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = sum(slow_position(a[i : i + 1], b[i : i + 1], "mean", 1.0) for i in range(3)) / 3
    assert sample_barlow_twins(a, b).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"axis": "feature"}, {"center": True}])
def test_gradient(settings):
    a = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: token_barlow_twins(x, y, **settings), (a, b), atol=1e-5)


def test_both_branches_get_a_gradient():
    a, b = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    token_barlow_twins(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0


def test_float32_inside_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        low = token_barlow_twins(Z3.bfloat16(), Z3_MASKED.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(0.557191, abs=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="axis"):
        token_barlow_twins(Z3, Z3, axis="batch")
    with pytest.raises(ValueError, match=r"must both be \(B, N, D\)"):
        token_barlow_twins(Z3, Z3[:, :2])


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("loss", "shape", "settings"),
    [
        (token_barlow_twins, (4, 5, 6), {}),
        (token_barlow_twins, (4, 5, 6), {"reduction": "sum", "center": True}),
        (token_barlow_twins, (2, 9, 3), {}),
        (token_barlow_twins, (4, 5, 6), {"axis": "feature"}),
        (sample_barlow_twins, (4, 5, 6), {}),
    ],
)
def test_two_ranks_equal_one(rank_pool, loss, shape, settings):
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape[2], shape[2], dtype=torch.float64)
    whole, whole_gradient = loss_and_gradient(loss, {"a": a, "b": b}, ["a", "b"], weight, **settings)
    half = shape[0] // 2
    parts = [{"a": a[:half], "b": b[:half]}, {"a": a[half:], "b": b[half:]}]
    arguments = [(loss_with_settings(loss, settings), part, ["a", "b"], weight) for part in parts]
    for value, gradient in rank_pool.run(loss_and_gradient, arguments):
        assert value.item() == pytest.approx(whole.item(), rel=1e-9)
        assert torch.allclose(gradient, whole_gradient, rtol=1e-8, atol=1e-12)


def loss_with_settings(loss, settings):
    """Bind settings in a way that can be sent to another process."""
    from functools import partial

    return partial(loss, **settings)
