"""The DICOM layout, from a tree to batches (archives.md, sections 2 and 6, cases 5 and 6)."""

import builtins
import shutil
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.errors import DataError
from datamodules import account
from datamodules.account import Account
from datamodules.configs import LoaderConfig, SplitConfig
from datamodules.dicom.rules import default_rules, parse_rules
from datamodules.genetics.datamodule import ImageGenomeDataModule, PictureConfig
from datamodules.registry import Settings, open_archive
from datamodules.volumes.datamodule import CropConfig, VolumeDataModule, VolumeLoaderConfig
from datamodules.volumes.prepare import header_of, read_member
from datamodules.volumes.voxels import STRICT, VoxelConfig
from tests.datamodules.dicom.test_convert import canonical, write_series

pydicom = pytest.importorskip("pydicom")

ALL = SplitConfig((1.0, 0.0, 0.0))
SERIES = [{"description": name, "modality": name} for name in ("t1", "t2", "flair")]
RULES = parse_rules(SERIES)
#: The rules that come with the project, as an ``archive.yaml`` has them.
DEFAULTS = yaml.safe_load(files("datamodules.dicom").joinpath("dicom_rules.yaml").read_text())


def write_picture(path, modality="CR", number=1, patient="P1", frames=1, view="PA", **more):
    """Write a radiograph of 40 x 48 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    item = pydicom.Dataset()
    item.SOPClassUID, item.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", f"1.9.{number}"
    item.StudyInstanceUID, item.SeriesInstanceUID = f"1.7.{number}", f"1.8.{number}"
    item.PatientID, item.Modality, item.ViewPosition = patient, modality, view
    item.Rows, item.Columns, item.SamplesPerPixel, item.PhotometricInterpretation = 40, 48, 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 12, 11, 0
    for name, value in more.items():
        setattr(item, name, value)
    if frames > 1:
        item.NumberOfFrames = frames
    pixels = np.random.default_rng(number).integers(0, 4096, (frames, 40, 48)).astype(np.uint16)
    item.PixelData = pixels.tobytes()
    item.file_meta = pydicom.dataset.FileMetaDataset()
    item.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    item.save_as(path, enforce_file_format=True)


def volumes(root, size=(8, 8, 4), **options):
    datamodule = VolumeDataModule(str(root), crops=CropConfig(size), split=ALL, seed=1, batch_size=1,
                                  loader=VolumeLoaderConfig(max_fault_fraction=1.0), **options)  # fmt: skip
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def opened(root, needs=("volumes",), **settings):
    return open_archive(root, needs=needs, purpose="e_mim", settings=Settings(**settings))


def noisy(folder, places, **facts):
    """Write a series whose voxels differ."""
    write_series(folder, places, **facts)
    for file in folder.iterdir():
        item = pydicom.dcmread(file)
        if item.get("SeriesNumber") == int(facts.get("series", 4)):
            pixels = np.random.default_rng(item.InstanceNumber).integers(1, 900, (item.Rows, item.Columns))
            item.PixelData = pixels.astype(np.uint16).tobytes()
            item.save_as(file)


def test_volumes_train_only_where_rules_are_given(tmp_path):
    root = tmp_path / "scans"
    noisy(root, range(12))
    noisy(root, range(12), series="5", description="T2 AX")
    with pytest.raises(DataError, match=r"^DICOM, 2 kinds of series: run medmim init DIR first, in .*scans\.$"):
        VolumeDataModule(str(root)).index()
    datamodule = volumes(root, archive={"series": SERIES})
    assert datamodule.index().name == "dicom"
    assert datamodule.input_spec.channels == ("t1", "t2")
    (case,) = datamodule.cases
    assert case.patient_id == "P1"
    assert next(iter(datamodule.train_dataloader()))["image"].shape == (1, 2, 8, 8, 4)
    assert Account(datamodule.archive, datamodule.used_files()).lines() == [
        "files: 24, of which 24 used, 0 ignored, 0 unknown", "  used     24 volume"
    ]  # fmt: skip


def test_rules_that_leave_nothing_are_said(tmp_path):
    write_series(tmp_path, range(12))
    with pytest.raises(DataError, match=r"None of 1 kind of series is used \(12 files left out under series: dull\)"):
        opened(tmp_path, series=parse_rules([{"description": ".", "ignore": "dull"}]))
    with pytest.raises(DataError, match=r"\(12 files series of fewer slices than min_slices\)"):
        opened(tmp_path, series=RULES, min_slices=20)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    write_series(tmp_path, range(12))
    for name, value, words in (("subject", "file", "is patient, study or folder, not 'file'"),
                               ("subject", "folder", "needs a folder per person"),
                               ("runs", "all", "has no setting runs")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            opened(tmp_path, series=RULES, **{name: value})


def test_names_mean_nothing_and_text_does_not_count(tmp_path):
    write_series(tmp_path / "a", range(12))
    for number, file in enumerate((tmp_path / "a").iterdir()):
        file.rename(file.with_name(("IM{}", "{}.IMA", "1.2.3.{}", "{}.dcm")[number % 4].format(number)))
    for number in range(20):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "DICOMDIR").write_bytes(b"x")
    archive = opened(tmp_path, series=RULES)
    assert archive.layout.name == "dicom"
    assert {(row.use, row.reason): row.count for row in Account(archive).rows} == {
        ("used", "volume"): 12, ("ignored", account.TEXT): 20, ("ignored", account.SIDECAR): 1
    }  # fmt: skip
    (tmp_path / "b.dat").write_bytes(bytes(200))
    (tmp_path / "c.xyz").write_bytes(bytes(200))
    with pytest.raises(DataError, match="of no known layout"):
        opened(tmp_path, series=RULES)


def test_a_tree_of_other_files_is_opened_at_a_few_places(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number}.dat").write_bytes(bytes(200))
    calls = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *more: calls.append(self) or plain(self, *more))
    with pytest.raises(DataError, match="of no known layout"):
        opened(tmp_path)
    assert 0 < len(calls) <= 50


def test_what_is_left_out_has_its_reason(tmp_path):
    write_series(tmp_path / "t1", range(12), series="1")
    write_series(tmp_path / "copy", range(12), series="1")
    write_series(tmp_path / "coarse", range(0, 24, 2), series="2")
    write_series(tmp_path / "short", range(3), series="3")
    write_series(tmp_path / "odd", range(12), series="5", description="something")
    write_series(tmp_path / "scout", range(12), series="6", description="scout")
    write_series(tmp_path / "report", range(1), series="7", Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    write_picture(tmp_path / "screen" / "1", "OT", ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    write_picture(tmp_path / "cine" / "1", "US", number=2, frames=4)
    (tmp_path / "broken").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\xff")
    rules = (*parse_rules([{"description": "scout", "ignore": "a scout"}]), *RULES)
    archive = opened(tmp_path, series=rules, subject="patient")
    found = Account(archive)
    assert {row.reason: row.count for row in found.rows} == {
        "volume": 12, account.COPY: 12, f"{account.SERIES} t1": 12, account.FEW: 3, account.RULELESS: 12,
        f"{account.RULED_OUT} a scout": 12, f"{account.OBJECT} SR": 1, account.SCREEN: 1, account.FRAMES: 1,
        account.BROKEN: 1,
    }  # fmt: skip
    assert found.unknown == []
    assert found.total == 67


def test_many_broken_headers_are_refused(tmp_path):
    write_series(tmp_path, range(12))
    for number in range(3):
        (tmp_path / f"broken{number}").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\xff")
    with pytest.raises(DataError, match=r"3 of 15 DICOM files under .* cannot be read, such as broken\d \(the DICOM"):
        opened(tmp_path, series=RULES)


def test_pictures_are_images_with_views_and_visits(tmp_path):
    for number in range(1, 7):
        write_picture(tmp_path / f"{number}.dcm", ("CR", "DX", "MG")[number % 3], number, f"P{number}")
    archive = opened(tmp_path, ("images",))
    assert archive.layout.name == "dicom"
    assert archive.gives == {"images", "views", "sessions"}
    assert {record.session for record in archive.records} == {f"1.7.{number}" for number in range(1, 7)}
    with pytest.raises(DataError, match="A DICOM archive gives images, views and sessions; e_mim needs volumes, so"):
        opened(tmp_path)
    data = ImageGenomeDataModule(str(tmp_path), image=PictureConfig((32, 32)), batch_size=2,
                                 split=SplitConfig((0.7, 0.3, 0.0)))  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 32, 32)


def test_a_table_beside_pictures_wins(tmp_path):
    rows = ["image,subject,text"]
    for number in range(1, 5):
        write_picture(tmp_path / f"{number}.dcm", number=number, patient=f"P{number}")
        rows.append(f"{number}.dcm,p{number},Clear.")
    (tmp_path / "notes.csv").write_text("\n".join(rows))
    assert opened(tmp_path, ("images",)).layout.name == "table"
    assert opened(tmp_path, ("images", "text")).layout.name == "table"


def test_of_a_tree_of_both_each_reads_its_own(tmp_path):
    for number in range(1, 4):
        noisy(tmp_path / f"t1_{number}", range(12), patient=f"P{number}", study=f"1.7.{number}")
        write_picture(tmp_path / f"{number}.dcm", number=number, patient=f"P{number}")
    assert len(opened(tmp_path, ("images",)).records) == 3
    with pytest.raises(DataError, match="DICOM, 1 kind of series: run medmim init DIR first"):
        opened(tmp_path)
    datamodule = volumes(tmp_path, archive={"series": SERIES})
    assert len(datamodule.cases) == 3
    assert datamodule.ledger.faults == []


def test_one_patient_id_is_asked_about_and_may_be_answered(tmp_path):
    for number in range(2):
        write_series(tmp_path / f"s{number}", range(12), patient="ANON", study=f"1.7.{number}")
    with pytest.raises(DataError, match='Every study has the PatientID "ANON", which an anonymiser may have written: '
                                        "set subject: study or folder"):  # fmt: skip
        opened(tmp_path, series=RULES)
    patients = {
        rule: {record.patient_id for record in opened(tmp_path, series=RULES, subject=rule).records}
        for rule in ("patient", "study", "folder")
    }
    assert patients["patient"] == {"ANON"}
    assert patients["folder"] == {"s0", "s1"}
    assert len(patients["study"]) == 2


def test_a_study_has_one_grid_and_a_lack_of_the_reference_is_none(tmp_path):
    for number in range(2):
        noisy(tmp_path / f"s{number}", range(12), patient=f"P{number}", study=f"1.7.{number}")
    noisy(tmp_path / "s0", np.arange(6) * 2, patient="P0", study="1.7.0", series="5", description="flair")
    noisy(tmp_path / "s2", np.arange(7) * 2, patient="P2", study="1.7.2", series="5", description="flair")
    datamodule = volumes(tmp_path, archive={"series": SERIES, "min_slices": 2})
    assert datamodule.index().preprocessing.reference == "t1"
    records = {case.patient_id: datamodule.store.read_record(case.case_id) for case in datamodule.cases}
    assert {name: record.source_shape for name, record in records.items()} == {
        "P0": [10, 12, 12], "P1": [10, 12, 12], "P2": [10, 12, 7]
    }  # fmt: skip
    # Channels are flair, t1.
    assert [record.modality_mask for record in records.values()] == [[True, True], [False, True], [True, False]]
    assert datamodule.ledger.faults == []


def test_a_broken_series_is_a_fault_of_its_study_and_the_others_are_used(tmp_path):
    for number in range(2):
        noisy(tmp_path / f"s{number}", range(12), patient=f"P{number}", study=f"1.7.{number}")
    write_series(tmp_path / "s0", [0, 1, 2, 4, 5], patient="P0", study="1.7.0", series="5", description="t2")
    noisy(tmp_path / "s1", range(12), patient="P1", study="1.7.1", series="5", description="t2", frame="1.2.10")
    datamodule = volumes(tmp_path, archive={"series": SERIES, "min_slices": 2})
    assert Counter(fault.kind for fault in datamodule.ledger.faults) == {"geometry": 1, "space": 1}
    records = [datamodule.store.read_record(case.case_id) for case in datamodule.cases]
    assert [(record.usable, record.modality_mask) for record in records] == [(True, [True, False])] * 2
    assert datamodule.examine(deep=False, workers=1) == datamodule.examine(deep=True, workers=1)


def test_a_cache_follows_slices_and_settings(tmp_path):
    noisy(tmp_path / "in", range(12))
    first = volumes(tmp_path / "in", archive={"series": SERIES})
    (case,) = first.cases
    record = first.store.read_record(case.case_id)
    assert len(record.sources) == 12
    assert first.sources([case]) == {case.case_id: (case.series_of("t1").digest,)}
    again = volumes(tmp_path / "in", archive={"series": SERIES})
    assert again.store.is_valid(again.cases[0], record)
    (tmp_path / "in/4_11").unlink()
    fewer = volumes(tmp_path / "in", archive={"series": SERIES})
    assert fewer.store.read_record(case.case_id).source_shape[2] == 11
    converted = next((tmp_path / "cache/dicom/volumes").glob("*/volume.nii"))
    converted.write_bytes(converted.read_bytes()[:500])
    shutil.rmtree(tmp_path / "cache/volumes")
    assert volumes(tmp_path / "in", archive={"series": SERIES}).ledger.faults == []


def test_headers_say_where_the_converted_voxels_lie(tmp_path):
    turned = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    for number, facts in enumerate((turned, {})):
        root = tmp_path / str(number)
        write_series(root, range(12), PixelSpacing=[0.5, 0.8], **facts)
        if facts:
            for place, file in enumerate(root.iterdir()):
                item = pydicom.dcmread(file)
                item.ImagePositionPatient = [2 * place, 5, 7]
                item.save_as(file)
        (record,) = opened(root, series=RULES).records
        header = record.volumes["t1"].series.header()
        voxels, affine = canonical(record.volumes["t1"].series.convert())
        assert header.shape == voxels.shape
        assert np.allclose(header.affine, affine, atol=1e-4)


def test_one_frame_of_several_is_taken_on_request(tmp_path):
    for number in range(1, 5):
        write_picture(tmp_path / "cines" / f"{number}.dcm", "US", number, f"P{number}", frames=3)
    with pytest.raises(DataError, match="4 DICOM pictures hold 3 frames or fewer; frame: 0 takes one, in"):
        opened(tmp_path / "cines", ("images",))
    data = {}
    for frame in (0, 2):
        data[frame] = ImageGenomeDataModule(str(tmp_path / "cines"), archive={"frame": frame}, batch_size=2,
                                            image=PictureConfig((32, 32)),
                                            split=SplitConfig((0.5, 0.5, 0.0)))  # fmt: skip
        data[frame].prepare_data()
        data[frame].setup("fit")
        assert data[frame].ledger.faults == []
        assert data[frame].examine(deep=True, workers=1) == data[frame].examine(deep=False, workers=1) == []
    first, last = (next(iter(data[frame].val_dataloader()))["image"] for frame in (0, 2))
    assert not np.allclose(first, last)
    far = ImageGenomeDataModule(str(tmp_path / "cines"), archive={"frame": 3}, image=PictureConfig((32, 32)), split=ALL,
                                loader=LoaderConfig(max_fault_fraction=1.0))  # fmt: skip
    far.prepare_data()
    with pytest.raises(DataError, match="None of the 4"):
        far.setup("fit")


def test_a_walk_and_one_look_at_each_file(tmp_path, monkeypatch):
    """Once headers are kept, an archive is recognised with two calls of the file system per file."""
    write_series(tmp_path / "in", range(40))
    opened(tmp_path / "in", series=RULES)
    calls = Counter()

    def count(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *more, **named: calls.update([name]) or plain(*more, **named))

    for owner, name in ((Path, "stat"), (Path, "open"), (builtins, "open")):
        count(owner, name)
    opened(tmp_path / "in", series=RULES)
    # Each is looked at once by the walk (os.scandir) and once for its time of change; a few are opened for their mark.
    assert calls["stat"] <= 40 + 10
    assert calls["open"] <= 30


@pytest.mark.real_data
def test_a_real_dual_echo_in_the_data_module(real_data, tmp_path):
    """Case 5: voxels of pd and t2 equal the reference, before and after preparation; the cache names no hospital."""
    datamodule = volumes(real_data("dicom_pdt2"), (32, 32, 16), archive={"series": DEFAULTS})
    (case,) = datamodule.cases
    wanted = tmp_path / "reference" / "case"
    wanted.mkdir(parents=True)
    for name, echo in (("pd", 1), ("t2", 2)):
        (reference,) = real_data("dicom_pdt2_reference").glob(f"*_e{echo}.nii")
        shutil.copy(reference, wanted / f"{name}.nii")
        voxels, affine = canonical(reference)
        volume = read_member(case, name, STRICT)
        assert np.array_equal(volume.data, voxels)
        assert np.allclose(volume.affine, affine, atol=1e-4)
        header = header_of(case, name, STRICT)
        assert header.shape == voxels.shape
        assert np.allclose(header.affine, affine, atol=1e-3)
    reference = volumes(wanted.parent, (32, 32, 16))
    assert reference.input_spec.channels == datamodule.input_spec.channels == ("t2", "pd")
    images = [np.asarray(data.store.open(data.cases[0]).image) for data in (datamodule, reference)]
    assert np.array_equal(*images)
    assert Account(datamodule.archive, datamodule.used_files()).lines()[0] == (
        "files: 70, of which 70 used, 0 ignored, 0 unknown"
    )
    item = pydicom.dcmread(next(Path(case.images["pd"]).parent.iterdir()), stop_before_pixels=True)
    content = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for name in ("InstitutionName", "InstitutionAddress", "StationName"):
        if value := str(item.get(name) or ""):
            assert value.encode() not in content, name
    assert item.InstitutionName


@pytest.mark.real_data
def test_a_real_study_without_anatomy(real_data):
    """Case 5: four series ignored, texts counted, nothing left: refused."""
    root = real_data("dicom_fmri_mosaic")
    with pytest.raises(DataError, match="DICOM, 4 kinds of series: run medmim init DIR first"):
        opened(root)
    with pytest.raises(DataError, match="None of 4 kinds of series is used") as error:
        opened(root, series=default_rules())
    assert "8 files left out under series: series over time or direction" in str(error.value)
    assert len(str(error.value)) <= 300
    archive = open_archive(root, needs=(), settings=Settings(series=parse_rules([{"kind": "MR", "modality": "bold"}])))
    assert {row.reason: row.count for row in Account(archive).rows} == {
        "volume": 2, f"{account.SERIES} bold": 6, account.TEXT: 5
    }  # fmt: skip


@pytest.mark.real_data
def test_real_faults_in_the_data_module(real_data, capsys):
    """Case 6: geometry, few slices, corrected tilt and dtype; no traceback, no silence."""
    root, said = real_data("dicom_faults"), {"series": DEFAULTS, "subject": "folder", "min_slices": 3}
    with pytest.raises(DataError, match=r"foreground is negative, it is CT: set voxels.intensity: \{ct: ct\}"):
        volumes(root, (8, 8, 2), archive=said)
    datamodule = volumes(root, (8, 8, 2), voxels=VoxelConfig(intensity={"ct": "ct"}), archive=said)
    assert Counter(fault.kind for fault in datamodule.ledger.faults) == {"geometry": 1, "dtype": 1}
    assert "the tilt of a CT's gantry was corrected: 1 file" in capsys.readouterr().out
    rows = {row.reason: row.count for row in Account(datamodule.archive, datamodule.used_files()).rows}
    assert rows == {"volume": 12, account.FEW: 6}
    reasons = datamodule.examine(deep=False, workers=1)
    assert reasons == datamodule.examine(deep=True, workers=1) == []


@pytest.mark.real_data
def test_real_vendors_in_the_data_module(real_data, tmp_path):
    """Case 6: refused until ``subject`` is said; renamed files give equal volumes."""
    rules = [{"kind": "MR", "modality": "t1"}]
    with pytest.raises(DataError, match='Every study has the PatientID "dicom2nifti"'):
        opened(real_data("dicom_vendors"), series=parse_rules(rules))
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(real_data("dicom_vendors").rglob("*.dcm"), reverse=True)):
        shutil.copy(path, renamed / f"x{number}")
    found = []
    for root in (real_data("dicom_vendors"), renamed):
        datamodule = volumes(root, (16, 16, 2), archive={"series": rules, "subject": "study", "min_slices": 2})
        assert datamodule.ledger.faults == []
        found.append({case.case_id: read_member(case, "t1", STRICT) for case in datamodule.cases})
    assert len(found[0]) == 2
    assert found[0].keys() == found[1].keys()
    for name, volume in found[0].items():
        assert np.array_equal(volume.data, found[1][name].data)
        assert np.array_equal(volume.affine, found[1][name].affine)
