"""Classification of images by a fine-tuned encoder: one logit per class, scored by AUROC.

Letters: B batch, C channels, K classes, E feature width.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from common.blocks.vit import VisionTransformer
from common.distributed import all_reduce_sum
from common.downstream.base import ScoredTask
from common.downstream.encoder import EncoderFactory, mean_features
from common.errors import UserError
from common.optim import OptimizerConfig
from common.runtime.reporting import is_dry_run, print_line, write_rows
from common.types import InputSpec


class ClassifierNetwork(nn.Module):
    """An encoder, the mean over its patch tokens, a fresh LayerNorm and a linear layer (MRM, fine-tuning recipe).

    The encoder's final norm is removed; its position embeddings are trained.

    Args:
        encoder: With ``num_features`` and ``forward_features``.
        num_classes: K.
        norm_eps: Added to the variance in the LayerNorm.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        if isinstance(encoder, VisionTransformer):
            encoder.norm = nn.Identity()  # type: ignore[assignment]
            encoder.pos_embed.requires_grad_(True)
        self.encoder = encoder
        width = int(encoder.num_features)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width, norm_eps)
        self.head = nn.Linear(width, num_classes)
        trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of images ``(B, C, H, W)``; a single channel is repeated."""
        return self.head(self.norm(mean_features(self.encoder, image)))


def masked_binary_cross_entropy(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the known targets of all ranks, float32.

    Args:
        logits: ``(B, K)``.
        target: ``(B, K)``, 0 or 1.
        mask: bool ``(B, K)``, True = known. With nothing known the loss is 0, with a graph.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), target, weight=mask.float(), reduction="sum")
    return all_reduce_sum(losses) / all_reduce_sum(mask.sum()).clamp(min=1)


def auroc_by_class(scores: Tensor, target: Tensor, mask: Tensor) -> list[float | None]:
    """Return the AUROC of each class; None if its known targets are all equal.

    torchmetrics returns 0 for such a class, which would silently lower the mean.

    Args:
        scores: ``(S, K)``.
        target: ``(S, K)``, 0 or 1.
        mask: bool ``(S, K)``, True = known.
    """
    result: list[float | None] = []
    for index in range(scores.shape[1]):
        known = mask[:, index]
        truth = target[known, index].long()
        both = len(truth.unique()) == 2
        result.append(float(binary_auroc(scores[known, index], truth)) if both else None)
    return result


def macro_auroc(probabilities: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the mean one-against-rest AUROC over the classes that have both values, and how many lack one.

    NaN if no class has: a class that does not occur has no AUROC, and counting it as 0 would be wrong.

    Args:
        probabilities: ``(S, K)``.
        labels: long ``(S,)``.
    """
    target = F.one_hot(labels, probabilities.shape[1])
    areas = auroc_by_class(probabilities, target, torch.ones_like(target, dtype=torch.bool))
    scored = [area for area in areas if area is not None]
    return (sum(scored) / len(scored) if scored else math.nan), len(areas) - len(scored)


class ImageClassifier(ScoredTask):
    """Fine-tunes all weights on labelled images.

    Validation logs ``val/auroc``, the mean over the classes that have both values, ``val/auroc_<class>``,
    ``val/classes_left_out`` and ``val/loss``. Testing writes ``metrics.json`` and ``per_case.csv``.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to start from; None: from scratch.
        encoder: Makes the encoder from (channels, image size) without pre-training.
        drop_path: Rate of stochastic depth in the last block of the encoder.
        optimization: How the weights are updated.
    """

    monitor = ("val/auroc", "max")
    remembered = ("channels", "image_size", "classes")
    item_name = "images"

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = VisionTransformer,
        drop_path: float = 0.1,
        optimization: OptimizerConfig = OptimizerConfig(torch.optim.SGD),
    ) -> None:
        super().__init__(
            pretrained,
            encoder,
            optimization=optimization,
        )
        self.save_hyperparameters()
        self._drop_path = drop_path

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.spec.classes)

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make encoder and head.

        Raises:
            UserError: the dataset defines no classes.
        """
        if not spec.classes:
            raise UserError("The dataset defines no classes; classification needs labelled images.")
        encoder = self.build_encoder(spec)
        if isinstance(encoder, VisionTransformer):
            encoder.set_drop_path(self._drop_path)
        return ClassifierNetwork(encoder, len(spec.classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, K)``."""
        return self.network(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        loss = masked_binary_cross_entropy(self(batch["image"]), batch["target"], batch["target_mask"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return names, logits and targets (NaN = unknown) of a batch."""
        logits = self(batch["image"]).float().cpu()
        columns = (batch["subject_id"], batch["patient_id"], logits, batch["target"].cpu(), batch["target_mask"].cpu())
        return [
            {"subject_id": subject, "patient_id": patient, "logits": row.tolist(),
             "target": target.where(known, math.nan).tolist()}
            for subject, patient, row, target, known in zip(*columns, strict=True)
        ]  # fmt: skip

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return loss and AUROC over collected rows; the mean is NaN if no class has both values."""
        logits = torch.tensor([row["logits"] for row in rows])
        target = torch.tensor([row["target"] for row in rows])
        known = ~target.isnan()
        target = target.where(known, 0.0)
        losses = F.binary_cross_entropy_with_logits(logits, target, weight=known.float(), reduction="sum")
        by_class = dict(zip(self.classes, auroc_by_class(logits, target, known), strict=True))
        scored = {name: value for name, value in by_class.items() if value is not None}
        mean = sum(scored.values()) / len(scored) if scored else math.nan
        scores = {"loss": float(losses / known.sum().clamp(min=1)), "auroc": mean}
        scores["classes_left_out"] = float(len(by_class) - len(scored))
        return scores | ({f"auroc_{name}": value for name, value in scored.items()} if len(by_class) > 1 else {})

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the AUROC in words."""
        scored = len(self.classes) - int(metrics["classes_left_out"])
        return (
            f"mean AUROC {metrics['auroc']:.3f} over {scored} of {len(self.classes)} classes (those with both values)"
        )

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return one line of the table: names, then score and target (empty: unknown) of each class."""
        line = {"subject_id": row["subject_id"], "patient_id": row["patient_id"]}
        scores = torch.tensor(row["logits"]).sigmoid().tolist()
        for name, score, target in zip(self.classes, scores, row["target"], strict=True):
            line |= {f"score_{name}": score, f"target_{name}": "" if math.isnan(target) else target}
        return line

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return the scores of a batch by image, and keep them for ``predictions.csv`` (Lightning hook)."""
        scores = self(batch["image"]).float().sigmoid().tolist()
        names = [f"score_{name}" for name in self.classes]
        rows = [
            {"subject_id": subject, **dict(zip(names, row, strict=True))}
            for subject, row in zip(batch["subject_id"], scores, strict=True)
        ]
        self.rows += rows
        return rows

    def on_predict_epoch_end(self) -> None:
        """Write ``predictions.csv`` (Lightning hook)."""
        rows = self.take_rows()
        if self.trainer.is_global_zero and not is_dry_run(self.trainer):
            path = Path(self.trainer.default_root_dir) / "predictions.csv"
            write_rows(path, rows)
            print_line(f"predicted {len(rows)} images: {path}")
