import pytest
import torch

from common.distributed import agree, all_gather_cat, all_reduce_sum, gather_objects, reduce_sums, run_ranks


def test_one_rank_is_the_identity():
    x = torch.randn(3, requires_grad=True)
    assert all_reduce_sum(x) is x
    assert all_gather_cat(x) is x
    assert agree(True)
    assert not agree(False)
    assert gather_objects("a") == ["a"]
    assert reduce_sums({"a": (6.0, 3.0), "b": (0.0, 0.0)}) == {"a": 2.0}


@pytest.mark.ddp
def test_two_ranks(rank_pool):
    assert [float(x) for x in rank_pool.run(all_reduce_sum, [(torch.tensor(1.0),), (torch.tensor(2.0),)])] == [3, 3]
    gathered = rank_pool.run(all_gather_cat, [(torch.tensor([1.0]),), (torch.tensor([2.0]),)])
    assert [x.tolist() for x in gathered] == [[1, 2], [1, 2]]
    assert rank_pool.run(agree, [(False,), (True,)]) == [True, True]
    assert rank_pool.run(gather_objects, [({"a": 1},), (None,)]) == [[{"a": 1}, None]] * 2
    # A mean of means would give 1.5; the second rank has no "b".
    sums = [({"a": (1.0, 1.0), "b": (4.0, 2.0)},), ({"a": (6.0, 3.0)},)]
    assert rank_pool.run(reduce_sums, sums) == [{"a": 1.75, "b": 2.0}] * 2


@pytest.mark.ddp
def test_a_failing_rank_is_named():
    with pytest.raises(RuntimeError, match=r"failed on rank 0: .*could not convert"):
        run_ranks(float, [("x",)])
