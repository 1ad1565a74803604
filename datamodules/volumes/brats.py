"""BraTS: 2023 names and labels, and those of 2017 to 2021.

``BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1c.nii.gz`` (2023; the middle number is the patient, the last the visit) or
``BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz`` (2017-2021; in 2018 the parent folders HGG/ and LGG/ give
the case's grade). The enhancing tumour has label 3 from 2023 on and 4 before; the channels are always t1c, t1n, t2f and
t2w, in this order.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datamodules.registry import Evidence, Facts, Layout
from datamodules.tree import Tree
from datamodules.volumes.cases import Case, patient_of
from datamodules.volumes.modalities import one_file_each

MODALITIES = ("t1c", "t1n", "t2f", "t2w")
_NAMES = frozenset({*MODALITIES, "t1ce", "t1gd", "t1", "flair", "t2", "seg"})
_NEW_NAME = re.compile(r"^(BraTS-[A-Z]+-\d+)-(\d{3})$", re.IGNORECASE)
#: The mask of BraTS20_Training_355 under its name in the official release.
_MISNAMED = "W39_1998.09.19_Segm"
_SUFFIXES = (".nii.gz", ".nii")
_MAX_DEPTH = 3


class _Found(NamedTuple):
    """A folder that holds a case.

    Attributes:
        folder: The folder.
        members: Modality, or ``seg``, as written, and file.
        others: How many volumes have other names.
    """

    folder: str
    members: list[tuple[str, Path]]
    others: int


def _read_folder(tree: Tree, folder: str) -> _Found:
    """Return the files of a folder that are named after it and a modality."""
    name = _name(tree, folder)
    found = _Found(folder, [], 0)
    for file in tree.listed(folder):
        if file.suffix not in _SUFFIXES or file.hidden:
            continue
        after = file.stem[len(name) :].lstrip("-_") if file.stem.lower().startswith(name.lower()) else ""
        modality = "seg" if file.stem == _MISNAMED else after
        if modality.lower() in _NAMES:
            found.members.append((modality, tree / file.name))
        else:
            found = found._replace(others=found.others + 1)
    return found


def _name(tree: Tree, folder: str) -> str:
    return folder.rpartition("/")[2] or tree.root.name


def _case_folders(tree: Tree, folder: str = "", depth: int = 0) -> Iterator[_Found]:
    """Yield the folders that hold a case, at most three levels down."""
    found = _read_folder(tree, folder)
    if any(name.lower() != "seg" for name, _ in found.members):
        yield found
    elif depth < _MAX_DEPTH:
        for name in tree.folders(folder):
            yield from _case_folders(tree, f"{folder}/{name}" if folder else name, depth + 1)


def find_cases(tree: Tree) -> list[Case]:
    """List the BraTS cases of a tree, at most three levels down, with names of any year."""
    cases = []
    # Level by level: the order of cases decides what a seed draws, and recorded results depend on it.
    for found in sorted(_case_folders(tree), key=lambda entry: entry.folder.count("/") if entry.folder else -1):
        name = _name(tree, found.folder)
        masks = [path for modality, path in found.members if modality.lower() == "seg"]
        images, surplus = one_file_each(member for member in found.members if member[0].lower() != "seg")
        grade = next((grade for grade in ("HGG", "LGG") if grade in found.folder.upper().split("/")), None)
        facts = {"grade": grade} if grade else {}
        labels = {"seg": masks[-1]} if masks else {}
        cases.append(Case(name, patient_of(name), images, labels, attributes=facts, surplus=surplus))
    return cases


def _recognise_new(tree: Tree) -> Evidence:
    folders = [found.folder for found in _case_folders(tree)]
    new = sum(bool(_NEW_NAME.match(_name(tree, folder))) for folder in folders)
    missing = "folders called BraTS-GLI-00000-000"
    if not new:
        return Evidence(0, missing=missing, near=0.3 if folders else 0.0)
    return Evidence(3, f"{new} case folders called BraTS-...-00000-000")


def _recognise_old(tree: Tree) -> Evidence:
    """Require one of the names of every volume in every case folder: other trees match in part."""
    found = [entry for entry in _case_folders(tree) if not _NEW_NAME.match(_name(tree, entry.folder))]
    strange = sum(entry.others for entry in found)
    if found and not strange:
        return Evidence(2, f"every volume of {len(found)} case folders is called CASE_flair, _t1, _t1ce, _t2 or _seg")
    near = 0.5 if found else 0.0
    return Evidence(0, missing=f"{strange} volumes have other names" if found else "CASE/CASE_flair.nii.gz", near=near)


BRATS2023 = Layout(
    name="brats2023",
    tree="ROOT/BraTS-{GLI,MEN,SSA,MET,PED}-00000-000/...-{t1c,t1n,t2f,t2w[,seg]}.nii.gz",
    find=find_cases,
    evidence=_recognise_new,
    facts=Facts(
        modalities=MODALITIES,
        regions={"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
        label_values=frozenset({0, 1, 2, 3}),
    ),
)
BRATS2021 = Layout(
    name="brats2021",
    tree="ROOT/[HGG/,LGG/]CASE/CASE_{t1ce,t1,flair,t2[,seg]}.nii.gz (2017-2021, ET = 4)",
    find=find_cases,
    evidence=_recognise_old,
    facts=Facts(
        modalities=MODALITIES,
        regions={"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
        label_values=frozenset({0, 1, 2, 4}),
    ),
)
