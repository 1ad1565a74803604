"""``medmim tokenizer``: a vocabulary from the training texts of an archive, as JSON for ``data.tokenizer``."""

from pathlib import Path
from typing import Literal

from common.runtime.data_config import Archive
from common.runtime.reporting import print_line


def run(archive: Archive, kind: Literal["wordpiece", "bpe"] | None, vocab_size: int | None, out: str) -> None:
    """Carry out ``medmim tokenizer``; its options are those of the command, else the configuration's.

    Raises:
        DataError: the archive has no text to train on.
    """
    datamodule = archive.datamodule()
    from datamodules.reports.tokens import train_tokenizer

    texts = datamodule.training_texts()
    configured: Literal["wordpiece", "bpe"] = getattr(datamodule, "tokenizer_kind", "wordpiece")
    chosen = kind or configured
    tokenizer = train_tokenizer(texts, vocab_size or datamodule.vocab_size, chosen)
    tokenizer.save(Path(out))
    print_line(f"tokenizer: {tokenizer.vocab_size} tokens ({chosen}) from {len(texts)} training texts, at {out}")
