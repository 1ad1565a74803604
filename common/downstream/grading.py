"""Grades of a disease from images: ordinal targets scored by quadratic kappa, or exclusive classes.

Letters: B batch, K outputs, S cases.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_average_precision, multiclass_cohen_kappa, multiclass_f1_score

from common.distributed import all_reduce_sum
from common.downstream.classification import (
    ImageClassifier,
    auroc_by_class,
    macro_auroc,
    masked_binary_cross_entropy,
)
from common.downstream.encoder import mean_features
from common.errors import UserError
from common.metrics import central_interval, resampled_counts, weighted_quadratic_kappa
from common.runtime.reporting import print_line
from common.types import InputSpec


def decode_ordinal(logits: Tensor) -> Tensor:
    """Decode ordinal logits ``(S, K)`` into grades: the number of probabilities above one half, minus one."""
    return ((logits.sigmoid() > 0.5).sum(1) - 1).clamp(min=0)


def severity(logits: Tensor) -> Tensor:
    """Return the expected grade ``(S,)`` of ordinal logits ``(S, K)``."""
    return logits.sigmoid().sum(1) - 1


def matched_thresholds(scores: Tensor, grades: Tensor, classes: int) -> Tensor:
    """Return the thresholds ``(classes - 1,)`` that give training predictions the training grades' distribution.

    Args:
        scores: ``(S,)``, severity of the training images.
        grades: long ``(S,)``, their grades.
        classes: Number of grades.
    """
    shares = torch.stack([(grades < grade).double().mean() for grade in range(1, classes)])
    return torch.quantile(scores.double(), shares)


def apply_thresholds(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Return the grade of each score ``(S,)``: the number of thresholds it reaches."""
    return (scores.double()[:, None] >= thresholds).sum(1)


def quadratic_kappa(pred: Tensor, grades: Tensor, classes: int) -> float:
    """Return Cohen's kappa with quadratic weights; NaN if all predictions and grades are the same."""
    return float(multiclass_cohen_kappa(pred, grades, classes, weights="quadratic"))


def bootstrap_kappa(pred: Tensor, grades: Tensor) -> tuple[float, float]:
    """Return the central 95 % of kappa under resampling of cases; draws without a kappa are left out."""
    counts = resampled_counts(range(len(pred)))
    return central_interval(weighted_quadratic_kappa(pred.numpy(), grades.numpy(), counts))


def _graded(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keep the rows whose target is known."""
    return [row for row in rows if not any(math.isnan(value) for value in row["target"])]


class RidgeNetwork(nn.Module):
    """A frozen encoder and ridge regression of the targets on its features, read as probabilities.

    Args:
        encoder: With ``num_features`` and ``forward_features``.
        num_classes: K.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.head = nn.Linear(int(encoder.num_features), num_classes).requires_grad_(False)  # type: ignore[arg-type]

    @torch.no_grad()
    def fit(self, batches: Iterable[Mapping[str, Any]]) -> float:
        """Fit the head to batches with ``image`` and ``target``; return the penalty, chosen by leave-one-out.

        Features are standardised over the images, so that the penalty is comparable between encoders.

        Raises:
            UserError: there is no batch.
        """
        device = self.head.weight.device
        pairs = [(mean_features(self.encoder, batch["image"].to(device)).cpu(), batch["target"]) for batch in batches]
        if not pairs:
            raise UserError("There is no training image to fit the ridge head to.")
        features, targets = (torch.cat(parts).double().numpy() for parts in zip(*pairs, strict=True))
        scaler = StandardScaler().fit(features)
        ridge = RidgeCV(np.logspace(-1, 6, 29)).fit(scaler.transform(features), targets)
        weight = ridge.coef_ / scaler.scale_
        self.head.weight.copy_(torch.from_numpy(weight))
        self.head.bias.copy_(torch.from_numpy(ridge.intercept_ - weight @ scaler.mean_))
        return float(ridge.alpha_)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of images ``(B, C, H, W)``."""
        return self.head(mean_features(self.encoder, image)).clamp(1e-6, 1 - 1e-6).logit()


class GradeClassifier(ImageClassifier):
    """Fine-tunes all weights on graded images; :class:`ImageClassifier` lists what else is logged.

    Ordinal targets (the first c + 1 of K outputs are 1 at grade c) are trained with binary cross-entropy and scored by
    quadratic kappa, ``val/kappa``; exclusive ones with cross-entropy, their probabilities averaged over a patient's
    images, and scored by AUROC, average precision, and F1.

    Args:
        targets: ``"ordinal"`` or ``"exclusive"``.
        decision: How testing turns an ordinal prediction into a grade: ``"half"`` counts the outputs above one half;
            ``"matched"`` sets thresholds on the expected grade so that the training images get the distribution
            of their true grades.
        ridge: Whether the encoder stays frozen and the head is a ridge regression of the targets on its features,
            fitted to the training images at test time. There is no training before that.
        **settings: Those of :class:`ImageClassifier`.
    """

    monitor = ("val/kappa", "max")

    def __init__(
        self,
        targets: Literal["ordinal", "exclusive"] = "ordinal",
        decision: Literal["half", "matched"] = "half",
        ridge: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.targets, self.decision, self._ridge = targets, decision, ridge
        if ridge:
            self.new_channels = "refuse"
        self._thresholds: Tensor | None = None
        if targets == "exclusive":
            self.monitor = ("val/auroc", "max")

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make encoder and head."""
        return RidgeNetwork(self.build_encoder(spec), len(spec.classes)) if self._ridge else super().build_network(spec)

    def on_fit_start(self) -> None:
        """Refuse to train a head that is fitted in closed form (Lightning hook).

        Raises:
            UserError: the head is a ridge regression.
        """
        if self._ridge:
            raise UserError("A ridge head is fitted to the training images when it is tested: leave fit out.")

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
        """Fit a ridge head and set the thresholds, both on the training images (Lightning hook).

        Raises:
            UserError: the data module has no training images.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self._ridge:
            print_line(f"ridge: penalty {self.network.fit(data.central_samples(('train',))):.3g}")
        if self.targets != "ordinal" or self.decision != "matched":
            return
        logits, grades = [], []
        for batch in data.central_samples(("train",)):
            logits.append(self(batch["image"].to(self.device)).float().cpu())
            grades.append((batch["target"].sum(1) - 1).long())
        if not logits:
            raise UserError("There is no training image to set thresholds by: set model.decision to half.")
        self._thresholds = matched_thresholds(severity(torch.cat(logits)), torch.cat(grades), len(self.classes))

    def _grades(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return predicted and true grades ``(S,)`` of collected rows."""
        logits = torch.tensor([row["logits"] for row in rows])
        grades = (torch.tensor([row["target"] for row in rows]).sum(1) - 1).long()
        if self._thresholds is None:
            return decode_ordinal(logits), grades
        return apply_thresholds(severity(logits), self._thresholds), grades

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return one line of the table; ordinal ones have the grades ``pred`` and ``target`` as well."""
        line = super().line(row)
        if self.targets == "ordinal" and _graded([row]):
            pred, grade = self._grades([row])
            line |= {"pred": int(pred), "target": int(grade)}
        return line

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics over collected rows; images without a grade are left out."""
        if self.targets == "exclusive":
            return self._exclusive_metrics(rows)
        metrics, graded = super().metrics(rows), _graded(rows)
        if not graded:
            return metrics | {"kappa": math.nan, "accuracy": math.nan}
        pred, grades = self._grades(graded)
        kappa = quadratic_kappa(pred, grades, len(self.classes))
        return metrics | {"kappa": kappa, "accuracy": float((pred == grades).float().mean())}

    def test_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the interval of kappa under resampling of images."""
        graded = _graded(rows)
        if self.targets == "exclusive" or not graded:
            return {}
        low, high = bootstrap_kappa(*self._grades(graded))
        return {"kappa_low": low, "kappa_high": high}

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return kappa, or else AUROC, in words."""
        if self.targets == "exclusive":
            return super().verdict(metrics)
        return f"quadratic kappa {metrics['kappa']:.3f}, accuracy {metrics['accuracy']:.3f}"

    def _exclusive_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Average a patient's images, and score patients."""
        patients: dict[str, list[Mapping[str, Any]]] = {}
        for row in _graded(rows):
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
