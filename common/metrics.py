"""Metrics: effective rank, Dice and HD95 with rules for empty regions, kappa and means under resampling."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from common.randomness import numpy_generator


def effective_rank(features: Tensor) -> float:
    """Effective rank of a feature matrix (Roy and Vetterli 2007).

    Columns are centred; with singular values s and ``q = s / sum(s)`` (s, not s squared) it is ``exp(-sum q ln q)``.

    Args:
        features: ``(N, D)``.

    Returns:
        Between 1 and min(N, D); 0 where all rows are equal; NaN where one is not finite.
    """
    return spectrum_rank(singular_values(features))


def singular_values(features: Tensor) -> Tensor:
    """Return the singular values of the centred ``(N, D)`` features, largest first, float64 on the CPU.

    They are the roots of the eigenvalues of the Gram matrix on its smaller side: exact enough in float64, and fast.
    Features that are not finite have none: all are NaN.
    """
    x = features.detach().double().cpu()
    if not bool(torch.isfinite(x).all()):
        return torch.full((min(x.shape),), math.nan, dtype=x.dtype)
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


def region_hd95(pred: Tensor, target: Tensor, diagonal: float, spacing: Sequence[float]) -> Tensor:
    """95th percentile of the symmetric surface distance, in mm, per sample and region.

    MONAI returns NaN wherever a region is empty and drops it from means, so that a model that finds nothing scores
    perfectly (MONAI issue 9095). Here, as in BraTS: both empty is 0, exactly one empty is the volume's diagonal.

    Args:
        pred: bool ``(B, R, *space)``.
        target: bool ``(B, R, *space)``.
        diagonal: Diagonal of the whole volume in mm (373.13 for 240 x 240 x 155 voxels of 1 mm).
        spacing: Sides of a voxel of ``pred`` and ``target`` in mm.

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
        distance = compute_hausdorff_distance(
            one, other, include_background=True, percentile=95, spacing=[float(side) for side in spacing]
        )
        result[sample, region] = distance.item()
    return result


def resampled_counts(units: Sequence[Hashable], draws: int = 2000, key: str = "bootstrap mean") -> NDArray[np.int64]:
    """Return how often each case is drawn when units, such as people, are resampled with all their cases.

    Args:
        units: What each of S cases belongs to.
        draws: Resamplings, the same ones every time.
        key: Which resamplings.

    Returns:
        ``(draws, S)``.
    """
    number, names = pd.factorize(pd.Series(list(units)))
    generator = numpy_generator(key, len(names))
    return generator.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)[:, number]


def weighted_mean(values: ArrayLike, counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean ``(draws,)`` of ``(S,)`` values, each counted as often as ``counts`` ``(draws, S)`` says."""
    return counts @ np.asarray(values, dtype=float) / counts.sum(1)


def weighted_quadratic_kappa(pred: ArrayLike, target: ArrayLike, counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return Cohen's kappa with quadratic weights where each case counts several times or not at all.

    NaN where all predictions and grades are one and the same.

    Args:
        pred: ``(S,)``, grades from 0.
        target: ``(S,)``.
        counts: ``(draws, S)``, how often each case counts.

    Returns:
        ``(draws,)``.
    """
    pred, target = np.asarray(pred, dtype=int), np.asarray(target, dtype=int)
    grades = np.arange(max(pred.max(), target.max()) + 1)
    cells = np.eye(len(grades) ** 2)[target * len(grades) + pred]
    table = (counts @ cells).reshape(-1, len(grades), len(grades))
    expected = table.sum(2)[:, :, None] * table.sum(1)[:, None] / table.sum((1, 2))[:, None, None]
    penalty = np.subtract.outer(grades, grades) ** 2.0
    by_chance = (penalty * expected).sum((1, 2))
    with np.errstate(invalid="ignore"):
        return 1 - (penalty * table).sum((1, 2)) / np.where(by_chance > 0, by_chance, np.nan)


def weighted_auroc(scores: ArrayLike, target: ArrayLike, counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return the AUROC where each case counts several times or not at all; NaN where one class is left.

    Args:
        scores: ``(S,)``; equal ones count half.
        target: ``(S,)``, 1 = positive.
        counts: ``(draws, S)``, how often each case counts.

    Returns:
        ``(draws,)``.
    """
    score, positive = np.asarray(scores), np.asarray(target) == 1
    times = counts.astype(float)
    wins = np.sign(score[positive][:, None] - score[~positive]) / 2 + 0.5
    won = np.einsum("dp,pn,dn->d", times[:, positive], wins, times[:, ~positive], optimize=True)
    pairs = times[:, positive].sum(1) * times[:, ~positive].sum(1)
    with np.errstate(invalid="ignore"):
        return won / np.where(pairs > 0, pairs, np.nan)


def central_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the central 95 % of the values that are numbers; NaN where none is."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float], units: Sequence[Hashable], draws: int = 2000) -> tuple[float, float]:
    """Return the central 95 % of a mean under resampling of units, such as people, with all their values.

    Args:
        values: One per case.
        units: What each case belongs to.
        draws: Resamplings, the same ones every time.
    """
    return central_interval(weighted_mean(values, resampled_counts(units, draws)))


def bootstrap_auroc(
    scores: ArrayLike, target: ArrayLike, units: Sequence[Hashable], draws: int = 2000
) -> tuple[float, float]:
    """Return the central 95 % of the AUROC under resampling of units, such as people; draws of one class do not count.

    Args:
        scores: One per case.
        target: 1 = positive.
        units: What each case belongs to.
        draws: Resamplings, the same ones every time.
    """
    return central_interval(weighted_auroc(scores, target, resampled_counts(units, draws, "bootstrap")))


def bootstrap_ratio(totals: NDArray[Any], counts: NDArray[Any], draws: int = 1000) -> tuple[float, float]:
    """Return the central 95 % of a ratio of sums under resampling of people.

    Args:
        totals: Sum of each person, ``(P,)``.
        counts: Terms in each sum, ``(P,)``.
        draws: Resamplings, the same ones every time.
    """
    chosen = numpy_generator("bootstrap", len(totals)).integers(0, len(totals), (draws, len(totals)))
    return central_interval(totals[chosen].sum(1) / np.maximum(counts[chosen].sum(1), 1))
