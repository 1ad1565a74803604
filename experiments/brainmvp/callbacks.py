"""Pictures of the templates, and whether one view of a study retrieves the other."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import gather_objects
from common.losses.contrastive import retrieval_accuracy
from common.module import BuiltFromData
from common.panels import axial
from common.runtime.reporting import log_figure, log_scalars
from common.types import Reconstruction


def template_figure(template: Tensor, title: str) -> Figure:
    """Draw three axial slices of a template ``(X, Y, Z)`` in [0, 1], low, middle and high."""
    depth = template.shape[-1]
    slices = [axial(template, depth * part // 8) for part in (3, 4, 5)]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.concatenate(slices, axis=1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    return figure


class TemplatePictures(pl.Callback):
    """Logs ``templates/<sequence>`` as pictures at every validation, with its range and standard deviation as scalars.

    Args:
        every_n_validations: Draw at every n-th validation only.
    """

    def __init__(self, every_n_validations: int = 1) -> None:
        self.every_n_validations = every_n_validations
        self._validations = 0

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the templates that crops have viewed so far (Lightning hook)."""
        bank = getattr(getattr(pl_module, "network", None), "templates", None)
        if bank is None or not isinstance(pl_module, BuiltFromData):
            return
        self._validations += 1
        ranges = bank.range()
        scalars = {}
        for index, name in enumerate(pl_module.spec.channels):
            if ranges[index] == 0:
                continue  # no sample of this sequence was trained on
            view = (bank.weight[index] - bank.extremes[index, 0]) / ranges[index].clamp(min=bank.MIN_RANGE)
            scalars[f"templates/range_{name}"] = float(ranges[index])
            scalars[f"templates/std_{name}"] = float(view.std())
            if trainer.is_global_zero and (self._validations - 1) % self.every_n_validations == 0:
                title = f"template of {name}, step {trainer.global_step}, range {float(ranges[index]):.3g}"
                log_figure(trainer, f"templates/{name}", template_figure(view, title))
        log_scalars(pl_module, scalars)


class ViewRetrieval(ValidationCallback):
    """Logs ``probe/view_retrieval``: how often the cross view's features are nearest to the same sample's other view.

    Top-1 over up to ``max_samples`` fixed validation crops, all of them candidates; ``probe/view_retrieval_chance`` is
    one over their number.

    Args:
        max_samples: Crops to use, over all ranks.
    """

    def __init__(self, max_samples: int = 256) -> None:
        self.max_samples = max_samples
        self._views: list[tuple[Tensor, Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._views = []

    def observe(self, trainer: pl.Trainer, module: Any, output: Reconstruction, batch: Any) -> None:
        """Keep the features of a batch."""
        if sum(len(cross) for cross, _ in self._views) * trainer.world_size < self.max_samples:
            cross, template = module.views
            self._views.append((cross.cpu(), template.cpu()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log over the crops of all ranks (Lightning hook)."""
        parts = [pair for part in gather_objects(self._views) for pair in part]
        self._views = []
        if not parts:
            return
        cross, template = (torch.cat([pair[side] for pair in parts])[: self.max_samples] for side in (0, 1))
        accuracy = float(retrieval_accuracy(cross, template))
        log_scalars(pl_module, {"probe/view_retrieval": accuracy, "probe/view_retrieval_chance": 1 / len(cross)})
