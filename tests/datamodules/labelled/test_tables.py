import pandas as pd
import pytest

from common.errors import DataError
from datamodules.labelled.tables import column_names, column_targets, files_under
from datamodules.tree import Tree


def test_the_first_case_with_an_odd_label_is_named(tmp_path):
    table = pd.DataFrame({"mass": ["1", "0", "1", "?", "?"]})
    assert column_targets(tmp_path, table, "mass", {"0": 0.0, "1": 1.0, "?": -1.0}, "abcde") == [1, 0, 1, -1, -1]
    with pytest.raises(DataError, match=r"gives d the mass '\?'; known are '0', '1'"):
        column_targets(tmp_path, table, "mass", {"0": 0.0, "1": 1.0}, "abcde")


@pytest.mark.parametrize("name", ["", ".", "..", "../a.png", "/a.png", "a/b.png", "a b.png"])
def test_names_that_are_no_files(tmp_path, name):
    names = ["00000001_000.png", "1.2.840.1", "0004cfab-14fd", name]
    with pytest.raises(DataError, match="has 1 rows whose image is not a file name, first "):
        column_names(tmp_path, pd.DataFrame({"image": names}), "image")
    assert column_names(tmp_path, pd.DataFrame({"image": names[:3]}), "image") == names[:3]


def test_files_are_found_in_one_order(tmp_path):
    for name in ("b/2.png", "b/1.PNG", "a/z/3.png", "a/4.txt", "c/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = files_under(Tree(tmp_path), [tmp_path / "b", tmp_path / "absent", tmp_path / "a"], [".png"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/1.PNG", "b/2.png", "a/z/3.png"]
