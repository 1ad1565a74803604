"""Broken members of an archive: one row each, counted, never hidden, fatal only when there are too many."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.errors import TooManyFaultsError
from common.files import whole_file
from common.pseudonyms import pseudonym

#: The part of a file's name that a pseudonym keeps: its type, which identifies nobody.
_SUFFIX = re.compile(r"\.(nii|mha|mhd|dcm|png|jpe?g|tiff?|bmp|txt|xml|json|csv|npy)(\.gz)?$", re.IGNORECASE)
FIELDS = ("path", "kind", "detail", "rank", "worker")


class Fault(NamedTuple):
    """One broken file.

    Attributes:
        path: The file.
        kind: unreadable, checksum, shape, grid, nan, constant, label, missing, empty or space.
        detail: What was found, in words.
        sample: The subject it belongs to.
        rank: Rank that found it.
        worker: Loader worker that found it; -1 in the main process.
    """

    path: str
    kind: str
    detail: str
    sample: str
    rank: int = 0
    worker: int = -1


class SampleFaultError(Exception):
    """A sample that cannot be used.

    Args:
        faults: Why.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = list(faults)
        super().__init__("; ".join(f"{fault.path}: {fault.detail}" for fault in self.faults))


class FaultLedger:
    """The faults of a run: one per (path, kind).

    Args:
        max_fraction: Share of the samples that may be faulty; never fewer than 5.
        anonymise: Whether only pseudonyms of files are written.
    """

    def __init__(self, max_fraction: float = 0.01, anonymise: bool = False) -> None:
        self.max_fraction = max_fraction
        self.anonymise = anonymise
        self.num_samples = 0
        self._faults: dict[tuple[str, str], Fault] = {}
        self._news: list[Fault] = []

    def add(self, faults: Iterable[Fault]) -> None:
        """Record faults; those already known are dropped."""
        for fault in faults:
            if (fault.path, fault.kind) not in self._faults:
                self._faults[fault.path, fault.kind] = fault
                self._news.append(fault)

    def take_news(self) -> list[Fault]:
        """Return the faults added since the last call."""
        news, self._news = self._news, []
        return news

    @property
    def has_news(self) -> bool:
        """Whether :meth:`take_news` would return anything."""
        return bool(self._news)

    @property
    def faults(self) -> list[Fault]:
        """All faults, in the order in which they were found."""
        return list(self._faults.values())

    @property
    def num_faulty(self) -> int:
        """Number of distinct samples with a fault."""
        return len({fault.sample for fault in self.faults})

    @property
    def limit(self) -> float:
        """Largest number of faulty samples that is tolerated."""
        return max(5, self.max_fraction * self.num_samples)

    def check(self) -> None:
        """Raise an error if too many samples are faulty.

        Raises:
            TooManyFaultsError: with the table of kinds and the first three examples.
        """
        if self.num_faulty <= self.limit:
            return
        raise TooManyFaultsError(
            f"{self.num_faulty} of {self.num_samples} samples are faulty, more than the {self.limit:g} that are "
            f"tolerated (max_fault_fraction {self.max_fraction:g}). {self.describe()}"
        )

    def describe(self) -> str:
        """Summarise the faults: counts by kind, and the first three examples."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(f.kind for f in self.faults).most_common())
        examples = "; ".join(f"{self.shown_path(f)} ({self._found(f)})" for f in self.faults[:3])
        return f"By kind: {kinds}. First: {examples}."

    def _found(self, fault: Fault) -> str:
        return fault.kind if self.anonymise else f"{fault.kind}: {fault.detail}"

    def shown_path(self, fault: Fault) -> str:
        """Return the path, or its pseudonym if names are hidden."""
        if not self.anonymise:
            return fault.path
        suffix = _SUFFIX.search(fault.path)
        return (
            f"{pseudonym(fault.sample)}/{pseudonym(fault.path).replace('subject', 'file')}{suffix[0] if suffix else ''}"
        )

    def write(self, path: Path) -> None:
        """Write all faults as CSV, completely or not at all."""
        with (
            whole_file(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            for fault in self.faults:
                detail = "" if self.anonymise else fault.detail  # which may name files
                writer.writerow([self.shown_path(fault), fault.kind, detail, fault.rank, fault.worker])
