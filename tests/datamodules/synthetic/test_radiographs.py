import csv
import gzip
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from datamodules.synthetic.radiographs import (
    CHEXPERT_COLUMNS,
    SIDED_FINDINGS,
    draw_findings,
    draw_image,
    write_report,
)
from datamodules.synthetic.reports import write_mimic_cxr

COLUMNS = {
    "effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    "nodule": "Lung Lesion",
    "consolidation": "Consolidation",
    "cardiomegaly": "Cardiomegaly",
    "devices": "Support Devices",
}
WORDS = {
    "effusion": "effusion|pleural fluid",
    "pneumothorax": "pneumothora|pleural air",
    "nodule": "nodul|lesion",
    "consolidation": "consolidat",
    "cardiomegaly": "heart|cardi",
    "devices": "tube|devices",
}
SIDE_WORDS = {"left": r"\bleft\b", "right": r"\bright\b", "both": r"\bbilateral\b|\bboth\b", "": ""}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mimic_cxr")
    write_mimic_cxr(root, 10, seed=0, size=(64, 80))
    return root


def table(path):
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def studies(count):
    """Yield findings, the report and its findings and impression, in lower case and on one line."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        findings = draw_findings(rng)
        report = write_report(rng, findings, ("PA", "AP", "LATERAL")[seed % 3])
        body = re.search(r"\n FINDINGS:\s(.*?)(\n NOTIFICATION|$)", report.text, re.DOTALL).group(1)
        yield findings, report, " ".join(body.lower().split())


def test_the_tree_is_official(root):
    jpg, text = root / "mimic-cxr-jpg/2.0.0", root / "mimic-cxr/2.0.0"
    metadata = table(jpg / "mimic-cxr-2.0.0-metadata.csv.gz")
    assert list(metadata[0])[:7] == ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription",
                                     "ViewPosition", "Rows", "Columns"]  # fmt: skip
    assert {row["ViewPosition"] for row in metadata} == {"PA", "AP", "LATERAL"}
    for row in metadata:
        subject, study, dicom = row["subject_id"], row["study_id"], row["dicom_id"]
        assert re.fullmatch(r"1\d{7}", subject)
        assert re.fullmatch(r"5\d{7}", study)
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", dicom)
        with Image.open(jpg / f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (80, 64))

    split = table(jpg / "mimic-cxr-2.0.0-split.csv.gz")
    assert list(split[0]) == ["dicom_id", "study_id", "subject_id", "split"]
    assert {row["split"] for row in split} == {"train", "validate", "test"}
    assert len({(row["subject_id"], row["split"]) for row in split}) == 8

    chexpert = table(jpg / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert tuple(chexpert[0]) == ("subject_id", "study_id", *CHEXPERT_COLUMNS)
    assert {row[column] for row in chexpert for column in CHEXPERT_COLUMNS} <= {"1.0", "0.0", "-1.0", ""}

    records, listed = table(text / "cxr-record-list.csv.gz"), table(text / "cxr-study-list.csv.gz")
    assert {row["dicom_id"] for row in records} == {row["dicom_id"] for row in metadata}
    with zipfile.ZipFile(text / "mimic-cxr-reports.zip") as archive:
        reports = {name: archive.read(name).decode() for name in archive.namelist()}
    assert len(listed) == 10
    assert len(reports) == len(chexpert) == 9
    assert set(reports) < {row["path"] for row in listed}
    assert sum("\n IMPRESSION:" not in report and "\n FINDINGS:" not in report for report in reports.values()) == 1


def test_reports_name_what_is_drawn_and_where():
    for findings, report, body in studies(200):
        sentences = re.split(r"\. ", body)
        for finding, side in findings.items():
            naming = [s for s in sentences if re.search(WORDS[finding], s) and re.search(SIDE_WORDS[side], s)]
            assert len(naming) >= 2, (finding, side, report.text)
        named = {side for side, word in SIDE_WORDS.items() if side and re.search(word, body)}
        assert named == set(findings.values()) - {""}
        assert "___" in report.text
        assert max(map(len, report.text.splitlines())) <= 79


def test_labels_agree_with_what_is_drawn():
    values = []
    for findings, report, _ in studies(200):
        for finding, column in COLUMNS.items():
            value = report.labels.get(column)
            assert value in ((1.0, -1.0) if finding in findings else (0.0, None)), (finding, report)
            values.append(value)
        assert report.labels.get("No Finding") == (1.0 if set(findings) <= {"devices"} else None)
    assert set(values) == {1.0, -1.0, 0.0, None}


def test_reports_are_rich_in_words():
    words = {word for _, report, _ in studies(300) for word in re.findall("[a-z]+", report.text.lower())}
    assert len(words) > 250


@pytest.mark.parametrize("finding", SIDED_FINDINGS)
def test_a_finding_changes_its_side(finding):
    for seed in range(4):
        plain = draw_image(np.random.default_rng(seed), {}, (160, 192)).astype(float)
        change = {}
        for side in ("left", "right", "both"):
            image = draw_image(np.random.default_rng(seed), {finding: side}, (160, 192))
            difference = np.abs(image - plain)
            change[side] = difference[:, :96].sum(), difference[:, 96:].sum()
        assert change["right"][0] > 5 * change["right"][1]
        assert change["left"][1] > 5 * change["left"][0]
        assert min(change["both"]) > 0.1 * max(change["both"])


def test_the_same_seed_writes_the_same_bytes(root, tmp_path):
    write_mimic_cxr(tmp_path / "again", 10, seed=0, size=(64, 80))
    write_mimic_cxr(tmp_path / "other", 1, seed=1, size=(64, 80))
    files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    assert len(files) == 6 + 13
    assert all((root / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert not {path.name for path in (tmp_path / "other").rglob("*.jpg")} & {file.name for file in files}


def test_views_of_a_study_differ_and_unknown_findings_are_refused():
    pa, lateral = (draw_image(np.random.default_rng(0), {}, (64, 80), view) for view in ("PA", "LATERAL"))
    assert np.abs(pa.astype(float) - lateral).mean() > 20
    with pytest.raises(ValueError, match="no finding 'cardiomegaly' at side 'left'"):
        draw_image(np.random.default_rng(0), {"cardiomegaly": "left"})
