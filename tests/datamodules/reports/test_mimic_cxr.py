import gzip
import zipfile

import pytest

from common.errors import DataError
from datamodules.reports.mimic_cxr import find_studies
from datamodules.reports.text import mimic_text, read_report
from datamodules.tree import Tree

# s50000001 has two images, s50000002 no report, s50000003 no image, s50000004 is not in the table of findings.
METADATA = """dicom_id,subject_id,study_id, ViewPosition ,Rows
b-1,10000001,50000001,PA ,9
a-1,10000001,50000001,LATERAL,9
c-1,10000001,50000002,,9
d-1,11000002,50000004,AP,9
d-1,11000002,50000004,AP,8
"""
SPLIT = """dicom_id,study_id,subject_id,split
b-1,50000001,10000001,train
a-1,50000001,10000001,train
c-1,50000002,10000001,train
d-1,50000004,11000002, validate
"""
FINDINGS = """subject_id,study_id,Edema,No Finding
10000001,50000001,-1.0,
10000001,50000001,0.0,
10000001,50000002,-1.0,1.0
"""
STEMS = ("p10/p10000001/s50000001", "p10/p10000001/s50000003", "p11/p11000002/s50000004")


@pytest.fixture
def product(tmp_path):
    folder = tmp_path / "mimic-cxr-jpg/2.1.0"
    folder.mkdir(parents=True)
    for name, text in (("metadata", METADATA), ("split", SPLIT), ("chexpert", FINDINGS)):
        (folder / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "files").mkdir()
    return folder


@pytest.fixture
def root(product, tmp_path):
    (tmp_path / "mimic-cxr/2.1.0").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "mimic-cxr/2.1.0/mimic-cxr-reports.zip", "w") as archive:
        for stem in STEMS:
            archive.writestr(f"files/{stem}.txt", f" FINAL REPORT\n FINDINGS: {stem}\n")
    return tmp_path


def rewrite(product, name, text):
    """Replace a table by one that is not compressed."""
    (product / f"mimic-cxr-2.0.0-{name}.csv.gz").unlink()
    (product / f"mimic-cxr-2.0.0-{name}.csv").write_text(text)


def test_both_products(root, product):
    first, second, last = find_studies(Tree(root))
    folder = product / "files/p10/p10000001/s50000001"
    assert first[:4] == ("50000001", "10000001", (folder / "b-1.jpg", folder / "a-1.jpg"), ("PA", "LATERAL"))
    assert mimic_text(read_report(first.text), "findings_impression") == STEMS[0]
    assert second.text is None
    assert second.views == ("",)
    assert last.images == (product / "files/p11/p11000002/s50000004/d-1.jpg",)
    assert [study.split for study in (first, second, last)] == ["train", "train", "val"]
    assert [dict(study.attributes) for study in (first, second, last)] == [
        {"Edema": "-1.0", "No Finding": ""},
        {"Edema": "-1.0", "No Finding": "1.0"},
        {"Edema": "", "No Finding": ""},
    ]


def test_reports_that_are_unpacked_and_plain_tables(product):
    rewrite(product, "metadata", METADATA)
    (product / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    for stem in STEMS:
        path = product / f"mimic-cxr-reports/files/{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stem)
    studies = find_studies(Tree(product))
    assert [study.text and read_report(study.text) for study in studies] == [STEMS[0], None, STEMS[2]]
    assert studies[0].attributes == {}


def test_views(root):
    studies = find_studies(Tree(root), ["ap", "PA"])
    assert [(study.case_id, study.views) for study in studies] == [("50000001", ("PA",)), ("50000004", ("AP",))]
    with pytest.raises(DataError, match=r"no image of the views LL; it has .*PA \(1\).*blank \(1\)"):
        find_studies(Tree(root), ["LL"])


def test_the_newest_version_is_taken(root, product):
    old = root / "mimic-cxr-jpg/2.0.0"
    old.mkdir()
    (old / "mimic-cxr-2.0.0-metadata.csv").write_text("no table of ours\n")
    assert len(find_studies(Tree(root))) == 3


def test_other_roots_are_not_searched_to_their_ends(tmp_path, product):
    for index in range(256):
        (tmp_path / f"patients/{index}").mkdir(parents=True)
    for place in ("a/b/c/product", "files/product", "patients/product"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        product = product.rename(tmp_path / place)
        assert find_studies(Tree(tmp_path)) == []


def test_images_without_the_product_that_has_reports(product, tmp_path):
    with pytest.raises(DataError, match=r"has no reports: fetch mimic-cxr-reports.zip of MIMIC-CXR and put it into"):
        find_studies(Tree(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("split", SPLIT.replace("a-1,50000001,10000001,train", "a-1,50000001,10000001,test"),
         "gives the study 50000001 more than one split: train, test"),
        ("split", SPLIT.replace(",split", ",part"), r"needs the column split, it has dicom_id, .*, part"),
        ("metadata", METADATA.replace("a-1,10000001", "a-1,10000009"), "50000001 more than one subject_id"),
        ("metadata", METADATA.replace("a-1", "../a"), r"rows whose dicom_id is not an identifier, first '\.\./a'"),
        ("metadata", METADATA.split("\n")[0], "lists no image"),
        ("metadata", "", "cannot be read as a table"),
    ],
)  # fmt: skip
def test_bad_tables(root, product, name, text, message):
    rewrite(product, name, text)
    with pytest.raises(DataError, match=message):
        find_studies(Tree(root))


def test_damaged_and_missing_files(root, product):
    table = product / "mimic-cxr-2.0.0-split.csv.gz"
    table.write_bytes(table.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"split.csv.gz is damaged .*: fetch it again"):
        find_studies(Tree(root))
    table.unlink()
    with pytest.raises(DataError, match=r"has no mimic-cxr-\*-split.csv.gz beside mimic-cxr-2.0.0-metadata.csv.gz"):
        find_studies(Tree(root))
    reports = root / "mimic-cxr/2.1.0/mimic-cxr-reports.zip"
    reports.write_bytes(reports.read_bytes()[:-30])
    table.write_bytes(gzip.compress(SPLIT.encode()))
    with pytest.raises(DataError, match="cannot be read as an archive"):
        find_studies(Tree(root))
