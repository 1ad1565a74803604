"""Classes of brain studies, from folder names or from the tables that archives come with."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from datamodules.volumes.cases import Case


@dataclass
class LabelSource:
    """Where a class comes from, and what values mean.

    Attributes:
        classes: Class to the values that mean it.
        attribute: Case attribute that holds the value, where there is no table.
        table: CSV or TSV under the root, or its absolute path; a pattern such as ``*phenotypic*`` may name several.
        key: Column with the case's or the patient's name.
        column: Column with the value.
    """

    classes: dict[str, list[str]]
    attribute: str | None = None
    table: str | None = None
    key: str = "case_id"
    column: str = "class"


def _plain_id(name: str) -> str:
    """Return an id without the zeros that spreadsheets drop."""
    return name.strip().lstrip("0") if name.strip().isdigit() else name.strip()


def read_table(path: Path, key: str, column: str) -> dict[str, str]:
    """Read name to value; blanks around headers and values do not count.

    Raises:
        DataError: a column is missing.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        sample = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter="\t" if sample.count("\t") > sample.count(",") else ",")
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in (key, column) if name not in header]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(header)}.")
        rows = [dict(zip(header, (value.strip() for value in row), strict=False)) for row in reader if row]
    return {_plain_id(row.get(key, "")): row.get(column, "") for row in rows}


def read_classes(cases: Sequence[Case], source: LabelSource, root: Path) -> dict[str, int]:
    """Return the class index of every case that has one; values of no class, such as -999, leave a case out.

    Args:
        cases: The cases.
        source: Where the classes come from.
        root: The archive.

    Raises:
        DataError: no table, a column is missing, or fewer than two classes have cases.
    """
    meaning = {value: index for index, values in enumerate(source.classes.values()) for value in values}
    if source.table is None:
        found: Mapping[str, str] = {case.case_id: case.attributes.get(source.attribute or "", "") for case in cases}
    else:
        paths = [Path(source.table)] if Path(source.table).is_absolute() else sorted(root.rglob(source.table))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError(
                f"There is no table {source.table} under {root}, where the column {source.column!r} would be."
            )
        table: dict[str, str] = {}
        for path in paths:
            table |= read_table(path, source.key, source.column)
        found = {case.case_id: table.get(_plain_id(case.case_id), table.get(_plain_id(case.patient_id), ""))
                 for case in cases}  # fmt: skip
    classes = {name: meaning[value] for name, value in found.items() if value in meaning}
    if len(set(classes.values())) < 2:
        seen = sorted({value for value in found.values() if value})[:6]
        raise DataError(f"Classification needs two classes at least; {len(classes)} of {len(cases)} cases are one of "
                        f"{', '.join(source.classes)}; the values found are {', '.join(seen) or 'none'}.")  # fmt: skip
    return classes
