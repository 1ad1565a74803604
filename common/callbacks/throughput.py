"""Training throughput, and time spent waiting for data."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode

from common.runtime.reporting import print_line


class Throughput(pl.Callback):
    """Logs samples per second, the share of time spent waiting for data and, on a GPU, the model FLOPs utilisation.

    Values are over the steps since the last log, over all ranks; validation and saving do not count. The first step's
    floating-point operations are counted once (not if the network is compiled) and stored for ``summary.json``.

    Args:
        every_n_steps: Steps between logs.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.samples = 0
        self.seconds = 0.0
        self.flops_per_sample: float | None = None
        self._counter: FlopCounterMode | None = None
        self._begin: float | None = None
        self._window = (0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the totals that a resumed run continues from (Lightning hook)."""
        return {"samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the totals (Lightning hook)."""
        self.samples, self.seconds = state_dict["samples"], state_dict["seconds"]

    @staticmethod
    def _batch_size(batch: Any) -> int:
        values = batch.values() if isinstance(batch, dict) else batch
        return next(len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim)

    def _waited(self, trainer: pl.Trainer) -> float:
        return float(getattr(trainer.train_dataloader, "wait_seconds", 0.0))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the composition of an optimiser step (Lightning hook)."""
        size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if size is not None:
            total = size * trainer.world_size * trainer.accumulate_grad_batches
            print_line(f"batch: {size} per device x {trainer.world_size} devices x {trainer.accumulate_grad_batches} "
                f"accumulated = {total} samples per optimiser step")  # fmt: skip

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock before the first batch is requested (Lightning hook)."""
        self._begin = time.perf_counter()
        self._window = (0, 0.0, self._waited(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the operations of the first step (Lightning hook)."""
        compiled = getattr(getattr(pl_module, "optimization", None), "compile", False)
        if self.flops_per_sample is None and self._counter is None and not compiled:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add one step, and log at the end of a window (Lightning hook)."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.flops_per_sample = self._counter.get_total_flops() / self._batch_size(batch)
            self._counter = None
        now = time.perf_counter()
        elapsed = now - (self._begin or now)
        self._begin = now
        count = self._batch_size(batch) * trainer.world_size
        self.samples += count
        self.seconds += elapsed
        samples, seconds, waited = self._window
        samples, seconds = samples + count, seconds + elapsed
        self._window = (samples, seconds, waited)
        if (batch_idx + 1) % self.every_n_steps and batch_idx + 1 != trainer.num_training_batches:
            return
        self._log_window(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the operation counter (Lightning hook)."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def _log_window(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        samples, seconds, waited = self._window
        rate = samples / max(seconds, 1e-9)
        module.log("throughput/samples_per_second", rate, prog_bar=True, batch_size=1)
        fraction = min((self._waited(trainer) - waited) / max(seconds, 1e-9), 1.0)
        module.log("throughput/data_wait_fraction", fraction, batch_size=1)
        if module.device.type == "cuda" and self.flops_per_sample:
            self._log_mfu(module, rate / trainer.world_size * self.flops_per_sample)
        self._window = (0, 0.0, self._waited(trainer))

    def _log_mfu(self, module: pl.LightningModule, flops_per_second: float) -> None:
        precision = str(module.trainer.precision)
        dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
        if peak := get_available_flops(module.device, dtype):
            module.log("throughput/mfu", flops_per_second / peak, batch_size=1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude validation from the clock (Lightning hook)."""
        self._begin = time.perf_counter()
