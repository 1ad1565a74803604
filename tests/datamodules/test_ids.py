from pathlib import Path

import pandas as pd
import pytest

from common.errors import DataError
from datamodules.ids import check_labels, check_subjects, join_ids, mending, rows_by

PADDED = [f"{number:04d}" for number in range(1, 61)]
SHORT = [str(number) if number <= 25 else f"{number:04d}" for number in range(1, 61)]


def test_ids_join_by_exact_text():
    joined = join_ids(PADDED, SHORT)
    assert (len(joined.found), len(joined.lacking), len(joined.spare)) == (35, 25, 25)
    assert joined.counts("split.csv", "patients") == (
        "split.csv: 35 of 60 patients are listed; of the ids it lists, 25 are not in the archive"
    )
    assert mending(joined, "split.ids") == (
        "; 25 would be with leading zeros (1 for 0001): set split.ids: pad, or correct the file"
    )
    padded = join_ids(PADDED, SHORT, "pad")
    assert (len(padded.found), padded.lacking, padded.spare) == (60, [], [])
    assert padded.found["0003"] == "3"


@pytest.mark.parametrize(
    ("name", "listed", "words"),
    [("P1", "p1", "in the other case"), ("1001", "1001.0", "without .0"), ("sub-01", "01", "without sub-"),
     ("a b", "ab", "without blanks"), ("12", "0012", "with leading zeros")],
)  # fmt: skip
def test_what_would_join_is_named(name, listed, words):
    assert f"1 would be {words} ({listed} for {name})" in mending(join_ids([name], [listed]))


def test_nothing_would_join():
    assert mending(join_ids(["a"], ["b"])) == ""


@pytest.mark.parametrize(("names", "listed"), [(["3", "03"], ["003"]), (["0003"], ["3", "03"])])
def test_padding_that_could_mean_two(names, listed):
    with pytest.raises(DataError, match="3 and 03 are one id"):
        join_ids(names, listed, "pad")


def test_an_exact_id_is_not_padded():
    assert join_ids(["0003"], ["0003", "3"], "pad").found == {"0003": "0003"}


@pytest.mark.parametrize("name", ["nan", "NaN", "None", "null", "NA", "n/a"])
def test_unknown_is_no_subject_of_several_rows(name):
    check_subjects(Path("labels.csv"), [name, "p1", "", ""])
    with pytest.raises(DataError, match=f'30 rows have the subject "{name}": leave the cell empty or correct it'):
        check_subjects(Path("labels.csv"), ["p1", *[name] * 30])


def test_rows_by_an_id():
    table = pd.DataFrame({"id": ["a", "b", "a", ""], "x": ["1", "2", "1", "9"]})
    assert rows_by(Path("t.csv"), table, "id") == {"a": {"id": "a", "x": "1"}, "b": {"id": "b", "x": "2"}}
    with pytest.raises(DataError, match=r"t.csv has no column 'case'; it has id, x"):
        rows_by(Path("t.csv"), table, "case")
    table.loc[2, "x"] = "3"
    with pytest.raises(DataError, match=r"t.csv lists a twice, with different values"):
        rows_by(Path("t.csv"), table, "id")


def test_labels_for_under_half_are_refused(capsys):
    check_labels(Path("labels.csv"), join_ids(["a", "b"], ["a", "c"]), "cases")
    assert "labels.csv: 1 of 2 cases are listed; of the ids it lists, 1 are not in the archive" in (
        capsys.readouterr().out
    )
    with pytest.raises(DataError, match=r"2 of 3 cases are not in labels.csv, such as b; it lists c: correct the file"):
        check_labels(Path("labels.csv"), join_ids(["a", "b", "d"], ["a", "c"]), "cases")
    with pytest.raises(DataError, match=r"such as 01; 3 would be with leading zeros \(1 for 01\): set x.ids: pad"):
        check_labels(Path("labels.csv"), join_ids(["01", "02", "03"], ["1", "2", "3"]), "cases", "x.ids")
