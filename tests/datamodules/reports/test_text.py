import os
import zipfile

import pytest

from datamodules.reports.studies import ReportFile
from datamodules.reports.text import MAX_BYTES, ReportError, clean, mimic_text, plain_text, read_report, sections

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion
 or pneumothorax. As compared to ___,
 NOTE: the heart is of normal size.

 IMPRESSION:

 No acute process.
"""


def test_sections_of_a_report():
    found = sections(REPORT)
    assert [name for name, _ in found] == (
        ["preamble", "examination", "indication", "technique", "comparison", "findings", "note", "impression"]
    )
    assert found[0][1] == "FINAL REPORT"
    assert found[-1][1] == "No acute process."
    assert sections(REPORT.replace("\n", "\r\n")) == found


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("CONCLUSION", "impression"),
        ("IMPRESSOIN", "impression"),
        ("MPRESSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("FINDING", "findings"),
        ("FINIDNGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PORTABLE AP RADIOGRAPH", "findings"),
        ("AP AND LATERAL VIEWS", "findings"),
        ("COMPARISON CHEST RADIOGRAPH", "comparison"),
        ("COMPARRISON", "comparison"),
        ("PAST MEDICAL HISTORY", "history"),
        ("REASON FOR EXAM", "indication"),
        ("MEDICATION", "medication"),
        ("RECOMMENDATION(S)", "recommendations"),
    ],
)
def test_names_of_sections(header, name):
    assert sections(f"\n {header}: text\n")[1] == (name, "text")


def test_a_header_needs_one_space_before_and_white_space_behind():
    assert sections("\nFINDINGS: a\n") == [("full report", "FINDINGS: a")]
    assert sections("\n At 10:30\n RATIO:2 of\n Seen: a\n") == [("full report", "At 10:30\n RATIO:2 of\n Seen: a")]


def test_the_line_that_follows_a_header_belongs_to_its_section():
    found = sections("x\n FINDINGS:\n COMPARISON: is made with the last one.\n IMPRESSION: b\n")
    assert found == [
        ("preamble", "x"),
        ("findings", "COMPARISON: is made with the last one."),
        ("impression", "b"),
    ]


def test_empty_findings_are_dropped_and_the_last_paragraph_takes_their_place():
    text = "x\n FINDINGS: \n\n HISTORY: cough\n \n No effusion.\n \n No nodule.\n"
    assert sections(text) == [
        ("preamble", "x"),
        ("history", "cough"),
        ("last_paragraph", "No effusion.\n \n No nodule."),
    ]
    assert mimic_text(text, "findings_impression") == "No effusion. No nodule."


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("\n IMPRESSION: c\n FINDINGS: a\n b\n", "a b c"),
        ("\n FINDINGS: old\n IMPRESSION: c\n FINDINGS: new\n", "new c"),
        ("\n FINDINGS: a\n IMPRESSION: ___\n", "a"),
        ("\n FINDINGS: a\n IMPRESSION:\n", "a"),
        ("\n COMPARISON: none\n HISTORY: cough\n", "none"),
        ("\n HISTORY: cough\n TECHNIQUE: two\n", "HISTORY: cough TECHNIQUE: two"),
        ("The heart\nis large.", "The heart is large."),
        ("", ""),
    ],
)
def test_what_is_used_of_a_report(text, used):
    assert mimic_text(text, "findings_impression") == used


def test_an_addendum_above_the_report_survives():
    text = " FINAL ADDENDUM\n ADDENDUM: The nodule is new.\n" + "_" * 40 + "\n" + REPORT
    assert "ADDENDUM: The nodule is new. FINAL REPORT EXAMINATION: CHEST" in mimic_text(text, "full")
    assert mimic_text(text, "findings_impression") == mimic_text(REPORT, "findings_impression")


def test_redactions():
    text = "Dr. ___ at\t_ 9\n" + "_" * 20 + "\n  ___F"
    assert clean(text) == "Dr. at 9 F"
    assert clean(text, keep_redactions=True) == "Dr. ___ at 9 ___F"


@pytest.mark.parametrize("extract", [mimic_text, plain_text])
def test_unknown_parts(extract):
    assert extract(" a \n b", "full") == "a b"
    with pytest.raises(ValueError, match="Unknown part 'impression' of a report; known are full, findings_impression"):
        extract("a", "impression")


def fault_of(source):
    with pytest.raises(ReportError) as caught:
        read_report(source)
    return caught.value.kind, caught.value.detail


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "reports.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", "Gr\u00f6\u00dfe")
        file.writestr("b.txt", "Gr\u00f6\u00dfe".encode("latin-1"))
        file.writestr("none.txt", " \n")
        file.writestr("long.txt", "a" * (MAX_BYTES + 1))
        file.writestr("most.txt", "a" * MAX_BYTES)
    return path


def test_reports_in_an_archive(archive):
    assert read_report(ReportFile(archive, "a.txt")) == read_report(ReportFile(archive, "b.txt")) == "Größe"
    assert len(read_report(ReportFile(archive, "most.txt"))) == MAX_BYTES
    assert fault_of(ReportFile(archive, "c.txt"))[0] == "missing"
    assert fault_of(ReportFile(archive, "none.txt"))[0] == "empty"
    kind, detail = fault_of(ReportFile(archive, "long.txt"))
    assert kind == "unreadable"
    assert "longer than 1048576 bytes" in detail


def test_reports_in_files(tmp_path):
    path = tmp_path / "a.txt"
    assert fault_of(ReportFile(path))[0] == "missing"
    assert fault_of(ReportFile(path, "a.txt"))[0] == "missing"
    path.write_bytes(b"")
    assert fault_of(ReportFile(path))[0] == "empty"
    path.write_bytes(b"\xef\xbb\xbfnormal")
    assert read_report(ReportFile(path)) == "normal"
    assert fault_of(ReportFile(path, "a.txt"))[0] == "unreadable"
    assert fault_of(ReportFile(tmp_path))[0] == "unreadable"


def test_damage_inside_an_archive(tmp_path):
    path = tmp_path / "reports.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "no effusion")
    path.write_bytes(path.read_bytes().replace(b"no effusion", b"an effusion"))
    assert fault_of(ReportFile(path, "a.txt"))[0] == "unreadable"


def test_an_archive_is_opened_once_per_process(archive, monkeypatch):
    opened = []
    whole = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or whole(path))
    for process in (1, 1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        read_report(ReportFile(archive, "a.txt"))
    assert len(opened) == 2


def test_redactions_can_stay():
    assert "___F with new onset" in mimic_text(REPORT, "full", keep_redactions=True)
    found = mimic_text(REPORT, "findings_impression", keep_redactions=True)
    assert "As compared to ___, No acute" in found
    assert found.replace("___,", ",") == mimic_text(REPORT, "findings_impression")
    assert plain_text("Seen by ___ at __ noon", "full", keep_redactions=True) == "Seen by ___ at noon"
