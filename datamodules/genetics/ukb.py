"""UK Biobank: fundus photographs by field and instance, and the genetics beside them.

Photographs are ``{eid}_{field}_{instance}_{array}.png`` anywhere under the root, as the bulk download has them, or
``{left,right}/512_{left,right}/processed/*.jpg`` with ``qc_paths_{left,right}.txt``, as ContIG prepares them.
"""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from common.errors import DataError
from common.pseudonyms import public_name
from datamodules.files import listed_names, listing
from datamodules.genetics.genome import GenomeFiles
from datamodules.ids import check_labels, join_ids
from datamodules.images.pictures import Picture
from datamodules.images.reading import FUNDUS
from datamodules.labelled.layout import LabelLayout, LabelledImage, need_file
from datamodules.labelled.tables import files_under
from datamodules.registry import Evidence, Facts, Layout
from datamodules.tables import read_numbers, read_table
from datamodules.tree import Tree

#: The targets predicted from a photograph.
RISKS = {"regression": ("age", "bmi", "sbp", "dbp"), "classification": ("sex", "smoking")}
#: Fundus photographs of the left and the right eye.
FIELDS = ("21015", "21016")
_NAME = re.compile(r"(-?\d+)_(21015|21016)_(\d)_(\d)")
_SUFFIXES = (".png", ".jpg", ".jpeg")


def split_of_eids(eids: list[str], seed: int = 42) -> dict[str, str]:
    """Split people 70 / 10 / 20 as ContIG does, so that its test people stay unseen."""
    names = np.array(sorted(set(eids), key=int))
    order = np.random.RandomState(seed).permutation(len(names))
    train, val = int(0.7 * len(names)), int(0.1 * len(names))
    parts = np.repeat(["train", "val", "test"], [train, val, len(names) - train - val])
    return {str(names[index]): str(part) for index, part in zip(order, parts, strict=True)}


def _checked_names(root: Tree) -> set[str] | None:
    """Return the names that passed the quality control; None where there was none."""
    lists = [path for side in ("left", "right") for path in root.glob(f"**/qc_paths_{side}.txt")]
    if not lists:
        return None
    return {Path(name).name for name in listed_names(lists)}


def european(root: Tree, threshold: float = 0.99) -> set[str] | None:
    """Return the people of ``ancestry.tsv`` whose probability ``EUR`` is high enough; None without such a file.

    Raises:
        DataError: a column is missing.
    """
    path = root / "ancestry.tsv"
    if not root.is_file(path):
        return None
    table = read_table(path)
    if not {"IID", "EUR"} <= set(table.columns):
        raise DataError(f"{path} needs the columns IID and EUR, it has {listing(table.columns)}.")
    kept = read_numbers(path, table["EUR"], "probabilities") >= threshold
    return set(table.loc[kept, "IID"])


def find_ukb(root: Tree) -> list[Picture]:
    """List the photographs; empty where there is none. People who withdrew (negative numbers) have none.

    Raises:
        DataError: ancestry.tsv is damaged.
    """
    checked, kept = _checked_names(root), european(root)
    found: dict[str, Path] = {}
    for path in files_under(root, [""], _SUFFIXES):
        match = _NAME.fullmatch(path.stem)
        if match is None or match[1].startswith("-") or (checked is not None and path.name not in checked):
            continue
        if kept is None or match[1] in kept:
            found.setdefault(path.stem, path)
    parts = split_of_eids([name.split("_")[0] for name in found]) if found else {}
    return [Picture(name, name.split("_")[0], path, parts[name.split("_")[0]]) for name, path in sorted(found.items())]


#: Genotype files of one autosome: ``*_chr7*``, and ``ukb22418_c7_b0_v2`` as the platform names them.
_CHROMOSOME = re.compile(r"_c(?:hr)?(\d{1,2}|X|Y|XY|MT)(?=[_.]|$)", re.IGNORECASE)


def _genotype_pattern(root: Tree) -> str | None:
    """Return the one family of genotype files in a folder, ``{chrom}`` for 1 to 22; None where there is none."""
    families: dict[str, set[str]] = {}
    folder = root / "genetics"
    for path in (root / file.name for file in root.listed("genetics")):
        match = _CHROMOSOME.search(path.stem)
        if match is not None and path.suffix in (".bed", ".bgen"):
            name = path.name[: match.start(1)] + "{chrom}" + path.name[match.end(1) :]
            families.setdefault(name, set()).add(match[1])
    autosomes = {name for name, found in families.items() if any(c.isdigit() and 1 <= int(c) <= 22 for c in found)}
    if families and not autosomes:
        others = ", ".join(sorted(set().union(*families.values())))
        raise DataError(f"{folder} has genotypes of chromosome {others} alone; those of 1 to 22 are read.")
    preferred = {name for name in autosomes if name.endswith(".bed")} or autosomes
    if len(preferred) > 1:
        raise DataError(f"{folder} has several families of genotypes ({', '.join(sorted(preferred))}): name one with "
                        "data.genome.genotypes.")  # fmt: skip
    return str(folder / next(iter(preferred))) if preferred else None


def genetics_of(root: Tree) -> GenomeFiles:
    """Return the genetics in ``genetics/``, ``pgs/`` and ``burden/`` under a root."""
    pattern = _genotype_pattern(root)
    tables = root / "pgs"
    burden = root / "burden" / "combined_burdens.h5"
    return GenomeFiles(
        genotypes=pattern,
        step=100,
        score_tables=str(tables) if root.first("pgs/*.sscore") else None,
        burden=str(burden) if root.is_file(burden) else None,
        build="GRCh37",
    )


def read_phenotypes(path: Path) -> pd.DataFrame:
    """Read age, BMI, blood pressure, sex and smoking of people; NaN where unknown.

    Returns:
        A row per person (index eid): age, bmi, sbp, dbp, sex (1 = male), smoking (1 = now).

    Raises:
        DataError: a column is missing, or a person is listed twice.
    """
    table = read_table(path)
    needed = ["eid", "31-0.0", "21022-0.0", "21001-0.0", "20116-0.0", "4080-0.0", "4079-0.0"]
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{path} has no column {listing(missing)}; it has {listing(table.columns)}.")
    if table["eid"].duplicated().any():
        twice = table["eid"][table["eid"].duplicated()].iloc[0]
        raise DataError(f"{path} lists {public_name(twice)} twice.")

    def number(*names: str) -> pd.Series:
        columns = [read_numbers(path, table[name], f"values of {name}") for name in names if name in table.columns]
        return pd.concat(columns, axis=1).mean(axis=1)

    smoking = number("20116-0.0")
    result = pd.DataFrame(
        {
            "age": number("21022-0.0"),
            "bmi": number("21001-0.0"),
            "sbp": number("4080-0.0", "4080-0.1"),
            "dbp": number("4079-0.0", "4079-0.1"),
            "sex": number("31-0.0"),
            # -3: would rather not say.
            "smoking": (smoking == 2).astype(float).where(smoking >= 0),
        }
    )
    return result.set_index(table["eid"])


class UKBRisk(LabelLayout):
    """Photographs of UK Biobank with prediction targets, in the split of pre-training.

    Args:
        task: ``regression`` of age, BMI and both blood pressures, or ``classification`` of sex and smoking.
    """

    name = "UK Biobank"
    tree = "ROOT/{phenotypes.csv, **/{eid}_{21015,21016}_{instance}_{array}.png}"
    reader = FUNDUS

    def __init__(self, task: Literal["regression", "classification"] = "regression") -> None:
        if task not in RISKS:
            raise ValueError(f"`task` must be one of {', '.join(RISKS)}, got {task!r}.")
        self.classes = RISKS[task]

    def _find(self, root: Tree) -> list[LabelledImage]:
        """List the photographs of people with any of the measurements."""
        path = need_file(root, ["phenotypes.csv", "ukb*_full.csv"], self)
        table = read_phenotypes(path)[list(self.classes)]
        table = table[table.notna().any(axis=1)]
        rows = zip(table.index, table.to_numpy(), strict=True)
        values = {str(eid): tuple(float(value) for value in row) for eid, row in rows}
        pictures = find_ukb(root)
        if pictures:
            joined = join_ids([picture.patient_id for picture in pictures], values)
            check_labels(path, joined, "people with photographs")
        found = [
            LabelledImage(picture.case_id, picture.patient_id, picture.image, values[picture.patient_id], picture.split)
            for picture in pictures
            if picture.patient_id in values
        ]
        if not found:
            raise DataError(f"No photograph under {root} is of a person in {path}.")
        return found


def _recognise(tree: Tree) -> Evidence:
    found = next((file for file in tree.under("", _SUFFIXES) if _NAME.fullmatch(file.stem)), None)
    if found is None:
        return Evidence(0, missing="{eid}_21015_{instance}_{array}.png")
    return Evidence(3, f"names such as {found.name}")


UKB = Layout(
    name="ukb",
    tree="ROOT/**/{eid}_{21015,21016}_{instance}_{array}.{png,jpg}, and genetics/, pgs/, burden/ if there are any",
    find=find_ukb,
    evidence=_recognise,
    facts=Facts(reader=FUNDUS, named=True, genome_files=genetics_of),
    tables=("ancestry.tsv", "**/qc_paths_*.txt"),
)
