"""Any volumes in folders: ``CASE/[PREFIX]<modality>``, flat ``CASE_<modality>``, ``PATIENT/SESSION/<modality>``.

``cases.csv``, if there is one, needs ``case_id`` and may have ``patient_id``, ``session``, ``split`` and any further
columns, which become attributes (such as ``disease``). Files named ``seg``, ``label``, ``mask`` or ``msk`` are labels;
several binary masks become the bits of one label. The lung layout is the same tree with proton and xenon images and the
masks of thoracic cavity and ventilation.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.modalities import CANONICAL, canonical_name
from common.pseudonyms import public_name
from common.runtime.reporting import print_line
from datamodules.account import MASK
from datamodules.files import listing
from datamodules.ids import check_subjects, join_ids, mending
from datamodules.registry import (
    NO_SETTINGS,
    Evidence,
    Facts,
    FileRef,
    Layout,
    Listing,
    Record,
    Settings,
    foreign_marker,
)
from datamodules.tables import read_table
from datamodules.tree import Tree, TreeFile
from datamodules.volumes.cases import patient_of
from datamodules.volumes.masks import all_values, chosen_masks
from datamodules.volumes.modalities import one_file_each

LABEL_STEMS = ("seg", "label", "mask", "msk")
LUNG_MODALITIES = ("1h", "xe")
LUNG_LABELS = ("cavity", "vent")
#: Modality of a volume whose name gives only the case.
SINGLE = "image"
#: Folders of Medical Decathlon and nnU-Net, which are never cases.
_PARTS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
_TABLE = "cases.csv"
#: With at least this many cases, a modality found in only one is taken for a misread name.
_MANY = 3


class Group(NamedTuple):
    """The volumes of one case.

    Attributes:
        case_id: Its name.
        patient_id: Whose it is.
        session: Visit; empty if the tree has no visits.
        files: Modality or label, as written, and file.
    """

    case_id: str
    patient_id: str
    session: str
    files: list[tuple[str, TreeFile]]


def read_case_table(path: Path) -> dict[str, dict[str, str]]:
    """Read ``cases.csv``: case id to its columns.

    Raises:
        DataError: no ``case_id`` column, or a case listed twice.
    """
    table = read_table(path)
    if "case_id" not in table.columns:
        raise DataError(f"{path} needs a column case_id, it has {listing(table.columns)}.")
    check_subjects(path, table["patient_id"] if "patient_id" in table.columns else [])
    rows: dict[str, dict[str, str]] = {}
    for facts in table.to_dict("records"):
        if facts["case_id"] in rows:
            raise DataError(f"{path} lists the case {public_name(facts['case_id'])} twice; keep one row per case.")
        rows[facts["case_id"]] = facts
    return rows


def volumes_in(tree: Tree, folder: str) -> list[TreeFile]:
    """Return the volumes that lie directly in a folder, without the ``._`` files that macOS leaves behind."""
    return [file for file in tree.listed(folder) if file.kind == "volume" and not file.hidden]


def _cut(stem: str, owner: str) -> str | None:
    """Return the rest of a stem after its owner's name; None if the stem does not begin with it."""
    if not owner or not stem.lower().startswith(owner.lower()):
        return None
    rest = stem[len(owner) :]
    return rest.lstrip("_-") if not rest or rest[0] in "_-" else None


def _is_known(name: str) -> bool:
    """Whether a name always is a modality, and so neither a prefix nor a case."""
    return canonical_name(name) in CANONICAL


def _shared_prefix(stems: Sequence[str]) -> str:
    """Return the common prefix of several stems, up to the last ``_`` or ``-``; empty if it is itself a modality."""
    if len(stems) < 2:
        return ""
    first, last = min(stems), max(stems)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:length]
    shared = shared[: max(shared.rfind("_"), shared.rfind("-")) + 1]
    return "" if _is_known(shared.rstrip("_-")) else shared


def names_of(files: Sequence[TreeFile], owners: Sequence[str]) -> list[tuple[str, TreeFile]]:
    """Return the files of a case by name, without the case's own name.

    Args:
        files: The files.
        owners: Names of the folders they lie in, longest first.
    """
    stems = [file.stem for file in files]
    owner = next((name for name in owners if any(_cut(stem, name) is not None for stem in stems)), "")
    prefix = "" if owner else _shared_prefix(stems)
    rests = [_cut(stem, owner) for stem in stems]
    names = [stem[len(prefix) :] if rest is None else rest for stem, rest in zip(stems, rests, strict=True)]
    # 3D Slicer marks labels by the suffix.
    kinds = ["seg" if file.suffix == ".seg.nrrd" else name or SINGLE for name, file in zip(names, files, strict=True)]
    return list(zip(kinds, files, strict=True))


def _flat(tree: Tree, files: Sequence[TreeFile]) -> Iterator[Group]:
    """Yield the cases whose files lie in the root itself: ``CASE_<modality>``, ``CASE_0000``, or one file per case.

    If all files are of different modalities, they are one case.
    """
    sequences = [canonical_name(file.stem[max(file.stem.rfind("_"), file.stem.rfind("-")) + 1 :]) for file in files]
    if len(files) > 1 and len({*sequences}) == len(files) and set(sequences) <= {*CANONICAL, *LABEL_STEMS}:
        yield Group(tree.root.name, patient_of(tree.root.name), "", list(zip(sequences, files, strict=True)))
        return
    groups: dict[str, list[tuple[str, TreeFile]]] = {}
    for file in files:
        cut = max(file.stem.rfind("_"), file.stem.rfind("-"))
        groups.setdefault(file.stem[: max(cut, 0)], []).append((file.stem[cut + 1 :], file))
    names = [{name for name, _ in members} for members in groups.values()]
    # Numbers are channels only in nnU-Net's form: four digits, and every case has the first.
    numbered = all(re.fullmatch(r"\d{4}", name) for found in names for name in found)
    numbered = numbered and len(groups) > 1 and all("0000" in found for found in names)
    for case, members in groups.items():
        single = [
            (name, file)
            for name, file in members
            if not numbered and (name.isdigit() or not (case or _is_known(name) or _is_mask(name, LABEL_STEMS)))
        ]
        yield from (Group(file.stem, patient_of(file.stem), "", [(SINGLE, file)]) for _, file in single)
        if rest := [member for member in members if member not in single]:
            name = case or tree.root.name
            yield Group(name, patient_of(name), "", rest)


def groups_of(tree: Tree) -> list[Group]:
    """List the cases of a tree with their files."""
    found = []
    for folder in tree.folders():
        if folder in _PARTS:
            continue
        if files := volumes_in(tree, folder):
            found.append(Group(folder, patient_of(folder), "", names_of(files, [folder])))
            continue
        for session in tree.folders(folder):
            if files := volumes_in(tree, f"{folder}/{session}"):
                owners = [f"{folder}_{session}", f"{folder}-{session}", session, folder]
                found.append(Group(f"{folder}_{session}", folder, session, names_of(files, owners)))
    return [*found, *_flat(tree, volumes_in(tree, ""))]


def _is_mask(name: str, labels: Sequence[str]) -> bool:
    """Whether a name is, or ends with, the name of a label."""
    return name.lower().replace("-", "_").rpartition("_")[2] in labels


def _check_names(images: Sequence[Sequence[str]], allowed: Iterable[str]) -> None:
    """Refuse modalities found in only one of many cases: the names were misread.

    Raises:
        DataError: names the first.
    """
    counts = Counter(name for names in images for name in {canonical_name(name) for name in names})
    known = {canonical_name(name) for name in allowed}
    once = sorted(name for name, count in counts.items() if count == 1 and name not in known)
    if once and len(images) >= _MANY:
        raise DataError(
            f"The modality {once[0][:40]} occurs in one case only ({len(once)} such of {len(counts)}): files of one "
            f"kind need one name in all cases; medmim init DIR proposes a pattern."
        )


def find_cases(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the cases of a generic folder.

    Args:
        tree: The archive.
        settings: ``masks`` lists masks with other names; modalities that are listed may occur in a single case.

    Raises:
        DataError: ``cases.csv`` names a case that has no folder, or a modality occurs in one case only.
    """
    groups = groups_of(tree)
    images = [[member for member in group.files if not _is_mask(member[0], LABEL_STEMS)] for group in groups]
    _check_names([[name for name, _ in members] for members in images if members], settings.modalities.values())
    masks = [
        {name.lower(): FileRef(tree / file.name) for name, file in group.files if _is_mask(name, LABEL_STEMS)}
        for group in groups
    ]
    used, regions, left = chosen_masks(masks, settings.masks, LABEL_STEMS)
    facts = Facts(regions=regions, label_values=all_values(regions))
    tables = [_TABLE] if tree.is_file(_TABLE) else []
    return Listing(_records(tree, groups, images, used), facts, {MASK: [tree.name_of(path) for path in left]}, tables)


def _records(
    tree: Tree,
    groups: Sequence[Group],
    images: Sequence[Sequence[tuple[str, TreeFile]]],
    masks: Sequence[Mapping[str, FileRef]],
) -> list[Record]:
    """Join cases with their rows of ``cases.csv``.

    Raises:
        DataError: it names a case that has no folder.
    """
    table = read_case_table(tree / _TABLE) if tree.is_file(_TABLE) else {}
    listed, records = list(table), []
    for group, members, labels in zip(groups, images, masks, strict=True):
        if not members:
            continue
        facts = dict(table.pop(group.case_id, {}))
        facts.pop("case_id", None)
        patient, split = facts.pop("patient_id", "") or group.patient_id, facts.pop("split", "") or None
        session = facts.pop("session", "") or group.session
        found, surplus = one_file_each((name, tree / file.name) for name, file in members)
        volumes = {name: FileRef(path) for name, path in found.items()}
        records.append(Record(group.case_id, patient, session, volumes, masks=labels, attributes=facts, split=split,
                              surplus=tuple(surplus)))  # fmt: skip
    joined = join_ids([record.case_id for record in records], listed)
    if records and table:
        raise DataError(
            f"{tree / _TABLE} lists {len(table)} cases without a folder under {tree}, first "
            f"{public_name(next(iter(table)))}{mending(joined) or ': correct the file'}."
        )
    if listed and joined.lacking:
        print_line(joined.counts(_TABLE, "cases"))
    return records


def _recognise(tree: Tree) -> Evidence:
    if marker := foreign_marker(tree):
        return Evidence(0, missing=f"{marker} says that it is another archive")
    places = [file for file in tree.images if file.kind == "volume" and file.name.count("/") <= 2]
    if not places:
        return Evidence(0, missing="CASE/<modality>.nii.gz")
    return Evidence(1, f"{len(places)} volumes in folders of cases")


def find_lung(tree: Tree) -> Listing:
    """List the cases of a lung archive; a case is labelled only if it has both masks.

    Raises:
        DataError: as :func:`find_cases`.
    """
    groups = [group for group in groups_of(tree) if {name.lower() for name, _ in group.files} & set(LUNG_MODALITIES)]
    images = [[member for member in group.files if member[0].lower() not in LUNG_LABELS] for group in groups]
    masks = []
    for group in groups:
        files = {name.lower(): file for name, file in group.files}
        found = {name: FileRef(tree / files[name].name) for name in LUNG_LABELS if name in files}
        # A mask's position is its bit: with one missing, the others would change their meaning.
        masks.append(found if len(found) == len(LUNG_LABELS) else {})
    return Listing(_records(tree, groups, images, masks), tables=[_TABLE] if tree.is_file(_TABLE) else [])


def _recognise_lung(tree: Tree) -> Evidence:
    names = [file.stem.lower() for file in tree.images if file.kind == "volume"]
    known = [name for name in names if name in (*LUNG_MODALITIES, *LUNG_LABELS)]
    if not set(known) & set(LUNG_MODALITIES) or len(known) < 0.9 * len(names):
        return Evidence(0, missing="CASE/1h.nii.gz and CASE/xe.nii.gz", near=len(known) / max(len(names), 1) / 2)
    return Evidence(2, f"{len(known)} of {len(names)} volumes are called 1h, xe, cavity or vent")


FOLDER = Layout(
    name="folder",
    tree="ROOT/CASE/[PREFIX]<modality>.nii.gz, CASE_<modality>.nii.gz or PATIENT/SESSION/<modality>.nii.gz",
    find=find_cases,
    evidence=_recognise,
    takes=("masks",),
    public=False,
    prefer=-1,
)
LUNG = Layout(
    name="lung",
    tree="ROOT/CASE/{1h,xe[,cavity,vent]}.nii.gz [+ ROOT/cases.csv with case_id, disease, split]",
    find=find_lung,
    evidence=_recognise_lung,
    facts=Facts(
        modalities=LUNG_MODALITIES,
        # Bit 0 is the thoracic cavity, bit 1 the ventilated part; the defect is cavity without ventilation.
        regions={"TC": (1, 3), "VD": (1,)},
        label_values=frozenset({0, 1, 2, 3}),
        profile="lung",
    ),
    public=False,
)
