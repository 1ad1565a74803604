from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.blocks.batch_norm import GlobalBatchNorm1d, GlobalBatchNorm3d
from common.distributed import all_reduce_sum, loss_and_gradient


def pair():
    ours, theirs = GlobalBatchNorm3d(3), nn.BatchNorm3d(3)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_on_one_rank_it_is_batch_norm():
    ours, theirs = pair()
    for _ in range(3):
        x = torch.randn(4, 3, 2, 3, 4)
        assert torch.equal(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_a_repeated_forward_pass_counts_once():
    ours, theirs = pair()
    x = torch.randn(4, 3, 2, 3, 4, requires_grad=True)
    checkpoint(ours, x, use_reentrant=False).sum().backward()
    theirs(x.detach())
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert ours.num_batches_tracked == 1


def squares(x):
    """Something that looks at every output of the normalisation, summed over ranks; and the running statistics."""
    norm = GlobalBatchNorm3d(x.shape[-1]).to(x.dtype)
    y = norm(x.permute(0, 4, 1, 2, 3))
    weight = torch.linspace(0.5, 1.5, y[0].numel(), dtype=x.dtype).reshape(y.shape[1:])
    return all_reduce_sum((y.pow(3) * weight).sum()) + norm.running_mean.sum() + norm.running_var.sum()


@pytest.mark.ddp
def test_two_ranks_equal_one(rank_pool):
    x = torch.randn(5, 2, 3, 2, 4, dtype=torch.float64)
    weight = torch.randn(4, 4, dtype=torch.float64)
    whole, gradient = loss_and_gradient(squares, {"x": x}, ["x"], weight)
    parts = [x[:2], x[2:]]
    jobs = [(squares, {"x": part}, ["x"], weight) for part in parts]
    for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
        assert value.item() == pytest.approx(whole.item(), rel=1e-10)
        assert torch.allclose(part_gradient, gradient, rtol=1e-8, atol=1e-10)


def test_vectors_on_one_rank():
    ours, theirs = GlobalBatchNorm1d(3, affine=False), nn.BatchNorm1d(3, affine=False)
    x = torch.randn(5, 3)
    assert torch.equal(ours(x), theirs(x))


def normalised_vectors(x, affine):
    norm = GlobalBatchNorm1d(x.shape[-1], affine=affine).to(x.dtype)
    return (norm(x) ** 3).sum(1).mean()


def mean_over_ranks(x, affine):
    return all_reduce_sum(normalised_vectors(x, affine)) / 2


@pytest.mark.ddp
@pytest.mark.parametrize("affine", [True, False])
def test_vectors_on_two_ranks(rank_pool, affine):
    x, weight = torch.randn(8, 3).double(), torch.randn(3, 3).double()
    whole, gradient = loss_and_gradient(normalised_vectors, {"x": x}, ["x"], weight, affine=affine)
    jobs = [(partial(mean_over_ranks, affine=affine), {"x": part}, ["x"], weight) for part in x.chunk(2)]
    for value, part_gradient in rank_pool.run(loss_and_gradient, jobs):
        assert value.item() == pytest.approx(whole.item(), abs=1e-9)
        assert torch.allclose(part_gradient, gradient, atol=1e-9)
