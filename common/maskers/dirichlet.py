"""Visible tokens shared out over modalities by a Dirichlet draw (MultiMAE, Bachmann et al. 2022, section 3.2).

Letters: B batch, M modalities, N positions of each, V visible tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.randomness import KeyedGenerator

_EPS = 1e-9


def dirichlet_counts(proportions: Tensor, visible: Tensor, positions: int, available: Tensor) -> Tensor:
    """Share out visible tokens by largest remainder, at most N to a modality.

    Of equal remainders the lower index comes first. What a full modality cannot take goes, one token at a time, to the
    one with room that lags its proportion most.

    Args:
        proportions: ``(B, M)``, rows that sum to 1 over the available modalities.
        visible: long ``(B,)``, V; at most N times the number of available modalities.
        positions: N.
        available: bool ``(B, M)``.

    Returns:
        long ``(B, M)``, rows that sum to V; 0 where a modality is absent.
    """
    # Exact sums matter more than speed here: a few numbers a sample, in float64.
    wanted = proportions.double() * visible[:, None] * available
    counts = (wanted + _EPS).floor()
    remainder = (wanted - counts).masked_fill(~available, -torch.inf)
    rank = remainder.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = counts + (rank < (visible[:, None] - counts.sum(1, keepdim=True)))
    counts = counts.clamp(max=positions)
    for _ in range(int((visible - counts.sum(1)).max())):
        room = available & (counts < positions)
        lag = (wanted - counts).masked_fill(~room, -torch.inf)
        short = counts.sum(1) < visible
        counts[short, lag.argmax(1)[short]] += 1
    return counts.long()


class ModalityTokens(NamedTuple):
    """Which tokens are visible, the modalities' positions in one row: token m N + n is position n of modality m.

    Attributes:
        mask: bool ``(B, M, N)``, True = hidden or absent.
        keep: long ``(B, K)``, the visible tokens, filled up to the longest row with others.
        real: bool ``(B, K)``, which entries of ``keep`` are visible.
    """

    mask: Tensor
    keep: Tensor
    real: Tensor


class DirichletMasker:
    """Leave a share of the available tokens visible, spread over the modalities unevenly.

    Args:
        share: Visible tokens over available ones, in (0, 1].

    Raises:
        ValueError: ``share`` is outside (0, 1].
    """

    def __init__(self, share: float = 1 / 6) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` must lie in (0, 1], got {share}.")
        self.share = share

    def __call__(self, generator: KeyedGenerator, positions: int, available: Tensor) -> ModalityTokens:
        """Draw the visible tokens: proportions ~ Dirichlet(1, ..., 1), positions uniformly within a modality.

        Args:
            generator: Source of the draws, one key per sample.
            positions: N.
            available: bool ``(B, M)``.
        """
        batch, modalities = available.shape
        visible = (self.share * available.sum(1).double() * positions + _EPS).long().clamp(min=1)
        # Normalised exponential variates are a flat Dirichlet draw.
        weights = -(generator.rand((batch, modalities)).double() + 2.0**-25).log() * available
        counts = dirichlet_counts(weights / weights.sum(1, keepdim=True), visible, positions, available)
        rank = generator.rand((batch, modalities, positions)).argsort(dim=2, stable=True).argsort(dim=2)
        mask = rank >= counts[:, :, None]
        order = mask.flatten(1).long().argsort(dim=1, stable=True)[:, : int(visible.max())]
        return ModalityTokens(mask, order, ~mask.flatten(1).gather(1, order))
