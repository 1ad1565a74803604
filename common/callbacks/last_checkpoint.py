"""The checkpoint to resume from, written at step boundaries inside training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from common.runtime.reporting import is_dry_run


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` every n optimiser steps and at the end of every epoch.

    It is written only during training: a checkpoint written after ``fit`` has lost the loader's position. At the end of
    an epoch it is written after validation.

    Args:
        folder: Where to write.
        every_n_train_steps: Optimiser steps between checkpoints; 0 = at the end of epochs alone.
    """

    def __init__(self, folder: Path, every_n_train_steps: int = 200) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = -1

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint; all ranks must call it."""
        if not is_dry_run(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at every n-th optimiser step (Lightning hook)."""
        step = trainer.global_step
        due = self.every_n_train_steps and step % self.every_n_train_steps == 0 and step != self._saved_step
        if due and not trainer.fit_loop._should_accumulate():
            self._saved_step = step
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch (Lightning hook)."""
        self.save(trainer)
