"""Predicted label volumes, written on the grid of their source file."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nibabel as nib
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from numpy.typing import NDArray

from common.distributed import gather_objects
from common.names import safe_name
from common.runtime.reporting import print_line
from datamodules.volumes.cache import Record
from datamodules.volumes.reading import write_nifti


def to_source_grid(label: NDArray[np.uint8], record: Record) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Map a label volume from the prepared grid to the grid of the source file.

    Cropping is undone by index, resampling by nearest neighbour; the axes return to the file's order and direction.

    Args:
        label: ``(X, Y, Z)`` on the prepared grid.
        record: The case's record.

    Returns:
        The label on the file's grid, and the file's affine.
    """
    affine = np.array(record.source_affine)
    if record.offset is not None:
        full = np.zeros(record.source_shape, dtype=np.uint8)
        full[tuple(slice(o, o + n) for o, n in zip(record.offset, label.shape, strict=True))] = label
    else:
        from monai.data import MetaTensor
        from monai.transforms import ResampleToMatch

        image = MetaTensor(torch.as_tensor(label, dtype=torch.float32)[None], affine=torch.tensor(record.affine))
        target = MetaTensor(torch.zeros(1, *record.source_shape), affine=torch.as_tensor(affine))
        resampled = ResampleToMatch(mode="nearest", padding_mode="zeros")(image, target)
        full = np.rint(resampled[0].numpy()).astype(np.uint8)
    wanted = nib.orientations.io_orientation(np.array(record.file_affine))
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)
    return nib.orientations.apply_orientation(full, turn).astype(np.uint8), np.array(record.file_affine)


class SegmentationWriter(BasePredictionWriter):
    """Writes each prediction as ``predictions/<subject>.nii.gz`` in the run folder, on the source grid and affine.

    A subject whose name cannot be a file name is written under its :func:`common.names.safe_name`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._count = 0
        self._folder = Path("predictions")
        self._twins: Container[str] = ()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Agree on one folder: ranks started by a scheduler read the clock separately (Lightning hook)."""
        self._folder = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "predictions"
        self._twins = getattr(trainer.datamodule, "twins", ())  # type: ignore[attr-defined]

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
        """Write the cases of one batch (Lightning hook)."""
        for entry in prediction:
            label, affine = to_source_grid(entry["label"].numpy(), entry["record"])
            write_nifti(self._folder / f"{safe_name(entry['subject_id'], self._twins)}.nii.gz", label, affine)
            self._count += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where the predictions are (Lightning hook)."""
        total = sum(gather_objects(self._count))
        print_line(f"predictions: {total} label volumes in {self._folder}")
