"""E-MIM's objective: the error of hidden patches (Eq. 1) and pyramid Barlow Twins (Eqs. 4, 8 and 10).

Letters: B batch, C modalities, N positions, P voxels per patch of one modality, E encoder width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.losses.barlow_twins import cross_correlation, position_pyramid, sample_barlow_twins, token_barlow_twins
from common.losses.reconstruction import masked_error, masked_mse
from common.module import Term
from common.runtime.precision import at_least_float32
from common.types import MaskOutput, Reconstruction
from experiments.e_mim.model import EMIMOutput


def foreground(patches: Tensor) -> Tensor:
    """Return which positions of patches ``(B, C, N, P)`` are not air in every modality, bool ``(B, N)``."""
    return (patches != 0).any(3).any(1)


def scored_reconstruction(output: EMIMOutput, mask: MaskOutput, acquired: Tensor, grouped: bool) -> Reconstruction:
    """Return the reconstruction of a batch, scored at the hidden patches of the modalities that were acquired.

    Args:
        output: Of the network.
        mask: What was hidden, ``(B, C, N)``.
        acquired: bool ``(B, C)``.
        grouped: Whether the parts that validation reports apart are named.
    """
    scored = mask.mask & acquired[:, :, None]
    groups = {}
    if grouped:
        nothing_visible = mask.mask.all(1, keepdim=True)
        groups = {
            "fully_hidden": scored & nothing_visible,
            "partly_visible": scored & ~nothing_visible,
            "foreground": scored & foreground(output.target)[:, None],
        }
    return Reconstruction(at_least_float32(output.pred), output.target, scored, groups)


class Correlation(NamedTuple):
    """How the tokens of the full and of the masked volume are compared at one level.

    Attributes:
        axis: ``"position"`` as the paper (Eq. 4), or ``"feature"``.
        summed: ``"batch"`` sums Eq. 4 over batch and features; ``"sample"`` makes one matrix per sample.
        center: whether each position's mean is subtracted before Eq. 4.
        reduction: ``"sum"`` is Eq. 8; ``"mean"`` does not grow with the number of tokens.
        off_diagonal_weight: factor of Eq. 8's second sum.
    """

    axis: Literal["position", "feature"]
    summed: Literal["batch", "sample"]
    center: bool
    reduction: Literal["mean", "sum"]
    off_diagonal_weight: float

    @property
    def is_plain(self) -> bool:
        """Whether it is Eq. 4 as the paper has it."""
        return self.axis == "position" and self.summed == "batch" and not self.center

    def loss(self, clean: Tensor, masked: Tensor, sync: bool) -> Tensor:
        """Return Eq. 8 of tokens ``(B, N, E)``."""
        if self.summed == "sample":
            return sample_barlow_twins(clean, masked, self.reduction, self.off_diagonal_weight, sync)
        return token_barlow_twins(clean, masked, self.axis, self.reduction, self.off_diagonal_weight, self.center, sync)

    def diagonals(self, clean: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean diagonal and the mean absolute off-diagonal of the matrix of tokens ``(B, N, E)``."""
        matrix = cross_correlation(clean, masked, self.axis, self.center, sync=False)
        diagonal, n = matrix.diagonal(), len(matrix)
        off = (matrix.abs().sum() - diagonal.abs().sum()) / max(n * (n - 1), 1)
        return diagonal.mean(), off


class Objective(NamedTuple):
    """The terms of E-MIM's loss.

    Attributes:
        loss_on: ``"masked"`` is Eq. 1, ``"all"`` Eq. 9.
        taps: levels of the pyramid.
        pyramid_weight: weight of their sum.
        correlation: how a level is scored.
    """

    loss_on: Literal["masked", "all"]
    taps: Sequence[int]
    pyramid_weight: float
    correlation: Correlation

    def terms(
        self, output: EMIMOutput, reconstruction: Reconstruction, acquired: Tensor, sync: bool
    ) -> dict[str, Term]:
        """Return reconstruction, pyramid and, to be logged, each of its levels.

        Args:
            output: Of the network.
            reconstruction: What was made of it.
            acquired: bool ``(B, C)``.
            sync: Whether statistics run over all ranks; where they do not, the last matrix is described as well.
        """
        hidden, samples = reconstruction.mask, float(len(acquired))
        scored = acquired[:, :, None].expand_as(hidden) if self.loss_on == "all" else hidden
        pairs = list(zip(output.clean, output.masked, strict=True)) if output.clean else []
        if sync and (together := self._in_one_exchange(pairs, reconstruction, scored)) is not None:
            error, losses = together
        else:
            error = masked_mse(reconstruction.pred, reconstruction.target, scored, sync)
            losses = [self.correlation.loss(clean, masked, sync) for clean, masked in pairs]
        terms = {"reconstruction": Term(error, scored.sum(), 1.0)}
        if not pairs:
            return terms
        levels = {f"loss_barlow_twins_tap{tap}": loss for tap, loss in zip(self.taps, losses, strict=True)}
        pyramid = torch.stack(list(levels.values())).sum()
        terms["barlow_twins"] = Term(pyramid, samples, self.pyramid_weight)
        terms |= {name: Term(value, samples) for name, value in levels.items()}
        if not sync:
            on, off = self.correlation.diagonals(output.clean[-1], output.masked[-1])
            terms |= {"correlation_diagonal": Term(on, samples), "correlation_off_diagonal": Term(off, samples)}
        return terms

    def _in_one_exchange(
        self, pairs: Sequence[tuple[Tensor, Tensor]], reconstruction: Reconstruction, scored: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Return the error and each level's loss over all ranks; None where the levels are compared otherwise."""
        if not pairs or not self.correlation.is_plain:
            return None
        sums = masked_error(reconstruction.pred, reconstruction.target, scored)
        found = position_pyramid(pairs, self.correlation.reduction, self.correlation.off_diagonal_weight, sums)
        if found is None:
            return None
        losses, (total, count) = found
        return total / count.clamp(min=1), losses
