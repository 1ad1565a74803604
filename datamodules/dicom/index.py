"""The headers of a DICOM archive, read once and kept, and the stacks of slices they make up.

File names mean nothing in such an archive; everything is taken from the headers (pydicom, without pixels).
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.files import whole_file

#: Part of the key of kept headers: another set of fields is another index.
INDEX_VERSION = 1

#: From this many new files on, headers are read by several processes (about 3 ms each).
_PARALLEL_FROM = 512

#: Two slices are at one place if they are closer than this, in mm.
_SAME_PLACE = 1e-2

_TAGS = [
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "SeriesNumber",
    "SeriesDescription", "ProtocolName", "ImageType", "EchoTime", "RepetitionTime", "InversionTime",
    "ContrastBolusAgent", "FrameOfReferenceUID", "ImageOrientationPatient", "ImagePositionPatient", "NumberOfFrames",
    "MRAcquisitionType", "Rows", "Columns", "PixelSpacing", "SliceThickness", "SamplesPerPixel", "ViewPosition",
    "SharedFunctionalGroupsSequence",
]  # fmt: skip


class Instance(NamedTuple):
    """What the header of one file says.

    Attributes:
        path: The file.
        sop_uid, series_uid, study_uid: Its identifiers.
        sop_class: UID of its class of objects.
        patient_id: As written; may be empty.
        modality: MR, CT, CR and so on (DICOM's sense of the word).
        description: The series' description, else its protocol's name.
        image_type: Values of ImageType.
        echo_time, repetition_time, inversion_time: In ms; None if the header does not say.
        contrast: Whether a contrast agent is named.
        frame_of_reference: UID of the space that positions are in.
        orientation: Direction cosines of rows and columns, six numbers; empty where unknown.
        position: The first voxel's place (LPS, mm); empty where unknown.
        frames: Frames in the file.
        acquisition: ``2D`` or ``3D``.
        size: Rows and columns.
        spacing: Distance of rows and of columns, then the slice thickness, in mm; empty where unknown.
        samples: 1 for grey, 3 for colour.
        series_number: The scanner's number of the series.
        view: ViewPosition of a radiograph.
        stamp: Size and time of change of the file.
    """

    path: str
    sop_uid: str
    series_uid: str
    study_uid: str
    sop_class: str
    patient_id: str
    modality: str
    description: str
    image_type: tuple[str, ...]
    echo_time: float | None
    repetition_time: float | None
    inversion_time: float | None
    contrast: bool
    frame_of_reference: str
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    frames: int
    acquisition: str
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    samples: int
    series_number: int
    view: str
    stamp: tuple[int, ...] = ()


class Stack(NamedTuple):
    """The slices of one series that share echo and orientation: what becomes one volume.

    Attributes:
        instances: In the order of their places along the slice normal.
    """

    instances: tuple[Instance, ...]

    @property
    def first(self) -> Instance:
        """The first slice, for what all have in common."""
        return self.instances[0]

    @property
    def paths(self) -> list[str]:
        """The files."""
        return [instance.path for instance in self.instances]

    def places(self) -> NDArray[np.float64]:
        """Return where the slices lie along their normal, in mm; empty for one file with many frames."""
        if not all(len(i.position) == 3 and len(i.orientation) == 6 for i in self.instances) or self.first.frames > 1:
            return np.zeros(0)
        normal = np.cross(self.first.orientation[:3], self.first.orientation[3:])
        return np.array([i.position for i in self.instances]) @ normal

    @property
    def num_slices(self) -> int:
        """Slices at different places, or frames."""
        return max(len(self.instances), self.first.frames) if self.repeats == 1 else len(np.unique(self._rounded()))

    @property
    def repeats(self) -> int:
        """How many slices lie at the most frequent place: 1 for a volume, more for a series over time or direction."""
        places = self._rounded()
        return int(np.unique(places, return_counts=True)[1].max()) if len(places) else 1

    def _rounded(self) -> NDArray[np.float64]:
        return np.round(self.places() / _SAME_PLACE)

    def slice_distances(self) -> NDArray[np.float64]:
        """Return the distances between neighbouring slices in mm."""
        return np.diff(np.sort(self.places()))

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm^3, to prefer finer scans; infinite if the header does not say."""
        spacing = self.first.spacing
        distances = self.slice_distances()
        depth = float(np.median(distances)) if len(distances) else (spacing[2] if len(spacing) > 2 else 0.0)
        return spacing[0] * spacing[1] * depth if len(spacing) > 1 and depth else float("inf")

    def box(self) -> NDArray[np.float64] | None:
        """Return the corners ``(2, 3)`` of the smallest box around the slices (LPS, mm); None where unknown."""
        if not len(self.places()) or len(self.first.spacing) < 2 or len(self.first.size) < 2:
            return None
        row, column = np.array(self.first.orientation[:3]), np.array(self.first.orientation[3:])
        along = row * self.first.spacing[1] * self.first.size[1], column * self.first.spacing[0] * self.first.size[0]
        starts = np.array([i.position for i in self.instances])
        corners = np.concatenate([starts, starts + along[0], starts + along[1], starts + along[0] + along[1]])
        return np.stack([corners.min(0), corners.max(0)])


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark at byte 128."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:] == b"DICM"


def _numbers(value: Any) -> tuple[float, ...]:
    if value is None or value == "":
        return ()
    return tuple(float(v) for v in (value if isinstance(value, Iterable) and not isinstance(value, str) else [value]))


def _first(value: Any) -> float | None:
    return next(iter(_numbers(value)), None)


def _shared(header: Any, sequence: str, name: str) -> float | None:
    """Return a value of an enhanced file's shared functional groups."""
    groups = header.get("SharedFunctionalGroupsSequence") or []
    inner = (groups[0].get(sequence) or []) if groups else []
    return _first(inner[0].get(name)) if inner else None


def read_instance(path: Path) -> Instance | str:
    """Read the header of a DICOM file; if that is impossible, return the reason."""
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
            return _instance(path, header)
    except OSError as error:
        return f"the file cannot be opened ({error.strerror or error})"
    except Exception as error:  # pydicom raises many kinds of errors for broken headers; they are treated alike
        return f"the DICOM header cannot be read ({' '.join(str(error).split())[:120] or type(error).__name__})"


def _instance(path: Path, header: Any) -> Instance:
    def text(name: str) -> str:
        return str(header.get(name) or "").strip()

    missing = [name for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID") if not text(name)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    image_type = header.get("ImageType") or ()
    return Instance(
        path=str(path),
        sop_uid=text("SOPInstanceUID"),
        series_uid=text("SeriesInstanceUID"),
        study_uid=text("StudyInstanceUID"),
        sop_class=text("SOPClassUID"),
        patient_id=text("PatientID"),
        modality=text("Modality"),
        description=text("SeriesDescription") or text("ProtocolName"),
        image_type=tuple(str(v) for v in ([image_type] if isinstance(image_type, str) else image_type)),
        echo_time=_first(header.get("EchoTime")) or _shared(header, "MREchoSequence", "EffectiveEchoTime"),
        repetition_time=_first(header.get("RepetitionTime"))
        or _shared(header, "MRTimingAndRelatedParametersSequence", "RepetitionTime"),
        inversion_time=_first(header.get("InversionTime")),
        contrast=bool(text("ContrastBolusAgent")),
        frame_of_reference=text("FrameOfReferenceUID"),
        orientation=_numbers(header.get("ImageOrientationPatient")),
        position=_numbers(header.get("ImagePositionPatient")),
        frames=int(header.get("NumberOfFrames") or 1),
        acquisition=text("MRAcquisitionType"),
        size=tuple(int(v) for v in (header.get("Rows"), header.get("Columns")) if v),
        spacing=_numbers(header.get("PixelSpacing")) + _numbers(header.get("SliceThickness")),
        samples=int(header.get("SamplesPerPixel") or 1),
        series_number=int(_first(header.get("SeriesNumber")) or 0),
        view=text("ViewPosition"),
    )


class DicomIndex:
    """The headers of many files, kept under ``folder`` by path, size and time of change.

    Attributes:
        instances: One per SOPInstanceUID, sorted by path.
        copies: Files whose SOPInstanceUID another file had already.
        unreadable: Path to the reason why its header could not be read.

    Args:
        files: The DICOM files of the archive.
        folder: Where headers are kept; None keeps none. They hold identifiers, so only their owner may read them.
        workers: Processes; None takes all available cores.
    """

    def __init__(self, files: Sequence[Path], folder: Path | None = None, workers: int | None = None) -> None:
        self._file = None if folder is None else folder / f"headers-{INDEX_VERSION}.jsonl"
        self.instances: list[Instance] = []
        self.copies: list[str] = []
        self.unreadable: dict[str, str] = {}
        seen: set[str] = set()
        for path, found in self._read(sorted(files), workers or len(os.sched_getaffinity(0))):
            if isinstance(found, str):
                self.unreadable[path] = found
            elif found.sop_uid in seen:
                self.copies.append(path)
            else:
                seen.add(found.sop_uid)
                self.instances.append(found)

    def _read(self, files: Sequence[Path], workers: int) -> Iterator[tuple[str, Instance | str]]:
        kept = self._kept()
        stamps = {path: stamp for path in files if (stamp := _stamp(path)) is not None}
        new = [path for path in stamps if kept.get(str(path), [None])[0] != stamps[path]]
        if len(new) >= _PARALLEL_FROM and workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                read = dict(zip(new, pool.map(read_instance, new, chunksize=64), strict=True))
        else:
            read = {path: read_instance(path) for path in new}
        result = {str(path): (stamps[path], read.get(path) or kept[str(path)][1]) for path in stamps}
        if new or len(kept) != len(result):
            self._keep(result)
        for path, (stamp, found) in result.items():
            yield path, found if isinstance(found, str) else found._replace(stamp=tuple(stamp))
        yield from ((str(path), "the file is not there") for path in files if path not in stamps)

    def _kept(self) -> dict[str, Any]:
        if self._file is None or not self._file.is_file():
            return {}
        kept = {}
        try:
            for line in self._file.read_text().splitlines():
                path, stamp, found = json.loads(line)
                values: Any = [tuple(value) if isinstance(value, list) else value for value in found]
                kept[path] = (stamp, found if isinstance(found, str) else Instance(*values))
        except (ValueError, TypeError):
            return {}
        return kept

    def _keep(self, result: dict[str, tuple[list[int], Instance | str]]) -> None:
        if self._file is None:
            return
        with whole_file(self._file) as temporary:
            temporary.touch(mode=0o600)
            lines = (json.dumps([path, stamp, found]) for path, (stamp, found) in result.items())
            temporary.write_text("".join(f"{line}\n" for line in lines))

    @cached_property
    def stacks(self) -> list[Stack]:
        """The instances grouped by series, echo and orientation."""
        groups: dict[tuple[Any, ...], list[Instance]] = {}
        for instance in self.instances:
            turn = tuple(round(v, 2) + 0.0 for v in instance.orientation)
            key = (instance.study_uid, instance.series_uid, instance.series_number, instance.echo_time, turn)
            # A file with many frames is a volume of its own; likewise a colour file is a fault of its own.
            groups.setdefault((*key, instance.path if instance.frames > 1 else ""), []).append(instance)
        stacks = []
        for members in groups.values():
            stack = Stack(tuple(members))
            places = stack.places()
            order = np.argsort(places, kind="stable") if len(places) else range(len(members))
            stacks.append(Stack(tuple(members[int(i)] for i in order)))
        return sorted(stacks, key=lambda s: (s.first.study_uid, s.first.series_number, s.first.echo_time or 0.0))


def _stamp(path: Path) -> list[int] | None:
    """Return size and time of change of a file; None where it cannot be reached."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def check_subjects(instances: Iterable[Instance], subject: str | None) -> None:
    """Refuse one PatientID over several studies, which anonymisers write, until ``subject`` is set.

    Raises:
        DataError: every one of two or more studies has the same PatientID, or one has none.
    """
    studies: dict[str, set[str]] = {}
    for instance in instances:
        studies.setdefault(instance.patient_id, set()).add(instance.study_uid)
    if subject is not None or len({study for group in studies.values() for study in group}) < 2:
        return
    if len(studies) == 1:
        (name,) = studies
        raise DataError(f'Every study has the PatientID "{name}", which an anonymiser may have written: set subject: '
                        "study or folder (or patient, if it is one person).")  # fmt: skip
    if "" in studies:
        raise DataError(f"{len(studies[''])} studies have no PatientID: set subject: study or folder.")
