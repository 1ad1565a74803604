"""Regression of measurements from an image: one output each, in units of their training standard deviation.

Letters: B batch, K measurements, S cases.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import all_reduce_sum
from common.downstream.classification import ImageClassifier
from common.downstream.scores import Scores, intervals, measurement_scores, once
from common.types import InputSpec


def squared_errors(pred: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Return the sum over measurements of the mean squared error over the known targets of all ranks, float32.

    Args:
        pred: ``(B, K)``.
        target: ``(B, K)``.
        known: bool ``(B, K)``.
    """
    errors = ((pred.float() - target) ** 2 * known).sum(0)
    counts = all_reduce_sum(known.sum(0)).clamp(min=1)
    return (all_reduce_sum(errors) / counts).sum()


class ImageRegression(ImageClassifier):
    """Fine-tunes on images or volumes with measurements; settings are those of :class:`ImageClassifier`.

    Measurements are standardised by the training images, so that predicting their means scores their number.
    Logs ``val/mse``, the sum over measurements, and ``val/mse_<name>``; testing writes predictions in the units of the
    table.
    """

    monitor = ("val/mse", "min")
    item_name = "cases"

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make encoder and head; mean and standard deviation of the measurements are stored as weights."""
        network = super().build_network(spec)
        network.register_buffer("target_mean", torch.zeros(len(spec.classes)))
        network.register_buffer("target_std", torch.ones(len(spec.classes)))
        return network

    def on_fit_start(self) -> None:
        """Measure mean and spread over the training images, unless a checkpoint provides them (Lightning hook)."""
        if self.trainer.ckpt_path is not None:
            return
        values = torch.tensor(self.trainer.datamodule.training_targets(), dtype=torch.float64)  # type: ignore[attr-defined]
        mean = values.nanmean(0)
        std = ((values - mean) ** 2).nanmean(0).sqrt().clamp(min=1e-6)
        self.network.target_mean.copy_(mean)
        self.network.target_std.copy_(std)

    def standardised(self, target: Tensor) -> Tensor:
        """Return targets ``(B, K)`` in units of the training images."""
        return (target - self.network.target_mean) / self.network.target_std

    def in_units(self, pred: Tensor) -> Tensor:
        """Return predictions ``(..., K)`` in the units of the table."""
        return pred * self.network.target_std + self.network.target_mean

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        loss = squared_errors(self(batch["image"]), self.standardised(batch["target"]), batch["target_mask"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return standardised squared errors, and MAE, RMSE and R2 in the table's units; see :meth:`_scored`.

        Measurements without known targets are left out.
        """
        pred = torch.tensor([row["logits"] for row in rows])
        target = torch.tensor([row["target"] for row in rows])
        known = ~target.isnan()
        errors = (pred - self.standardised(target.to(self.device)).cpu()) ** 2
        by_name = {
            name: float(errors[known[:, index], index].mean())
            for index, name in enumerate(self.classes)
            if known[:, index].any()
        }
        total = sum(by_name.values()) if by_name else math.nan
        scores = {"loss": total, "mse": total} | {f"mse_{name}": value for name, value in by_name.items()}
        return scores | once(self._scored(rows), len(rows))

    def _scored(self, rows: Sequence[Mapping[str, Any]]) -> Callable[[Any], Scores]:
        """Return the scores of collected rows in the units of the table, for any counting of them."""
        target = torch.tensor([row["target"] for row in rows], dtype=torch.float64)
        pred = self.in_units(torch.tensor([row["logits"] for row in rows]).to(self.device)).double().cpu()
        return partial(measurement_scores, self.classes, pred.numpy(), target.numpy())

    def test_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the intervals of MAE, RMSE and R2 under resampling of patients."""
        score = self._scored(rows)
        return intervals(score, [row["patient_id"] for row in rows], once(score, len(rows)))

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the errors in words."""
        own = [f"{name} MAE {metrics[f'mae_{name}']:.4g}, R2 {metrics[f'r2_{name}']:.3f}"
               for name in self.classes if f"mae_{name}" in metrics]  # fmt: skip
        return f"sum of squared errors {metrics['mse']:.3f} (the mean scores {len(self.classes)}); {'; '.join(own)}"

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return one line of the table: names, then prediction and target (empty: unknown) of each measurement."""
        line = {"subject_id": row["subject_id"], "patient_id": row["patient_id"]}
        values = self.in_units(torch.tensor(row["logits"], device=self.device)).tolist()
        for name, value, target in zip(self.classes, values, row["target"], strict=True):
            line |= {f"predicted_{name}": value, f"target_{name}": "" if math.isnan(target) else target}
        return line

    def predicted(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return the measurements in the units of the table."""
        names = [f"predicted_{name}" for name in self.classes]
        return [dict(zip(names, row, strict=True)) for row in self.in_units(logits).tolist()]
