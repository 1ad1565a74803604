from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from datamodules.account import BROKEN, COPY, FEW, RULED_OUT, SERIES
from datamodules.dicom import convert as converting
from datamodules.dicom.convert import check_geometry, conversion_facts, convert
from datamodules.dicom.index import DicomIndex, is_dicom
from datamodules.dicom.rules import parse_rules
from datamodules.dicom.studies import DicomSettings, understand
from datamodules.volumes.headers import VolumeError

pydicom = pytest.importorskip("pydicom")


def write_series(
    folder, places, description="t1_mprage", frame="1.2.9", patient="P1", study="1.2.3", series="4", **more
):
    """Write one slice per place as MR files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(places):
        item = pydicom.Dataset()
        item.SOPClassUID, item.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"{study}.{series}.{number + 1}"
        item.StudyInstanceUID, item.SeriesInstanceUID = study, f"{study}.{series}"
        item.PatientID, item.PatientName, item.Modality = patient, "Doe^Jane", "MR"
        item.SeriesDescription, item.SeriesNumber, item.InstanceNumber = description, int(series), number + 1
        item.ImageType, item.FrameOfReferenceUID = ["ORIGINAL", "PRIMARY", "M"], frame
        item.ImageOrientationPatient, item.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, place]
        item.Rows, item.Columns, item.PixelSpacing, item.SliceThickness = 12, 10, [1, 1], 1
        item.SamplesPerPixel, item.PhotometricInterpretation, item.PixelRepresentation = 1, "MONOCHROME2", 0
        item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
        item.InstitutionName, item.MRAcquisitionType, item.EchoTime = "St Elsewhere", "3D", 4
        for name, value in more.items():
            setattr(item, name, value)
        item.PixelData = np.full((12, 10), number + 1, np.uint16).tobytes()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        item.save_as(folder / f"{series}_{number}", enforce_file_format=True)


def read(root, keep=None, **settings):
    files = [path for path in root.rglob("*") if path.is_file() and is_dicom(path)]
    return understand(root, DicomIndex(files, keep), DicomSettings(**{"min_slices": 2, **settings}))


def counts(found):
    return {reason: len(paths) for reason, paths in found.ignored.items()}


def canonical(path):
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).squeeze(), image.affine


def test_a_series_becomes_a_volume_without_names(tmp_path):
    write_series(tmp_path / "in", range(5))
    (study,) = read(tmp_path / "in").studies
    path = convert(study.stacks["t1"], tmp_path / "kept")
    assert canonical(path)[0].shape == (10, 12, 5)
    assert conversion_facts(path)["EchoTime"] == 0.004
    content = b"".join(p.read_bytes() for p in (tmp_path / "kept").rglob("*") if p.is_file())
    assert b"Elsewhere" not in content
    assert b"Doe" not in content
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [path.parent.name]


def test_a_conversion_is_made_once(tmp_path, monkeypatch):
    write_series(tmp_path / "in", range(3))
    (study,) = read(tmp_path / "in").studies
    first = convert(study.stacks["t1"], tmp_path / "kept")
    monkeypatch.setattr(converting, "_run", None)
    assert convert(study.stacks["t1"], tmp_path / "kept") == first


def test_headers_are_read_once_and_copies_counted(tmp_path, monkeypatch):
    write_series(tmp_path / "in", range(3))
    write_series(tmp_path / "in/again", range(3))
    (tmp_path / "in/broken").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\xff")
    found = read(tmp_path / "in", tmp_path / "kept")
    assert counts(found) == {COPY: 3, BROKEN: 1}
    assert list(found.unreadable) == [str(tmp_path / "in/broken")]
    assert (tmp_path / "kept/headers-1.jsonl").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("datamodules.dicom.index.read_instance", None)
    assert read(tmp_path / "in", tmp_path / "kept") == found


def test_slices_that_make_no_volume_are_faults(tmp_path):
    write_series(tmp_path / "uneven", [0, 1, 2, 4, 5], PixelRepresentation=1)
    write_series(tmp_path / "unsigned", [0, 1, 2, 4, 5], study="1.2.4")
    write_series(tmp_path / "time", [0, 0, 1, 1])
    (fault,) = read(tmp_path / "uneven").faults
    assert (fault.kind, fault.detail[:44]) == ("geometry", "slice distances vary from 1.00 to 2.00 mm, a")
    (study,) = read(tmp_path / "uneven", uneven="interpolate").studies
    path = convert(study.stacks["t1"], tmp_path / "kept", uneven="interpolate")
    assert conversion_facts(path)["slices_interpolated"]
    assert canonical(path)[0].shape == (10, 12, 6)
    (study,) = read(tmp_path / "unsigned", uneven="interpolate").studies
    with pytest.raises(VolumeError, match="no slices of this pixel type"):
        convert(study.stacks["t1"], tmp_path / "kept", uneven="interpolate")
    (fault,) = read(tmp_path / "time").faults
    assert fault.kind == "shape"
    with pytest.raises(VolumeError, match="one place"):
        check_geometry(DicomIndex(list((tmp_path / "time").iterdir())).stacks[0])


def test_few_slices_are_left_out_and_counted(tmp_path):
    write_series(tmp_path, range(5))
    found = read(tmp_path, min_slices=10)
    assert (found.studies, counts(found)) == ([], {FEW: 5})


def test_one_series_per_modality_and_one_space_per_study(tmp_path):
    write_series(tmp_path / "in", range(4), series="1", MRAcquisitionType="2D")
    write_series(tmp_path / "in", np.arange(6) * 0.8, series="2")
    write_series(tmp_path / "in", range(6), series="3", description="t2", frame="1.2.10")
    write_series(tmp_path / "in", [300, 301, 302], series="5", description="flair")
    found = read(tmp_path / "in")
    assert found.reference == "t1"
    (study,) = found.studies
    assert {name: len(stack.instances) for name, stack in study.stacks.items()} == {"t1": 6, "t2": 6, "flair": 3}
    assert set(study.faults) == {"t2", "flair"}
    assert counts(found) == {f"{SERIES} t1": 4}
    assert sorted(fault.detail.split(":")[0] for fault in found.faults) == [
        "flair covers less than half of the reference's box",
        "t2 has another frame of reference than the rest of its study",
    ]


@pytest.mark.real_data
def test_a_real_dual_echo_equals_its_reference(real_data, tmp_path):
    (study,) = read(real_data("dicom_pdt2")).studies
    assert sorted(study.stacks) == ["pd", "t2"]
    for name, echo in (("pd", 1), ("t2", 2)):
        path = convert(study.stacks[name], tmp_path)
        (reference,) = real_data("dicom_pdt2_reference").glob(f"*_e{echo}.nii")
        (voxels, affine), (wanted, wanted_affine) = canonical(path), canonical(reference)
        assert np.array_equal(voxels, wanted)
        assert np.allclose(affine, wanted_affine, atol=1e-4)
    content = b"".join(p.read_bytes() for p in Path(tmp_path).rglob("*") if p.is_file())
    assert b"Rigshospitalet" not in content
    assert b"166141" not in content


@pytest.mark.real_data
def test_real_vendors_are_refused_until_the_subject_is_said_and_equal_their_references(real_data, tmp_path):
    root = real_data("dicom_vendors")
    with pytest.raises(ValueError, match='Every study has the PatientID "dicom2nifti"'):
        read(root)
    rules = parse_rules([{"kind": "MR", "modality": "t1"}])
    studies = read(root, subject="study", rules=rules).studies
    assert len({study.patient_id for study in studies}) == 2
    for study in studies:
        name = Path(study.stacks["t1"].first.path).parent.name
        voxels, affine = canonical(convert(study.stacks["t1"], tmp_path))
        wanted, wanted_affine = canonical(real_data("dicom_vendors_reference") / f"{name}.nii.gz")
        assert np.allclose(voxels, wanted, rtol=1e-4)
        assert np.allclose(affine, wanted_affine, atol=1e-3)


@pytest.mark.real_data
def test_real_mosaics_are_left_out_with_their_reason(real_data):
    found = read(real_data("dicom_fmri_mosaic"))
    assert found.studies == []
    assert counts(found) == {f"{RULED_OUT} series over time or direction": 8}


@pytest.mark.real_data
def test_real_faults_are_told_apart(real_data, tmp_path):
    root = real_data("dicom_faults")
    found = read(root, subject="folder", min_slices=3)
    assert {fault.sample.rpartition("_")[0]: fault.kind for fault in found.faults} == {
        "missing_slice": "geometry", "rgb": "dtype"
    }  # fmt: skip
    assert counts(found) == {FEW: 6}
    (study,) = [study for study in found.studies if not study.faults]
    path = convert(study.stacks["ct"], tmp_path / "kept")
    assert conversion_facts(path)["tilt_corrected"]
    renamed = tmp_path / "gantry_tilt"
    renamed.mkdir()
    for number, file in enumerate(sorted((root / "gantry_tilt").iterdir(), reverse=True)):
        (renamed / f"{number}").write_bytes(file.read_bytes())
    (again,) = read(tmp_path, subject="folder").studies
    other = convert(again.stacks["ct"], tmp_path / "other")
    assert all(np.array_equal(a, b) for a, b in zip(canonical(path), canonical(other), strict=True))
