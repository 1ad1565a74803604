"""Every file of an archive is used, ignored for a reason of the list, or unknown; too many unknown ones are refused."""

import csv

import pytest

from common.errors import DataError
from datamodules import account
from datamodules.account import Account
from datamodules.registry import open_archive


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def counted(root, **options):
    archive = open_archive(root, needs={"volumes"}, **options)
    return Account(archive)


def reasons(found):
    return {(row.use, row.reason): row.count for row in found.rows}


def test_a_file_is_used_ignored_or_unknown(tmp_path):
    for case in ("a", "b"):
        touch(
            tmp_path, *(f"{case}/{name}" for name in ("t1.nii.gz", "._t1.nii.gz", "seg.nii.gz", "t1.json", ".DS_Store"))
        )
    touch(tmp_path, "README", "notes.csv", "a/model.mat", ".git/x")
    found = counted(tmp_path)
    assert reasons(found) == {
        ("used", "volume"): 2, ("used", "mask"): 2, ("ignored", account.SHADOW): 2, ("ignored", account.STORE): 2,
        ("ignored", account.SIDECAR): 2, ("ignored", account.TEXT): 1, ("ignored", account.TABLE): 1,
        ("unknown", ".mat"): 1,
    }  # fmt: skip
    assert found.total == sum(row.count for row in found.rows) == 13
    found.check()
    assert found.lines()[0] == "files: 13, of which 4 used, 8 ignored, 1 unknown"
    assert len(found.lines()) <= 12
    found.write(tmp_path / "run/account.csv")
    with (tmp_path / "run/account.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"class": "used", "reason": "mask", "count": "2", "example_1": "a/seg.nii.gz",
                       "example_2": "b/seg.nii.gz", "example_3": ""}  # fmt: skip
    found.write(tmp_path / "run/account.csv", examples=False)
    assert "seg.nii.gz" not in (tmp_path / "run/account.csv").read_text()


def test_what_settings_leave_out_is_said(tmp_path):
    touch(tmp_path, "a/t1.nii.gz", "a/t2.nii.gz", "b/t1.nii.gz")
    archive = open_archive(tmp_path, needs={"volumes"})
    used = [("volume", tmp_path / "a/t1.nii.gz")]
    assert reasons(Account(archive, used)) == {("used", "volume"): 1, ("ignored", account.UNUSED): 2}


def test_volumes_without_a_place_are_refused(tmp_path):
    for case in range(8):
        touch(
            tmp_path,
            f"P{case}/t1.nii.gz",
            f"P{case}/more/deep/P{case}_T1w.nii.gz",
            f"P{case}/more/deep/P{case}_SWI.nii.gz",
        )
    with pytest.raises(DataError) as error:
        counted(tmp_path).check()
    assert str(error.value) == (
        "16 of 24 volumes have no place (SWI in 8 cases, T1w in 8): name them under modalities or ignore; medmim init "
        "DIR writes the file."
    )


def test_one_odd_file_of_many_is_tolerated(tmp_path):
    for case in range(60):
        touch(tmp_path, f"P{case:02}/t1.nii.gz", f"P{case:02}/t2.nii.gz")
    touch(tmp_path, "P00/old/backup/t1.nii.gz")
    found = counted(tmp_path)
    assert found.count("unknown") == 1
    found.check()
    touch(tmp_path, "P01/old/backup/t1.nii.gz")
    with pytest.raises(DataError, match=r"2 of 122 volumes have no place \(t1 in 2 cases\)|have no place"):
        counted(tmp_path).check()


@pytest.mark.parametrize(
    ("suffix", "words"),
    [("img", "Analyze stores no orientation"), ("HDR", "Analyze stores no orientation"), ("mnc", "mnc2nii"),
     ("nhdr", "save it as one .nrrd"), ("dcm.gz", "gunzip it")],
)  # fmt: skip
def test_formats_that_are_never_read_say_what_to_do(tmp_path, suffix, words):
    touch(tmp_path, *(f"P{case}/{name}" for case in range(3) for name in ("t1.nii", f"t2.{suffix}")))
    with pytest.raises(DataError, match=words):
        counted(tmp_path).check()


def test_voxels_beside_their_header_are_used(tmp_path):
    touch(tmp_path, "a/t1.mhd", "a/t1.raw", "b/t1.mhd", "b/t1.raw")
    assert reasons(counted(tmp_path)) == {("used", "volume"): 4}


def test_a_reason_of_no_list_is_a_fault(tmp_path):
    touch(tmp_path, "a/t1.nii")
    archive = open_archive(tmp_path, needs={"volumes"})
    archive.reasons = {"because": ["a/t1.nii"]}
    with pytest.raises(DataError, match="unknown reason 'because'"):
        Account(archive)
