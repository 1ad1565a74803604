"""BrainMVP's network: one encoder and decoder for both views, and the modality templates."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.blocks.template_bank import TemplateBank


class Views(NamedTuple):
    """The network's output for the two views of a batch.

    Attributes:
        cross_pred: ``(B, 1, H, W, D)``, the reconstruction from the view filled with the other sequence.
        template_pred: The same from the view filled with the template.
        cross_features: ``(B, F)``, the encoder's flattened map of the former.
        template_features: Of the latter.
    """

    cross_pred: Tensor
    template_pred: Tensor
    cross_features: Tensor
    template_features: Tensor


class BrainMVP(nn.Module):
    """Encoder, decoder without skips, and templates.

    Args:
        encoder: Of one channel.
        decoder: Maps the encoder's last map to a volume of one channel.
        num_templates: Sequence types.
        template_shape: Voxels of the atlas.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, num_templates: int, template_shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.templates = TemplateBank(num_templates, template_shape)

    def forward(self, cross: Tensor, template: Tensor) -> Views:
        """Encode and decode both views ``(B, 1, H, W, D)`` in one pass."""
        features = self.encoder(torch.cat([cross, template]))
        cross_pred, template_pred = self.decoder(features).chunk(2)
        cross_features, template_features = features.flatten(1).chunk(2)
        return Views(cross_pred, template_pred, cross_features, template_features)
