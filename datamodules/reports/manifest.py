"""Any images with text, listed in a table: CSV, JSON lines or Parquet, one row an image, or a text alone.

``ROOT/manifest.{csv,jsonl,parquet}`` has the columns ``image`` (path under ROOT; empty for a text alone), ``text``,
``subject`` and, if wanted, ``split`` and ``view``; others become attributes. Another table is read by its name and by
naming its columns. The COVID-19 image data collection (``ROOT/images`` and ``ROOT/metadata.csv``) is such a table.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.errors import DataError
from common.pseudonyms import public_name
from common.runtime.reporting import contents, say
from datamodules.files import first_line
from datamodules.ids import check_subjects
from datamodules.listed_files import path_under
from datamodules.reports.studies import Study, StudyLayout
from datamodules.reports.text import plain_text
from datamodules.splits import patients_of_files
from datamodules.tables import read_table

#: Column of each role, where the user names no other.
COLUMNS = {"image": "image", "text": "text", "subject": "subject", "split": "split", "view": "view"}
_ROLES = {*COLUMNS, "folder"}
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


def studies_of_table(
    root: Path, path: Path, columns: Mapping[str, str] = COLUMNS, needed: Iterable[str] = _NEEDED
) -> list[Study]:
    """Make one study of every listed image, and one of every row that has text alone.

    A file with several rows becomes one study, with the first text, view and split that are not empty; subjects who
    share a file are one patient, and a note says so. A row without an image is called after its place: ``row 7``.

    Args:
        root: What the images' paths are relative to.
        path: The table.
        columns: Name of the column of each role: image, text, subject, split, view, and folder, which goes before the
            image's name.
        needed: Roles whose columns must be there.

    Raises:
        DataError: a needed column is missing, a path leaves the root, or a file is in two splits.
    """
    table = read_table(path)
    missing = [columns[role] for role in needed if columns[role] not in table.columns]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}. Name the columns with "
            f"data.columns, such as {{image: filename, text: notes, subject: patient}}."
        )
    roles = {role: name for role, name in columns.items() if name in table.columns}
    rows = table.to_dict("records")
    facts = [{role: row[name] for role, name in roles.items()} for row in rows]
    others = [{name: value for name, value in row.items() if name not in roles.values()} for row in rows]
    names = [_image_name(root, path, fact) or f"row {number}" for number, fact in enumerate(facts, 1)]
    subjects = [fact["subject"] for fact in facts]
    check_subjects(path, subjects)
    _say_shared(path, names, subjects)
    studies: dict[str, Study] = {}
    for name, patient, fact, rest in zip(names, patients_of_files(names, subjects), facts, others, strict=True):
        text, view, split = (fact.get(role, "") for role in ("text", "view", "split"))
        split = split.lower()
        if not fact["image"]:
            if text:
                studies[name] = Study(name, patient, (), text=text, split=split or None, attributes=rest)
            continue
        known = studies.get(name)
        if known is None:
            known = Study(name, patient, (root / name,), ("",), attributes=rest)
        if split and known.split and split != known.split:
            raise DataError(f"{path} puts {public_name(name)} into both {known.split} and {split}; keep its rows in "
                            f"one split.")  # fmt: skip
        studies[name] = known._replace(
            views=(known.views[0] or view,), text=known.text or text or None, split=known.split or split or None
        )
    return list(studies.values())


def _image_name(root: Path, path: Path, fact: Mapping[str, str]) -> str:
    """Return an image's path under the root; empty where a row has none.

    Raises:
        DataError: it leaves the root.
    """
    if not fact["image"]:
        return ""
    name = "/".join(part for part in (fact.get("folder", ""), fact["image"]) if part)
    path_under(root, name, path)
    return name


def _say_shared(path: Path, names: Sequence[str], subjects: Sequence[str]) -> None:
    """Print how many files are listed under several subjects, and the first."""
    owners: dict[str, list[str]] = {}
    for name, subject in zip(names, subjects, strict=True):
        found = owners.setdefault(name, [])
        if subject and subject not in found:
            found.append(subject)
    shared = [(name, found) for name, found in owners.items() if len(found) > 1]
    if shared:
        name, found = shared[0]
        say(f"note: {path.name} lists {len(shared)} files under several subjects, such as {public_name(name)} under "
            f"{' and '.join(map(public_name, found))}; who shares a file is one patient")  # fmt: skip


def find_manifest(root: Path, columns: Mapping[str, str] | None = None, table: str | None = None) -> list[Study]:
    """List the studies of a table; empty where there is none.

    Args:
        root: The archive.
        columns: Name of the column of each role that is not called as :data:`COLUMNS` says; all of them must be there.
        table: Name of the table under the root; None = ``manifest.csv``, ``.jsonl`` or ``.parquet``.

    Raises:
        DataError: there is no table of that name, a role is unknown; and as :func:`studies_of_table`.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - _ROLES)
    if unknown:
        raise DataError(f"data.columns names the role {unknown[0]}; known are {', '.join(sorted(_ROLES))}.")
    if table is not None and not (root / table).is_file():
        raise DataError(f"There is no table {table} (data.table) under {root}; it holds {contents(root)}.")
    names = [f"manifest{suffix}" for suffix in _SUFFIXES] if table is None else [table]
    path = next((root / name for name in names if (root / name).is_file()), None)
    needed = dict.fromkeys((*_NEEDED, *columns))
    return [] if path is None else studies_of_table(root, path, {**COLUMNS, **columns}, needed)


def find_covid(root: Path) -> list[Study]:
    """List the X-rays of the COVID-19 image data collection; empty where the root is not one."""
    path = root / "metadata.csv"
    header = {name.strip(' "') for name in first_line(path).split(",")}
    if not {"filename", "folder", "patientid", "modality"} <= header:
        return []
    studies = studies_of_table(root, path, _COVID_COLUMNS)
    return [study for study in studies if study.images and study.images[0].parent.name == "images"]


MANIFEST = StudyLayout(
    name="manifest",
    tree="ROOT/manifest.{csv,jsonl,parquet}, or data.table, with image, text, subject [, split, view]",
    find=find_manifest,
    extract=plain_text,
    prefer=-1,
)
COVID_CXR = StudyLayout(
    name="covid_cxr",
    tree="ROOT/metadata.csv and ROOT/images/ (COVID-19 image data collection)",
    find=find_covid,
    extract=plain_text,
)
