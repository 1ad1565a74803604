"""The checkpoint to resume from, written at step boundaries inside training."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from common.distributed import agree, world_size
from common.runtime.reporting import is_dry_run


@dataclass(frozen=True)
class Cadence:
    """When ``last.ckpt`` is written.

    Args:
        every_minutes: Minutes between checkpoints.
        every_n_steps: Optimiser steps between checkpoints, instead of minutes; None: by time.
        at_epoch_end: ``"always"``, or ``"auto"``: if the last one is older than ``every_minutes`` or training ends.
    """

    every_minutes: float = 10.0
    every_n_steps: int | None = None
    at_epoch_end: Literal["auto", "always"] = "auto"


@dataclass(frozen=True)
class Safety:
    """When ranks agree, and how many non-finite steps are tolerated.

    Args:
        agree_every: Optimiser steps between agreements of several ranks to stop, and between checks for non-finite
            steps.
        max_skipped_steps: Number of tolerated steps with a non-finite loss or gradient.
    """

    agree_every: int = 10
    max_skipped_steps: int = 0


def training_ends(trainer: pl.Trainer) -> bool:
    """Whether the ending epoch is the last one."""
    by_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return bool(by_epochs or by_steps or trainer.should_stop)


def settle_progress(loop: dict[str, Any]) -> None:
    """Bring Lightning's counters, as a checkpoint holds them, into the form of one of the two moments it resumes from.

    They are the end of a step inside an epoch, and the end of an epoch. Where the last step of an epoch was saved, or a
    step in a validation behind it, Lightning would not count the next epoch, and go astray from there on.

    Args:
        loop: ``fit_loop`` of the checkpoint's ``loops``; changed in place.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    over = batches["is_last_batch"]
    for part in ("total", "current"):
        ready, epoch = batches[part]["ready"], epochs[part]["ready"]
        batches[part] |= {"started": ready, "processed": ready, "completed": ready if over else ready - 1}
        epochs[part] |= {"started": epoch, "processed": epoch if over else epoch - 1, "completed": epoch - 1}
    loop["epoch_loop.val_loop.batch_progress"]["total"] = dict.fromkeys(batches["total"], 0)


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` by time or by steps, and when training ends; never twice at the same step.

    It is written only during training, as after ``fit`` the loader's position is lost. At the end of an epoch it is
    written after validation.

    Args:
        folder: Where to write.
        cadence: When to write.
        agree_every: Optimiser steps between agreements of several ranks on the time.
        clock: Returns seconds; the first rank's clock decides.
    """

    def __init__(
        self,
        folder: Path,
        cadence: Cadence | None = None,
        agree_every: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.cadence = cadence or Cadence()
        self.agree_every = agree_every
        self._clock = clock
        self._saved_at = clock()
        self._saved_step = -1

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint, unless this step's exists; all ranks must call it."""
        if is_dry_run(trainer) or trainer.global_step == self._saved_step:
            return
        trainer.save_checkpoint(self.path, weights_only=False)
        for logger in trainer.loggers:  # else a run that is killed and resumed has a gap in its curves
            logger.save()
        self._saved_step, self._saved_at = trainer.global_step, self._clock()

    def _is_old(self, trainer: pl.Trainer) -> bool:
        """Whether the last checkpoint is too old by the first rank's clock."""
        return agree(trainer.is_global_zero and self._clock() - self._saved_at >= 60 * self.cadence.every_minutes)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Settle the counters that the run goes on from (Lightning hook)."""
        # Under accumulation Lightning's own counters are those that resume exactly.
        if trainer.accumulate_grad_batches == 1:
            settle_progress(checkpoint["loops"]["fit_loop"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock (Lightning hook)."""
        self._saved_at = self._clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let loggers count optimiser steps, from which a resumed run would stray by one (Lightning hook)."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time (Lightning hook)."""
        step, every = trainer.global_step, self.cadence.every_n_steps
        if trainer.fit_loop._should_accumulate() or step == self._saved_step:
            return
        if every:
            due = step % every == 0
        else:
            due = (world_size() == 1 or step % self.agree_every == 0) and self._is_old(trainer)
        if due:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch, if it is time or the last (Lightning hook)."""
        if self.cadence.at_epoch_end == "always" or training_ends(trainer) or self._is_old(trainer):
            self.save(trainer)
