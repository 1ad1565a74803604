"""The record a run leaves behind, so that others can see how it was made."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from common.callbacks.finite_check import FiniteCheck
from common.callbacks.preemption import slurm_job
from common.callbacks.throughput import Throughput
from common.files import write_text
from common.pseudonyms import names_are_hidden, public_name
from common.randomness import run_seed
from common.runtime.loggers import SummaryLogger
from common.runtime.provenance import environment
from common.runtime.reporting import is_dry_run, say


def _encoder(module: torch.nn.Module) -> torch.nn.Module | None:
    return next((m for name, m in module.named_modules() if name.rsplit(".", 1)[-1] in ("encoder", "vit")), None)


def personal_settings(trainer: pl.Trainer) -> tuple[str, ...]:
    """Return the settings of the data module that say something about one person, where names are hidden."""
    return getattr(trainer.datamodule, "personal", ()) if names_are_hidden() else ()  # type: ignore[attr-defined]


def _command(trainer: pl.Trainer) -> list[str]:
    """Return the command line, without the values of personal settings."""
    personal = {name for setting in personal_settings(trainer) for name in (setting, setting.partition(".")[0])}
    option = re.compile(rf"--data\.(?:init_args\.)?(?:{'|'.join(map(re.escape, personal)) or '(?!)'})")
    words: list[str] = []
    for word in sys.argv[1:]:
        given, sign, value = word.partition("=")
        if sign and option.fullmatch(given):
            word = f"{given}={public_name(value)}"
        elif words and option.fullmatch(words[-1]):
            word = public_name(word)
        words.append(word)
    return [Path(sys.argv[0]).name, *words]


class RunRecord(pl.Callback):
    """Writes ``environment.json``, adds to the summary what only callbacks know, and names the run folder.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``environment.json`` (Lightning hook)."""
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        facts = environment(trainer.strategy.root_device)
        facts |= {
            "seed": run_seed(),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "slurm_job": slurm_job(),
            "command": _command(trainer),
        }
        write_text(self.folder / "environment.json", json.dumps(facts, indent=2))
        say(f"run folder: {self.folder}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how large the model is, and note how channels were matched (Lightning hook)."""
        self._note_channels(trainer, pl_module)
        counts = [sum(p.numel() for p in m.parameters()) for m in (pl_module, _encoder(pl_module)) if m is not None]
        names = [f"{count / 1e6:.1f} M parameters" for count in counts]
        say(f"model: {type(pl_module).__name__}, {names[0]}" + (f" ({names[1]} in the encoder)" if names[1:] else ""))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how channels were matched (Lightning hook)."""
        self._note_channels(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how channels were matched (Lightning hook)."""
        self._note_channels(trainer, pl_module)

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
        share = getattr(trainer.datamodule, "cache_share_checked", lambda: None)()  # type: ignore[attr-defined]
        facts |= {} if share is None else {"cache_checked": round(share, 4)}
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        if throughput is not None:
            facts |= {
                "samples": throughput.samples,
                "train_seconds": round(throughput.seconds, 3),
                "samples_per_second": throughput.samples / max(throughput.seconds, 1e-9),
                "flops_per_sample": throughput.flops_per_sample,
            }
        self._tell(trainer, facts)

    def _note_channels(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        report = getattr(pl_module, "channel_report", None)
        if report is not None:
            self._tell(trainer, {"channels": report.facts()})

    @staticmethod
    def _tell(trainer: pl.Trainer, facts: dict[str, Any]) -> None:
        """Add facts to ``summary.json``."""
        for logger in trainer.loggers:
            if isinstance(logger, SummaryLogger):
                logger.facts |= facts
                logger.save()
