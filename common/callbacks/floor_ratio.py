"""Whether a reconstruction is better than the best constant (E-MIM Eqs. 2 and 3)."""

from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import reduce_sums
from common.errors import StorageError
from common.files import whole_file
from common.losses.reconstruction import masked_error
from common.module import SSLModule
from common.runtime.reporting import log_scalars, say
from common.types import Reconstruction

#: Changes where constants are measured otherwise than before.
VERSION = 1


class TargetMean:
    """Streaming mean of the target, per element, over the samples that have it; float64 on the CPU."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self.samples = 0

    def update(self, target: Tensor, valid: Tensor) -> None:
        """Add ``target`` ``(B, ..., P)`` where ``valid`` ``(B, ...)``."""
        weight = valid.cpu().double()
        total = (target.detach().cpu().double() * weight[..., None]).sum(0)
        self.total = total if self.total is None else self.total + total
        self.count = weight.sum(0) if self.count is None else self.count + weight.sum(0)
        self.samples += len(target)

    def value(self) -> Tensor:
        """Return the mean ``(..., P)`` float32; 0 where no sample had the element."""
        assert self.total is not None
        assert self.count is not None
        return (self.total / self.count.clamp(min=1)[..., None]).float()


def _read(file: Path) -> dict[str, Tensor] | None:
    """Return kept constants by name; None where there are none that can be read."""
    try:
        with np.load(file) as kept:
            return {name.removeprefix("of"): torch.from_numpy(kept[name]) for name in kept.files}
    except (OSError, ValueError, EOFError, BadZipFile):
        return None


class FloorRatio(ValidationCallback):
    """Logs ``collapse/floor_ratio``: validation reconstruction loss over that of the best constant.

    The constant is, for every target element, the mean of training samples in the target's own units, cut and never
    mirrored like validation samples; it is scored on the same validation samples and the same masks. 1 means no better
    than a constant, which is complete collapse. Logged before the first step too.

    Subsets that the method names (``Reconstruction.groups``) get a ratio each, ``collapse/floor_ratio_<group>``: to the
    constant that is best in the subset where ``reconstruction_groups`` says what belongs to it, else to that of all.
    Where samples carry ``control_image``, ``collapse/floor_ratio_control`` is the ratio where another subject's visible
    content stands in the same places: a model that reads its input must do worse, well above 1. Where hidden entries
    are replaced and not left out (``Reconstruction.unchanged``), ``collapse/floor_ratio_identity`` is the ratio of a
    network that returns its input.

    The constants are kept beside the data's cache (:meth:`datamodules.base.ArchiveDataModule.floor_file`): a second run
    of the same settings on the same members measures none.

    Args:
        num_reference: Training samples behind the constant, at least 200.
        num_controls: Validation samples that are reconstructed once more for the control, over all ranks.

    Raises:
        ValueError: ``num_reference`` is below 200.
    """

    def __init__(self, num_reference: int = 256, num_controls: int = 64) -> None:
        if num_reference < 200:
            raise ValueError(f"`num_reference` must be at least 200 for a constant that is best, got {num_reference}.")
        self.num_reference = num_reference
        self.num_controls, self._controls = num_controls, 0
        self._constants: dict[str, Tensor] = {}
        self._sums: dict[str, list[Tensor]] = {}

    def _find_constants(self, trainer: pl.Trainer, module: SSLModule) -> dict[str, Tensor]:
        """Return the constants of an earlier run of these settings, else measure and keep them."""
        find = getattr(trainer.datamodule, "floor_file", None)  # type: ignore[attr-defined]
        file: Path | None = None if find is None else find(f"{VERSION} {self.num_reference}")
        if file is not None and (kept := _read(file)) is not None:
            say(f"floor: the constants of an earlier run of these settings ({file.name})")
            return {name: constant.to(module.device) for name, constant in kept.items()}
        constants = self._measure_constants(trainer, module)
        if file is not None and trainer.is_global_zero:
            arrays: dict[str, Any] = {f"of{name}": constant.cpu().numpy() for name, constant in constants.items()}
            with suppress(StorageError), whole_file(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays)
        return constants

    def _measure_constants(self, trainer: pl.Trainer, module: SSLModule) -> dict[str, Tensor]:
        means: dict[str, TargetMean] = {"": TargetMean()}
        for batch in trainer.datamodule.reference_samples(self.num_reference):  # type: ignore[attr-defined]
            target, valid = module.reconstruction_target(batch)
            means[""].update(target, valid)
            for name, members in module.reconstruction_groups(batch).items():
                means.setdefault(f"_{name}", TargetMean()).update(target, valid & members)
        say(f"floor: the best constant is the mean of {means[''].samples} training samples")
        return {name: mean.value().to(module.device) for name, mean in means.items()}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the constants once (Lightning hook)."""
        self._sums, self._controls = {}, 0
        if not self._constants and isinstance(pl_module, SSLModule):
            self._constants = self._find_constants(trainer, pl_module)

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Add one batch."""
        masks = {"": output.mask} | {f"_{name}": mask for name, mask in output.groups.items()}
        best = self._constants[""]
        for name, mask in masks.items():
            constant = self._constants.get(name, best).expand_as(output.target)
            self._add(f"loss{name}", *masked_error(output.pred, output.target, mask))
            self._add(f"floor{name}", *masked_error(constant, output.target, mask))
        if output.unchanged is not None:
            self._add("loss_identity", *masked_error(output.unchanged, output.target, output.mask))
            self._add("floor_identity", *masked_error(best.expand_as(output.target), output.target, output.mask))
        if "control_image" in batch and self._controls * trainer.world_size < self.num_controls:
            self._controls += len(output.mask)
            control = module.reconstruct(batch, image="control_image")
            self._add("loss_control", *masked_error(control.pred, control.target, control.mask))
            self._add("floor_control", *masked_error(best.expand_as(control.target), control.target, control.mask))

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        pair = torch.stack([total, count]).double()
        self._sums.setdefault(name, []).append(pair)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the ratios over all samples of all ranks (Lightning hook)."""
        sums = {name: torch.stack(pairs).sum(0).tolist() for name, pairs in self._sums.items()}
        means = reduce_sums({name: (total, count) for name, (total, count) in sums.items()})
        ratios = {
            f"collapse/floor_ratio{name}": means[f"loss{name}"] / max(floor, 1e-12)
            for name, floor in (
                (key.removeprefix("floor"), value) for key, value in means.items() if key.startswith("floor")
            )
        }
        if "floor" in means:
            ratios |= {"collapse/floor": means["floor"], "collapse/masked_mse": means["loss"]}
        log_scalars(pl_module, ratios, prog_bar=("collapse/floor_ratio",))
