"""Classification of volumes by a fine-tuned encoder: one of several classes, scored by accuracy, AUROC and F1.

Letters: B batch, C channels, K classes, H W D space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from common.blocks.uniformer import UniFormer3D
from common.distributed import all_reduce_sum
from common.downstream.base import ScoredTask
from common.downstream.classification import macro_auroc
from common.downstream.encoder import EncoderFactory, mean_features
from common.optim import OptimizerConfig
from common.types import InputSpec
from common.weights.channels import NewChannels
from experiments.brainmvp.segmentation import augmented


class VolumeClassifier(nn.Module):
    """An encoder, the mean over its map, and a linear layer or an MLP.

    Args:
        encoder: With ``num_features`` and ``forward_features``.
        num_classes: K.
        hidden: Width of the MLP's one hidden layer; 0 makes it a linear layer.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        width = int(encoder.num_features)  # type: ignore[arg-type]
        self.head: nn.Module = nn.Linear(width, num_classes)
        if hidden:
            self.head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, num_classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of ``(B, C, H, W, D)``."""
        return self.head(mean_features(self.encoder, image))


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy, weighted by class and averaged by weight over the samples of all ranks, float32.

    Args:
        logits: ``(B, K)``.
        target: long ``(B,)``.
        weight: ``(K,)``.
    """
    losses = F.cross_entropy(logits.float(), target, weight=weight, reduction="sum")
    return all_reduce_sum(losses) / all_reduce_sum(weight[target].sum())


class BrainClassification(ScoredTask):
    """Fine-tunes all weights on volumes with one class each.

    Classes count equally in the loss, however many cases they have: what the public code's sampler does in the mean.
    Validation logs ``val/auroc`` (over the classes that occur; NaN where one alone does), ``val/classes_left_out``,
    ``val/accuracy``, ``val/f1`` and ``val/loss``; testing writes ``metrics.json`` and ``per_case.csv``.

    Args:
        pretrained: Run folder, checkpoint or export to start from; None trains from scratch.
        encoder: Makes the encoder from (channels, image size) where nothing is pre-trained.
        hidden: Width of the head's hidden layer; 0 = a linear head.
        augment: Whether to mirror crops and change their intensities.
        optimization: How the weights are updated.
        new_channels: How channels that the pre-trained encoder lacks are initialised: ``"mean"`` of those it has, or
            ``"fresh"``, at random.
    """

    monitor = ("val/auroc", "max")
    remembered = ("channels", "image_size", "classes")

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = UniFormer3D,
        hidden: int = 0,
        augment: bool = True,
        optimization: OptimizerConfig = OptimizerConfig(),
        new_channels: NewChannels = "mean",
    ) -> None:
        super().__init__(pretrained, encoder, optimization=optimization, new_channels=new_channels)
        self.save_hyperparameters()
        self.hidden, self.augment = hidden, augment
        self._weight: Tensor | None = None

    def build_network(self, spec: InputSpec) -> VolumeClassifier:
        """Make encoder and head."""
        return VolumeClassifier(self.build_encoder(spec), len(spec.classes), self.hidden)

    def on_fit_start(self) -> None:
        """Weigh the classes by how rare they are in training (Lightning hook)."""
        counts = torch.tensor(self.trainer.datamodule.class_counts(), dtype=torch.float32)  # type: ignore[attr-defined]
        self._weight = (counts.sum() / (len(counts) * counts.clamp(min=1))).to(self.device)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, K)``."""
        return self.network(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        image = batch["image"]
        if self.augment:
            (image,), _ = augmented(batch["key"], [image], image[:, :1])
        assert self._weight is not None
        loss = weighted_cross_entropy(self(image), batch["target"], self._weight)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return names, logits and class of each case of a batch."""
        logits = self(batch["image"]).float().cpu()
        columns = zip(batch["subject_id"], batch["patient_id"], logits.tolist(), batch["target"].tolist(), strict=True)
        return [
            {"subject_id": subject, "patient_id": patient, "logits": row, "target": target}
            for subject, patient, row, target in columns
        ]

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return loss, accuracy, F1 and AUROC over collected rows."""
        logits = torch.tensor([row["logits"] for row in rows])
        target = torch.tensor([row["target"] for row in rows])
        classes = logits.shape[1]
        scores = {
            "loss": float(F.cross_entropy(logits, target)),
            "accuracy": float(multiclass_accuracy(logits, target, classes, average="micro")),
            "f1": float(multiclass_f1_score(logits, target, classes, average="macro")),
        }
        scores["auroc"], left_out = macro_auroc(logits.softmax(1), target)
        return scores | {"classes_left_out": float(left_out)}

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return names, true class and the probability of each class."""
        names = list(self.spec.classes)
        shares = torch.tensor(row["logits"]).softmax(0).tolist()
        line = {"subject_id": row["subject_id"], "patient_id": row["patient_id"]}
        return line | {"target": names[row["target"]]} | dict(zip(names, shares, strict=True))

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return accuracy, AUROC and F1 in words."""
        return f"accuracy {metrics['accuracy']:.3f}, AUROC {metrics['auroc']:.3f}, F1 {metrics['f1']:.3f}"
