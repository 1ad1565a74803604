"""BraTS: 2023 names and labels, and those of 2017 to 2021.

``BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1c.nii.gz`` (2023; the middle number is the patient, the last the visit) or
``BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz`` (2017-2021; 2018 has HGG/ and LGG/ above, which become the
case's grade). The enhancing tumour is 3 from 2023 on and 4 before; channels are always in the order t1c, t1n, t2f, t2w.
"""

import re
from collections.abc import Iterator

from datamodules.registry import Evidence, Facts, Layout
from datamodules.tree import Tree, TreeFile
from datamodules.volumes.cases import Case, patient_of

MODALITIES = ("t1c", "t1n", "t2f", "t2w")
_ALIASES = {"t1ce": "t1c", "t1gd": "t1c", "t1": "t1n", "flair": "t2f", "t2": "t2w"} | {
    m: m for m in (*MODALITIES, "seg")
}
_NEW_NAME = re.compile(r"^(BraTS-[A-Z]+-\d+)-(\d{3})$", re.IGNORECASE)
#: The mask of BraTS20_Training_355 as the official release has it.
_MISNAMED = "W39_1998.09.19_Segm"
_SUFFIXES = (".nii.gz", ".nii")
_MAX_DEPTH = 3


def _members(tree: Tree, folder: str) -> tuple[dict[str, TreeFile], int]:
    """Return the files of a folder that are called after it and a modality, and how many volumes are called otherwise.

    The first of two files of one modality counts.
    """
    name = _name(tree, folder)
    files: dict[str, TreeFile] = {}
    others = 0
    for file in tree.listed(folder):
        if file.suffix not in _SUFFIXES or file.hidden:
            continue
        stem = file.stem
        modality = _ALIASES.get(stem[len(name) :].lstrip("-_").lower()) if _starts(stem, name) else None
        modality = "seg" if stem == _MISNAMED else modality
        if modality is None:
            others += 1
        else:
            files.setdefault(modality, file)
    return files, others


def _name(tree: Tree, folder: str) -> str:
    return folder.rpartition("/")[2] or tree.root.name


def _starts(stem: str, name: str) -> bool:
    return bool(name) and stem.lower().startswith(name.lower())


def _case_folders(tree: Tree, folder: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, TreeFile], int]]:
    """Yield folders that hold a case, at most three down, with its files and the number of other volumes."""
    files, others = _members(tree, folder)
    if files.keys() - {"seg"}:
        yield folder, files, others
    elif depth < _MAX_DEPTH:
        for name in tree.folders(folder):
            yield from _case_folders(tree, f"{folder}/{name}" if folder else name, depth + 1)


def find_cases(tree: Tree) -> list[Case]:
    """List the BraTS cases of a tree, at most three folders down, whatever year their names are of."""
    cases = []
    # One depth after the other: the order of cases decides what a seed draws, and recorded results hang on it.
    for folder, files, _ in sorted(_case_folders(tree), key=lambda entry: entry[0].count("/") if entry[0] else -1):
        name = _name(tree, folder)
        paths = {modality: tree / file.name for modality, file in files.items()}
        labels = {"seg": paths.pop("seg")} if "seg" in paths else {}
        above = folder.upper().split("/")
        grade = next((grade for grade in ("HGG", "LGG") if grade in above), None)
        facts = {"grade": grade} if grade else {}
        cases.append(Case(name, patient_of(name), paths, labels, attributes=facts))
    return cases


def _recognise_new(tree: Tree) -> Evidence:
    folders = [folder for folder, _, _ in _case_folders(tree)]
    new = sum(bool(_NEW_NAME.match(_name(tree, folder))) for folder in folders)
    missing = "folders called BraTS-GLI-00000-000"
    if not new:
        return Evidence(0, missing=missing, near=0.3 if folders else 0.0)
    return Evidence(3, f"{new} case folders called BraTS-...-00000-000")


def _recognise_old(tree: Tree) -> Evidence:
    """Ask every volume of every case folder for one of the names: other trees are called so in part."""
    found = [entry for entry in _case_folders(tree) if not _NEW_NAME.match(_name(tree, entry[0]))]
    strange = sum(others for _, _, others in found)
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
