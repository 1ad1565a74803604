"""Whether hidden words are predicted better than by frequency alone."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import reduce_sums
from common.module import SSLModule
from common.runtime.reporting import log_scalars
from common.types import Reconstruction


def unigram_log_likelihood(counts: Tensor) -> Tensor:
    """Return the log probability of each token by its count ``(V,)``, add-one smoothed."""
    smoothed = counts.double() + 1
    return (smoothed / smoothed.sum()).log()


def frequent_tokens(counts: Tensor, share: float = 0.5) -> Tensor:
    """Return bool ``(V,)``: the fewest tokens that make up ``share`` of all."""
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros_like(counts, dtype=torch.bool)
    frequent[order] = before < share * counts.sum()
    return frequent


class TextFloor(ValidationCallback):
    """Logs ``collapse/text_floor_ratio``: loss of the hidden words over that of the training unigram distribution.

    1 means that only word frequencies were learned. Also logs ``collapse/text_floor`` (nats per hidden token),
    ``val/token_accuracy``, and separately the accuracy of frequent tokens, which make up half of the training text, and
    of all others: ``val/token_accuracy_frequent`` and ``val/token_accuracy_rare``.
    """

    def __init__(self) -> None:
        self._unigram: Tensor | None = None
        self._frequent: Tensor | None = None
        self._sums: dict[str, list[Tensor]] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the training tokens once (Lightning hook)."""
        self._sums = {}
        if self._unigram is None and isinstance(pl_module, SSLModule):
            counts = trainer.datamodule.token_counts()  # type: ignore[attr-defined]
            self._unigram = unigram_log_likelihood(counts).to(pl_module.device)
            self._frequent = frequent_tokens(counts).to(pl_module.device)

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        assert self._unigram is not None
        assert self._frequent is not None
        hidden = module.hidden_tokens(batch)
        likelihood = -F.cross_entropy(hidden.logits.float(), hidden.targets, reduction="none")
        right = (hidden.logits.argmax(1) == hidden.targets).double()
        frequent = self._frequent[hidden.targets]
        self._add("loss", -likelihood)
        self._add("floor", -self._unigram[hidden.targets])
        self._add("accuracy", right)
        self._add("accuracy_frequent", right[frequent])
        self._add("accuracy_rare", right[~frequent])

    def _add(self, name: str, values: Tensor) -> None:
        pair = torch.stack(
            [values.double().sum(), torch.tensor(float(len(values)), dtype=torch.float64).to(values.device)]
        )
        self._sums.setdefault(name, []).append(pair)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log over all hidden tokens of all ranks (Lightning hook)."""
        sums = {name: torch.stack(pairs).sum(0).tolist() for name, pairs in self._sums.items()}
        means = reduce_sums({name: (total, count) for name, (total, count) in sums.items() if count})
        if "floor" not in means:
            return
        scalars = {
            "collapse/text_floor_ratio": means["loss"] / max(means["floor"], 1e-12),
            "collapse/text_floor": means["floor"],
        }
        scalars |= {f"val/token_{name}": value for name, value in means.items() if name.startswith("accuracy")}
        log_scalars(pl_module, scalars, prog_bar=("collapse/text_floor_ratio",))
