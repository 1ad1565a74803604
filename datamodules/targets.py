"""What a person wants predicted: columns of a table, or facts of the archive, as classes, grades, findings or numbers.

Everything is text until the split is known: classes are the values of training patients, in natural order.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from common.errors import DataError
from common.pseudonyms import public_name
from common.runtime.reporting import print_line
from datamodules.files import listing, short
from datamodules.ids import IdRule, check_labels, join_ids, natural_order, rows_by
from datamodules.registry import Archive
from datamodules.tables import read_table

TargetKind = Literal["auto", "classes", "ordinal", "labels", "regression"]
Texts = dict[str, tuple[str, ...]]

#: Columns that may say whose a row is, in the order in which they are looked for.
KEYS = ("case_id", "image", "patient_id", "participant_id", "subject")
#: A column of numbers with more values than this is not taken for classes unless somebody says so.
_MOST_NUMBERS = 20
_REMEDY = "join it to another class by data.target.merge, or leave its cases out"
_YES_NO = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "": math.nan}


@dataclass(frozen=True)
class TargetColumns:
    """What is predicted.

    Args:
        name: A column, or several: a list, or names with commas between. Not needed where the archive has one target.
        file: Table with these columns and ``case_id`` (or ``image``) or ``patient_id`` (or ``subject``); None takes
            what the archive says of its members.
        kind: ``classes`` of one column; ``ordinal``, classes in an order; ``labels``, several columns of 0 and 1, empty
            = unknown; ``regression``, numbers; ``auto`` tells classes from labels.
        classes: The classes in order; None takes the values that training patients have, 2 before 10.
        merge: Class to the values that it joins.
        fewest: Training patients that a class needs.
        ids: ``exact``, or ``pad`` where the table has lost the leading zeros of numbers.
    """

    name: str | list[str] | None = None
    file: str | None = None
    kind: TargetKind = "auto"
    classes: list[str] | None = None
    merge: dict[str, list[str]] = field(default_factory=dict)
    fewest: int = 5
    ids: IdRule = "exact"

    @property
    def names(self) -> list[str]:
        """The columns."""
        given = self.name.split(",") if isinstance(self.name, str) else self.name or []
        return [name.strip() for name in given]


class Member(Protocol):
    """What may have a target."""

    @property
    def case_id(self) -> str:
        """Unique name."""
        ...

    @property
    def patient_id(self) -> str:
        """Splits are by this."""
        ...


class Targets(NamedTuple):
    """What is learned.

    Attributes:
        kind: What it is.
        names: Classes, or columns.
        values: For each case with a known target one number a name: 1 at its class, 0 or 1, or a measurement; NaN =
            unknown.
        problems: Why training would be refused.
    """

    kind: TargetKind
    names: tuple[str, ...]
    values: dict[str, tuple[float, ...]]
    problems: list[str]


def _joined(
    path: Path, names: Sequence[str], members: Sequence[Member], ids: IdRule = "exact", setting: str = ""
) -> dict[str, Mapping[str, str]]:
    """Return the row of each member that a table lists, by its case or by its patient."""
    table = read_table(path)
    if missing := [name for name in names if name not in table.columns]:
        raise DataError(f"{path} has no column {short(missing[0])}; it has {listing(table.columns)}.")
    key = next((key for key in KEYS if key in table.columns), table.columns[0])
    rows = rows_by(path, table[list(dict.fromkeys([key, *names]))].drop_duplicates(), key)
    cases = {member.case_id: member.case_id for member in members}
    patients = {member.case_id: member.patient_id for member in members}
    tried = [(join_ids(own.values(), rows, ids), own, of) for own, of in ((cases, "cases"), (patients, "patients"))]
    joined, own, of = max(tried, key=lambda one: sum(name in one[0].found for name in one[1].values()))
    check_labels(path, joined, of, setting)
    if joined.lacking or joined.spare:
        sides = [
            f"{words} {listing([public_name(name) for name in unmatched[:3]])}"
            for words, unmatched in (("not listed:", joined.lacking), ("not in the archive:", joined.spare))
            if unmatched
        ]
        print_line(f"note: unmatched ids of {path.name}; {'; '.join(sides)}")
    return {case: rows[joined.found[name]] for case, name in own.items() if name in joined.found}


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
    """Return the value of each case as it is written; empty = unknown."""
    column, records = rule.get("column", name), archive.records
    known: dict[str, Mapping[str, str]] = {r.case_id: {**r.attributes, **r.targets} for r in records}
    path = archive.tree / rule.get("table", "")
    if "table" in rule and str(path) not in own:
        known = _joined(path, [column], records)
        archive.tables = [*dict.fromkeys((*archive.tables, str(path)))]
    elif not any(column in facts for facts in known.values()):
        have = listing(sorted({key for facts in known.values() for key in facts}))
        raise DataError(f"targets: no case has {short(column)}, which {name} is to be; known of cases are {have}.")
    return {record.case_id: known.get(record.case_id, {}).get(column, "").strip() for record in records}


def heeding(config: TargetColumns, targets: Mapping[str, Mapping[str, Any]]) -> TargetColumns:
    """Return what is predicted, with what is said of it under ``targets`` of ``archive.yaml``: name, kind and classes.

    Args:
        config: What is predicted; what it says itself wins.
        targets: As of :func:`with_targets`; where there is one, it needs no naming.
    """
    names = config.names or [*targets]
    if config.file or len(names) != 1 or names[0] not in targets:
        return config
    rule = targets[names[0]]
    kind = "regression" if config.kind == "auto" and rule.get("kind") == "regression" else config.kind
    return replace(config, name=names, kind=kind, classes=config.classes or rule.get("classes"))


def read_texts(
    config: TargetColumns, members: Sequence[Member], facts: Mapping[str, Mapping[str, str]], usual: Iterable[str] = ()
) -> tuple[list[str], Texts]:
    """Return the columns, and what they say of each member, as text; empty text = unknown.

    Args:
        config: What is predicted.
        members: The members.
        facts: What the archive says of each member.
        usual: What archives of this kind are labelled with, where nothing is named.

    Raises:
        DataError: nothing says what is to be predicted, or no member has it; and as :func:`_joined`.
    """
    names = config.names or list(usual)
    present = sorted({name for own in facts.values() for name, value in own.items() if value})
    if not names or (len(names) > 1 and not config.names):
        choice = listing(present) if present else "the columns of a table, and LABELS= to that table"
        raise DataError(f"What is to be predicted? Set TARGET= (data.target.name) to one of {choice}.")
    rows = facts
    if config.file:
        path = Path(config.file).expanduser()
        if not path.is_file():
            raise DataError(f"There is no table {path} (LABELS=, data.target.file).")
        rows = _joined(path, names, members, config.ids, "data.target.ids")
    texts = {m.case_id: tuple(rows.get(m.case_id, {}).get(name, "").strip() for name in names) for m in members}
    for place, name in enumerate(names):
        if not any(row[place] for row in texts.values()):
            where = Path(config.file).name if config.file else f"the archive, which has {listing(present)}"
            raise DataError(f"No case has a value of {name!r} in {where}.")
    return names, texts


def kind_of(config: TargetColumns, names: Sequence[str], texts: Texts) -> TargetKind:
    """Return what a target is: as somebody says, else classes where it is one column, labels where it is several.

    Raises:
        DataError: a column of many numbers, where nobody says whether they are measurements.
    """
    if config.kind in ("classes", "ordinal") and len(names) > 1:
        raise DataError(f"data.target.kind: {config.kind} is about one column, TARGET= names {len(names)}.")
    if config.kind != "auto":
        return config.kind
    if len(names) > 1:
        return "labels"
    values = {row[0] for row in texts.values() if row[0]}
    if len(values) > _MOST_NUMBERS and all(_is_number(value) for value in values):
        raise DataError(f"{names[0]} holds {len(values)} different numbers: use TASK=regression, or set "
                        f"data.target.kind to classes.")  # fmt: skip
    return "classes"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def merged(config: TargetColumns, kind: TargetKind, texts: Texts) -> Texts:
    """Return texts with the values of merged classes replaced by their common name.

    Raises:
        DataError: a value is merged twice, or nobody has it.
    """
    if not config.merge:
        return texts
    if kind not in ("classes", "ordinal"):
        raise DataError(f"data.target.merge is about classes, the target is {kind}.")
    name_of: dict[str, str] = {}
    for name, values in config.merge.items():
        for value in map(str, values):
            if name_of.setdefault(value, name) != name:
                raise DataError(f"data.target.merge puts {value!r} into {name_of[value]} and into {name}.")
    held = {row[0] for row in texts.values()}
    if absent := [value for value in name_of if value not in held]:
        raise DataError(f"data.target.merge names {absent[0]!r}, which no case has; there are "
                        f"{listing(natural_order(held - {''}))}.")  # fmt: skip
    return {case: (name_of.get(row[0], row[0]),) for case, row in texts.items()}


def strata_of_texts(kind: TargetKind, texts: Texts, members: Sequence[Member]) -> dict[str, str] | None:
    """Return a stratum for each patient, the rarest value or finding that they have; None for measurements."""
    if kind == "regression":
        return None
    owned: dict[str, set[str]] = {}
    for member in members:
        row = texts[member.case_id]
        found = {str(i) for i, text in enumerate(row) if _YES_NO.get(text) == 1} if kind == "labels" else {*row} - {""}
        owned.setdefault(member.patient_id, set()).update(found)
    counts = Counter(value for values in owned.values() for value in values)
    return {p: min(values, key=lambda v: (counts[v], v)) if values else "none" for p, values in owned.items()}


def learn_targets(
    config: TargetColumns,
    kind: TargetKind,
    names: Sequence[str],
    texts: Texts,
    members: Sequence[Member],
    parts: Mapping[str, str],
) -> Targets:
    """Turn texts into numbers, once the split says who is trained on, and say what was made of them.

    Args:
        config: What is predicted.
        kind: What it is.
        names: The columns.
        texts: Text of each member.
        members: The members.
        parts: Split of each member.

    Raises:
        DataError: a cell is no number.
    """
    if kind in ("classes", "ordinal"):
        return _learn_classes(config, kind, names[0], texts, members, parts)
    read, problems_of = (_measurement, _judge_numbers) if kind == "regression" else (_finding, _judge_finding)
    values = {m.case_id: tuple(read(m.case_id, n, t) for n, t in zip(names, texts[m.case_id], strict=True))
              for m in members}  # fmt: skip
    known = {case: row for case, row in values.items() if not all(map(math.isnan, row))}
    problems = []
    for place, name in enumerate(names):
        held = {case: row[place] for case, row in known.items() if not math.isnan(row[place])}
        learned = [m for m in members if m.case_id in held and parts.get(m.case_id) == "train"]
        print_line(f"{name}: known of {len(held)} of {len(texts)} cases")
        problems += problems_of(config, name, held, learned)
    return Targets(kind, tuple(names), known, problems)


def _judge_numbers(config: TargetColumns, name: str, held: Mapping[str, float], learned: Sequence[Member]) -> list[str]:
    """Say what numbers training cases have, and return what speaks against learning them."""
    values = [held[member.case_id] for member in learned]
    if len(set(values)) < 2:
        return [f"{name} has {'one value' if values else 'no value'} in training"]
    print_line(f"{name}: {min(values):g} to {max(values):g} in {len(values)} training cases")
    return []


def _judge_finding(config: TargetColumns, name: str, held: Mapping[str, float], learned: Sequence[Member]) -> list[str]:
    """Say how many training cases have a finding, and return what speaks against learning it."""
    print_line(f"{name}: {sum(held[m.case_id] == 1 for m in learned)} of {len(learned)} training cases have it")
    patients = {value: {m.patient_id for m in learned if held[m.case_id] == value} for value in (1, 0)}
    few = [f"{len(people)} with {value}" for value, people in patients.items() if len(people) < config.fewest]
    if not few:
        return []
    return [f"{name} has training patients {' and '.join(few)}; {config.fewest} of each are needed: leave it out of "
            f"TARGET="]  # fmt: skip


def _measurement(case: str, name: str, text: str) -> float:
    if text and not _is_number(text):
        raise DataError(f"{name} of {public_name(case)} is {short(text)!r}, which is no number: correct it, or leave "
                        f"the cell empty.")  # fmt: skip
    return float(text) if text else math.nan


def _finding(case: str, name: str, text: str) -> float:
    if text not in _YES_NO:
        raise DataError(
            f"{name} of {public_name(case)} is {short(text)!r}; several columns are findings, 0 or 1 each, empty = "
            f"unknown. Give one column for classes, or set data.target.kind to regression."
        )
    return _YES_NO[text]


def _learn_classes(
    config: TargetColumns,
    kind: TargetKind,
    column: str,
    texts: Texts,
    members: Sequence[Member],
    parts: Mapping[str, str],
) -> Targets:
    """Turn the values of one column into classes; values that are none leave their cases out, by name."""
    patients: dict[str, dict[str, set[str]]] = {}
    for member in members:
        if (text := texts[member.case_id][0]) and (part := parts.get(member.case_id)):
            patients.setdefault(text, {}).setdefault(part, set()).add(member.patient_id)
    learned = [value for value, by_part in patients.items() if "train" in by_part]
    classes = tuple(config.classes or natural_order(learned))
    lacking = natural_order(set(patients) - {*classes})
    if lacking:
        count = sum(texts[member.case_id][0] in lacking for member in members)
        why = "not among data.target.classes" if config.classes else "that no training patient has"
        print_line(f"note: {count} cases have classes {why}: {listing(lacking)}; they are left out")
    number = [len(patients.get(name, {}).get("train", ())) for name in classes]
    shown = ", ".join(f"{name} {count}" for name, count in zip(classes, number, strict=True))
    integers = all(name.isdigit() for name in classes)
    advice = "; integers are taken for classes: TASK=regression takes them for numbers" if integers else ""
    ordered = ", in this order" if kind == "ordinal" else ""
    print_line(f"{column}: {len(classes)} classes{ordered} (training patients): {shown}{advice if not ordered else ''}")
    problems = _judge_classes(config, column, dict(zip(classes, number, strict=True)))
    untested = [name for name in classes if "test" not in patients.get(name, {})]
    if "test" in parts.values() and untested:
        problems.append(f"no test patient has the {column} {listing(untested)}: {_REMEDY}")
    place = {name: index for index, name in enumerate(classes)}
    values = {
        case: tuple(float(index == place[row[0]]) for index in range(len(classes)))
        for case, row in texts.items() if row[0] in place
    }  # fmt: skip
    return Targets(kind, classes, values, problems)


def _judge_classes(config: TargetColumns, column: str, number: Mapping[str, int]) -> list[str]:
    """Return what speaks against learning classes that so many training patients have."""
    problems = []
    if len(number) < 2:
        problems.append(f"{column} has one class in training, {listing(number)}: there is nothing to tell apart")
    few = [f"{name} ({count})" for name, count in number.items() if count < config.fewest]
    if few:
        problems.append(f"fewer than {config.fewest} training patients have the {column} {listing(few)}: {_REMEDY}")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Refuse to train.

    Raises:
        DataError: there is a problem.
    """
    if problems:
        raise DataError(f"{problems[0][:1].upper()}{problems[0][1:]}.")
