"""The precision that losses are taken in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is where it is float64: losses are no place for half precision."""
    return x if x.dtype == torch.float64 else x.float()
