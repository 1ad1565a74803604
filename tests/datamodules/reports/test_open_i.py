import io
import json
import tarfile
from statistics import median

import pytest

from common.errors import DataError
from datamodules.reports.open_i import find_studies, open_i_text
from datamodules.reports.text import MAX_BYTES
from datamodules.tree import Tree


def report(images=(), **texts):
    """Write a report as Open-I does."""
    body = "".join(f'<AbstractText Label="{label.upper()}">{text}</AbstractText>' for label, text in texts.items())
    shown = "".join(f'<parentImage id="{name}"/>' for name in images)
    return f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><Abstract>{body}</Abstract>{shown}</eCitation>'


REPORTS = {
    "10.xml": report(findings="Clear  &amp; dry.", impression="No XXXX."),
    "9.xml": report(["CXR9_1", "CXR9_2"], indication="Cough", findings="", impression="Größe"),
    "11.xml": "<eCitation><Abstract>",
    "readme.xml": "<note/>",
}


def write_archive(root, members):
    with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as archive:
        for name, text in members.items():
            data = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return root


def write_folder(root, members):
    for name, text in members.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("write", [write_archive, write_folder])
def test_archive_and_folder(tmp_path, write):
    write(tmp_path, {f"ecgen-radiology/{name}": text for name, text in REPORTS.items()})
    (tmp_path / "images").mkdir()
    (tmp_path / "images/CXR9_2.png").touch()
    studies = find_studies(Tree(tmp_path))
    assert [study.case_id for study in studies] == ["CXR9", "CXR10", "CXR11"]
    assert [study.patient_id for study in studies] == ["CXR9", "CXR10", "CXR11"]
    assert studies[0].images == (tmp_path / "images/CXR9_2.png",)
    assert studies[0].views == ("",)
    assert [open_i_text(study.text, "findings_impression") for study in studies] == [
        "Größe",
        "Clear & dry. No XXXX.",
        "",
    ]
    assert open_i_text(studies[0].text, "full") == "Cough Größe"
    with pytest.raises(ValueError, match="Unknown part 'all' of a report"):
        open_i_text(studies[0].text, "all")


def test_other_roots(tmp_path):
    write_folder(tmp_path, {"1.xml": "<!DOCTYPE a><annotation/>", "2.xml": "<annotation/>"})
    assert find_studies(Tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../1.xml": report()}, r"holds the member \.\./1.xml, which points out of the archive"),
        ({"/a/1.xml": report()}, "holds the member /a/1.xml, which points out"),
        ({"a/1.xml": report(findings="a" * MAX_BYTES)}, r"a/1.xml is longer than 1048576 bytes"),
        ({"a/1.xml": '<!DOCTYPE a [<!ENTITY b SYSTEM "c">]>' + report(findings="&b;")}, "a/1.xml has a DOCTYPE"),
    ],
)
def test_archives_that_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        find_studies(Tree(write_archive(tmp_path, members)))


def test_a_truncated_archive(tmp_path):
    path = write_archive(tmp_path, {"a/1.xml": report(findings="a")}) / "NLMCXR_reports.tgz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"is damaged .*: fetch it again"):
        find_studies(Tree(tmp_path))


@pytest.mark.real_data
def test_the_real_archive(real_data):
    studies = find_studies(Tree(real_data("openi_reports")))
    assert len(studies) == 3955
    assert studies[-1].case_id == "CXR3999"
    found = [json.loads(study.text) for study in studies]
    without = {name: {i for i, parts in enumerate(found) if name not in parts} for name in ("findings", "impression")}
    assert [len(names) for names in without.values()] == [530, 34]
    assert len(without["findings"] & without["impression"]) == 28
    lengths = [len(open_i_text(study.text, "findings_impression").split()) for study in studies]
    assert median(lengths) == 34
    assert lengths.count(0) == 28
