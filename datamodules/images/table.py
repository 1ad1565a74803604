"""Any images listed in a table: CSV, TSV, JSON lines or Parquet, one row per image, or a text without image.

The roles of its columns are image (path under the root; empty for a text without image), subject, and optionally text,
session, split, view, mask, folder (a prefix of the image's name) and ``target:NAME``; other columns become attributes.
``ROOT/manifest.{csv,jsonl,parquet}`` is found by itself; any other table is named, and so are its columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.errors import DataError
from common.runtime.reporting import contents, print_line
from datamodules.account import ROWLESS
from datamodules.files import first_line
from datamodules.ids import check_subjects
from datamodules.listed_files import path_under
from datamodules.members import PICTURES
from datamodules.registry import NO_SETTINGS, Evidence, FileRef, Layout, Listing, Record, Settings, shortened
from datamodules.splits import patients_of_files
from datamodules.subjects import owner_of
from datamodules.tables import read_table
from datamodules.tree import Tree, suffix_of

#: Default column of each role.
COLUMNS = {name: name for name in ("image", "text", "subject", "session", "split", "view", "mask", "folder")}
TARGET = "target:"
_NEEDED = ("image", "subject")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
#: Number of tables in the root that are opened to recognise it.
_LOOKED_AT = 8
#: Tolerated share of rows that name missing files.
_MAX_MISSING = 0.05


def table_path(tree: Tree, settings: Settings) -> Path | None:
    """Return the table of an archive: the named one, or ``manifest``; None if there is neither.

    Raises:
        DataError: the named table does not exist.
    """
    if settings.table is not None:
        named = Path(settings.table).expanduser()
        path = named if named.is_absolute() else tree / settings.table
        if not path.is_file():
            raise DataError(f"There is no table {settings.table} (data.table) under {tree}; it holds "
                            f"{contents(tree.root)}.")  # fmt: skip
        return path
    return next((tree / f"manifest{suffix}" for suffix in _SUFFIXES if tree.is_file(f"manifest{suffix}")), None)


def roles_of(path: Path, columns: Iterable[str], named: Mapping[str, str], needed: Iterable[str]) -> dict[str, str]:
    """Return the column of each role that a table has.

    Raises:
        DataError: unknown role, or missing column.
    """
    unknown = sorted(role for role in named if role not in COLUMNS and not role.startswith(TARGET))
    if unknown:
        raise DataError(f"data.columns names the role {unknown[0]}; known are {', '.join(sorted(COLUMNS))} and "
                        f"{TARGET}NAME.")  # fmt: skip
    wanted, present = {**COLUMNS, **named}, set(columns)
    missing = [wanted[role] for role in dict.fromkeys((*needed, *named)) if wanted[role] not in present]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {shortened(', '.join(columns), 80)}. Name the columns "
            f"with data.columns, such as {{image: filename, text: notes, subject: patient}}."
        )
    return {role: name for role, name in wanted.items() if name in present}


def records_of_table(
    tree: Tree, path: Path, columns: Mapping[str, str], subject: str | Mapping[str, str] | None = None
) -> list[Record]:
    """Make one record per listed image, and one per row that has only text.

    A file with several rows becomes one record, with the first text, view and split that are not empty; subjects who
    share a file count as one patient, which is noted. A row without image is named by its position: ``row 7``.

    Args:
        tree: Base of the images' paths.
        path: The table.
        columns: Column of each role whose name differs.
        subject: Rule for the owner of an image, if no column gives it.

    Raises:
        DataError: missing column, a path outside the root, or a file in two splits.
    """
    table = read_table(path)
    roles = roles_of(path, table.columns, columns, _NEEDED if subject is None else ("image",))
    rows = table.to_dict("records")
    facts = [{role: row[name] for role, name in roles.items()} for row in rows]
    taken = set(roles.values())
    others = [{name: value for name, value in row.items() if name not in taken} for row in rows]
    names = [_image_name(tree, path, fact) or f"row {number}" for number, fact in enumerate(facts, 1)]
    if subject is not None and "subject" not in columns:
        for name, fact in zip(names, facts, strict=True):
            fact["subject"] = owner_of(name, subject).subject if fact["image"] else ""
    subjects = [fact["subject"] for fact in facts]
    check_subjects(path, subjects)
    _print_shared(path, names, subjects)
    found: dict[str, Record] = {}
    for name, patient, fact, rest in zip(names, patients_of_files(names, subjects), facts, others, strict=True):
        if fact["image"] or fact.get("text"):
            found[name] = _joined(path, found.get(name), _record(tree, name, patient, fact, rest))
    return list(found.values())


def _record(tree: Tree, name: str, patient: str, fact: Mapping[str, str], rest: Mapping[str, str]) -> Record:
    targets = {role.removeprefix(TARGET): value for role, value in fact.items() if role.startswith(TARGET)}
    mask = fact.get("mask", "")
    return Record(
        name,
        patient,
        fact.get("session", ""),
        images=((tree / name, fact.get("view", "")),) if fact["image"] else (),
        text=fact.get("text") or None,
        masks={"mask": FileRef(tree / mask)} if mask and tree.is_file(mask) else {},
        targets=targets,
        attributes=rest,
        split=fact.get("split", "").lower() or None,
    )


def _joined(path: Path, known: Record | None, row: Record) -> Record:
    """Join a row with earlier rows of the same file.

    Raises:
        DataError: the rows give two splits.
    """
    if known is None:
        return row
    if row.split and known.split and row.split != known.split:
        raise DataError(
            f"{path} puts {row.case_id} into both {known.split} and {row.split}; keep its rows in one split."
        )
    images = known.images if not known.images or known.images[0][1] else row.images
    return known._replace(images=images, text=known.text or row.text, split=known.split or row.split)


def _image_name(tree: Tree, path: Path, fact: Mapping[str, str]) -> str:
    """Return an image's path under the root, completing a missing suffix if one file fits; empty without image.

    Raises:
        DataError: the path leaves the root.
    """
    if not fact["image"]:
        return ""
    name = "/".join(part for part in (fact.get("folder", ""), fact["image"]) if part)
    path_under(tree.root, name, path)
    name = name.removeprefix("./")
    if suffix_of(name) not in PICTURES and not tree.is_file(name):
        fits = [f"{name}{suffix}" for suffix in PICTURES if tree.is_file(f"{name}{suffix}")]
        return fits[0] if len(fits) == 1 else name
    return name


def _print_shared(path: Path, names: Sequence[str], subjects: Sequence[str]) -> None:
    """Note how many files are listed under several subjects, and the first."""
    owners: dict[str, list[str]] = {}
    for name, subject in zip(names, subjects, strict=True):
        found = owners.setdefault(name, [])
        if subject and subject not in found:
            found.append(subject)
    shared = [(name, found) for name, found in owners.items() if len(found) > 1]
    if shared:
        name, found = shared[0]
        print_line(f"note: {path.name} lists {len(shared)} files under several subjects, such as {name} under "
            f"{' and '.join(found)}; subjects who share a file count as one patient")  # fmt: skip


def _there(tree: Tree, path: Path, records: list[Record], missing: str | None) -> list[Record]:
    """Check for missing files; a few become faults on reading, many are refused.

    Raises:
        DataError: more than one in twenty is missing, unless ``missing`` is ``ignore``.
    """
    lost = {record.case_id for record in records if record.images and not tree.is_file(record.images[0][0])}
    if missing == "ignore":
        if lost:
            print_line(f"note: {len(lost)} of {len(records)} rows of {path.name} name missing files; left out")
        return [record for record in records if record.case_id not in lost]
    if len(lost) > max(_MAX_MISSING * len(records), 1):
        raise DataError(
            f"{len(lost)} of {len(records)} rows of {shortened(str(path), 90)} name images that are not there, such as "
            f"{shortened(min(lost), 50)}: correct the column, or set missing: ignore."
        )
    return records


def find_table(tree: Tree, settings: Settings = NO_SETTINGS) -> Listing:
    """List the images and texts of a table; empty without a table.

    Raises:
        DataError: the named table does not exist, or more than one row in twenty names a missing file; and as
            :func:`records_of_table`.
    """
    path = table_path(tree, settings) or _plain_table(tree)
    if path is None:
        return Listing([])
    records = _there(tree, path, records_of_table(tree, path, settings.columns, settings.subject), settings.missing)
    listed = {tree.name_of(file) for record in records for _, file in record.files()}
    reasons = {ROWLESS: [file.name for file in tree.images if file.name not in listed]}
    return Listing(records, reasons=reasons, tables=[str(path)])


def _header(path: Path) -> set[str]:
    """Return the names of a table's columns, as far as its first line gives them."""
    if path.suffix.lower() == ".parquet":
        return set()
    line = first_line(path)
    mark = max(",\t;", key=line.count)
    return {name.strip(' "') for name in line.split(mark)}


def _plain_table(tree: Tree) -> Path | None:
    """Return a table in the root with the columns image and subject."""
    tables = [file for file in tree.listed() if file.suffix in _SUFFIXES and not file.hidden][:_LOOKED_AT]
    return next((tree / file.name for file in tables if set(_NEEDED) <= _header(tree / file.name)), None)


def _recognise_manifest(tree: Tree) -> Evidence:
    path = table_path(tree, NO_SETTINGS)
    return Evidence(3, path.name) if path else Evidence(0, missing="manifest.csv")


def _recognise_table(tree: Tree) -> Evidence:
    if _recognise_manifest(tree).score:
        return Evidence(0, missing="a table that is not the manifest")
    path = _plain_table(tree)
    near = 0.4 if any(file.kind == "table" for file in tree.listed()) and tree.images else 0.0
    missing = "a table with the columns image and subject"
    return Evidence(3, f"{path.name} with image and subject") if path else Evidence(0, missing=missing, near=near)


_TAKES = ("table", "columns", "subject", "missing")
MANIFEST = Layout(
    name="manifest",
    tree="ROOT/manifest.{csv,jsonl,parquet}, or data.table, with image, text, subject [, split, view]",
    find=find_table,
    evidence=_recognise_manifest,
    takes=_TAKES,
    public=False,
    prefer=-1,
)
TABLE = Layout(
    name="table",
    tree="ROOT/TABLE.{csv,tsv,jsonl,parquet} with image, subject [, text, session, split, view, mask, target:NAME]",
    find=find_table,
    evidence=_recognise_table,
    takes=_TAKES,
    public=False,
    prefer=-2,
)
