"""A linear layer on every token as a segmentation network: what an encoder's tokens know of where things are."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class DenseLinear(nn.Module):
    """Logits of every token, enlarged to the image, on any encoder whose tokens lie on a grid.

    Args:
        encoder: With ``num_features``, ``grid_size`` and ``forward_features``.
        out_channels: Output channels.

    Raises:
        ValueError: the encoder's tokens lie on no grid.
    """

    def __init__(self, encoder: Any, out_channels: int) -> None:
        super().__init__()
        if not hasattr(encoder, "grid_size"):
            raise ValueError(f"A dense linear layer needs tokens on a grid, which {type(encoder).__name__} has not.")
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.num_features)
        self.head = nn.Linear(encoder.num_features, out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Segment ``(B, C, *space)`` to logits ``(B, out_channels, *space)``."""
        tokens = self.encoder.forward_features(image)[:, getattr(self.encoder, "num_prefix_tokens", 0) :]
        grid = self.head(self.norm(tokens.float())).transpose(1, 2).unflatten(2, tuple(self.encoder.grid_size))
        mode = "bilinear" if image.ndim == 4 else "trilinear"
        return F.interpolate(grid, size=tuple(image.shape[2:]), mode=mode)
