import math
from typing import NamedTuple

import pytest

from common.errors import DataError
from datamodules.targets import (
    TargetColumns,
    heeding,
    kind_of,
    learn_targets,
    merged,
    read_texts,
    refuse,
    strata_of_texts,
)


class Someone(NamedTuple):
    case_id: str
    patient_id: str


def people(count):
    return [Someone(f"{i:04d}", f"p{i:04d}") for i in range(count)]


def learned(config, members, facts, parts=None):
    names, texts = read_texts(config, members, facts)
    kind = kind_of(config, names, texts)
    return learn_targets(config, kind, names, merged(config, kind, texts), members,
                         parts or dict.fromkeys(facts, "train"))  # fmt: skip


def facts_of(members, **columns):
    return {m.case_id: {name: values[i] for name, values in columns.items()} for i, m in enumerate(members)}


def test_classes_are_those_of_training_patients_in_natural_order(capsys):
    members = people(24)
    values = ["stage 10", "stage 2"] * 10 + ["", "stage 3", "stage 2", "stage 10"]
    parts = dict.fromkeys((m.case_id for m in members[:20]), "train") | dict.fromkeys(
        (m.case_id for m in members[20:]), "test"
    )
    found = learned(TargetColumns("stage"), members, facts_of(members, stage=values), parts)
    assert found.names == ("stage 2", "stage 10")
    assert found.values["0000"] == (0, 1)
    assert "0020" not in found.values  # empty is unknown, not a class
    assert "0021" not in found.values
    assert found.problems == []
    said = capsys.readouterr().out
    assert "1 cases have classes that no training patient has: stage 3" in said
    assert "stage: 2 classes (training patients): stage 2 10, stage 10 10" in said


def test_integers_are_classes_unless_told_otherwise_and_many_numbers_are_refused(capsys):
    members = people(30)
    grades = facts_of(members, grade=[str(i % 3) for i in range(30)])
    assert learned(TargetColumns("grade"), members, grades).kind == "classes"
    assert "integers are taken for classes" in capsys.readouterr().out
    numbers = learned(TargetColumns("grade", kind="regression"), members, grades)
    assert numbers.values["0002"] == (2.0,)
    ages = facts_of(members, age=[str(20 + i) for i in range(30)])
    with pytest.raises(DataError, match="30 different numbers: use TASK=regression"):
        learned(TargetColumns("age"), members, ages)
    assert learned(TargetColumns("age", kind="regression"), members, ages).values["0009"] == (29.0,)


def test_rare_classes_and_classes_without_a_test_patient_are_refused_by_name_or_merged():
    members = people(20)
    values = ["common"] * 14 + ["odd", "rare", "rare", "rare"] + ["common", "rare"]
    parts = {m.case_id: "test" if i > 17 else "train" for i, m in enumerate(members)}
    facts = facts_of(members, dx=values)
    problems = learned(TargetColumns("dx"), members, facts, parts).problems
    assert "fewer than 5 training patients have the dx odd (1), rare (3)" in problems[0]
    assert "no test patient has the dx odd" in problems[1]
    with pytest.raises(DataError, match=r"^Fewer than 5 .*data\.target\.merge"):
        refuse(problems)
    config = TargetColumns("dx", merge={"other": ["odd", "rare"]}, fewest=4)
    found = learned(config, members, facts, parts)
    assert found.names == ("common", "other")
    assert found.problems == []
    with pytest.raises(DataError, match="'rar', which no case has"):
        learned(TargetColumns("dx", merge={"other": ["rar"]}), members, facts, parts)


def test_one_class_only_is_refused():
    members = people(8)
    found = learned(TargetColumns("dx"), members, facts_of(members, dx=["sick"] * 8))
    assert "one class in training, sick" in found.problems[0]


def test_several_columns_are_findings_and_empty_cells_unknown():
    members = people(12)
    facts = facts_of(members, edema=["0", "1"] * 6, mass=["1", "0", ""] * 4)
    found = learned(TargetColumns("edema, mass", fewest=4), members, facts)
    assert found.kind == "labels"
    assert found.names == ("edema", "mass")
    assert found.values["0001"] == (1, 0)
    assert math.isnan(found.values["0002"][1])
    assert found.problems == []
    facts["0003"]["mass"] = "maybe"
    with pytest.raises(DataError, match=r"mass of 0003 is 'maybe'.*findings"):
        learned(TargetColumns(["edema", "mass"]), members, facts)


def test_numbers_must_be_numbers():
    members = people(6)
    with pytest.raises(DataError, match="'12,5', which is no number"):
        learned(TargetColumns("x", kind="regression"), members, facts_of(members, x=["1", "12,5", "", "2", "3", "4"]))


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_tables_join_by_exact_text_and_count_what_does_not(tmp_path, capsys):
    members = people(10)
    rows = "".join(f"{m.case_id},{'ab'[i % 2]}\n" for i, m in enumerate(members[:8]))
    file = write(tmp_path / "labels.csv", f"case_id,dx\n{rows}9999,a\n", "utf-8-sig")
    names, texts = read_texts(TargetColumns("dx", file), members, {})
    assert names == ["dx"]
    assert texts["0001"] == ("b",)
    assert texts["0009"] == ("",)
    said = capsys.readouterr().out
    assert "8 of 10 cases are listed" in said
    assert "not listed: 0008, 0009; not in the archive: 9999" in said


def test_ids_that_lost_their_zeros_are_named_and_joined_where_that_is_said(tmp_path):
    members = people(10)
    file = write(tmp_path / "labels.csv", "case_id,dx\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(10)))
    with pytest.raises(DataError, match=r"10 of 10 cases are not in labels\.csv.*leading zeros \(0 for 0000\)"):
        read_texts(TargetColumns("dx", file), members, {})
    _, texts = read_texts(TargetColumns("dx", file, ids="pad"), members, {})
    assert texts["0003"] == ("b",)


def test_tables_may_name_patients_and_must_name_someone(tmp_path):
    members = [Someone("a/1", "a"), Someone("a/2", "a"), Someone("b/1", "b")]
    file = write(tmp_path / "labels.csv", "patient_id,dx\na,x\nb,y\n")
    _, texts = read_texts(TargetColumns("dx", file), members, {})
    assert texts == {"a/1": ("x",), "a/2": ("x",), "b/1": ("y",)}
    with pytest.raises(DataError, match=r"(2 of 2 patients|3 of 3 cases) are not in x\.csv"):
        read_texts(TargetColumns("dx", write(tmp_path / "x.csv", "who,dx\nz,x\n")), members, {})
    with pytest.raises(DataError, match="no column age"):
        read_texts(TargetColumns("age", file), members, {})
    with pytest.raises(DataError, match=r"Latin|UTF-8"):
        read_texts(TargetColumns("dx", write(tmp_path / "l.csv", "patient_id,dx\na,é\n", "latin-1")), members, {})


def test_an_archive_file_names_the_target_its_kind_and_the_order_of_its_classes():
    said = {"grade": {"classes": ["low", "high"]}, "age": {"kind": "regression"}}
    assert heeding(TargetColumns(), said) == TargetColumns()
    assert heeding(TargetColumns("grade"), said).classes == ["low", "high"]
    assert heeding(TargetColumns("age"), said).kind == "regression"
    assert heeding(TargetColumns(), {"grade": said["grade"]}).names == ["grade"]
    assert heeding(TargetColumns("grade", file="own.csv"), said).classes is None


def test_what_is_predicted_must_be_said_where_there_is_a_choice():
    members = people(2)
    facts = facts_of(members, age=["1", "2"], dx=["a", "b"])
    with pytest.raises(DataError, match=r"Set TARGET= .* to one of age, dx"):
        read_texts(TargetColumns(), members, facts, ["age", "dx"])
    assert read_texts(TargetColumns(), members, facts, ["dx"])[0] == ["dx"]


def test_a_patient_counts_for_their_rarest_class():
    members = [Someone("1", "a"), Someone("2", "a"), Someone("3", "b"), Someone("4", "c")]
    texts = {"1": ("common",), "2": ("rare",), "3": ("common",), "4": ("",)}
    assert strata_of_texts("classes", texts, members) == {"a": "rare", "b": "common", "c": "none"}
    assert strata_of_texts("regression", texts, members) is None
