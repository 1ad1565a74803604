"""Targets that a person names in ``archive.yaml``: from a table or from what the layout knows, as text."""

from collections.abc import Mapping, Set
from typing import Any

from common.errors import DataError
from datamodules.files import listing, short
from datamodules.ids import check_labels, join_ids, rows_by
from datamodules.registry import Archive
from datamodules.tables import read_table

#: Columns that may say whose a row is, in the order in which they are looked for.
KEYS = ("case_id", "patient_id", "participant_id", "subject", "image")


def with_targets(archive: Archive, targets: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the records of an archive the targets that are named; a value of no class is unknown.

    Args:
        archive: The archive; its records and tables are changed.
        targets: Name to ``table``, ``column``, ``classes`` and ``merge``, as in ``archive.yaml``.

    Raises:
        DataError: there is no such table or column, or it does not join the archive.
    """
    own = {str(archive.tree / archive.tree.name_of(table)) for table in archive.tables}
    for name, rule in targets.items():
        values = _values(archive, name, rule, own)
        merged = {old: new for new, olds in rule.get("merge", {}).items() for old in olds}
        classes = rule.get("classes")
        found = {case: merged.get(value, value) for case, value in values.items()}
        if classes is not None:
            found = {case: value if value in classes else "" for case, value in found.items()}
        if not any(found.values()):
            seen = listing(sorted({value for value in values.values() if value}))
            raise DataError(f"targets: no case has a value of {name}; the values found are {seen}.")
        archive.records = [
            record._replace(targets={**record.targets, name: found[record.case_id]}) for record in archive.records
        ]


def _values(archive: Archive, name: str, rule: Mapping[str, Any], own: Set[str]) -> dict[str, str]:
    """Return the value of each case as it is written; empty = unknown.

    Args:
        archive: The archive.
        name: The target.
        rule: Where it comes from.
        own: Tables that the layout has read already.
    """
    column, records = rule.get("column", name), archive.records
    known = {record.case_id: {**record.attributes, **record.targets} for record in records}
    path = archive.tree / rule.get("table", "")
    if "table" not in rule or str(path) in own:
        if not any(column in facts for facts in known.values()):
            have = listing(sorted({key for facts in known.values() for key in facts}))
            raise DataError(f"targets: no case has {short(column)}, which {name} is to be; known of cases are {have}.")
        return {case: facts.get(column, "").strip() for case, facts in known.items()}
    table = read_table(path)
    if column not in table.columns:
        raise DataError(f"targets: {path} has no column {short(column)}; it has {listing(table.columns)}.")
    key = next((key for key in KEYS if key in table.columns), table.columns[0])
    rows = rows_by(path, table[list(dict.fromkeys((key, column)))], key)
    by_case = join_ids([record.case_id for record in records], rows)
    by_patient = join_ids([record.patient_id for record in records], rows)
    check_labels(path, max(by_case, by_patient, key=lambda joined: len(joined.found)), "cases")
    archive.tables = [*dict.fromkeys((*archive.tables, str(path)))]
    owners = {record.case_id: by_case.found.get(record.case_id, by_patient.found.get(record.patient_id, ""))
              for record in records}  # fmt: skip
    return {case: rows.get(owner, {}).get(column, "").strip() for case, owner in owners.items()}
