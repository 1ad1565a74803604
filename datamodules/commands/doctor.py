"""``medmim doctor``: what is wrong with an archive, before a week of training finds out."""

import argparse

from common.errors import DataError
from common.runtime.data_config import add_data_arguments, make_datamodule
from common.runtime.reporting import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medmim doctor``."""
    add_data_arguments(parser)
    parser.add_argument("--deep", action="store_true", help="read every byte, check every check sum and voxel")
    parser.add_argument("--workers", type=int, default=4, help="threads (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``medmim doctor``.

    Raises:
        DataError: training would refuse this archive.
    """
    reasons = make_datamodule(args).examine(args.deep, args.workers)
    if reasons:
        raise DataError(f"Training would refuse this archive: {'; '.join(reasons)}.")
    say("training would accept this archive")
