"""UMD's objective: patches, words, the teacher's features, and image-text matching (Eq. 7).

Letters: B batch, N patches, P values of a patch, D width of projected features, V tokens of the vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import all_reduce_sum
from common.losses.distillation import token_feature_mse
from common.losses.reconstruction import masked_mse
from common.losses.text import masked_cross_entropy
from common.module import Term
from common.runtime.precision import at_least_float32
from common.types import ImageTextBatch
from experiments.umd.pairs import Pairs
from experiments.umd.pretrain_network import Features, UMDOutput

LOSSES = ("mim", "mlm", "feature_image", "feature_text", "itm")


def total_weights(alpha: float, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of each loss (Eq. 7): 1 - alpha for patches and words, alpha for features, 1 for matching.

    Args:
        alpha: In [0, 1].
        weights: Weights that differ, by name.

    Raises:
        ValueError: ``alpha`` is outside [0, 1], or a name is not one of the losses.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}.")
    unknown = set(weights or {}) - set(LOSSES)
    if unknown:
        raise ValueError(f"`weights` names {sorted(unknown)[0]!r}; the losses are {', '.join(LOSSES)}.")
    shares = (1 - alpha, 1 - alpha, alpha, alpha, 1.0)
    return dict(zip(LOSSES, shares, strict=True)) | dict(weights or {})


def matching(logits: Tensor, pairs: Pairs, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy and accuracy of image-text matching (Eq. 6), and of how many pairs.

    Args:
        logits: ``(B, 2)``.
        pairs: Who was shown what; those that are not valid do not count.
        sync: Whether the means run over the pairs of all ranks.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        valid = pairs.valid.to(logits.dtype)
        total = (F.cross_entropy(logits, pairs.label, reduction="none") * valid).sum()
        right = ((logits.argmax(1) == pairs.label) * valid).sum().detach()
        count = valid.sum()
        if sync:
            total, right, count = all_reduce_sum(total), all_reduce_sum(right), all_reduce_sum(count)
    return total / count.clamp(min=1), right / count.clamp(min=1), count


class Objective(NamedTuple):
    """The terms of UMD's loss.

    Attributes:
        weights: of each loss of ``LOSSES``; one of weight 0 is not computed.
        standardised: whether the teacher's features are standardised before they are compared.
    """

    weights: Mapping[str, float]
    standardised: bool

    def wants(self, *names: str) -> bool:
        """Whether any of these losses is computed."""
        return any(self.weights[name] for name in names)

    def terms(self, output: UMDOutput, batch: ImageTextBatch, pairs: Pairs | None, sync: bool) -> dict[str, Term]:
        """Return the losses that are wanted, and the accuracy of matching.

        Args:
            output: Of the network.
            batch: What it saw.
            pairs: Who was shown what; None without matching.
            sync: Whether statistics run over all ranks.
        """
        terms: dict[str, Term] = {}
        if self.wants("mim"):
            pred, target, hidden = output.reconstruction[:3]
            terms["mim"] = self._term("mim", masked_mse(pred, target, hidden, sync), hidden.sum())
        if output.words is not None:
            truth = batch["hidden_ids"]
            terms["mlm"] = self._term("mlm", masked_cross_entropy(output.words, truth, sync), float(len(truth)))
        terms |= self._features("feature_image", output.image_features, sync)
        terms |= self._features("feature_text", output.text_features, sync)
        if output.matches is not None and pairs is not None:
            loss, accuracy, count = matching(output.matches, pairs, sync)
            terms |= {"itm": self._term("itm", loss, count), "itm_accuracy": Term(accuracy, count)}
        return terms

    def _term(self, name: str, value: Tensor, count: Tensor | float) -> Term:
        return Term(value, count, self.weights[name])

    def _features(self, name: str, features: Features | None, sync: bool) -> dict[str, Term]:
        """Return the loss of features (Eq. 4), where it is wanted."""
        if features is None or not self.wants(name):
            return {}
        loss = token_feature_mse(*features, self.standardised, sync)
        return {name: self._term(name, loss, features.mask.sum())}
