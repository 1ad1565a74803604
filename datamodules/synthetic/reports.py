"""A synthetic MIMIC-CXR: radiographs and tables of MIMIC-CXR-JPG 2.0.0, reports of MIMIC-CXR 2.0.0."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.randomness import numpy_generator
from datamodules.synthetic.radiographs import CHEXPERT_COLUMNS, PHRASES, draw_findings, draw_image, write_report
from datamodules.synthetic.tables import packaged, write_image, write_table

_VIEW_CODES = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral"}


class _Study(NamedTuple):
    """One study; ``images`` maps a ``dicom_id`` to its view, and ``report`` is None where the archive has none."""

    subject: int
    name: int
    images: dict[str, str]
    date: str
    time: str
    report: str | None
    labels: Mapping[str, float]

    @property
    def folder(self) -> str:
        """Where its images lie; its report has the same name."""
        return f"files/p{str(self.subject)[:2]}/p{self.subject}/s{self.name}"


def _identifier(first_digit: int, number: int, seed: int) -> int:
    """Return eight digits for a number: scattered over their range, no two alike under one seed."""
    offset = int(numpy_generator("synthetic", "mimic_cxr", seed, "identifiers", first_digit).integers(10**7))
    return first_digit * 10**7 + (number * 7368787 + offset) % 10**7


def _draw_study(root: Path, seed: int, index: int, size: Sequence[int]) -> _Study:
    """Draw one study and write its images."""
    rng = numpy_generator("synthetic", "mimic_cxr", seed, index)
    findings = draw_findings(rng)
    frontal = "PA" if rng.random() < 0.6 else "AP"
    views = (frontal, "LATERAL") if index % 3 == 2 else (frontal,)
    report = write_report(rng, findings, " AND ".join(views), sections=index != 2)
    digits = [rng.bytes(20).hex() for _ in views]
    study = _Study(
        subject=_identifier(1, index - (index + 1) // 5, seed),
        name=_identifier(5, index, seed),
        images={"-".join(d[i : i + 8] for i in range(0, 40, 8)): v for d, v in zip(digits, views, strict=True)},
        date=f"{rng.integers(2110, 2200)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        time=f"{rng.integers(24):02d}{rng.integers(60):02d}{rng.integers(60):02d}.{rng.integers(1000):03d}",
        report=None if index == 1 else report.text,
        labels=report.labels,
    )
    for dicom, view in study.images.items():
        write_image(root / study.folder / f"{dicom}.jpg", draw_image(rng, findings, size, view))
    return study


def _metadata(study: _Study, size: Sequence[int]) -> list[tuple[object, ...]]:
    """Return the rows of a study in the order of the official columns."""
    procedure, _ = PHRASES["examinations"][" AND ".join(study.images.values())]
    return [
        (dicom, study.subject, study.name, procedure, view, *size, study.date, study.time,
         procedure, _VIEW_CODES[view], "Recumbent" if view == "AP" else "Erect")
        for dicom, view in study.images.items()
    ]  # fmt: skip


def _splits(subjects: Sequence[int]) -> dict[int, str]:
    """Hold out a tenth of the patients for validation and a tenth for testing, at least one each of three or more."""
    held = max(1, round(len(subjects) / 10)) if len(subjects) > 2 else 0
    names = ["train"] * (len(subjects) - 2 * held) + ["validate"] * held + ["test"] * held
    return dict(zip(subjects, names, strict=True))


def _write_reports(path: Path, studies: Sequence[_Study]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for study in studies:
            member = zipfile.ZipInfo(f"{study.folder}.txt", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, study.report or "", zipfile.ZIP_DEFLATED)


def write_mimic_cxr(root: Path, num_cases: int, seed: int, size: Sequence[int] = (320, 384)) -> None:
    """Write studies in the layouts of MIMIC-CXR-JPG and MIMIC-CXR, of which a reader needs both.

    Every fifth study is a second one of the patient before; every third has a lateral view too. The second study has no
    report, and the report of the third has no section headers.
    """
    jpg, text = root / "mimic-cxr-jpg/2.0.0", root / "mimic-cxr/2.0.0"
    studies = [_draw_study(jpg, seed, index, size) for index in range(num_cases)]
    splits = _splits(list(dict.fromkeys(study.subject for study in studies)))
    studies.sort(key=lambda study: (study.subject, study.name))
    images = [(study, dicom) for study in studies for dicom in study.images]

    reported = [study for study in studies if study.report is not None]
    write_table(
        jpg / "mimic-cxr-2.0.0-metadata.csv.gz",
        packaged("layouts.yaml")["columns"]["mimic_metadata"],
        [row for study in studies for row in _metadata(study, size)],
    )
    write_table(
        jpg / "mimic-cxr-2.0.0-split.csv.gz",
        ("dicom_id", "study_id", "subject_id", "split"),
        [(dicom, study.name, study.subject, splits[study.subject]) for study, dicom in images],
    )
    write_table(
        jpg / "mimic-cxr-2.0.0-chexpert.csv.gz",
        ("subject_id", "study_id", *CHEXPERT_COLUMNS),
        [{"subject_id": study.subject, "study_id": study.name, **study.labels} for study in reported],
    )
    write_table(
        text / "cxr-record-list.csv.gz",
        ("subject_id", "study_id", "dicom_id", "path"),
        [(study.subject, study.name, dicom, f"{study.folder}/{dicom}.dcm") for study, dicom in images],
    )
    write_table(
        text / "cxr-study-list.csv.gz",
        ("subject_id", "study_id", "path"),
        [(study.subject, study.name, f"{study.folder}.txt") for study in studies],
    )
    _write_reports(text / "mimic-cxr-reports.zip", reported)
