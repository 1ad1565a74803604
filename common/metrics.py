"""Metrics: effective rank, MONAI's Dice and HD95 with rules for empty regions, an interval of a mean."""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from common.randomness import numpy_generator


def effective_rank(features: Tensor) -> float:
    """Effective rank of a feature matrix (Roy and Vetterli 2007).

    Columns are centred; with singular values s and ``q = s / sum(s)`` (s, not s squared) it is ``exp(-sum q ln q)``.

    Args:
        features: ``(N, D)``.

    Returns:
        Between 1 and min(N, D); 0 where all rows are equal.
    """
    return spectrum_rank(singular_values(features))


def singular_values(features: Tensor) -> Tensor:
    """Return the singular values of the centred ``(N, D)`` features, largest first, float64 on the CPU.

    They are the roots of the eigenvalues of the Gram matrix on its smaller side: exact enough in float64, and fast.
    """
    x = features.detach().double().cpu()
    x = x - x.mean(0, keepdim=True)
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    # Eigenvalues below the round-off of the largest are noise of the decomposition, not directions.
    return torch.where(values > values[:1] * 1e-7, values, torch.zeros_like(values))


def spectrum_rank(values: Tensor) -> float:
    """Return the effective rank that belongs to singular values ``(K,)``."""
    total = values.sum()
    if total <= 0:
        return 0.0
    q = values / total
    return float(torch.exp(-torch.special.xlogy(q, q).sum()))


def region_dice(pred: Tensor, target: Tensor) -> Tensor:
    """Dice per sample and region; 1 where both are empty, 0 where one is.

    Args:
        pred: bool ``(B, R, *space)``.
        target: bool ``(B, R, *space)``.

    Returns:
        ``(B, R)`` float32.
    """
    from monai.metrics import compute_dice

    return compute_dice(pred.float(), target.float(), include_background=True, ignore_empty=False)


def region_hd95(pred: Tensor, target: Tensor, diagonal: float) -> Tensor:
    """95th percentile of the symmetric surface distance, in voxels, per sample and region.

    MONAI returns NaN wherever a region is empty and drops it from means, so that a model that finds nothing scores
    perfectly (MONAI issue 9095). Here, as in BraTS: both empty is 0, exactly one empty is the volume's diagonal.

    Args:
        pred: bool ``(B, R, *space)``.
        target: bool ``(B, R, *space)``.
        diagonal: Diagonal of the whole volume in voxels (373.13 for 240 x 240 x 155).

    Returns:
        ``(B, R)`` float32 on the CPU.
    """
    from monai.metrics import compute_hausdorff_distance

    pred, target = pred.bool().cpu(), target.bool().cpu()
    axes = tuple(range(2, pred.ndim))
    has_pred, has_target = pred.any(axes), target.any(axes)
    result = torch.where(has_pred == has_target, 0.0, float(diagonal))
    both = has_pred & has_target
    for sample, region in both.nonzero().tolist():
        one, other = pred[sample, region][None, None], target[sample, region][None, None]
        distance = compute_hausdorff_distance(one, other, include_background=True, percentile=95)
        result[sample, region] = distance.item()
    return result


def bootstrap_mean(values: Sequence[float], units: Sequence[Hashable], draws: int = 2000) -> tuple[float, float]:
    """Return the central 95 % of a mean under resampling of units, such as persons, with all their values.

    Args:
        values: One per case.
        units: What each case belongs to.
        draws: Resamplings, the same ones every time.
    """
    number, names = pd.factorize(pd.Series(list(units)))
    totals, counts = np.bincount(number, np.asarray(values, dtype=float)), np.bincount(number)
    generator = numpy_generator("bootstrap mean", len(names))
    chosen = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    low, high = np.percentile((chosen @ totals) / (chosen @ counts), [2.5, 97.5])
    return float(low), float(high)
