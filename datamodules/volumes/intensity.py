"""Intensity rules. Always in float32: E-MIM's original code divides integer arrays in place, which leaves zeros.

A rule takes a volume and its background mask, None if the background is not a single value.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Mask = NDArray[np.bool_] | None

#: Rules that clip at 0 and so do not fit volumes with many negative voxels.
CLIPPED_AT_0 = ("percentile", "max")


def _percentile(x: Array, background: Mask) -> Array:
    """Clip at the 99.5th percentile of the foreground and divide by it: [0, 1], background stays 0."""
    foreground = x > 0 if background is None else (x > 0) & ~background
    top = np.percentile(x[foreground], 99.5) if foreground.any() else x.max()
    return np.clip(x / top, 0, 1)


def _maximum(x: Array, background: Mask) -> Array:
    """Divide by the maximum (the scaling behind E-MIM's Fig. 2)."""
    return np.clip(x / x.max(), 0, 1)


def _minmax(x: Array, background: Mask) -> Array:
    """Clip to the 0.5th and 99.5th percentiles and stretch to [0, 1]."""
    low, high = np.percentile(x, [0.5, 99.5])
    if high <= low:
        low, high = x.min(), x.max()
    return np.clip((x - low) / (high - low), 0, 1)


def _stretch(low: float, high: float, x: Array, background: Mask) -> Array:
    """Stretch between two percentiles of the whole volume, air included, to [0, 1], and clip (BrainMVP)."""
    bottom, top = np.percentile(x, [low, high])
    return np.clip((x - bottom) / (top - bottom), 0, 1)


def _adc(x: Array, background: Mask) -> Array:
    """Divide by 3000: apparent diffusion coefficients are quantitative (10^-6 mm^2/s)."""
    return np.clip(x / 3000, 0, 1)


def _zscore(x: Array, background: Mask) -> Array:
    """Standardise over the foreground; background stays 0."""
    foreground = x != 0 if background is None else ~background
    mean, std = x[foreground].mean(), x[foreground].std()
    return np.where(foreground, (x - mean) / max(std, 1e-6), 0)


def _standardised(x: Array, background: Mask) -> Array:
    """Map the 0.5th to 99.5th percentile of the foreground to [0.01, 1], and the background to 0.

    For volumes already standardised to mean 0: voxels below the mean do not become background.
    """
    foreground = np.ones(x.shape, dtype=bool) if background is None else ~background
    low, high = np.percentile(x[foreground], [0.5, 99.5])
    scaled = np.clip((x - low) / (high - low), 0, 1)
    return np.where(foreground, 0.01 + 0.99 * scaled, 0).astype(np.float32)


def _ct(x: Array, background: Mask) -> Array:
    """Clip Hounsfield units to -1000 .. 1000 and stretch these to [0, 1]."""
    return ((np.clip(x, -1000, 1000) + 1000) / 2000).astype(np.float32)


RULES: dict[str, Callable[[Array, Mask], Array]] = {
    "percentile": _percentile,
    "max": _maximum,
    "minmax": _minmax,
    "percentile_5_95": partial(_stretch, 5, 95),
    "percentile_1_99": partial(_stretch, 1, 99),
    "adc": _adc,
    "zscore": _zscore,
    "standardised": _standardised,
    "ct": _ct,
}


def rescale(data: NDArray, rule: str, background: Mask = None) -> Array:
    """Apply a rule to a volume of any dtype.

    Args:
        data: Finite and not constant.
        rule: A name in ``RULES``.
        background: True in the background; None if the background is not a single value.

    Returns:
        float32, same shape.
    """
    x = np.asarray(data, dtype=np.float32)
    return np.asarray(RULES[rule](x, background), dtype=np.float32)
