"""Matching a student to a teacher: token features, and assignments to prototypes (DINO, iBOT).

Letters: B batch, K prototypes, N positions, M hidden positions of a batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import all_reduce_sum, highest_value, world_size
from common.losses.reconstruction import masked_mse
from common.runtime.precision import at_least_float32

_EPS = 1e-6


def standardised_features(features: Tensor) -> Tensor:
    """Standardise each token ``(..., D)`` over its features (LayerNorm without weights, eps 1e-6), in float32.

    A target of fixed spread cannot be met by shrinking: a projection that goes to zero no longer lowers the loss.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        return F.layer_norm(features, features.shape[-1:], eps=_EPS)


def token_feature_mse(
    pred: Tensor, target: Tensor, mask: Tensor, standardise: bool = False, sync: bool = True
) -> Tensor:
    """Mean squared difference of token features (UMD Eq. 4): mean over features, then over the tokens that count.

    Args:
        pred: ``(B, N, D)``, the student's.
        target: ``(B, N, D)``, the teacher's; detach it here or not, as the method wants.
        mask: bool or 0/1 ``(B, N)``, which tokens count.
        standardise: Whether targets are standardised first, token by token.
        sync: Whether to reduce over ranks: sums and counts, with gradients.

    Returns:
        A scalar, float32 (float64 stays); 0 with a graph where no token counts.
    """
    return masked_mse(pred, standardised_features(target) if standardise else target, mask, sync)


@torch.no_grad()
def centred_softmax(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Return the teacher's targets ``softmax((t - c) / T)`` ``(..., K)``, float32 (float64 stays), without gradient."""
    with torch.autocast(logits.device.type, enabled=False):
        return ((at_least_float32(logits) - centre) / temperature).softmax(-1)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, rounds: int = 3, sync: bool = True) -> Tensor:
    """Assign rows to prototypes so that all prototypes are used alike (SwAV, Caron et al. 2020; as DINOv2 does).

    Args:
        logits: ``(B, K)``; ranks may hold different numbers of rows.
        temperature: Above 0.
        rounds: How often prototypes, then rows are scaled to equal sums.
        sync: Whether the sums over rows run over all ranks.

    Returns:
        ``(B, K)``, rows that sum to 1; float32 (float64 stays), without gradient.
    """

    def over_ranks(x: Tensor) -> Tensor:
        return all_reduce_sum(x) if sync else x

    with torch.autocast(logits.device.type, enabled=False):
        scaled = at_least_float32(logits) / temperature
        # One constant for all ranks: it cancels, and keeps the exponential finite.
        top = scaled.max() if len(scaled) else scaled.new_full((), -torch.inf)
        weights = (scaled - (highest_value(top) if sync else top)).exp()
        smallest = torch.finfo(weights.dtype).tiny
        for _ in range(rounds):
            weights = weights / over_ranks(weights.sum(0)).clamp(min=smallest)
            weights = weights / weights.sum(1, keepdim=True).clamp(min=smallest)
        return weights


def _cross_entropy(targets: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy ``(...)`` of targets ``(..., K)`` with the student's softmax."""
    return -(targets * (at_least_float32(student) / temperature).log_softmax(-1)).sum(-1)


def dino_cross_entropy(
    targets: Sequence[Tensor], students: Sequence[Tensor], temperature: float, sync: bool = True
) -> Tensor:
    """Cross-entropy between all pairs of different views (DINO, Caron et al. 2021, Eq. 3), mean over pairs and samples.

    Args:
        targets: The teacher's probabilities ``(B, K)`` of the global views.
        students: The student's logits ``(B, K)`` of the same views, in their order, then of any further ones.
        temperature: The student's, above 0.
        sync: Whether the mean runs over the samples of all ranks, which must hold equally many.

    Returns:
        A scalar in float32 (float64 stays).
    """
    with torch.autocast(students[0].device.type, enabled=False):
        pairs = [_cross_entropy(target.detach(), student, temperature).sum()
                 for first, target in enumerate(targets)
                 for second, student in enumerate(students) if first != second]  # fmt: skip
        total = torch.stack(pairs).mean()
        samples = len(students[0])
        return all_reduce_sum(total) / (samples * world_size()) if sync else total / samples


def ibot_cross_entropy(targets: Tensor, student: Tensor, mask: Tensor, temperature: float, sync: bool = True) -> Tensor:
    """Cross-entropy at hidden positions (iBOT, Zhou et al. 2022, Eq. 2).

    Per image it is the mean over its hidden positions, then the mean over all images; one that hides nothing adds 0, as
    in the published code.

    Args:
        targets: ``(M, K)``, the teacher's probabilities at the hidden positions, in the order of ``mask``.
        student: ``(M, K)``, the student's logits there.
        mask: bool ``(B, N)``, True = hidden, M of them.
        temperature: The student's, above 0.
        sync: Whether the mean runs over the images of all ranks, which must hold equally many.

    Returns:
        A scalar in float32 (float64 stays); 0 with a graph where nothing is hidden.
    """
    with torch.autocast(student.device.type, enabled=False):
        errors = _cross_entropy(targets.detach(), student, temperature)
        weights = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)[mask]
        total = (errors * weights.to(errors.dtype)).sum()
        return all_reduce_sum(total) / (len(mask) * world_size()) if sync else total / len(mask)
