"""Scores of classifiers and of regressions, each under many countings of the same cases at once.

A counting says how often each case counts: once in a score itself, as often as its patient was drawn in an interval. So
one formula gives both. A class whose known targets are all equal has no AUROC, and none of the means counts it.

Letters: W countings, S cases, K classes or columns.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.metrics import central_interval, resampled_counts, weighted_auroc, weighted_mean, weighted_quadratic_kappa

#: What a target is: one of several classes, ordered grades, several findings that may be there together, or numbers.
Kind = Literal["classes", "ordinal", "labels", "regression"]
Array = NDArray[Any]
Scores = dict[str, Array]

_BINS = 15
#: Countings times cases that are worked on at once.
_AT_ONCE = 2_000_000
#: Scores over all classes.
OVERALL = ("loss", "auroc", "auprc", "accuracy", "balanced_accuracy", "ece", "kappa")
_BY_CLASS = ("auroc", "auprc", "accuracy", "balanced_accuracy")


def weighted_average_precision(scores: Array, target: Array, counts: Array) -> Array:
    """Return the average precision ``(W,)``; NaN where nothing positive counts. Equal scores are one threshold.

    Args:
        scores: ``(S,)``.
        target: ``(S,)``, 1 = positive.
        counts: ``(W, S)``.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found = np.cumsum(counts[:, order] * target[order], axis=1)[:, ends]
    taken = np.cumsum(counts[:, order], axis=1)[:, ends]
    gained = np.diff(found, axis=1, prepend=0.0)
    total = found[:, -1]
    return (gained * found / np.maximum(taken, 1e-12)).sum(1) / np.where(total > 0, total, np.nan)


def weighted_calibration_error(confidence: Array, right: Array, counts: Array, bins: int = _BINS) -> Array:
    """Return the expected calibration error ``(W,)`` over bins of equal mass (Nixon et al. 2019).

    Args:
        confidence: ``(S,)``, the probability that was given.
        right: ``(S,)``, whether it came true, 0 or 1.
        counts: ``(W, S)``.
        bins: How many; a case belongs to the bin that the middle of its mass is in.
    """
    order = np.argsort(confidence, kind="stable")
    mass = counts[:, order].astype(float)
    total = mass.sum(1)
    place = (np.cumsum(mass, axis=1) - mass / 2) * bins / total[:, None]
    number = np.minimum(place.astype(np.int64), bins - 1) + bins * np.arange(len(mass))[:, None]
    gaps = mass * (right - confidence)[order]
    sums = np.bincount(number.ravel(), gaps.ravel(), bins * len(mass)).reshape(-1, bins)
    return np.abs(sums).sum(1) / total


def _share(right: Array, counts: Array) -> Array:
    """Return the counted share of cases that are right, NaN where none counts."""
    total = counts.sum(1)
    return counts @ right.astype(float) / np.where(total > 0, total, np.nan)


def _mean_over(values: Sequence[Array]) -> Array:
    """Return the mean over classes of ``(W,)`` scores, without those that are NaN."""
    table = np.stack(values)
    number = np.isfinite(table).sum(0)
    return np.nansum(table, axis=0) / np.where(number > 0, number, np.nan)


def binary_scores(probability: Array, decided: Array, target: Array, counts: Array) -> Scores:
    """Return AUROC, average precision, accuracy and balanced accuracy of one class against the rest.

    Args:
        probability: ``(S,)``.
        decided: bool ``(S,)``, whether the class was predicted.
        target: ``(S,)``, 0 or 1.
        counts: ``(W, S)``.
    """
    right = decided == (target == 1)
    sides = [_share(right[target == value], counts[:, target == value]) for value in (0, 1)]
    return {
        "auroc": weighted_auroc(probability, target, counts),
        "auprc": weighted_average_precision(probability, target, counts),
        "accuracy": _share(right, counts),
        "balanced_accuracy": (sides[0] + sides[1]) / 2,
    }


class Cases:
    """What a classifier said of cases, and what is true.

    Args:
        kind: What the target is.
        names: Of the classes.
        probabilities: ``(S, K)``; of exclusive classes they sum to 1.
        target: ``(S, K)``, 0 or 1: for ordinal ones too the one grade.
        known: bool ``(S, K)``.
    """

    def __init__(self, kind: Kind, names: Sequence[str], probabilities: Array, target: Array, known: Array) -> None:
        self.kind, self.names, self.probabilities = kind, list(names), np.asarray(probabilities, dtype=float)
        self.target, self.known = np.asarray(target, dtype=float), np.asarray(known, dtype=bool)
        # One multiplication may say 0 or 1 where a probability is meant: a sure mistake must not cost infinitely much.
        self._safe = self.probabilities.clip(1e-12, 1 - 1e-12)

    def occurring(self) -> list[int]:
        """Return the classes that both occur and do not among their known targets."""
        return [
            k for k in range(len(self.names)) if len(np.unique(self.target[self.known[:, k], k])) == 2
        ]  # fmt: skip

    def score(self, counts: Array) -> Scores:
        """Return every score ``(W,)``; means over classes have no suffix, those of a class its name."""
        return self._labels(counts) if self.kind == "labels" else self._exclusive(counts)

    def _by_class(self, decided: Array, counts: Array) -> Scores:
        found: Scores = {}
        for k in self.occurring():
            at = self.known[:, k]
            parts = (self.probabilities[at, k], decided[at, k], self.target[at, k], counts[:, at])
            found |= {f"{name}_{self.names[k]}": value for name, value in binary_scores(*parts).items()}
        return found

    def _means(self, by_class: Scores, wanted: Sequence[str], draws: int) -> Scores:
        names = [self.names[k] for k in self.occurring()]
        nothing = np.full(draws, np.nan)
        return {w: _mean_over([by_class[f"{w}_{name}"] for name in names]) if names else nothing for w in wanted}

    def _labels(self, counts: Array) -> Scores:
        by_class = self._by_class(self.probabilities > 0.5, counts)
        losses = -np.where(self.target == 1, np.log(self._safe), np.log1p(-self._safe)) * self.known
        total = (counts @ self.known.astype(float)).sum(1)
        errors = [
            weighted_calibration_error(self.probabilities[at, k], self.target[at, k], counts[:, at])
            for k in range(len(self.names)) if (at := self.known[:, k]).any()
        ]  # fmt: skip
        return {
            "loss": (counts @ losses).sum(1) / np.where(total > 0, total, np.nan),
            **self._means(by_class, _BY_CLASS, len(counts)),
            "ece": _mean_over(errors) if errors else np.full(len(counts), np.nan),
            **by_class,
        }

    def _exclusive(self, counts: Array) -> Scores:
        truth, pred = self.target.argmax(1), self.decided()
        right = truth == pred
        by_class = self._by_class(np.eye(len(self.names), dtype=bool)[pred], counts)
        recalls = [_share(right[truth == k], counts[:, truth == k]) for k in np.unique(truth)]
        confidence = self.probabilities[np.arange(len(pred)), pred]
        scores = {
            "loss": weighted_mean(-np.log(self._safe[np.arange(len(truth)), truth]), counts),
            **self._means(by_class, ("auroc", "auprc"), len(counts)),
            "accuracy": _share(right, counts),
            "balanced_accuracy": _mean_over(recalls),
            "ece": weighted_calibration_error(confidence, right.astype(float), counts),
        }
        if self.kind == "ordinal":
            scores["kappa"] = weighted_quadratic_kappa(pred, truth, counts)
        return scores | by_class

    def decided(self) -> NDArray[np.int64]:
        """Return the class that each case is given: of grades the median, else the most probable."""
        if self.kind == "ordinal":
            # A grade counts as reached from a probability of one half on; sums of float32 hit it from either side.
            return (self.probabilities.cumsum(1)[:, :-1] < 0.5 - 1e-6).sum(1)
        return self.probabilities.argmax(1)

    def confusion(self) -> NDArray[np.int64]:
        """Return how often each true class (row) was given each class (column), ``(K, K)``."""
        table = np.zeros((len(self.names), len(self.names)), dtype=np.int64)
        np.add.at(table, (self.target.argmax(1), self.decided()), 1)
        return table


def measurement_scores(names: Sequence[str], pred: Array, target: Array, counts: Array) -> Scores:
    """Return MAE, RMSE (in the columns' units) and R2 of each column, and the mean R2 over columns.

    Args:
        names: Of the columns.
        pred: ``(S, K)``.
        target: ``(S, K)``, NaN = unknown.
        counts: ``(W, S)``.
    """
    found: Scores = {}
    for k, name in enumerate(names):
        at = np.isfinite(target[:, k])
        if not at.any():
            continue
        truth, errors, own = target[at, k], (pred - target)[at, k], counts[:, at]
        total = np.where(own.sum(1) > 0, own.sum(1), np.nan)
        mean = own @ truth / total
        spread = own @ truth**2 / total - mean**2
        squared = own @ errors**2 / total
        found[f"mae_{name}"] = own @ np.abs(errors) / total
        found[f"rmse_{name}"] = np.sqrt(squared)
        found[f"r2_{name}"] = 1 - squared / np.where(spread > 1e-12 * (1 + mean**2), spread, np.nan)
    known = [value for name, value in found.items() if name.startswith("r2_")]
    return {"r2": _mean_over(known) if known else np.full(len(counts), np.nan), **found}


def once(score: Callable[[Array], Scores], cases: int) -> dict[str, float]:
    """Return scores in which every case counts once."""
    return {name: float(value[0]) for name, value in score(np.ones((1, cases))).items()}


def intervals(
    score: Callable[[Array], Scores], patients: Sequence[Hashable], wanted: Mapping[str, float], draws: int = 2000
) -> dict[str, float]:
    """Return the central 95 % of scores under resampling of patients, ``<name>_ci_low`` and ``<name>_ci_high``.

    Args:
        score: Scores of countings.
        patients: Whom each case is of.
        wanted: The scores to do it for; those that are NaN have none.
        draws: Resamplings, the same ones every time.
    """
    counts = resampled_counts(patients, draws, "scores")
    size = max(_AT_ONCE // max(len(patients), 1), 1)
    parts = [score(counts[start : start + size]) for start in range(0, draws, size)]
    found: dict[str, float] = {}
    for name, value in wanted.items():
        if math.isfinite(value):
            low, high = central_interval(np.concatenate([part[name] for part in parts]))
            found |= {f"{name}_ci_low": low, f"{name}_ci_high": high}
    return found
