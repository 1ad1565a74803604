"""Canonical names of an archive's modalities, and which of them become channels."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from common.errors import DataError
from common.modalities import canonical_name, canonical_order, clashes, shown_names
from common.pseudonyms import public_name
from datamodules.registry import FileRef, Record
from datamodules.tree import stem_of
from datamodules.volumes.cases import Case, Layout

#: A volume of a 4-D file, by the file's name and the volume's place from 0.
_PLACE = re.compile(r"(.+)\[(\d+)\]")


def one_file_each(files: Iterable[tuple[str, Path]]) -> tuple[dict[str, Path], list[Path]]:
    """Return one file per modality, under the archive's names, and the surplus files of the same modalities.

    Nothing is refused here, as layouts also look at trees that are not theirs.
    """
    found: dict[str, tuple[str, Path]] = {}
    surplus = []
    for name, path in files:
        if found.setdefault(canonical_name(name), (name, path))[1] != path:
            surplus.append(path)
    return dict(found.values()), surplus


def _fitting(record: Record, given: str) -> list[str]:
    """Return a record's volumes that a person means by a name, or by a pattern that the files' names fit."""
    if any(sign in given for sign in "*?["):
        return [name for name, ref in record.volumes.items() if fnmatchcase(stem_of(ref.path.name), given)]
    return [name for name in record.volumes if canonical_name(name) == canonical_name(given)]


def respelled(records: Sequence[Record], spelled: Mapping[str, str], strict: bool = True) -> list[Record]:
    """Give volumes the names under which a person lists them; others that would share one are left out.

    Args:
        records: The records.
        spelled: Name to what the archive calls it: a name, a pattern of file names such as ``*_T1w``, or the place of a
            volume in a 4-D file, ``mr[0]``.
        strict: Whether every one that is listed must be there.

    Raises:
        DataError: two volumes of a record fit one pattern, or none has one that is listed.
    """
    found = [_respelled(record, spelled) for record in records]
    lacking = [name for name in spelled if not any(name in record.volumes for record in found)]
    if lacking and strict:
        present = ", ".join(sorted({name for record in records for name in record.volumes})[:8])
        raise DataError(f"No case has {spelled[lacking[0]]}, which modalities: names as {lacking[0]}; present are "
                        f"{present}.")  # fmt: skip
    return found


def _respelled(record: Record, spelled: Mapping[str, str]) -> Record:
    volumes: dict[str, FileRef] = {}
    meant = set()
    for name, given in spelled.items():
        match = _PLACE.fullmatch(given)
        names = _fitting(record, match[1] if match else given)
        if len(names) > 1:
            both = " and ".join(map(public_name, names[:2]))
            case = public_name(record.case_id)
            raise DataError(f"Two volumes of the case {case} fit {given}, which is to be {name}: {both}.")
        if names:
            ref = record.volumes[names[0]]
            volumes[name] = ref._replace(volume=int(match[2])) if match else ref
            meant.add(names[0])
    taken = {canonical_name(name) for name in volumes}
    others = [name for name in record.volumes if name not in meant and canonical_name(name) not in taken]
    return record._replace(volumes=volumes | {name: record.volumes[name] for name in others})


def under_canonical_names(layout: Layout, cases: Sequence[Case]) -> tuple[Layout, list[Case]]:
    """Rename the modalities of all cases and of their layout canonically.

    Returns:
        The layout, which keeps the archive's own names, and the cases.

    Raises:
        DataError: two files of a case have the same canonical name.
    """
    spellings: dict[str, set[str]] = {}
    renamed = []
    for case in cases:
        images, surplus = one_file_each(case.images.items())
        if surplus := [*case.surplus, *surplus]:
            others = ", ".join(public_name(path.name) for path in images.values())
            raise DataError(f"The case {public_name(case.case_id)} has two files of one modality: "
                            f"{public_name(surplus[0].name)} is the same as one of {others}. Keep one of them, or name "
                            f"them apart.")  # fmt: skip
        for name in images:
            spellings.setdefault(canonical_name(name), set()).add(name)
        places = {canonical_name(name): place for name, place in case.places.items()}
        renamed.append(
            case._replace(images={canonical_name(name): path for name, path in images.items()}, places=places)
        )
    settings = layout.preprocessing
    reference = None if settings.reference is None else canonical_name(settings.reference)
    intensity = {canonical_name(name): rule for name, rule in settings.intensity.items()}
    layout = replace(
        layout,
        modalities=tuple(canonical_name(name) for name in layout.modalities),
        preprocessing=replace(settings, reference=reference, intensity=intensity),
        names=shown_names(spellings),
    )
    return layout, renamed


def with_modalities(layout: Layout, cases: Sequence[Case], wanted: Sequence[str] | None) -> Layout:
    """Resolve a layout's channels: the requested ones in any spelling, its own, or all that its cases have.

    Raises:
        DataError: no case has a requested modality, or one is requested twice.
    """
    present = canonical_order(name for case in cases for name in case.images)
    for name, given in clashes(wanted or ()).items():
        raise DataError(f"data.modalities names {name} twice, as {' and '.join(given)}.")
    names = tuple(canonical_name(name) for name in wanted or ()) or layout.modalities or present
    unknown = [given for given, name in zip(wanted or (), names, strict=False) if name not in present]
    if unknown:
        shown = ", ".join(layout.shown(name) for name in present)
        raise DataError(f"No case has the modalities {', '.join(unknown)}; present are {shown}.")
    intensity = {name: layout.preprocessing.intensity.get(name, "percentile") for name in names}
    return replace(layout, modalities=names, preprocessing=replace(layout.preprocessing, intensity=intensity))
