"""Stopping at the cluster's request without losing a step."""

import os
import shutil
import signal
import subprocess
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from common.callbacks.last_checkpoint import LastCheckpoint
from common.distributed import highest, world_size
from common.errors import PreemptedError
from common.runtime.reporting import print_line

#: Signals that ask a run to stop, and the exit codes that follow.
SIGNALS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


def slurm_job() -> str | None:
    """Return the id of the SLURM job (and array task) that this process belongs to; it survives requeueing."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


class Preemption(Checkpoint):
    """On SIGTERM, SIGUSR1 or Ctrl-C, finishes the step, saves ``last.ckpt`` and stops with 143, or 130 after Ctrl-C.

    SLURM is asked to requeue the job, except after Ctrl-C. A requeued job continues from its own saved run, which the
    command finds by job id.

    The handler only sets a flag. Several ranks agree on it every few steps (over a CPU group, without waiting for the
    accelerator), or between validation batches. Lightning's own handling is replaced: it saves inside the handler and
    can hang. A second signal, or one during a save, changes nothing; a second Ctrl-C quits at once.

    A subclass of ``Checkpoint`` so that Lightning calls it after all other callbacks.

    Args:
        checkpoint: Writes the checkpoint.
        agree_every: Optimiser steps between agreements of several ranks.
    """

    def __init__(self, checkpoint: LastCheckpoint, agree_every: int = 10) -> None:
        self.checkpoint, self.agree_every = checkpoint, agree_every
        self.requested = 0
        self._original: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == SIGNALS[signal.SIGINT]:
            os._exit(self.requested)  # the next process that writes there removes incomplete files
        self.requested = self.requested or SIGNALS[signal.Signals(number)]
        if number == signal.SIGINT:
            # Only a plain write is safe here: the signal may have arrived inside a print.
            os.write(2, b"\nstopping: the step is finished and saved first; Ctrl-C again quits at once\n")

    def _install(self, trainer: pl.Trainer) -> None:
        """Install our signal handlers; Lightning has just installed its own."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        # Lightning broadcasts its own flag from the device at every step of a distributed run: a host sync for a flag
        # that can no longer be set.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handlers that were in place before this run (Lightning hook)."""
        self._original = {number: signal.getsignal(number) for number in SIGNALS}

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install our signal handlers (Lightning hook)."""
        self._install(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install our signal handlers (Lightning hook)."""
        self._install(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at a step boundary if any rank was asked to (Lightning hook)."""
        if trainer.fit_loop._should_accumulate() or (world_size() > 1 and trainer.global_step % self.agree_every):
            return
        if code := highest(self.requested):
            self.checkpoint.save(trainer)
            self._stop(trainer, code)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at the end of an epoch (Lightning hook)."""
        if code := highest(self.requested):
            self.checkpoint.save(trainer)
            self._stop(trainer, code)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop inside validation: the step before it is complete (Lightning hook)."""
        loader = trainer.val_dataloaders
        shared = getattr(getattr(loader, "sampler", None), "common_length", 0)
        if (trainer.world_size == 1 or batch_idx < shared) and (code := highest(self.requested)):
            if not trainer.sanity_checking and trainer.state.fn == "fit" and not trainer.fit_loop._should_accumulate():
                self.checkpoint.save(trainer)
            self._stop(trainer, code)

    def _stop(self, trainer: pl.Trainer, code: int) -> None:
        message = f"stopped on request at step {trainer.global_step}; "
        saved = self.checkpoint.path.is_file()
        message += f"resume with RESUME={self.checkpoint.path.parent.parent}" if saved else "nothing was trained yet"
        job = slurm_job()
        if trainer.is_global_zero and code == SIGNALS[signal.SIGTERM] and job is not None and shutil.which("scontrol"):
            done = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
            message += f"; SLURM job {job} {'is requeued' if done else 'could not be requeued'}"
        print_line(message)
        raise PreemptedError(message, code)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers (Lightning hook)."""
        for number, handler in self._original.items():
            signal.signal(number, handler)
        self._original = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers when a run fails (Lightning hook)."""
        self.teardown(trainer, pl_module, "fit")
