"""The members of each split: a private file in the run folder, and a part of every checkpoint."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from common.files import whole_file
from common.runtime.loggers import SummaryLogger
from common.runtime.reporting import is_dry_run

FIELDS = ("case_id", "patient_id", "split", "source_xxh3")


class MembershipRecord(pl.Callback):
    """Has the data module compare its members with those of earlier runs, and stores them with the run.

    Data modules without ``resolve_membership`` are left alone.

    Args:
        folder: The run folder, where ``membership.csv`` is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._membership: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare and write (Lightning hook).

        Raises:
            DataError: the archive has changed since a resumed run began, or patients must not have been seen before.
        """
        resolve = getattr(getattr(trainer, "datamodule", None), "resolve_membership", None)
        if resolve is None:
            return
        self._membership = resolve()
        for logger in trainer.loggers:
            if isinstance(logger, SummaryLogger) and self._membership is not None:
                logger.facts["membership"] = {"digest": self._membership.digest, **self._membership.counts}
                logger.facts["seen_patients"] = trainer.datamodule.seen  # type: ignore[attr-defined]
        if self._membership is None or not trainer.is_global_zero or is_dry_run(trainer):
            return
        with whole_file(self.folder / "membership.csv") as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.writer(file)
                writer.writerow(FIELDS)
                for row in self._membership.rows:
                    writer.writerow([row.case_id, row.patient_id, row.split, " ".join(row.sources)])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the members in the checkpoint (Lightning hook)."""
        if self._membership is not None:
            checkpoint["membership"] = self._membership.plain()
