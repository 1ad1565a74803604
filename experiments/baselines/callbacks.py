"""Whether views and prototypes still tell samples apart, and what the views look like."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import reduce_sums
from common.module import SSLModule
from common.names import printable
from common.panels import axial, fullest_slice
from common.runtime.reporting import log_figure, log_scalars
from common.types import Reconstruction
from experiments.baselines.base import Watched
from experiments.baselines.teacher import prototype_information


def _picture(image: Tensor) -> Any:
    """Return ``(C, *space)`` as something to draw: colours, or the fullest axial slice of the first channel."""
    if image.ndim == 4:
        return axial(image[0], fullest_slice(image))
    low, high = image.amin(), image.amax()
    scaled = ((image - low) / (high - low).clamp(min=1e-6)).detach().float().cpu().permute(1, 2, 0).numpy()
    return scaled if scaled.shape[2] == 3 else scaled[..., 0]


def view_figure(rows: list[tuple[str, Tensor, Tensor, Tensor]]) -> Figure:
    """Draw image and both views of some patients side by side, one row each."""
    figure = Figure(figsize=(6, 2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (name, *images) in zip(axes, rows, strict=True):
        for axis, title, image in zip(line, (printable(name), "view u", "view v"), images, strict=True):
            axis.imshow(_picture(image), cmap="gray")
            axis.set_title(title, fontsize=7, parse_math=False)
            axis.set_axis_off()
    return figure


class ViewCollapse(ValidationCallback):
    """Logs how alike the views of a sample are, and draws them once.

    ``collapse/view_similarity`` is the mean cosine of the pooled features of two views, ``_control`` that of views of
    different patients: where both are near 1, features have collapsed. ``collapse/floor_ratio`` is the loss over that
    of equal vectors, where that is a number; ``collapse/prototype_information`` see
    :func:`~experiments.baselines.teacher.prototype_information`.

    Args:
        num_panels: Patients in the picture ``view_panels``, drawn before the first step.
    """

    def __init__(self, num_panels: int = 4) -> None:
        self.num_panels = num_panels
        self._sums: dict[str, list[tuple[float, float]]] = {}
        self._target: Tensor | None = None
        self._rows: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._sums, self._target, self._rows = {}, None, []

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        watched: Watched | None = getattr(module, "watched", None)
        if watched is None:
            return
        names = batch.get("patient_id", batch["subject_id"])
        first, second = (F.normalize(x.float(), dim=1) for x in (watched.first, watched.second))
        cosine, samples = first @ second.T, len(first)
        others = torch.tensor([[a != b for b in names] for a in names], device=cosine.device)
        self._add("similarity", float(cosine.diagonal().sum()), samples)
        self._add("control", float(cosine[others].sum()), int(others.sum()))
        if watched.floor is not None:
            self._add("loss", watched.loss * samples, samples)
            self._add("floor", watched.floor * samples, samples)
        if watched.targets is not None:
            target = watched.targets.float()
            self._add("entropy", -float(torch.special.xlogy(target, target).sum()), len(target))
            self._target = target.sum(0) if self._target is None else self._target + target.sum(0)
        if trainer.global_step == 0 and trainer.is_global_zero:
            self._keep_pictures(batch, watched)

    def _add(self, name: str, total: float, count: float) -> None:
        self._sums.setdefault(name, []).append((total, count))

    def _keep_pictures(self, batch: Any, watched: Watched) -> None:
        for index in range(min(len(batch["image"]), self.num_panels - len(self._rows))):
            views = (view[index] for view in watched.images)
            self._rows.append((str(batch["subject_id"][index]), batch["image"][index], *views))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log over all samples of all ranks (Lightning hook)."""
        sums = {name: (sum(t for t, _ in pairs), sum(c for _, c in pairs)) for name, pairs in self._sums.items()}
        if self._target is not None:
            sums |= {f"target {k}": (x, float(self._target.sum())) for k, x in enumerate(self._target.tolist())}
        means = reduce_sums(sums)
        scalars = {"collapse/view_similarity": means["similarity"]} if "similarity" in means else {}
        if "control" in means:
            scalars["collapse/view_similarity_control"] = means["control"]
        if "floor" in means:
            scalars["collapse/floor_ratio"] = means["loss"] / max(means["floor"], 1e-12)
        if "entropy" in means:
            mean = torch.tensor([value for name, value in means.items() if name.startswith("target ")]).double()
            scalars["collapse/prototype_information"] = prototype_information(mean / mean.sum(), means["entropy"])
        log_scalars(pl_module, scalars)
        if self._rows:
            log_figure(trainer, "view_panels", view_figure(self._rows))
