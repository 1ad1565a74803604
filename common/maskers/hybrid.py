"""Hybrid Mask Pattern for multi-modal volumes (E-MIM, section III-A and Fig. 3)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.maskers.random import order_to_output
from common.randomness import KeyedGenerator, RandomSource, uniform
from common.types import MaskOutput


def _ranks(noise: Tensor) -> Tensor:
    """Return the rank of each entry within its row, long, same shape."""
    return torch.argsort(torch.argsort(noise, dim=1, stable=True), dim=1)


class HybridMasker:
    """Hide one whole modality, then whole positions, then single modalities at the positions that are left.

    The three steps are drawn independently for every sample:

    1. modal: one of the available modalities is hidden everywhere;
    2. position: ``round(r n)`` positions are hidden in every modality;
    3. patch: at every other position ``k`` of the remaining modalities are hidden, assigned round robin over shuffled
       positions, so each loses an equal share (+-1) and every such position keeps a visible modality.

    The paper gives no ratios. By default 75 % of the available entries are hidden whatever the number of modalities:
    with A available, ``k = min(1, A - 2)`` and ``r = (0.75 A - 1 - k) / (A - 1 - k)``; a sample with one modality gets
    positions only. With a step switched off, ``r`` is solved again for the same share, so that ``position`` alone is
    random masking shared across modalities, as in MAE.

    Args:
        modal: Switch for step 1.
        position: Switch for step 2.
        patch: Switch for step 3.
        position_ratio: r in [0, 1]; None solves it for ``mask_ratio``.
        hidden_per_position: k; None means 1 where that leaves a visible modality.
        mask_ratio: Share of the available entries to hide where ``position_ratio`` is None.

    Raises:
        ValueError: a ratio is outside [0, 1] or ``hidden_per_position`` is negative.
    """

    def __init__(
        self,
        modal: bool = True,
        position: bool = True,
        patch: bool = True,
        position_ratio: float | None = None,
        hidden_per_position: int | None = None,
        mask_ratio: float = 0.75,
    ) -> None:
        for name, value in {"position_ratio": position_ratio, "mask_ratio": mask_ratio}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")
        if hidden_per_position is not None and hidden_per_position < 0:
            raise ValueError(f"`hidden_per_position` must not be negative, got {hidden_per_position}.")
        self.modal, self.position, self.patch = modal, position, patch
        self.position_ratio, self.mask_ratio = position_ratio, mask_ratio
        self.hidden_per_position = hidden_per_position

    def __call__(
        self,
        batch_size: int,
        grid_size: int | Sequence[int],
        num_modalities: int,
        modality_mask: Tensor | None = None,
        generator: RandomSource = None,
    ) -> MaskOutput:
        """Draw a mask.

        Args:
            batch_size: B.
            grid_size: Positions along each axis; n is their product.
            num_modalities: M.
            modality_mask: bool ``(B, M)``, True = acquired; None means all. Absent modalities count as hidden.
            generator: Source of the draw; a :class:`KeyedGenerator` ties each row to its own key.

        Returns:
            ``mask`` bool (B, M, n). ``ids_keep`` and ``ids_restore`` are given where positions alone are hidden and
            their number is the same in every sample, so that an encoder may drop them; else None.

        Raises:
            ValueError: ``hidden_per_position`` would leave a position without a visible modality.
        """
        self._check(num_modalities)
        num_positions = math.prod(grid_size) if isinstance(grid_size, Sequence) else grid_size
        device = self._device(modality_mask, generator)
        # Every step draws, switched on or not: switching one off leaves the draw of the others as it was.
        modality_noise = uniform((batch_size, num_modalities), generator, device)
        position_rank = _ranks(uniform((batch_size, num_positions), generator, device))

        available = torch.ones(batch_size, num_modalities, dtype=torch.bool, device=device)
        if modality_mask is not None:
            available = modality_mask.to(device=device, dtype=torch.bool)
        count = available.sum(1, keepdim=True)
        # Random order of the available modalities, absent ones last.
        modality_rank = _ranks(torch.where(available, modality_noise, modality_noise + 1))
        modal_on = (count >= 2).long() if self.modal else torch.zeros_like(count)
        remaining = count - modal_on
        per_position = self._hidden_per_position(remaining)
        num_hidden = self._num_hidden_positions(count, modal_on, per_position, num_positions)

        position_hidden = (position_rank < num_hidden)[:, None, :]
        modal_hidden = (modality_rank < modal_on)[:, :, None]
        deal = modality_rank[:, :, None] - modal_on[:, :, None]
        turn = (position_rank - num_hidden)[:, None, :] * per_position[:, :, None]
        patch_hidden = (deal - turn) % remaining.clamp(min=1)[:, :, None] < per_position[:, :, None]
        mask = ~available[:, :, None] | modal_hidden | position_hidden | patch_hidden
        if self.modal or self.patch or not self.position:
            return MaskOutput(mask)
        # The number of hidden positions does not depend on the sample here, so it is known without a host sync.
        static = self.mask_ratio if self.position_ratio is None else self.position_ratio
        visible = num_positions - round(static * num_positions)
        return MaskOutput(mask, *order_to_output(torch.argsort(-position_rank, dim=1), visible)[1:])

    def _check(self, num_modalities: int) -> None:
        limit = max(num_modalities - (2 if self.modal and num_modalities > 1 else 1), 0)
        if self.patch and self.hidden_per_position is not None and self.hidden_per_position > limit:
            raise ValueError(
                f"`hidden_per_position` must be at most {limit} with {num_modalities} modalities and "
                f"modal={self.modal}, so that every position keeps a visible one; got {self.hidden_per_position}."
            )

    @staticmethod
    def _device(modality_mask: Tensor | None, generator: RandomSource) -> torch.device:
        if modality_mask is not None:
            return modality_mask.device
        if isinstance(generator, torch.Generator | KeyedGenerator):
            return generator.device
        return torch.device("cpu")

    def _hidden_per_position(self, remaining: Tensor) -> Tensor:
        """Return k per sample, long (B, 1): at least one of the remaining modalities stays visible."""
        if not self.patch:
            return torch.zeros_like(remaining)
        wanted = 1 if self.hidden_per_position is None else self.hidden_per_position
        return (remaining - 1).clamp(min=0, max=wanted)

    def _num_hidden_positions(self, count: Tensor, modal_on: Tensor, per_position: Tensor, n: int) -> Tensor:
        """Return round(r n) per sample, long (B, 1)."""
        if not self.position:
            return torch.zeros_like(count)
        taken = modal_on + per_position
        solved = (self.mask_ratio * count - taken) / (count - taken).clamp(min=1)
        ratio = solved if self.position_ratio is None else torch.full_like(solved, self.position_ratio)
        if self.modal or self.patch:
            ratio = torch.where(count == 1, torch.full_like(ratio, self.mask_ratio), ratio)
        return torch.round(ratio.clamp(0, 1) * n).long()
