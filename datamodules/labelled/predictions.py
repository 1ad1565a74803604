"""Predicted regions of images: as run-length codes in the format of the pneumothorax challenge, or as masks."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from common.distributed import gather_objects
from common.files import whole_file
from common.names import case_twins, safe_name
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


class MaskWriter(BasePredictionWriter):
    """Writes each image's regions as ``predictions/<image>.png`` in the run folder, on the grid of the image's file.

    Values are the regions' places, from 1; where regions overlap, the later one shows.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._count = 0
        self._twins: Container[str] = ()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find names that some file systems take for one (Lightning hook)."""
        splits = trainer.datamodule.splits  # type: ignore[attr-defined]
        self._twins = case_twins(case.case_id for part in splits.values() for case in part)

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
        """Write the masks of one batch (Lightning hook)."""
        if is_dry_run(trainer):
            return
        folder = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        for entry in prediction:
            places = torch.arange(1, len(entry["region"]) + 1, dtype=torch.uint8)[:, None, None]
            entry["label"] = (entry.pop("region") * places).amax(0)
            name = safe_name(entry["subject_id"], self._twins)
            with whole_file(folder / f"{name}.png") as temporary:
                Image.fromarray(entry["label"].numpy()).save(temporary, format="PNG")
            self._count += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where they are (Lightning hook)."""
        total = sum(gather_objects(self._count))
        spec: Any = pl_module.spec
        names = ", ".join(f"{place} {name}" for place, name in enumerate(spec.regions, 1))
        print_line(f"predictions: {total} masks ({names}) in {Path(trainer.default_root_dir) / 'predictions'}")
