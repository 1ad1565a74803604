import math

import pytest

from common.errors import DataError
from datamodules.labelled.chexpert import CheXpert

HEADER = "Path,Sex,Frontal/Lateral,Cardiomegaly,Edema,Consolidation,Atelectasis,Pleural Effusion,Fracture\n"
TRAIN = f"""{HEADER}CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,F,Frontal,-1.0,-1.0,-1,-1,-1.0,-1.0
CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg,F,Lateral,1.0,0.0,,1,0,1
CheXpert-v1.0-small/train/patient00002/study9/view1_frontal.jpg,M,Frontal,,,,,,
"""
VALID = f"{HEADER}CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,M,Frontal,1.0,0.0,1.0,0.0,1.0,0.0\n"


def write(root, train=TRAIN, valid=VALID):
    root.mkdir(parents=True, exist_ok=True)
    (root / "train.csv").write_text(train)
    (root / "valid.csv").write_text(valid)
    return root


@pytest.mark.parametrize("folder", ["CheXpert-v1.0-small", "CheXpert-v1.0", "."])
def test_both_tables(tmp_path, folder):
    root = write(tmp_path / folder)
    images = CheXpert().find(tmp_path)
    assert [image.case_id for image in images] == [
        "train/patient00001/study1/view1_frontal.jpg",
        "train/patient00001/study1/view2_lateral.jpg",
        "train/patient00002/study9/view1_frontal.jpg",
        "valid/patient64541/study1/view1_frontal.jpg",
    ]
    assert [image.image for image in images] == [root / image.case_id for image in images]
    assert [image.patient_id for image in images] == ["patient00001"] * 2 + ["patient00002", "patient64541"]
    assert [image.split for image in images] == ["train"] * 3 + ["test"]
    assert CheXpert().find(root) == images


def test_labels_in_the_order_of_the_competition(tmp_path):
    layout = CheXpert()
    assert layout.classes == ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    _, certain, blank, test = layout.find(write(tmp_path))
    assert certain.targets == (1, 1, 0, 0, 0)
    assert blank.targets == (0, 0, 0, 0, 0)
    assert test.targets == (0, 1, 1, 0, 1)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("mixed", (1, 0, 0, 1, 1, None)),
        ("ones", (1,) * 6),
        ("zeros", (0,) * 6),
        ("ignore", (None,) * 6),
    ],
)
def test_uncertain_labels(tmp_path, policy, expected):
    layout = CheXpert(policy, classes=[*CheXpert().classes, "Fracture"])
    targets = layout.find(write(tmp_path))[0].targets
    assert tuple(None if math.isnan(target) else target for target in targets) == expected


def test_only_frontal_images(tmp_path):
    images = CheXpert(frontal_only=True).find(write(tmp_path))
    assert [image.case_id[-16:] for image in images] == ["iew1_frontal.jpg"] * 3
    assert images[1].targets == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Edema", "Oedema", "train.csv has no column Edema; it has Path, Sex, Frontal/Lateral, Cardiomegaly, Oedema"),
        ("Path", "File", "has no column Path"),
        (",1.0,0.0,,1,", ",2.0,0.0,,1,",
         "gives train/patient00001/study1/view2_lateral.jpg the Cardiomegaly '2.0'; known are '1.0', '1', '0.0'"),
        ("/train/patient00002", "/train/../patient00002", "has 1 rows whose Path is not like CheXpert.*, first '"),
        ("CheXpert-v1.0-small/train/patient00001", "patient00001/x", "has 2 rows whose Path is not like"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path, old, new, message):
    with pytest.raises(DataError, match=message):
        CheXpert().find(write(tmp_path, TRAIN.replace(old, new)))


def test_roots_without_a_table(tmp_path):
    with pytest.raises(DataError, match=r"holds no train.csv, so it is not CheXpert \(ROOT"):
        CheXpert().find(tmp_path)
    write(tmp_path)
    (tmp_path / "valid.csv").unlink()
    with pytest.raises(DataError, match=r"holds no valid.csv, so it is not CheXpert"):
        CheXpert().find(tmp_path)


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="`uncertain` must be one of mixed, ones, zeros, ignore, got 'maybe'"):
        CheXpert("maybe")
