"""Random masking of tokens, as in MAE (He et al. 2022, section 3)."""

import torch

from common.randomness import RandomSource, uniform
from common.types import MaskOutput


def order_to_output(order: torch.Tensor, num_visible: int) -> MaskOutput:
    """Turn a random order of positions into the index tensors of MAE.

    Args:
        order: long ``(B, N)``, a permutation of the positions per sample; the first ``num_visible`` stay visible.
        num_visible: K, the same for every sample.
    """
    ids_restore = torch.argsort(order, dim=1)
    return MaskOutput(mask=ids_restore >= num_visible, ids_keep=order[:, :num_visible], ids_restore=ids_restore)


class RandomMasker:
    """Hide the same share of tokens in every sample, uniformly without replacement.

    Args:
        mask_ratio: Share of hidden tokens in [0, 1); ``floor(N (1 - mask_ratio) + 1e-9)`` stay visible.

    Raises:
        ValueError: ``mask_ratio`` is outside [0, 1).
    """

    def __init__(self, mask_ratio: float = 0.75) -> None:
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"`mask_ratio` must lie in [0, 1), got {mask_ratio}.")
        self.mask_ratio = mask_ratio

    def num_visible(self, num_tokens: int) -> int:
        """Return how many of ``num_tokens`` stay visible."""
        return int(num_tokens * (1 - self.mask_ratio) + 1e-9)

    def __call__(
        self, batch_size: int, num_tokens: int, device: torch.device | str | None = None, generator: RandomSource = None
    ) -> MaskOutput:
        """Draw a mask.

        Args:
            batch_size: B.
            num_tokens: N.
            device: Where the mask is wanted; None means the generator's device, else the CPU.
            generator: Source of the draw; None uses torch's default generator.

        Returns:
            ``mask`` bool (B, N), ``ids_keep`` long (B, K), ``ids_restore`` long (B, N).

        Raises:
            ValueError: no token would stay visible.
        """
        num_visible = self.num_visible(num_tokens)
        if num_visible < 1:
            raise ValueError(f"A `mask_ratio` of {self.mask_ratio} leaves none of {num_tokens} tokens visible.")
        order = torch.argsort(uniform((batch_size, num_tokens), generator, device), dim=1, stable=True)
        return order_to_output(order, num_visible)
