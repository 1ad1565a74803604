"""Single images of patients, for methods that need only images."""

from pathlib import Path
from typing import NamedTuple

from datamodules.registry import Archive, FileRef, Record


class Picture(NamedTuple):
    """One image of a person.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are made and genetics joined by patient.
        image: The file.
        split: ``train``, ``val`` or ``test`` where the archive defines one.
        lesion: Mask of a lesion; None if there is none.
    """

    case_id: str
    patient_id: str
    image: Path
    split: str | None = None
    lesion: Path | None = None

    def record(self) -> Record:
        """Return the picture as every data module can read it."""
        masks = {} if self.lesion is None else {"lesion": FileRef(self.lesion)}
        return Record(self.case_id, self.patient_id, images=((self.image, ""),), masks=masks, split=self.split)


def pictures_of(archive: Archive) -> list[Picture]:
    """Return every image of an archive as a picture; several images of one sample are distinguished by their names."""
    found = []
    for record in archive.records:
        split = archive.facts.held_out if record.split == "test" else record.split
        lesion = next(iter(record.masks.values())).path if record.masks else None
        for path, _ in record.images:
            name = record.case_id if len(record.images) == 1 else f"{record.case_id}/{path.stem}"
            found.append(Picture(name, record.patient_id, path, split, lesion))
    return found
