"""Scalars, figures, lines and tables for people, from any hook and to any logger."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from common.files import whole_file
from common.names import printable
from common.pseudonyms import names_are_hidden

if TYPE_CHECKING:  # commands print before and without Lightning
    import lightning.pytorch as pl
    from matplotlib.figure import Figure


def log_scalars(module: "pl.LightningModule", scalars: Mapping[str, float], prog_bar: Collection[str] = ()) -> None:
    """Log values that are already equal on all ranks.

    Lightning discards the values of the validation before the first step (its sanity check); here they become the
    curves' first points, at step 0.
    """
    trainer = module.trainer
    if trainer.sanity_checking:
        for logger in trainer.loggers:
            logger.log_metrics(dict(scalars), step=trainer.global_step)
        return
    for name, value in scalars.items():
        module.log(name, value, prog_bar=name in prog_bar, on_step=False, on_epoch=True, batch_size=1)


def log_figure(trainer: "pl.Trainer", tag: str, figure: "Figure") -> None:
    """Send a figure to every logger that shows images (TensorBoard; Weights and Biases and others by ``log_image``)."""
    for logger in trainer.loggers:
        if callable(add := getattr(getattr(logger, "experiment", None), "add_figure", None)):
            add(tag, figure, global_step=trainer.global_step)
        elif callable(log := getattr(logger, "log_image", None)):
            log(key=tag, images=[figure], step=trainer.global_step)


def log_text(trainer: "pl.Trainer", tag: str, markdown: str) -> None:
    """Send Markdown to every logger that shows text (TensorBoard; Weights and Biases and others by ``log_text``)."""
    for logger in trainer.loggers:
        if callable(add := getattr(getattr(logger, "experiment", None), "add_text", None)):
            add(tag, markdown, global_step=trainer.global_step)
        elif callable(log := getattr(logger, "log_text", None)):
            log(key=tag, columns=["text"], data=[[markdown]], step=trainer.global_step)


def is_dry_run(trainer: "pl.Trainer") -> bool:
    """Return whether the trainer only tries a few batches (``--trainer.fast_dev_run``) and must not leave files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV with one line per case, completely or not at all."""
    with (
        whole_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["subject_id"])
        writer.writeheader()
        writer.writerows(rows)


def contents(folder: Path) -> str:
    """Describe the direct content of a folder; only its size if names are hidden."""
    if names_are_hidden():
        return f"{sum(1 for path in folder.iterdir() if path.name[0] != '.')} entries"
    entries = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if path.name[0] != ".")
    shown = ", ".join(entries[:4]) + (f", ... ({len(entries)} entries)" if len(entries) > 4 else "")
    return shown or "nothing"


def print_line(*words: Any) -> None:
    """Print one line to the person at the terminal, once for all ranks; control characters in names are escaped."""
    if getattr(rank_zero_only, "rank", 0) == 0:  # Lightning sets it at its import
        print(*map(printable, words), flush=True)
