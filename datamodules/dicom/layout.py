"""The layout of DICOM trees: known by content, since their names mean nothing."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import xxhash

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.account import SIDECAR
from datamodules.dicom.convert import ConvertedSeries
from datamodules.dicom.index import DicomIndex, is_dicom
from datamodules.dicom.rules import is_picture, is_volume
from datamodules.dicom.studies import DicomSettings, DicomStudy, Understanding, understand
from datamodules.registry import NO_SETTINGS, Evidence, Facts, FileRef, Layout, Listing, Record, Settings, shortened
from datamodules.storage import cache_root
from datamodules.tree import Tree, TreeFile

_DIRECTORY = "DICOMDIR"
#: Share of the files that are not text which must be DICOM.
_MOSTLY = 0.9
#: Files without a telling suffix that are opened to see whether they are DICOM, and bytes of its mark.
_OPENED, _MARKED = 24, 132
#: Files that may have a broken header, as in :mod:`datamodules.account`.
_MAX_BROKEN = 0.01
_SUBJECTS = ("patient", "study", "folder")


def _candidates(tree: Tree) -> tuple[list[TreeFile], list[TreeFile], int]:
    """Return the files called DICOM, those that may be by their content, and how many are not text."""
    named, nameless, total = [], [], 0
    for file in tree.files:
        if file.hidden or file.kind in ("text", "sidecar", "table") or file.name == _DIRECTORY:
            continue
        total += 1
        if file.kind == "series":
            named.append(file)
        elif file.kind == "other" and file.size >= _MARKED:
            nameless.append(file)
    return named, nameless, total


def _recognise(tree: Tree) -> Evidence:
    named, nameless, total = _candidates(tree)
    missing = "files of which 90 % are DICOM"
    if not total or len(named) + len(nameless) < _MOSTLY * total:
        return Evidence(0, missing=missing, near=len(named) / max(total, 1) / 2)
    sample = nameless[:: max(1, -(-len(nameless) // _OPENED))]
    share = sum(is_dicom(tree / file.name) for file in sample) / max(len(sample), 1)
    found = len(named) + round(share * len(nameless))
    if found < _MOSTLY * total:
        return Evidence(0, missing=missing, near=found / total / 2)
    return Evidence(2, f"{found} of {total} files that are not text are DICOM")


def read_index(tree: Tree) -> DicomIndex:
    """Return the headers of a tree's DICOM files, read on first use and kept in the cache."""
    named, nameless, _ = _candidates(tree)
    place = xxhash.xxh3_64_hexdigest(str(tree.root.resolve()).encode())
    index = DicomIndex([tree / file.name for file in (*named, *nameless)], cache_root() / "dicom" / f"index-{place}")
    for file in nameless:  # what has neither the name nor the mark is none
        if (path := str(tree / file.name)) in index.unreadable and not is_dicom(Path(path)):
            del index.unreadable[path]
    return index


def settings_of(settings: Settings) -> DicomSettings:
    """Return what a person says of a DICOM archive; without rules no series is a volume.

    Raises:
        DataError: ``subject`` is none of its three; the other values are checked with the archive file.
    """
    said = {name: value for name in (field.name for field in fields(DicomSettings))
            if (value := getattr(settings, name, None)) is not None}  # fmt: skip
    if settings.subject not in (None, *_SUBJECTS):
        raise DataError(f"subject: of a DICOM archive is patient, study or folder, not {settings.subject!r}.")
    return DicomSettings(rules=tuple(settings.series), **said)


def find_dicom(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the studies and pictures of a DICOM tree.

    Args:
        tree: The tree.
        settings: ``series`` says which series is which modality, without which no volume is used; ``subject``,
            ``frame``, ``uneven`` and ``min_slices`` as :class:`datamodules.dicom.studies.DicomSettings`.

    Raises:
        DataError: every study has one PatientID and ``subject`` is not set, many headers cannot be read, and the like.
    """
    wanted = settings_of(settings)
    index = read_index(tree)
    _check_headers(tree, index)
    found = understand(tree.root, index, wanted)
    records = [*(_record(study, wanted) for study in found.studies), *found.pictures]
    facts = Facts(reference=found.reference, frame=settings.frame, lacking=_lacking(index, found, settings))
    notes = [f"{name} of {count} series is guessed from echo, repetition and inversion times"
             for name, count in sorted(found.guessed.items())]  # fmt: skip
    reasons = {SIDECAR: [_DIRECTORY]} if tree.is_file(_DIRECTORY) else {}
    return Listing(records, facts, {**reasons, **found.ignored}, notes=notes)


def _record(study: DicomStudy, settings: DicomSettings) -> Record:
    volumes = {}
    for modality, stack in study.stacks.items():
        fault = study.faults.get(modality)
        series = ConvertedSeries(stack, settings.uneven, None if fault is None else (fault.kind, fault.detail))
        volumes[modality] = FileRef(Path(stack.first.path), series=series)
    return Record(study.case_id, study.patient_id, study.session, volumes)


def _check_headers(tree: Tree, index: DicomIndex) -> None:
    """Refuse a tree of which many headers are broken; a few are counted in the account."""
    lost, total = index.unreadable, len(index.unreadable) + len(index.instances) + len(index.copies)
    if len(lost) > max(_MAX_BROKEN * total, 2) or (lost and not index.instances):
        path, why = next(iter(lost.items()))
        raise DataError(f"{len(lost)} of {total} DICOM files under {shortened(str(tree), 60)} cannot be read, such as "
                        f"{public_name(shortened(tree.name_of(path), 50))} ({shortened(why, 80)}): restore them, or "
                        f"name them under ignore.")  # fmt: skip


def _lacking(index: DicomIndex, found: Understanding, settings: Settings) -> dict[str, str]:
    """Say why there are no volumes or no pictures, where settings could change that."""
    words = {}
    # Kinds of series are told by modality and description, else by their times.
    volumes = {
        (first.modality, first.description.lower() or (first.echo_time, first.repetition_time, first.inversion_time))
        for first in (stack.first for stack in index.stacks if is_volume(stack))
    }
    kinds = f"{len(volumes)} kind{'s' if len(volumes) > 1 else ''}"
    if volumes and not settings.series:
        words["volumes"] = f"DICOM, {kinds} of series: run medmim init DIR first"
    elif volumes and not found.studies:
        words["volumes"] = f"None of {kinds} of series is used ({_most(found)})"
    frames = [stack.first.frames for stack in index.stacks if is_picture(stack) and stack.first.frames > 1]
    if frames and not found.pictures:
        words["images"] = f"{len(frames)} DICOM pictures hold {max(frames)} frames or fewer; frame: 0 takes one"
    return words


def _most(found: Understanding) -> str:
    """Return the commonest reasons why series are left out."""
    counts = Counter({reason: len(paths) for reason, paths in found.ignored.items()})
    return "; ".join(f"{count} files {shortened(reason, 60)}" for reason, count in counts.most_common(2))


DICOM = Layout(
    name="dicom",
    tree="ROOT/**/* of which 90 % are DICOM, whatever their names; volumes need series: in archive.yaml",
    find=find_dicom,
    evidence=_recognise,
    takes=("series", "frame", "uneven", "min_slices", "subject"),
    public=False,
)
