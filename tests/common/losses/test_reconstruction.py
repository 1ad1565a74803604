import pytest
import torch

from common.distributed import loss_and_gradient
from common.losses.reconstruction import masked_error, masked_mse


def test_worked_example():
    """R6: patch errors [[0.5, 2], [6.5, 0.5]]; hidden (0, 1) and (1, 0) give 4.25, all give 2.375."""
    target = torch.tensor([[[1.0, 0], [2, 1]], [[0, 3], [1, 1]]])
    pred = torch.tensor([[[1.0, 1], [0, 1]], [[2, 0], [1, 0]]])
    mask = torch.tensor([[False, True], [True, False]])
    assert masked_mse(pred, target, mask).item() == pytest.approx(4.25)
    assert masked_mse(pred, target, torch.ones_like(mask)).item() == pytest.approx(2.375)


def test_equals_a_loop():
    pred, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    mask = torch.rand(3, 4, 5) < 0.4
    errors = [((pred[i] - target[i]) ** 2).mean().item() for i in map(tuple, mask.nonzero().tolist())]
    assert masked_mse(pred, target, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_nothing_hidden_gives_zero_with_a_graph():
    pred = torch.randn(2, 3, 4, requires_grad=True)
    loss = masked_mse(pred, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert pred.grad.abs().sum() == 0


def test_visible_entries_get_no_gradient():
    pred = torch.randn(2, 6, 4, requires_grad=True)
    mask = torch.rand(2, 6) < 0.5
    masked_mse(pred, torch.randn(2, 6, 4), mask).backward()
    assert (pred.grad[~mask] == 0).all()
    assert (pred.grad[mask] != 0).all()


def test_precision():
    pred, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert masked_mse(pred.double(), target.double(), mask).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_mse(pred.bfloat16(), target, mask).dtype == torch.float32


def test_error_sums_belong_to_this_rank():
    total, count = masked_error(torch.ones(2, 3, 4), torch.zeros(2, 3, 4), torch.tensor([[True] * 3, [False] * 3]))
    assert (total.item(), count.item()) == (3, 3)


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    """Ranks that hide different amounts: a mean of means would differ."""
    pred, target = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 0] = True
    mask[2:] = True
    weight = torch.randn(3, 3, dtype=torch.float64)
    batch = {"pred": pred, "target": target, "mask": mask}
    whole, whole_gradient = loss_and_gradient(masked_mse, batch, ["pred"], weight)
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    for loss, gradient in rank_pool.run(loss_and_gradient, [(masked_mse, half, ["pred"], weight) for half in halves]):
        assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
        assert torch.allclose(gradient, whole_gradient, rtol=1e-10)
