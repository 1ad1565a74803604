import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.randomness import KeyedGenerator
from common.views import View, ViewConfig, _blurred, change_intensities, resample, two_views

VOLUMES = ViewConfig(drop=0.2, separate=True, background=True, mirror=(0,))
KEYS = torch.arange(5) * 104729
STILL = ViewConfig(area=(1, 1), edge=(1, 1), degrees=0, intensity=0, gamma=0, blur=0, noise=0)


def picture(dims, batch=5, channels=3):
    return torch.rand(batch, channels, *(16,) * dims, generator=torch.Generator().manual_seed(1)) + 0.1


CASES = [(2, ViewConfig()), (2, ViewConfig(saturation=0.2, mirror=(1,), degrees=20)), (3, VOLUMES)]


@pytest.mark.parametrize(("dims", "config"), CASES, ids=["grey", "colour", "volume"])
def test_views_are_functions_of_the_key_alone(dims, config):
    """Views differ by u, v and key; never by batch, order or place in it, as on other ranks."""
    image = picture(dims)
    first, second = two_views(image, KEYS, config)
    assert first.image.shape == image.shape
    assert torch.isfinite(first.image).all()
    assert not torch.allclose(first.image, second.image, atol=1e-2)
    again, _ = two_views(image, KEYS + 1, config)
    assert not torch.allclose(first.image, again.image, atol=1e-2)
    order = torch.tensor([3, 1])
    for whole, part in zip((first, second), two_views(image[order], KEYS[order], config), strict=True):
        assert torch.allclose(whole.image[order], part.image, atol=1e-5)
        assert torch.equal(whole.modality_mask[order], part.modality_mask)


def test_nothing_changes_where_nothing_is_asked_for():
    image = picture(3)
    for view in two_views(image, KEYS, STILL):
        assert torch.allclose(view.image, image, atol=1e-5)
    image = picture(2)
    assert torch.allclose(change_intensities(image, KeyedGenerator(KEYS, "x"), STILL), image, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_boxes_mirrors_and_turns_against_index_arithmetic(dims):
    image = picture(dims, batch=1)
    shape = (1, dims)
    eye, ones = torch.eye(dims)[None], torch.ones(shape)
    half = resample(image, torch.zeros(shape), 0.5 * ones, eye, ones, zeros=True)
    corner = image[:, :, *(slice(0, 10),) * dims]
    larger = torch.nn.functional.interpolate(corner, scale_factor=2, mode="bilinear" if dims == 2 else "trilinear")
    inner = (slice(None), slice(None), *(slice(1, 16),) * dims)
    assert torch.allclose(half[inner], larger[inner], atol=1e-5)
    flip = ones.clone()
    flip[0, 0] = -1
    assert torch.allclose(resample(image, torch.zeros(shape), ones, eye, flip, True), image.flip(2), atol=1e-5)
    turn = eye.clone()
    turn[0, :2, :2] = torch.tensor([[0.0, -1], [1, 0]])
    turned = resample(image, torch.zeros(shape), ones, turn, ones, True)
    assert any(torch.allclose(turned, torch.rot90(image, k, (2, 3)), atol=1e-5) for k in (1, 3))


def test_boxes_of_volumes_overlap():
    many = torch.arange(4000)
    (begin_u, long_u), (begin_v, long_v) = ViewConfig().boxes(
        KeyedGenerator(many, "view u"), KeyedGenerator(many, "view v"), 3
    )
    for begin, length in ((begin_u, long_u), (begin_v, long_v)):
        assert float(begin.min()) >= 0
        assert float((begin + length).max()) <= 1 + 1e-6
        assert float(length.min()) >= 0.5
    shared = torch.minimum(begin_u + long_u, begin_v + long_v) - torch.maximum(begin_u, begin_v)
    share = shared.clamp(min=0).prod(1) / torch.minimum(long_u.prod(1), long_v.prod(1))
    assert float(share.min()) >= 0.25 - 1e-5
    area = ViewConfig().edges(KeyedGenerator(many, "view u"), 2)
    assert float(area.prod(1).min()) > 0.28
    assert float((area[:, 0] / area[:, 1]).max()) < 4 / 3 + 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_blur_against_scipy(dims):
    image = torch.randn(2, 1, *(40,) * dims)
    sigma = torch.tensor([0.3, 0.0])
    slow = gaussian_filter(image[0, 0].numpy(), 0.3, mode="nearest", radius=2)
    blurred = _blurred(image, sigma)
    assert np.allclose(blurred[0, 0], slow, atol=1e-4)
    assert torch.allclose(blurred[1], image[1], atol=1e-6)


def test_background_and_dropped_modalities_stay_empty():
    image = picture(3, batch=64, channels=4)
    image[:, :, :6] = 0
    acquired = torch.ones(64, 4, dtype=torch.bool)
    acquired[:, 3], image[:, 3] = False, 0
    keys = torch.arange(64)
    changed = change_intensities(image, KeyedGenerator(keys, "x"), VOLUMES)
    assert bool((changed[image == 0] == 0).all())
    views: list[View] = two_views(image, keys, VOLUMES, acquired)
    for view in views:
        assert bool(view.modality_mask.any(1).all())
        assert not bool(view.modality_mask[:, 3].any())
        assert not bool(view.image[~view.modality_mask].any())
        assert 0.1 < float((~view.modality_mask[:, :3]).float().mean()) < 0.3
        assert torch.isfinite(view.image).all()
    assert not torch.equal(views[0].modality_mask, views[1].modality_mask)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"views.blur"):
        ViewConfig(blur=1.5)
    with pytest.raises(ValueError, match="rising shares"):
        ViewConfig(area=(0.5, 0.2))
    with pytest.raises(ValueError, match="colour images"):
        ViewConfig(saturation=0.2).check(4)
