"""Masks over cubes of voxels, and volumes whose hidden cubes hold something else (BrainMVP, cross-modal mixing).

Letters: B batch, C channels, H W D space, K side of a cube, N cubes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def block_grid(image_size: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Return the number of cubes along each axis.

    Raises:
        ValueError: an axis is not a multiple of the cube's side, so that cubes would straddle its end.
    """
    if block_size < 1 or any(size % block_size for size in image_size):
        raise ValueError(f"Every side of the crop must be a multiple of the block size {block_size}, "
                         f"got {'x'.join(map(str, image_size))}.")  # fmt: skip
    return tuple(size // block_size for size in image_size)


def blocks_to_voxels(mask: Tensor, grid: Sequence[int], block_size: int) -> Tensor:
    """Spread a mask over cubes to their voxels.

    Args:
        mask: ``(B, N)``, cubes in C order.
        grid: Cubes along each axis; their product is N.
        block_size: K.

    Returns:
        ``(B, 1, H, W, D)``.

    Raises:
        ValueError: N is not the number of cubes.
    """
    if mask.ndim != 2 or mask.shape[1] != math.prod(grid):
        raise ValueError(f"`mask` must be (B, {math.prod(grid)}) for a grid of {tuple(grid)}, got {tuple(mask.shape)}.")
    voxels = mask.reshape(len(mask), 1, *grid)
    for axis in range(2, 2 + len(grid)):
        voxels = voxels.repeat_interleave(block_size, axis)
    return voxels


def replace_blocks(image: Tensor, fill: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Put ``fill`` where cubes are hidden and leave the rest unchanged (E-PHI): same places, nothing blended.

    The gradient of a hidden voxel goes to ``fill``, that of a visible one to ``image``.

    Args:
        image: ``(B, C, H, W, D)``.
        fill: What hidden voxels become, of the same shape.
        mask: bool ``(B, N)``, True = hidden.
        block_size: K.

    Raises:
        ValueError: shapes differ, or a side is not a multiple of K.
    """
    if image.shape != fill.shape:
        raise ValueError(f"`image` and `fill` must have one shape, got {tuple(image.shape)} and {tuple(fill.shape)}.")
    hidden = blocks_to_voxels(mask, block_grid(image.shape[2:], block_size), block_size)
    return torch.where(hidden, fill, image)
