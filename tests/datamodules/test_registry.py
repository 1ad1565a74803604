import importlib
import inspect
import os
import pkgutil
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import datamodules
from common.errors import DataError
from common.modalities import canonical_order
from datamodules.brain.datamodule import BrainDataModule
from datamodules.configs import SplitConfig
from datamodules.genetics.datamodule import ImageGenomeDataModule, PictureConfig
from datamodules.images.plain import natural_order
from datamodules.labelled.layout import LabelLayout
from datamodules.registry import LAYOUTS, VOCABULARY, Settings, open_archive
from datamodules.synthetic.command import synthesize, write_brats
from datamodules.synthetic.figures import write_vqa_rad
from datamodules.synthetic.fundus import write_idrid
from datamodules.synthetic.labelled import write_covid_cxr
from datamodules.tree import Tree, TreeFile
from datamodules.volumes.datamodule import VolumeDataModule
from datamodules.volumes.modalities import under_canonical_names, with_modalities
from datamodules.volumes.pi_cai import gleason_to_isup, read_marksheet
from datamodules.volumes.profiles import PROFILES


@pytest.mark.parametrize("name", ["brats", "pi_cai", "lung"])
def test_trees_are_recognised(name, request, volumes_of):
    layout, cases = volumes_of(request.getfixturevalue(f"{name}_root"))
    assert layout.name.startswith(name)
    assert len(cases) == 8


def test_brats_2023(brats_root, volumes_of):
    layout, cases = volumes_of(brats_root)
    assert layout.modalities == ("t1c", "t1n", "t2f", "t2w")
    assert layout.regions == {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    visits = [case for case in cases if case.patient_id == "BraTS-GLI-00006"]
    assert [case.case_id[-3:] for case in visits] == ["000", "001"]
    assert sorted(cases[2].images) == ["t1c", "t1n", "t2w"]
    assert list(cases[0].labels) == ["seg"]


def test_brats_of_2017_to_2021(tmp_path, volumes_of):
    write_brats(tmp_path / "flat", 2, 0, shape=(40, 44, 36), legacy=True)
    (tmp_path / "graded").mkdir()
    shutil.copytree(tmp_path / "flat", tmp_path / "graded/HGG")
    for root in (tmp_path / "flat", tmp_path / "graded"):
        layout, cases = volumes_of(root)
        assert layout.name == "brats2021"
        assert layout.label_values == {0, 1, 2, 4}
        assert set(cases[0].images) == {"t1ce", "t1", "flair", "t2"}
    forced, _ = volumes_of(tmp_path / "flat", "brats2023")
    assert forced.regions["ET"] == (3,)


def test_pi_cai(pi_cai_root, volumes_of):
    layout, cases = volumes_of(pi_cai_root)
    assert layout.crop_size == (160, 160, 32)
    assert cases[-1].patient_id == cases[-2].patient_id
    assert {case.attributes["csPCa"] for case in cases} == {"0", "1"}
    assert [bool(case.labels) for case in cases] == [True] * 6 + [False, True]
    images, again = volumes_of(pi_cai_root / "images")
    assert images.name == "pi_cai"
    assert len(again) == 8


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("3+3", 1),
        ("0+0", 0),
        ("3+4", 2),
        ("4+3", 3),
        ("4+4", 4),
        ("3+5", 4),
        ("4+5, N/A", 5),
        ('"3+3, 3 + 4"', 2),
        ("", None),
    ],
)
def test_gleason(text, grade):
    assert gleason_to_isup(text) == grade


def test_marksheets_old_and_new(tmp_path):
    (tmp_path / "new.csv").write_text("patient_id,study_id,case_csPCa\n1,10,YES\n2,20,NO\n")
    (tmp_path / "old.csv").write_text('patient_id,study_id,lesion_GS\n1,10,"3+3, 4+3"\n2,20,\n3,30,3+3\n')
    assert [row["csPCa"] for row in read_marksheet(tmp_path / "new.csv").values()] == ["1", "0"]
    assert {key: row["csPCa"] for key, row in read_marksheet(tmp_path / "old.csv").items()} == {
        "1_10": "1",
        "2_20": "0",
        "3_30": "0",
    }
    (tmp_path / "bad.csv").write_text("patient,study\n1,2\n")
    with pytest.raises(DataError, match="not a PI-CAI marksheet"):
        read_marksheet(tmp_path / "bad.csv")


def test_lung(lung_root, volumes_of):
    layout, cases = volumes_of(lung_root)
    assert layout.regions == {"TC": (1, 3), "VD": (1,)}
    assert {case.attributes["disease"] for case in cases} == {"0", "1"}


def test_a_generic_folder(tmp_path, brats_root, volumes_of):
    for index in range(2):
        folder = tmp_path / f"case{index}"
        folder.mkdir()
        for name in ("t1c", "t2w", "seg"):
            source = next((brats_root / "BraTS-GLI-00000-000").glob(f"*-{name}.nii.gz"))
            shutil.copy(source, folder / f"{name}.nii.gz")
    (tmp_path / "cases.csv").write_text("case_id,patient_id,split\ncase0,p,train\ncase1,q,test\n")
    layout, cases = volumes_of(tmp_path)
    assert layout.name == "folder"
    layout, cases = under_canonical_names(layout, cases)
    assert with_modalities(layout, cases, None).modalities == ("t1c", "t2")
    assert with_modalities(layout, cases, ["t2w"]).modalities == ("t2",)
    assert [case.split for case in cases] == ["train", "test"]
    with pytest.raises(DataError, match="No case has the modalities adc; present are t1c, t2w"):
        with_modalities(layout, cases, ["adc"])
    (tmp_path / "cases.csv").write_text("case_id\ncase0\ncase1\ncase9\n")
    with pytest.raises(DataError, match=r"without a folder .* first case9"):
        volumes_of(tmp_path)
    (tmp_path / "cases.csv").write_text("case_id\ncase0\ncase0\n")
    with pytest.raises(DataError, match="lists the case case0 twice"):
        volumes_of(tmp_path)


def test_roots_that_are_nothing_we_know(tmp_path, volumes_of):
    with pytest.raises(DataError, match="is not a folder"):
        volumes_of(tmp_path / "nowhere")
    (tmp_path / "holiday.mov").write_text("x")
    with pytest.raises(DataError, match=r"of no known layout \(it holds holiday.mov\): medmim init DIR shows"):
        volumes_of(tmp_path)
    with pytest.raises(DataError, match=r"is not of the layout pi_cai .* it holds holiday.mov"):
        volumes_of(tmp_path, "pi_cai")
    with pytest.raises(DataError, match="Unknown layout 'brats'; nearest are brats20"):
        volumes_of(tmp_path, "brats")


def test_synthetic_trees_are_written_once(tmp_path):
    assert synthesize("lung", tmp_path / "lung", 2)
    assert not synthesize("lung", tmp_path / "lung", 2)
    assert synthesize("lung", tmp_path / "lung", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.nii").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        synthesize("lung", tmp_path / "mine", 2)
    assert (tmp_path / "mine/precious.nii").exists()
    with pytest.raises(ValueError, match="no synthetic 'knee'"):
        synthesize("knee", tmp_path / "knee", 2)


def test_a_chest_with_one_mask_of_two_is_not_labelled(tmp_path, lung_root, volumes_of):
    """A mask's bit is its place: alone, ventilation would be read as a defect."""
    root = shutil.copytree(lung_root, tmp_path / "lung")
    (root / "lung001/cavity.nii.gz").unlink()
    (root / "lung002/vent.nii.gz").unlink()
    _, cases = volumes_of(root)
    assert [bool(case.labels) for case in cases[:4]] == [True, False, False, True]
    assert all(set(case.images) == {"1h", "xe"} for case in cases)


def everything():
    """Yield every module of datamodules."""
    for found in pkgutil.walk_packages(datamodules.__path__, "datamodules."):
        yield importlib.import_module(found.name)


def test_every_layout_is_in_the_one_list():
    """Whatever has a name, a tree and a way to find samples is registered, and no name is there twice."""
    names = [entry.name for entry in LAYOUTS]
    assert len(set(names)) == len(names)
    registered = {id(entry.load()) for entry in LAYOUTS}
    labels = {entry.labels.replace(":", ".") for entry in LAYOUTS if entry.labels}
    strange = set()
    for module in everything():
        for name, value in vars(module).items():
            if isinstance(value, type):
                concrete = issubclass(value, LabelLayout) and not inspect.isabstract(value)
                if concrete and f"{value.__module__}.{value.__name__}" not in labels:
                    strange.add(f"{module.__name__}.{name}")
            elif all(hasattr(value, part) for part in ("name", "tree", "find")) and id(value) not in registered:
                strange.add(f"{module.__name__}.{name}")
    assert strange == set()


@pytest.mark.parametrize("entry", LAYOUTS, ids=lambda entry: entry.name)
def test_an_entry_is_what_it_says(entry):
    layout = entry.load()
    assert layout.name == entry.name
    assert entry.gives <= set(VOCABULARY)
    assert entry.gives & {"volumes", "images"}
    assert set(layout.takes) <= set(Settings.__dataclass_fields__)
    assert layout.facts.profile in PROFILES
    if entry.labels:
        module, _, name = entry.labels.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), LabelLayout)


NEEDS = {
    "e_mim": {"volumes"}, "brain segmentation": {"volumes", "masks"}, "mrm_genetics": {"images"},
    "umd": {"images", "text"}, "questions": {"images", "questions"},
}  # fmt: skip


@pytest.fixture(scope="module")
def archives(tmp_path_factory, brats_root, brain_root, pi_cai_root):
    """Small archives of several kinds, by the layout that they have."""
    root = tmp_path_factory.mktemp("archives")
    write_idrid(root / "idrid", 2, 0, size=(40, 52))
    write_vqa_rad(root / "vqa_rad", 2, 0)
    write_covid_cxr(root / "covid_cxr", 2, seed=0, size=(48, 64))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    tables = {"table": ("image,subject", "{0}.png,p{0}"), "manifest": ("image,subject,text", "{0}.png,p{0},Clear.")}
    for name, (header, row) in tables.items():
        (root / name).mkdir()
        for index in range(3):
            picture.save(root / name / f"{index}.png")
        rows = [header, *(row.format(index) for index in range(3))]
        (root / name / ("manifest.csv" if name == "manifest" else "eyes.csv")).write_text("\n".join(rows))
    for label in ("0", "10", "2"):
        (root / "class_folders" / label).mkdir(parents=True)
        for index in range(2):
            picture.save(root / "class_folders" / label / f"{label}_{index}.png")
    return {path.name: path for path in root.iterdir()} | {
        "brats2023": brats_root, "sources": brain_root, "pi_cai": pi_cai_root
    }  # fmt: skip


def test_every_layout_feeds_whoever_needs_what_it_gives(archives):
    """Archives.md, case 1: what fits is read, and what does not is one sentence that says what lacks."""
    read, refusals = {}, []
    for name, root in archives.items():
        for user, needs in NEEDS.items():
            settings = Settings(subject="file") if name == "class_folders" else Settings()
            try:
                found = open_archive(root, needs=needs, purpose=user, settings=settings).layout.name
            except DataError as error:
                refusals.append(str(error))
            else:
                assert found == name
                read.setdefault(name, []).append(user)
    volumes, pictures = ["e_mim", "brain segmentation"], ["mrm_genetics"]
    assert read == {
        "idrid": pictures, "vqa_rad": [*pictures, "umd", "questions"], "covid_cxr": [*pictures, "umd"],
        "table": pictures, "manifest": [*pictures, "umd"], "class_folders": pictures, "brats2023": volumes,
        "sources": volumes, "pi_cai": volumes,
    }  # fmt: skip
    for sentence in refusals:
        assert len(sentence) <= 300
        assert re.search(r"lacking in \S+\.$|of no known layout|has no setting", sentence), sentence


def test_e_mim_reads_the_sources_of_brainmvp_and_brainmvp_reads_prostates_by_name(archives):
    plain = VolumeDataModule(str(archives["sources"]), split=SplitConfig((1.0, 0.0, 0.0)))
    assert plain.index().name == "sources"
    assert plain.input_spec.channels == canonical_order({name for case in plain.cases for name in case.images})
    brain = BrainDataModule(str(archives["pi_cai"]), split=SplitConfig((1.0, 0.0, 0.0)))
    brain.index()
    assert {name for case in brain.cases for name in case.images} == {"t2", "adc"}


def test_a_table_of_photographs_trains_what_wants_pictures(archives):
    split = SplitConfig((0.7, 0.3, 0.0))
    data = ImageGenomeDataModule(str(archives["table"]), image=PictureConfig((32, 32)), batch_size=2, split=split)
    data.prepare_data()
    data.setup("fit")
    assert data.index().layout.name == "table"
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 32, 32)


def test_classes_are_text_in_natural_order_and_whose_they_are_must_be_said(archives):
    root = archives["class_folders"]
    with pytest.raises(DataError, match=r"does not say whose its 6 images are \(2 lie in .*\): set subject: file"):
        open_archive(root, needs={"images"})
    archive = open_archive(root, needs={"images", "targets"}, settings=Settings(subject="file"))
    assert natural_order(record.targets["class"] for record in archive.records) == ["0", "2", "10"]
    assert len({record.patient_id for record in archive.records}) == 6
    by_name = {"regex": r"(?P<subject>\d+)_(?P<view>\d)\.png"}
    owned = open_archive(root, needs={"images"}, settings=Settings(subject=by_name))
    assert {record.patient_id for record in owned.records} == {"0", "2", "10"}
    with pytest.raises(DataError, match="does not fit"):
        open_archive(root, needs={"images"}, settings=Settings(subject={"regex": r"(?P<subject>x)"}))


def test_one_folder_a_patient_is_no_class(tmp_path):
    for name in ("anna", "bert", "carl"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "eye.jpg")
    archive = open_archive(tmp_path, needs={"images"})
    assert archive.layout.name == "images"
    assert {record.patient_id for record in archive.records} == {"anna", "bert", "carl"}


def test_settings_that_a_layout_does_not_have_are_refused(archives):
    with pytest.raises(DataError, match="of the layout brats2023, which has no setting runs: it has none"):
        open_archive(archives["brats2023"], needs={"volumes"}, settings=Settings(runs="all"))


def test_the_nearest_layout_is_named_with_what_it_lacks(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError) as error:
        open_archive(tmp_path, needs={"volumes"})
    assert re.search(r"nearest is (msd|nnunet), which lacks dataset.json with .*; medmim init DIR", str(error.value))
    deep = tmp_path / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    for index in range(30):
        (deep / f"{'z' * 60}{index}.xyz").touch()
    with pytest.raises(DataError) as error:
        open_archive(deep, needs={"volumes"})
    assert len(str(error.value)) <= 300


def test_a_tie_is_refused_naming_both(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "trainset.json").write_text("[]")
    for name in ("imgs", "images"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"could be of several layouts \(vqa_rad, slake\): choose one with LAYOUT="):
        open_archive(tmp_path, needs={"images", "questions"})


def test_sixteen_thousand_scans_are_recognised_by_names_alone(tmp_path, monkeypatch):
    """Names of 4,000 cases of four volumes: the walk is all that touches the file system."""
    tree = Tree(tmp_path)
    folders = [f"BraTS-GLI-{number:05}-000" for number in range(4000)]
    tree._folders[""] = tree._folders[""]._replace(below=folders)
    for folder in folders:
        names = (f"{folder}/{folder}-{name}.nii.gz" for name in ("t1c", "t1n", "t2f", "t2w"))
        files = [TreeFile(name, 9, "volume", None) for name in names]
        tree._folders[folder] = type(tree._folders[""])(files, [])
    for name in ("stat", "scandir", "open", "listdir"):
        monkeypatch.setattr(os, name, None)
    monkeypatch.setattr("builtins.open", None)
    archive = open_archive(tree, needs={"volumes"})
    assert (archive.layout.name, len(archive.records)) == ("brats2023", 4000)
