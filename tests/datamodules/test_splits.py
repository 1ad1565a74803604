from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from common.errors import DataError
from datamodules.splits import (
    SplitFile,
    assign_splits,
    fold_of_each,
    joined_groups,
    nested_fraction,
    ordered_patients,
    relatives_together,
    seeded_split,
    write_split_file,
)
from datamodules.volumes.cases import Case


def cases(*names, split=None):
    """Make cases called PATIENT-VISIT."""
    return [Case(name, name.split("-")[0], {"t1": Path("x")}, split=split) for name in names]


MANY = cases(*[f"p{i}-{visit}" for i in range(40) for visit in range(1 + i % 2)])


def test_visits_of_a_patient_stay_together():
    parts = seeded_split(MANY, (0.8, 0.1, 0.1), 0)
    by_patient = {}
    for case in MANY:
        by_patient.setdefault(case.patient_id, set()).add(parts[case.case_id])
    assert all(len(found) == 1 for found in by_patient.values())
    counts = [sum(next(iter(v)) == name for v in by_patient.values()) for name in ("train", "val", "test")]
    assert counts == [32, 4, 4]


def test_seed_and_order():
    assert seeded_split(MANY, (0.8, 0.1, 0.1), 0) == seeded_split(MANY[::-1], (0.8, 0.1, 0.1), 0)
    assert seeded_split(MANY, (0.8, 0.1, 0.1), 0) != seeded_split(MANY, (0.8, 0.1, 0.1), 1)


def held_out(parts):
    return {patient for patient, part in parts.items() if part != "train"}


def by_name(count, seed):
    return seeded_split([Case(f"p{i}", f"p{i}", {}) for i in range(count)], (0.8, 0.1, 0.1), seed)


def test_growth_hardly_moves_anyone():
    """Test 12 of archives.md: 100 to 101 patients, and 1,000 to 1,100, in 50 seeds."""
    trained = []
    for seed in range(50):
        before, after = by_name(100, seed), by_name(101, seed)
        moved = [(part, after[name]) for name, part in before.items() if after[name] != part]
        assert all(moved.count(pair) <= 2 for pair in moved)
        assert not {("train", "test"), ("test", "train")} & set(moved)
        assert not held_out(after) & {name for name, part in before.items() if part == "train"}
        before, after = by_name(1000, seed), by_name(1100, seed)
        assert len(held_out(after)) == 220
        trained.append(len(held_out(after) & {name for name, part in before.items() if part == "train"}))
    assert sum(trained) / 50 < 4


def test_growth_of_a_stratified_archive():
    """Each stratum keeps its own order, so only its edges move."""
    strata = {f"p{i}": "rare" if i % 5 == 0 else "common" for i in range(101)}
    for seed in range(50):
        before, after = (
            seeded_split([Case(name, name, {}) for name in list(strata)[:count]], (0.8, 0.1, 0.1), seed, strata)
            for count in (100, 101)
        )
        moved = [(part, after[name]) for name, part in before.items() if after[name] != part]
        assert all(moved.count(pair) <= 2 for pair in moved)
        assert [sum(strata[name] == "rare" and part == where for name, part in before.items())
                for where in ("val", "test")] == [2, 2]  # fmt: skip


def test_the_order_is_that_of_the_documented_hash():
    names = [f"p{i}" for i in range(20)]
    text = [xxhash.xxh3_64_intdigest(f"3\x1f{name}".encode()) >> 1 for name in names]
    assert ordered_patients(names, 3) == [name for _, name in sorted(zip(text, names, strict=True))]
    parts = seeded_split(cases(*[f"{name}-0" for name in names]), (0.8, 0.1, 0.1), 3)
    order = [parts[f"{name}-0"] for name in ordered_patients(names, 3)]
    assert order == ["test"] * 2 + ["val"] * 2 + ["train"] * 16


@pytest.mark.parametrize(("total", "counts"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (6, (4, 1, 1))])
def test_few_patients(total, counts):
    parts = list(seeded_split(cases(*[f"p{i}-0" for i in range(total)]), (0.8, 0.1, 0.1), 0).values())
    assert tuple(parts.count(name) for name in ("train", "val", "test")) == counts


def test_fractions_must_be_shares():
    with pytest.raises(DataError, match=r"^data\.split\.fractions must be three shares that sum to 1"):
        seeded_split(MANY, (0.8, 0.3, 0.1), 0)


def test_a_file_wins_and_may_leave_cases_out(tmp_path, capsys):
    some = cases("a-0", "b-0", "c-0")
    path = tmp_path / "split.csv"
    path.write_text("case_id,split\na-0,train\nb-0,Validation\nx-0,train\n")
    given = SplitFile(str(path), unlisted="ignore")
    assert assign_splits(some, (0.8, 0.1, 0.1), 0, given) == {"a-0": "train", "b-0": "val"}
    printed = capsys.readouterr().out
    assert "split.csv: 2 of 3 cases are listed; of the ids it lists, 1 are not in the archive" in printed
    with pytest.raises(DataError, match=r"1 of 3 cases are not in split.csv, such as c-0: add them, or set split.un"):
        assign_splits(some, (0.8, 0.1, 0.1), 0, path)


def test_one_case_in_a_hundred_may_be_unlisted(tmp_path):
    many = cases(*[f"p{i}-0" for i in range(200)])
    rows = [f"{case.case_id},train" for case in many]
    path = tmp_path / "split.csv"
    path.write_text("\n".join(["case_id,split", *rows[2:]]))
    assert len(assign_splits(many, (0.8, 0.1, 0.1), 0, path)) == 198
    path.write_text("\n".join(["case_id,split", *rows[3:]]))
    with pytest.raises(DataError, match=r"3 of 200 cases are not in split.csv"):
        assign_splits(many, (0.8, 0.1, 0.1), 0, path)


def test_lost_zeros_are_named_and_joined_where_that_is_asked(tmp_path):
    """Test 9 of archives.md."""
    some = cases(*[f"{i:04d}-0" for i in range(1, 61)])
    rows = [f"{i if i <= 25 else f'{i:04d}'},{'val' if i % 10 == 0 else 'train'}" for i in range(1, 61)]
    path = tmp_path / "split.csv"
    path.write_text("\n".join(["patient_id,split", *rows]))
    with pytest.raises(DataError) as error:
        assign_splits(some, (0.8, 0.1, 0.1), 0, path)
    assert str(error.value) == (
        "25 of 60 patients are not in split.csv; 25 would be with leading zeros (1 for 0001): set split.ids: pad, or "
        "correct the file"
    )
    parts = assign_splits(some, (0.8, 0.1, 0.1), 0, SplitFile(str(path), ids="pad"))
    assert len(parts) == 60
    assert parts["0010-0"] == "val"


def test_a_column_of_patients_lists_patients_alone(tmp_path):
    """A case that is called as another patient is not listed by it."""
    some = [Case("b", "a", {}), Case("c", "b", {})]
    (tmp_path / "split.csv").write_text("patient_id,split\na,train\nb,val\n")
    assert assign_splits(some, (0.8, 0.1, 0.1), 0, tmp_path / "split.csv") == {"b": "train", "c": "val"}


def test_unknown_subjects_in_a_split_file(tmp_path):
    (tmp_path / "split.csv").write_text("patient_id,split\n" + "nan,train\n" * 30)
    with pytest.raises(DataError, match='30 rows have the subject "nan": leave the cell empty or correct it'):
        assign_splits(MANY, (0.8, 0.1, 0.1), 0, tmp_path / "split.csv")


def test_a_written_file_reads_back(tmp_path):
    parts = assign_splits(MANY, (0.6, 0.2, 0.2), 5)
    write_split_file(tmp_path / "split.csv", MANY, parts)
    assert assign_splits(MANY, (1, 0, 0), 0, tmp_path / "split.csv") == parts


def test_the_archives_own_split_is_used():
    own = cases("a-0", "b-0", split="train") + cases("c-0", split="test")
    assert assign_splits(own, (0.8, 0.1, 0.1), 0) == {"a-0": "train", "b-0": "train", "c-0": "test"}


def test_validation_patients_can_be_cut_out_of_training():
    own = [*cases(*[f"a{i}-0" for i in range(20)], split="train"), *cases("t-0", "t-1", split="test")]
    parts = assign_splits(own, (0.8, 0.2, 0.0), 0, cut_validation=True)
    assert [list(parts.values()).count(name) for name in ("train", "val", "test")] == [16, 4, 2]
    assert parts["t-0"] == parts["t-1"] == "test"
    assert assign_splits(own, (0.8, 0.2, 0.0), 0, cut_validation=True) == parts


def test_every_stretch_of_a_stratified_order_has_its_share():
    names = [f"p{i}" for i in range(100)]
    strata = {name: "rare" if i % 10 == 0 else "common" for i, name in enumerate(names)}
    order = ordered_patients(names, 3, strata)
    assert sorted(order) == sorted(names)
    assert [sum(strata[name] == "rare" for name in order[i : i + 20]) for i in range(0, 100, 20)] == [2] * 5
    assert order != ordered_patients(names, 4, strata)
    assert order == ordered_patients(names[::-1], 3, strata)


def test_groups_are_joined_through_what_they_share():
    assert joined_groups([("a", ""), ("b", "x"), ("c", "x"), ("a", "y"), ("d", "y"), ("e", "")]) == [0, 1, 1, 0, 0, 2]


def test_folds_need_enough_patients_of_each_class():
    with pytest.raises(DataError, match="3 folds need as many patients of each class; b has 2"):
        fold_of_each(["a"] * 6 + ["b"] * 2, list(range(8)), 3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "case_id,split\np1-0,train\np1-1,val\n",
            r"1 patients are in several splits, first p1: train \(p1-0\) and val",
        ),
        ("case_id,split\np1-0,train\np1-0,val\n", "puts p1-0 into both train and val"),
        ("case_id,split\np1-0,dev\n", "into the split 'dev'"),
        ("case_id,part\np1-0,train\n", "needs the columns split and case_id or patient_id, it has case_id, part"),
        ("case_id,split\nzz,train\n", "names none of the 60 cases, such as p0-0: correct the file"),
        ("case_id,split\np1-0,val,\n", "line 2 has 3 fields, the header has 2"),
        ("case_id,split\n" + "".join(f"{case.case_id},val\n" for case in MANY), "training split is empty"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "split.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        assign_splits(MANY, (0.8, 0.1, 0.1), 0, tmp_path / "split.csv")


def test_missing_file_and_double_case():
    with pytest.raises(DataError, match="does not exist"):
        assign_splits(MANY, (0.8, 0.1, 0.1), 0, "nowhere.csv")
    with pytest.raises(DataError, match="p0-0 is there twice"):
        assign_splits(MANY + cases("p0-0"), (0.8, 0.1, 0.1), 0)


def test_fractions_are_nested_by_patient():
    kept = [{case.case_id for case in nested_fraction(MANY, f, 3)} for f in (0.2, 0.4, 0.6, 0.8, 1.0)]
    for smaller, larger in pairwise(kept):
        assert smaller < larger
    assert len({name.split("-")[0] for name in kept[0]}) == 8
    with pytest.raises(DataError, match=r"^data\.labels\.fraction .*data\.label_fraction\) must lie in"):
        nested_fraction(MANY, 0, 3)


def test_relatives_are_in_one_split():
    some = cases("a-0", "a-1", "b-0", "c-0", "d-0", "e-0", "unused-0")
    parts = {"a-0": "train", "a-1": "train", "b-0": "train", "c-0": "val", "d-0": "test", "e-0": "train"}
    assert relatives_together(some, parts, []) == parts
    chain = [("a", "b"), ("b", "c"), ("stranger", "e"), ("unused", "d"), ("unused", "e")]
    assert relatives_together(some, parts, chain) == parts | {"a-0": "val", "a-1": "val", "b-0": "val"}
    assert set(relatives_together(some, parts, [*chain, ("d", "a")]).values()) == {"test", "train"}


def test_what_a_configuration_may_give_as_a_split_file():
    assert SplitFile.of("a.csv") == SplitFile("a.csv")
    assert SplitFile.of({"file": "a.csv", "ids": "pad"}) == SplitFile("a.csv", "pad")
    for given, word in (({"ids": "pad"}, "file is missing"), ({"file": "a", "ids": "loose"}, "wrong is ids: loose"),
                        ({"file": "a", "idz": "pad"}, "wrong is idz")):  # fmt: skip
        with pytest.raises(DataError, match=word):
            SplitFile.of(given)
