import nibabel as nib
import numpy as np
import pytest

from datamodules.volumes.cache import record_of
from datamodules.volumes.predictions import to_source_grid
from datamodules.volumes.prepare import prepare_case


def test_a_label_returns_to_its_file_voxel_by_voxel(brats_root, volumes_of):
    layout, cases = volumes_of(brats_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    label, affine = to_source_grid(prepared.label, record_of(prepared, cases[0]))
    original = nib.load(cases[0].labels["seg"])
    assert np.array_equal(label, np.asanyarray(original.dataobj))
    assert np.allclose(affine, original.affine)


def test_a_resampled_label_returns_to_the_t2_grid(pi_cai_root, volumes_of):
    layout, cases = volumes_of(pi_cai_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    label, affine = to_source_grid(prepared.label, record_of(prepared, cases[0]))
    original = nib.load(cases[0].labels["zones"])
    truth = np.asanyarray(original.dataobj)
    assert label.shape == truth.shape
    assert np.allclose(affine, original.affine, atol=1e-4)
    for zone in (1, 2):
        overlap = 2 * ((label == zone) & (truth == zone)).sum() / ((label == zone).sum() + (truth == zone).sum())
        assert overlap == pytest.approx(1, abs=0.02)
