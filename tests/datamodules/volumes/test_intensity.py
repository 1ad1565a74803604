import numpy as np
import pytest

from datamodules.volumes.intensity import RULES, rescale


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float32])
def test_integers_are_cast_before_they_are_divided(rule, dtype):
    """Upstream divides integer arrays in place: almost every voxel becomes 0."""
    data = np.random.default_rng(0).integers(0, 200, (8, 8, 8)).astype(dtype)
    scaled = rescale(data, rule)
    assert scaled.dtype == np.float32
    assert np.isfinite(scaled).all()
    assert len(np.unique(scaled)) > 100


def test_percentile_ignores_the_background_and_clips_the_top():
    data = np.zeros((10, 10, 10), np.int32)
    data[5:] = np.arange(1, 501).reshape(5, 10, 10)
    data[9, 9, 9] = 100000
    scaled = rescale(data, "percentile")
    assert (scaled[:5] == 0).all()
    assert scaled.max() == 1
    assert scaled[7, 5, 5] == pytest.approx(256 / np.percentile(data[data > 0], 99.5), rel=1e-5)


def test_adc_keeps_its_units():
    assert rescale(np.array([0, 1500, 3000, 9000]), "adc").tolist() == [0, 0.5, 1, 1]


def test_zscore_leaves_the_background():
    data = np.zeros((4, 4, 4))
    data[2:] = np.random.default_rng(0).normal(50, 10, (2, 4, 4))
    scaled = rescale(data, "zscore")
    assert (scaled[:2] == 0).all()
    assert scaled[2:].mean() == pytest.approx(0, abs=1e-4)
    assert scaled[2:].std() == pytest.approx(1, abs=1e-4)


def test_negative_values_are_clipped_only_where_the_range_is_fixed():
    data = np.array([-50.0, 0, 100, 200])
    assert rescale(data, "percentile").min() == 0
    assert rescale(data, "zscore").min() < 0


def test_percentiles_of_the_whole_volume():
    """BrainMVP's case R7: 0 to 20 between the 5th and 95th percentile, 1 and 19."""
    scaled = rescale(np.arange(21).reshape(3, 7, 1), "percentile_5_95").ravel()
    assert scaled[[0, 1, 5, 10, 19, 20]] == pytest.approx([0, 0, 4 / 18, 0.5, 1, 1], abs=1e-6)
