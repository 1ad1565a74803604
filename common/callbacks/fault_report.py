"""Broken samples: listed in the run folder, logged, and a reason to stop."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from common.distributed import agree, gather_objects
from common.faults import FaultLedger
from common.pseudonyms import share_key
from common.runtime.reporting import is_dry_run, say


class FaultReport(pl.Callback):
    """Keeps ``data_faults.csv`` up to date, logs ``data/faulty_samples``, and stops a run with too many.

    Ranks exchange faults only when one of them has found a new one.

    Args:
        folder: The run folder.
        agree_every: Batches between agreements of several ranks that there is none.
    """

    def __init__(self, folder: Path, agree_every: int = 10) -> None:
        self.agree_every = agree_every
        self.path = Path(folder) / "data_faults.csv"

    @staticmethod
    def _ledger(trainer: pl.Trainer) -> FaultLedger | None:
        return getattr(trainer.datamodule, "ledger", None)  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Record the faults found while indexing and caching (Lightning hook)."""
        ledger = self._ledger(trainer)
        if ledger is not None and ledger.anonymise:
            share_key()
        if ledger is None or is_dry_run(trainer):
            return
        if ledger.num_faulty:
            say(f"faults: {ledger.num_faulty} of {ledger.num_samples} samples. {ledger.describe()}")
        ledger.take_news()
        self._write(trainer, ledger)

    def _write(self, trainer: pl.Trainer, ledger: FaultLedger) -> None:
        if trainer.is_global_zero:
            ledger.write(self.path)

    def _share(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        ledger = self._ledger(trainer)
        if ledger is None or not agree(ledger.has_news):
            return
        for news in gather_objects(ledger.take_news()):
            ledger.add(news)
        ledger.take_news()
        if not is_dry_run(trainer):
            self._write(trainer, ledger)
        module.log("data/faulty_samples", float(ledger.num_faulty), batch_size=1)
        ledger.check()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exchange new faults at the step boundary (Lightning hook)."""
        if trainer.world_size == 1 or (batch_idx + 1) % self.agree_every == 0 or trainer.is_last_batch:
            self._share(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exchange new faults after validation (Lightning hook)."""
        if not trainer.sanity_checking:
            self._share(trainer, pl_module)
