"""Pictures of reconstructions, one row a case: input, what was hidden, prediction, difference."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from matplotlib.figure import Figure

from common.module import SSLModule
from common.reporting import log_figure
from common.types import Panel

_COLUMNS = ("input", "visible (hidden in blue)", "prediction where hidden", "prediction - input")
_HIDDEN_COLOR = np.array([0.16, 0.30, 0.55])


def _hide(image: np.ndarray, hidden: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return an RGB image with the hidden part painted over, so that it cannot be taken for dark tissue."""
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, -1)
    return np.where(hidden[..., None], _HIDDEN_COLOR, grey)


def panel_figure(modality: str, rows: Sequence[Panel]) -> Figure:
    """Draw the rows of one modality.

    All images of a row share one grey window (the input's range); the difference has its own, symmetric about 0.
    """
    figure = Figure(figsize=(11, 0.5 + 2.8 * len(rows)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(rows), len(_COLUMNS), squeeze=False)
    for axes, panel in zip(grid, rows, strict=True):
        low, high = float(panel.input.min()), float(max(np.percentile(panel.input, 99.8), panel.input.min() + 1e-6))
        difference = np.where(panel.hidden, panel.prediction - panel.input, 0)
        limit = (high - low) / 2
        axes[0].imshow(panel.input, cmap="gray", vmin=low, vmax=high)
        axes[1].imshow(_hide(panel.input, panel.hidden, low, high))
        axes[2].imshow(panel.prediction, cmap="gray", vmin=low, vmax=high)
        last = axes[3].imshow(difference, cmap="RdBu_r", vmin=-limit, vmax=limit)
        figure.colorbar(last, ax=axes[3], fraction=0.046)
        error = float(np.abs(difference[panel.hidden]).mean()) if panel.hidden.any() else 0.0
        axes[0].set_ylabel(panel.title, fontsize=8)
        axes[3].set_xlabel(f"mean |difference| where hidden {error:.3f}", fontsize=8)
        axes[0].text(0.02, 0.5, "R", color="yellow", transform=axes[0].transAxes, va="center", fontsize=9)
        axes[0].text(0.98, 0.5, "L", color="yellow", transform=axes[0].transAxes, va="center", ha="right", fontsize=9)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(grid[0], _COLUMNS, strict=True):
        axis.set_title(title, fontsize=9)
    figure.suptitle(modality, fontsize=11, fontweight="bold")
    return figure


class ReconstructionPanels(pl.Callback):
    """Logs ``reconstruction/<modality>`` at every validation, always the same samples.

    Args:
        num_samples: Rows.
        every_n_validations: Draw at every n-th validation only.
    """

    def __init__(self, num_samples: int = 4, every_n_validations: int = 1) -> None:
        self.num_samples = num_samples
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._panels: dict[str, list[Panel]] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation (Lightning hook)."""
        self._panels = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first samples of rank 0 (Lightning hook)."""
        wanted = trainer.is_global_zero and self._validations % self.every_n_validations == 0
        if not wanted or not isinstance(pl_module, SSLModule) or self._drawn() >= self.num_samples:
            return
        output = outputs["reconstruction"]
        for index in range(min(len(output.target), self.num_samples - self._drawn())):
            for name, panel in pl_module.panels(batch, output, index).items():
                self._panels.setdefault(name, []).append(panel)

    def _drawn(self) -> int:
        return max((len(rows) for rows in self._panels.values()), default=0)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the pictures to the loggers (Lightning hook)."""
        self._validations += 1
        for name, rows in self._panels.items():
            log_figure(trainer, f"reconstruction/{name}", panel_figure(name, rows))
