"""BraTS adult glioma: 2023 names and labels, and those of 2017 to 2021.

``BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1c.nii.gz`` (2023; the middle number is the patient, the last the visit) or
``BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz`` (2017-2021; 2018 has HGG/ and LGG/ above). The enhancing
tumour is 3 from 2023 on and 4 before; channels are always in the order t1c, t1n, t2f, t2w.
"""

import re
from functools import partial
from pathlib import Path

from datamodules.members import NIFTI, members_of
from datamodules.volumes.cases import Case, Layout, Preprocessing, stem_of
from datamodules.volumes.modalities import one_file_each

MODALITIES = ("t1c", "t1n", "t2f", "t2w")
_NAMES = frozenset({*MODALITIES, "t1ce", "t1gd", "t1", "flair", "t2"})
_NEW_NAME = re.compile(r"^(BraTS-[A-Z]+-\d+)-(\d{3})$", re.IGNORECASE)
_MAX_DEPTH = 3


def _case(folder: Path) -> Case | None:
    """Read a folder as a case: files are called after the folder and a modality."""
    found = []
    for path in members_of(folder, NIFTI):
        stem = stem_of(path, NIFTI)
        if stem.lower().startswith(folder.name.lower()):
            found.append((stem[len(folder.name) :].lstrip("-_"), path))
    masks = [path for name, path in found if name.lower() == "seg"]
    images, surplus = one_file_each((name, path) for name, path in found if name.lower() in _NAMES)
    if not images:
        return None
    match = _NEW_NAME.match(folder.name)
    patient = match.group(1) if match else folder.name
    return Case(folder.name, patient, images, {"seg": masks[-1]} if masks else {}, surplus=surplus)


def find_cases(root: Path, new_names: bool | None = None) -> list[Case]:
    """List the BraTS cases under a root, at most three folders down.

    Args:
        root: The archive.
        new_names: Whether to accept names of 2023 (True), of 2017-2021 (False), or both (None).
    """
    cases, folders = [], [root]
    for _ in range(_MAX_DEPTH + 1):
        below: list[Path] = []
        for folder in folders:
            case = _case(folder)
            if case is not None:
                cases.append(case)
            else:
                below += sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        folders = below
    if new_names is not None:
        cases = [case for case in cases if bool(_NEW_NAME.match(case.case_id)) == new_names]
    return cases


def _layout(name: str, tree: str, enhancing: int, new_names: bool) -> Layout:
    return Layout(
        name=name,
        tree=tree,
        find=partial(find_cases, new_names=None),
        modalities=MODALITIES,
        regions={"WT": (1, 2, enhancing), "TC": (1, enhancing), "ET": (enhancing,)},
        label_values=frozenset({0, 1, 2, enhancing}),
        preprocessing=Preprocessing(intensity=dict.fromkeys(MODALITIES, "percentile"), crop_foreground=True),
        crop_size=(128, 128, 128),
        recognise=partial(find_cases, new_names=new_names),
    )


BRATS2023 = _layout("brats2023", "ROOT/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1c,t1n,t2f,t2w[,seg]}.nii.gz", 3, True)
BRATS2021 = _layout("brats2021", "ROOT/[HGG/]CASE/CASE_{t1ce,t1,flair,t2[,seg]}.nii.gz (2017-2021, ET = 4)", 4, False)
