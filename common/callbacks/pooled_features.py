"""Whether samples still differ from each other as whole images."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import gather_objects
from common.metrics import effective_rank
from common.module import SSLModule
from common.runtime.reporting import log_scalars
from common.types import Reconstruction


def feature_std(vectors: Tensor) -> float:
    """Return sqrt(D) times the mean over dimensions of the standard deviation of L2-normalised ``(S, D)`` vectors.

    Near 1 they are spread over the sphere, at 0 they are one and the same (Chen and He 2021, Fig. 2).
    """
    unit = F.normalize(vectors.double(), dim=1)
    return float(vectors.shape[1] ** 0.5 * unit.std(0, unbiased=False).mean())


class PooledFeatures(ValidationCallback):
    """Logs ``collapse/image_rank`` and ``collapse/feature_std`` of each sample's mean over its tokens.

    The features are those of the encoder that is transferred, of whole validation inputs; empty tokens are left out.

    Args:
        max_samples: Validation samples to use, over all ranks.
    """

    def __init__(self, max_samples: int = 512) -> None:
        self.max_samples = max_samples
        self._vectors: list[Tensor] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._vectors = []

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Collect this rank's share of the samples."""
        if sum(map(len, self._vectors)) * trainer.world_size >= self.max_samples:
            return
        tokens = module.token_features(batch)
        features, keep = next(iter(tokens.features.values())).float(), tokens.keep[..., None].float()
        self._vectors.append(((features * keep).sum(1) / keep.sum(1).clamp(min=1)).cpu())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log rank and spread over all ranks (Lightning hook)."""
        parts = [vectors for part in gather_objects(self._vectors) for vectors in part]
        if not parts:
            return
        vectors = torch.cat(parts)
        log_scalars(
            pl_module, {"collapse/image_rank": effective_rank(vectors), "collapse/feature_std": feature_std(vectors)}
        )
