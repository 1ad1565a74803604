"""Shared by the examinations of all archives: check every member, then report on the whole."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from common.faults import Fault, FaultLedger
from common.pseudonyms import public_name
from common.runtime.reporting import print_line
from datamodules.notes import print_notes
from datamodules.storage import print_cache_size

_T = TypeVar("_T")


class Member(NamedTuple):
    """Findings for one member.

    Attributes:
        case_id: Its name.
        patient_id: Its patient.
        faults: Its faults.
        sums: Check sum to path, for every file read completely.
        usable: Whether it can be used for training.
    """

    case_id: str
    patient_id: str
    faults: Sequence[Fault] = ()
    sums: Mapping[str, str] = {}
    usable: bool = True


def look_at_all(
    check: Callable[[_T], Member], members: Sequence[_T], deep: bool, workers: int, unit: str = "pixel"
) -> list[Member]:
    """Check every member in parallel, with a progress bar."""
    title = f"reading every {unit}" if deep else "reading headers"
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(check, members), total=len(members), desc=title, unit="member"))


def copies(members: Iterable[Member]) -> list[list[str]]:
    """Return groups of byte-identical files of different patients."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for member in members:
        for checksum, path in member.sums.items():
            owners[checksum].setdefault(member.patient_id, path)
    return [list(group.values()) for group in owners.values() if len(group) > 1]


class Terms(NamedTuple):
    """What training requires of an archive, as plain values: doctors do not depend on data modules.

    Attributes:
        splits: Members of train, val and test.
        batch_size: Samples per device.
        draws: Training samples per member and epoch.
        max_fraction: Tolerated share of faulty members.
        anonymise: Whether members get pseudonyms.
        cache: Largest size of the cache in bytes, and its folder; None without a cache.
        account: The account of the archive's files, as lines.
    """

    splits: Mapping[str, Sequence[Any]]
    batch_size: int
    draws: int = 1
    max_fraction: float = 0.01
    anonymise: bool = False
    cache: tuple[int, Path] | None = None
    account: Sequence[str] = ()

    @property
    def members(self) -> list[Any]:
        """The members of all splits."""
        return [member for part in self.splits.values() for member in part]


def report_faults(terms: Terms, found: Sequence[Member], item_name: str, deep: bool, unit: str = "pixel") -> list[str]:
    """Print the faults, the empty splits and the size of the cache; return why training would refuse the archive.

    Args:
        terms: What training requires.
        found: One entry per member in use.
        item_name: Plural name of the members.
        deep: Whether members were read completely.
        unit: Name of an element of a member.
    """
    ledger = FaultLedger(terms.max_fraction, terms.anonymise)
    ledger.num_samples = len(found)
    ledger.add(fault for member in found for fault in member.faults)
    lost = {member.case_id for member in found if not member.usable}
    train, reasons = terms.splits["train"], []
    if not train:
        reasons.append("the train split is empty")
    elif all(member.case_id in lost for member in train):
        reasons.append(f"none of the {item_name} of the training split can be used")
    elif len(train) * terms.draws < terms.batch_size:
        reasons.append(f"the training split gives {len(train) * terms.draws} samples, fewer than one batch of "
                       f"{terms.batch_size}")  # fmt: skip
    print_notes()
    if ledger.num_faulty:
        print_line(f"faults: {ledger.num_faulty} of {len(found)} {item_name}. {ledger.describe()}")
        if ledger.num_faulty > ledger.limit:
            reasons.append(f"{ledger.num_faulty} faulty {item_name}, more than the {ledger.limit:g} that are tolerated")
    else:
        print_line(f"faults: none{'' if deep else f' in the headers; only DEEP=1 (--deep) reads the {unit}s'}")
    if same := copies(found):
        reasons.append(f"{len(same)} files occur in several patients, first {' = '.join(map(public_name, same[0]))}")
    if not terms.splits["val"]:
        print_line("note: the val split is empty")
    if terms.cache is not None:
        print_cache_size(*terms.cache)
    return reasons


def print_splits(what: str, terms: Terms, item_name: str) -> None:
    """Print the number of members, patients and members per split."""
    members = terms.members
    print_line(f"{what}: {len(members)} {item_name} of {len({member.patient_id for member in members})} patients, "
        + ", ".join(f"{len(part)} {name}" for name, part in terms.splits.items()))  # fmt: skip
    for line in terms.account:
        print_line(line)
