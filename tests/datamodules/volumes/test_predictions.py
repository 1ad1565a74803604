from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from common.names import case_twins
from datamodules.volumes.cache import record_of
from datamodules.volumes.predictions import SegmentationWriter, to_source_grid
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


def test_no_subject_leads_out_of_the_folder_of_predictions(brats_root, tmp_path, volumes_of):
    layout, cases = volumes_of(brats_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    record = record_of(prepared, cases[0])
    names = ["BraTS-GLI-00000-000", "../../victim", "sub-01/ses-1", "n" * 300, "a\0b", "Case", "case"]
    strategy = SimpleNamespace(broadcast=lambda folder: folder)
    data = SimpleNamespace(twins=case_twins(names))
    run = SimpleNamespace(strategy=strategy, default_root_dir=tmp_path / "runs/run", datamodule=data)
    writer = SegmentationWriter()
    writer.on_predict_start(run, None)
    entries = [{"subject_id": name, "record": record, "label": torch.from_numpy(prepared.label)} for name in names]
    writer.write_on_batch_end(run, None, entries, None, None, 0, 0)
    written = list(tmp_path.rglob("*.nii.gz"))
    assert {path.parent for path in written} == {tmp_path / "runs/run/predictions"}
    assert len({path.name.lower() for path in written}) == len(names)
    assert "BraTS-GLI-00000-000.nii.gz" in {path.name for path in written}
