import csv
import re

import pytest

from common.errors import TooManyFaultsError
from common.faults import Fault, FaultLedger, SampleFaultError
from common.pseudonyms import pseudonym


def fault(number, kind="nan"):
    return Fault(f"/archive/case{number}/t1.nii.gz", kind, "3 voxels are not finite", f"case{number}", 0, 1)


def test_a_fault_is_recorded_once():
    ledger = FaultLedger()
    ledger.add([fault(1), fault(1), fault(1, "shape"), fault(2)])
    assert [(f.sample, f.kind) for f in ledger.faults] == [("case1", "nan"), ("case1", "shape"), ("case2", "nan")]
    assert ledger.num_faulty == 2
    assert len(ledger.take_news()) == 3
    assert not ledger.has_news
    ledger.add([fault(1)])
    assert not ledger.has_news


@pytest.mark.parametrize(("samples", "tolerated"), [(6, 5), (499, 5), (500, 5), (1000, 10)])
def test_one_in_a_hundred_but_never_fewer_than_five(samples, tolerated):
    ledger = FaultLedger(max_fraction=0.01)
    ledger.num_samples = samples
    ledger.add([fault(i) for i in range(tolerated)])
    ledger.check()
    ledger.add([fault(tolerated)])
    with pytest.raises(TooManyFaultsError, match=rf"{tolerated + 1} of {samples} samples are faulty") as error:
        ledger.check()
    assert "case0" in str(error.value)
    assert "case3" not in str(error.value)


def test_the_table_of_faults(tmp_path):
    ledger = FaultLedger()
    ledger.add([fault(1)])
    ledger.write(tmp_path / "data_faults.csv")
    rows = list(csv.DictReader((tmp_path / "data_faults.csv").open()))
    assert rows == [{"path": "/archive/case1/t1.nii.gz", "kind": "nan", "detail": "3 voxels are not finite",
                     "rank": "0", "worker": "1"}]  # fmt: skip


def test_pseudonyms_name_no_one(tmp_path):
    """Two suffixes were kept: of scan.SMITH-JANE-19610203.png the name."""
    names = ["scan.SMITH-JANE-19610203.png", "SMITH-JANE-19610203", "a.SMITH.nii.gz", "b.tar.SMITH"]
    ledger = FaultLedger(anonymise=True)
    ledger.add(
        Fault(f"/SMITH/{name}", "unreadable", f"{name} cannot be opened", "SMITH-JANE-19610203") for name in names
    )
    ledger.write(tmp_path / "data_faults.csv")
    rows = list(csv.DictReader((tmp_path / "data_faults.csv").open()))
    subjects, files = zip(*(row["path"].split("/") for row in rows), strict=True)
    assert set(subjects) == {pseudonym("SMITH-JANE-19610203")}
    assert len(set(files)) == 4
    assert [name.partition(".")[2] for name in files] == ["png", "", "nii.gz", ""]
    for text in ((tmp_path / "data_faults.csv").read_text(), ledger.describe()):
        assert not re.search("SMITH|JANE|1961|opened", text)
    assert "unreadable 4" in ledger.describe()


def test_the_exception_says_all_of_it():
    assert str(SampleFaultError([fault(1), fault(2)])).count("3 voxels are not finite") == 2
