"""Intensity rules. Always in float32: upstream of E-MIM divides integer arrays in place, which leaves zeros."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def _percentile(x: Array) -> Array:
    """Clip at the 99.5th percentile of the foreground and divide by it: [0, 1], background stays 0."""
    top = np.percentile(x[x > 0], 99.5) if (x > 0).any() else x.max()
    return np.clip(x / top, 0, 1)


def _maximum(x: Array) -> Array:
    """Divide by the maximum (the scaling behind E-MIM's Fig. 2)."""
    return np.clip(x / x.max(), 0, 1)


def _minmax(x: Array) -> Array:
    """Clip to the 0.5th and 99.5th percentiles and stretch to [0, 1]."""
    low, high = np.percentile(x, [0.5, 99.5])
    if high <= low:
        low, high = x.min(), x.max()
    return np.clip((x - low) / (high - low), 0, 1)


def _stretch(low: float, high: float, x: Array) -> Array:
    """Stretch between two percentiles of the whole volume, air included, to [0, 1], and clip (BrainMVP)."""
    bottom, top = np.percentile(x, [low, high])
    return np.clip((x - bottom) / (top - bottom), 0, 1)


def _adc(x: Array) -> Array:
    """Divide by 3000: apparent diffusion coefficients are quantitative (10^-6 mm^2/s)."""
    return np.clip(x / 3000, 0, 1)


def _zscore(x: Array) -> Array:
    """Standardise over the foreground; background stays 0."""
    foreground = x != 0
    mean, std = x[foreground].mean(), x[foreground].std()
    return np.where(foreground, (x - mean) / max(std, 1e-6), 0)


RULES: dict[str, Callable[[Array], Array]] = {
    "percentile": _percentile,
    "max": _maximum,
    "minmax": _minmax,
    "percentile_5_95": partial(_stretch, 5, 95),
    "percentile_1_99": partial(_stretch, 1, 99),
    "adc": _adc,
    "zscore": _zscore,
}


def rescale(data: NDArray, rule: str) -> Array:
    """Apply a rule to a volume of any dtype.

    Args:
        data: Finite, not constant.
        rule: A name in ``RULES``.

    Returns:
        float32, same shape.
    """
    x = np.asarray(data, dtype=np.float32)
    return np.asarray(RULES[rule](x), dtype=np.float32)
