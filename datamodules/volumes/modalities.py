"""Canonical names of an archive's modalities, and which of them become channels."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import DataError
from common.modalities import canonical_name, canonical_order, clashes, shown_names
from common.pseudonyms import public_name
from datamodules.volumes.cases import Case, Layout


def one_file_each(files: Iterable[tuple[str, Path]]) -> tuple[dict[str, Path], list[Path]]:
    """Return one file per modality, under the archive's names, and the surplus files of the same modalities.

    Nothing is refused here, as layouts also look at trees that are not theirs.

    Args:
        files: Modality and file.
    """
    found: dict[str, tuple[str, Path]] = {}
    surplus = []
    for name, path in files:
        if found.setdefault(canonical_name(name), (name, path))[1] != path:
            surplus.append(path)
    return dict(found.values()), surplus


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
