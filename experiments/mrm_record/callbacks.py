"""Whether the image helps to fill in the report."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import gather_objects
from common.metrics import bootstrap_ratio
from common.module import SSLModule
from common.runtime.reporting import log_scalars
from common.types import Reconstruction

#: What the report decoder is given in place of the sample's own image.
_IMAGES = {"right_image": "image", "other_image": "control_image", "no_image": "none"}


class ImageReportGap(ValidationCallback):
    """Logs the loss of the hidden words with the right image, with another patient's, and with none.

    ``report/loss_right_image``, ``report/loss_other_image``, ``report/loss_no_image`` (nats per hidden token, the same
    words hidden), and the gaps ``report/gap_other_image`` and ``report/gap_no_image`` (above 0: the image helps) with
    the bounds ``_low`` and ``_high`` of their 95 % interval, people resampled.

    Args:
        words: Score these words alone, such as the names of findings; None scores all. Only words that are one token.
        name: Replaces ``report`` in the names.
    """

    def __init__(self, words: Sequence[str] | None = None, name: str = "report") -> None:
        self.words, self.name = words, name
        self._wanted: Tensor | None = None
        self._sums: dict[str, np.ndarray] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._sums = defaultdict(lambda: np.zeros(len(_IMAGES) + 1))
        if self.words is not None and self._wanted is None:
            backend = trainer.datamodule.tokenizer.backend  # type: ignore[attr-defined]
            found = [backend.token_to_id(word) for word in self.words]
            self._wanted = torch.tensor([index for index in found if index is not None], device=pl_module.device)

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        if "control_image" not in batch:
            return
        losses = []
        for image in _IMAGES.values():
            hidden = module.hidden_tokens(batch, image)  # type: ignore[call-arg]
            losses.append(F.cross_entropy(hidden.logits.float(), hidden.targets, reduction="none"))
        scored = batch["modality_mask"][:, 0][hidden.sample]
        if self._wanted is not None:
            scored = scored & torch.isin(hidden.targets, self._wanted)
        rows = torch.stack([*losses, torch.ones_like(losses[0])], 1)[scored].double().cpu().numpy()
        for sample, row in zip(hidden.sample[scored].tolist(), rows, strict=True):
            self._sums[batch["patient_id"][sample]] += row

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log over all patients of all ranks (Lightning hook)."""
        merged: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(_IMAGES) + 1))
        for part in gather_objects(dict(self._sums)):
            for patient, row in part.items():
                merged[patient] += row
        if not merged:
            return
        table = np.stack([merged[patient] for patient in sorted(merged)])
        counts = table[:, -1]
        losses = table[:, :-1].sum(0) / counts.sum()
        scalars = {f"loss_{name}": loss for name, loss in zip(_IMAGES, losses, strict=True)}
        for column, name in ((1, "other_image"), (2, "no_image")):
            gaps = table[:, column] - table[:, 0]
            low, high = bootstrap_ratio(gaps, counts)
            scalars |= {f"gap_{name}": gaps.sum() / counts.sum(), f"gap_{name}_low": low, f"gap_{name}_high": high}
        log_scalars(pl_module, {f"{self.name}/{name}": float(value) for name, value in scalars.items()})
