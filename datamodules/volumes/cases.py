"""Cases of an archive of volumes, and how they are preprocessed."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from datamodules.registry import FileRef, Record, Series
from datamodules.volumes.intensity import RULES
from datamodules.volumes.voxels import STRICT, VoxelConfig


class Case(NamedTuple):
    """One study of one patient.

    Attributes:
        case_id: Unique name.
        patient_id: Splits are made by patient.
        images: Modality to file; a missing modality has no entry. Layouts name modalities as the archive does, data
            modules canonically (:mod:`common.modalities`).
        labels: Label name to file.
        split: ``train``, ``val`` or ``test`` where the archive says so.
        attributes: Further facts by name, such as a diagnosis; empty text = unknown.
        surplus: Files of a modality that has a file already, which data modules refuse.
        places: Modality to which volume of its file it is, where that is 4-D.
        series: File to the DICOM series of which it is the first slice.
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Path]
    labels: Mapping[str, Path] = {}
    split: str | None = None
    attributes: Mapping[str, str] = {}
    surplus: Sequence[Path] = ()
    places: Mapping[str, int] = {}
    series: Mapping[Path, Series] = {}

    def files(self) -> list[Path]:
        """Return the files of images and labels."""
        return [*(path for name in self.images for path in self.files_of(name)), *self.labels.values()]

    def files_of(self, modality: str) -> Sequence[Path]:
        """Return the files of one modality: its slices where it is a DICOM series."""
        series = self.series_of(modality)
        return (self.images[modality],) if series is None else series.files()

    def series_of(self, modality: str) -> Series | None:
        """Return the DICOM series that a modality is; None where it is a file, or a label."""
        path = self.images.get(modality)
        return None if path is None else self.series.get(path)

    def record(self) -> Record:
        """Return the case as every data module can read it."""
        volumes = {
            name: FileRef(path, self.places.get(name), series=self.series.get(path))
            for name, path in self.images.items()
        }
        masks = {name: FileRef(path) for name, path in self.labels.items()}
        return Record(self.case_id, self.patient_id, volumes=volumes, masks=masks, attributes=self.attributes,
                      split=self.split, surplus=tuple(self.surplus))  # fmt: skip


def case_of(record: Record) -> Case:
    """Return the volumes of a record as a case."""
    return Case(
        record.case_id,
        record.patient_id,
        {name: ref.path for name, ref in record.volumes.items()},
        {name: ref.path for name, ref in record.masks.items()},
        record.split,
        {**record.attributes, **record.targets},
        record.surplus,
        {name: ref.volume for name, ref in record.volumes.items() if ref.volume is not None},
        {ref.path: ref.series for ref in record.volumes.values() if ref.series is not None},
    )


_PATIENT = re.compile(
    r"(BraTS-[A-Z]+-\d+(?=-\d{3}$)|UCSF-PDGM-\d+(?=(_FU\d+d)?(_nifti)?$)|UPENN-GBM-\d+(?=_\d+$)"
    r"|IXI\d+(?=-(Guys|HH|IOP)-\d+$)|sub-strokecase\d+(?=_ses-\d+$))",
    re.IGNORECASE,
)


def patient_of(study: str) -> str:
    """Return the patient named in a study's name, as public archives write it; otherwise the study itself."""
    match = _PATIENT.match(study)
    return match.group(1) if match else study


@dataclass(frozen=True)
class Preprocessing:
    """How the volumes of a layout are preprocessed.

    Attributes:
        intensity: Rule by modality; see :mod:`datamodules.volumes.intensity`.
        reference: Modality whose grid all others are resampled to; None: they must share a grid already.
        spacing: Voxel size in mm along R, A, S; None keeps the reference's.
        size: Voxels to crop or pad to around the centre; None keeps all.
        resize: Voxels to interpolate to, whatever the resulting voxel size; None does not interpolate.
        voxels: How unusual files are read.
        crop_foreground: Whether to cut away the border where every modality is 0.
        centered: Whether that cut is symmetric about the volume's centre, so that it stays the atlas's centre.
            Intensities are computed inside the cut, which is repeated where they become 0.
        atlas: Voxels of the atlas in whose space volumes must be, skull-stripped; None: any space.
        ragged: Whether a case is stored with only the modalities it has, not with zeros for the others.
    """

    intensity: Mapping[str, str]
    reference: str | None = None
    spacing: tuple[float, float, float] | None = None
    size: tuple[int, int, int] | None = None
    crop_foreground: bool = False
    centered: bool = False
    atlas: tuple[int, int, int] | None = None
    ragged: bool = False
    resize: tuple[int, int, int] | None = None
    voxels: VoxelConfig = STRICT

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for cache keys and cards."""
        plain = asdict(replace(self, intensity=dict(self.intensity), voxels=STRICT))
        return json.loads(json.dumps({**plain, "voxels": self.voxels.as_dict(), "orientation": "RAS"}))


@dataclass(frozen=True)
class Layout:
    """An archive of volumes as training uses it: what its files are and how they are preprocessed.

    Attributes:
        name: Name of the archive's layout.
        tree: One line that shows the tree.
        modalities: Channels in order; empty: all that the tree holds.
        regions: Region to the label values that make it up.
        label_values: Every value a label may hold; empty: not checked.
        preprocessing: See :class:`Preprocessing`.
        crop_size: Default crop for pre-training.
        names: The archive's own names of the modalities, by canonical name; known once its cases are listed.
    """

    name: str
    tree: str
    modalities: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    label_values: frozenset[int]
    preprocessing: Preprocessing
    crop_size: tuple[int, int, int]
    names: Mapping[str, str] = field(default_factory=dict)

    def shown(self, modality: str) -> str:
        """Return the archive's own name of a modality."""
        return self.names.get(modality, modality)

    def with_voxels(self, voxels: VoxelConfig) -> "Layout":
        """Return the layout with settings for unusual files and their intensity rules.

        Raises:
            DataError: there is no such rule or modality.
        """
        for name, rule in voxels.intensity.items():
            if name not in self.modalities and name not in self.names:
                raise DataError(f"voxels.intensity names {name}; the modalities are {', '.join(self.modalities)}.")
            if rule not in RULES:
                raise DataError(f"voxels.intensity has the rule {rule} for {name}; known are {', '.join(RULES)}.")
        chosen = {name: rule for name, rule in voxels.intensity.items() if name in self.modalities}
        intensity = {**self.preprocessing.intensity, **chosen}
        return replace(self, preprocessing=replace(self.preprocessing, intensity=intensity, voxels=voxels))
