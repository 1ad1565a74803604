"""Variance, invariance and covariance of two views (VICReg, Bardes et al. 2022, Eqs. 1 to 6)."""

from typing import NamedTuple

import torch
from torch import Tensor

from common.distributed import all_gather_cat
from common.runtime.precision import at_least_float32

_EPS = 1e-4


class VICReg(NamedTuple):
    """The three terms, unweighted.

    Attributes:
        invariance: mean squared difference of the views.
        variance: how far the features' standard deviations fall short of 1, mean over features and views.
        covariance: squared covariances of different features over their number, summed over the views.
    """

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shortfall of the standard deviations of ``(B, D)``, and the squared covariances over D."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    variance = covariance.diagonal()
    shortfall = (1 - (variance + _EPS).sqrt()).clamp(min=0).mean()
    return shortfall, (covariance.square().sum() - variance.square().sum()).clamp(min=0) / x.shape[1]


def vicreg(a: Tensor, b: Tensor, sync: bool = True) -> VICReg:
    """Compute the terms between two views; the paper's loss is 25, 25 and 1 times them.

    Args:
        a: ``(B, D)``, one view of each sample; at least two samples over all ranks.
        b: ``(B, D)``, the other view.
        sync: Whether rows of all ranks, which must hold equally many, are joined first, with their gradient.

    Returns:
        Scalars in float32 (float64 stays).

    Raises:
        ValueError: shapes differ, or there is one sample only.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"The two views must be matrices of one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    with torch.autocast(a.device.type, enabled=False):
        a, b = at_least_float32(a), at_least_float32(b)
        if sync:
            a, b = all_gather_cat(a), all_gather_cat(b)
        if len(a) < 2:
            raise ValueError("VICReg needs at least two samples in a step: raise data.batch_size.")
        (short_a, off_a), (short_b, off_b) = _spread(a), _spread(b)
        return VICReg((a - b).square().mean(), (short_a + short_b) / 2, off_a + off_b)
