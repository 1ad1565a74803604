"""Splits by patient: seeded, official or from a file; nested label fractions; folds. ``medmim split`` writes a file."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from common.errors import DataError
from common.randomness import numpy_generator


class Member(Protocol):
    """What a split is made of: a case, a study or a sample."""

    @property
    def case_id(self) -> str:
        """Unique name."""
        ...

    @property
    def patient_id(self) -> str:
        """Splits are by this."""
        ...

    @property
    def split(self) -> str | None:
        """As the archive says."""
        ...


MemberT = TypeVar("MemberT", bound=Member)
SPLITS = ("train", "val", "test")
_SYNONYMS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}


def permuted_patients(patients: Sequence[str], seed: int) -> list[str]:
    """Return the distinct patients in one seeded order, which does not depend on the order they came in."""
    names = np.array(sorted(set(patients)))
    return [str(name) for name in numpy_generator("split", seed).permutation(names)]


def _counts(total: int, fractions: Sequence[float]) -> list[int]:
    """Share out ``total`` by fractions; every wanted part gets one where there are enough, training first."""
    counts = [round(total * fraction) for fraction in fractions]
    for index in (1, 2):
        if fractions[index] > 0:
            counts[index] = max(counts[index], 1)
        counts[index] = min(counts[index], max(total - 1 - sum(counts[1:index]), 0))
    return [total - counts[1] - counts[2], counts[1], counts[2]]


def seeded_split(cases: Sequence[Member], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Assign every case to train, val or test by its patient.

    Args:
        cases: The cases.
        fractions: Shares of train, val and test; must sum to 1.
        seed: Seed of the order of patients.

    Raises:
        DataError: the fractions are no shares.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(
            f"split_fractions must be three shares that sum to 1 (train, val, test), got {list(fractions)}."
        )
    patients = permuted_patients([case.patient_id for case in cases], seed)
    edges = np.cumsum(_counts(len(patients), fractions))
    part = {name: SPLITS[int(np.searchsorted(edges, index, side="right"))] for index, name in enumerate(patients)}
    return {case.case_id: part[case.patient_id] for case in cases}


def read_split_file(path: Path) -> dict[str, str]:
    """Read a CSV with ``split`` and ``case_id`` or ``patient_id``: name to split.

    Raises:
        DataError: the file or a column is missing, a name is listed in two splits, or a split is unknown.
    """
    if not path.is_file():
        raise DataError(f"The split file {path} does not exist.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        key = next((name for name in ("case_id", "patient_id") if name in columns), None)
        if key is None or "split" not in columns:
            raise DataError(f"{path} needs the columns split and case_id or patient_id, it has {', '.join(columns)}.")
        parts: dict[str, str] = {}
        for row in reader:
            name, value = row[key].strip(), row["split"].strip().lower()
            value = _SYNONYMS.get(value, value)
            if value not in SPLITS:
                raise DataError(f"{path} puts {name} into the split {value!r}; it must be one of {', '.join(SPLITS)}.")
            if parts.setdefault(name, value) != value:
                raise DataError(f"{path} puts {name} into both {parts[name]} and {value}.")
    return parts


def check_patients(cases: Sequence[Member], parts: Mapping[str, str]) -> None:
    """Refuse a split that shares a patient.

    Raises:
        DataError: names the first such patient, its splits and its cases.
    """
    seen: dict[str, dict[str, str]] = {}
    for case in cases:
        if case.case_id in parts:
            seen.setdefault(case.patient_id, {}).setdefault(parts[case.case_id], case.case_id)
    leaks = {patient: found for patient, found in seen.items() if len(found) > 1}
    if leaks:
        patient, found = next(iter(leaks.items()))
        where = " and ".join(f"{part} ({case})" for part, case in found.items())
        raise DataError(f"{len(leaks)} patients are in several splits, first {patient}: {where}. Split by patient.")


def check_unique(cases: Sequence[Member]) -> None:
    """Refuse two cases of one name.

    Raises:
        DataError: names the first.
    """
    seen: set[str] = set()
    for case in cases:
        if case.case_id in seen:
            raise DataError(f"The case {case.case_id} is there twice; keep one copy under the root.")
        seen.add(case.case_id)


def assign_splits(
    cases: Sequence[Member], fractions: Sequence[float], seed: int, split_file: str | Path | None = None
) -> dict[str, str]:
    """Settle the split of every case: from a file, else the archive's own, else seeded.

    Cases that a file or the archive leaves out belong to no split and are not used.

    Raises:
        DataError: a patient in two splits, an empty training split, or a file that names none of the cases.
    """
    check_unique(cases)
    if split_file is not None:
        listed = read_split_file(Path(split_file))
        parts = {}
        for case in cases:
            part = listed.get(case.case_id, listed.get(case.patient_id))
            if part is not None:
                parts[case.case_id] = part
        if not parts:
            raise DataError(f"{split_file} names none of the {len(cases)} cases, such as {cases[0].case_id}.")
    elif any(case.split for case in cases):
        parts = {case.case_id: _SYNONYMS.get(case.split, case.split) for case in cases if case.split}
        unknown = sorted(set(parts.values()) - set(SPLITS))
        if unknown:
            raise DataError(f"The archive names the splits {', '.join(unknown)}; known are {', '.join(SPLITS)}.")
    else:
        parts = seeded_split(cases, fractions, seed)
    check_patients(cases, parts)
    if "train" not in parts.values():
        raise DataError("The training split is empty.")
    return parts


def nested_fraction(cases: Sequence[MemberT], fraction: float, seed: int) -> list[MemberT]:
    """Keep a share of the patients; a smaller share is always a subset of a larger one.

    Raises:
        DataError: the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise DataError(f"label_fraction must lie in (0, 1], got {fraction}.")
    patients = permuted_patients([case.patient_id for case in cases], seed)
    kept = set(patients[: math.ceil(fraction * len(patients) - 1e-9)])
    return [case for case in cases if case.patient_id in kept]


def write_split_file(path: Path, cases: Sequence[Member], parts: Mapping[str, str]) -> None:
    """Write a split as CSV: case_id, patient_id, split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "patient_id", "split"])
        for case in sorted(cases, key=lambda case: case.case_id):
            if case.case_id in parts:
                writer.writerow([case.case_id, case.patient_id, parts[case.case_id]])
