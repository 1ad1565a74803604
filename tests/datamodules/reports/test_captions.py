"""MedICaT, ROCO and MELINDA."""

import json

import pandas as pd
import pytest
from PIL import Image

from common.errors import DataError
from datamodules.registry import open_archive
from datamodules.reports.medicat import find_medicat, read_figures
from datamodules.reports.melinda import read_melinda
from datamodules.reports.roco import find_roco, read_captions, read_part
from datamodules.reports.studies import studies_of
from datamodules.synthetic.figures import write_medicat, write_melinda, write_roco
from datamodules.tree import Tree


def told(root):
    archive = open_archive(root, needs={"images", "text"})
    return archive.layout, studies_of(archive)


@pytest.fixture(scope="module")
def medicat_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("medicat")
    write_medicat(root, 2, 0)
    return root


@pytest.fixture(scope="module")
def roco_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("roco")
    write_roco(root, 2, 0)
    return root


def test_medicat_has_a_study_for_each_text(medicat_root):
    layout, studies = told(medicat_root)
    assert layout.name == "medicat"
    (path,) = (medicat_root / "release").glob("*.jsonl")
    figures = read_figures(path)
    assert len(figures) == 16
    assert figures[1].caption, "the caption of the other source stands in for one that is null"
    assert sum(figure.radiology for figure in figures) == 15
    assert len({study.images[0] for study in studies}) == 15
    assert len(studies) == 15 + sum(bool(figure.references) for figure in figures if figure.radiology)
    assert all(study.images[0].is_file() and study.patient_id in study.case_id for study in studies)
    assert len({study.images[0] for study in find_medicat(Tree(medicat_root), radiology_only=False)}) == 16


def test_medicat_with_damage(tmp_path):
    write_medicat(tmp_path, 1, 0)
    (path,) = (tmp_path / "release").glob("*.jsonl")
    first, *rest = path.read_text().splitlines()
    figure = json.loads(first)
    (tmp_path / "release/figures" / f"{figure['pdf_hash']}_{figure['fig_uri']}").unlink()
    silent = json.loads(rest[1]) | {"s2_caption": "Figure 1", "s2orc_caption": None, "s2orc_references": None}
    path.write_text("\n".join([first, rest[0], json.dumps(silent), *rest[2:]]))
    assert len({study.images[0] for study in find_medicat(Tree(tmp_path))}) == 5
    path.write_text(first + "\n{broken")
    with pytest.raises(DataError, match="line 2 cannot be read as JSON"):
        find_medicat(Tree(tmp_path))


def test_roco_under_both_names(roco_root):
    layout, studies = told(roco_root)
    assert layout.name == "roco"
    assert {study.split for study in studies} == {"train", "val", "test"}
    names = {study.split: study.images[0].name for study in studies}
    assert names["train"].startswith("ROCO_")
    assert names["test"].startswith("PMC")
    assert len(studies) == 16
    assert not studies[0].text.startswith(" ")


def test_roco_with_images_gone(tmp_path):
    write_roco(tmp_path, 2, 0)
    images = sorted((tmp_path / "train/radiology/images").iterdir())
    images[0].unlink()
    captions = tmp_path / "train/radiology/captions.txt"
    lines = captions.read_text().splitlines()
    lines[1] = lines[1].split("\t")[0] + "\t "
    lines[2] = lines[2].replace("\t", "\t one\ttab and ")
    captions.write_text("\n".join(lines))
    studies = find_roco(Tree(tmp_path))
    assert len(studies) == 14
    assert any("one tab and" in study.text for study in studies)
    for image in images[1:]:
        image.unlink()
    for split in ("validation", "test"):
        for image in (tmp_path / split / "radiology/images").iterdir():
            image.unlink()
    with pytest.raises(DataError, match="none of their images"):
        find_roco(Tree(tmp_path))


def test_references_join_rocos_captions(tmp_path):
    write_roco(tmp_path, 2, 0)
    fetched = next((tmp_path / "test/radiology/images").iterdir()).name
    row = {"roco_image_id": fetched, "gorc_references": ["A sentence about the figure.", "short"]}
    (tmp_path / "roco_test_references.jsonl").write_text(json.dumps(row))
    texts = [study.text for study in find_roco(Tree(tmp_path)) if study.images[0].name == fetched]
    assert len(texts) == 2
    assert texts[1] == "A sentence about the figure."


def test_references_to_roco_lie_in_the_release_of_medicat(tmp_path, capsys):
    """As MedICaT's archive unpacks: ``net/nfs2.corp/...`` beside ``release``."""
    write_medicat(tmp_path / "medicat", 2, 0)
    write_roco(tmp_path / "roco", 2, 0)
    _, without = told(tmp_path)
    assert "no sentence about a ROCO figure" in capsys.readouterr().out
    folder = tmp_path / "medicat/net/nfs2.corp/allennlp/sanjays/roco_files"
    folder.mkdir(parents=True)
    fetched = {caption.name: caption.fetched for caption in read_part(tmp_path / "roco/train/radiology")}
    name, paper = next(iter(fetched.items()))
    sentences = ["A sentence  about the figure.", "Another one\tabout the same figure."]
    rows = [
        {"roco_image_id": paper, "gorc_references": sentences},
        {"roco_image_id": "PMC1_gone.jpg", "gorc_references": ["It is about a figure that is not here."]},
        {"roco_image_id": paper, "gorc_references": None},
        {"roco_image_id": None, "gorc_references": ["It is about no figure at all."]},
    ]
    (folder / "roco_train_references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "roco/roco_train_references.jsonl").write_text(json.dumps(rows[0]))
    layout, studies = told(tmp_path)
    assert layout.name == "medicat_roco"
    assert "2 of 3 sentences" in capsys.readouterr().out
    added = [study for study in studies if study not in without]
    assert [study.text for study in added] == ["A sentence about the figure.", "Another one about the same figure."]
    assert {(study.split, study.images[0].stem) for study in added} == {("train", name)}


def test_second_roco(tmp_path):
    for split, name in (("train", "train"), ("valid", "valid"), ("test", "test")):
        (tmp_path / name).mkdir()
        Image.new("L", (40, 40)).save(tmp_path / name / f"ROCOv2_{split}_1.jpg")
        table = pd.DataFrame(
            {"ID": [f"ROCOv2_{split}_1", "gone"], "Caption": ["A chest radiograph in one plane.", "b"]}
        )
        table.to_csv(tmp_path / f"{split}_captions.csv", index=False)
    assert {study.split for study in find_roco(Tree(tmp_path))} == {"train", "val", "test"}


def test_medicat_and_roco_together(tmp_path):
    write_medicat(tmp_path / "medicat", 2, 0)
    write_roco(tmp_path / "roco", 2, 0)
    layout, studies = told(tmp_path)
    assert layout.name == "medicat_roco"
    assert all(study.split for study in studies)


def test_melinda(tmp_path):
    write_melinda(tmp_path, 2, 0)
    rows = read_melinda(Tree(tmp_path))
    assert len(rows) == 32
    assert {row.split for row in rows} == {"train", "val", "test"}
    assert len({row.patient_id for row in rows}) == 16
    layout, studies = told(tmp_path)
    assert layout.name == "melinda"
    assert {study.split for study in studies} == {"train", "val"}, "calibration never sees the test split"
    with pytest.raises(DataError, match="no task"):
        read_melinda(Tree(tmp_path), "colour")
    table = pd.read_csv(tmp_path / "train.csv").drop(columns="caption")
    table.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(DataError, match="no column caption"):
        read_melinda(Tree(tmp_path))


def test_melinda_with_other_numbers_than_published(tmp_path, capsys):
    (tmp_path / "melinda_images").mkdir()
    table = pd.DataFrame({"figure_file": ["a.png"], "caption": ["A caption."], "p_meth_label": ["x"]})
    for name, number in (("train", 4344), ("dev", 449), ("test", 578)):
        table.loc[[0] * number].to_csv(tmp_path / f"{name}.csv", index=False)
    assert len(read_melinda(Tree(tmp_path))) == 5371
    assert not capsys.readouterr().out
    (tmp_path / "test.csv").unlink()
    assert len(read_melinda(Tree(tmp_path))) == 4793
    said = capsys.readouterr().out
    assert "(4344 train, 449 val, 0 test) than MELINDA as published (4344 train, 449 val, 578 test)" in said


@pytest.mark.real_data
def test_real_records_parse_without_loss(real_data):
    """MedICaT's ten figures, and the 8,179 captions of ROCO's test split with their papers."""
    (path,) = real_data("medicat_sample").glob("*.jsonl")
    figures = read_figures(path)
    assert len(figures) == 10
    assert [figure.radiology for figure in figures].count(False) == 4
    assert all(figure.caption for figure in figures)
    assert sum(len(figure.references) for figure in figures) == 10
    studies = find_medicat(Tree(real_data("medicat_sample")), radiology_only=False)
    assert len({study.images[0] for study in studies}) == 10
    folder = real_data("roco") / "test/radiology"
    captions = read_part(folder)
    assert len(captions) == len(read_captions(folder / "captions.txt")) == 8179
    assert len({caption.name for caption in captions}) == 8179
    assert all(caption.text and caption.fetched.startswith("PMC") for caption in captions)
