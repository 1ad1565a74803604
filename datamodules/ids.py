"""Joining the ids of tables and archives by exact text; what a correction would join is named, not corrected."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd

from common.errors import DataError
from common.runtime.reporting import print_line
from datamodules.files import listing, short

#: Placeholders that programs write for unknown values.
_UNKNOWN = ("nan", "none", "null", "na", "n/a")

IdRule = Literal["exact", "pad"]


def check_subjects(path: Path, subjects: Iterable[str]) -> None:
    """Refuse a table in which several rows have a placeholder for "unknown" as subject.

    Raises:
        DataError: the message gives the number of rows.
    """
    counts = Counter(name for name in subjects if name.strip().lower() in _UNKNOWN)
    if counts.total() > 1:
        name, _ = counts.most_common(1)[0]
        raise DataError(
            f'{counts.total()} rows have the subject "{name}": leave the cell empty or correct it, in {path}.'
        )


def rows_by(path: Path, table: pd.DataFrame, key: str) -> dict[str, dict[str, str]]:
    """Return the rows of a table by the text in one column; rows without a key are left out.

    Raises:
        DataError: the column is missing, a key occurs twice with different values, or means "unknown".
    """
    if key not in table.columns:
        raise DataError(f"{path} has no column {short(key)!r}; it has {listing(table.columns)}.")
    check_subjects(path, table[key])
    found: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        name = row[key]
        if name and found.setdefault(name, row) != row:
            raise DataError(f"{path} lists {short(name)} twice, with different values; keep one row of it.")
    return found


class Joined(NamedTuple):
    """The result of joining an archive's ids with a table's.

    Attributes:
        found: Id in the archive to id in the table.
        lacking: Ids only in the archive.
        spare: Ids only in the table.
    """

    found: dict[str, str]
    lacking: list[str]
    spare: list[str]

    def counts(self, table: str, item_name: str) -> str:
        """Describe what joined and what did not, on both sides."""
        return (f"{table}: {len(self.found)} of {len(self.found) + len(self.lacking)} {item_name} are listed; of the "
                f"ids it lists, {len(self.spare)} are not in the archive")  # fmt: skip


def without_zeros(name: str) -> str:
    """Return an id without the leading zeros that spreadsheets drop."""
    return name.lstrip("0") or "0" if name.isascii() and name.isdigit() else name


#: Changes that other programs make to ids: a description, and the key that both sides then share.
_MENDINGS: Mapping[str, Callable[[str], str]] = {
    "with leading zeros": without_zeros,
    "in the other case": str.casefold,
    "without .0": lambda name: name.removesuffix(".0"),
    "without sub-": lambda name: name.removeprefix("sub-"),
    "without blanks": lambda name: "".join(name.split()),
}


def join_ids(names: Iterable[str], listed: Iterable[str], ids: IdRule = "exact") -> Joined:
    """Join ids by exact text, and with ``pad`` also numbers that lost their leading zeros.

    Args:
        names: Ids of the archive.
        listed: Ids of a table.
        ids: ``exact`` or ``pad``.

    Raises:
        DataError: with ``pad`` an id could match two others.
    """
    wanted, given = dict.fromkeys(names), dict.fromkeys(listed)
    found = {name: name for name in wanted if name in given}
    if ids == "pad":
        found |= _padded([name for name in wanted if name not in found], [name for name in given if name not in found])
    used = set(found.values())
    lacking = [name for name in wanted if name not in found]
    return Joined({name: found[name] for name in wanted if name in found}, lacking,
                  [name for name in given if name not in used])  # fmt: skip


def _padded(lacking: Sequence[str], spare: Sequence[str]) -> dict[str, str]:
    """Join ids that differ only in leading zeros.

    Raises:
        DataError: an id could match two others.
    """
    place: dict[str, list[str]] = {}
    for name in spare:
        place.setdefault(without_zeros(name), []).append(name)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in lacking:
        fitting = place.get(without_zeros(name), [])
        rival = taken.get(fitting[0]) if fitting else None
        if len(fitting) > 1 or rival is not None:
            pair = fitting[:2] if len(fitting) > 1 else [rival, name]
            raise DataError(f"Without leading zeros {pair[0]} and {pair[1]} are one id: set ids to exact, and correct "
                            f"the table.")  # fmt: skip
        if fitting:
            found[name] = fitting[0]
            taken[fitting[0]] = name
    return found


def mending(joined: Joined, setting: str = "") -> str:
    """Describe which corrections would join more ids; empty if none would.

    Args:
        joined: The result of the join.
        setting: The setting that accepts ids without leading zeros, if there is one, such as ``split.ids``.
    """
    best: tuple[int, str, str] = (0, "", "")
    for words, plain in _MENDINGS.items():
        spare = {plain(name): name for name in joined.spare}
        pairs = [(spare[plain(name)], name) for name in joined.lacking if plain(name) in spare]
        if len(pairs) > best[0]:
            best = len(pairs), words, f"{short(pairs[0][0], 30)} for {short(pairs[0][1], 30)}"
    number, words, example = best
    if not number:
        return ""
    remedy = f"set {setting}: pad, or correct the file" if setting and "zeros" in words else "correct the file"
    return f"; {number} would be {words} ({example}): {remedy}"


def check_labels(path: Path, joined: Joined, item_name: str, setting: str = "") -> None:
    """Print how a table of labels joined, and refuse one with labels for less than half of an archive.

    Raises:
        DataError: the message gives the number, and what would join after a correction.
    """
    total = len(joined.found) + len(joined.lacking)
    if 2 * len(joined.found) < total:
        listed = f"; it lists {short(joined.spare[0])}" if joined.spare else ""
        more = mending(joined, setting) or f"{listed}: correct the file"
        raise DataError(f"{len(joined.lacking)} of {total} {item_name} are not in {path.name}, such as "
                        f"{short(joined.lacking[0])}{more}.")  # fmt: skip
    print_line(joined.counts(path.name, item_name))
