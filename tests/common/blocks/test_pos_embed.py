import numpy as np
import pytest
import torch

from common.blocks.pos_embed import resize_position_embedding, sincos_position_embedding


def mae_sincos_2d(width, height, columns):
    """MAE's own 2D table: half of the width for each axis, sines before cosines."""

    def one_axis(positions):
        omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
        out = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    rows, cols = np.meshgrid(np.arange(height), np.arange(columns), indexing="ij")
    return np.concatenate([one_axis(cols), one_axis(rows)], axis=1)


def test_two_axes_equal_mae():
    table = sincos_position_embedding((3, 5), 16)
    assert torch.allclose(table[0], torch.from_numpy(mae_sincos_2d(16, 3, 5)).float(), atol=1e-6)


def test_numbers_by_hand():
    """R7 of the specification of masked record modeling."""
    table = sincos_position_embedding((2, 2), 8)[0]
    assert torch.allclose(table[1], torch.tensor([0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1]), atol=1e-6)
    assert torch.allclose(table[2], torch.tensor([0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995]), atol=1e-6)
    upstream = sincos_position_embedding((2, 2), 8, span=0.25)[0]
    assert torch.allclose(upstream[1], torch.tensor([0.841471, 0.310984, 0.540302, 0.950415, 0, 0, 1, 1]), atol=1e-6)


def test_positions_differ_and_the_rest_is_zero():
    table = sincos_position_embedding((2, 3, 4), 20)[0]
    assert len(torch.unique(table, dim=0)) == 24
    assert (table[:, 18:] == 0).all()
    with pytest.raises(ValueError, match="embed_dim"):
        sincos_position_embedding((2, 2, 2), 4)


@pytest.mark.parametrize("grids", [((4,), (7,)), ((4, 4), (7, 5)), ((4, 4, 2), (8, 6, 3))])
def test_resizing(grids):
    old, new = grids
    n_old, n_new = int(np.prod(old)), int(np.prod(new))
    table = torch.randn(1, n_old, 6)
    assert resize_position_embedding(table, old, old) is table
    assert resize_position_embedding(table, old, new).shape == (1, n_new, 6)
    constant = torch.full((1, n_old, 6), 2.5)
    assert torch.allclose(resize_position_embedding(constant, old, new), torch.full((1, n_new, 6), 2.5))


def test_a_ramp_stays_a_ramp_along_its_own_axis():
    ramp = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 2).reshape(1, 16, 1)
    wide = resize_position_embedding(ramp, (4, 2, 2), (8, 2, 2)).reshape(8, 2, 2)
    assert (wide.diff(dim=0) >= 0).all()
    assert torch.equal(wide[:, 0, 0], wide[:, 1, 1])
