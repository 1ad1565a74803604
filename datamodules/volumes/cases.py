"""Cases of an archive of volumes, and how they are preprocessed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import DataError
from datamodules.registry import FileRef, Record
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
        split: ``train``, ``val`` or ``test`` where the archive defines one.
        attributes: Further facts by name, such as a diagnosis; an empty text means unknown.
        surplus: Further files of a modality that already has one; data modules refuse them.
        places: Modality to the index of its volume, where its file is 4-D.
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Path]
    labels: Mapping[str, Path] = {}
    split: str | None = None
    attributes: Mapping[str, str] = {}
    surplus: Sequence[Path] = ()
    places: Mapping[str, int] = {}

    def files(self) -> list[Path]:
        """Return the files of images and labels."""
        return [*self.images.values(), *self.labels.values()]

    def record(self) -> Record:
        """Return the case as every data module can read it."""
        volumes = {name: FileRef(path, self.places.get(name)) for name, path in self.images.items()}
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
        return {
            "intensity": dict(self.intensity),
            "reference": self.reference,
            "spacing": None if self.spacing is None else list(self.spacing),
            "size": None if self.size is None else list(self.size),
            "crop_foreground": self.crop_foreground,
            "centered": self.centered,
            "atlas": None if self.atlas is None else list(self.atlas),
            "ragged": self.ragged,
            "resize": None if self.resize is None else list(self.resize),
            "voxels": self.voxels.as_dict(),
            "orientation": "RAS",
        }


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
            if name not in self.modalities:
                raise DataError(f"voxels.intensity names {name}; the modalities are {', '.join(self.modalities)}.")
            if rule not in RULES:
                raise DataError(f"voxels.intensity has the rule {rule} for {name}; known are {', '.join(RULES)}.")
        intensity = {**self.preprocessing.intensity, **voxels.intensity}
        return replace(self, preprocessing=replace(self.preprocessing, intensity=intensity, voxels=voxels))
