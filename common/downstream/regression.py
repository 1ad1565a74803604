"""Regression of measurements from an image: one output each, in units of their training standard deviation.

Letters: B batch, K measurements, S cases.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import all_reduce_sum
from common.downstream.classification import ImageClassifier
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
    """Fine-tunes all weights on images with measurements; settings are those of :class:`ImageClassifier`.

    Measurements are standardised by the training images, so that predicting their means scores their number.
    Logs ``val/mse``, the sum over measurements, and ``val/mse_<name>``; testing writes predictions in the units of the
    table.
    """

    monitor = ("val/mse", "min")

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
        images = self.trainer.datamodule.splits["train"]  # type: ignore[attr-defined]
        values = torch.tensor([item.targets for item in images], dtype=torch.float64)
        mean = values.nanmean(0)
        std = ((values - mean) ** 2).nanmean(0).sqrt().clamp(min=1e-6)
        self.network.target_mean.copy_(mean)
        self.network.target_std.copy_(std)

    def standardised(self, target: Tensor) -> Tensor:
        """Return targets ``(B, K)`` in units of the training images."""
        return (target - self.network.target_mean) / self.network.target_std

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        loss = squared_errors(self(batch["image"]), self.standardised(batch["target"]), batch["target_mask"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the mean squared errors of collected rows; measurements without known targets are left out."""
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
        return {"loss": total, "mse": total} | {f"mse_{name}": value for name, value in by_name.items()}

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the error in words."""
        return f"sum of squared errors {metrics['mse']:.3f}; predicting the mean would score {len(self.classes)}"

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return one line of the table: names, then prediction and target (empty: unknown) of each measurement."""
        line = {"subject_id": row["subject_id"], "patient_id": row["patient_id"]}
        mean, std = self.network.target_mean.cpu(), self.network.target_std.cpu()
        values = (torch.tensor(row["logits"]) * std + mean).tolist()
        for name, value, target in zip(self.classes, values, row["target"], strict=True):
            line |= {f"predicted_{name}": value, f"target_{name}": "" if math.isnan(target) else target}
        return line

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return the predictions of a batch, and keep them for ``predictions.csv`` (Lightning hook)."""
        values = self(batch["image"]).float() * self.network.target_std + self.network.target_mean
        rows = [
            {"subject_id": subject, **{f"predicted_{n}": v for n, v in zip(self.classes, row, strict=True)}}
            for subject, row in zip(batch["subject_id"], values.tolist(), strict=True)
        ]
        self.rows += rows
        return rows
