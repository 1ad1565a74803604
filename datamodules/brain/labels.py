"""Classes of brain studies, from folder names or from an archive's tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from datamodules.files import listing
from datamodules.ids import IdRule, check_labels, join_ids, rows_by
from datamodules.tables import read_table
from datamodules.tree import Tree
from datamodules.volumes.cases import Case


@dataclass
class LabelSource:
    """Where classes come from, and what values mean.

    Attributes:
        classes: Class to the values that stand for it.
        attribute: Case attribute that holds the value, if there is no table.
        table: CSV or TSV under the root, or its absolute path; a pattern such as ``*phenotypic*`` may match several.
        key: Column with the case's or the patient's name.
        column: Column with the value.
        ids: ``exact``, or ``pad`` if the table has lost leading zeros.
    """

    classes: dict[str, list[str]]
    attribute: str | None = None
    table: str | None = None
    key: str = "case_id"
    column: str = "class"
    ids: IdRule = "exact"


def _values(paths: Sequence[Path], source: LabelSource) -> dict[str, str]:
    """Return the value of each name in some tables.

    Raises:
        DataError: a column is missing, or a name has two values.
    """
    values: dict[str, str] = {}
    for path in paths:
        table = read_table(path)
        missing = [name for name in (source.key, source.column) if name not in table.columns]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}; it has {listing(table.columns)}.")
        for name, row in rows_by(path, table[[source.key, source.column]], source.key).items():
            if values.setdefault(name, row[source.column]) != row[source.column]:
                raise DataError(f"{path} gives {name} another {source.column} than a table before it does.")
    return values


def _listed(cases: Sequence[Case], source: LabelSource, paths: Sequence[Path]) -> dict[str, str]:
    """Return the value of each case, listed in the tables under the case's or the patient's name.

    Raises:
        DataError: as :func:`_values`, or the tables list fewer than half of the cases.
    """
    values = _values(paths, source)
    by_case = join_ids([case.case_id for case in cases], values, source.ids)
    by_patient = join_ids([case.patient_id for case in cases], values, source.ids)
    check_labels(paths[0], max(by_case, by_patient, key=lambda joined: len(joined.found)), "cases", "classes.ids")
    names = {case.case_id: by_case.found.get(case.case_id, by_patient.found.get(case.patient_id)) for case in cases}
    return {case: values[name] for case, name in names.items() if name is not None}


def label_tables(source: LabelSource, tree: Tree) -> list[Path]:
    """Return the tables that hold the classes; empty if they come from an attribute.

    Raises:
        DataError: the table does not exist.
    """
    if source.table is None:
        return []
    named = Path(source.table)
    paths = [named] if named.is_absolute() and named.is_file() else tree.glob(f"**/{source.table}")
    if not paths:
        raise DataError(f"There is no table {source.table} under {tree}, where the column {source.column!r} would be.")
    return paths


def read_classes(cases: Sequence[Case], source: LabelSource, tables: Sequence[Path]) -> dict[str, int]:
    """Return the class index of every case that has one; cases with other values, such as -999, are left out.

    Args:
        cases: The cases.
        source: Source of the classes.
        tables: See :func:`label_tables`.

    Raises:
        DataError: a column is missing, or fewer than two classes have cases.
    """
    meaning = {value: index for index, values in enumerate(source.classes.values()) for value in values}
    if source.table is None:
        found: Mapping[str, str] = {case.case_id: case.attributes.get(source.attribute or "", "") for case in cases}
    else:
        found = _listed(cases, source, tables)
    classes = {name: meaning[value] for name, value in found.items() if value in meaning}
    if len(set(classes.values())) < 2:
        seen = listing(sorted({value for value in found.values() if value}))
        raise DataError(f"Classification needs two classes at least; {len(classes)} of {len(cases)} cases are one of "
                        f"{', '.join(source.classes)}; the values found are {seen}.")  # fmt: skip
    return classes
