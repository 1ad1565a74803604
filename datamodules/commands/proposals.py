"""What ``medmim init`` proposes to say of an archive: the content of ``archive.yaml``, and the questions it leaves."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from common.errors import DataError
from common.modalities import CANONICAL, canonical_name, canonical_order
from datamodules.account import Account
from datamodules.archive_file import SCHEMA, VERSION
from datamodules.ids import join_ids, natural_order
from datamodules.images.table import COLUMNS
from datamodules.registry import Archive, Record
from datamodules.splits import read_split_file
from datamodules.subjects import needs_rule
from datamodules.tables import read_table
from datamodules.tree import IMAGE_KINDS, Tree, stem_of
from datamodules.volumes.modalities import respelled

#: Share of a column's values that must be files for it to be one of images, and most values of a column of classes.
_MOSTLY, _MAX_CLASSES = 0.9, 20
#: Targets that are written down, of the columns there are.
_MAX_TARGETS = 12
#: Bytes of a table of splits at most.
_MAX_SPLIT = 2**26
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
#: What columns of each role are called, where their content does not say it.
_HEADERS = {
    "subject": r"(subject|patient|participant|person|case)([ _-]?(id|no|nr|number|name|key))?|pid|eid|mrn",
    "session": r"(session|visit|study|exam|accession)([ _-]?(id|no|nr|number|date|uid))?",
    "view": r"view([ _-]?position)?|projection",
    "text": r"text|caption|report|findings|impression|(clinical[ _-]?)?notes?|description",
}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
#: What tells two visits of a patient apart, at the end of a name.
_VISIT = re.compile(r"(?P<subject>.*?[A-Za-z0-9])[_-](?P<session>\d{1,2}|[LR]|left|right|OD|OS)")


@dataclass
class Proposal:
    """What a file will say.

    Attributes:
        said: Values by key, as :data:`datamodules.archive_file.SCHEMA` takes them.
        remarks: What stands behind the value of a key.
        asides: Lines above a key that say nothing yet: questions, and values that a person may want.
        open: What a person has to answer before anything can be read; empty = nothing.
    """

    said: dict[str, Any]
    remarks: dict[str, str] = field(default_factory=dict)
    asides: dict[str, list[str]] = field(default_factory=dict)
    open: str = ""

    def aside(self, key: str, *lines: str) -> None:
        """Put lines above a key."""
        self.asides.setdefault(key, []).extend(lines)

    def ask(self, open: str, *lines: str) -> None:
        """Leave open whose a file is: a question, and the lines of which a person keeps one."""
        self.open = open
        self.aside("subject", *lines)

    def text(self) -> str:
        """Return the file's text."""
        lines = ["# How medmim init understood this archive. DATA= takes this file; the command line wins over it."]
        for key in SCHEMA:
            lines += [f"# {line}" for line in self.asides.get(key, [])]
            if key in self.said:
                lines += _lines(key, self.said[key], self.remarks)
        return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _lines(key: str, value: Any, remarks: Mapping[str, str]) -> list[str]:
    def remark(name: str) -> str:
        return f"  # {remarks[name]}" if name in remarks else ""

    if key == "series":
        return [f"series:{remark(key)}", *(f"- {flow(rule)}{remark(flow(rule))}" for rule in value)]
    if key == "targets":
        return [f"targets:{remark(key)}", *(f"  {flow(name)}: {flow(rule)}" for name, rule in value.items())]
    return [f"{key}: {flow(value)}{remark(key)}"]


def begun(tree: Tree, layout: str) -> Proposal:
    """Return the proposal that every archive begins with."""
    return Proposal({"version": VERSION, "root": str(tree.root.resolve()), "layout": layout})


# Volumes


def propose_patterns(tree: Tree, proposal: Proposal) -> None:
    """Propose patterns of file names, where names of one kind are not the same in all cases."""
    cases: dict[str, list[str]] = {}
    for file in tree.images:
        cases.setdefault(file.folder, []).append(file.stem)
    if len(cases) < 2:  # all in one folder: nothing says what a case is
        return
    parts = [Counter(part for stem in stems for part in set(re.split(r"[_.-]", stem))) for stems in cases.values()]
    counts = Counter(part for found in parts for part, count in found.items() if count == 1)
    wanted = [part for part, count in counts.items() if part and 2 * count > len(cases) and not part.isdigit()]
    wanted = [part for part in wanted if canonical_name(part) in CANONICAL] or wanted
    stems = [stem for found in cases.values() for stem in found]
    if found := {canonical_name(part): _pattern(part, stems) for part in wanted}:
        proposal.said["modalities"] = {name: found[name] for name in canonical_order(found)}
        proposal.remarks["modalities"] = "patterns of file names; the order is that of the channels"


def _pattern(part: str, stems: Sequence[str]) -> str:
    """Return what fits a part of a name, where it stands."""
    holding = [stem for stem in stems if part in re.split(r"[_.-]", stem)]
    if all(stem.endswith(part) for stem in holding):
        return f"*[_.-]{part}"
    return f"{part}[_.-]*" if all(stem.startswith(part) for stem in holding) else f"*[_.-]{part}[_.-]*"


def propose_modalities(archive: Archive, proposal: Proposal) -> dict[str, int]:
    """Write down what the archive calls each modality, in the order of channels; return in how many cases each is."""
    if wanted := proposal.said.get("modalities"):
        records = respelled(archive.records, wanted)
        return {name: sum(name in record.volumes for record in records) for name in wanted}
    spelled: dict[str, Counter[str]] = {}
    for record in archive.records:
        for name in record.volumes:
            spelled.setdefault(canonical_name(name), Counter())[name] += 1
    names = [canonical_name(name) for name in archive.facts.modalities]
    order = [name for name in names if name in spelled] or canonical_order(spelled)
    proposal.said["modalities"] = {name: min(spelled[name], key=lambda n: (-spelled[name][n], n)) for name in order}
    proposal.remarks["modalities"] = "canonical: as the archive says; the order is that of the channels"
    return {name: spelled[name].total() for name in order}


def _mask_name(name: str) -> str:
    match = re.search(r"(?:(?:label|desc)-[A-Za-z0-9+]+_)*(?:dseg|mask|probseg)$", stem_of(name))
    return match[0] if match else stem_of(name).rpartition("_")[2]


def propose_masks(archive: Archive, proposal: Proposal, values: Mapping[str, Iterable[int]]) -> Counter[str]:
    """Offer the masks that nobody has named, with the values found in them; return in how many cases each is."""
    found = Counter(_mask_name(name) for reason, names in archive.reasons.items() if reason.startswith("mask")
                    for name in names)  # fmt: skip
    used = Counter(name for record in archive.records for name in record.masks)
    for name, _ in (found + used).most_common(3) if "masks" in archive.layout.takes else []:
        region = re.sub(r"[^a-z0-9]+", "_", name.lower().removesuffix("-manual")).strip("_")
        rule = {region: {"name": name, "values": sorted(values.get(name.lower(), (1,)))}}
        proposal.aside("masks", f"masks: {flow(rule)}  # for segmentation: what its values mean is for you to say")
    return found


# Whose a file is


_EACH = "subject: file  # each image counts as a patient"
_WHOSE = "subject: whose is an image?"


def propose_subject(names: Sequence[str], proposal: Proposal, classes: bool = False) -> None:
    """Propose whose each image is, where a folder holds several; where names repeat, that is left as a question."""
    if needs_rule(names) is None:
        return
    fits = [(match["subject"], stem) for stem in map(stem_of, names) if (match := _VISIT.fullmatch(stem))]
    repeated = Counter(subject for subject, _ in fits)
    several = sum(count > 1 for count in repeated.values())
    folders = {name.rpartition("/")[0] for name in names}
    if len(repeated) > 1 and 2 * several >= len(repeated) and 2 * len(fits) >= len(names):
        rule = {"regex": r"(?P<subject>[^/]*?[A-Za-z0-9])[_-](?P<session>\d{1,2}|[A-Za-z]+)\.[^/]+$"}
        example = next(stem for subject, stem in fits if repeated[subject] > 1)
        proposal.ask(_WHOSE, f"Whose is an image? Splits are by patient. Names such as {example} repeat but for "
                     f"their end; keep one line:", f"subject: {flow(rule)}", _EACH)  # fmt: skip
    elif not classes and len(folders) > 2 and len(names) <= 50 * len(folders):
        proposal.ask(_WHOSE, "Whose is an image? Splits are by patient; keep one line:", "subject: folder", _EACH)
    else:
        proposal.said["subject"] = "file"
        proposal.remarks["subject"] = (
            "each image counts as a patient; where people have several, say folder or {regex: ...}"
        )


def looks_like_people(names: Sequence[str]) -> bool:
    """Whether the folders that images lie in are called as patients are: by numbers of two digits or more."""
    folders = {name.rpartition("/")[0].rpartition("/")[2] for name in names}
    return all(re.fullmatch(r"[A-Za-z]+[_-]?\d{2,}|0\d+|\d{3,}", folder) for folder in folders)


def ask_for_people(proposal: Proposal) -> None:
    """Ask whether folders are patients or classes."""
    proposal.said["layout"] = "images"
    proposal.aside("layout", "layout: class_folders  # in place of the next line, where the folders are classes")
    proposal.ask("subject: are the folders patients or classes?",
                 "Are the folders patients, or classes? Splits are by patient; keep one line:",
                 "subject: folder  # each folder is a patient", _EACH)  # fmt: skip


def propose_visits(archive: Archive, proposal: Proposal) -> None:
    """Ask whether cases whose names differ only in a last number are visits of one patient."""
    names = [record.case_id for record in archive.records if record.case_id == record.patient_id]
    found = Counter(match["subject"] for name in names if (match := re.fullmatch(r"(?P<subject>.+)[_-]\d{1,2}", name)))
    if found and found.most_common(1)[0][1] > 1 and len(found) > 1 and "subject" in archive.layout.takes:
        first = next(name for name, count in sorted(found.items()) if count > 1)
        rule = {"regex": r"^(?P<subject>.+)[_-](?P<session>\d{1,2})$"}
        proposal.aside("subject", f"Are {first}_1 and {first}_2 visits of one patient? Then splits must know it:",
                       f"subject: {flow(rule)}")  # fmt: skip


# Tables


def image_column(tree: Tree, table: pd.DataFrame) -> tuple[str, str] | None:
    """Return the column of a table that names images, and the folder they are relative to; None where none does."""
    places = {file.name for file in tree.images if file.kind != "volume"}
    places |= {name.removesuffix(Path(name).suffix) for name in places}
    for base in ("", *(f"{name}/" for name in tree.folders())):
        for column in table.columns:
            values = [value.removeprefix("./") for value in table[column] if value]
            if values and sum(f"{base}{value}" in places for value in values) >= _MOSTLY * len(values):
                return str(column), base.rstrip("/")
    return None


def table_of(tree: Tree, named: str | None) -> tuple[Path, pd.DataFrame, str, str] | None:
    """Return the table of an archive of images, its column of images, and their folder; None where there is none.

    Raises:
        DataError: the table that is named is not there, or names no images of the archive.
    """
    paths = [tree / file.name for file in tree.listed() if file.suffix in _TABLES and not file.hidden][:8]
    if named is not None:
        paths = [place.resolve() for place in (Path(named).expanduser(), tree / named) if place.is_file()][:1]
        if not paths:
            raise DataError(f"There is no table {named}, here or under {tree}.")
    for path in paths:
        try:
            table = read_table(path)
        except DataError:
            if named is not None:
                raise
            continue  # another table, which the account counts
        if found := image_column(tree, table):
            return path, table, *found
    if named is not None:
        raise DataError(f"No column of {named} names images under {tree}: 90 % of its values must be files there.")
    return None


def propose_columns(path: Path, table: pd.DataFrame, image: str, proposal: Proposal) -> None:
    """Propose the roles of a table's columns, by their headers and by what they hold."""
    columns, free = {"image": image}, [str(name) for name in table.columns if name != image]
    for role, pattern in _HEADERS.items():
        found = [name for name in free if re.fullmatch(pattern, name.strip(), re.IGNORECASE) and any(table[name])]
        if role == "text" and not found:
            found = [name for name in free if _is_text(table[name])]
        if found:
            columns[role] = found[0]
            free.remove(found[0])
    for name in free:
        values = {value.lower() for value in table[name] if value}
        if len(values) > 1 and values <= _SPLITS:
            columns["split"] = name
    proposal.said |= {"table": str(path), "columns": columns}
    shown = {role: name for role, name in columns.items() if role in COLUMNS}
    proposal.remarks["columns"] = f"of {', '.join(map(str, table.columns))}"[:200] if len(shown) < 3 else "role: column"
    if "subject" not in columns:
        propose_subject([value for value in table[image] if value], proposal)


def _is_text(values: pd.Series) -> bool:
    texts = [value for value in values if value]
    return bool(texts) and sum(value.count(" ") > 3 for value in texts) >= _MOSTLY * len(texts)


def propose_targets(records: Sequence[Record], proposal: Proposal) -> list[str]:
    """Propose what may be predicted: columns of few values are classes, those of many numbers are measured."""
    columns: dict[str, list[str]] = {}
    for record in records:
        for name, value in {**record.attributes, **record.targets}.items():
            columns.setdefault(name, []).append(value.strip())
    rules: dict[str, dict[str, Any]] = {}
    for column, values in columns.items():
        name = re.sub(r"\W+", "_", column).strip("_")
        rule = _target([value for value in values if value and value.isprintable()])
        if rule and name and len(rules) < _MAX_TARGETS:
            rules[name] = ({} if name == column else {"column": column}) | rule
    if rules:
        proposal.said["targets"] = rules
    return [f"{name} ({len(rule['classes'])} classes)" if "classes" in rule else f"{name} (numbers)"
            for name, rule in rules.items()]  # fmt: skip


def _target(values: Sequence[str]) -> dict[str, Any] | None:
    """Return what a column of values can be as a target; None where it can be none."""
    distinct = set(values)
    if 2 <= len(distinct) <= _MAX_CLASSES and len(distinct) < len(values):
        return {"classes": natural_order(distinct)}
    number = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)
    return {"kind": "regression"} if len(distinct) > _MAX_CLASSES and all(map(number.fullmatch, distinct)) else None


# Splits and what has no place


def propose_split(archive: Archive, proposal: Proposal) -> str:
    """Propose who is held out; return it in words."""
    own = Counter(record.split for record in archive.records if record.split)
    if own:
        words = ", ".join(f"{count} {name}" for name, count in sorted(own.items()))
        proposal.aside("split", f"the archive's own split is used: {words}")
        return f"the archive's split: {words}"
    file = _split_file(archive)
    proposal.said["split"] = {"fractions": [0.8, 0.1, 0.1], "seed": 0} | (file or {})
    if file:
        return f"split by {file['file']}" + (", which has lost leading zeros (ids: pad)" if "ids" in file else "")
    return "no split in the archive: seeded"


def _split_file(archive: Archive) -> dict[str, str] | None:
    """Return a table in the root that says who is in which split, and how its names join."""
    tables = [file for file in archive.tree.listed() if file.suffix in _TABLES and file.name not in archive.tables]
    for file in tables if not archive.layout.public else []:
        if file.size > _MAX_SPLIT:
            continue
        try:
            key, listed = read_split_file(archive.tree / file.name)
        except DataError:
            continue
        names = [record.case_id if key == "case_id" else record.patient_id for record in archive.records]
        exact, padded = join_ids(names, listed), join_ids(names, listed, "pad")
        if padded.found:
            pad = {"ids": "pad"} if len(padded.found) > len(exact.found) else {}
            return {"file": file.name} | pad | ({"unlisted": "ignore"} if padded.lacking else {})
    return None


def propose_ignore(account: Account, proposal: Proposal) -> str:
    """Propose to leave aside what has no place and shows nothing; return what has none, in words."""
    others = {file.name: f"*{file.suffix}" if file.suffix else file.name
              for file in account.unknown if file.kind not in IMAGE_KINDS}  # fmt: skip
    if others:
        proposal.said["ignore"] = sorted({*others.values()})
    if images := [file.name for file in account.unknown if file.name not in others]:
        proposal.aside("ignore", f"{len(images)} image files have no place, such as {', '.join(images[:3])}")
    counts = Counter(file.suffix or file.stem for file in account.unknown)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:4])
