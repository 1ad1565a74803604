"""The cases of the specification, an independent slow reference, and what may be said."""

import numpy as np
import pytest
from scipy import stats

from common.sweeps.inference import ExpectedAUROC, difference_of, holm, smallest_difference, verdict


def test_seeds_and_cases_together():
    found = difference_of([0.05, 0.02, 0.08], 0.04)
    assert found.standard_error == pytest.approx(0.0435890, abs=1e-6)
    assert found.degrees == pytest.approx(80.222, abs=1e-3)
    assert (found.low, found.high) == pytest.approx((-0.036741, 0.136741), abs=1e-6)
    assert found.p == pytest.approx(0.254759, abs=1e-6)
    assert found.one_sign


def test_without_uncertainty_of_cases_it_is_the_paired_t_test():
    values = np.random.default_rng(0).normal(0.3, 1, 7)
    found = difference_of(values.tolist(), 0.0)
    reference = stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval()), rel=1e-9)


def test_one_seed_or_equal_seeds_rest_on_the_cases_alone():
    for values in ([0.05], [0.05, 0.05]):
        found = difference_of(values, 0.02)
        assert found.p == pytest.approx(2 * stats.norm.sf(2.5))
        assert found.high - found.mean == pytest.approx(1.959964 * 0.02)
    assert difference_of([0.0], 0.0).p == 1
    with pytest.raises(ValueError, match="at least one seed"):
        difference_of([], 0.1)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_better_needs_both():
    clear, mixed = difference_of([0.1, 0.11, 0.12], 0.01), difference_of([0.3, -0.01, 0.3], 0.001)
    assert verdict(clear, 0.049) == "better"
    assert verdict(clear, 0.05) == "not told apart"
    assert verdict(mixed, 0.001) == "not told apart"
    assert verdict(difference_of([-0.1, -0.11], 0.01), 0.01) == "worse"


def test_what_can_be_found_at_all():
    idrid = ExpectedAUROC(64, 39)
    assert idrid.standard_error == pytest.approx(0.0473816, abs=1e-7)
    assert idrid.smallest_difference() == pytest.approx(0.132744, abs=1e-6)
    assert idrid.smallest_difference(5) == pytest.approx(0.161924, abs=1e-6)
    assert ExpectedAUROC(500, 500).smallest_difference() == pytest.approx(0.0430381, abs=1e-6)
    assert smallest_difference(1.0) == pytest.approx(2.801585, abs=1e-6)


def test_no_false_better_in_most_of_many_null_comparisons():
    generator = np.random.default_rng(3)
    said = [
        verdict(found, found.p)
        for found in (difference_of(generator.normal(0, 0.05, 3).tolist(), 0.03) for _ in range(400))
    ]
    assert sum(each != "not told apart" for each in said) <= 0.05 * len(said)
