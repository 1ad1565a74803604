import shutil

import pytest

from common.errors import DataError
from datamodules.synthetic.command import synthesize, write_brats
from datamodules.volumes.modalities import under_canonical_names, with_modalities
from datamodules.volumes.pi_cai import gleason_to_isup, read_marksheet


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
    with pytest.raises(DataError, match="no PI-CAI marksheet"):
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
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(DataError, match=r"of no known layout \(it holds holiday.jpg\): medmim init DIR shows"):
        volumes_of(tmp_path)
    with pytest.raises(DataError, match=r"is not of the layout pi_cai .* it holds holiday.jpg"):
        volumes_of(tmp_path, "pi_cai")
    with pytest.raises(DataError, match="There is no layout 'brats'; nearest are brats20"):
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
