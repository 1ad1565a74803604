import pytest
import torch

from common.maskers.random import RandomMasker
from common.maskers.voxel_blocks import block_grid, blocks_to_voxels, replace_blocks


def kept(*ids, n=8):
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[0, list(ids)] = False
    return mask


def test_the_specifications_case():
    x = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    result = replace_blocks(x, torch.full_like(x, -1), kept(0, 5), 2)[0, 0]
    assert int((result >= 0).sum()) == 16
    assert int((result == -1).sum()) == 48
    assert result.sum().item() == 392
    assert result[0].tolist() == [[0, 1, -1, -1], [4, 5, -1, -1], [-1] * 4, [-1] * 4]
    assert result[2].tolist() == [[-1, -1, 34, 35], [-1, -1, 38, 39], [-1] * 4, [-1] * 4]


@pytest.mark.parametrize(
    ("blocks", "ratio", "count"), [(1728, 0.875, 216), (1728, 0.8, 345), (27, 0.9, 2), (8, 0.75, 2)]
)
def test_kept_counts(blocks, ratio, count):
    mask = RandomMasker(ratio)(3, blocks).mask
    assert (~mask).sum(1).tolist() == [count] * 3


def test_equals_a_loop_over_voxels():
    x, y = torch.randn(2, 1, 6, 4, 8), torch.randn(2, 1, 6, 4, 8)
    grid = block_grid((6, 4, 8), 2)
    mask = torch.rand(2, 3 * 2 * 4) < 0.5
    result = replace_blocks(x, y, mask, 2)
    for b in range(2):
        for i in range(6):
            for j in range(4):
                for k in range(8):
                    block = ((i // 2) * grid[1] + j // 2) * grid[2] + k // 2
                    source = y if mask[b, block] else x
                    assert result[b, 0, i, j, k] == source[b, 0, i, j, k]
    assert blocks_to_voxels(mask, grid, 2).shape == (2, 1, 6, 4, 8)


def test_gradient_goes_to_what_is_seen():
    x = torch.randn(1, 1, 4, 4, 4, requires_grad=True)
    y = torch.randn(1, 1, 4, 4, 4, requires_grad=True)
    mask = kept(0, 5)
    replace_blocks(x, y, mask, 2).sum().backward()
    hidden = blocks_to_voxels(mask, (2, 2, 2), 2)
    assert torch.equal(y.grad, hidden.float())
    assert torch.equal(x.grad, 1 - hidden.float())


def test_what_it_refuses():
    x = torch.zeros(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="multiple of the block size 3"):
        replace_blocks(x, x, kept(0), 3)
    with pytest.raises(ValueError, match="one shape"):
        replace_blocks(x, x[..., :2], kept(0), 2)
    with pytest.raises(ValueError, match=r"must be \(B, 8\)"):
        replace_blocks(x, x, kept(0, n=9), 2)
