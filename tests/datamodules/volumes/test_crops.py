import numpy as np
import pytest
import torch

from datamodules.volumes.crops import center_start, cut, flip, random_start, start_around, to_tensor


def test_cut_equals_padding_and_slicing():
    array = np.random.default_rng(0).random((2, 7, 9, 5))
    padded = np.pad(array, [(0, 0), (6, 6), (6, 6), (6, 6)])
    for start in [(0, 0, 0), (-3, 2, 1), (5, 7, 3), (-6, -6, -6), (3, 4, -2)]:
        expected = padded[:, *(slice(s + 6, s + 6 + n) for s, n in zip(start, (4, 5, 6), strict=True))]
        assert np.array_equal(cut(array, start, (4, 5, 6)), expected), start


def test_a_crop_beside_the_volume_is_empty():
    assert (cut(np.ones((3, 3, 3)), (5, -9, 0), (2, 2, 2)) == 0).all()


def test_random_starts_cover_the_allowed_range():
    rng = np.random.default_rng(0)
    starts = np.array([random_start((10, 4, 7), (6, 6, 7), rng) for _ in range(500)])
    assert set(starts[:, 0]) == {0, 1, 2, 3, 4}
    assert set(starts[:, 1]) == {-1}
    assert set(starts[:, 2]) == {0}


def test_with_an_overhang_every_voxel_is_seen_equally_often():
    rng = np.random.default_rng(0)
    seen = np.zeros(20)
    for _ in range(4000):
        (start,) = random_start((20,), (8,), rng, overhang=0.5)
        seen[max(start, 0) : max(min(start + 8, 20), 0)] += 1
    middle = seen[8:12].mean()
    assert seen[0] > 0.4 * middle
    inside = np.zeros(20)
    for _ in range(4000):
        (start,) = random_start((20,), (8,), rng)
        inside[start : start + 8] += 1
    assert inside[0] < 0.15 * inside[8:12].mean()


def test_start_around_contains_the_voxel():
    rng = np.random.default_rng(0)
    for _ in range(200):
        voxel = rng.integers(0, (20, 5, 30))
        start = start_around(voxel.tolist(), (20, 5, 30), (8, 8, 8), rng)
        assert all(s <= v < s + 8 for s, v in zip(start, voxel, strict=True))


def test_center():
    assert center_start((10, 4, 7), (6, 6, 7)) == [2, -1, 0]


@pytest.mark.parametrize("axes", [(), (0,), (0, 2)])
def test_flip_mirrors_space_and_not_modalities(axes):
    array = np.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 4)
    flipped = flip(array, axes)
    expected = array[:, :: -1 if 0 in axes else 1, :: -1 if 1 in axes else 1, :: -1 if 2 in axes else 1]
    assert np.array_equal(flipped, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_a_tensor_has_the_values_and_none_of_the_memory(dtype):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    array.flags.writeable = False
    for piece in (array, array[:, ::-1], array[..., 1:3]):
        tensor = to_tensor(piece)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), piece.astype(np.float32))
        tensor += 1
    assert array[0, 0, 0] == 0
