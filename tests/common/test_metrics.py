import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.metrics import (
    bootstrap_auroc,
    bootstrap_ratio,
    effective_rank,
    region_dice,
    region_hd95,
    singular_values,
    spectrum_rank,
    weighted_auroc,
)

SPACING = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "expected"), [([1, 1, 1, 1], 4), ([3, 1, 0, 0], 1.754765), ([4, 2, 1, 1], 3.363586), ([5, 0], 1)]
)
def test_rank_of_singular_values(values, expected):
    """R7; squared values would give 2.276322 for the third."""
    assert spectrum_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected, abs=1e-6)


def test_features_with_known_singular_values():
    left = torch.linalg.qr(torch.randn(50, 5, dtype=torch.float64))[0]
    left = torch.linalg.qr(left - left.mean(0))[0][:, :4]
    left = torch.linalg.qr(left - left.mean(0))[0]
    right = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64))[0]
    features = left @ torch.diag(torch.tensor([4.0, 2, 1, 1], dtype=torch.float64)) @ right.T
    assert effective_rank(features + 3) == pytest.approx(3.363586, abs=1e-4)
    assert effective_rank(features.T @ features) <= 4.001


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_singular_values_equal_those_of_svd(shape):
    x = torch.randn(shape)
    expected = torch.linalg.svdvals((x - x.mean(0)).double())
    assert torch.allclose(singular_values(x), expected, atol=1e-6)


def test_constant_features_have_no_rank():
    assert effective_rank(torch.ones(10, 4)) == 0
    assert isinstance(effective_rank(torch.randn(10, 4)), float)


def _regions(label):
    label = torch.tensor(label)
    return torch.stack([torch.isin(label, torch.tensor(v)) for v in ((1, 2, 3), (1, 3), (3,))])[None, :, :, None, None]


def test_dice_of_brats_regions():
    """R8: whole tumour 5 of 6 and 6, core 0.75, enhancing 0.5."""
    dice = region_dice(_regions([0, 1, 2, 3, 1, 2, 0, 3]), _regions([0, 1, 2, 3, 3, 2, 1, 0]))
    assert dice[0].tolist() == pytest.approx([0.833333, 0.75, 0.5], abs=1e-6)


def test_dice_of_empty_regions():
    empty, full = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    assert region_dice(empty, empty).item() == 1
    assert region_dice(full, empty).item() == 0
    assert region_dice(empty, full).item() == 0


def test_hd95_of_empty_regions():
    """MONAI alone gives NaN for all three, and a mean of 0."""
    diagonal = math.hypot(240, 240, 155)
    assert diagonal == pytest.approx(373.13, abs=0.01)
    empty, full = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    assert region_hd95(empty, empty, diagonal, SPACING).item() == 0
    assert region_hd95(full, empty, diagonal, SPACING).item() == pytest.approx(diagonal)
    assert region_hd95(empty, full, diagonal, SPACING).item() == pytest.approx(diagonal)


def test_hd95_of_shifted_boxes():
    a, b = torch.zeros(2, 1, 20, 20, 20, dtype=torch.bool), torch.zeros(2, 1, 20, 20, 20, dtype=torch.bool)
    a[0, 0, 4:10, 4:10, 4:10] = True
    b[0, 0, 7:13, 4:10, 4:10] = True
    a[1, 0, 5, 5, 5] = b[1, 0, 5, 5, 9] = True
    assert region_hd95(a, b, 99, SPACING)[:, 0].tolist() == pytest.approx([3, 4])


def test_hd95_is_in_mm():
    """Surfaces 3 voxels of 0.5 mm and 2 voxels of 3 mm apart; an empty region costs the diagonal, in mm as well."""
    a, b = torch.zeros(2, 1, 20, 20, 20, dtype=torch.bool), torch.zeros(2, 1, 20, 20, 20, dtype=torch.bool)
    a[0, 0, 5, 5, 5] = b[0, 0, 8, 5, 5] = True
    a[1, 0, 5, 5, 5] = b[1, 0, 5, 5, 7] = True
    spacing = (0.5, 0.5, 3.0)
    assert region_hd95(a, b, 99, spacing)[:, 0].tolist() == pytest.approx([1.5, 6])
    assert region_hd95(a, torch.zeros_like(b), 61.6, spacing)[:, 0].tolist() == pytest.approx([61.6, 61.6])


def test_an_interval_of_noise_holds_one_half():
    generator = np.random.default_rng(0)
    persons = pd.Series(np.repeat(np.arange(60), 2))
    target, score = pd.Series(generator.integers(0, 2, 120)), pd.Series(generator.random(120))
    low, high = bootstrap_auroc(score, target, persons)
    assert low < 0.5 < high
    slow = []
    for _ in range(300):
        drawn = generator.integers(0, 60, 60)
        chosen = np.concatenate([np.flatnonzero(persons == person) for person in drawn])
        slow.append(roc_auc_score(target[chosen], score[chosen]))
    assert np.percentile(slow, [2.5, 97.5]) == pytest.approx([low, high], abs=0.04)
    assert (low, high) == bootstrap_auroc(score, target, persons)


def test_the_auroc_of_drawn_cases_is_that_of_a_table_with_them_repeated():
    scores, target = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 1, 0, 1])
    counts = np.array([[1, 1, 1, 1], [2, 0, 1, 3], [1, 0, 1, 0]])
    found = weighted_auroc(scores, target, counts)
    for row, value in zip(counts[:2], found, strict=False):
        cases = np.repeat(np.arange(4), row)
        assert value == pytest.approx(roc_auc_score(target[cases], scores[cases]))
    assert np.isnan(found[2])


def test_the_interval_holds_the_mean_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 400).astype(float)
    totals = counts * rng.normal(0.3, 1.0, 400)
    low, high = bootstrap_ratio(totals, counts)
    mean = totals.sum() / counts.sum()
    assert low < mean < high
    assert (low, high) == bootstrap_ratio(totals, counts)
    # The linearised standard error of a ratio of sums.
    error = np.sqrt(((totals - mean * counts) ** 2).sum()) / counts.sum()
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_the_interval_weighs_persons_by_their_words():
    counts = np.array([1.0, 5, 20, 3])
    assert bootstrap_ratio(0.7 * counts, counts) == pytest.approx((0.7, 0.7))
    assert bootstrap_ratio(np.array([3.0]), np.array([2.0])) == (1.5, 1.5)
