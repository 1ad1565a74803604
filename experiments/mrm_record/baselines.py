"""A baseline: features that need no training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.blocks.registry import registered


@registered
class GrayHistogram(nn.Module):
    """An encoder that returns only how often each grey level occurs.

    Args:
        in_channels: Channels of the image; their mean is counted.
        image_size: Unused: any size will do.
        bins: Grey levels told apart, of equal width.
        limits: Lowest and highest standardised value, which pixels of 0 and 1 become.
    """

    num_prefix_tokens = 0

    def __init__(
        self, in_channels: int, image_size: Sequence[int], bins: int = 32, limits: Sequence[float] = (-2.0327, 2.0506)
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "image_size": list(image_size),
            "bins": bins,
            "limits": list(limits),
        }
        self.num_features = bins
        self.limits = tuple(limits)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the share of pixels in each bin, ``(B, 1, bins)``, of images ``(B, C, H, W)``."""
        low, high = self.limits
        level = ((image.float().mean(1) - low) / (high - low) * self.num_features).long()
        level = level.clamp(0, self.num_features - 1).flatten(1)
        counts = torch.zeros(len(level), self.num_features, device=image.device)
        counts.scatter_add_(1, level, torch.ones_like(level, dtype=counts.dtype))
        return (counts / level.shape[1])[:, None]
