"""``medmim split``: write the seeded split by patient as a file, to keep, to edit, or to share with another project."""

import argparse
from collections import Counter
from pathlib import Path

from common.reporting import say
from datamodules.layouts import recognise
from datamodules.splits import SPLITS, assign_splits, write_split_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medmim split``."""
    parser.add_argument("--root", required=True, help="the archive")
    parser.add_argument("--layout", default="auto", help="its layout (default: recognised)")
    parser.add_argument("--fractions", type=float, nargs=3, default=(0.8, 0.1, 0.1), metavar=("TRAIN", "VAL", "TEST"),
                        help="shares of patients (default: 0.8 0.1 0.1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of patients (default: %(default)s)")
    parser.add_argument("--out", required=True, help="CSV to write, for data.split_file")


def run(args: argparse.Namespace) -> None:
    """Carry out ``medmim split``."""
    _, cases = recognise(args.root, args.layout)
    parts = assign_splits(cases, args.fractions, args.seed)
    write_split_file(Path(args.out), cases, parts)
    counts = Counter(parts.values())
    shown = ", ".join(f"{counts[name]} {name}" for name in SPLITS)
    say(f"split: {shown} cases, written to {args.out}")
