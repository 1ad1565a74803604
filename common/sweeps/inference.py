"""What a comparison of arms may say: intervals over seeds and cases, Holm's correction, and what can be found at all.

One rule for every study. A difference is that of means over seeds; its uncertainty is that of other cases (bootstrap)
and of other seeds together. "Better" needs a P below 0.05 after Holm's correction and the same sign in every seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import norm, t

_LEVEL, _POWER = 0.05, 0.8


class Difference(NamedTuple):
    """A difference between two arms.

    Attributes:
        mean: Mean over seeds of the paired differences.
        standard_error: Of other cases and other seeds together.
        degrees: Degrees of freedom (Satterthwaite); infinite where seeds do not differ or there is one.
        low, high: 95 % interval.
        p: Two-sided P.
        one_sign: Whether every seed's difference has the sign of the mean.
        seeds: How many seeds it rests on; one says nothing about training again.
    """

    mean: float
    standard_error: float
    degrees: float
    low: float
    high: float
    p: float
    one_sign: bool
    seeds: int


def difference_of(by_seed: Sequence[float], standard_error_of_cases: float) -> Difference:
    """Return what the differences of paired seeds amount to.

    Args:
        by_seed: One difference per seed, on the same cases.
        standard_error_of_cases: Standard error of their mean under resampling of patients, seeds held fixed.

    Raises:
        ValueError: there is no seed.
    """
    if not by_seed:
        raise ValueError("A difference needs at least one seed.")
    count, mean = len(by_seed), statistics.fmean(by_seed)
    of_seeds = statistics.variance(by_seed) / count if count > 1 else 0.0
    variance = standard_error_of_cases**2 + of_seeds
    error = math.sqrt(variance)
    degrees = variance**2 / (of_seeds**2 / (count - 1)) if of_seeds else math.inf
    distribution = t(degrees) if math.isfinite(degrees) else norm
    half = float(distribution.ppf(1 - _LEVEL / 2)) * error
    p = float(2 * distribution.sf(abs(mean) / error)) if error else float(mean == 0)
    return Difference(
        mean, error, degrees, mean - half, mean + half, p, all(each * mean > 0 for each in by_seed), count
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return P values after Holm's correction for their number, in the same order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def verdict(found: Difference, corrected_p: float) -> str:
    """Return ``better``, ``worse`` or ``not told apart``."""
    if corrected_p >= _LEVEL or not found.one_sign:
        return "not told apart"
    return "better" if found.mean > 0 else "worse"


def smallest_difference(standard_error: float, comparisons: int = 1) -> float:
    """Return the smallest difference that is found with 80 % power.

    Args:
        standard_error: Of the difference.
        comparisons: How many arms are compared with the reference.
    """
    return float(norm.ppf(1 - _LEVEL / 2 / comparisons) + norm.ppf(_POWER)) * standard_error


@dataclass(frozen=True)
class ExpectedAUROC:
    """The AUROC that is expected before anything has run (Hanley and McNeil 1982).

    Args:
        positives: Positive test patients.
        negatives: Negative test patients.
        auroc: Its expected value.
        correlation: Between the AUROCs of two arms on the same patients.
    """

    positives: int
    negatives: int
    auroc: float = 0.75
    correlation: float = 0.5

    @property
    def standard_error(self) -> float:
        """Standard error of one AUROC."""
        a = self.auroc
        above, below = a / (2 - a), 2 * a**2 / (1 + a)
        spread = (self.positives - 1) * (above - a**2) + (self.negatives - 1) * (below - a**2)
        return math.sqrt((a * (1 - a) + spread) / (self.positives * self.negatives))

    def smallest_difference(self, comparisons: int = 1) -> float:
        """Return the smallest difference between two arms that is found with 80 % power."""
        return smallest_difference(self.standard_error * math.sqrt(2 * (1 - self.correlation)), comparisons)
