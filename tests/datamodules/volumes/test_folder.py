"""Generic folders of volumes: prefixes, sessions, flat names, masks, and names that were understood wrongly."""

import pytest

from common.errors import DataError
from datamodules.account import Account
from datamodules.registry import Settings, open_archive


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(root, **settings):
    archive = open_archive(root, needs={"volumes"}, settings=Settings(**settings))
    assert archive.layout.name == "folder"
    Account(archive).check()
    return {record.case_id: " ".join(sorted(record.volumes)) for record in archive.records}


def test_a_prefix_that_a_folders_files_share_is_no_part_of_a_name(tmp_path):
    """Archives.md, case 4: 24 of 24 files are used, where 8 were, and two modalities are two, where they were 16."""
    for case in range(8):
        touch(tmp_path, *(f"P{case:03}/P{case:03}_{name}.nii.gz" for name in ("T1w", "T2w", "SWI")))
    assert found(tmp_path) == {f"P{case:03}": "SWI T1w T2w" for case in range(8)}
    assert Account(open_archive(tmp_path, needs={"volumes"})).count("used") == 24
    for path in tmp_path.glob("*/*T2w*"):
        path.unlink()
    assert set(found(tmp_path).values()) == {"SWI T1w"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["c/t1.nii.gz", "c/T2.NII", "c/ct.mha", "c/pet.nrrd", "c/pd.mgz"], {"c": "T2 ct pd pet t1"}),
        (["c1/scan-7_t1.nii", "c1/scan-7_t2.nii"], {"c1": "t1 t2"}),
        (["c1/c1-t1.nii"], {"c1": "t1"}),
        (["c1/t1_pre.nii", "c1/t1_post.nii"], {"c1": "t1_post t1_pre"}),
        (["c1/c1.nii", "c2/c2.nii"], {"c1": "image", "c2": "image"}),
        (["p1/s1/t1.nii", "p1/s2/t1.nii", "p2/s1/p2_s1_t1.nii"], {"p1_s1": "t1", "p1_s2": "t1", "p2_s1": "t1"}),
        (["a_T1.nii", "a_T2.nii", "b-1_T1.nii", "b-1_T2.nii"], {"a": "T1 T2", "b-1": "T1 T2"}),
        (["a_0000.nii", "a_0001.nii", "b_0000.nii"], {"a": "0000 0001", "b": "0000"}),
        (["img_001.nii", "img_002.nii", "img_003.nii"], {f"img_{i:03}": "image" for i in (1, 2, 3)}),
        (["anna.nii", "bert.nii"], {"anna": "image", "bert": "image"}),
        (["imagesTr/t1.nii", "c1/t1.nii"], {"c1": "t1"}),
    ],
)  # fmt: skip
def test_names(tmp_path, names, expected):
    archive = open_archive(touch(tmp_path, *names), "folder", needs={"volumes"})
    assert {record.case_id: " ".join(sorted(record.volumes)) for record in archive.records} == expected


def test_files_of_one_case_may_lie_in_the_root(tmp_path):
    root = touch(tmp_path / "case7", "scan_t1.nii.gz", "scan_flair.nii.gz", "other_seg.nii.gz")
    archive = open_archive(root, needs={"volumes"})
    (record,) = archive.records
    assert (record.case_id, sorted(record.volumes), list(record.masks)) == ("case7", ["flair", "t1"], ["seg"])


def test_sessions_are_cases_of_one_patient(tmp_path):
    touch(tmp_path, "p1/s1/t1.nii", "p1/s2/t1.nii", "p2/s1/t1.nii")
    (tmp_path / "cases.csv").write_text("case_id,session,disease\np1_s1,baseline,1\n")
    archive = open_archive(tmp_path, needs={"volumes"})
    facts = {record.case_id: (record.patient_id, record.session) for record in archive.records}
    assert facts == {"p1_s1": ("p1", "baseline"), "p1_s2": ("p1", "s2"), "p2_s1": ("p2", "s1")}
    assert archive.records[0].attributes == {"disease": "1"}


def test_a_modality_of_one_case_alone_is_a_misunderstanding(tmp_path):
    for case in range(8):
        touch(tmp_path, f"P{case:03}/x{case}_t1w.nii.gz", f"P{case:03}/y{case}_swi.nii.gz")
    with pytest.raises(DataError) as error:
        found(tmp_path)
    assert str(error.value) == (
        "The modality x0_t1w occurs in one case only (16 such of 16): files of one kind need one name in all cases; "
        "medmim init DIR proposes a pattern."
    )
    few = touch(tmp_path / "few", "a/t1.nii", "a/swi.nii", "b/t1.nii")
    assert found(few) == {"a": "swi t1", "b": "t1"}
    touch(few, "c/t1.nii")
    with pytest.raises(DataError, match="The modality swi occurs in one case only"):
        found(few)
    assert found(few, modalities={"t1": "t1", "swi": "swi"})["a"] == "swi t1"
    assert found(few, ignore=("swi.nii",))["a"] == "t1"


def test_masks_are_no_images(tmp_path):
    for case in ("a", "b", "c"):
        touch(tmp_path, *(f"{case}/{name}.nii.gz" for name in ("t1", "t1_seg", "t2_seg", "lesion-mask")))
    archive = open_archive(tmp_path, needs={"volumes"})
    assert {record.case_id: " ".join(record.volumes) for record in archive.records} == dict.fromkeys("abc", "t1")
    assert not any(record.masks for record in archive.records)
    masks = {"lesion": {"name": "lesion-mask"}, "head": {"name": "T1_seg", "values": [3]}}
    named = open_archive(tmp_path, needs={"volumes"}, settings=Settings(masks=masks))
    assert {tuple(record.masks) for record in named.records} == {("lesion-mask", "t1_seg")}
    assert named.facts.regions == {"lesion": (1, 3), "head": (2, 3)}
    touch(tmp_path, "a/label.seg.nrrd")
    assert list(open_archive(tmp_path, needs={"volumes"}).records[0].masks) == ["seg"]


def test_two_files_of_one_modality_are_refused(tmp_path):
    from datamodules.volumes.datamodule import VolumeDataModule

    touch(tmp_path, "a/T1.nii", "a/t1n.nii.gz", "b/t1.nii")
    with pytest.raises(DataError, match="The case a has two files of one modality"):
        VolumeDataModule(str(tmp_path)).index()


@pytest.mark.parametrize(
    ("marker", "text"),
    [("dataset_description.json", '{"BIDSVersion": "1.8"}'), ("DICOMDIR", ""), ("dataset.json", "{}")],
)
def test_a_marker_of_another_archive_vetoes_the_generic_layout(tmp_path, marker, text):
    touch(tmp_path, "a/t1.nii", "b/t1.nii", "imagesTr/x.nii")
    (tmp_path / marker).write_text(text)
    with pytest.raises(DataError, match="of no known layout"):
        open_archive(tmp_path, needs={"volumes"})
    assert open_archive(tmp_path, "folder", needs={"volumes"}).records
