"""Whether features use all of their space or only a few dimensions (Roy and Vetterli 2007; Jing et al. 2022)."""

from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.callbacks.validation import ValidationCallback
from common.distributed import gather_objects
from common.metrics import singular_values, spectrum_rank
from common.module import SSLModule
from common.runtime.reporting import log_figure, log_scalars
from common.types import Reconstruction


def spectrum_figure(spectra: dict[str, Tensor], initial: dict[str, Tensor], step: int) -> Figure:
    """Draw log10 of the sorted singular values, now and before training, one line per tap."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, values) in enumerate(spectra.items()):
        color = f"C{index}"
        axes.plot(values.clamp(min=1e-12).log10(), color=color, label=f"{name} (rank {spectrum_rank(values):.1f})")
        if name in initial and step > 0:
            axes.plot(initial[name].clamp(min=1e-12).log10(), color=color, linestyle=":", alpha=0.6)
    top = max((float(v.max()) for v in spectra.values() if v.isfinite().all()), default=1.0)
    axes.set_ylim(bottom=torch.tensor(top).clamp(min=1e-12).log10().item() - 5)
    axes.set(xlabel="index, sorted", ylabel="log10 singular value", title=f"Spectrum of token features, step {step}")
    axes.legend(title="dotted: before training" if step > 0 else None)
    return figure


class EffectiveRank(ValidationCallback):
    """Logs ``collapse/effective_rank`` of the encoder's output, one more per tap, and the spectrum as a figure.

    The features come from a fixed set of unmasked validation inputs; empty tokens are left out. The value before
    training is logged at step 0 and kept as the dotted line of the figures.

    Args:
        max_tokens: Tokens to use.
    """

    def __init__(self, max_tokens: int = 4096) -> None:
        self.max_tokens = max_tokens
        self._features: dict[str, list[Tensor]] = {}
        self._initial: dict[str, Tensor] = {}
        self._count = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
        self._features, self._count = {}, 0

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Collect this rank's share of the tokens."""
        share = -(-self.max_tokens // trainer.world_size)
        if self._count >= share:
            return
        tokens = module.token_features(batch)
        for name, features in tokens.features.items():
            kept = features[tokens.keep][: share - self._count].float().cpu()
            if len(kept):
                self._features.setdefault(name, []).append(kept)
        self._count += len(kept)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ranks and spectra (Lightning hook)."""
        parts = gather_objects({name: torch.cat(blocks) for name, blocks in self._features.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        if not names:
            return
        spectra = {name: singular_values(torch.cat([part[name] for part in parts if name in part])) for name in names}
        ranks = {name: spectrum_rank(values) for name, values in spectra.items()}
        first = next(iter(ranks))
        scalars = {
            f"collapse/effective_rank{'' if name == first else f'_{name}'}": value for name, value in ranks.items()
        }
        log_scalars(pl_module, scalars)
        if trainer.global_step == 0:
            self._initial = spectra
        if trainer.is_global_zero:
            log_figure(trainer, "collapse/spectrum", spectrum_figure(spectra, self._initial, trainer.global_step))
