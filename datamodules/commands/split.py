"""``medmim split``: write the split of a configuration as a file, or make one from lists that others published."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.runtime.data_config import Archive
from common.runtime.reporting import print_line
from datamodules.splits import SPLITS, Member, listed_split, repaired_split, write_split_file


def run(archive: Archive, out: str, by: str, lists: Sequence[str] | None, repair: bool) -> None:
    """Carry out ``medmim split``; its options are those of the command.

    Raises:
        DataError: a list is missing or names nothing of the archive, or a patient is in several of them.
    """
    datamodule = archive.datamodule()
    datamodule.index()
    cases = datamodule.all_cases()
    if lists:
        parts = _published(cases, [Path(name) for name in lists], repair)
    else:
        parts = {case.case_id: name for name, part in datamodule.splits.items() for case in part}
    write_split_file(Path(out), cases, parts, by_patient=by == "patient")
    counts = Counter(parts.values())
    shown = ", ".join(f"{counts[name]} {name}" for name in SPLITS)
    print_line(f"split: {shown} cases, written to {out}")


def _published(cases: Sequence[Member], lists: Sequence[Path], repair: bool) -> dict[str, str]:
    """Return the split that published lists give, without patients in several of them."""
    listed = listed_split(cases, lists)
    kept = repaired_split(cases, listed)
    dropped = Counter(split for name, splits in listed.items() for split in splits if kept.get(name) != split)
    if not dropped:
        return kept
    shown = ", ".join(f"{dropped[name]} of {name}" for name in SPLITS if dropped[name])
    if not repair:
        raise DataError(
            f"Patients are in several of the lists ({shown} are in a later list too); --repair leaves these out."
        )
    print_line(f"repair: {shown} left out, whose patients are in a later list")
    return kept
