"""Masks made of boxes of positions, an exact number in each sample (after BEiT, Bao et al. 2022, and iBOT).

Letters: B batch, N positions, J boxes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.maskers.attention import hidden_counts
from common.randomness import KeyedGenerator

_BOXES = 24


def box_mask(generator: KeyedGenerator, share: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Hide boxes one after another until each sample's share is reached; the last box is cut short.

    A box covers 0.2 to 0.6 of every axis and lies anywhere within the grid.

    Args:
        generator: Source of the draws, one key per sample.
        share: ``(B,)``, the share of positions that each sample hides.
        grid_size: Positions along each axis, two or three.

    Returns:
        bool ``(B, N)``, True = hidden, exactly the floor of share times N.
    """
    batch, positions, device = len(share), math.prod(grid_size), share.device
    # A position's turn is the first box that covers it; within a box and after all of them chance decides.
    covered = torch.ones((batch, _BOXES, *(1 for _ in grid_size)), dtype=torch.bool, device=device)
    for axis, size in enumerate(grid_size):
        edges = (size * (0.2 + 0.4 * generator.rand((batch, _BOXES)))).round().clamp(min=1)
        first = (generator.rand((batch, _BOXES)) * (size - edges + 1)).floor()
        place = torch.arange(size, device=device).view([size if a == axis else 1 for a in range(len(grid_size))])
        low, high = (x.view(batch, _BOXES, *(1 for _ in grid_size)) for x in (first, first + edges))
        covered = covered & (place >= low) & (place < high)
    covered = covered.flatten(2)
    turn = torch.where(covered.any(1), covered.long().argmax(1), _BOXES) + generator.rand((batch, positions))
    return turn.argsort(dim=1, stable=True).argsort(dim=1) < hidden_counts(share, positions)[:, None]
