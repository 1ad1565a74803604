"""Medical Decathlon and nnU-Net: lists, channels, labels, and the same real files in both forms."""

import json
import shutil

import numpy as np
import pytest

from common.errors import DataError
from datamodules import account
from datamodules.account import Account
from datamodules.configs import SplitConfig
from datamodules.registry import open_archive
from datamodules.volumes.cases import case_of
from datamodules.volumes.datamodule import CropConfig, VolumeDataModule
from datamodules.volumes.decathlon import read_labels
from datamodules.volumes.prepare import prepare_case, read_image
from datamodules.volumes.profiles import prepared
from datamodules.volumes.reading import write_nifti

NAMES = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}


def write(root, content, images=(), labels=(), volumes=0):
    """Write a tree; its images are of noise, 4-D where several volumes are wanted."""
    rng = np.random.default_rng(0)
    shape = (12, 14, 10, volumes) if volumes else (12, 14, 10)
    for name in images:
        write_nifti(root / name, rng.integers(1, 99, shape).astype(np.int16), np.eye(4))
    for name in labels:
        write_nifti(root / name, rng.integers(0, 3, shape[:3]).astype(np.uint8), np.eye(4))
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def msd(root, volumes=4, **more):
    names = [f"BRATS_{number:03}.nii.gz" for number in range(1, 4)]
    content = {
        "modality": NAMES, "labels": {"0": "background", "1": "edema", "2": "enhancing tumour"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/BRATS_009.nii.gz"],
    }  # fmt: skip
    images = [*(f"imagesTr/{name}" for name in names), "imagesTs/BRATS_009.nii.gz"]
    return write(root, content | more, images, [f"labelsTr/{name}" for name in names], volumes)


def test_the_volumes_of_a_file_are_its_channels(tmp_path):
    archive = open_archive(msd(tmp_path), needs={"volumes", "masks"})
    assert archive.layout.name == "msd"
    assert [record.split for record in archive.records] == ["train"] * 3 + ["test"]
    assert archive.facts.regions == {"edema": (1,), "enhancing tumour": (2,)}
    data = VolumeDataModule(str(tmp_path), split=SplitConfig((0.6, 0.4, 0.0)), crops=CropConfig((8, 8, 8)),
                            batch_size=1)  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    assert data.input_spec.channels == ("flair", "t1", "t1c", "t2")
    assert data.input_spec.names == ("FLAIR", "T1w", "t1gd", "T2w")
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [2, 1, 1]
    case = data.splits["train"][0]
    opened = data.store.open(case)
    for channel, name in enumerate(data.index().modalities):
        source = read_image(case.images[name], place=case.places[name]).data
        assert source.shape == opened.image.shape[1:]
        assert np.corrcoef(source.ravel(), np.asarray(opened.image[channel]).ravel())[0, 1] > 0.99
    assert next(iter(data.train_dataloader()))["image"].shape == (1, 4, 8, 8, 8)


def test_another_number_of_volumes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"BRATS_001 holds 3 volumes, .*dataset.json names 4 modalities \(FLAIR, T1w"):
        open_archive(msd(tmp_path, volumes=3), needs={"volumes"})


def test_a_cached_case_is_built_again_where_its_channels_change_places(tmp_path):
    """The same file under another order of modalities is another case, though no file has changed."""
    data = VolumeDataModule(str(msd(tmp_path)), split=SplitConfig((1.0, 0.0, 0.0)))
    data.prepare_data()
    case = data.cases[0]
    swapped = case._replace(places={**case.places, "flair": case.places["t1"], "t1": case.places["flair"]})
    record = data.store.read_record(case.case_id)
    assert data.store.is_valid(case, record)
    assert not data.store.is_valid(swapped, record)


def test_listed_but_absent_and_there_but_unlisted(tmp_path):
    root = msd(tmp_path)
    (root / "imagesTr/BRATS_002.nii.gz").rename(root / "imagesTr/BRATS_012.nii.gz")
    (root / "imagesTr/._BRATS_001.nii.gz").touch()
    archive = open_archive(root, needs={"volumes"})
    assert len(archive.records) == 4
    rows = {(row.use, row.reason): row.count for row in Account(archive).rows}
    assert rows["ignored", account.UNLISTED] == 1
    assert rows["ignored", account.SHADOW] == 1
    data = VolumeDataModule(str(root), split=SplitConfig((1.0, 0.0, 0.0)))
    data.prepare_data()
    data.setup("fit")
    assert [(fault.sample, fault.kind) for fault in data.ledger.faults] == [("BRATS_002", "missing")]


def test_paths_that_leave_the_root_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not lie under"):
        open_archive(msd(tmp_path, training=[{"image": "../x.nii.gz"}]), needs={"volumes"})


def nnunet(root, **more):
    names = ["case_1_0000", "case_1_0001", "case_2_0000", "site_0001_0000", "site_0001_0001"]
    content = {"channel_names": {"0": "T2w", "1": "ADC"}, "labels": {"background": 0, "PZ": 1, "whole": [1, 2]},
               "file_ending": ".nii.gz"}  # fmt: skip
    images = [f"imagesTr/{name}.nii.gz" for name in names] + ["imagesTs/case_9_0000.nii.gz"]
    return write(root, content | more, images, [f"labelsTr/{name}.nii.gz" for name in ("case_1", "site_0001")])


def test_channels_are_files_of_four_digits_cut_off_once(tmp_path):
    archive = open_archive(nnunet(tmp_path), needs={"volumes", "masks"})
    assert archive.layout.name == "nnunet"
    found = {record.case_id: (sorted(record.volumes), bool(record.masks), record.split) for record in archive.records}
    assert found == {
        "case_1": (["ADC", "T2w"], True, "train"), "case_2": (["T2w"], False, "train"),
        "site_0001": (["ADC", "T2w"], True, "train"), "case_9": (["T2w"], False, "test"),
    }  # fmt: skip
    assert archive.facts.regions == {"PZ": (1,), "whole": (1, 2)}
    assert archive.facts.label_values == {0, 1, 2}
    assert Account(archive).count("unknown") == Account(archive).count("ignored") == 0


def test_names_of_the_first_version(tmp_path):
    root = nnunet(tmp_path)
    content = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ"}, "training": []}
    (root / "dataset.json").write_text(json.dumps(content))
    archive = open_archive(root, needs={"volumes"})
    assert archive.layout.name == "nnunet"
    assert archive.facts.regions == {"PZ": (1,)}


def test_several_data_sets_are_refused_by_name_and_one_is_read(tmp_path):
    nnunet(tmp_path / "Dataset001_A")
    assert len(open_archive(tmp_path, needs={"volumes"}).records) == 4
    nnunet(tmp_path / "Dataset002_B")
    with pytest.raises(DataError, match=r"holds 2 data sets \(Dataset001_A, Dataset002_B\): give one of these folders"):
        open_archive(tmp_path, needs={"volumes"})


@pytest.mark.parametrize(
    ("labels", "message"),
    [({}, "needs labels"), ([1], "needs labels"), ({"lesion": "x"}, "gives the label lesion the value 'x'"),
     ({"lesion": 1, "ignore": 2}, "has the label ignore, which the loss here cannot ignore"),
     ({"lesion": []}, "not a whole number")],
)  # fmt: skip
def test_labels_that_mean_nothing(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        read_labels(labels, tmp_path / "dataset.json")


def test_channels_that_are_not_named_or_numbered(tmp_path):
    with pytest.raises(DataError, match="must number its channels from 0"):
        open_archive(nnunet(tmp_path / "a", channel_names={"1": "T2"}), needs={"volumes"})
    with pytest.raises(DataError, match=r"case_1_0001.nii.gz is of channel 1, and dataset.json names 1: T2"):
        open_archive(nnunet(tmp_path / "b", channel_names={"0": "T2"}), needs={"volumes"})


@pytest.mark.real_data
def test_a_real_data_set_in_both_forms(real_data, tmp_path):
    """Archives.md, case 3: ten cases and three for testing, two regions, and equal voxels as nnU-Net."""
    root = real_data("msd_hippocampus")
    archive = open_archive(root, needs={"volumes", "masks"})
    assert (archive.layout.name, len(archive.records)) == ("msd", 13)
    assert sum(record.split == "test" for record in archive.records) == 3
    assert list(archive.facts.regions) == ["Anterior", "Posterior"]
    assert Account(archive).count("used") == 24
    other = tmp_path / "nnunet"
    for part in ("imagesTr", "imagesTs"):
        (other / part).mkdir(parents=True)
        for path in (root / part).glob("*.nii.gz"):
            shutil.copy(path, other / part / path.name.replace(".nii.gz", "_0000.nii.gz"))
    shutil.copytree(root / "labelsTr", other / "labelsTr")
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}}
    (other / "dataset.json").write_text(json.dumps(content | {"numTraining": 10, "file_ending": ".nii.gz"}))
    twin = open_archive(other, needs={"volumes", "masks"})
    assert twin.layout.name == "nnunet"
    assert sorted(record.case_id for record in twin.records) == sorted(record.case_id for record in archive.records)
    first, second = ({record.case_id: record for record in found.records} for found in (archive, twin))
    for case in sorted(first)[:3]:
        one, two = (
            prepare_case(case_of(records[case]), prepared(found), ("MRI",))
            for records, found in ((first, archive), (second, twin))
        )
        assert np.array_equal(one.image, two.image)
        assert np.array_equal(one.label, two.label)
