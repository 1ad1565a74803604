from typing import NamedTuple

import pytest

from common.errors import DataError
from datamodules.base import check_position
from datamodules.membership import (
    MASK,
    Membership,
    Row,
    check_contents,
    inherited_parts,
    make_membership,
    resumed_parts,
    seen_patients,
    used_rows,
)


class Case(NamedTuple):
    case_id: str
    patient_id: str
    split: str | None = None


CASES = [Case(f"c{index}", f"p{index // 2}") for index in range(8)]
PARTS = dict(zip([case.case_id for case in CASES], ["train"] * 4 + ["val"] * 2 + ["test"] * 2, strict=True))
SPLITS = {name: [case for case in CASES if PARTS[case.case_id] == name] for name in ("train", "val", "test")}
SOURCES = {case.case_id: (f"sum of {case.case_id}", f"{MASK}empty") for case in CASES}


def members(root="/data", hidden=False, **more):
    return make_membership(used_rows(CASES, PARTS, SPLITS, SOURCES), root, "seed 0", hidden, **more)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_checkpoint_holds_it_whole(hidden):
    whole = members(hidden=hidden, before=members("/before"))
    again = Membership.read(whole.plain())
    assert again == whole
    assert again.digest == whole.digest != members("/data", hidden=not hidden).digest
    assert whole.counts == {"train": 4, "val": 2, "test": 2}
    assert (whole.rows[0].case_id == "c0", whole.root == "/data") == (not hidden, not hidden)
    assert Membership.read(None) is None


def test_what_was_left_out_is_no_training():
    rows = used_rows(CASES, PARTS, SPLITS | {"train": SPLITS["train"][:2]}, {})
    assert [row.split for row in rows][:4] == ["train", "train", "unused train", "unused train"]
    stored = make_membership(rows, "/data", "seed 0", hidden=False)
    assert resumed_parts(stored, CASES, "seed 0", "refuse") == PARTS
    assert seen_patients(stored, rows[2:4], "/data").certain == frozenset()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_run_goes_on_with_those_it_began_with(hidden, capsys):
    grown = [Case("a new one", "p9"), *CASES[::-1], Case("another", "p10")]
    assert resumed_parts(members(hidden=hidden), grown, "seed 0", "refuse") == PARTS
    assert "2 cases are new since this run began and are not used" in capsys.readouterr().out


def test_members_that_are_gone_and_other_splits(capsys):
    with pytest.raises(DataError, match=r"1 of its 8 cases are gone, first c0\. To resume, set data\.changed_archive"):
        resumed_parts(members(), CASES[1:], "seed 0", "refuse")
    with pytest.raises(DataError, match=r"it split by seed 0, and the configuration by seed 1"):
        resumed_parts(members(), CASES, "seed 1", "refuse")
    assert resumed_parts(members(), CASES[1:], "seed 1", "use") == {k: v for k, v in PARTS.items() if k != "c0"}
    assert "the run goes on with what is there" in capsys.readouterr().out


def test_files_that_have_changed(capsys):
    rows = used_rows(CASES, PARTS, SPLITS, SOURCES | {"c3": ("other", f"{MASK}empty")})
    check_contents(members(), used_rows(CASES, PARTS, SPLITS, SOURCES), "refuse")
    check_contents(members(), used_rows(CASES, PARTS, SPLITS, {}), "refuse")  # nothing is known of them
    with pytest.raises(
        DataError, match=r"1 cases have other files .* first c3 \(check sum sum of c3 then, other now\)"
    ):
        check_contents(members(), rows, "refuse")
    check_contents(members(), rows, "use")
    assert "first c3" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", [False, True])
def test_patients_that_pre_training_has_seen(hidden):
    stored = members("/data", hidden)
    tested = [
        Row("x", "p0", "test"),  # a name in the same archive
        Row("y", "someone", "test", ("sum of c3",)),  # a copy under another name
        Row("z", "p2", "test"),  # was in validation
        Row("w", "stranger", "test", (f"{MASK}empty",)),  # an empty mask tells nothing
    ]
    seen = seen_patients(stored, tested, "/data")
    assert (seen.patients, seen.certain, seen.possible) == (4, {"p0", "someone"}, frozenset())
    elsewhere = seen_patients(stored, tested, "/copy")
    assert (elsewhere.certain, elsewhere.possible) == ({"someone"}, {"p0"})
    assert elsewhere.words("test", "pre-training") == (
        "1 of 4 test patients were seen in pre-training; 1 more have the name of one that was"
    )
    later = make_membership([], "/copy", "", hidden, before=stored)
    assert seen_patients(later, tested, "/copy").certain == {"someone"}


def test_another_key_tells_contents_alone(tmp_path, monkeypatch):
    stored = members(hidden=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    seen = seen_patients(stored, [Row("x", "p0", "test"), Row("y", "q", "test", ("sum of c3",))], "/data")
    assert (seen.certain, seen.possible) == ({"q"}, frozenset())
    with pytest.raises(DataError, match="another key"):
        resumed_parts(stored, CASES, "seed 0", "refuse")


def test_patients_keep_the_split_of_another_run():
    others = {**dict.fromkeys(PARTS, "train"), "n0": "test", "n1": "val"}
    new = [Case("n0", "p7"), Case("n1", "p0")]  # a new patient, and a new visit of a known one
    assert inherited_parts(members(), [*CASES, *new], others) == {**PARTS, "n0": "test", "n1": "train"}


def test_positions_inside_an_epoch():
    inside = {"epoch": 1, "consumed": 3, "batches": 6, "batch_size": 2, "ranks": 1}
    check_position(inside, 2, 1)
    for boundary in (inside | {"consumed": 6}, inside | {"consumed": 0}):
        check_position(boundary, 4, 2)
    with pytest.raises(DataError, match=r"inside an epoch, 3 of 6 batches in, with a batch size of 2, not 4"):
        check_position(inside, 4, 1)
    with pytest.raises(DataError, match=r"a number of ranks of 1, not 2: resume with 1"):
        check_position(inside, 2, 2)
