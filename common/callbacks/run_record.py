"""What a run leaves behind for whoever asks later how it was made."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from common.callbacks.finite_check import FiniteCheck
from common.callbacks.preemption import slurm_job
from common.callbacks.throughput import Throughput
from common.randomness import run_seed
from common.runtime.loggers import SummaryLogger
from common.runtime.provenance import environment
from common.runtime.reporting import is_dry_run, say


def _encoder(module: torch.nn.Module) -> torch.nn.Module | None:
    return next((m for name, m in module.named_modules() if name.rsplit(".", 1)[-1] in ("encoder", "vit")), None)


class RunRecord(pl.Callback):
    """Writes ``environment.json``, gives the summary what only callbacks know, and names the run folder.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``environment.json`` (Lightning hook)."""
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = environment(trainer.strategy.root_device)
        facts |= {
            "seed": run_seed(),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "slurm_job": slurm_job(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        }
        (self.folder / "environment.json").write_text(json.dumps(facts, indent=2))
        say(f"run folder: {self.folder}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how large the model is (Lightning hook)."""
        counts = [sum(p.numel() for p in m.parameters()) for m in (pl_module, _encoder(pl_module)) if m is not None]
        names = [f"{count / 1e6:.1f} M parameters" for count in counts]
        say(f"model: {type(pl_module).__name__}, {names[0]}" + (f" ({names[1]} in the encoder)" if names[1:] else ""))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the summary of a finished run (Lightning hook)."""
        self._complete(trainer, "finished")
        say(f"run folder: {self.folder}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Complete the summary of a run that stopped early (Lightning hook)."""
        self._complete(trainer, type(exception).__name__)

    def _complete(self, trainer: pl.Trainer, status: str) -> None:
        facts: dict[str, Any] = {"status": status, "steps": trainer.global_step, "epochs": trainer.current_epoch}
        checks = next((c for c in trainer.callbacks if isinstance(c, FiniteCheck)), None)  # type: ignore[attr-defined]
        facts["skipped_steps"] = 0 if checks is None else checks.skipped
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        if throughput is not None:
            facts |= {
                "samples": throughput.samples,
                "train_seconds": round(throughput.seconds, 3),
                "samples_per_second": throughput.samples / max(throughput.seconds, 1e-9),
                "flops_per_sample": throughput.flops_per_sample,
            }
        for logger in trainer.loggers:
            if isinstance(logger, SummaryLogger):
                logger.facts |= facts
                logger.save()
