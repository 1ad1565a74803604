"""Masking of whole words in a text, for reports that are filled in (masked record modeling, section 3.1).

Letters: B texts, T tokens.
"""

from typing import Literal

from torch import Tensor

from common.randomness import RandomSource, uniform


class WordMasker:
    """Hide each word of a text with the same probability, always by the mask token.

    Args:
        ratio: Probability in [0, 1] that a word is hidden.
        unit: ``"word"`` hides all tokens of a word together, ``"token"`` draws for each token.
        mask_last: Whether the last of the T positions may be hidden; the published code never does.

    Raises:
        ValueError: ``ratio`` is outside [0, 1], or ``unit`` is unknown.
    """

    def __init__(self, ratio: float = 0.5, unit: Literal["word", "token"] = "word", mask_last: bool = True) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"`ratio` must lie in [0, 1], got {ratio}.")
        if unit not in ("word", "token"):
            raise ValueError(f"`unit` must be 'word' or 'token', got {unit!r}.")
        self.ratio = ratio
        self.unit = unit
        self.mask_last = mask_last

    def __call__(
        self, starts: Tensor, maskable: Tensor, generator: RandomSource = None, draws: Tensor | None = None
    ) -> Tensor:
        """Draw a mask.

        Args:
            starts: bool ``(B, T)``, True where a token begins a word.
            maskable: bool ``(B, T)``, False at special tokens and padding, which are never hidden.
            generator: Source of the draw; None uses torch's default generator.
            draws: ``(B, T)`` uniforms in [0, 1) instead of a draw: the i-th belongs to the i-th word.

        Returns:
            bool ``(B, T)``, True = hidden.
        """
        begins = maskable & (starts if self.unit == "word" else True)
        if draws is None:
            draws = uniform(tuple(starts.shape), generator, starts.device)
        word = (begins.cumsum(1) - 1).clamp(min=0)
        hidden = (draws.gather(1, word) < self.ratio) & maskable
        if not self.mask_last:
            hidden[:, -1] = False
        return hidden

    def corrupt(
        self, ids: Tensor, hidden: Tensor, mask_id: int, vocab_size: int, generator: RandomSource = None
    ) -> Tensor:
        """Return ``ids`` ``(B, T)`` with the mask token where ``hidden`` ``(B, T)`` says so; the rest is unused."""
        return ids.masked_fill(hidden, mask_id)
