"""Cross-entropy of words that were hidden."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import all_reduce_sum
from common.runtime.precision import at_least_float32


def masked_cross_entropy(logits: Tensor, targets: Tensor, sync: bool = True) -> Tensor:
    """Mean negative log-likelihood of hidden tokens (masked record modeling Eq. 1, per token).

    Across ranks the sums and the counts are added before they are divided, with gradients.

    Args:
        logits: ``(S, V)``, at the hidden positions only.
        targets: long ``(S,)``, the hidden tokens.
        sync: Whether to reduce over ranks.

    Returns:
        A scalar in nats, float32 (float64 stays); 0 with a graph where nothing is hidden.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        total = F.cross_entropy(logits, targets, reduction="sum")
        count = torch.full_like(total, len(targets))
        if sync:
            total, count = all_reduce_sum(total), all_reduce_sum(count)
        return total / count.clamp(min=1)
