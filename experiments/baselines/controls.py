"""Controls that learn nothing from images: a histogram of grey levels, mean colours of a grid, and the classes' prior.

A method that is not told apart from these has learned nothing that exposure or colour does not say.

Letters: B batch, C channels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.registry import registered


@registered
class GreyHistogram(nn.Module):
    """An encoder that returns only how often each grey level occurs.

    Args:
        in_channels: C.
        image_size: Unused: any size will do.
        bins: Grey levels told apart, of equal width.
        limits: Lowest and highest standardised value.
        channels: ``"each"`` counts every channel by itself, ``"mean"`` the mean of the channels.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        in_channels: int,
        image_size: Sequence[int],
        bins: int = 32,
        limits: Sequence[float] = (-3.0, 3.0),
        channels: Literal["each", "mean"] = "each",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "image_size": list(image_size),
            "bins": bins,
            "limits": list(limits),
            "channels": channels,
        }
        self.bins, self.limits, self.channels = bins, tuple(limits), channels
        self.num_features = bins * (in_channels if channels == "each" else 1)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the share of pixels or voxels in each bin, ``(B, 1, bins)`` or ``(B, 1, C bins)``."""
        low, high = self.limits
        values = image.float().flatten(2)
        values = values.mean(1, keepdim=True) if self.channels == "mean" else values
        level = ((values - low) / (high - low) * self.bins).long().clamp(0, self.bins - 1)
        counts = torch.zeros(*level.shape[:2], self.bins, device=image.device)
        counts.scatter_add_(2, level, torch.ones_like(level, dtype=counts.dtype))
        return (counts / level.shape[2]).flatten(1)[:, None]


@registered
class ColourGrid(nn.Module):
    """An encoder that returns only the mean value of each channel in the cells of a grid.

    Args:
        in_channels: C.
        image_size: Two or three axes; any size will do.
        grid: Cells along each axis; 0 takes 8, or 4 in volumes.
    """

    num_prefix_tokens = 0

    def __init__(self, in_channels: int, image_size: Sequence[int], grid: int = 0) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"in_channels": in_channels, "image_size": list(image_size), "grid": grid}
        dims = len(image_size)
        self.cells = grid or (8 if dims == 2 else 4)
        self.num_features = in_channels * self.cells**dims

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the mean of each cell as one token ``(B, 1, C cells)``."""
        pool = F.adaptive_avg_pool2d if image.ndim == 4 else F.adaptive_avg_pool3d
        return pool(image.float(), self.cells).flatten(1)[:, None]


@registered
class MajorityClass(nn.Module):
    """An encoder that returns the same for every image, so that a head on it learns the prior of the classes alone.

    Args:
        in_channels: Unused.
        image_size: Unused.
    """

    num_prefix_tokens = 0

    def __init__(self, in_channels: int, image_size: Sequence[int]) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"in_channels": in_channels, "image_size": list(image_size)}
        self.num_features = 1

    def forward_features(self, image: Tensor) -> Tensor:
        """Return one token of 1, ``(B, 1, 1)``."""
        return torch.ones(len(image), 1, 1, device=image.device)
