"""Figures of reconstructions, one row per case: input, masked input, prediction, difference."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from common.callbacks.validation import ValidationCallback
from common.module import SSLModule
from common.names import printable
from common.runtime.reporting import log_figure
from common.types import Panel, Reconstruction

_COLUMNS = ("input", "visible (hidden in blue)", "prediction", "prediction - input where scored")
_WHOLE_COLUMNS = ("input", "visible (nothing is hidden)", *_COLUMNS[2:])
_FILLED_COLUMNS = ("target", "what the encoder saw, holes filled", "prediction", "prediction - target where scored")
_HIDDEN_COLOR = np.array([0.16, 0.30, 0.55])
_LESION_COLOR = np.array([0.2, 1.0, 0.4])
#: Pixels of one image's longer side, and between images.
_SIDE, _GAP = 224, 8

_OUTLINE = [withStroke(linewidth=2, foreground="black")]

Image = NDArray[np.float64]


def _enlarge(image: NDArray, side: int) -> NDArray:
    """Repeat pixels without smoothing until the longer side has about ``side`` pixels."""
    factor = max(1, round(side / max(image.shape[:2])))
    return image.repeat(factor, 0).repeat(factor, 1)


def _shown(image: NDArray, low: float, high: float) -> Image:
    """Return RGB: grey within a window, colour as it is."""
    if image.ndim == 3:
        return np.clip(image, 0, 1)
    return np.clip((image - low) / (high - low), 0, 1)[..., None].repeat(3, -1)


def _row(panel: Panel) -> tuple[list[Image], str]:
    """Return the four images of a case, RGB, and the caption under them.

    All grey images share one window, the input's range; the difference (of colours their mean) has its own, symmetric
    about 0. Hidden parts are painted over, so that they cannot be taken for dark tissue; if they were filled, the
    filling is shown instead.
    """
    low = float(panel.input.min())
    high = max(float(np.percentile(panel.input, 99.8)), low + 1e-6)
    scored = panel.hidden if panel.scored is None else panel.scored
    difference = panel.prediction - panel.input
    difference = np.where(scored, difference.mean(-1) if difference.ndim == 3 else difference, 0)
    limit = (high - low) / 2
    shown = _shown(panel.input, low, high)
    painted = np.where(panel.hidden[..., None], _HIDDEN_COLOR, shown)
    pictures = [
        shown,
        painted if panel.filled is None else _shown(panel.filled, low, high),
        _shown(panel.prediction, low, high),
        colormaps["RdBu_r"](np.clip(difference / limit, -1, 1) / 2 + 0.5)[..., :3],
    ]
    error = float(np.abs(difference[scored]).mean()) if scored.any() else 0.0
    window = f"grey {low:.2f} to {high:.2f}; " if panel.input.ndim == 2 else ""
    text = f"{panel.title}; {window}blue -{limit:.2f}, red +{limit:.2f}; mean error {error:.3f}"
    pictures = [_enlarge(picture, _SIDE) for picture in pictures]
    if panel.lesion is not None and panel.lesion.any():
        inside = _enlarge(panel.lesion, _SIDE)
        edge = binary_dilation(inside, iterations=2) & ~inside
        pictures = [np.where(edge[..., None], _LESION_COLOR, picture) for picture in pictures]
        compared = scored & panel.lesion
        if compared.any():
            text += f", in the lesion (outlined) {np.abs(difference[compared]).mean():.3f}"
    return pictures, text


def panel_figure(modality: str, rows: Sequence[Panel]) -> Figure:
    """Draw the rows of one modality as one mosaic: a figure with many axes takes ten times as long."""
    drawn = [_row(panel) for panel in rows]
    height, width = drawn[0][0][0].shape[:2]
    step_y, step_x = height + 3 * _GAP, width + _GAP
    mosaic = np.ones((len(rows) * step_y, len(_COLUMNS) * step_x - _GAP, 3))
    for y, (pictures, _) in enumerate(drawn):
        for x, picture in enumerate(pictures):
            mosaic[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = picture
    top = 48
    figure = Figure(figsize=(mosaic.shape[1] / 100, (mosaic.shape[0] + top) / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, mosaic.shape[0] / (mosaic.shape[0] + top)))
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_axis_off()
    columns = _COLUMNS if any(panel.hidden.any() for panel in rows) else _WHOLE_COLUMNS
    for x, title in enumerate(columns if rows[0].filled is None else _FILLED_COLUMNS):
        axes.text(x * step_x + width / 2, -4, title, ha="center", va="bottom", fontsize=8)
    for y, (_, text) in enumerate(drawn):
        # Subjects may have any name, and `$` starts a formula.
        line = printable(text)
        axes.text(2, y * step_y + height + _GAP, line, ha="left", va="center", fontsize=7, parse_math=False)
        left, right = rows[y].sides
        style: dict[str, Any] = {"va": "center", "color": "yellow", "fontsize": 10, "fontweight": "bold"}
        style["path_effects"] = _OUTLINE
        axes.text(4, y * step_y + height / 2, left, ha="left", **style)
        axes.text(width - 4, y * step_y + height / 2, right, ha="right", **style)
    style = {"ha": "center", "va": "top", "fontsize": 10, "fontweight": "bold", "parse_math": False}
    figure.text(0.5, 1 - 4 / (mosaic.shape[0] + top), printable(modality), **style)
    return figure


class ReconstructionPanels(ValidationCallback):
    """Logs ``reconstruction/<modality>`` at every validation, always for the same samples.

    Args:
        num_samples: Rows.
        every_n_validations: Draw only at every n-th validation.
    """

    def __init__(self, num_samples: int = 4, every_n_validations: int = 1) -> None:
        self.num_samples = num_samples
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._panels: dict[str, list[Panel]] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._panels = {}

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Draw the first samples of rank 0."""
        wanted = trainer.is_global_zero and self._validations % self.every_n_validations == 0
        if not wanted or self._drawn() >= self.num_samples:
            return
        for index in range(min(len(output.target), self.num_samples - self._drawn())):
            for name, panel in module.panels(batch, output, index).items():
                self._panels.setdefault(name, []).append(panel)

    def _drawn(self) -> int:
        return max((len(rows) for rows in self._panels.values()), default=0)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the figures to the loggers (Lightning hook)."""
        self._validations += 1
        for name, rows in self._panels.items():
            log_figure(trainer, f"reconstruction/{name}", panel_figure(name, rows))
