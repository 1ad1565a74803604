"""``medmim prepare``: build the cache ahead of training, or verify it. Interrupt it and start it again at will."""

from common.errors import DataError
from common.runtime.data_config import Archive
from common.runtime.reporting import say
from datamodules.checking import CacheCheck


def run(archive: Archive, workers: int, check: CacheCheck | None = None) -> None:
    """Carry out ``medmim prepare``.

    Args:
        archive: The archive, with all settings that training would have.
        workers: Threads; 0 = as many as there are cores.
        check: How much of an existing cache is read; None: as the configuration says.

    Raises:
        DataError: the settings switch the cache off, or no case can be used.
    """
    datamodule = archive.datamodule()
    datamodule.index()
    if not hasattr(datamodule.store, "folder"):
        raise DataError("These settings use no cache (cache: none), so there is nothing to prepare.")
    datamodule.cache_threads = workers
    datamodule.cache_check = check or datamodule.cache_check
    datamodule.prepare_data()
    datamodule.setup("prepare")
    ledger = datamodule.ledger
    size = sum(path.stat().st_size for path in datamodule.store.folder.rglob("*") if path.is_file())
    say(f"cache: {size / 2**30:.2f} GiB at {datamodule.store.folder}")
    say(
        f"faults: {ledger.num_faulty} of {ledger.num_samples} cases. {ledger.describe()}"
        if ledger.num_faulty
        else "faults: none"
    )
