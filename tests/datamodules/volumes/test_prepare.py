import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from common.errors import DataError
from common.faults import SampleFaultError
from datamodules import notes
from datamodules.registry import open_archive
from datamodules.volumes.cases import case_of
from datamodules.volumes.intensity import rescale
from datamodules.volumes.modalities import with_modalities
from datamodules.volumes.prepare import prepare_case
from datamodules.volumes.profiles import prepared as prepared_layout
from datamodules.volumes.reading import read_volume, write_nifti
from datamodules.volumes.voxels import VoxelConfig, background_of


@pytest.fixture
def case_folder(brats_root, tmp_path):
    name = "BraTS-GLI-00000-000"
    shutil.copytree(brats_root / name, tmp_path / "root" / name)
    return tmp_path / "root" / name


def opened(root):
    """Return layout and cases of an archive of volumes."""
    archive = open_archive(root, needs={"volumes"})
    return prepared_layout(archive), [case_of(record) for record in archive.records]


def prepare(folder):
    layout, cases = opened(folder.parent)
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


def test_prostates_come_to_the_t2_grid(pi_cai_root, volumes_of):
    layout, cases = volumes_of(pi_cai_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    assert prepared.image.shape == (3, 160, 160, 20)
    assert prepared.offset is None
    assert np.allclose(np.linalg.norm(prepared.affine[:3, :3], axis=0), [0.5, 0.5, 3])
    gland = prepared.label > 0
    assert gland.any()
    # adc is low in a lesion and outside the gland; resampled to the right place it is high inside the gland.
    inside, outside = prepared.image[1][gland].mean(), prepared.image[1][(~gland) & (prepared.image[0] > 0)].mean()
    assert inside > 1.3 * outside


def test_a_prostate_without_its_reference_cannot_be_used(pi_cai_root, volumes_of):
    layout, cases = volumes_of(pi_cai_root)
    headless = cases[0]._replace(images={name: path for name, path in cases[0].images.items() if name != "t2w"})
    with pytest.raises(SampleFaultError, match="no t2w"):
        prepare_case(headless, layout, layout.modalities)
    no_adc = cases[0]._replace(images={name: path for name, path in cases[0].images.items() if name != "adc"})
    assert prepare_case(no_adc, layout, layout.modalities).modality_mask == [True, False, True]


def test_lung_masks_become_bits(lung_root, volumes_of):
    layout, cases = volumes_of(lung_root)
    prepared = prepare_case(cases[0], layout, layout.modalities)
    cavity = read_volume(cases[0].labels["cavity"]).data > 0
    ventilated = read_volume(cases[0].labels["vent"]).data > 0
    assert np.array_equal(np.isin(prepared.label, layout.regions["TC"]), cavity)
    assert np.array_equal(np.isin(prepared.label, layout.regions["VD"]), cavity & ~ventilated)


@pytest.mark.parametrize("modality", ["adc", "hbv"])
def test_what_lies_beside_the_reference_is_dropped_with_a_row(pi_cai_root, tmp_path, modality, volumes_of):
    layout, cases = volumes_of(shutil.copytree(pi_cai_root, tmp_path / "pi_cai"))
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
    assert [fault.kind for fault in prepared.faults] == ["intensity"]
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


@pytest.fixture
def head(tmp_path):
    """Return a function that writes a case of one volume, ``(24, 24, 24)``, and prepares it under given settings.

    A ball of values around 100, and something around it that fills the rest.
    """
    distance = np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0)
    values = np.random.default_rng(0).normal(100, 20, distance.shape).astype(np.float32)

    def prepared(around=0.0, change=lambda body: body, preprocessing=None, **voxels):
        data = np.where(distance < 8, change(values), np.float32(around)).astype(np.float32)
        write_nifti(tmp_path / "root/c0/t1.nii.gz", data, np.eye(4))
        layout, cases = opened(tmp_path / "root")
        layout = with_modalities(layout, cases, None)
        layout = layout.with_voxels(VoxelConfig(**voxels))
        if preprocessing:
            layout = replace(layout, preprocessing=replace(layout.preprocessing, **preprocessing))
        return prepare_case(cases[0], layout, layout.modalities), data

    return prepared


def kind_of(prepared):
    with pytest.raises(SampleFaultError) as error:
        prepared()
    (fault,) = error.value.faults
    return fault.kind, fault.detail


def test_nan_around_the_body(head):
    kind, detail = kind_of(lambda: head(np.nan))
    assert kind == "nan"
    assert "set voxels.nan: zero" in detail
    assert np.array_equal(head(np.nan, nan="zero")[0].image, head(0)[0].image)
    kind, detail = kind_of(lambda: head(0, lambda body: np.where(body > 150, np.nan, body)))
    assert "voxels.nan" not in detail
    assert kind_of(lambda: head(np.inf, nan="zero"))[0] == "nan"


def test_standardised_intensities_need_their_rule(head):
    """Clipped at 0, half of a standardised brain would be background."""

    def standardised(body):
        return (body - 100) / 20

    kind, detail = kind_of(lambda: head(0, standardised))
    assert kind == "intensity"
    assert "of t1's foreground is negative, it has been standardised already: set voxels.intensity" in detail
    prepared, data = head(0, standardised, intensity={"t1": "standardised"}, preprocessing={"crop_foreground": False})
    image = prepared.image[0]
    assert (image[data != 0] >= 0.01 - 1e-6).all()
    assert (image[data == 0] == 0).all()
    assert image.max() == 1
    assert np.corrcoef(image[data != 0], data[data != 0])[0, 1] > 0.99


def test_a_few_negative_voxels_are_said_and_left(head, capsys):
    notes.print_notes()
    head(0, lambda body: body - 55)
    notes.print_notes()
    assert "more than 1% of the foreground of t1 is negative: 1 file" in capsys.readouterr().out
    head(0, lambda body: np.maximum(body, 0.1))
    notes.print_notes()
    assert "negative" not in capsys.readouterr().out


def test_computed_tomography(head):
    """Air is -1000 around the body, and beyond the volume; both are background."""
    assert "it is CT" in kind_of(lambda: head(-1024, lambda body: body - 150))[1]
    ct = {"intensity": {"t1": "ct"}}
    prepared, _ = head(-1024, **ct)
    assert prepared.image.shape[1:] == (16, 16, 16)  # the border that is cut away is air's, not 0's
    assert prepared.image.max() == pytest.approx((100 + 1000) / 2000, abs=0.05)
    padded, _ = head(-1024, preprocessing={"size": (30, 30, 30), "crop_foreground": False}, **ct)
    assert padded.image[0, 0, 0, 0] == 0
    assert (padded.image == 0).sum() == 30**3 - (prepared.image != 0).sum()


def test_a_background_that_is_not_0_leaves_no_air(head):
    """Volumes whose air was set to another value than 0 are cut, and tested for a skull, by that value."""
    for rule in ("percentile", "zscore", "minmax", "percentile_5_95"):
        intensity = {"t1": rule}
        shifted, _ = head(7, lambda body: body + 7, intensity=intensity)
        assert shifted.image.shape[1:] == (16, 16, 16), rule
    atlas = {"atlas": (24, 24, 24), "intensity": {"t1": "zscore"}}
    assert head(7, preprocessing=atlas)[0].modality_mask == [True]
    assert np.allclose(shifted.image, head(0, intensity=intensity)[0].image, atol=0.1)


def test_background_is_what_fills_half_of_the_faces():
    data = np.random.default_rng(0).normal(size=(10, 10, 10))
    assert background_of(data) is None
    data[0], data[-1], data[:, 0] = 3, 3, 3
    assert background_of(data) is None or background_of(data) == 3
    data[:, -1] = 3
    assert background_of(data) == 3
    data[2:8, 2:8, 2:8] = 9
    assert background_of(data) == 3
    assert background_of(np.zeros((1, 1, 1), np.uint8)) == 0


@pytest.mark.parametrize("value", [256, -1])
def test_labels_that_do_not_fit_a_byte(case_folder, value):
    """In a layout without fixed values they would wrap around into another class."""
    rewrite(case_folder, "seg", lambda x: np.where(x > 0, np.int16(value), x.astype(np.int16)))
    layout, cases = opened(case_folder.parent)
    layout = replace(layout, label_values=frozenset())
    (fault,) = prepare_case(cases[0], layout, layout.modalities).label_faults
    assert fault.kind == "label"
    assert "0 to 255" in fault.detail


@pytest.mark.parametrize("dtype", [np.uint64, np.complex64])
def test_labels_of_odd_kinds_are_faults(case_folder, dtype):
    path = case_folder / f"{case_folder.name}-seg.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(dtype), image.affine, dtype=dtype), path)
    layout, cases = opened(case_folder.parent)
    layout = layout.with_voxels(VoxelConfig(complex="magnitude"))
    assert [fault.kind for fault in prepare_case(cases[0], layout, layout.modalities).label_faults] == ["dtype"]


def test_a_centred_cut_is_around_negative_voxels_too(head):
    """Where only positive ones counted, percentiles were those of the whole volume, air included."""
    settings = {"preprocessing": {"centered": True}, "intensity": {"t1": "percentile_5_95"}}
    prepared, data = head(0, lambda body: -body, **settings)
    inner = (slice(4, 20),) * 3
    assert np.allclose(prepared.image[0], rescale(data[inner], "percentile_5_95"))


def test_settings_of_voxels_that_do_not_exist(case_folder):
    layout, _ = opened(case_folder.parent)
    with pytest.raises(DataError, match=r"voxels.intensity names swi; the modalities are t1c"):
        layout.with_voxels(VoxelConfig(intensity={"swi": "percentile"}))
    with pytest.raises(DataError, match="known are percentile"):
        layout.with_voxels(VoxelConfig(intensity={"t1c": "nothing"}))


@pytest.mark.real_data
def test_real_volumes_of_odd_kinds(real_data, tmp_path):
    """Of archives.md, test case 8."""
    folder = real_data("odd_nifti")

    def prepared(name, **voxels):
        (tmp_path / "root/c0").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / "root/c0/t1.nii.gz")
        layout, cases = opened(tmp_path / "root")
        layout = with_modalities(layout, cases, None).with_voxels(VoxelConfig(**voxels))
        return prepare_case(cases[0], layout, layout.modalities)

    assert kind_of(lambda: prepared("derived_zscored.nii.gz"))[0] == "intensity"
    image = prepared("derived_zscored.nii.gz", intensity={"t1": "standardised"}).image[0]
    source = read_volume(folder / "derived_zscored.nii.gz").data
    assert (image != 0).sum() == (source != background_of(source)).sum()
    assert kind_of(lambda: prepared("derived_complex64.nii.gz"))[0] == "dtype"
    assert prepared("derived_complex64.nii.gz", complex="magnitude").modality_mask == [True]
    assert prepared("derived_sform_1mm_qform_1.3x1.3x10.nii.gz", header="sform").affine[0, 0] == pytest.approx(1)
    turned = prepared("derived_sform_1mm_qform_1.3x1.3x10.nii.gz", header="qform")
    assert np.linalg.norm(turned.affine[:3, :3], axis=0) == pytest.approx([1.3, 1.3, 10], rel=1e-3)
