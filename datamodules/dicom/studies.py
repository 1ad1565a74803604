"""What a DICOM archive of volumes holds: studies with one stack per modality, and what was left out and why."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from common.errors import DataError
from common.faults import Fault
from datamodules.dicom.convert import check_geometry
from datamodules.dicom.index import DicomIndex, Stack, check_subjects
from datamodules.dicom.rules import Rule, classify, default_rules, is_picture
from datamodules.volumes.headers import VolumeError


@dataclass(frozen=True)
class DicomSettings:
    """How a DICOM archive of volumes is interpreted.

    Attributes:
        rules: From series to modality; None takes those that come with the project.
        subject: Whose a study is: ``patient`` (PatientID), ``study``, or the ``folder`` under the root.
        min_slices: A series with fewer slices is left out.
        uneven: Whether slices at uneven distances are refused or interpolated.
    """

    rules: tuple[Rule, ...] | None = None
    subject: Literal["patient", "study", "folder"] | None = None
    min_slices: int = 10
    uneven: Literal["refuse", "interpolate"] = "refuse"


class DicomStudy(NamedTuple):
    """One visit.

    Attributes:
        case_id: Patient and a short hash of the study's UID.
        patient_id: Splits are by this.
        session: The study's UID.
        stacks: Modality to the slices it is made of.
    """

    case_id: str
    patient_id: str
    session: str
    stacks: dict[str, Stack]


class Understanding(NamedTuple):
    """How an archive was understood.

    Attributes:
        studies: Those with at least one usable stack.
        reference: The modality whose grid all others of a study are resampled to; None without studies.
        ignored: Number of files by reason.
        guessed: Modality to the number of stacks that were assigned by their times alone.
        pictures: Stacks of single pictures.
        faults: Stacks that should be used but cannot be.
    """

    studies: list[DicomStudy]
    reference: str | None
    ignored: Counter[str]
    guessed: Counter[str]
    pictures: list[Stack]
    faults: list[Fault]


def understand(root: Path, index: DicomIndex, settings: DicomSettings) -> Understanding:
    """Find the volumes of an archive.

    Raises:
        DataError: every study has the same PatientID and ``subject`` is not set.
    """
    check_subjects(index.instances, settings.subject)
    result = Understanding([], None, Counter(), Counter(), [], [])
    if index.copies:
        result.ignored["another copy of the same instance"] += len(index.copies)
    result.faults.extend(Fault(path, "unreadable", why, Path(path).name) for path, why in index.unreadable.items())
    candidates: dict[str, dict[str, list[Stack]]] = {}
    for stack in index.stacks:
        modality = _sort(root, stack, settings, result)
        if modality is not None:
            candidates.setdefault(stack.first.study_uid, {}).setdefault(modality, []).append(stack)
    reference = _reference(candidates)
    for uid, by_modality in candidates.items():
        chosen = {}
        for modality, stacks in by_modality.items():
            best, *others = sorted(stacks, key=_preference)
            chosen[modality] = best
            if others:
                result.ignored[f"another series of {modality}"] += sum(len(s.instances) for s in others)
        study = _study(root, uid, chosen, settings)
        outside = _outside(study, reference)
        result.faults.extend(outside.values())
        result.studies.append(study._replace(stacks={k: v for k, v in chosen.items() if k not in outside}))
    return result._replace(reference=reference, studies=sorted(result.studies, key=lambda study: study.case_id))


def _sort(root: Path, stack: Stack, settings: DicomSettings, result: Understanding) -> str | None:
    """Return a stack's modality, or count why it is not used."""
    if is_picture(stack):
        result.pictures.append(stack)
        return None
    verdict = classify(stack, settings.rules if settings.rules is not None else default_rules())
    if verdict.modality is None:
        result.ignored[verdict.reason] += len(stack.instances)
        return None
    try:
        check_geometry(stack, settings.uneven)
    except VolumeError as error:
        sample = _subject(root, stack, settings)
        result.faults.append(Fault(stack.first.path, error.kind, error.detail, sample))
        return None
    if stack.num_slices < settings.min_slices:
        result.ignored[f"fewer than {settings.min_slices} slices"] += len(stack.instances)
        return None
    if verdict.guessed:
        result.guessed[verdict.modality] += 1
    return verdict.modality


def _preference(stack: Stack) -> tuple[bool, bool, float, int]:
    """Order the series of one modality: 3D first, then originals, small voxels, and the later number."""
    first = stack.first
    return first.acquisition != "3D", "DERIVED" in first.image_type, stack.voxel_volume, -first.series_number


def _reference(candidates: dict[str, dict[str, list[Stack]]]) -> str | None:
    """Return the modality in most studies; on a tie the one with the finest slices, then by name."""
    counts = Counter(name for study in candidates.values() for name in study)
    if not counts:
        return None
    finest = {
        name: min(_depth(s) for study in candidates.values() for s in study.get(name, ())) for name in counts
    }  # fmt: skip
    return min(counts, key=lambda name: (-counts[name], finest[name], name))


def _depth(stack: Stack) -> float:
    distances = stack.slice_distances()
    return round(float(np.median(distances)), 3) if len(distances) else float("inf")


def _subject(root: Path, stack: Stack, settings: DicomSettings) -> str:
    first = stack.first
    if settings.subject == "study":
        return _short(first.study_uid)
    if settings.subject == "folder":
        return Path(first.path).relative_to(root).parts[0]
    return first.patient_id


def _short(uid: str) -> str:
    return xxhash.xxh3_64_hexdigest(uid.encode())[:8]


def _study(root: Path, uid: str, stacks: dict[str, Stack], settings: DicomSettings) -> DicomStudy:
    patients = {_subject(root, stack, settings) for stack in stacks.values()}
    if len(patients) > 1:
        raise DataError(f"The study {uid} belongs to {len(patients)} subjects ({', '.join(sorted(patients)[:3])}).")
    (patient,) = patients
    name = patient if settings.subject == "study" else f"{patient}_{_short(uid)}"
    return DicomStudy(name, patient, uid, stacks)


def _outside(study: DicomStudy, reference: str | None) -> dict[str, Fault]:
    """Return the modalities that do not share the reference's space, or cover less than half of it."""
    base = study.stacks.get(reference or "") or next(iter(study.stacks.values()))
    faults = {}
    for modality, stack in study.stacks.items():
        uid, wanted = stack.first.frame_of_reference, base.first.frame_of_reference
        if uid and wanted and uid != wanted:
            why = f"{modality} has another frame of reference than the rest of its study: register it first"
        elif _covered(base.box(), stack.box()) < 0.5:
            why = f"{modality} covers less than half of the reference's box: leave it out, or register it first"
        else:
            continue
        faults[modality] = Fault(stack.first.path, "space", why, study.case_id)
    return faults


def _covered(base: np.ndarray | None, other: np.ndarray | None) -> float:
    """Return the share of one box that another covers; 1 where one is unknown."""
    if base is None or other is None:
        return 1.0
    size = np.maximum(base[1] - base[0], 1e-6)
    common = np.minimum(base[1], other[1]) - np.maximum(base[0], other[0])
    return float(np.prod(np.clip(common, 0, None) / size))
