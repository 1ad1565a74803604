"""Any volumes in folders: ``CASE/[PREFIX]<modality>``, flat ``CASE_<modality>``, ``PATIENT/SESSION/<modality>``.

``cases.csv``, if there is one, needs ``case_id`` and may have ``patient_id``, ``session``, ``split`` and any further
columns, which become attributes (such as ``disease``). Files called ``seg``, ``label``, ``mask`` or ``msk`` are labels;
several binary masks become the bits of one label. The lung layout is the same tree with proton and xenon images and the
masks of thoracic cavity and ventilation.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from datamodules.account import MASK
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
from datamodules.tree import Tree, TreeFile
from datamodules.volumes.cases import patient_of
from datamodules.volumes.masks import chosen_masks

LABEL_STEMS = ("seg", "label", "mask", "msk")
LUNG_MODALITIES = ("1h", "xe")
LUNG_LABELS = ("cavity", "vent")
#: What a volume is called whose name says no more than whose it is.
SINGLE = "image"
#: Folders of Medical Decathlon and nnU-Net, which are never cases.
_PARTS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
#: Names that are modalities wherever they stand, so that they are no prefix and no case.
_KNOWN = frozenset({
    "t1", "t1n", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "flair", "fla", "pd", "dwi", "adc", "swi", "mra",
    "ct", "pet", "hbv", "t2star", "1h", "xe",
})  # fmt: skip
_TABLE = "cases.csv"
#: From this many cases on, a modality that one case alone has is taken for a misunderstanding.
_MANY = 3


class Group(NamedTuple):
    """The volumes of one case.

    Attributes:
        case_id: Its name.
        patient_id: Whose it is.
        session: Visit; empty = the tree knows none.
        files: Modality or label, in lower case, to file.
    """

    case_id: str
    patient_id: str
    session: str
    files: dict[str, TreeFile]


def read_case_table(path: Path) -> dict[str, dict[str, str]]:
    """Read ``cases.csv``: case id to its columns.

    Raises:
        DataError: no ``case_id`` column, or a case listed twice.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "case_id" not in (reader.fieldnames or []):
            raise DataError(f"{path} needs a column case_id, it has {', '.join(reader.fieldnames or ['none'])}.")
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            facts = {name: (value or "").strip() for name, value in row.items() if name}
            if facts["case_id"] in rows:
                raise DataError(f"{path} lists the case {facts['case_id']} twice; keep one row per case.")
            rows[facts["case_id"]] = facts
    return rows


def volumes_in(tree: Tree, folder: str) -> list[TreeFile]:
    """Return the volumes that lie directly in a folder, without the shadow files that macOS leaves behind."""
    return [file for file in tree.listed(folder) if file.kind == "volume" and not file.hidden]


def _cut(stem: str, owner: str) -> str | None:
    """Return what follows an owner's name in a stem; None where the stem does not begin with it."""
    if not owner or not stem.lower().startswith(owner.lower()):
        return None
    rest = stem[len(owner) :]
    return rest.lstrip("_-") if not rest or rest[0] in "_-" else None


def _shared_prefix(stems: Sequence[str]) -> str:
    """Return what several stems begin with, up to the last ``_`` or ``-``; nothing where that is a modality itself."""
    if len(stems) < 2:
        return ""
    first, last = min(stems), max(stems)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:length]
    shared = shared[: max(shared.rfind("_"), shared.rfind("-")) + 1]
    return "" if shared.rstrip("_-").lower() in _KNOWN else shared


def names_of(files: Sequence[TreeFile], owners: Sequence[str]) -> dict[str, TreeFile]:
    """Return the files of a case by what their names say once the case's own name is cut off.

    Args:
        files: The files.
        owners: Names of the folders they lie in, the longest first.

    Raises:
        DataError: two files have one name then.
    """
    stems = {file: file.stem for file in files}
    owner = next((name for name in owners if any(_cut(stem, name) is not None for stem in stems.values())), "")
    prefix = "" if owner else _shared_prefix(list(stems.values()))
    found: dict[str, TreeFile] = {}
    for file, stem in stems.items():
        rest = _cut(stem, owner)
        name = (stem[len(prefix) :] if rest is None else rest).lower() or SINGLE
        if name in found:
            raise DataError(f"{found[name].name} and {file.name} are both {name} of one case: keep one of them.")
        found[name] = file
    return found


def _flat(tree: Tree, files: Sequence[TreeFile]) -> Iterator[Group]:
    """Yield the cases whose files lie in the root itself: ``CASE_<modality>``, ``CASE_0000``, or one file per case."""
    cuts = {file: max(file.stem.rfind("_"), file.stem.rfind("-")) for file in files}
    parts = {file: (file.stem[: max(cut, 0)], file.stem[cut + 1 :].lower()) for file, cut in cuts.items()}
    groups: dict[str, dict[str, TreeFile]] = {}
    for file, (case, name) in parts.items():
        groups.setdefault(case, {}).setdefault(name, file)
    # Numbers are channels only as nnU-Net writes them: four digits, and the first of them in every case.
    numbered = all(name.isdigit() and len(name) == 4 for _, name in parts.values())
    numbered = numbered and len(groups) > 1 and all("0000" in names for names in groups.values())
    for case, names in groups.items():
        whole = {} if numbered else {n: f for n, f in names.items() if n.isdigit() or (not case and n not in _KNOWN)}
        yield from (Group(file.stem, patient_of(file.stem), "", {SINGLE: file}) for file in whole.values())
        rest = {name: file for name, file in names.items() if name not in whole}
        if rest:
            name = case or tree.root.name
            yield Group(name, patient_of(name), "", rest)


def groups_of(tree: Tree) -> list[Group]:
    """List the cases of a tree with their files.

    Raises:
        DataError: two files of a case have one name.
    """
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
    return name in labels or name.replace("-", "_").rpartition("_")[2] in labels


def _check_names(groups: Sequence[Mapping[str, TreeFile]], allowed: Sequence[str]) -> None:
    """Refuse modalities that one of many cases alone has: names were understood wrongly.

    Raises:
        DataError: names the first.
    """
    counts = Counter(name for images in groups for name in images)
    once = sorted(name for name, count in counts.items() if count == 1 and name not in allowed)
    if once and len(groups) >= _MANY:
        raise DataError(
            f"The modality {once[0][:40]} occurs in one case only ({len(once)} such of {len(counts)}): files of one "
            f"kind need one name in all cases; medmim init DIR proposes a pattern."
        )


def find_cases(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the cases of a generic folder.

    Args:
        tree: The archive.
        settings: ``masks`` names masks that are called otherwise; modalities that it lists may occur in one case only.

    Raises:
        DataError: ``cases.csv`` names a case that has no folder, two files of a case have one name, or a modality
            occurs in one case only.
    """
    groups = groups_of(tree)
    images = [{name: file for name, file in group.files.items() if not _is_mask(name, LABEL_STEMS)} for group in groups]
    _check_names(images, [name.lower() for name in settings.modalities.values()])
    masks = [
        {name: FileRef(tree / file.name) for name, file in group.files.items() if _is_mask(name, LABEL_STEMS)}
        for group in groups
    ]
    used, regions, left = chosen_masks(masks, settings.masks, LABEL_STEMS)
    records = _records(tree, groups, images, used)
    reasons = {MASK: [tree.name_of(path) for path in left]}
    return Listing(records, Facts(regions=regions), reasons, [_TABLE] if tree.is_file(_TABLE) else [])


def _records(
    tree: Tree,
    groups: Sequence[Group],
    images: Sequence[Mapping[str, TreeFile]],
    masks: Sequence[Mapping[str, FileRef]],
) -> list[Record]:
    """Join the cases with their rows in ``cases.csv``.

    Raises:
        DataError: it names a case that has no folder.
    """
    table = read_case_table(tree / _TABLE) if tree.is_file(_TABLE) else {}
    records = []
    for group, files, labels in zip(groups, images, masks, strict=True):
        if not files:
            continue
        facts = dict(table.pop(group.case_id, {}))
        facts.pop("case_id", None)
        patient, split = facts.pop("patient_id", "") or group.patient_id, facts.pop("split", "") or None
        session = facts.pop("session", "") or group.session
        volumes = {name: FileRef(tree / file.name) for name, file in files.items()}
        records.append(
            Record(group.case_id, patient, session, volumes, masks=labels, attributes=facts, split=split)
        )  # fmt: skip
    if records and table:
        raise DataError(
            f"{tree / _TABLE} lists {len(table)} cases without a folder under {tree}, first {next(iter(table))}."
        )
    return records


def _recognise(tree: Tree) -> Evidence:
    if marker := foreign_marker(tree):
        return Evidence(0, missing=f"{marker} says that it is another archive")
    places = [file for file in tree.images if file.kind == "volume" and file.name.count("/") <= 2]
    if not places:
        return Evidence(0, missing="CASE/<modality>.nii.gz")
    return Evidence(1, f"{len(places)} volumes in folders of cases")


def find_lung(tree: Tree) -> Listing:
    """List the chests of a lung archive; a chest is labelled only if it has both masks.

    Raises:
        DataError: as :func:`find_cases`.
    """
    groups = [group for group in groups_of(tree) if set(LUNG_MODALITIES) & group.files.keys()]
    images = [{name: f for name, f in group.files.items() if name not in LUNG_LABELS} for group in groups]
    masks = []
    for group in groups:
        found = {name: FileRef(tree / group.files[name].name) for name in LUNG_LABELS if name in group.files}
        # A mask's place among the labels is its bit: with one missing, the others would mean something else.
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
        # Bit 0 is the thoracic cavity, bit 1 what is ventilated; the defect is cavity without ventilation.
        regions={"TC": (1, 3), "VD": (1,)},
        label_values=frozenset({0, 1, 2, 3}),
        profile="lung",
    ),
    public=False,
)
