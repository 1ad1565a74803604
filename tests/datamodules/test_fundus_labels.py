"""Graded and labelled eyes: official trees, synthetic and real, and what can be wrong with them."""

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from datamodules.fundus_labels import APTOS2019, EyePACS2015, IDRiD, RFMiD, ordinal_targets
from datamodules.images import ImageError, read_field_of_view
from datamodules.layouts import PICTURE_LAYOUTS, recognise
from datamodules.palm import find_palm, palm_masks, read_structure
from datamodules.synthetic import synthesize
from datamodules.synthetic_fundus import write_aptos, write_idrid, write_palm, write_rfmid, write_tcga, write_ukb
from datamodules.tcga import TCGAGrade, read_omics
from datamodules.ukb import UKBRisk, find_ukb, read_phenotypes, split_of_eids

SIZE = {"size": (40, 52)}


def write_table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    ("write", "layout"),
    [(write_ukb, "ukb"), (write_tcga, "tcga_gbmlgg"), (write_idrid, "idrid"), (write_aptos, "aptos2019"),
     (write_rfmid, "rfmid"), (write_palm, "palm")],
)  # fmt: skip
def test_every_tree_is_recognised(write, layout, tmp_path):
    write(tmp_path, 2, 0, **({} if layout == "tcga_gbmlgg" else SIZE))
    found, pictures = recognise(tmp_path, "auto", PICTURE_LAYOUTS)
    assert found.name == layout
    assert pictures
    assert all(picture.image.is_file() for picture in pictures)
    assert len({picture.case_id for picture in pictures}) == len(pictures)


def test_ordinal_targets_and_the_official_split_of_idrid(tmp_path):
    assert ordinal_targets(2) == (1, 1, 1, 0, 0)
    write_idrid(tmp_path, 2, 0, **SIZE)
    images = IDRiD().find(tmp_path)
    assert [sum(item.split == part for item in images) for part in ("train", "test")] == [8, 4]
    assert images[0].case_id == "train/IDRiD_001"
    assert images[3].targets == (1, 1, 1, 1, 0)


def test_names_stay_names_and_grades_are_grades(tmp_path):
    write_table(tmp_path / "train.csv", "id_code,diagnosis", "0001,4", "0002,0")
    assert [item.case_id for item in APTOS2019().find(tmp_path)] == ["0001", "0002"]
    write_table(tmp_path / "train.csv", "id_code,diagnosis", "0001,7")
    with pytest.raises(DataError, match="'7'"):
        APTOS2019().find(tmp_path)
    write_table(tmp_path / "train.csv", "id_code,diagnosis", "a,1", "a,2")
    with pytest.raises(DataError, match="lists a twice"):
        APTOS2019().find(tmp_path)
    write_table(tmp_path / "train.csv", "id_code,diagnosis", "../a,1")
    with pytest.raises(DataError, match="no name of a file"):
        APTOS2019().find(tmp_path)


def test_eyes_of_a_patient_stay_together(tmp_path):
    write_table(tmp_path / "trainLabels.csv", "image,level", "10_left,0", "10_right,2", "11_left,1")
    assert [item.patient_id for item in EyePACS2015().find(tmp_path)] == ["10", "10", "11"]


def test_conditions_of_rfmid(tmp_path):
    write_rfmid(tmp_path, 2, 0, **SIZE)
    layout = RFMiD()
    images = layout.find(tmp_path)
    assert layout.classes == ("DR", "MYA", "HR")
    assert [sum(item.split == part for item in images) for part in ("train", "val", "test")] == [8, 4, 4]
    assert len({item.case_id for item in images}) == 16
    fewer = RFMiD(leave_out=["HR"], risk=True)
    fewer.find(tmp_path)
    assert fewer.classes == ("Disease_Risk", "DR", "MYA")
    with pytest.raises(DataError, match="RFMiD_Training_Labels"):
        RFMiD().find(tmp_path / "Test_Set")


def test_structures_of_palm(tmp_path):
    write_palm(tmp_path, 3, 0, **SIZE)
    masks = palm_masks(tmp_path)
    assert len(masks["disc"]) == 6
    assert sorted(masks["atrophy"]) == ["P0002", "P0004", "P0006"]
    disc = read_structure(masks["disc"]["P0002"], (40, 52))
    assert 0 < disc.sum() < 0.2 * disc.size
    assert not read_structure(None, (40, 52)).any()
    with pytest.raises(ImageError, match="40 x 52 pixels, its image 41 x 52"):
        read_structure(masks["disc"]["P0002"], (41, 52))
    Image.fromarray(np.full((40, 52), 120, dtype=np.uint8)).save(tmp_path / "odd.bmp")
    with pytest.raises(ImageError, match="holds 120"):
        read_structure(tmp_path / "odd.bmp", (40, 52))
    assert [picture.split for picture in find_palm(tmp_path)] == [None] * 6


def test_photographs_of_ukb(tmp_path):
    write_ukb(tmp_path, 2, 0, **SIZE)
    pictures = find_ukb(tmp_path)
    assert len(pictures) == 15
    (tmp_path / "fundus" / "-1_21015_0_0.png").write_bytes(b"x")
    (tmp_path / "fundus" / "notes_21015.png").write_bytes(b"x")
    assert find_ukb(tmp_path) == pictures
    (tmp_path / "ancestry.tsv").write_text(
        f"IID\tEUR\n{pictures[0].patient_id}\t0.995\n{pictures[-1].patient_id}\t0.5\n"
    )
    assert {picture.patient_id for picture in find_ukb(tmp_path)} == {pictures[0].patient_id}
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "qc_paths_left.txt").write_text(f"{pictures[0].image.name}\n")
    assert [picture.case_id for picture in find_ukb(tmp_path)] == [pictures[0].case_id]
    assert split_of_eids([str(i) for i in range(100)]) == split_of_eids([str(i) for i in reversed(range(100))])
    assert sorted(split_of_eids([str(i) for i in range(100)]).values()).count("val") == 10


def test_phenotypes(tmp_path):
    write_table(
        tmp_path / "phenotypes.csv",
        "eid,31-0.0,21022-0.0,21001-0.0,20116-0.0,4080-0.0,4080-0.1,4079-0.0,4079-0.1",
        "1,1,50,25,2,140,150,80,",
        "2,0,60,,-3,,,,",
    )  # fmt: skip
    table = read_phenotypes(tmp_path / "phenotypes.csv")
    assert table.loc["1"].tolist() == [50, 25, 145, 80, 1, 1]
    assert table.loc["2"].isna().tolist() == [False, True, True, True, False, True]
    with pytest.raises(DataError, match="No photograph"):
        UKBRisk().find(tmp_path)
    write_table(tmp_path / "phenotypes.csv", "eid,31-0.0", "1,1")
    with pytest.raises(DataError, match="no column 21022-0"):
        UKBRisk().find(tmp_path)


def test_gliomas(tmp_path):
    write_tcga(tmp_path, 3, 0)
    omics = read_omics(tmp_path)
    assert len(omics.features) == 80
    assert "codeletion" not in omics.features
    images = TCGAGrade().find(tmp_path)
    assert {item.targets for item in images} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    assert len({item.patient_id for item in images}) == 16
    write_table(tmp_path / "grade_data.csv", "TCGA ID,Grade", "TCGA-00-1000,5")
    with pytest.raises(DataError, match="the grade '5'"):
        TCGAGrade().find(tmp_path)


def test_the_field_of_view_is_cut_out_of_the_dark(tmp_path):
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    image[10:50, 30:70] = np.random.default_rng(0).integers(60, 200, (40, 40, 3))
    image[2, 3] = 255
    Image.fromarray(image).save(tmp_path / "eye.png")
    cut = read_field_of_view(tmp_path / "eye.png")
    assert np.array_equal(cut, image[10:50, 30:70])
    assert read_field_of_view(tmp_path / "eye.png", 32).shape == (32, 32, 3)
    Image.fromarray(np.where(image > 250, 15, 10).astype(np.uint8)).save(tmp_path / "dark.png")
    with pytest.raises(ImageError, match="no field of view"):
        read_field_of_view(tmp_path / "dark.png")


def test_synthesized_by_name(tmp_path):
    assert synthesize("idrid", tmp_path / "idrid", 1)
    assert not synthesize("idrid", tmp_path / "idrid", 1)


@pytest.mark.real_data
def test_real_archives(real_data):
    images = IDRiD().find(real_data("idrid"))
    assert [sum(item.split == part for item in images) for part in ("train", "test")] == [413, 103]
    assert [sum(sum(item.targets) == grade + 1 for item in images if item.split == "test") for grade in range(5)] == [
        34, 5, 32, 19, 13]  # fmt: skip
    layout = RFMiD()
    labelled = layout.find(real_data("rfmid"))
    assert len(layout.classes) == 45
    assert len(labelled) == 1920
    assert sum(item.image.is_file() for item in labelled) == 3
    assert len(recognise(real_data("rfmid"), "auto", PICTURE_LAYOUTS)[1]) == 3
