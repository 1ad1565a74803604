"""UNETR on any of our encoders, of volumes or of images (Hatamizadeh et al. 2022)."""

from collections.abc import Sequence
from typing import Any

import monai.networks.nets
from torch import Tensor

from common.blocks.vit import VisionTransformer


class UNETR(monai.networks.nets.UNETR):
    """MONAI's UNETR around a given encoder, with the skips of the papers.

    MONAI reads its skips after blocks 4, 7 and 10 (issue 4520); UNETR and E-MIM say 3, 6 and 9.

    Args:
        encoder: An encoder with patches of 16 along every axis; it becomes ``self.vit``.
        out_channels: Output channels.
        feature_size: Width of the first decoder stage.
        norm_name: Normalisation of the convolutional blocks.
        skip_blocks: The blocks (1-based) whose output feeds the three skips; None means a quarter, half and three
            quarters of the depth, which is 3, 6, 9 of 12. ``(4, 7, 10)`` is MONAI's choice.

    Raises:
        ValueError: the encoder's patches are not 16, or a skip lies outside its depth.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        out_channels: int,
        feature_size: int = 16,
        norm_name: str = "instance",
        skip_blocks: Sequence[int] | None = None,
    ) -> None:
        if set(encoder.patch_embed.patch_size) != {16}:
            patch = encoder.patch_embed.patch_size
            raise ValueError(f"UNETR's decoder doubles four times, so patches must be 16, got {patch}.")
        depth = len(encoder.blocks)
        skip_blocks = skip_blocks or [depth * quarter // 4 for quarter in (1, 2, 3)]
        if len(skip_blocks) != 3 or not all(1 <= block <= depth for block in skip_blocks):
            raise ValueError(f"`skip_blocks` must name three of {depth} blocks, got {tuple(skip_blocks)}.")
        super().__init__(
            in_channels=encoder.patch_embed.in_channels,
            out_channels=out_channels,
            img_size=encoder.patch_embed.image_size,
            feature_size=feature_size,
            hidden_size=encoder.embed_dim,
            mlp_dim=encoder.embed_dim,
            num_heads=1,
            norm_name=norm_name,
            spatial_dims=len(encoder.grid_size),
        )
        self.vit: Any = encoder
        self.skip_blocks = tuple(skip_blocks)

    def forward(self, x_in: Tensor) -> Tensor:
        """Segment ``(B, C, *space)`` to logits ``(B, out_channels, *space)``."""
        tokens, skips = self.vit.encode_image(x_in, self.skip_blocks)
        last, shallow, middle, deep = (
            self.proj_feat(stream[:, self.vit.num_prefix_tokens :]) for stream in (tokens, *skips)
        )
        x = self.decoder5(last, self.encoder4(deep))
        x = self.decoder4(x, self.encoder3(middle))
        x = self.decoder3(x, self.encoder2(shallow))
        return self.out(self.decoder2(x, self.encoder1(x_in)))
