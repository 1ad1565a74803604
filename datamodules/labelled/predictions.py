"""Predicted regions as run-length codes, in the format of the pneumothorax challenge."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from common.distributed import gather_objects
from common.runtime.reporting import is_dry_run, print_line, write_rows
from datamodules.labelled.siim import encode_runs


class RunLengthWriter(BasePredictionWriter):
    """Writes ``predictions.csv`` in the run folder: ``ImageId`` and ``EncodedPixels``, -1 without a region.

    Predicted masks are replaced by their codes: Lightning keeps all predictions, and masks of thousands of radiographs
    take gigabytes.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._rows: list[dict[str, str]] = []

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Encode the masks of one batch (Lightning hook)."""
        for entry in prediction:
            entry["code"] = encode_runs(entry.pop("region").numpy())
            self._rows.append({"ImageId": entry["subject_id"], "EncodedPixels": entry["code"]})

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the table of all ranks (Lightning hook)."""
        rows = [row for part in gather_objects(self._rows) for row in part]
        self._rows = []
        if trainer.is_global_zero and not is_dry_run(trainer):
            path = Path(trainer.default_root_dir) / "predictions.csv"
            write_rows(path, sorted(rows, key=lambda row: row["ImageId"]))
            print_line(f"predictions: {len(rows)} run-length codes in {path}")
