"""The base class of callbacks that look at every validation batch."""

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl

from common.module import SSLModule
from common.types import Reconstruction


class ValidationCallback(pl.Callback):
    """Looks at every validation batch of a self-supervised module; leaves other modules alone."""

    @abstractmethod
    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Process one batch and the module's output for it."""

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Observe a batch (Lightning hook)."""
        if isinstance(pl_module, SSLModule):
            self.observe(trainer, pl_module, outputs["reconstruction"], batch)
