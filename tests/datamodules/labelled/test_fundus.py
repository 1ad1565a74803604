"""Graded and labelled eyes: official trees, synthetic and real, and what can be wrong with them."""

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from datamodules.configs import CacheConfig, SplitConfig
from datamodules.genetics.datamodule import ImageGenomeDataModule, PictureConfig
from datamodules.genetics.tcga import TCGAGrade, read_omics
from datamodules.genetics.ukb import UKBRisk, find_ukb, read_phenotypes, split_of_eids
from datamodules.images.pictures import pictures_of
from datamodules.images.reading import read_field_of_view
from datamodules.images.values import ImageError
from datamodules.labelled.fundus import APTOS2019, EyePACS2015, IDRiD, RFMiD, ordinal_targets
from datamodules.labelled.palm import PALM, find_palm, palm_masks, read_structure
from datamodules.loading import Draw
from datamodules.registry import open_archive
from datamodules.synthetic.command import synthesize
from datamodules.synthetic.fundus import write_aptos, write_idrid, write_palm, write_rfmid, write_tcga, write_ukb
from datamodules.tree import Tree

SIZE = {"size": (40, 52)}


def shown(root):
    archive = open_archive(root, needs={"images"})
    return archive.layout, pictures_of(archive)


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
    found, pictures = shown(tmp_path)
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
    with pytest.raises(DataError, match="not a file name"):
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
    masks = palm_masks(Tree(tmp_path))
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
    assert [picture.split for picture in find_palm(Tree(tmp_path))] == [None] * 6


def test_photographs_of_ukb(tmp_path):
    write_ukb(tmp_path, 2, 0, **SIZE)
    pictures = find_ukb(Tree(tmp_path))
    assert len(pictures) == 15
    (tmp_path / "fundus" / "-1_21015_0_0.png").write_bytes(b"x")
    (tmp_path / "fundus" / "notes_21015.png").write_bytes(b"x")
    assert find_ukb(Tree(tmp_path)) == pictures
    (tmp_path / "ancestry.tsv").write_text(
        f"IID\tEUR\n{pictures[0].patient_id}\t0.995\n{pictures[-1].patient_id}\t0.5\n"
    )
    assert {picture.patient_id for picture in find_ukb(Tree(tmp_path))} == {pictures[0].patient_id}
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "qc_paths_left.txt").write_text(f"{pictures[0].image.name}\n")
    assert [picture.case_id for picture in find_ukb(Tree(tmp_path))] == [pictures[0].case_id]
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
    omics = read_omics(Tree(tmp_path))
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
    assert len(shown(real_data("rfmid"))[1]) == 3


def test_a_lesion_is_cut_as_its_image(tmp_path):
    """The field of view is off the centre, so that a mask that were only resized would lie elsewhere."""
    write_palm(tmp_path, 2, 0, **SIZE)
    for path in tmp_path.rglob("*.*"):
        image = Image.open(path)
        moved = Image.new(image.mode, (image.width + 90, image.height + 30), 255 if path.suffix == ".bmp" else 0)
        moved.paste(image, (70, 20))
        moved.save(path)
    sizes = {"image": PictureConfig((40, 40)), "cache": CacheConfig(side=48), "split": SplitConfig((0.5, 0.5, 0.0))}
    data = ImageGenomeDataModule(str(tmp_path), "palm", batch_size=2, **sizes)
    data.prepare_data()
    data.setup("fit")
    (batch,) = list(data.val_dataloader())
    ill = [name[0] == "P" for name in batch["subject_id"]]
    assert batch["lesion"].shape == (len(ill), 40, 40)
    assert batch["lesion"].any((1, 2)).tolist() == ill
    assert any(ill)
    picture = next(picture for picture in find_palm(Tree(tmp_path)) if picture.lesion)
    image = PALM.facts.reader.read(picture.image, 48)
    mask = PALM.facts.read_lesion(picture.lesion, picture.image, 48)
    assert mask.shape == image.shape[:2]
    # Atrophy is drawn pale.
    gray = image.mean(-1)
    eye = gray > 20
    assert gray[mask == 1].mean() > gray[eye & (mask == 0)].mean() + 20
    assert "lesion" not in next(iter(data.train_dataloader()))
    picture.lesion.write_bytes(b"no image")
    dataset = data.val_dataloader().dataset
    dataset.samples = [s for s in data.all_cases() if s.case_id == picture.case_id]
    sample = dataset.read(Draw(0, 0, 0))
    assert not sample["lesion"].any()
    assert [fault.kind for fault in sample["faults"]] == ["unreadable"]


def test_relatives_are_not_on_both_sides(tmp_path):
    write_ukb(tmp_path, 5, seed=0, **SIZE)
    plain = ImageGenomeDataModule(str(tmp_path), genetics=False)
    plain.index()
    part = {sample.patient_id: name for name, samples in plain.splits.items() for sample in samples}
    one, other = (next(eid for eid, name in part.items() if name == split) for split in ("train", "test"))
    (tmp_path / "rel.dat").write_text(f"ID1 ID2 HetHet IBS0 Kinship\n{one} {other} 0.1 0.01 0.25\n")
    data = ImageGenomeDataModule(str(tmp_path), genetics=False, kinship=str(tmp_path / "rel.dat"))
    data.index()
    moved = {sample.patient_id: name for name, samples in data.splits.items() for sample in samples}
    assert moved == part | {one: "test"}
    everyone = "".join(f"{eid} {other} 0.1 0.01 0.25\n" for eid in part)
    (tmp_path / "rel.dat").write_text(f"ID1 ID2 HetHet IBS0 Kinship\n{everyone}")
    with pytest.raises(DataError, match="nobody is left"):
        ImageGenomeDataModule(str(tmp_path), genetics=False, kinship=str(tmp_path / "rel.dat")).index()
