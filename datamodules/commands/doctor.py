"""``medmim doctor``: what is wrong with an archive, before a week of training finds out."""

from common.errors import DataError
from common.runtime.data_config import Archive
from common.runtime.reporting import print_line


def run(archive: Archive, deep: bool, workers: int) -> None:
    """Carry out ``medmim doctor``; its options are those of the command.

    Raises:
        DataError: training would refuse this archive.
    """
    reasons = archive.datamodule().examine(deep, workers)
    if reasons:
        raise DataError(f"Training would refuse this archive: {'; '.join(reasons)}.")
    print_line("training would accept this archive")
