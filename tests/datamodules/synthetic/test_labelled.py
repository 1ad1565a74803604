import csv
import math
import sys

import numpy as np
import pytest

from common.errors import UserError
from datamodules.images.reading import read_gray
from datamodules.labelled.chexpert import CheXpert
from datamodules.labelled.covid import CovidFindings
from datamodules.labelled.nih_cxr import NIHChestXray14
from datamodules.labelled.rsna import RSNAPneumonia
from datamodules.labelled.siim import SIIMPneumothorax, decode_runs
from datamodules.reports.covid_cxr import find_covid
from datamodules.splits import check_patients
from datamodules.synthetic.command import WRITERS, synthesize
from datamodules.synthetic.labelled import write_chexpert, write_covid_cxr, write_nih, write_rsna, write_siim
from datamodules.tree import Tree

SIZE = (64, 80)
LAYOUTS = {
    "chexpert": (write_chexpert, CheXpert()),
    "nih_cxr": (write_nih, NIHChestXray14()),
    "rsna": (write_rsna, RSNAPneumonia()),
    "covid_cxr": (write_covid_cxr, CovidFindings()),
    "siim": (write_siim, SIIMPneumothorax()),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Sixteen cases of each archive."""
    pytest.importorskip("pydicom")
    root = tmp_path_factory.mktemp("synthetic")
    for name, (write, _) in LAYOUTS.items():
        write(root / name, 16, seed=0, size=SIZE)
    return root


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_image_can_be_read(roots, name):
    images = LAYOUTS[name][1].find(roots / name)
    assert len(images) == (21 if name == "chexpert" else 16)
    assert {read_gray(image.image).shape for image in images} == {SIZE}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_seed_writes_the_same_bytes(roots, name, tmp_path):
    write, layout = LAYOUTS[name]
    write(tmp_path / "again", 16, seed=0, size=SIZE)
    write(tmp_path / "other", 1, seed=1, size=SIZE)
    files = [path.relative_to(roots / name) for path in sorted((roots / name).rglob("*")) if path.is_file()]
    assert files == [path.relative_to(tmp_path / "again") for path in sorted((tmp_path / "again").rglob("*"))
                     if path.is_file()]  # fmt: skip
    assert all((roots / name / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    first, other = layout.find(roots / name)[0], layout.find(tmp_path / "other")[0]
    assert first.image.read_bytes() != other.image.read_bytes()


@pytest.mark.parametrize("name", ["chexpert", "nih_cxr"])
def test_official_splits_have_both_classes(roots, name):
    layout = LAYOUTS[name][1]
    images = layout.find(roots / name)
    check_patients(images, {image.case_id: image.split for image in images})
    for split in ("train", "test"):
        targets = np.array([image.targets for image in images if image.split == split])
        seen = {layout.classes[n] for n in np.flatnonzero((targets == 1).any(0) & (targets == 0).any(0))}
        drawn = {"Cardiomegaly", "Consolidation", "Effusion", "Nodule", "Pneumothorax"}
        assert seen == (drawn if name == "nih_cxr" else set(layout.classes))


@pytest.mark.parametrize("name", ["siim", "nih_cxr", "chexpert"])
def test_every_patient_has_both_classes(roots, name):
    """So any split by patient has both."""
    layout = CheXpert(classes=["Cardiomegaly", "Consolidation", "Pleural Effusion"], frontal_only=True)
    images = (layout if name == "chexpert" else LAYOUTS[name][1]).find(roots / name)
    for patient in {image.patient_id for image in images}:
        first, second = (np.array(image.targets) for image in images if image.patient_id == patient)
        drawn = slice(None) if name != "nih_cxr" else [1, 2, 5, 7, 8]
        assert np.array_equal(first[drawn], 1 - second[drawn])


def test_chexpert_doubts_what_the_mixed_policy_resolves(roots):
    folder = roots / "chexpert/CheXpert-v1.0-small"
    train, valid = table(folder / "train.csv"), table(folder / "valid.csv")
    assert len(train[0]) == 19
    assert {row["Frontal/Lateral"] for row in train} == {"Frontal", "Lateral"}
    assert {value for row in train for value in list(row.values())[5:]} == {"", "0.0", "1.0", "-1.0"}
    assert {value for row in valid for value in list(row.values())[5:]} == {"0.0", "1.0"}
    ignoring = CheXpert("ignore").find(roots / "chexpert")
    unknown = [math.isnan(target) for image in ignoring for target in image.targets]
    assert 0 < sum(unknown) < len(unknown) / 2


def test_nih_has_the_defects_of_the_real_one(roots):
    root = roots / "nih_cxr"
    assert not (root / "test_list.txt").read_text().endswith("\n")
    assert {path.parent.parent.name for path in root.rglob("*.png")} == {"images_001", "images_002"}
    assert len(table(root / "Data_Entry_2017_v2020.csv")[0]) == 11


def test_boxes_of_rsna_lie_in_the_image_on_the_side_of_the_opacity(roots):
    rows = table(roots / "rsna/stage_2_train_labels.csv")
    positive = [row for row in rows if row["Target"] == "1"]
    assert len({row["patientId"] for row in positive}) == 8 < len(positive)
    for row in positive:
        x, y, width, height = (float(row[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + width <= 40 or (x >= 40 and x + width <= 80)
        assert y + height <= 64
        assert 8 < width < 30
        assert 8 < height < 30
    kinds = table(roots / "rsna/stage_2_detailed_class_info.csv")
    assert len(kinds) == len(rows)
    assert {row["class"] for row in kinds} == {"Normal", "Lung Opacity", "No Lung Opacity / Not Normal"}


def test_covid_has_the_defects_of_the_real_one(roots):
    root = roots / "covid_cxr"
    rows = table(root / "metadata.csv")
    assert len(rows[0]) == 29
    assert {"todo", "No Finding"} < {row["finding"] for row in rows}
    assert {row["view"] for row in rows} == {"PA", "AP", "AP Supine", "L", "Axial"}
    images = CovidFindings().find(root)
    assert len({image.patient_id for image in images}) == len({image.group for image in images}) == 13
    viral = CovidFindings("viral").find(root)
    for found, counts in ((images, (6, 7)), (viral, (7, 5))):
        positive = {image.patient_id for image in found if image.targets == (1,)}
        assert (len(positive), len({image.patient_id for image in found} - positive)) == counts
    assert len(CovidFindings(views=["L"]).find(root)) == 4


def test_covid_has_notes(roots):
    studies = find_covid(Tree(roots / "covid_cxr"))
    assert all(study.text for study in studies)
    assert len({study.text for study in studies}) == 15


def test_masks_of_siim_lie_where_the_lung_is_not(roots):
    counts = []
    for image in SIIMPneumothorax().find(roots / "siim"):
        mask = decode_runs(image.masks, SIZE) > 0
        assert mask.any() == (image.targets == (1,))
        if mask.any():
            assert 0.03 < mask.mean() < 0.25
            pixels = read_gray(image.image)
            assert pixels[mask].mean() < 0.6 * pixels[~mask].mean()
            counts.append(len(image.masks))
    assert set(counts) == {1, 2}


def test_writers_are_known(tmp_path):
    assert set(LAYOUTS) < set(WRITERS)
    assert synthesize("chexpert", tmp_path / "chexpert", 1)
    assert [image.split for image in CheXpert().find(tmp_path / "chexpert")] == ["train"]


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"needs pydicom: install it with pip install 'medmim\[dicom\]'"):
        write_rsna(tmp_path, 1, seed=0, size=SIZE)
