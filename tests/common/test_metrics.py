import math

import pytest
import torch

from common.metrics import effective_rank, region_dice, region_hd95, singular_values, spectrum_rank

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
