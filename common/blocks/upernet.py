"""UPerNet (Xiao et al. 2018) on our image encoders.

Letters: B batch, C channels, E width of the encoder, F width of the heads, R regions, h w grid of patches.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead

from common.blocks.vit import VisionTransformer

#: Where features are taken, as shares of the depth: blocks 4, 6, 8 and 12 of 12.
TAPS = (1 / 3, 1 / 2, 2 / 3, 1)


class SingleValueBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a batch of one sample leaves one value per channel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, h, w)``."""
        if not self.training or input.numel() > self.num_features:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class FeaturePyramid(nn.Module):
    """Turns four maps of one size into a pyramid at 4, 2, 1 and 1/2 times that size.

    Learned up-sampling and a maximum, as mmsegmentation's ``Feature2Pyramid`` for plain vision transformers.

    Args:
        dim: E.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()

        def twice() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

        self.levels = nn.ModuleList(
            [
                nn.Sequential(twice(), SingleValueBatchNorm(dim), nn.GELU(), twice()),
                twice(),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, stride=2),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Rescale four maps ``(B, E, h, w)`` to ``(B, E, 4h, 4w)``, ``2h``, ``h`` and ``h / 2``."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class UPerNet(nn.Module):
    """Transformers' UPerNet heads on four feature maps of an encoder, and an auxiliary head for training.

    The encoder's final norm is removed; its position embeddings are trained.

    Args:
        encoder: An image encoder.
        num_regions: R; the background is a class of its own.
        hidden_size: F.
        auxiliary_channels: Width of the auxiliary head, which reads the third map.
        dropout: Dropout rate per channel before both classifiers.

    Raises:
        ValueError: the encoder has fewer than two patches along an axis.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        num_regions: int,
        hidden_size: int = 768,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(encoder.grid_size) < 2:
            raise ValueError(f"UPerNet halves the grid of patches, so it needs two each way, got {encoder.grid_size}.")
        encoder.norm = nn.Identity()  # type: ignore[assignment]
        encoder.pos_embed.requires_grad_(True)
        self.encoder = encoder
        self.taps = [round(len(encoder.blocks) * share) for share in TAPS]
        self.neck = FeaturePyramid(encoder.embed_dim)
        config = UperNetConfig(hidden_size=hidden_size, auxiliary_channels=auxiliary_channels)
        config.num_labels = 1 + num_regions
        widths = [encoder.embed_dim] * len(TAPS)
        self.head = UperNetHead(config, widths)
        self.auxiliary_head = UperNetFCNHead(config, widths)
        for head in (self.head, self.auxiliary_head):
            classifier: Any = head.classifier
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)
            head.classifier = nn.Sequential(nn.Dropout2d(dropout), classifier)
        for module in self.head.modules():
            if isinstance(module, UperNetConvModule):
                module.batch_norm = SingleValueBatchNorm(hidden_size)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """Return four maps ``(B, E, h, w)`` of an image ``(B, C, H, W)``; one channel stands for all of them."""
        image = image.expand(-1, self.encoder.patch_embed.in_channels, -1, -1)
        hidden = self.encoder.encode_image(image, self.taps).hidden
        patches = [tokens[:, self.encoder.num_prefix_tokens :] for tokens in hidden]
        return [tokens.transpose(1, 2).unflatten(2, self.encoder.grid_size) for tokens in patches]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Segment ``(B, C, H, W)``.

        Returns:
            Logits ``(B, 1 + R, H, W)``, the background first, float32; in training those of the auxiliary head besides.
        """
        levels = self.neck(self.feature_maps(image))
        heads = (self.head, self.auxiliary_head) if self.training else (self.head,)
        size = image.shape[2:]
        return tuple(F.interpolate(head(levels).float(), size=size, mode="bilinear") for head in heads)
