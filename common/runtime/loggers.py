"""Loggers missing from Lightning: a CSV that a resumed run continues, and a summary."""

import csv
import json
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from common.distributed import launched_rank
from common.files import write_text

#: Scalars whose best value is the smallest.
_SMALLER_IS_BETTER = ("loss", "mse", "floor", "hd95", "data_wait", "faulty")


class _AppendingWriter(ExperimentWriter):
    """Continues an existing ``metrics.csv``; Lightning's deletes it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class RunTensorBoardLogger(TensorBoardLogger):
    """Writes TensorBoard events directly into the run folder, without a second copy of the settings.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="")

    @rank_zero_only
    def save(self) -> None:
        """Flush the events; ``config.yaml`` holds the settings."""
        self.experiment.flush()


class RunCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` directly into the run folder and appends when a run is resumed.

    Args:
        save_dir: The run folder.
        flush_logs_every_n_steps: Steps between writes.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer, created at first use."""
        if launched_rank() != 0:
            return super().experiment
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: ``config.yaml`` holds the settings."""


class SummaryLogger(Logger):
    """Keeps the final and the best value of every scalar for ``summary.json``.

    A scalar whose last value is NaN or infinite has no final value (null); ``not_finite`` gives the step since when.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._scalars: dict[str, dict[str, float | None]] = {}
        self._not_finite: dict[str, dict[str, int]] = {}
        self._begin = time.perf_counter()
        self.facts: dict[str, Any] = {}
        # A resumed run continues in its folder: values from before the stop still count.
        path = self._folder / "summary.json"
        if path.is_file():
            before = json.loads(path.read_text())
            self._scalars = before["scalars"]
            self._not_finite = before.get("not_finite", {})
            self._begin -= before["wall_seconds"]

    @property
    def name(self) -> str:
        """Required by Lightning."""
        return "summary"

    @property
    def version(self) -> str:
        """Required by Lightning."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: ``config.yaml`` holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record scalars."""
        for name, value in metrics.items():
            value = float(value)
            if name == "epoch":
                continue
            if not math.isfinite(value):
                times = self._not_finite.setdefault(name, {"first_step": step or 0, "times": 0})
                times["times"] += 1
                if name in self._scalars:
                    self._scalars[name]["final"] = None
                continue
            entry = self._scalars.setdefault(
                name, {"first": value, "final": value, "best": value, "best_step": step or 0}
            )
            smaller = any(word in name for word in _SMALLER_IS_BETTER)
            entry["final"] = value
            best = entry["best"]
            assert best is not None
            if value < best if smaller else value > best:
                entry |= {"best": value, "best_step": step or 0}

    @rank_zero_only
    def save(self) -> None:
        """Write ``summary.json``."""
        if not self._folder.is_dir():
            return
        facts = {**self.facts, "wall_seconds": round(time.perf_counter() - self._begin, 3)}
        content = json.dumps({**facts, "not_finite": self._not_finite, "scalars": self._scalars}, indent=2)
        write_text(self._folder / "summary.json", content)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write ``summary.json`` at the end."""
        self.save()
