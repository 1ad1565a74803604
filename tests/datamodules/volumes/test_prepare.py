import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from common.faults import SampleFaultError
from datamodules.registry import recognise
from datamodules.volumes.prepare import prepare_case
from datamodules.volumes.reading import read_volume, write_nifti


@pytest.fixture
def case_folder(brats_root, tmp_path):
    name = "BraTS-GLI-00000-000"
    shutil.copytree(brats_root / name, tmp_path / "root" / name)
    return tmp_path / "root" / name


def prepare(folder):
    layout, cases = recognise(folder.parent)
    return prepare_case(cases[0], layout, layout.modalities)


def rewrite(folder, modality, change, affine=None):
    path = folder / f"{folder.name}-{modality}.nii.gz"
    image = nib.load(path)
    write_nifti(path, change(np.asanyarray(image.dataobj)), image.affine if affine is None else affine(image.affine))
    return path


def test_a_sound_case(case_folder):
    prepared = prepare(case_folder)
    assert prepared.modality_mask == [True] * 4
    assert prepared.faults == []
    assert prepared.image.dtype == np.float32
    assert prepared.image.min() >= 0
    assert prepared.image.max() == 1
    assert set(np.unique(prepared.label)) <= {0, 1, 2, 3}
    assert prepared.source_shape == (40, 44, 36)


def test_the_border_is_cut_away_and_the_affine_follows(case_folder):
    prepared = prepare(case_folder)
    present = (prepared.image != 0).any(0)
    for axis in range(3):
        sides = present.any(tuple(a for a in range(3) if a != axis))
        assert sides[0]
        assert sides[-1]
    source = read_volume(case_folder / f"{case_folder.name}-t1c.nii.gz")
    box = tuple(slice(o, o + n) for o, n in zip(prepared.offset, prepared.image.shape[1:], strict=True))
    assert np.array_equal(source.data[box] > 0, prepared.image[0] > 0)
    corner = prepared.affine @ [0, 0, 0, 1]
    assert np.allclose(corner, source.affine @ [*prepared.offset, 1])


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x.astype(np.float32)), "nan"),
        (lambda x: np.zeros_like(x), "constant"),
        (lambda x: x[:-1], "grid"),
    ],
)
def test_a_broken_modality_is_one_row_and_the_rest_goes_on(case_folder, change, kind):
    path = rewrite(case_folder, "t2w", change)
    prepared = prepare(case_folder)
    assert [(fault.path, fault.kind) for fault in prepared.faults] == [(str(path), kind)]
    assert prepared.modality_mask == [True, True, True, False]
    assert (prepared.image[3] == 0).all()


def test_another_place_is_another_grid(case_folder):
    def shifted(affine):
        affine = affine.copy()
        affine[0, 3] += 5
        return affine

    rewrite(case_folder, "t1n", lambda x: x, shifted)
    assert [fault.kind for fault in prepare(case_folder).faults] == ["grid"]


def test_no_two_grids_alike_cannot_be_stacked(case_folder):
    for modality, cut in (("t1c", 1), ("t1n", 2), ("t2f", 3)):
        rewrite(case_folder, modality, lambda x, cut=cut: x[:-cut])
    with pytest.raises(SampleFaultError, match=r"lie on different grids .* co-register and resample"):
        prepare(case_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: np.where(x == 3, 4, x),
            r"holds the values \[0, 1, 2, 4\], but brats2023 allows \[0, 1, 2, 3\] only: is this",
        ),
        (lambda x: x.astype(np.float32) + 0.25, "not integers"),
        (lambda x: x[1:], "the label has 39x44x36"),
        (lambda x: np.roll(x, 20, 0), "labelled voxels lie where every modality is 0"),
    ],
)
def test_a_broken_label_is_named_and_costs_no_image(case_folder, change, message):
    rewrite(case_folder, "seg", change)
    prepared = prepare(case_folder)
    assert prepared.label is None
    assert prepared.faults == []
    assert len(prepared.label_faults) == 1
    import re

    assert re.search(message, prepared.label_faults[0].detail)


def test_nearly_whole_labels_are_rounded(case_folder):
    expected = prepare(case_folder).label
    rewrite(case_folder, "seg", lambda x: x.astype(np.float32) + 0.0004)
    assert np.array_equal(prepare(case_folder).label, expected)


def test_everything_broken(case_folder):
    for path in case_folder.glob("*.nii.gz"):
        path.write_bytes(b"broken")
    with pytest.raises(SampleFaultError) as error:
        prepare(case_folder)
    assert len(error.value.faults) == 4


def test_prostates_come_to_the_t2_grid(pi_cai_root):
    layout, cases = recognise(pi_cai_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    assert prepared.image.shape == (3, 160, 160, 20)
    assert prepared.offset is None
    assert np.allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), [0.5, 0.5, 3])
    gland = prepared.label > 0
    assert gland.any()
    # adc is low in a lesion and outside the gland; resampled to the right place it is high inside the gland.
    inside, outside = prepared.image[1][gland].mean(), prepared.image[1][(~gland) & (prepared.image[0] > 0)].mean()
    assert inside > 1.3 * outside


def test_a_prostate_without_its_reference_cannot_be_used(pi_cai_root):
    layout, cases = recognise(pi_cai_root)
    headless = cases[0]._replace(images={name: path for name, path in cases[0].images.items() if name != "t2w"})
    with pytest.raises(SampleFaultError, match="no t2w"):
        prepare_case(headless, layout, layout.modalities)
    no_adc = cases[0]._replace(images={name: path for name, path in cases[0].images.items() if name != "adc"})
    assert prepare_case(no_adc, layout, layout.modalities).modality_mask == [True, False, True]


def test_lung_masks_become_bits(lung_root):
    layout, cases = recognise(lung_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    cavity = read_volume(cases[0].labels["cavity"]).data > 0
    ventilated = read_volume(cases[0].labels["vent"]).data > 0
    assert np.array_equal(np.isin(prepared.label, layout.regions["TC"]), cavity)
    assert np.array_equal(np.isin(prepared.label, layout.regions["VD"]), cavity & ~ventilated)


@pytest.mark.parametrize("modality", ["adc", "hbv"])
def test_what_lies_beside_the_reference_is_dropped_with_a_row(pi_cai_root, tmp_path, modality):
    layout, cases = recognise(shutil.copytree(pi_cai_root, tmp_path / "pi_cai"))
    path = cases[0].images[modality]
    image = SimpleITK.ReadImage(str(path))
    image.SetOrigin([value + 900 for value in image.GetOrigin()])
    SimpleITK.WriteImage(image, str(path))
    prepared = prepare_case(cases[0], layout, layout.modalities)
    (fault,) = prepared.faults
    assert (fault.kind, fault.path) == ("grid", str(path))
    assert prepared.modality_mask == [True, modality != "adc", modality != "hbv"]
    assert np.isfinite(prepared.image).all()


def test_a_modality_with_nothing_above_zero_is_dropped_with_a_row(case_folder):
    path = next(case_folder.glob("*-t2w.nii.gz"))
    image = nib.load(path)
    nib.save(nib.Nifti1Image(-np.abs(np.asarray(image.dataobj, dtype=np.float32)), image.affine), path)
    prepared = prepare(case_folder)
    assert [fault.kind for fault in prepared.faults] == ["constant"]
    assert np.isfinite(prepared.image).all()


def test_voxels_so_large_that_too_many_would_be_made_of_them(pi_cai_root, tmp_path):
    """A header of 40 metres per voxel, resampled to half a millimetre, is 10^14 voxels."""
    shutil.copytree(pi_cai_root, tmp_path / "root")
    path = sorted((tmp_path / "root").rglob("*_t2w.mha"))[0]
    image = SimpleITK.ReadImage(str(path))
    image.SetSpacing((40000.0, 40000.0, 40000.0))
    SimpleITK.WriteImage(image, str(path))
    with pytest.raises(SampleFaultError, match="GiB are opened"):
        prepare(tmp_path / "root" / "images")
