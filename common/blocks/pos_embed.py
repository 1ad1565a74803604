"""Position embeddings for grids of one, two or three axes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_position_embedding(
    grid_size: Sequence[int], embed_dim: int, temperature: float = 10000.0, span: float = 1.0
) -> Tensor:
    """Make fixed sine-cosine positions (Vaswani et al. 2017; MAE's 2D form, for any number of axes).

    The width is shared equally by the axes, the last axis first (an image's columns before its rows), half sines and
    half cosines; a rest that does not divide stays 0.

    Args:
        grid_size: Positions along each axis.
        embed_dim: E.
        temperature: Longest wavelength over 2 pi.
        span: Exponent that the frequencies run to; 1/4 is what the published code of masked record modeling computes,
            whose frequencies end at a tenth.

    Returns:
        ``(1, N, E)`` float32, positions in row-major order.

    Raises:
        ValueError: the width has no room for one frequency per axis.
    """
    num_frequencies = embed_dim // (2 * len(grid_size))
    if num_frequencies < 1:
        raise ValueError(f"`embed_dim` must be at least {2 * len(grid_size)}, got {embed_dim}.")
    frequency = temperature ** (-span * torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
    axes = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) for size in grid_size], indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in reversed(axes)]
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    table = torch.cat(parts, dim=1).float()
    return F.pad(table, (0, embed_dim - table.shape[1]))[None]


def resize_position_embedding(table: Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Resample learned positions to another grid, linearly in one or three axes and bicubically in two.

    Args:
        table: ``(1, N_old, E)``.
        old_grid: Its positions along each axis.
        new_grid: Wanted positions along each axis.

    Returns:
        ``(1, N_new, E)``; the input itself where the grids agree.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(old_grid)]
    grid = table.float().reshape(1, *old_grid, -1).movedim(-1, 1)
    resized = F.interpolate(grid, size=tuple(new_grid), mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)
