"""Crops of volumes: where they lie, how they are cut, and how they are mirrored."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def random_start(
    shape: Sequence[int], size: Sequence[int], generator: np.random.Generator, overhang: float = 0.0
) -> list[int]:
    """Draw the first voxel of a crop.

    Args:
        shape: Voxels of the volume.
        size: Voxels of the crop.
        generator: Random generator of the draw.
        overhang: Share of the crop that may reach beyond the volume on each side. At 0.5 its centre is uniform over the
            volume, so that voxels at the edge are sampled as often as those in the middle.

    Returns:
        One start per axis; an axis too short for the crop is centred.
    """
    start = []
    for axis, crop in zip(shape, size, strict=True):
        low, high = -round(overhang * crop), axis - crop + round(overhang * crop)
        start.append(int(generator.integers(low, high + 1)) if low <= high else (axis - crop) // 2)
    return start


def start_around(
    voxel: Sequence[int], shape: Sequence[int], size: Sequence[int], generator: np.random.Generator
) -> list[int]:
    """Draw the first voxel of a crop that contains ``voxel``."""
    start = []
    for position, axis, crop in zip(voxel, shape, size, strict=True):
        if axis < crop:
            start.append((axis - crop) // 2)
            continue
        low, high = max(0, position - crop + 1), min(position, axis - crop)
        start.append(int(generator.integers(low, high + 1)))
    return start


def center_start(shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """Return the first voxel of the central crop."""
    return [(axis - crop) // 2 for axis, crop in zip(shape, size, strict=True)]


def cut(array: Any, start: Sequence[int], size: Sequence[int]) -> NDArray[Any]:
    """Cut a crop from the last three axes; voxels outside the volume are 0.

    Args:
        array: ``(..., X, Y, Z)``, sliced once, so that a memory map reads only the crop.
        start: First voxel; may be negative.
        size: Voxels along each axis.
    """
    shape = array.shape[-3:]
    inside = [slice(max(s, 0), max(min(s + n, axis), 0)) for s, n, axis in zip(start, size, shape, strict=True)]
    lead = (slice(None),) * (len(array.shape) - 3)
    piece = np.asarray(array[(*lead, *inside)])
    if piece.shape[-3:] == tuple(size):
        return piece
    result = np.zeros((*piece.shape[:-3], *size), dtype=piece.dtype)
    target = [slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(start, piece.shape[-3:], strict=True)]
    result[(*lead, *target)] = piece
    return result


def to_tensor(array: NDArray[Any]) -> Tensor:
    """Copy part of a memory-mapped array into a float32 tensor.

    PyTorch widens float16 three times as fast as NumPy, which checks every number for overflow, but it cannot read
    mirrored or read-only memory.
    """
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = np.array(array)
    return torch.from_numpy(array).to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def arranged(channels: Tensor, order: Sequence[int] | None) -> Tensor:
    """Reorder channels, ``(C, ...)``; None leaves them as they are.

    Args:
        channels: ``(C, ...)``.
        order: Index of each wanted channel among the C; a negative one means absent, filled with 0.
    """
    if order is None:
        return channels
    result = channels.new_zeros(len(order), *channels.shape[1:])
    for index, place in enumerate(order):
        if place >= 0:
            result[index] = channels[place]
    return result


def flip(array: NDArray[Any], axes: Sequence[int]) -> NDArray[Any]:
    """Mirror along some of the last three axes (0, 1, 2)."""
    return np.flip(array, tuple(axis - 3 for axis in axes)) if axes else array
