"""Segmentation of regions in volumes, from a pre-trained encoder or from scratch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from common.blocks.unetr import UNETR
from common.blocks.vit import VisionTransformer
from common.downstream.base import FineTuning
from common.downstream.encoder import EncoderFactory
from common.losses.region import RegionDiceBCE
from common.metrics import region_dice, region_hd95
from common.optim import OptimizerConfig
from common.runtime.reporting import log_scalars, print_line
from common.types import InputSpec
from common.weights.channels import NewChannels

NetworkFactory = Callable[[VisionTransformer, int], nn.Module]
WindowMode = Literal["constant", "gaussian"]

_FLIPS = ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4))


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, standard deviation over cases and n of every numeric column, and the number of empty references."""
    summary: dict[str, Any] = {"n": len(rows)}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if name.startswith("empty_"):
            summary[name] = {kind: values.count(kind) for kind in ("neither", "prediction", "reference", "both")}
        elif isinstance(values[0], float):
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
            summary[name] = {"mean": mean, "std": spread, "n": len(values)}
    return summary


class SegmentationModule(FineTuning):
    """Trains a segmentation network on crops and scores whole volumes through a sliding window.

    Validation logs ``val/dice`` and one Dice per region. Testing adds HD95 in mm and writes ``metrics.json`` and
    ``per_case.csv`` into the run folder; predicting gives label volumes on the source grid.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to start from; None: from scratch.
        network: Makes the network from (encoder, regions).
        encoder: Makes the encoder from (channels, image size) without pre-training.
        dropout: Rate of every dropout in the encoder.
        loss: Compares logits and targets ``(B, R, *space)``.
        overlap: Overlap of neighbouring windows.
        window_batch: Windows computed at once.
        window_mode: How overlapping windows are averaged: with equal weights, or more weight at the centre.
        flip_ensemble: Whether to average over all mirrored versions at test time.
        optimization: How the weights are updated.
        new_channels: Initial weights of channels that the pre-trained encoder does not know: ``"mean"`` of the known
            ones, or ``"fresh"``, random.
    """

    monitor = ("val/dice", "max")
    remembered = ("channels", "image_size", "regions")

    def __init__(
        self,
        pretrained: str | None = None,
        network: NetworkFactory = UNETR,
        encoder: EncoderFactory = VisionTransformer,
        dropout: float = 0.0,
        loss: nn.Module | None = None,
        overlap: float = 0.5,
        window_batch: int = 2,
        window_mode: WindowMode = "gaussian",
        flip_ensemble: bool = False,
        optimization: OptimizerConfig = OptimizerConfig(),
        new_channels: NewChannels = "mean",
    ) -> None:
        super().__init__(
            pretrained,
            encoder,
            optimization=optimization,
            new_channels=new_channels,
        )
        self.save_hyperparameters()
        self.loss = loss or RegionDiceBCE()
        self._make_network, self._dropout = network, dropout
        self._overlap, self._window_batch, self._flip_ensemble = overlap, window_batch, flip_ensemble
        self._window_mode = window_mode
        self._predict: SlidingWindowInferer | None = None

    def build_network(self, spec: InputSpec) -> nn.Module:
        """Make the network around the encoder."""
        encoder = self.build_encoder(spec)
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = self._dropout
        return self._make_network(cast(VisionTransformer, encoder), len(spec.regions))

    @property
    def regions(self) -> Mapping[str, Sequence[int]]:
        """Region to label values, in the order of the output channels."""
        return self.spec.regions

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, R, H, W, D)`` for crops."""
        return self.network(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of crops (Lightning hook)."""
        loss = self.loss(self(batch["image"]), batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def logits(self, image: Tensor) -> Tensor:
        """Return logits ``(B, R, X, Y, Z)`` of whole volumes ``(B, C, X, Y, Z)``."""
        if self._predict is None:
            size = [int(n) for n in self.spec.image_size]
            self._predict = SlidingWindowInferer(size, self._window_batch, self._overlap, mode=self._window_mode)
        logits = torch.zeros(())
        flips = _FLIPS if self._flip_ensemble else _FLIPS[:1]
        for axes in flips:
            output = cast(Tensor, self._predict(image.flip(axes) if axes else image, self.network))
            logits = logits.to(output) + (output.flip(axes) if axes else output)
        return logits / len(flips)

    def segment(self, image: Tensor) -> Tensor:
        """Segment whole volumes ``(B, C, X, Y, Z)`` to bool ``(B, R, X, Y, Z)``."""
        return self.logits(image) > 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score one volume by Dice (Lightning hook)."""
        self._score(batch, distance=False)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score one volume by Dice and HD95 (Lightning hook)."""
        self._score(batch, distance=True)

    def inputs(self, batch: Any) -> Tensor:
        """Return a batch's volumes ``(B, C, X, Y, Z)`` to segment."""
        return batch["image"]

    def _score(self, batch: Any, distance: bool) -> None:
        logits, target = self.logits(self.inputs(batch)), batch["label"] > 0.5
        pred, dice = logits > 0, region_dice(logits > 0, target)
        for index, subject in enumerate(batch["subject_id"]):
            row: dict[str, Any] = {"subject_id": subject}
            row |= {f"dice_{name}": float(dice[index, r]) for r, name in enumerate(self.regions)}
            row["loss"] = float(self.loss(logits[index : index + 1], batch["label"][index : index + 1]))
            if distance:
                record, one = batch["record"][index], slice(index, index + 1)
                hd95 = region_hd95(pred[one], target[one], record.source_diagonal, record.spacing)[0]
                row |= {f"hd95_{name}": float(hd95[r]) for r, name in enumerate(self.regions)}
                row |= {
                    f"empty_{name}": self._emptiness(pred[index, r], target[index, r])
                    for r, name in enumerate(self.regions)
                }
            self.rows.append(row)

    @staticmethod
    def _emptiness(pred: Tensor, target: Tensor) -> str:
        return {(True, True): "neither", (False, True): "prediction", (True, False): "reference"}.get(
            (bool(pred.any()), bool(target.any())), "both"
        )

    def on_validation_epoch_end(self) -> None:
        """Log mean loss and Dice over the cases of all ranks (Lightning hook)."""
        summary = summarise(self.take_rows())
        dice = {f"val/{name}": value["mean"] for name, value in summary.items() if name.startswith("dice_")}
        if dice:
            means = {"val/dice": sum(dice.values()) / len(dice), "val/loss": summary["loss"]["mean"]}
            log_scalars(self, dice | means, prog_bar=("val/dice",))

    def on_test_epoch_end(self) -> None:
        """Write ``metrics.json`` and ``per_case.csv``, and print the table (Lightning hook)."""
        rows = self.take_rows()
        summary = summarise(rows) | self.further_scores(rows)
        if self.trainer.is_global_zero:
            self.write_scores(rows, summary)
            for name in self.regions:
                dice, hd95 = summary[f"dice_{name}"], summary[f"hd95_{name}"]
                print_line(f"{name}: Dice {100 * dice['mean']:.2f} +- {100 * dice['std']:.2f} %, "
                    f"HD95 {hd95['mean']:.2f} +- {hd95['std']:.2f} mm, {summary['n']} cases, "
                    f"empty {summary[f'empty_{name}']}")  # fmt: skip
        log_scalars(
            self,
            {f"test/{name}": v["mean"] for name, v in summary.items() if name.startswith(("dice", "hd95", "loss"))},
        )

    def further_scores(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return further entries of ``metrics.json``; called by all ranks at the end of a test."""
        return {}

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return one label volume per case, with what it takes to map it to its source grid (Lightning hook)."""
        regions = self.segment(self.inputs(batch))
        names = zip(batch["subject_id"], batch["record"], strict=True)
        return [
            {"subject_id": subject, "record": record, "label": merge_regions(regions[index], self.regions)}
            for index, (subject, record) in enumerate(names)
        ]


def merge_regions(regions: Tensor, values: Mapping[str, Sequence[int]]) -> Tensor:
    """Turn region masks into one label volume.

    Larger regions are written first and smaller ones over them, each with the value that the regions inside it do not
    have (whole tumour 2, core 1, enhancing 3 in BraTS 2023).

    Args:
        regions: bool ``(R, X, Y, Z)``.
        values: Region to label values, in the order of the channels.

    Returns:
        uint8 ``(X, Y, Z)`` on the CPU.
    """
    label = torch.zeros(regions.shape[1:], dtype=torch.uint8)
    order = sorted(range(len(values)), key=lambda i: -len(list(values.values())[i]))
    sets = [set(v) for v in values.values()]
    for index in order:
        inside = set().union(*(s for i, s in enumerate(sets) if i != index and s < sets[index]))
        own = sorted(sets[index] - inside) or sorted(sets[index])
        label[regions[index].cpu()] = own[0]
    return label
