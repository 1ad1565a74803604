"""Splits by patient: seeded, official or from a file; nested label fractions; folds. ``medmim split`` writes a file.

Seeded splits follow the order of a hash of each patient's name, so that almost nobody changes split when an archive
grows: from 1,000 to 1,100 patients about 2 of 220 held-out ones have trained before; with a permutation it is 66.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from common.errors import DataError
from common.files import whole_file
from common.pseudonyms import public_name
from common.randomness import stable_hash
from common.runtime.reporting import print_line
from datamodules.files import listed_names, listing
from datamodules.ids import IdRule, check_subjects, join_ids, mending
from datamodules.members import PICTURES
from datamodules.tables import read_table


class Member(Protocol):
    """An element of a split: a case, a study or a sample."""

    @property
    def case_id(self) -> str:
        """Unique name."""
        ...

    @property
    def patient_id(self) -> str:
        """Splits are made by patient."""
        ...

    @property
    def split(self) -> str | None:
        """The archive's own split."""
        ...


MemberT = TypeVar("MemberT", bound=Member)
SPLITS = ("train", "val", "test")
_SYNONYMS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
#: Share of an archive that a split file may leave out without a setting that allows it.
_UNLISTED = 0.01


@dataclass(frozen=True)
class SplitFile:
    """A table of splits, and how its names join the archive's.

    Attributes:
        file: Table with ``split`` and ``case_id`` or ``patient_id``.
        ids: ``exact``, or ``pad`` if numbers have lost their leading zeros.
        unlisted: Whether to ``refuse`` more than 1 % of cases missing from the file, or to ``ignore`` them, which
            leaves them out.
    """

    file: str
    ids: IdRule = "exact"
    unlisted: Literal["refuse", "ignore"] = "refuse"

    @classmethod
    def of(cls, given: "str | Path | Mapping[str, str] | SplitFile") -> "SplitFile":
        """Parse the setting of a configuration: a path, or a mapping with these attributes.

        As an argument's type this class would make the command line read the file at the path.

        Raises:
            DataError: the mapping has no file, an unknown key, or an invalid value.
        """
        if isinstance(given, SplitFile):
            return given
        if not isinstance(given, Mapping):
            return cls(str(given))
        allowed = {"ids": ("exact", "pad"), "unlisted": ("refuse", "ignore")}
        wrong = [f"{key}: {value}" for key, value in given.items() if value not in allowed.get(key, (value,))]
        wrong += [key for key in given if key not in ("file", *allowed)]
        if wrong or "file" not in given:
            raise DataError(f"data.split.file takes file, ids (exact or pad) and unlisted (refuse or ignore); "
                            f"{'wrong is ' + wrong[0] if wrong else 'file is missing'}.")  # fmt: skip
        return cls(**given)  # type: ignore[arg-type]


def hash_order(names: Iterable[str], seed: int) -> list[str]:
    """Return distinct names in the order of xxh3(seed, name), independent of other names."""
    return sorted(set(names), key=lambda name: (stable_hash(seed, name), name))


def ordered_patients(patients: Iterable[str], seed: int, strata: Mapping[str, str] | None = None) -> list[str]:
    """Return the distinct patients in one seeded order, independent of their order of input.

    Args:
        patients: Names, which may repeat.
        seed: Seed of the order.
        strata: Stratum of each patient; every stretch of the order then has about the same share of each. Within a
            stratum it is the hash order, and a hash of the stratum's name decides where it begins.
    """
    order = hash_order(patients, seed)
    if strata is None:
        return order
    members: dict[str, list[str]] = {}
    for name in order:
        members.setdefault(strata[name], []).append(name)
    place: dict[str, float] = {}
    for stratum, names in members.items():
        offset = stable_hash(seed, "stratum", stratum) / 2**63
        place |= {name: (index + offset) / len(names) for index, name in enumerate(names)}
    return sorted(order, key=place.__getitem__)


def _counts(total: int, fractions: Sequence[float]) -> list[int]:
    """Divide ``total`` by fractions; every nonzero part gets at least one if there are enough, training first."""
    counts = [round(total * fraction) for fraction in fractions]
    for index in (1, 2):
        if fractions[index] > 0:
            counts[index] = max(counts[index], 1)
        counts[index] = min(counts[index], max(total - 1 - sum(counts[1:index]), 0))
    return [total - counts[1] - counts[2], counts[1], counts[2]]


def seeded_split(
    cases: Sequence[Member], fractions: Sequence[float], seed: int, strata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Assign every case to train, val or test by its patient: the first of the order are test, the next val.

    Args:
        cases: The cases.
        fractions: Shares of train, val and test; must sum to 1.
        seed: Seed of the order of patients.
        strata: Stratum of each patient, such as a class; every part gets its share of each.

    Raises:
        DataError: the fractions are not shares that sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(
            f"split_fractions must be three shares that sum to 1 (train, val, test), got {list(fractions)}."
        )
    patients = ordered_patients([case.patient_id for case in cases], seed, strata)
    train, val, test = _counts(len(patients), fractions)
    parts = ["test"] * test + ["val"] * val + ["train"] * train
    part = dict(zip(patients, parts, strict=True))
    return {case.case_id: part[case.patient_id] for case in cases}


def read_split_file(path: Path) -> tuple[str, dict[str, str]]:
    """Read a table with ``split`` and ``case_id`` or ``patient_id``.

    Returns:
        The column of names, and name to split.

    Raises:
        DataError: the file or a column is missing, a name is listed in two splits, or a split is unknown.
    """
    if not path.is_file():
        raise DataError(f"The split file {path} does not exist.")
    table = read_table(path)
    key = next((name for name in ("case_id", "patient_id") if name in table.columns), None)
    if key is None or "split" not in table.columns:
        raise DataError(f"{path} needs the columns split and case_id or patient_id, it has {listing(table.columns)}.")
    check_subjects(path, table[key])
    parts: dict[str, str] = {}
    for name, word in zip(table[key], table["split"].str.lower(), strict=True):
        value = _SYNONYMS.get(word, word)
        if value not in SPLITS:
            raise DataError(
                f"{path} puts {public_name(name)} into the split {value!r}; it must be one of {', '.join(SPLITS)}."
            )
        if parts.setdefault(name, value) != value:
            raise DataError(f"{path} puts {public_name(name)} into both {parts[name]} and {value}.")
    return key, parts


def _split_by_file(cases: Sequence[Member], given: SplitFile) -> dict[str, str]:
    """Return the split of every case listed in a file, and print how the two joined.

    Raises:
        DataError: the file names none of the cases, puts a patient into several splits, or lacks more than 1 % of them.
    """
    path = Path(given.file)
    key, listed = read_split_file(path)
    name_of = {case.case_id: case.case_id if key == "case_id" else case.patient_id for case in cases}
    item_name = "cases" if key == "case_id" else "patients"
    joined = join_ids(name_of.values(), listed, given.ids)
    total = len(joined.found) + len(joined.lacking)
    unlisted = f"{len(joined.lacking)} of {total} {item_name} are not in {path.name}"
    if not joined.found:
        raise DataError(f"{path} names none of the {total} {item_name}, such as {public_name(joined.lacking[0])}"
                        f"{mending(joined, 'split.ids') or ': correct the file'}.")  # fmt: skip
    parts = {case: listed[joined.found[name]] for case, name in name_of.items() if name in joined.found}
    check_patients(cases, parts)
    if given.unlisted == "refuse" and len(joined.lacking) > _UNLISTED * total:
        more = f", such as {public_name(joined.lacking[0])}: add them, or set split.unlisted: ignore"
        raise DataError(unlisted + (mending(joined, "split.ids") or more))
    print_line(joined.counts(path.name, item_name))
    return parts


def check_patients(cases: Sequence[Member], parts: Mapping[str, str]) -> None:
    """Refuse a split that shares a patient.

    Raises:
        DataError: names the first such patient with splits and cases.
    """
    seen: dict[str, dict[str, str]] = {}
    for case in cases:
        if case.case_id in parts:
            seen.setdefault(case.patient_id, {}).setdefault(parts[case.case_id], case.case_id)
    leaks = {patient: found for patient, found in seen.items() if len(found) > 1}
    if leaks:
        patient, found = next(iter(leaks.items()))
        where = " and ".join(f"{part} ({public_name(case)})" for part, case in found.items())
        raise DataError(f"{len(leaks)} patients are in several splits, first {public_name(patient)}: {where}. Split by "
                        f"patient.")  # fmt: skip


def check_unique(cases: Sequence[Member]) -> None:
    """Refuse two cases with the same name.

    Raises:
        DataError: names the first.
    """
    seen: set[str] = set()
    for case in cases:
        if case.case_id in seen:
            raise DataError(f"The case {public_name(case.case_id)} is there twice; keep one copy under the root.")
        seen.add(case.case_id)


def assign_splits(
    cases: Sequence[Member],
    fractions: Sequence[float],
    seed: int,
    split_file: str | Path | Mapping[str, str] | SplitFile | None = None,
    strata: Mapping[str, str] | None = None,
    cut_validation: bool = False,
) -> dict[str, str]:
    """Resolve the split of every case: from a file, else the archive's own, else seeded.

    Cases that a file or the archive leaves out belong to no split and are not used. Names join by exact text.

    Args:
        cases: The cases.
        fractions: Shares of train, val and test for a seeded split.
        seed: Seed of the order of patients.
        split_file: Table with ``split`` and ``case_id`` or ``patient_id``, or that with rules for joining names.
        strata: Stratum of each patient, for the seeded split.
        cut_validation: Whether to take validation patients from training if the archive defines none.

    Raises:
        DataError: a patient in two splits, an empty training split, or a file that lacks more than 1 % of the cases.
    """
    check_unique(cases)
    if split_file is not None:
        parts = _split_by_file(cases, SplitFile.of(split_file))
    elif any(case.split for case in cases):
        parts = {case.case_id: _SYNONYMS.get(case.split, case.split) for case in cases if case.split}
        unknown = sorted(set(parts.values()) - set(SPLITS))
        if unknown:
            raise DataError(f"The archive names the splits {', '.join(unknown)}; known are {', '.join(SPLITS)}.")
        check_patients(cases, parts)
        if cut_validation and "val" not in parts.values():
            train = [case for case in cases if parts.get(case.case_id) == "train"]
            share = fractions[1] / (fractions[0] + fractions[1])
            parts |= seeded_split(train, (1 - share, share, 0.0), seed, strata)
    else:
        parts = seeded_split(cases, fractions, seed, strata)
    check_patients(cases, parts)
    if "train" not in parts.values():
        raise DataError("The training split is empty.")
    return parts


def nested_fraction(
    cases: Sequence[MemberT], fraction: float, seed: int, strata: Mapping[str, str] | None = None
) -> list[MemberT]:
    """Keep a share of the patients, equally from each stratum; a smaller share is always a subset of a larger one.

    Raises:
        DataError: the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise DataError(f"label_fraction must lie in (0, 1], got {fraction}.")
    patients = ordered_patients([case.patient_id for case in cases], seed, strata)
    kept = set(patients[: math.ceil(fraction * len(patients) - 1e-9)])
    return [case for case in cases if case.patient_id in kept]


def joined_groups(memberships: Sequence[Sequence[str]]) -> list[int]:
    """Number the groups of items that share a name, directly or indirectly.

    Args:
        memberships: The names of each item; empty names join nothing.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for names in memberships:
        roots = [find(name) for name in names if name]
        for root in roots[1:]:
            leader[root] = roots[0]
    numbers: dict[str, int] = {}
    return [numbers.setdefault(find(next(name for name in names if name)), len(numbers)) for names in memberships]


def patients_of_files(files: Sequence[str], patients: Sequence[str]) -> list[str]:
    """Return the patient of each row of a table: patients who share a file are one, under the first of their names.

    Args:
        files: File of each row.
        patients: Patient of each row; an empty text means unknown, so that the file stands for them.
    """
    memberships = [
        (f"file {file}", f"patient {patient}" if patient else "") for file, patient in zip(files, patients, strict=True)
    ]
    groups = joined_groups(memberships)
    named: dict[int, str] = {}
    for group, patient in zip(groups, patients, strict=True):
        named[group] = named.get(group) or patient
    return [named[group] or file for group, file in zip(groups, files, strict=True)]


def fold_of_each(strata: Sequence[str], groups: Sequence[int], num_folds: int, seed: int) -> list[int]:
    """Assign items to folds: no group in two of them, strata spread evenly.

    Args:
        strata: Stratum of each item, such as its class.
        groups: Group of each item.
        num_folds: Number of folds.
        seed: Seed of the shuffle.

    Raises:
        DataError: a stratum has fewer groups than there are folds.
    """
    for stratum in sorted(set(strata)):
        found = len({group for group, other in zip(groups, strata, strict=True) if other == stratum})
        if found < num_folds:
            raise DataError(f"{num_folds} folds need as many patients of each class; {stratum} has {found}.")
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    folds = np.zeros(len(strata), dtype=int)
    for index, (_, held_out) in enumerate(splitter.split(np.zeros(len(strata)), list(strata), groups=list(groups))):
        folds[held_out] = index
    return folds.tolist()


def listed_split(cases: Sequence[Member], lists: Sequence[Path]) -> dict[str, list[str]]:
    """Read the lists for train, val and test; lines may continue after the name.

    A case may be named by its whole name or, if no other case shares it, by the last parts of its path, with or
    without an image's suffix.

    Returns:
        Case to the splits whose lists name it.

    Raises:
        DataError: a list does not exist, or names no case of the archive.
    """
    names = Counter(end for case in cases for end in _ends(case.case_id))
    known = {end: case.case_id for case in cases for end in _ends(case.case_id) if names[end] == 1}
    found: dict[str, list[str]] = {}
    for split, path in zip(SPLITS, lists, strict=True):
        if not path.is_file():
            raise DataError(f"The list {path} does not exist.")
        words = [line.split()[0] for line in listed_names([path])]
        named = [known[end] for word in words if (end := next(filter(known.__contains__, _ends(word)), None))]
        if not named:
            example = public_name(cases[0].case_id)
            raise DataError(f"{path} names none of the {len(cases)} cases, such as {example}.")
        for name in dict.fromkeys(named):
            found.setdefault(name, []).append(split)
    return found


def _ends(name: str) -> list[str]:
    """Return the names that may refer to a path: its last parts, longest first, with and without image suffix."""
    parts = Path(name).parts
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    # A number after an identifier's last dot is not a suffix, so only image suffixes count.
    bare = [end.rsplit(".", 1)[0] if Path(end).suffix.lower() in PICTURES else end for end in ends]
    return list(dict.fromkeys(end for pair in zip(ends, bare, strict=True) for end in pair))


def repaired_split(cases: Sequence[Member], listed: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Keep every patient in one split: test before val before train."""
    rank: dict[str, int] = {}
    for case in cases:
        for split in listed.get(case.case_id, ()):
            rank[case.patient_id] = max(rank.get(case.patient_id, 0), SPLITS.index(split))
    kept = {case.case_id: SPLITS[rank[case.patient_id]] for case in cases if case.case_id in listed}
    return {name: split for name, split in kept.items() if split in listed[name]}


def relatives_together(
    cases: Sequence[Member], parts: Mapping[str, str], pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Put relatives, and their relatives, into one split: test before val before train.

    Args:
        cases: The cases.
        parts: Split of each case; no patient is divided.
        pairs: Pairs of related patients.
    """
    used = [case for case in cases if case.case_id in parts]
    patients = sorted({case.patient_id for case in used})
    known = set(patients)
    related = [[one, other] for one, other in pairs if one in known and other in known]
    family = dict(zip(patients, joined_groups([*([name] for name in patients), *related]), strict=False))
    rank: dict[int, int] = {}
    for case in used:
        number = family[case.patient_id]
        rank[number] = max(rank.get(number, 0), SPLITS.index(parts[case.case_id]))
    return {case.case_id: SPLITS[rank[family[case.patient_id]]] for case in used}


def write_split_file(path: Path, cases: Sequence[Member], parts: Mapping[str, str], by_patient: bool = False) -> None:
    """Write a split as CSV: case_id, patient_id, split; or patient_id, split."""
    rows = [[case.case_id, case.patient_id, parts[case.case_id]] for case in cases if case.case_id in parts]
    if by_patient:
        rows = [list(row) for row in {(patient, split) for _, patient, split in rows}]
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "patient_id", "split"][int(by_patient) :])
        writer.writerows(sorted(rows))
