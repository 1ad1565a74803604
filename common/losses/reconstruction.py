"""Reconstruction error over hidden entries."""

import torch
from torch import Tensor

from common.distributed import all_reduce_sum
from common.runtime.precision import at_least_float32


def masked_error(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the mean squared error of each hidden entry.

    Args:
        pred: ``(..., P)``.
        target: ``(..., P)``, broadcast against ``pred``.
        mask: bool ``(...)``, True = hidden, counted.

    Returns:
        The sum over hidden entries of the mean over P, and the number of hidden entries; float32 (float64 if ``pred``
        is), of this rank alone.
    """
    with torch.autocast(pred.device.type, enabled=False):
        pred = at_least_float32(pred)
        weight = mask.to(pred.dtype)
        error = (pred - target.to(pred.dtype)).square().mean(-1)
        return (error * weight).sum(), weight.sum()


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor, sync: bool = True) -> Tensor:
    """Mean squared error over hidden entries (E-MIM Eq. 1, MAE): mean over P, then over the hidden entries.

    Across ranks the sums and the counts are added before they are divided, with gradients, so that ranks whose samples
    hide different amounts give the loss of the joined batch.

    Args:
        pred: ``(..., P)``.
        target: ``(..., P)``.
        mask: bool ``(...)``, True = hidden.
        sync: Whether to reduce over ranks.

    Returns:
        A scalar; 0 with a graph where nothing is hidden.
    """
    total, count = masked_error(pred, target, mask)
    if sync:
        total, count = all_reduce_sum(total), all_reduce_sum(count)
    return total / count.clamp(min=1)


def masked_l1(pred: Tensor, target: Tensor, mask: Tensor, sync: bool = True) -> Tensor:
    """Mean absolute error over hidden entries (SimMIM, Xie et al. 2022); otherwise as :func:`masked_mse`."""
    with torch.autocast(pred.device.type, enabled=False):
        pred = at_least_float32(pred)
        error, weight = (pred - target.to(pred.dtype)).abs().mean(-1), mask.to(pred.dtype)
        total, count = (error * weight).sum(), weight.sum()
    if sync:
        total, count = all_reduce_sum(total), all_reduce_sum(count)
    return total / count.clamp(min=1)
