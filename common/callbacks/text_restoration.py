"""Reports as the model fills them in, to read."""

from html import escape
from typing import Any

import lightning.pytorch as pl

from common.callbacks.validation import ValidationCallback
from common.module import SSLModule
from common.reporting import log_text
from common.types import Reconstruction

_RIGHT, _WRONG = "\N{LARGE GREEN SQUARE}", "\N{LARGE RED SQUARE}"


def _plain(token: str) -> str:
    """Return a token as it may stand in a cell of a Markdown table."""
    return escape(token.removeprefix("##")).replace("|", "&#124;")


def _joined(tokens: list[str], written: list[str]) -> str:
    """Join what was written for each token; continuations stick to the word before."""
    parts = [("" if token.startswith("##") else " ") + text for token, text in zip(tokens, written, strict=True)]
    return "".join(parts).strip()


def restored_row(tokens: list[str], truth: dict[int, str], predicted: dict[int, str]) -> tuple[str, str]:
    """Return the text with its hidden words, and the same with the words that were predicted there.

    Args:
        tokens: The tokens that were seen, in order; the hidden ones at the keys of ``truth`` count for nothing.
        truth: Position to the token that was hidden.
        predicted: Position to the likeliest token there.

    Returns:
        Markdown: the true text, hidden tokens bold; and the prediction, green where right, red with the truth where
        not.
    """
    true = [truth.get(index, token) for index, token in enumerate(tokens)]
    shown = [f"**{_plain(token)}**" if i in truth else _plain(token) for i, token in enumerate(true)]
    filled = []
    for index, token in enumerate(true):
        if index not in truth:
            filled.append(_plain(token))
        elif predicted[index] == token:
            filled.append(f"{_RIGHT}**{_plain(token)}**")
        else:
            filled.append(f"{_WRONG}**{_plain(predicted[index])}** (*{_plain(token)}*)")
    return _joined(true, shown), _joined(true, filled)


class TextRestoration(ValidationCallback):
    """Logs ``reconstruction/report`` as text at every validation, always the same samples.

    Nothing is logged where the data module anonymises: reports are about persons.

    Args:
        num_samples: Reports.
    """

    def __init__(self, num_samples: int = 4) -> None:
        self.num_samples = num_samples
        self._rows: list[tuple[str, str, str]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation (Lightning hook)."""
        self._rows = []

    def observe(self, trainer: pl.Trainer, module: SSLModule, output: Reconstruction, batch: Any) -> None:
        """Write the first samples of rank 0."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or len(self._rows) >= self.num_samples or datamodule.ledger.anonymise:
            return
        predicted = module.hidden_tokens(batch).logits.argmax(1).tolist()
        length = batch["input_ids"].shape[1]
        word = datamodule.tokenizer.token
        places = [divmod(place, length) for place in batch["hidden_index"].tolist()]
        for row in range(min(len(batch["input_ids"]), self.num_samples - len(self._rows))):
            count = int(batch["attention_mask"][row].sum())
            tokens = [word(index) for index in batch["input_ids"][row, :count].tolist()]
            truth = {c: word(int(batch["labels"][row, c])) for r, c in places if r == row}
            guess = {c: word(index) for (r, c), index in zip(places, predicted, strict=True) if r == row}
            if truth:
                self._rows.append((batch["subject_id"][row], *restored_row(tokens, truth, guess)))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the texts to the loggers (Lightning hook)."""
        if self._rows:
            lines = ["| sample | report, hidden words bold | prediction, truth in italics |", "|---|---|---|"]
            lines += [f"| {escape(name)} | {text} | {filled} |".replace("\n", " ") for name, text, filled in self._rows]
            log_text(trainer, "reconstruction/report", "\n".join(lines))
