"""Matching token features of a student to those of a teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
