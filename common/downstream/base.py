"""What every fine-tuned module shares: its encoder, its optimiser, and one row a case, gathered over ranks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from common.blocks.vit import VisionTransformer
from common.distributed import gather_objects
from common.downstream.encoder import EncoderFactory, encoder_architecture, make_encoder
from common.module import BuiltFromData
from common.optim import Schedule, WarmupCosine, param_groups
from common.reporting import write_rows
from common.types import InputSpec


class FineTuning(BuiltFromData):
    """A downstream task on a pre-trained encoder.

    Subclasses call ``save_hyperparameters()``, make their network from :meth:`build_encoder` in ``build_network``, add
    one row a case to ``self.rows`` while they validate or test, and read them back with :meth:`take_rows`.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to start from; None trains from scratch.
        encoder: Makes the encoder from (channels, image size) where nothing is pre-trained.
        optimizer: Makes the optimiser from parameter groups.
        schedule: Attaches a learning-rate schedule for a number of optimiser steps.
        layer_decay: Factor of the learning rate per encoder layer towards the input.
        compile_network: Whether to compile the network.
        encoder_record: Architecture of the encoder, as a checkpoint remembers it.
    """

    def __init__(
        self,
        pretrained: str | None,
        encoder: EncoderFactory = VisionTransformer,
        *,
        optimizer: OptimizerCallable,
        schedule: Schedule | None = None,
        layer_decay: float = 1.0,
        compile_network: bool = False,
        encoder_record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = None
        self.compile_network = compile_network
        self.rows: list[dict[str, Any]] = []
        self._pretrained, self._make_encoder, self._record = pretrained, encoder, encoder_record
        self._make_optimizer, self._make_schedule = optimizer, schedule or WarmupCosine()
        self._layer_decay = layer_decay

    def build_encoder(self, spec: InputSpec) -> nn.Module:
        """Make the encoder, and remember its architecture for checkpoints."""
        encoder = make_encoder(spec, self._pretrained, self._make_encoder, self._record)
        self.hparams["encoder_record"] = encoder_architecture(encoder)
        return encoder

    def take_rows(self) -> list[dict[str, Any]]:
        """Return the rows of all ranks by ``subject_id``, the same on each, and forget them."""
        rows = [row for part in gather_objects(self.rows) for row in part]
        self.rows = []
        return sorted(rows, key=lambda row: row["subject_id"])

    def write_scores(self, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
        """Write ``per_case.csv`` and ``metrics.json`` into the run folder."""
        folder = Path(self.trainer.default_root_dir)
        write_rows(folder / "per_case.csv", rows)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))

    def configure_optimizers(self) -> Any:
        """Make the optimiser and its schedule (Lightning hook)."""
        optimizer = self._make_optimizer(param_groups(self, self._layer_decay))
        schedule = self._make_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
