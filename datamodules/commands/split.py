"""``medmim split``: write the split of a configuration as a file, or make one from lists that others published."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.runtime.data_config import add_data_arguments, make_datamodule
from common.runtime.reporting import say
from datamodules.splits import SPLITS, Member, listed_split, repaired_split, write_split_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medmim split``."""
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, help="CSV to write, for data.split.file")
    parser.add_argument("--by", choices=("case", "patient"), default="case", help="a line is (default: %(default)s)")
    parser.add_argument("--lists", nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="text files, a case first on a line")
    parser.add_argument("--repair", action="store_true", help="leave out of a list whoever is in a later one")


def run(args: argparse.Namespace) -> None:
    """Carry out ``medmim split``.

    Raises:
        DataError: a list is missing or names nothing of the archive, or a patient is in several of them.
    """
    datamodule = make_datamodule(args)
    datamodule.index()
    cases = datamodule.all_cases()
    if args.lists:
        parts = _published(cases, [Path(name) for name in args.lists], args.repair)
    else:
        parts = {case.case_id: name for name, part in datamodule.splits.items() for case in part}
    write_split_file(Path(args.out), cases, parts, by_patient=args.by == "patient")
    counts = Counter(parts.values())
    shown = ", ".join(f"{counts[name]} {name}" for name in SPLITS)
    say(f"split: {shown} cases, written to {args.out}")


def _published(cases: Sequence[Member], lists: Sequence[Path], repair: bool) -> dict[str, str]:
    """Return the split that published lists give, without patients in several of them.

    Raises:
        DataError: a list is missing or names nothing of the archive, or a patient is in several unrepaired.
    """
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
    say(f"repair: {shown} left out, whose patients are in a later list")
    return kept
