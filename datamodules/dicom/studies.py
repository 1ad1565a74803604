"""What a DICOM archive holds: studies with one stack per modality, pictures, and what was left out and why."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from common.errors import DataError
from common.faults import Fault
from common.pseudonyms import public_name
from datamodules.account import BROKEN, COPY, FEW, FRAMES, OBJECT, RULED_OUT, RULELESS, SCREEN, SERIES
from datamodules.dicom.convert import check_geometry
from datamodules.dicom.index import DicomIndex, Stack, check_subjects
from datamodules.dicom.rules import Rule, classify, default_rules, is_picture, is_volume
from datamodules.registry import Record
from datamodules.volumes.headers import VolumeError


@dataclass(frozen=True)
class DicomSettings:
    """How a DICOM archive is interpreted.

    Attributes:
        rules: From series to modality; None takes those that come with the project.
        subject: Whose a study is: ``patient`` (PatientID), ``study``, or the ``folder`` under the root.
        min_slices: A series with fewer slices is left out.
        uneven: Whether slices at uneven distances are refused or interpolated.
        frame: Which frame of a picture with several is taken; None leaves such pictures out.
    """

    rules: tuple[Rule, ...] | None = None
    subject: Literal["patient", "study", "folder"] | None = None
    min_slices: int = 10
    uneven: Literal["refuse", "interpolate"] = "refuse"
    frame: int | None = None


class DicomStudy(NamedTuple):
    """One visit.

    Attributes:
        case_id: Patient and a short hash of the study's UID.
        patient_id: Splits are by this.
        session: The study's UID.
        stacks: Modality to the slices it is made of.
        faults: Modality to what is wrong with its slices.
    """

    case_id: str
    patient_id: str
    session: str
    stacks: dict[str, Stack]
    faults: dict[str, Fault]


@dataclass
class Understanding:
    """How an archive was understood.

    Attributes:
        studies: Those with at least one stack of a modality, usable or not.
        reference: The modality whose grid all others of a study are resampled to; None without studies.
        ignored: Files by reason (see :mod:`datamodules.account`).
        guessed: Modality to the number of stacks that were assigned by their times alone.
        pictures: Single pictures, one by one.
        unreadable: File to why its header cannot be read.
    """

    studies: list[DicomStudy] = field(default_factory=list)
    reference: str | None = None
    ignored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    guessed: Counter[str] = field(default_factory=Counter)
    pictures: list[Record] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[Fault]:
        """Stacks that should be used but cannot be."""
        return [fault for study in self.studies for fault in study.faults.values()]


def understand(root: Path, index: DicomIndex, settings: DicomSettings) -> Understanding:
    """Find the volumes and pictures of an archive.

    Raises:
        DataError: every study has the same PatientID and ``subject`` is not set, or one belongs to several subjects.
    """
    check_subjects(index.instances, settings.subject)
    result = Understanding(unreadable=index.unreadable)
    result.ignored[COPY] += index.copies
    result.ignored[BROKEN] += index.unreadable
    candidates: dict[str, dict[str, list[_Candidate]]] = {}
    for stack in index.stacks:
        if is_picture(stack):
            _add_pictures(root, stack, settings, result)
        elif (modality := _modality(stack, settings, result)) is not None:
            found = _Candidate(stack, _fault(root, stack, settings))
            if found.fault is None and stack.num_slices < settings.min_slices:
                result.ignored[FEW] += stack.paths
            else:
                candidates.setdefault(stack.first.study_uid, {}).setdefault(modality, []).append(found)
    result.reference = _reference(candidates)
    for uid, by_modality in candidates.items():
        chosen = {}
        for modality, members in by_modality.items():
            best, *others = sorted(members, key=_preference)
            chosen[modality] = best
            result.ignored[f"{SERIES} {modality}"] += [path for other in others for path in other.stack.paths]
        result.studies.append(_study(root, uid, chosen, result.reference, settings))
    result.studies.sort(key=lambda study: study.case_id)
    result.ignored = {reason: paths for reason, paths in result.ignored.items() if paths}
    return result


class _Candidate(NamedTuple):
    """A stack that may become the volume of its modality, and what is wrong with it."""

    stack: Stack
    fault: Fault | None


def _add_pictures(root: Path, stack: Stack, settings: DicomSettings, result: Understanding) -> None:
    """List every file of a stack of pictures, but for those of screens and those of several frames."""
    screen = "SCREEN SAVE" in stack.first.image_type
    if screen or (stack.first.frames > 1 and settings.frame is None):
        result.ignored[SCREEN if screen else FRAMES] += stack.paths
        return
    patient = _subject(root, stack, settings)
    result.pictures += [
        Record(f"{patient}_{_short(i.sop_uid)}", patient, i.study_uid, images=((Path(i.path), i.view),))
        for i in stack.instances
    ]


def _modality(stack: Stack, settings: DicomSettings, result: Understanding) -> str | None:
    """Return a stack's modality, or count why it has none."""
    if not is_volume(stack):
        result.ignored[f"{OBJECT} {stack.first.modality or 'of no modality'}"] += stack.paths
        return None
    verdict = classify(stack, settings.rules if settings.rules is not None else default_rules())
    if verdict.modality is None:
        result.ignored[f"{RULED_OUT} {verdict.reason}" if verdict.ruled else RULELESS] += stack.paths
    elif verdict.guessed:
        result.guessed[verdict.modality] += 1
    return verdict.modality


def _fault(root: Path, stack: Stack, settings: DicomSettings) -> Fault | None:
    """Say why the slices of a stack form no volume; None where they do."""
    try:
        check_geometry(stack, settings.uneven)
    except VolumeError as error:
        return Fault(stack.first.path, error.kind, error.detail, _subject(root, stack, settings))
    return None


def _preference(candidate: _Candidate) -> tuple[bool, bool, bool, float, int]:
    """Order the series of one modality: usable ones, 3D, originals, small voxels, and the later number first."""
    stack, first = candidate.stack, candidate.stack.first
    derived = "DERIVED" in first.image_type
    return candidate.fault is not None, first.acquisition != "3D", derived, stack.voxel_volume, -first.series_number


def _reference(candidates: dict[str, dict[str, list[_Candidate]]]) -> str | None:
    """Return the modality in most studies; on a tie the one with the finest slices, then by name."""
    depths: dict[str, list[float]] = {}
    for study in candidates.values():
        for name, members in study.items():
            distances = [member.stack.slice_distances() for member in members if member.fault is None]
            if usable := [round(float(np.median(d)), 3) if len(d) else float("inf") for d in distances]:
                depths.setdefault(name, []).append(min(usable))
    return min(depths, key=lambda name: (-len(depths[name]), min(depths[name]), name), default=None)


def _subject(root: Path, stack: Stack, settings: DicomSettings) -> str:
    first = stack.first
    if settings.subject == "study":
        return _short(first.study_uid)
    if settings.subject == "folder":
        folder, *below = Path(first.path).relative_to(root).parts
        if not below:
            raise DataError(f"subject: folder needs a folder per person, and {folder} lies in {root} itself.")
        return folder
    return first.patient_id


def _short(uid: str) -> str:
    return xxhash.xxh3_64_hexdigest(uid.encode())[:8]


def _study(
    root: Path, uid: str, chosen: dict[str, _Candidate], reference: str | None, settings: DicomSettings
) -> DicomStudy:
    patients = {_subject(root, candidate.stack, settings) for candidate in chosen.values()}
    if len(patients) > 1:
        raise DataError(f"The study {uid} belongs to {len(patients)} subjects, such as {public_name(min(patients))}: "
                        f"set subject: study or folder.")  # fmt: skip
    (patient,) = patients
    name = patient if settings.subject == "study" else f"{patient}_{_short(uid)}"
    faults = {modality: found.fault._replace(sample=name) for modality, found in chosen.items() if found.fault}
    stacks = {modality: found.stack for modality, found in chosen.items()}
    sound = {modality: stack for modality, stack in stacks.items() if modality not in faults}
    faults |= _outside(name, sound, reference)
    return DicomStudy(name, patient, uid, stacks, faults)


def _outside(case_id: str, stacks: dict[str, Stack], reference: str | None) -> dict[str, Fault]:
    """Return the modalities that do not share the reference's space, or cover less than half of it."""
    faults: dict[str, Fault] = {}
    if not stacks:
        return faults
    base = stacks.get(reference or "") or next(iter(stacks.values()))
    for modality, stack in stacks.items():
        uid, wanted = stack.first.frame_of_reference, base.first.frame_of_reference
        if uid and wanted and uid != wanted:
            why = f"{modality} has another frame of reference than the rest of its study: register it first"
        elif _covered(base.box(), stack.box()) < 0.5:
            why = f"{modality} covers less than half of the reference's box: leave it out, or register it first"
        else:
            continue
        faults[modality] = Fault(stack.first.path, "space", why, case_id)
    return faults


def _covered(base: np.ndarray | None, other: np.ndarray | None) -> float:
    """Return the share of one box that another covers; 1 where one is unknown."""
    if base is None or other is None:
        return 1.0
    size = np.maximum(base[1] - base[0], 1e-6)
    common = np.minimum(base[1], other[1]) - np.maximum(base[0], other[0])
    return float(np.prod(np.clip(common, 0, None) / size))
