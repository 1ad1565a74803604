"""Do predictions differ between subjects, or is the answer always the same?"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from common.distributed import gather_objects
from common.module import SSLModule
from common.reporting import log_scalars


class _Moments:
    """Count, mean and sum of squared deviations of samples, merged by Chan's rule; float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.deviation: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add ``(B, ...)``."""
        x = x.detach().cpu().double()
        mean = x.mean(0)
        self.merge(len(x), mean, (x - mean).square().sum(0))

    def merge(self, count: int, mean: Tensor, deviation: Tensor) -> None:
        """Add another set of moments."""
        if self.mean is None or self.deviation is None:
            self.count, self.mean, self.deviation = count, mean, deviation
            return
        total = self.count + count
        delta = mean - self.mean
        self.deviation = self.deviation + deviation + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


class PredictionDiversity(pl.Callback):
    """Logs ``collapse/prediction_diversity``: variance of predictions across samples over that of their targets.

    All samples get one and the same mask, and only hidden entries count. Near 0 the model answers with a constant: it
    finds complete collapse without knowing the floor. A good model stays below 1: it cannot know all of the variance.

    Args:
        max_samples: Validation samples to use, over all ranks.
    """

    #: One key for all samples makes one mask for all of them.
    KEY = 20240706

    def __init__(self, max_samples: int = 32) -> None:
        self.max_samples = max_samples
        self._reset()

    def _reset(self) -> None:
        self._pred, self._target, self._seen = _Moments(), _Moments(), 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation (Lightning hook)."""
        self._reset()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reconstruct complete samples under the common mask (Lightning hook)."""
        if self._seen * trainer.world_size >= self.max_samples or not isinstance(pl_module, SSLModule):
            return
        output = pl_module.reconstruct(batch | {"key": torch.full_like(batch["key"], self.KEY)})
        # A sample that lacks a modality hides another set of entries: only equal masks can be compared.
        complete = batch["modality_mask"].all(1)
        if not bool(complete.any()):
            return
        chosen = output.mask[complete][0]
        self._pred.update(output.pred[complete][:, chosen])
        self._target.update(output.target[complete][:, chosen])
        self._seen += int(complete.sum())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the ratio (Lightning hook)."""
        parts = gather_objects([(m.count, m.mean, m.deviation) for m in (self._pred, self._target)])
        merged = [_Moments(), _Moments()]
        for part in parts:
            for moments, (count, mean, deviation) in zip(merged, part, strict=True):
                if count:
                    moments.merge(count, mean, deviation)
        pred, target = merged
        if pred.count >= 2 and pred.deviation is not None and target.deviation is not None:
            value = float(pred.deviation.sum() / target.deviation.sum().clamp(min=1e-12))
            log_scalars(pl_module, {"collapse/prediction_diversity": value})
