"""Grades of a disease from images: ordinal targets scored by quadratic kappa, or exclusive classes.

Letters: B batch, K outputs, S cases.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, multiclass_cohen_kappa, multiclass_f1_score

from common.distributed import all_reduce_sum
from common.downstream.classification import (
    ClassifierNetwork,
    ImageClassifier,
    auroc_by_class,
    macro_auroc,
    masked_binary_cross_entropy,
)
from common.errors import UserError
from common.types import InputSpec


def decode_ordinal(logits: Tensor) -> Tensor:
    """Return the grade that ordinal logits ``(S, K)`` say: how many of them are above one half, less one."""
    return ((logits.sigmoid() > 0.5).sum(1) - 1).clamp(min=0)


def severity(logits: Tensor) -> Tensor:
    """Return the expected grade ``(S,)`` of ordinal logits ``(S, K)``."""
    return logits.sigmoid().sum(1) - 1


def matched_thresholds(scores: Tensor, grades: Tensor, classes: int) -> Tensor:
    """Return the thresholds ``(classes - 1,)`` that give training predictions the training grades' distribution.

    Args:
        scores: ``(S,)``, severity of the training images.
        grades: long ``(S,)``, their grades.
        classes: How many grades there are.
    """
    shares = torch.stack([(grades < grade).double().mean() for grade in range(1, classes)])
    return torch.quantile(scores.double(), shares)


def apply_thresholds(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Return the grade of each score ``(S,)``: how many thresholds it reaches."""
    return (scores.double()[:, None] >= thresholds).sum(1)


def quadratic_kappa(pred: Tensor, grades: Tensor, classes: int) -> float:
    """Return Cohen's kappa with quadratic weights; NaN where predictions and grades are all one and the same."""
    return float(multiclass_cohen_kappa(pred, grades, classes, weights="quadratic"))


def bootstrap_kappa(
    pred: Tensor, grades: Tensor, classes: int, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the central 95 % of kappa under resampling of cases; draws that have none are left out."""
    weight = (np.arange(classes)[:, None] - np.arange(classes)) ** 2.0
    rng = np.random.default_rng(seed)
    code = (grades * classes + pred).numpy()
    values = []
    for _ in range(draws):
        counts = np.bincount(rng.choice(code, len(code)), minlength=classes**2)
        table = counts.reshape(classes, classes).astype(float)
        expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
        disagreement = (weight * expected).sum()
        if disagreement > 0:
            values.append(1 - (weight * table).sum() / disagreement)
    if not values:
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


class GradeClassifier(ImageClassifier):
    """Fine-tunes all weights on graded images; see :class:`ImageClassifier` for what is logged besides.

    Ordinal targets (the first c + 1 of K outputs are 1 at grade c) are trained with binary cross-entropy and scored by
    quadratic kappa, ``val/kappa``; exclusive ones with cross-entropy, their probabilities averaged over a patient's
    images, and scored by AUROC, average precision, and F1.

    Args:
        targets: ``"ordinal"`` or ``"exclusive"``.
        decision: How an ordinal prediction becomes a grade when tested: ``"half"`` counts the outputs above one half;
            ``"matched"`` sets thresholds on the expected grade so that the training images get their own grades'
            distribution.
        freeze: Whether the encoder stays as it is, a linear probe.
        **settings: Those of :class:`ImageClassifier`.
    """

    monitor = ("val/kappa", "max")

    def __init__(
        self,
        targets: Literal["ordinal", "exclusive"] = "ordinal",
        decision: Literal["half", "matched"] = "half",
        freeze: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.targets, self.decision, self._freeze = targets, decision, freeze
        self._thresholds: Tensor | None = None
        if targets == "exclusive":
            self.monitor = ("val/auroc", "max")

    def build_network(self, spec: InputSpec) -> ClassifierNetwork:
        """Make encoder and head."""
        network = super().build_network(spec)
        if self._freeze:
            network.encoder.requires_grad_(False)
        return network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        logits, target, known = self(batch["image"]), batch["target"], batch["target_mask"]
        if self.targets == "ordinal":
            loss = masked_binary_cross_entropy(logits, target, known)
        else:
            whole = known.all(1)
            losses = F.cross_entropy(logits.float(), target.argmax(1), reduction="none") * whole
            loss = all_reduce_sum(losses.sum()) / all_reduce_sum(whole.sum()).clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    @torch.no_grad()
    def on_test_start(self) -> None:
        """Set the thresholds by the training images (Lightning hook).

        Raises:
            UserError: the data module has no training images.
        """
        if self.targets != "ordinal" or self.decision != "matched":
            return
        logits, grades = [], []
        for batch in self.trainer.datamodule.central_samples(("train",)):  # type: ignore[attr-defined]
            logits.append(self(batch["image"].to(self.device)).float().cpu())
            grades.append((batch["target"].sum(1) - 1).long())
        if not logits:
            raise UserError("There is no training image to set thresholds by: set model.decision to half.")
        classes = len(self.classes)
        self._thresholds = matched_thresholds(severity(torch.cat(logits)), torch.cat(grades), classes)

    def _scores(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the scores of collected rows."""
        if self.targets == "exclusive":
            return self._exclusive_scores(rows)
        scores = super()._scores(rows)
        logits = torch.tensor([row["logits"] for row in rows])
        grades = (torch.tensor([row["target"] for row in rows]).sum(1) - 1).long()
        pred = decode_ordinal(logits)
        if self._thresholds is not None:
            pred = apply_thresholds(severity(logits), self._thresholds)
        classes = len(self.classes)
        scores |= {"kappa": quadratic_kappa(pred, grades, classes), "accuracy": float((pred == grades).float().mean())}
        if self.trainer.testing:
            scores["kappa_low"], scores["kappa_high"] = bootstrap_kappa(pred, grades, classes)
        return scores

    def _exclusive_scores(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Average a patient's images, and score patients."""
        patients: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if not any(math.isnan(value) for value in row["target"]):
                patients.setdefault(row["patient_id"], []).append(row)
        if not patients:
            return {"loss": math.nan, "auroc": math.nan, "classes_left_out": float(len(self.classes))}
        parts = [torch.tensor([row["logits"] for row in own]).softmax(1).mean(0) for own in patients.values()]
        probabilities = torch.stack(parts)
        target = torch.tensor([own[0]["target"] for own in patients.values()])
        truth, pred = target.argmax(1), probabilities.argmax(1)
        areas = auroc_by_class(probabilities, target, torch.ones_like(target, dtype=torch.bool))
        scored = [index for index, area in enumerate(areas) if area is not None]
        if not scored:
            return {"loss": math.nan, "auroc": math.nan, "classes_left_out": float(len(self.classes))}
        precision = [float(binary_average_precision(probabilities[:, i], target[:, i].long())) for i in scored]
        by_class = multiclass_f1_score(pred, truth, len(self.classes), average="none")
        return {
            "loss": float(F.nll_loss(probabilities.clamp(min=1e-12).log(), truth)),
            "auroc": macro_auroc(probabilities, truth)[0],
            "average_precision": sum(precision) / len(precision),
            "f1_micro": float((pred == truth).float().mean()),
            f"f1_{self.classes[-1]}": float(by_class[-1]),
            "patients": float(len(patients)),
            "classes_left_out": float(len(self.classes) - len(scored)),
        }
