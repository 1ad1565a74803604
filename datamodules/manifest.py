"""Any images with text, listed in a table: CSV, JSON lines or Parquet, one row an image.

``ROOT/manifest.{csv,jsonl,parquet}`` has the columns ``image`` (path under ROOT), ``text``, ``subject`` and, if wanted,
``split`` and ``view``; others become attributes. A table with other names is read by naming its columns. The COVID-19
image data collection (``ROOT/images`` and ``ROOT/metadata.csv``) is such a table.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from common.errors import DataError
from datamodules.reports import plain_text
from datamodules.studies import Study, StudyLayout

#: Column of each role, where the user names no other.
COLUMNS = {"image": "image", "text": "text", "subject": "subject", "split": "split", "view": "view"}
_NEEDED = ("image", "subject")
_COVID_COLUMNS = {
    "image": "filename",
    "folder": "folder",
    "text": "clinical_notes",
    "subject": "patientid",
    "view": "view",
    "modality": "modality",
}
_SUFFIXES = (".csv", ".jsonl", ".parquet")


def read_table(path: Path) -> pd.DataFrame:
    """Read a table as text; names and values lose outer blanks, empty cells are empty text.

    Raises:
        DataError: the file cannot be read as what its name says.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".jsonl":
            table = pd.read_json(path, lines=True, dtype=False)
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
    table.columns = [str(name).strip() for name in table.columns]
    table = table.astype(object).where(table.notna(), "")
    return table.map(lambda value: str(value).strip())


def studies_of_table(root: Path, path: Path, columns: Mapping[str, str] = COLUMNS) -> list[Study]:
    """Make one study of every listed image.

    A file with several rows becomes one study, with the first text that is not empty.

    Args:
        root: What the images' paths are relative to.
        path: The table.
        columns: Name of the column of each role: image, text, subject, split, view, and folder, which goes before the
            image's name.

    Raises:
        DataError: a needed column is missing, or a path leaves the root.
    """
    table = read_table(path)
    missing = [columns.get(role, role) for role in _NEEDED if columns.get(role, role) not in table.columns]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}. Name the columns with "
            f"data.columns, such as {{image: filename, text: notes, subject: patient}}."
        )
    roles = {role: name for role, name in columns.items() if name in table.columns}
    studies: dict[str, Study] = {}
    for row in table.to_dict("records"):
        facts = {role: row.pop(name) for role, name in roles.items()}
        if not facts["image"]:
            continue
        name = "/".join(part for part in (facts.get("folder", ""), facts["image"]) if part)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{path} names the image {name}, which does not lie under {root}.")
        known = studies.get(name)
        if known is not None:
            studies[name] = known._replace(text=known.text or facts.get("text") or None)
            continue
        studies[name] = Study(
            case_id=name,
            patient_id=facts["subject"] or name,
            images=(root / name,),
            views=(facts.get("view", ""),),
            text=facts.get("text") or None,
            split=facts.get("split", "").lower() or None,
            attributes=row,
        )
    return list(studies.values())


def find_manifest(root: Path, columns: Mapping[str, str] | None = None) -> list[Study]:
    """List the studies of ``root/manifest.*``; empty where there is none.

    Raises:
        DataError: as :func:`studies_of_table`.
    """
    found = [root / f"manifest{suffix}" for suffix in _SUFFIXES if (root / f"manifest{suffix}").is_file()]
    return studies_of_table(root, found[0], {**COLUMNS, **(columns or {})}) if found else []


def find_covid(root: Path) -> list[Study]:
    """List the X-rays of the COVID-19 image data collection; empty where the root is not one."""
    path = root / "metadata.csv"
    if not path.is_file():
        return []
    header = {name.strip() for name in path.open(encoding="utf-8-sig").readline().split(",")}
    if not {"filename", "folder", "patientid", "modality"} <= header:
        return []
    studies = studies_of_table(root, path, _COVID_COLUMNS)
    return [study for study in studies if study.images[0].parent.name == "images"]


MANIFEST = StudyLayout(
    name="manifest",
    tree="ROOT/manifest.{csv,jsonl,parquet} with image, text, subject [, split, view]",
    find=partial(find_manifest),
    extract=plain_text,
    prefer=-1,
)
COVID_CXR = StudyLayout(
    name="covid_cxr",
    tree="ROOT/metadata.csv and ROOT/images/ (COVID-19 image data collection)",
    find=find_covid,
    extract=plain_text,
)
