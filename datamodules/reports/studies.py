"""Images with text: studies, and the location of their reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from datamodules.registry import Archive, FileRef, Record


class ReportFile(NamedTuple):
    """The location of a report.

    Attributes:
        path: A text file, or the archive that holds it.
        member: Name inside a zip archive; None for a plain file.
    """

    path: Path
    member: str | None = None


class Study(NamedTuple):
    """Images that share one text.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are made by patient.
        images: Its views; empty: only text.
        views: What each image shows, such as ``PA``; an empty text means unknown.
        text: The report or its location; None: there is none.
        split: ``train``, ``val`` or ``test`` where the archive defines one.
        attributes: Further facts by name, such as a finding; an empty text means unknown.
    """

    case_id: str
    patient_id: str
    images: tuple[Path, ...]
    views: tuple[str, ...] = ()
    text: str | ReportFile | None = None
    split: str | None = None
    attributes: Mapping[str, str] = {}

    def record(self) -> Record:
        """Return the study as every data module can read it."""
        views = self.views or ("",) * len(self.images)
        text = FileRef(self.text.path, member=self.text.member) if isinstance(self.text, ReportFile) else self.text
        images = tuple(zip(self.images, views, strict=True))
        return Record(self.case_id, self.patient_id, images=images, text=text, attributes=self.attributes,
                      split=self.split)  # fmt: skip


def study_of(record: Record) -> Study:
    """Return the images and the text of a record as a study."""
    text = ReportFile(record.text.path, record.text.member) if isinstance(record.text, FileRef) else record.text
    images, views = tuple(path for path, _ in record.images), tuple(view for _, view in record.images)
    return Study(record.case_id, record.patient_id, images, views, text, record.split, record.attributes)


def studies_of(archive: Archive) -> list[Study]:
    """Return the samples of an archive as studies.

    Questions become texts of their images. Answers are left out, and so are questions of the test split, as models
    trained on these texts may be tested on it later. Questions that an archive marks for validation stay there.
    """
    records = archive.records
    if "questions" in archive.gives:
        records = [record for record in records if record.split != "test"]
        if not any(record.split == "val" for record in records):
            records = [record._replace(split=None) for record in records]
    return [study_of(record) for record in records]
