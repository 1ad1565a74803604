"""The precision in which losses are computed."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or unchanged if it is float64: losses must not be computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()
