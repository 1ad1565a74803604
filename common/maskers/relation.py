"""Removing the strongest relations between tokens (masked relation modeling, Eqs. 4 and 6).

Letters: B batch, H heads, Q rows (queries), K columns (keys).
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TieRule = Literal["threshold", "rank"]
#: Keeps whole numbers whole where the product of a ratio and a count falls short by round-off.
_EPS = 1e-9


def removed_relations(ratio: float, keys: int) -> int:
    """Return how many of a row's real keys are removed: the floor of their share, at least one being left."""
    return max(min(int(ratio * keys + _EPS), keys - 1), 0)


def _ascending(scores: Tensor) -> Tensor:
    """Sort each row ``(..., K)`` on a CPU by NumPy, whose vector instructions beat any selection of torch."""
    numeric = scores.float() if scores.dtype == torch.bfloat16 else scores
    return torch.from_numpy(np.sort(numeric.numpy(), axis=-1))


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th largest value of each row ``(..., 1)``; on accelerators looked for from the nearer end."""
    columns = scores.shape[-1]
    if scores.device.type == "cpu" and not isinstance(scores, FakeTensor):  # which has no values, only a shape
        return _ascending(scores)[..., columns - k, None]
    if 2 * k <= columns:
        return scores.topk(k, dim=-1).values[..., -1:]
    return scores.topk(columns - k + 1, dim=-1, largest=False).values[..., -1:]


def _ranks(scores: Tensor) -> Tensor:
    """Return the place of each column in its row, 0 the largest; of equal ones the lower column comes first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def mask_top_relations(
    scores: Tensor, ratio: float, key_mask: Tensor | None = None, tie_rule: TieRule = "threshold"
) -> Tensor:
    """Return which relations are kept when the strongest share of each row is removed (Eqs. 4 and 6).

    k is the floor of ``ratio`` times the sample's real keys, and at most one less than these.

    Args:
        scores: ``(B, H, Q, K)``, logits, or anything that grows with them.
        ratio: Share of a row to remove, in [0, 1); 0 removes nothing.
        key_mask: bool ``(B, K)``, True = real key; padded keys do not count and are never kept. None: all are real.
        tie_rule: ``"threshold"`` removes every entry as large as the k-th largest, ties included, as the
            equations say; ``"rank"`` removes exactly k, of equal ones the lower column first.

    Returns:
        bool ``(B, H, Q, K)``, True = kept. No gradient passes.

    Raises:
        ValueError: ``ratio`` is outside [0, 1), or the tie rule is unknown.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` must lie in [0, 1), got {ratio}.")
    if tie_rule not in ("threshold", "rank"):
        raise ValueError(f"`tie_rule` must be 'threshold' or 'rank', got {tie_rule!r}.")
    scores = scores.detach()
    if key_mask is None:
        removed = removed_relations(ratio, scores.shape[-1])
        if removed == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        return _ranks(scores) >= removed if tie_rule == "rank" else scores < _kth_largest(scores, removed)
    real = key_mask[:, None, None, :]
    scores = scores.masked_fill(~real, -torch.inf)
    counts = key_mask.sum(1)
    wanted = (ratio * counts.double() + _EPS).long()
    k = torch.minimum(wanted, counts - 1).clamp(min=0)[:, None, None, None]
    if tie_rule == "rank":
        return (_ranks(scores) >= k) & real
    ordered = _ascending(scores) if scores.device.type == "cpu" else scores.sort(dim=-1).values
    place = (scores.shape[-1] - k).clamp(max=scores.shape[-1] - 1)
    threshold = ordered.gather(-1, place.expand(*scores.shape[:-1], 1))
    return ((scores < threshold) | (k == 0)) & real
