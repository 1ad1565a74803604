"""Whether predictions differ between subjects or are always the same."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import gather_objects
from common.module import SSLModule
from common.runtime.reporting import log_scalars
from common.types import Reconstruction


class _Moments:
    """Count, mean and sum of squared deviations of every entry, merged by Chan's rule; float64 on the CPU."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Add the entries ``mask`` ``(B, ...)`` of ``x`` ``(B, ..., P)``."""
        x, member = x.detach().cpu().double(), mask[..., None].cpu().double()
        count = member.sum(0)
        mean = (x * member).sum(0) / count.clamp(min=1)
        self.merge(count, mean, ((x - mean).square() * member).sum(0))

    def merge(self, count: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Add another set of moments."""
        if self.parts is None:
            self.parts = count, mean, deviation
            return
        old_count, old_mean, old_deviation = self.parts
        total = old_count + count
        share, delta = count / total.clamp(min=1), mean - old_mean
        deviation = old_deviation + deviation + delta.square() * old_count * share
        self.parts = total, old_mean + delta * share, deviation

    def spread(self) -> Tensor:
        """Return the summed deviations of entries seen at least twice."""
        if self.parts is None:
            return torch.zeros(())
        count, _, deviation = self.parts
        return (deviation * (count >= 2)).sum()


class PredictionDiversity(ValidationCallback):
    """Logs ``collapse/prediction_diversity``: variance of predictions across samples over that of their targets.

    All samples get the same mask (apart from what a sample lacks), and only hidden entries count. Near 0 the model
    predicts a constant, so complete collapse shows without knowing the floor. A good model stays below 1: it cannot
    explain all of the variance.

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
        """Reset for a new validation (Lightning hook)."""
        self._reset()

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Reconstruct under the common mask."""
        if self._seen * trainer.world_size >= self.max_samples:
            return
        output = module.reconstruct(batch | {"key": torch.full_like(batch["key"], self.KEY)})
        self._pred.update(output.pred, output.mask)
        self._target.update(output.target, output.mask)
        self._seen += len(output.mask)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the ratio (Lightning hook)."""
        parts = gather_objects((self._pred.parts, self._target.parts))
        merged = _Moments(), _Moments()
        for part in parts:
            for moments, values in zip(merged, part, strict=True):
                if values is not None:
                    moments.merge(*values)
        spread, total = (moments.spread() for moments in merged)
        if total > 0:
            log_scalars(pl_module, {"collapse/prediction_diversity": float(spread / total)})
