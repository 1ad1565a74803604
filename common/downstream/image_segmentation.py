"""Segmentation of one kind of region in images, scored on the grids of their files.

Letters: B batch, C channels, H W the network's grid, X Y the grid of a file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.upernet import UPerNet
from common.blocks.vit import VisionTransformer
from common.downstream.base import ScoredTask
from common.downstream.encoder import EncoderFactory
from common.errors import UserError
from common.losses.focal_dice import FocalDice
from common.metrics import region_dice
from common.optim import OptimizerConfig, Schedule, WarmupLinear
from common.types import InputSpec

NetworkFactory = Callable[[VisionTransformer, int], nn.Module]


def on_source_grid(logits: Tensor, size: Sequence[int], source_shape: Sequence[int]) -> Tensor:
    """Crop the padding from an image's logits and map the region to the grid of its file.

    Args:
        logits: ``(2, H, W)``, background and region.
        size: Height and width that the image occupies, at the top left.
        source_shape: X and Y.

    Returns:
        bool ``(X, Y)``, True where the region's probability is above one half.
    """
    image = logits[None, :, : size[0], : size[1]].float()
    resized = F.interpolate(image, size=tuple(source_shape), mode="bilinear")
    return resized.softmax(1)[0, 1] > 0.5


def dice_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average over images.

    Args:
        rows: ``dice``, ``loss`` and ``reference_pixels`` of each image; at least one.

    Returns:
        ``dice`` over all images, ``dice_positive`` over those with a region (omitted if there are none),
        ``dice_all_empty`` of an empty prediction for every image, and ``loss``.
    """
    positive = [row["dice"] for row in rows if row["reference_pixels"]]
    scores = {"dice": math.fsum(row["dice"] for row in rows) / len(rows)}
    if positive:
        scores["dice_positive"] = math.fsum(positive) / len(positive)
    scores["dice_all_empty"] = 1 - len(positive) / len(rows)
    return scores | {"loss": math.fsum(row["loss"] for row in rows) / len(rows)}


class ImageSegmentation(ScoredTask):
    """Fine-tunes all weights on images with masks, a softmax over background and region.

    Validation logs ``val/dice`` (per image; 1 where neither prediction nor truth has a region, 0 where one has),
    ``val/dice_positive``, ``val/dice_all_empty`` and ``val/loss``. Testing writes ``metrics.json`` and
    ``per_case.csv``; predicting gives masks on the grid of the files.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to start from; None: from scratch.
        encoder: Makes the encoder from (channels, image size) without pre-training.
        network: Makes the network from (encoder, regions). It returns a tuple of logits; those after the first
            are only for training.
        drop_path: Rate of stochastic depth in the last block of the encoder.
        loss: Compares logits ``(B, 2, H, W)`` and labels ``(B, 1, H, W)``, and takes ``sync``.
        auxiliary_weight: Weight of the loss of every further output.
        optimization: How the weights are updated.
    """

    monitor = ("val/dice", "max")
    remembered = ("channels", "image_size", "regions")
    item_name = "images"

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = VisionTransformer,
        network: NetworkFactory = UPerNet,
        drop_path: float = 0.1,
        loss: nn.Module | None = None,
        auxiliary_weight: float = 0.4,
        optimization: OptimizerConfig = OptimizerConfig(layer_decay=0.65),
    ) -> None:
        super().__init__(
            pretrained,
            encoder,
            optimization=optimization,
        )
        self.save_hyperparameters()
        self.loss = loss or FocalDice()
        self._make_network, self._drop_path, self._auxiliary_weight = network, drop_path, auxiliary_weight

    def default_schedule(self) -> Schedule:
        """Return the schedule used if the configuration has none."""
        return WarmupLinear()

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make the network around the encoder.

        Raises:
            UserError: the dataset does not define exactly one region.
        """
        if len(spec.regions) != 1:
            raise UserError(f"Exactly one region can be segmented, the dataset defines {len(spec.regions)}.")
        encoder = self.build_encoder(spec)
        vit = cast(VisionTransformer, encoder)
        vit.set_drop_path(self._drop_path)
        return self._make_network(vit, len(spec.regions))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, 2, H, W)`` of images ``(B, C, H, W)``."""
        return self.network(image)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (Lightning hook)."""
        logits, *further = self.network(batch["image"])
        loss = self.loss(logits, batch["label"])
        for auxiliary in further:
            loss = loss + self._auxiliary_weight * self.loss(auxiliary, batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return Dice and loss of each image of a batch."""
        logits, rows = self(batch["image"]), []
        for index, mask in enumerate(batch["region"]):
            truth = torch.as_tensor(mask, device=logits.device) > 0
            pred = on_source_grid(logits[index], batch["size"][index], truth.shape)
            one = slice(index, index + 1)
            rows.append(
                {
                    "subject_id": batch["subject_id"][index],
                    "patient_id": batch["patient_id"][index],
                    "dice": float(region_dice(pred[None, None], truth[None, None])),
                    "loss": float(self.loss(logits[one], batch["label"][one], sync=False)),
                    "reference_pixels": int(truth.sum()),
                    "predicted_pixels": int(pred.sum()),
                }
            )
        return rows

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Average over images; see :func:`dice_scores`."""
        return dice_scores(rows)

    def test_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how many images have a region."""
        return {"positive": float(sum(row["reference_pixels"] > 0 for row in rows))}

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the Dice in words, next to the Dice of an empty prediction."""
        among = ""
        if "dice_positive" in metrics:
            among = f", {100 * metrics['dice_positive']:.2f} % in the {metrics['positive']:.0f} with a region"
        return (f"Dice {100 * metrics['dice']:.2f} %{among}; "
                f"an empty prediction would score {100 * metrics['dice_all_empty']:.2f} %")  # fmt: skip

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return each image's region as uint8 ``(X, Y)`` on the CPU (Lightning hook)."""
        columns = zip(batch["subject_id"], self(batch["image"]), batch["size"], batch["region"], strict=True)
        return [
            {"subject_id": subject, "region": on_source_grid(logits, size, mask.shape).to(torch.uint8).cpu()}
            for subject, logits, size, mask in columns
        ]
