"""Tokenizers for reports: trained on the training split, or any fast tokenizer of transformers.

``medmim tokenizer`` trains one from an archive and writes it as JSON for ``data.text.tokenizer``.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from common.errors import DataError, UserError
from common.files import whole_file
from common.randomness import stable_hash
from datamodules.storage import cache_root

Kind = Literal["wordpiece", "bpe"]
#: The special tokens in the order of their ids, 0 to 3.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
_OTHER_NAMES = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[MASK]": "<mask>"}
_MAX_WORD = 100
#: How byte-level tokenizers write the space before a word.
_BLANK = "Ġ"


class EncodedText(NamedTuple):
    """A text as tokens, the class token first.

    Attributes:
        ids: long ``(T,)``.
        starts: bool ``(T,)``, True where a token begins a word.
        maskable: bool ``(T,)``, False at special tokens.
        cut: Whether the text was longer.
    """

    ids: Tensor
    starts: Tensor
    maskable: Tensor
    cut: bool


class ReportTokenizer:
    """Turns reports into tokens and back.

    A word is a unit of the tokenizer's pre-tokenization; for byte-level tokenizers, which also split at digits and
    hyphens, it is whatever stands between two spaces.

    Args:
        tokenizer: A tokenizer of the tokenizers library.

    Raises:
        DataError: it has no token for padding, class, mask or unknown words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend = tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # what looks like a special token in a text is text
        self._byte_level = tokenizer.token_to_id(_BLANK) is not None
        found = {name: self._special_id(name) for name in SPECIAL}
        missing = [f"{name} (or {_OTHER_NAMES[name]})" for name, value in found.items() if value is None]
        if missing:
            raise DataError(f"The tokenizer has no {', '.join(missing)}: train one with `medmim tokenizer`.")
        self.pad_id, self.unk_id, self.cls_id, self.mask_id = (int(value or 0) for value in found.values())
        #: The end token; None if the tokenizer has none, as those trained here.
        self.end_id = next((i for i in map(tokenizer.token_to_id, ("[SEP]", "</s>")) if i is not None), None)

    def _special_id(self, name: str) -> int | None:
        value = self.backend.token_to_id(name)
        return self.backend.token_to_id(_OTHER_NAMES[name]) if value is None else value

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.backend.get_vocab_size()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole tokenizer: equal fingerprints mean equal ids."""
        return f"{stable_hash(self.backend.to_str()):016x}"

    def encode(self, text: str, length: int, end: bool = False) -> EncodedText:
        """Turn a text into at most ``length`` tokens, the class token first.

        Args:
            text: The text.
            length: Most tokens T.
            end: Whether the end token, if there is one, comes last.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        last = [self.end_id] if end and self.end_id is not None else []
        room = length - 1 - len(last)
        words = encoding.word_ids[:room]
        ids = torch.tensor([self.cls_id, *encoding.ids[:room], *last])
        if self._byte_level:
            begins = [index == 0 or token.startswith(_BLANK) for index, token in enumerate(encoding.tokens[:room])]
        else:
            begins = [index == 0 or word != words[index - 1] for index, word in enumerate(words)]
        starts = torch.tensor([True, *begins, *(True for _ in last)])
        maskable = torch.tensor([False, *(True for _ in words), *(False for _ in last)])
        return EncodedText(ids, starts, maskable, len(encoding.ids) > room)

    def token(self, index: int) -> str:
        """Return the text of a token, with ``##`` before continuations of a word."""
        return self.backend.id_to_token(index) or SPECIAL[1]

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON, completely or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(self.backend.to_str(pretty=True), encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: Kind = "wordpiece") -> ReportTokenizer:
    """Learn a vocabulary from texts.

    Args:
        texts: Texts of the training split only.
        vocab_size: Most tokens, including the four special ones.
        kind: ``"wordpiece"`` (lower case, no accents, single digits), or ``"bpe"`` on bytes, keeping all characters.

    Raises:
        DataError: no texts, or ``vocab_size`` leaves no room beside the special tokens.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise DataError("There is no text in the training split to learn a vocabulary from.")
    if vocab_size <= len(SPECIAL):
        raise DataError(f"vocab_size must be above {len(SPECIAL)}, got {vocab_size}.")
    return ReportTokenizer(
        _train_wordpiece(texts, vocab_size) if kind == "wordpiece" else _train_bpe(texts, vocab_size)
    )


def learned_tokenizer(texts: Sequence[str], vocab_size: int, kind: Kind = "wordpiece") -> ReportTokenizer:
    """Train a tokenizer as :func:`train_tokenizer` does, or load the one already trained on these texts.

    Raises:
        DataError: as :func:`train_tokenizer`.
    """
    digest = stable_hash(vocab_size, *sorted(texts))
    path = cache_root() / "tokenizers" / f"{kind}-{digest:016x}.json"
    with suppress(DataError):  # not trained yet, or damaged since
        return load_tokenizer(path)
    train_tokenizer(texts, vocab_size, kind).save(path)
    return load_tokenizer(path)


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_MAX_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.NFKD(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=False)]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _train_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a WordPiece vocabulary deterministically.

    The trainer numbers continuation characters in hash-table order and breaks ties by number. Listing them first as
    special tokens fixes their numbers; the vocabulary then moves to a tokenizer without these.
    """
    blank = _wordpiece({})
    alphabet = {c for text in texts for c in blank.normalizer.normalize_str(text) if not c.isspace()}
    reserved = [*SPECIAL, *(f"##{c}" for c in sorted(alphabet))]
    blank.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=reserved, show_progress=False)
    )
    tokenizer = _wordpiece(blank.get_vocab())
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> ReportTokenizer:
    """Load a tokenizer: a JSON of the tokenizers library, a folder that transformers can read, or a name on its hub.

    Raises:
        DataError: no tokenizer at ``path``.
    """
    name, path = str(path), Path(path)
    named = not path.exists() and path.suffix != ".json" and name.count("/") == 1 and not path.is_absolute()
    try:
        if path.is_dir() or named:
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(name, local_files_only=not named)
            return ReportTokenizer(loaded.backend_tokenizer)
        return ReportTokenizer(Tokenizer.from_file(str(path)))
    except UserError:
        raise
    except Exception as error:  # both libraries raise many kinds of exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"There is no tokenizer at {path} (a JSON file, a folder of transformers, or a name on its hub): {reason}"
        ) from error
