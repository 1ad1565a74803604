"""Masking of text as BERT does: a fixed budget of tokens, most replaced by the mask, some by others, some kept.

Letters: B texts, T tokens.
"""

from typing import Literal

import torch
from torch import Tensor

from common.randomness import RandomSource, uniform


class BertMasker:
    """Hide ``max(1, round(ratio n))`` of the n real tokens of each text, in whole words.

    Words are taken in a random order as long as they fit into the budget; where none fits, the first is taken. Of what
    is hidden 80 % become the mask token, 10 % another token, 10 % stay (Devlin et al. 2019).

    Args:
        ratio: Share of the real tokens, in [0, 1]; 0 hides nothing.
        unit: ``"word"``, or ``"token"`` to draw single tokens.
        replaced: Share of the hidden tokens that become the mask token, and share that become a random one.

    Raises:
        ValueError: ``ratio`` is outside [0, 1], ``unit`` is unknown, or ``replaced`` are not valid shares.
    """

    def __init__(
        self, ratio: float = 0.15, unit: Literal["word", "token"] = "word", replaced: tuple[float, float] = (0.8, 0.1)
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"`ratio` must be in [0, 1], got {ratio}.")
        if unit not in ("word", "token"):
            raise ValueError(f"`unit` must be 'word' or 'token', got {unit!r}.")
        if min(replaced) < 0 or sum(replaced) > 1:
            raise ValueError(f"`replaced` must be two shares that sum to 1 at most, got {replaced}.")
        self.ratio, self.unit, self.replaced = ratio, unit, tuple(replaced)

    def __call__(self, starts: Tensor, maskable: Tensor, generator: RandomSource = None) -> Tensor:
        """Draw a mask.

        Args:
            starts: bool ``(B, T)``, True where a token begins a word.
            maskable: bool ``(B, T)``, False at special tokens and padding, which are never hidden and do not count.
            generator: Source of the draw; None uses torch's default generator.

        Returns:
            bool ``(B, T)``, True = hidden.
        """
        tokens = maskable.sum(1)
        budget = (self.ratio * tokens + 0.5).long().clamp(min=1) * (tokens > 0) * (self.ratio > 0)
        begins = maskable & (starts if self.unit == "word" else True)
        word = (begins.cumsum(1) - 1).clamp(min=0)
        words = torch.zeros_like(word).scatter_add_(1, word, maskable.long())  # tokens of the i-th word
        draws = uniform(tuple(starts.shape), generator, starts.device)
        order = torch.where(words > 0, draws, torch.full_like(draws, 2.0)).argsort(dim=1, stable=True)
        sizes = words.gather(1, order)
        taken = torch.zeros_like(sizes, dtype=torch.bool)
        used = torch.zeros_like(budget)
        for place in range(sizes.shape[1]):
            size = sizes[:, place]
            taken[:, place] = (size > 0) & (used + size <= budget)
            used = used + size * taken[:, place]
        taken[:, 0] |= (used == 0) & (budget > 0) & (sizes[:, 0] > 0)
        chosen = torch.zeros_like(taken).scatter_(1, order, taken)
        return chosen.gather(1, word) & maskable

    def corrupt(
        self, ids: Tensor, hidden: Tensor, mask_id: int, vocab_size: int, generator: RandomSource = None
    ) -> Tensor:
        """Return ``ids`` ``(B, T)`` with the hidden ones replaced.

        Args:
            ids: The true tokens.
            hidden: bool ``(B, T)``.
            mask_id: The mask token.
            vocab_size: V; random tokens are drawn from all of them.
            generator: Source of the draw.
        """
        kind = uniform(tuple(ids.shape), generator, ids.device)
        other = (uniform(tuple(ids.shape), generator, ids.device) * vocab_size).long().clamp(max=vocab_size - 1)
        masked, random = self.replaced
        result = ids.masked_fill(hidden & (kind < masked), mask_id)
        return torch.where(hidden & (kind >= masked) & (kind < masked + random), other, result)
