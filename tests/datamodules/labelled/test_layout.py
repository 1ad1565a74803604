import math

import pytest

from common.errors import DataError
from datamodules.labelled.layout import LabelledTable, need_columns, need_file
from datamodules.tables import read_table
from datamodules.tree import Tree

TABLE = """image,subject, Split ,fluid,air
a/1.png,ann, Train,1,0.0
a/2.png,ann,train,0,
b.png,,TEST,1.0,0
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "labels.csv").write_text(TABLE)
    return tmp_path


def test_a_table_of_images(root):
    layout = LabelledTable(["fluid", "air"], columns={"split": "Split"})
    assert layout.classes == ("fluid", "air")
    first, second, last = layout.find(root)
    assert first == ("a/1.png", "ann", root / "a/1.png", (1.0, 0.0), "train", "", ())
    assert second.targets[0] == 0.0
    assert math.isnan(second.targets[1])
    assert (last.patient_id, last.split) == ("b.png", "test")


def test_other_names_of_columns_and_no_split(root):
    (root / "eyes.csv").write_text("file,person,grade\nx.jpg,p,1\n")
    found = LabelledTable(["grade"], "eyes.csv", {"image": "file", "subject": "person"}).find(root)
    assert found == [("x.jpg", "p", root / "x.jpg", (1.0,), None, "", ())]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("subject", "person", "labels.csv has no column subject; it has image, person, Split, fluid, air"),
        ("fluid", "water", "has no column fluid"),
        ("ann,train,0", "ann,train,2", "gives a/2.png the fluid '2'; known are '0', '1', '0.0', '1.0', ''"),
        ("b.png", "../b.png", r"names the file '\.\./b.png', which does not lie under"),
        ("b.png", "/b.png", "names the file '/b.png', which does not lie under"),
    ],
)
def test_bad_tables(root, old, new, message):
    (root / "labels.csv").write_text(TABLE.replace(old, new))
    with pytest.raises(DataError, match=message):
        LabelledTable(["fluid", "air"]).find(root)


def test_a_root_without_the_table(tmp_path):
    with pytest.raises(DataError, match=r"holds no labels.csv, so it is not a labelled table \(ROOT/labels.csv with"):
        LabelledTable(["fluid"]).find(tmp_path)


def test_the_first_pattern_wins_and_of_its_files_the_last(tmp_path):
    for name in ("v1.csv", "v2.csv", "old.csv"):
        (tmp_path / name).touch()
    layout = LabelledTable([])
    assert need_file(Tree(tmp_path), ["v*.csv", "old.csv"], layout).name == "v2.csv"
    assert need_file(Tree(tmp_path), ["new.csv", "old.csv"], layout).name == "old.csv"


def test_all_missing_columns_are_named(root):
    table = read_table(root / "labels.csv")
    need_columns(root, table, ["fluid", "air"])
    with pytest.raises(DataError, match="has no column bone, fat; it has image, subject, Split, fluid, air"):
        need_columns(root, table, ["fluid", "bone", "fat"])
