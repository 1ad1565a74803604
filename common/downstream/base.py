"""What all fine-tuned modules share: encoder, optimiser, and one row per case, gathered over ranks."""

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from common.blocks.vit import VisionTransformer
from common.distributed import gather_objects
from common.downstream.encoder import EncoderFactory, encoder_architecture, make_encoder, meet_encoder
from common.files import write_text
from common.module import BuiltFromData
from common.optim import OptimizerConfig
from common.runtime.reporting import log_scalars, print_line, write_rows
from common.types import InputSpec
from common.weights.channels import NewChannels


class FineTuning(BuiltFromData):
    """A downstream task on a pre-trained encoder.

    Subclasses call ``save_hyperparameters()``, make their network from :meth:`build_encoder` in ``build_network``, add
    one row per case to ``self.rows`` while they validate or test, and read them back with :meth:`take_rows`. Most are
    :class:`ScoredTask`, which does the latter.

    Args:
        pretrained: Run folder, checkpoint or export whose encoder to start from; None: from scratch.
        encoder: Makes the encoder from (channels, image size) without pre-training.
        optimization: How the weights are updated.
        new_channels: Initial weights of channels that the pre-trained encoder does not know: the mean of the known
            ones, or random; a frozen encoder refuses them.
    """

    def __init__(
        self,
        pretrained: str | None,
        encoder: EncoderFactory = VisionTransformer,
        optimization: OptimizerConfig = OptimizerConfig(),
        new_channels: NewChannels = "mean",
    ) -> None:
        super().__init__(optimization)
        self.rows: list[dict[str, Any]] = []
        self._pretrained, self._make_encoder = pretrained, encoder
        self.new_channels: NewChannels = new_channels

    def meet_channels(self, datamodule: Any, stored: InputSpec | None) -> InputSpec:
        """Have the data also deliver, as absent, the channels that only the pre-trained encoder knows.

        Raises:
            CheckpointError: the encoder does not know the data's channels, and new channels are not allowed.
        """
        if stored is not None or not self._pretrained or self.state.encoder is not None:
            return super().meet_channels(datamodule, stored)
        return meet_encoder(datamodule, self._pretrained, self.new_channels)

    def build_encoder(self, spec: InputSpec) -> nn.Module:
        """Make the encoder, and record its architecture for checkpoints."""
        encoder = make_encoder(spec, self._pretrained, self._make_encoder, self.state.encoder, self.new_channels)
        report: Any = getattr(encoder, "load_report", None)
        if report is not None and report.channels is not None:
            self.note_channels(report.channels.without(spec.absent), spec)
        self.state = self.state._replace(encoder=encoder_architecture(encoder))
        return encoder

    def take_rows(self) -> list[dict[str, Any]]:
        """Return and clear the rows of all ranks, ordered by ``subject_id``, the same on each rank."""
        rows = [row for part in gather_objects(self.rows) for row in part]
        self.rows = []
        return sorted(rows, key=lambda row: row["subject_id"])

    def write_scores(self, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
        """Write ``per_case.csv`` and ``metrics.json`` into the run folder."""
        folder = Path(self.trainer.default_root_dir)
        write_rows(folder / "per_case.csv", rows)
        seen = getattr(getattr(self.trainer, "datamodule", None), "seen", {})
        facts = {**metrics, "seen_patients": seen} if seen else metrics
        write_text(folder / "metrics.json", json.dumps(facts, indent=2))


class ScoredTask(FineTuning):
    """A task that scores cases one by one in validation and testing; subclasses define the score.

    Validation logs every metric as ``val/<name>``; testing as ``test/<name>``, and writes ``metrics.json`` and
    ``per_case.csv``. The arguments are those of :class:`FineTuning`.
    """

    #: Metric that selects the best checkpoint, and whether its ``"max"`` or ``"min"`` is best.
    monitor: tuple[str, str]
    #: Plural name of the cases in messages.
    item_name = "cases"

    @abstractmethod
    def score(self, batch: Any) -> list[dict[str, Any]]:
        """Return one row per case, with ``subject_id`` and ``patient_id``."""

    @abstractmethod
    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics over the rows of all ranks, ``loss`` among them; NaN if undefined."""

    def test_metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the metrics that only testing computes."""
        return {}

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row for ``per_case.csv``, without lists."""
        return {name: value for name, value in row.items() if not isinstance(value, list)}

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Return the result of a test in words."""
        return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if math.isfinite(value))

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Score a batch (Lightning hook)."""
        rows = self.score(batch)
        self.rows += rows
        return {"rows": rows}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch (Lightning hook)."""
        self.rows += self.score(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over the cases of all ranks (Lightning hook)."""
        if rows := self.take_rows():
            metrics = {f"val/{name}": value for name, value in self.metrics(rows).items()}
            log_scalars(self, metrics, prog_bar=(self.monitor[0],))

    def on_test_epoch_end(self) -> None:
        """Write ``metrics.json`` and ``per_case.csv``, and print the result (Lightning hook)."""
        rows = self.take_rows()
        metrics = self.metrics(rows) | self.test_metrics(rows)
        if self.trainer.is_global_zero:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self.write_scores([self.line(row) for row in rows], {"n": len(rows), **finite})
            print_line(f"test: {len(rows)} {self.item_name}, {self.verdict(metrics)}")
        log_scalars(self, {f"test/{name}": value for name, value in metrics.items()})
