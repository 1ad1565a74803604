"""Pictures of predictions, to be looked at before anybody trusts them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from common.files import whole_file
from common.names import printable, safe_name
from common.runtime.reporting import is_dry_run

_SIDE = 5.0


def _slice(image: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return one plane ``(H, W)`` of an image ``(C, *space)``: of a volume where most is labelled, else the middle."""
    if image.ndim == 3:
        return image.mean(0), label
    place = image.shape[-1] // 2
    if label is not None and bool(label.any()):
        place = int((label > 0).sum((0, 1)).argmax())
    plane = image[0, :, :, place].T.flip(0)
    return plane, None if label is None else label[:, :, place].T.flip(0)


class PredictionPictures(pl.Callback):
    """Draws the first predictions: the image, with outlines of what was found or the likeliest classes beside it.

    Args:
        folder: Where ``<case>.png`` are written.
        count: How many at most, on each rank.
    """

    def __init__(self, folder: Path, count: int = 32) -> None:
        self.folder, self.count = folder, count
        self._drawn = 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the cases of one batch (Lightning hook)."""
        if is_dry_run(trainer) or not isinstance(outputs, list):
            return
        for image, entry in zip(batch["image"], outputs, strict=True):
            if self._drawn < self.count:
                self._draw(image.detach().float().cpu(), entry)
                self._drawn += 1

    def _draw(self, image: Tensor, entry: Mapping[str, Any]) -> None:
        from matplotlib.figure import Figure

        label = entry.get("label")
        plane, outline = _slice(image, None if label is None else torch.as_tensor(label))
        figure = Figure(figsize=(_SIDE, _SIDE), layout="constrained")
        axes = figure.subplots()
        extent = (0.0, float(plane.shape[1]), float(plane.shape[0]), 0.0)
        axes.imshow(plane.numpy(), cmap="gray", extent=extent)
        if outline is not None and bool(outline.any()):
            values = sorted(set(outline.unique().tolist()) - {0})
            for number, value in enumerate(values):
                inside = (outline == value).float().numpy()
                axes.contour(inside, levels=[0.5], colors=[f"C{number % 10}"], extent=extent, origin="upper")
        words = [f"{name.partition('_')[2]} {value:.3g}" for name, value in entry.items() if isinstance(value, float)]
        title = [str(entry["subject_id"]), str(entry.get("predicted", "")), ", ".join(words[:5])]
        axes.set_title("\n".join(printable(line) for line in title if line), fontsize=8, parse_math=False)
        axes.set_axis_off()
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / f"{safe_name(entry['subject_id'])}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100)
