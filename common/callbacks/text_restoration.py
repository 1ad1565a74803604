"""Reports with the model's predictions filled in, as readable text."""

from collections.abc import Collection, Iterator
from html import escape
from typing import Any

import lightning.pytorch as pl

from common.callbacks.validation import ValidationCallback
from common.module import SSLModule
from common.names import printable
from common.runtime.reporting import log_text
from common.types import Reconstruction

_RIGHT, _WRONG = "\N{LARGE GREEN SQUARE}", "\N{LARGE RED SQUARE}"


def _plain(token: str) -> str:
    """Return a token escaped for a cell of a Markdown table."""
    return escape(token.removeprefix("##")).replace("|", "&#124;")


def _joined(tokens: list[str]) -> str:
    """Join tokens to text; continuations are attached to the previous word."""
    return "".join(("" if token.startswith("##") else " ") + _plain(token) for token in tokens).strip()


def _words(tokens: list[str], hidden: Collection[int]) -> Iterator[list[int]]:
    """Group positions into words; a partly hidden word is split into hidden and visible pieces."""
    word: list[int] = []
    for index, token in enumerate(tokens):
        if word and not (token.startswith("##") and (index in hidden) == (word[-1] in hidden)):
            yield word
            word = []
        word.append(index)
    if word:
        yield word


def restored_row(tokens: list[str], truth: dict[int, str], predicted: dict[int, str]) -> tuple[str, str]:
    """Return the text with its hidden words, and the same with the words that were predicted there.

    Args:
        tokens: The tokens that were seen, in order; those at the keys of ``truth`` are ignored.
        truth: Position to the token that was hidden.
        predicted: Position to the likeliest token there.

    Returns:
        Markdown: the true text, hidden words bold; and the prediction, green if right, otherwise red with the
        truth.
    """
    true = [truth.get(index, token) for index, token in enumerate(tokens)]
    shown, filled = "", ""
    for word in _words(true, truth):
        pieces = [true[index] for index in word]
        gap = "" if pieces[0].startswith("##") or word[0] == 0 else " "
        text = _joined(pieces)
        guess = _joined([predicted[index] for index in word]) if word[0] in truth else text
        if word[0] not in truth:
            shown, filled = shown + gap + text, filled + gap + text
            continue
        shown += f"{gap}**{text}**"
        filled += f"{gap}{_RIGHT}**{guess}**" if guess == text else f"{gap}{_WRONG}**{guess}** (*{text}*)"
    return shown, filled


class TextRestoration(ValidationCallback):
    """Logs ``reconstruction/report`` as text at every validation, always for the same samples.

    Nothing is logged if the data module anonymises: reports describe people.

    Args:
        num_samples: Reports.
    """

    def __init__(self, num_samples: int = 4) -> None:
        self.num_samples = num_samples
        self._rows: list[tuple[str, str, str]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset for a new validation (Lightning hook)."""
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
        """Send the texts to the loggers (Lightning hook)."""
        if self._rows:
            lines = ["| sample | report, hidden words bold | prediction, truth in italics |", "|---|---|---|"]
            rows = [(_plain(printable(name)), text, filled) for name, text, filled in self._rows]
            lines += [f"| {' | '.join(row)} |".replace("\n", " ") for row in rows]
            log_text(trainer, "reconstruction/report", "\n".join(lines))
