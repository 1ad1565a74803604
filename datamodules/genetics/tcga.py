"""TCGA GBM-LGG: regions of stained slides, and the omics, grade and histology of their patients.

Two layouts of tables are read: ``all_dataset.csv`` and ``grade_data.csv`` of Pathomic Fusion, and
``tcga_gbmlgg_all_clean.csv`` (or its ``.zip``) of PORPOISE.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.files import listing, short
from datamodules.genetics.genome import Kind
from datamodules.ids import check_labels, join_ids
from datamodules.images.pictures import Picture
from datamodules.images.reading import COLOUR
from datamodules.labelled.layout import LabelLayout, LabelledImage
from datamodules.registry import Facts, Layout, marked
from datamodules.tables import read_table
from datamodules.tree import Tree

#: A patient's name is this prefix of a file's.
PATIENT_LENGTH = 12
GRADES = ("II", "III", "IV")
_GRADES = {text: grade for grade in (2, 3, 4) for text in (str(grade), f"{grade}.0")}
_FOLDERS = ("**/all_st_patches_512", "**/all_st", "**/all_st_examples/imgs")
_TABLES = (
    "**/all_dataset.csv",
    "**/all_datasets.csv",
    "**/tcga_gbmlgg_all_clean.csv",
    "**/tcga_gbmlgg_all_clean.csv.zip",
)
_OMICS = ("_cnv", "_mut", "_rnaseq")
#: Columns that are no measurement of a tumour's genome, or that follow from one that is there.
_FACTS = (
    "", "unnamed: 0", "indexes", "tcga id", "case_id", "slide_id", "age", "site", "survival_months", "survival months",
    "censored", "censorship", "is_female", "oncotree_code", "train", "codeletion",
)  # fmt: skip


def _patients(path: Path, table: pd.DataFrame) -> pd.Series:
    """Return the patient of each row."""
    for name in ("TCGA ID", "case_id"):
        if name in table.columns:
            return table[name].str.upper().str[:PATIENT_LENGTH]
    raise DataError(f"{path} has neither a column TCGA ID nor case_id.")


def read_omics(root: Tree, rnaseq: bool = False) -> Kind:
    """Read the omics of patients: copy numbers and mutations, and with ``rnaseq`` the expression of genes.

    The first row of a patient counts.

    Raises:
        DataError: there is no table, or no measurement in it.
    """
    path = root.first(*_TABLES)
    if path is None:
        raise DataError(f"There are no omics under {root}: looked for {', '.join(name[3:] for name in _TABLES)}.")
    table = read_table(path)
    patients = _patients(path, table)
    table, patients = table[~patients.duplicated()], patients[~patients.duplicated()]
    names = [name for name in table.columns if name.lower() not in _FACTS]
    if any(name.endswith(_OMICS) for name in names):
        names = [name for name in names if name.endswith(_OMICS)]
    names = [name for name in names if rnaseq or not name.endswith("_rnaseq")]
    if not names:
        raise DataError(f"{path} holds no copy numbers, mutations or expressions.")
    values = table[names].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float32)
    return Kind("omics", patients.tolist(), names, values, "z_score")


def regions(root: Tree) -> list[Path]:
    """List the regions of slides under a root, cut ones if there are any."""
    folder = root.first(*_FOLDERS)
    return [root / file.name for file in root.listed(folder) if file.suffix == ".png"] if folder is not None else []


def find_tcga(root: Tree) -> list[Picture]:
    """List the regions; empty where there is none, or no omics."""
    if root.first(*_TABLES) is None:
        return []
    return [Picture(path.stem, path.name[:PATIENT_LENGTH].upper(), path) for path in regions(root)]


class TCGAGrade(LabelLayout):
    """Regions of gliomas with the grade of the tumour, one patient one grade; II, III or IV."""

    name = "TCGA GBM-LGG"
    tree = "ROOT/{all_dataset.csv, grade_data.csv, **/all_st/*.png} (Pathomic Fusion)"
    reader = COLOUR
    classes = GRADES

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the regions whose patient has a grade."""
        path = root.first("**/grade_data.csv")
        if path is None:
            raise DataError(f"There is no grade_data.csv under {root} ({self.tree}).")
        table = read_table(path)
        if "Grade" not in table.columns:
            raise DataError(f"{path} has no column Grade; it has {listing(table.columns)}.")
        grades: dict[str, int] = {}
        for patient, text in zip(_patients(path, table), table["Grade"], strict=True):
            if text and text not in _GRADES:
                raise DataError(
                    f"{path} gives {public_name(patient)} the grade {short(text)!r}; known are 2, 3 and 4, or nothing."
                )
            if text and grades.setdefault(patient, _GRADES[text]) != _GRADES[text]:
                raise DataError(f"{path} gives {public_name(patient)} two grades.")
        found = []
        shown = regions(root)
        if shown:
            check_labels(path, join_ids([region.name[:PATIENT_LENGTH].upper() for region in shown], grades), "patients")
        for region in shown:
            patient = region.name[:PATIENT_LENGTH].upper()
            if patient in grades:
                targets = tuple(float(grades[patient] == grade) for grade in (2, 3, 4))
                found.append(LabelledImage(region.stem, patient, region, targets))
        if not found:
            raise DataError(f"No region under {root} belongs to a patient with a grade in {path}.")
        return found


def _kinds(root: Tree) -> list[Kind]:
    return [read_omics(root)]


TCGA = Layout(
    name="tcga_gbmlgg",
    tree="ROOT/**/{all_st,all_st_patches_512,all_st_examples/imgs}/{slide}_{n}.png and a table of omics",
    find=find_tcga,
    evidence=marked(_FOLDERS, _TABLES),
    facts=Facts(reader=COLOUR, named=True, genome_kinds=_kinds),
    tables=(*_TABLES, "**/grade_data.csv"),
)
