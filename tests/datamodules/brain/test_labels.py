from dataclasses import replace

import pytest

from common.errors import DataError
from datamodules.brain.labels import LabelSource, label_tables, read_classes
from datamodules.tree import Tree
from datamodules.volumes.cases import Case

CASES = [Case(name, name, {}) for name in ("0050002", "0050003", "0050004")]
AUTISM = LabelSource({"control": ["2"], "ASD": ["1"]}, table="Pheno*.csv", key="SUB_ID", column="DX_GROUP",
                     ids="pad")  # fmt: skip


def classes_of(source, root):
    return read_classes(CASES, source, label_tables(source, Tree(root)))


def test_ids_without_their_zeros_and_values_of_no_class(tmp_path):
    (tmp_path / "Pheno_V1.csv").write_text("SITE,SUB_ID , DX_GROUP\nA,50002,1\nA,50003, 2\nA,50004,-9999\n")
    assert classes_of(AUTISM, tmp_path) == {"0050002": 1, "0050003": 0}


def test_zeros_are_not_mended_unasked(tmp_path):
    (tmp_path / "Pheno.csv").write_text("SUB_ID,DX_GROUP\n50002,1\n50003,2\n0050004,2\n")
    with pytest.raises(DataError, match=r"2 of 3 cases are not in Pheno.csv, such as 0050002; 2 would be with leading "
                                        r"zeros \(50002 for 0050002\): set classes.ids: pad, or correct"):  # fmt: skip
        classes_of(replace(AUTISM, ids="exact"), tmp_path)


def test_a_name_has_one_value_in_all_tables(tmp_path):
    for name, value in (("Pheno_1.csv", 1), ("Pheno_2.csv", 2)):
        (tmp_path / name).write_text(f"SUB_ID,DX_GROUP\n50002,{value}\n50003,2\n")
    with pytest.raises(DataError, match=r"Pheno_2.csv gives 50002 another DX_GROUP than a table before it"):
        classes_of(AUTISM, tmp_path)


def test_tabs(tmp_path):
    (tmp_path / "Pheno.csv").write_text("SUB_ID\tDX_GROUP\n50002\t1\n50003\t2\n")
    assert len(classes_of(AUTISM, tmp_path)) == 2


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="no table Pheno"):
        classes_of(AUTISM, tmp_path)
    (tmp_path / "Pheno.csv").write_text("SUB_ID,DX\n50002,1\n")
    with pytest.raises(DataError, match="has no column 'DX_GROUP'; it has SUB_ID, DX"):
        classes_of(AUTISM, tmp_path)
    (tmp_path / "Pheno.csv").write_text("SUB_ID,DX_GROUP\n50002,pending\n50003,1\n")
    with pytest.raises(DataError, match="1 of 3 cases are one of control, ASD; the values found are 1, pending"):
        classes_of(AUTISM, tmp_path)
