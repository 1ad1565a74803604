"""Segmentation networks around BrainMVP's encoders, with heads at full, half and quarter resolution.

Letters: B batch, C channels, R regions, H W D space.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock, UnetrUpBlock
from torch import Tensor, nn

from common.blocks.residual_unet import ResidualUNetDecoder, ResidualUNetEncoder
from common.blocks.uniformer import PatchEmbed3D, UniFormer3D, init_convolutions


class _DeepSupervision(nn.Module):
    """A network with logits at three resolutions."""

    @abstractmethod
    def levels(self, x: Tensor) -> list[Tensor]:
        """Return logits at full, half and quarter resolution."""

    def deep(self, x: Tensor) -> list[Tensor]:
        """Return logits ``(B, R, H, W, D)`` of all levels, finest first, coarse ones interpolated."""
        full, *coarse = self.levels(x)
        return [full, *(F.interpolate(y, full.shape[2:], mode="trilinear", align_corners=True) for y in coarse)]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, R, H, W, D)`` of ``(B, C, H, W, D)``."""
        return self.levels(x)[0]


class UniFormerSegmenter(_DeepSupervision):
    """The 3D UniFormer with residual up-blocks; the last skip is a convolution of the input at full resolution.

    Args:
        encoder: The encoder.
        out_channels: R.
    """

    def __init__(self, encoder: UniFormer3D, out_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        widths = [*reversed(encoder.stage_dims), encoder.stage_dims[0]]
        self.up = nn.ModuleList(
            UnetrUpBlock(3, widths[i], widths[i + 1], 3, 2, norm_name="instance", res_block=True) for i in range(4)
        )
        self.skip = PatchEmbed3D(encoder.config["in_channels"], widths[-1], 3, 1, 1)
        self.out = UnetOutBlock(3, widths[-1], out_channels)
        self.heads = nn.ModuleList(nn.Conv3d(widths[i], out_channels, 1) for i in (3, 2))
        for module in (self.up, self.skip, self.out, self.heads):
            init_convolutions(module)

    def levels(self, x: Tensor) -> list[Tensor]:
        """Return logits at full, half and quarter resolution."""
        maps = self.encoder.stages(x)
        climbed = [maps[-1]]
        for block, skip in zip(self.up, [*reversed(maps[:-1]), self.skip(x)], strict=True):
            climbed.append(block(climbed[-1], skip))
        *_, quarter, half, full = climbed
        return [self.out(full), self.heads[0](half), self.heads[1](quarter)]

    def take(self, rest: Mapping[str, Tensor]) -> list[str]:
        """Start the transposed convolutions from those of pre-training; return which were taken."""
        taken = []
        for index in range(len(self.up)):
            weight = rest.get(f"decoder.up.{index}.weight")
            target = self.up.get_parameter(f"{index}.transp_conv.conv.weight")
            if weight is not None and weight.shape == target.shape:
                with torch.no_grad():
                    target.copy_(weight)
                taken.append(f"decoder.up.{index}.weight")
        return taken


class UNetSegmenter(_DeepSupervision):
    """The residual UNet with its skips added.

    Args:
        encoder: The encoder.
        out_channels: R.
    """

    def __init__(self, encoder: ResidualUNetEncoder, out_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = ResidualUNetDecoder(encoder, out_channels)
        self.heads = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in encoder.stage_dims[1:3])

    def levels(self, x: Tensor) -> list[Tensor]:
        """Return logits at full, half and quarter resolution of the stem's."""
        maps = self.encoder.stages(x)
        *_, quarter, half, full = [maps[-1], *self.decoder.levels(maps)]
        return [self.decoder.out(full), self.heads[0](half), self.heads[1](quarter)]

    def take(self, rest: Mapping[str, Tensor]) -> list[str]:
        """Start the decoder from that of pre-training, but for its head; return what was taken."""
        own = self.decoder.state_dict()
        given = {name.removeprefix("decoder."): value for name, value in rest.items() if name.startswith("decoder.")}
        taken = [name for name in given if name in own and not name.startswith("out.")
                 and own[name].shape == given[name].shape]  # fmt: skip
        self.decoder.load_state_dict({name: given[name] for name in taken}, strict=False)
        return [f"decoder.{name}" for name in taken]


def segmenter(encoder: Any, out_channels: int) -> nn.Module:
    """Make the segmentation network that belongs to an encoder.

    Raises:
        ValueError: there is no such network.
    """
    if isinstance(encoder, UniFormer3D):
        return UniFormerSegmenter(encoder, out_channels)
    if isinstance(encoder, ResidualUNetEncoder):
        return UNetSegmenter(encoder, out_channels)
    raise ValueError(f"BrainMVP segments with UniFormer3D or ResidualUNetEncoder, not with {type(encoder).__name__}.")
