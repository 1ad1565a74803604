"""Segmentation of structures that may overlap, each scored on the grid of the image's file.

Letters: B batch, R structures, H W the network's grid, X Y the grid of a file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.unetr import UNETR
from common.blocks.vit import VisionTransformer
from common.distributed import all_reduce_sum
from common.downstream.base import ScoredTask
from common.downstream.encoder import EncoderFactory
from common.errors import UserError
from common.metrics import region_dice
from common.optim import OptimizerConfig
from common.types import InputSpec

NetworkFactory = Callable[[VisionTransformer, int], nn.Module]


def dice_and_cross_entropy(
    logits: Tensor, label: Tensor, dice_weight: float = 0.8, sync: bool = True, eps: float = 1.0
) -> Tensor:
    """Soft Dice of each structure over the samples, plus binary cross-entropy (ContIG's weights), float32.

    Args:
        logits: ``(B, R, H, W)``.
        label: ``(B, R, H, W)``, 0 or 1.
        dice_weight: Weight of the Dice term; cross-entropy gets the rest.
        sync: Whether the means run over the samples of all ranks.
        eps: Added to numerator and denominator of Dice, so that an absent structure that is not predicted costs 0.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, label = logits.float(), label.float()
        share = logits.sigmoid()
        overlap, total = (share * label).sum((2, 3)), (share + label).sum((2, 3))
        dice = 1 - (2 * overlap + eps) / (total + eps)
        entropy = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean((1, 2, 3))
        value = (dice_weight * dice.mean(1) + (1 - dice_weight) * entropy).sum()
        count = torch.tensor(float(len(logits)), device=logits.device)
        if sync:
            value, count = all_reduce_sum(value), all_reduce_sum(count)
        return value / count


class StructureSegmentation(ScoredTask):
    """Fine-tunes all weights on images with masks of structures, one sigmoid each.

    Validation logs ``val/dice_<structure>`` (per image; 1 where neither prediction nor truth has it, 0 where one has),
    their mean ``val/dice``, and ``val/loss``. Testing writes ``metrics.json`` and ``per_case.csv``.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to start from; None: from scratch.
        encoder: Makes the encoder from (channels, image size) without pre-training.
        network: Makes the network from (encoder, structures); it returns logits.
        drop_path: Rate of stochastic depth in the last block of the encoder.
        dice_weight: Weight of the Dice term in the loss.
        optimization: How the weights are updated.
    """

    monitor = ("val/dice", "max")
    remembered = ("channels", "image_size", "regions")
    item_name = "images"

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = VisionTransformer,
        network: NetworkFactory = UNETR,
        drop_path: float = 0.1,
        dice_weight: float = 0.8,
        optimization: OptimizerConfig = OptimizerConfig(layer_decay=0.65),
    ) -> None:
        super().__init__(
            pretrained,
            encoder,
            optimization=optimization,
        )
        self.save_hyperparameters()
        self._make_network, self._drop_path, self._dice_weight = network, drop_path, dice_weight

    @property
    def structures(self) -> list[str]:
        """Names of the structures, in the order of the channels."""
        return list(self.spec.regions)

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make the network around the encoder.

        Raises:
            UserError: the dataset defines no structures.
        """
        if not spec.regions:
            raise UserError("The dataset defines no structures; segmentation needs images with masks.")
        encoder = cast(VisionTransformer, self.build_encoder(spec))
        encoder.set_drop_path(self._drop_path)
        return self._make_network(encoder, len(spec.regions))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, R, H, W)`` of images ``(B, C, H, W)``."""
        return self.network(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        loss = dice_and_cross_entropy(self(batch["image"]), batch["label"], self._dice_weight)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def _found(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """Return where the structures are on the grid of a file, bool ``(R, X, Y)``, from ``(R, H, W)``."""
        return F.interpolate(logits[None].float(), size=tuple(shape), mode="bilinear")[0] > 0

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return Dice and loss of each image of a batch."""
        logits, rows = self(batch["image"]), []
        for index, region in enumerate(batch["region"]):
            truth = torch.as_tensor(region, device=logits.device) > 0
            pred = self._found(logits[index], truth.shape[1:])
            dice = region_dice(pred[None], truth[None])[0].tolist()
            one = slice(index, index + 1)
            loss = dice_and_cross_entropy(logits[one], batch["label"][one], self._dice_weight, sync=False)
            row = {"subject_id": batch["subject_id"][index], "patient_id": batch["patient_id"][index]}
            row |= {f"dice_{name}": value for name, value in zip(self.structures, dice, strict=True)}
            pixels = truth.sum((1, 2)).tolist()
            row |= {f"pixels_{name}": value for name, value in zip(self.structures, pixels, strict=True)}
            rows.append(row | {"loss": float(loss)})
        return rows

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Average over images, and for each structure over those that have it."""
        scores = {"loss": math.fsum(row["loss"] for row in rows) / len(rows)}
        for name in self.structures:
            scores[f"dice_{name}"] = math.fsum(row[f"dice_{name}"] for row in rows) / len(rows)
            having = [row[f"dice_{name}"] for row in rows if row[f"pixels_{name}"]]
            if having:
                scores[f"dice_{name}_positive"] = math.fsum(having) / len(having)
        means = [scores[f"dice_{name}"] for name in self.structures]
        return {"dice": math.fsum(means) / len(means)} | scores

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the Dice of each structure in words."""
        return "Dice " + ", ".join(f"{name} {metrics[f'dice_{name}']:.3f}" for name in self.structures)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return each image's structures as uint8 ``(R, X, Y)`` on the CPU (Lightning hook)."""
        columns = zip(batch["subject_id"], self(batch["image"]), batch["region"], strict=True)
        return [
            {"subject_id": subject, "region": self._found(logits, region.shape[1:]).to(torch.uint8).cpu()}
            for subject, logits, region in columns
        ]
