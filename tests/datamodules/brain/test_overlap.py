"""The same scans under several names, in pre-training, segmentation and classification alike."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from common.errors import DataError
from datamodules.brain.datamodule import BrainDataModule
from datamodules.brain.labels import LabelSource
from datamodules.brain.tasks import BrainClassDataModule, BrainTaskDataModule
from datamodules.synthetic.brain import write_tree
from datamodules.volumes.datamodule import CropConfig, LabelConfig, VolumeCacheConfig, VolumeLoaderConfig
from datamodules.volumes.reading import write_nifti

CROPS = CropConfig((16, 16, 16), flip_axes=(), overhang=0.0)
SETTINGS = {"atlas": (40, 44, 36), "crops": CROPS, "batch_size": 2, "seed": 1}
GRADES = LabelSource({"LGG": ["LGG"], "HGG": ["HGG"]}, attribute="grade")


def ready(made):
    made.prepare_data()
    made.setup("fit")
    return made


def pre_training(root, **options):
    return BrainDataModule(str(root), **SETTINGS | options)


def segmentation(root, **options):
    return BrainTaskDataModule(str(root), labels=LabelConfig(needed=True), **SETTINGS | options)


def classification(root, **options):
    return BrainClassDataModule(str(root), classes=GRADES, resize=None, **SETTINGS | options)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    root = tmp_path_factory.mktemp("graded")
    write_tree(root, 6, 2, "brats2018", (40, 44, 36))
    return root


@pytest.fixture
def root(graded, tmp_path):
    """Six patients with a grade and a label each."""
    return shutil.copytree(graded, tmp_path / "root")


def cases_of(root):
    return sorted(root.glob("*/*/"))


def copy_under_another_name(case, name):
    shutil.copytree(case, case.parent / name)
    for path in (case.parent / name).iterdir():
        path.rename(path.with_name(path.name.replace(case.name, name)))


@pytest.mark.parametrize("cache", ["npy", "none"])
@pytest.mark.parametrize("make", [pre_training, segmentation, classification])
def test_a_scan_under_two_names_is_refused(root, make, cache):
    assert len(ready(make(root, cache=VolumeCacheConfig(cache))).cases_in_use()) == 6
    copy_under_another_name(cases_of(root)[0], "Brats18_9999_1")
    with pytest.raises(DataError, match=r"are the same study under two names: .* equal byte by byte"):
        ready(make(root, cache=VolumeCacheConfig(cache)))


@pytest.mark.parametrize("make", [pre_training, segmentation, classification])
def test_releases_that_rename_each_other_are_refused(root, make):
    for name in ("BraTS2021_00001", "BraTS-GLI-00001-000"):
        copy_under_another_name(cases_of(root)[0], name)
    with pytest.raises(DataError, match=r"BraTS 2023-GLI \(1 studies\) is BraTS 2021 \(1 studies\) under new names"):
        make(root, layout="brats2021").index()


def replaced(root, content):
    """Give two patients the same T2: an array like ``content(shape)``, or bytes that are no volume."""
    for case in cases_of(root)[:2]:
        path = next(case.glob("*_t2.nii.gz"))
        image = nib.load(path)
        write_nifti(path, content(image.shape), image.affine) if callable(content) else path.write_bytes(content)


@pytest.mark.parametrize("content", [np.zeros, lambda shape: np.full(shape, np.nan), b"no volume"])
@pytest.mark.parametrize("cache", ["npy", "none"])
def test_files_that_show_nothing_are_no_copies(root, cache, content):
    replaced(root, content)
    data = ready(pre_training(root, cache=VolumeCacheConfig(cache), loader=VolumeLoaderConfig(max_fault_fraction=0.5)))
    assert len(data.cases_in_use()) == 6
    assert not any("several patients" in reason for reason in data.examine(True, 1))


def test_a_sequence_that_the_intensity_scale_leaves_nothing_of_is_no_copy(root):
    def speck(shape):
        return (np.arange(np.prod(shape)).reshape(shape) == 7).astype(np.int16)

    replaced(root, speck)
    assert [fault.kind for fault in ready(pre_training(root)).ledger.faults] == ["constant"] * 2
