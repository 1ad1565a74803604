import math

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    log_loss,
    r2_score,
    roc_auc_score,
)

from common.downstream.scores import (
    Cases,
    intervals,
    measurement_scores,
    once,
    weighted_average_precision,
    weighted_calibration_error,
)

GENERATOR = np.random.default_rng(0)


def repeated(counts, *arrays):
    """Write out a counting: every case as often as it counts."""
    return [np.repeat(array, counts, axis=0) for array in arrays]


def shares(cases, classes):
    raw = GENERATOR.random((cases, classes)) ** 2
    return raw / raw.sum(1, keepdims=True)


def slow_calibration_error(confidence, right, bins):
    """Sort, cut into parts of equal size, compare means: for case numbers that the bins divide."""
    order = np.argsort(confidence, kind="stable")
    parts = np.split(order, bins)
    return sum(len(p) * abs(right[p].mean() - confidence[p].mean()) for p in parts) / len(order)


def test_average_precision_equals_sklearns_under_any_counting_and_with_ties():
    scores, target = GENERATOR.integers(0, 6, 40) / 6, GENERATOR.integers(0, 2, 40)
    counts = GENERATOR.integers(0, 4, (5, 40))
    fast = weighted_average_precision(scores, target, counts)
    slow = [average_precision_score(*repeated(row, target, scores)) for row in counts]
    assert fast == pytest.approx(slow, abs=1e-12)
    assert np.isnan(weighted_average_precision(scores, np.zeros(40), counts)).all()


def test_calibration_error_by_hand_and_against_a_slow_one():
    confidence, right = np.array([0.1, 0.2, 0.6, 0.9]), np.array([0.0, 1, 1, 1])
    # Two bins: means 0.15 and 0.75 against 0.5 and 1.
    assert weighted_calibration_error(confidence, right, np.ones((1, 4)), 2) == pytest.approx((0.35 + 0.25) / 2)
    confidence, right = GENERATOR.random(150), GENERATOR.integers(0, 2, 150).astype(float)
    value = weighted_calibration_error(confidence, right, np.ones((1, 150)))
    assert value == pytest.approx(slow_calibration_error(confidence, right, 15), abs=1e-12)
    doubled = weighted_calibration_error(confidence, right, np.full((1, 150), 2))
    assert doubled == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("kind", ["classes", "ordinal"])
def test_scores_of_exclusive_classes_equal_sklearns(kind):
    probability, label = shares(60, 4), GENERATOR.integers(0, 3, 60)  # the fourth never occurs
    cases = Cases(kind, list("abcd"), probability, np.eye(4)[label], np.ones((60, 4)))
    counts = GENERATOR.integers(0, 3, (4, 60))
    for index, row in enumerate(counts):
        named = {name: value[index] for name, value in cases.score(counts).items()}
        p, y = repeated(row, probability, label)
        pred = p.argmax(1) if kind == "classes" else (p.cumsum(1) < 0.5).sum(1)
        assert named["loss"] == pytest.approx(log_loss(y, p, labels=range(4)), abs=1e-9)
        assert named["accuracy"] == pytest.approx((pred == y).mean())
        recalls = [(pred[y == k] == k).mean() for k in range(3)]
        assert named["balanced_accuracy"] == pytest.approx(np.mean(recalls))
        areas = [roc_auc_score(y == k, p[:, k]) for k in range(3)]
        assert named["auroc"] == pytest.approx(np.mean(areas))
        assert [named[f"auroc_{c}"] for c in "abc"] == pytest.approx(areas)
        precisions = [average_precision_score(y == k, p[:, k]) for k in range(3)]
        assert named["auprc"] == pytest.approx(np.mean(precisions))
        assert named["balanced_accuracy_b"] == pytest.approx(balanced_accuracy_score(y == 1, pred == 1))
        assert "auroc_d" not in named
        if kind == "ordinal":
            assert named["kappa"] == pytest.approx(cohen_kappa_score(y, pred, weights="quadratic", labels=range(4)))


def test_unknown_findings_count_nowhere():
    probability, target = GENERATOR.random((50, 3)), GENERATOR.integers(0, 2, (50, 3)).astype(float)
    known = GENERATOR.random((50, 3)) < 0.7
    target[:, 2] = 1  # never absent: left out of the means
    cases = Cases("labels", ["a", "b", "c"], probability, target, known)
    scores = once(cases.score, 50)
    flipped = Cases("labels", ["a", "b", "c"], probability, np.where(known, target, 1 - target), known)
    assert once(flipped.score, 50) == scores
    areas = [roc_auc_score(target[known[:, k], k], probability[known[:, k], k]) for k in (0, 1)]
    assert scores["auroc"] == pytest.approx(np.mean(areas))
    losses = -np.log(np.where(target == 1, probability, 1 - probability))
    assert scores["loss"] == pytest.approx(losses[known].mean())
    assert cases.occurring() == [0, 1]


def test_nothing_that_occurs_has_no_mean():
    cases = Cases("classes", ["a", "b"], shares(5, 2), np.eye(2)[[0] * 5], np.ones((5, 2)))
    scores = once(cases.score, 5)
    assert math.isnan(scores["auroc"])
    assert math.isfinite(scores["balanced_accuracy"])


def test_the_confusion_matrix_by_hand():
    probability = np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    cases = Cases("classes", ["a", "b"], probability, np.eye(2)[[0, 0, 1]], np.ones((3, 2)))
    assert cases.confusion().tolist() == [[1, 1], [1, 0]]


def test_measurements_equal_sklearns_in_their_units():
    pred, target = GENERATOR.normal(50, 9, (40, 2)), GENERATOR.normal(50, 9, (40, 2))
    target[3, 1] = np.nan
    scores = once(lambda counts: measurement_scores(["age", "bmi"], pred, target, counts), 40)
    known = np.isfinite(target[:, 1])
    assert scores["mae_age"] == pytest.approx(np.abs(pred - target)[:, 0].mean())
    assert scores["rmse_bmi"] == pytest.approx(np.sqrt(((pred - target)[known, 1] ** 2).mean()))
    assert scores["r2_bmi"] == pytest.approx(r2_score(target[known, 1], pred[known, 1]))
    assert scores["r2"] == pytest.approx((scores["r2_age"] + scores["r2_bmi"]) / 2)


def test_intervals_resample_patients_not_cases():
    """Four cases of each patient that agree: as wide as with one case each, and wider than of so many people."""
    target, noise = np.repeat(GENERATOR.integers(0, 2, 40), 4), np.repeat(GENERATOR.random(40), 4)
    first = np.clip(0.3 * target + 0.7 * noise, 0.01, 0.99)
    cases = Cases("classes", ["a", "b"], np.stack([1 - first, first], 1), np.eye(2)[target], np.ones((160, 2)))
    wanted = {"auroc": 0.5}
    people = intervals(cases.score, np.repeat(np.arange(40), 4).tolist(), wanted)
    alone = Cases("classes", ["a", "b"], cases.probabilities[::4], cases.target[::4], np.ones((40, 2)))
    assert people == pytest.approx(intervals(alone.score, list(range(40)), wanted))
    apart = intervals(cases.score, list(range(160)), wanted)
    assert people["auroc_ci_high"] - people["auroc_ci_low"] > 1.5 * (apart["auroc_ci_high"] - apart["auroc_ci_low"])
