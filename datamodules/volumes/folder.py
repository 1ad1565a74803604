"""Any co-registered multi-modal MRI: ``root/CASE/<modality>.nii.gz`` and, optionally, ``root/cases.csv``.

``cases.csv`` needs ``case_id`` and may have ``patient_id``, ``split`` and any further columns, which become attributes
(such as ``disease``). Files whose stem is a label's name are labels; several binary masks become the bits of one label.
The lung layout is the same tree with proton and xenon images and the masks of thoracic cavity and ventilation.
"""

from functools import partial
from pathlib import Path

from common.errors import DataError
from common.modalities import canonical_name
from common.pseudonyms import public_name
from datamodules.ids import check_subjects
from datamodules.members import REFUSED, VOLUMES, members_of
from datamodules.tables import read_table
from datamodules.volumes.cases import Case, Layout, Preprocessing, stem_of
from datamodules.volumes.modalities import one_file_each

#: A label of 3D Slicer says so in its suffix.
_LABEL_SUFFIX = ".seg.nrrd"
SUFFIXES = (*VOLUMES, *REFUSED)
LABEL_STEMS = ("seg", "label", "mask")
LUNG_MODALITIES = ("1h", "xe")
LUNG_LABELS = ("cavity", "vent")


def read_case_table(path: Path) -> dict[str, dict[str, str]]:
    """Read ``cases.csv``: case id to its columns.

    Raises:
        DataError: no ``case_id`` column, or a case listed twice.
    """
    table = read_table(path)
    if "case_id" not in table.columns:
        raise DataError(f"{path} needs a column case_id, it has {', '.join(table.columns)}.")
    check_subjects(path, table["patient_id"] if "patient_id" in table.columns else [])
    rows: dict[str, dict[str, str]] = {}
    for facts in table.to_dict("records"):
        if facts["case_id"] in rows:
            raise DataError(f"{path} lists the case {public_name(facts['case_id'])} twice; keep one row per case.")
        rows[facts["case_id"]] = facts
    return rows


def _stem(path: Path) -> str:
    return "seg" if path.name.lower().endswith(_LABEL_SUFFIX) else stem_of(path, SUFFIXES)


def find_cases(
    root: Path,
    labels: tuple[str, ...] = LABEL_STEMS,
    required: frozenset[str] = frozenset(),
    all_labels: bool = False,
) -> list[Case]:
    """List the cases of a generic folder.

    Args:
        root: The archive.
        labels: Stems that are labels; their order gives the bits.
        required: Stems of which a case must have one to count.
        all_labels: Whether a case is labelled only if it has all of ``labels``.

    Raises:
        DataError: ``cases.csv`` names a case that has no folder.
    """
    table_path = root / "cases.csv"
    table = read_case_table(table_path) if table_path.is_file() else {}
    cases = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [(_stem(path), path) for path in members_of(folder, SUFFIXES)]
        images, surplus = one_file_each((stem, path) for stem, path in files if stem.lower() not in labels)
        if not images or (required and not required & {canonical_name(name) for name in images}):
            continue
        facts = dict(table.pop(folder.name, {}))
        facts.pop("case_id", None)
        patient, split = facts.pop("patient_id", "") or folder.name, facts.pop("split", "") or None
        masks = {stem.lower(): path for stem, path in files}
        found = {stem: masks[stem] for stem in labels if stem in masks}
        # A mask's place among the labels is its bit: with one missing, the others would mean something else.
        if all_labels and len(found) < len(labels):
            found = {}
        cases.append(Case(folder.name, patient, images, found, split, facts, surplus))
    if cases and table:
        raise DataError(
            f"{table_path} lists {len(table)} cases without a folder under {root}, first "
            f"{public_name(next(iter(table)))}."
        )
    return cases


FOLDER = Layout(
    name="folder",
    tree="ROOT/CASE/<modality>.nii.gz [+ ROOT/cases.csv with case_id, patient_id, split, ...]",
    find=find_cases,
    modalities=(),
    regions={},
    label_values=frozenset(),
    preprocessing=Preprocessing(intensity={}, crop_foreground=True),
    crop_size=(128, 128, 128),
    prefer=-1,
)
LUNG = Layout(
    name="lung",
    tree="ROOT/CASE/{1h,xe[,cavity,vent]}.nii.gz [+ ROOT/cases.csv with case_id, disease, split]",
    find=partial(find_cases, labels=LUNG_LABELS, required=frozenset(LUNG_MODALITIES), all_labels=True),
    modalities=LUNG_MODALITIES,
    # Bit 0 is the thoracic cavity, bit 1 what is ventilated; the defect is cavity without ventilation.
    regions={"TC": (1, 3), "VD": (1,)},
    label_values=frozenset({0, 1, 2, 3}),
    preprocessing=Preprocessing(intensity=dict.fromkeys(LUNG_MODALITIES, "percentile")),
    crop_size=(96, 96, 32),
    prefer=1,
)
