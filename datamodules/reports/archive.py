"""What archives of images with texts share: the tokenizer, given or trained, and the tokens of the texts."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.runtime.reporting import is_dry_run, print_line
from datamodules.images.datamodule import ImageArchiveDataModule
from datamodules.reports.tokens import Kind, ReportTokenizer, learned_tokenizer, load_tokenizer


@dataclass(frozen=True)
class TextConfig:
    """Texts as tokens.

    Args:
        length: Most tokens per text, including the class token.
        tokenizer: JSON file, folder, or name on the hub; ``CKPT=`` brings its own; None: trained on the training texts
            and stored in the cache.
        tokenizer_kind: ``"wordpiece"`` or ``"bpe"``, if it is trained.
        vocab_size: Most tokens, if it is trained.
        end_token: Whether texts end with the tokenizer's end token, if it has one.

    Raises:
        ValueError: ``length`` leaves no room for a word.
    """

    length: int = 100
    tokenizer: str | None = None
    tokenizer_kind: Kind = "wordpiece"
    vocab_size: int = 30000
    end_token: bool = False

    def __post_init__(self) -> None:
        least = 2 + self.end_token
        if self.length < least:
            raise ValueError(f"`length` of a text must be at least {least}, its class token and one more, "
                             f"got {self.length}.")  # fmt: skip


class TextArchiveDataModule(ImageArchiveDataModule):
    """Cases with images and texts.

    Args:
        text: The tokenizer, and the length of texts.
        **settings: Those of :class:`datamodules.images.datamodule.ImageArchiveDataModule`.
    """

    def __init__(self, text: TextConfig, **settings: Any) -> None:
        super().__init__(**settings)
        self.vocab_size, self.tokenizer_kind = text.vocab_size, text.tokenizer_kind
        self.text_length, self.end_token = text.length, text.end_token
        self._tokenizer_path = text.tokenizer
        self._tokenizer: ReportTokenizer | None = None

    @abstractmethod
    def training_texts(self) -> list[str]:
        """Return the texts of the training split, in a fixed order."""

    @property
    def tokenizer(self) -> ReportTokenizer:
        """The tokenizer: the given one, or one trained on the training texts and stored in the cache.

        Raises:
            DataError: no tokenizer at the given path, or no texts to train one on.
        """
        if self._tokenizer is None:
            path = self._tokenizer_path
            self._tokenizer = (
                load_tokenizer(path)
                if path
                else learned_tokenizer(self.training_texts(), self.vocab_size, self.tokenizer_kind)
            )
        return self._tokenizer

    @property
    def vocabulary(self) -> dict[str, Any]:
        """What networks need to know about the tokens."""
        tokenizer = self.tokenizer
        return {
            "size": tokenizer.vocab_size,
            "length": self.text_length,
            "fingerprint": tokenizer.fingerprint,
            "pad_id": tokenizer.pad_id,
        }

    def prepare_data(self) -> None:
        """Build and verify the cache and the tokenizer, once per machine (Lightning hook)."""
        super().prepare_data()
        _ = self.tokenizer

    def keep_tokenizer(self, stage: str) -> None:
        """In training, note how many texts are truncated, and save the tokenizer with the run."""
        if stage != "fit":
            return
        texts = self.training_texts()
        cut = sum(self.tokenizer.encode(text, self.text_length, self.end_token).cut for text in texts)
        if cut:
            print_line(f"note: {cut} of {len(texts)} training texts are longer than data.text.length {self.text_length}"
                f" and lose their end")  # fmt: skip
        trainer = self.trainer
        if trainer is not None and trainer.is_global_zero and not is_dry_run(trainer):
            self.tokenizer.save(Path(trainer.default_root_dir) / "tokenizer.json")
