"""Masks that follow a teacher's attention (AttMask, Kakogeorgiou et al. 2022).

Letters: B batch, N positions.
"""

from typing import Literal

from torch import Tensor

Choice = Literal["high", "low"]
#: Keeps whole numbers whole where the product of a share and a count falls short by round-off.
_EPS = 1e-9


def hidden_counts(share: Tensor, positions: int) -> Tensor:
    """Return how many of N positions each sample hides: the floor of its share, long ``(B,)``."""
    return (share.double() * positions + _EPS).long()


def mask_by_attention(attention: Tensor, share: Tensor, choice: Choice = "high") -> Tensor:
    """Hide the positions that are attended most, or least.

    Args:
        attention: ``(B, N)``, how much each position is attended.
        share: ``(B,)``, the share of positions that each sample hides.
        choice: ``"high"`` hides the most attended ones, ``"low"`` the least.

    Returns:
        bool ``(B, N)``, True = hidden, exactly the floor of share times N; of equal ones the lower index first.

    Raises:
        ValueError: the choice is unknown.
    """
    if choice not in ("high", "low"):
        raise ValueError(f"The choice of positions is 'high' or 'low', got {choice!r}.")
    order = attention.argsort(dim=1, descending=choice == "high", stable=True)
    return order.argsort(dim=1) < hidden_counts(share, attention.shape[1])[:, None]
