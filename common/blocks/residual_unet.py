"""A residual UNet in 3D, encoder and decoder apart, so that the encoder can be pre-trained and carried on.

Letters: B batch, C channels, H W D space, E width of a level.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.registry import registered


class ResidualBlock(nn.Module):
    """Pre-activation block: GroupNorm, ReLU and a convolution, twice, added to the input.

    Args:
        dim: E.
        num_groups: Groups of the GroupNorm.
    """

    def __init__(self, dim: int, num_groups: int = 8) -> None:
        super().__init__()
        self.gn1 = nn.GroupNorm(num_groups, dim)
        self.conv1 = nn.Conv3d(dim, dim, 3, padding=1)
        self.gn2 = nn.GroupNorm(num_groups, dim)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, E, H, W, D)``."""
        y = self.conv1(F.relu(self.gn1(x)))
        return x + self.conv2(F.relu(self.gn2(y)))


@registered
class ResidualUNetEncoder(nn.Module):
    """Four levels joined by strided convolutions.

    Args:
        in_channels: C.
        image_size: Voxels of the crops it is trained on, multiples of 8; other sizes work as well.
        width: E of the finest level; every level doubles it.
        depths: Blocks of the levels.
        patch_size: Side of the patches that the stem embeds; 1, the paper's, convolves at full resolution.

    Raises:
        ValueError: a side of the crop is not a multiple of the coarsest level's step.
    """

    #: The weight that is applied to the input's channels.
    input_kernel = "stem.weight"

    def __init__(
        self,
        in_channels: int = 1,
        image_size: Sequence[int] = (96, 96, 96),
        width: int = 32,
        depths: Sequence[int] = (1, 2, 2, 4),
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        step = patch_size * 2 ** (len(depths) - 1)
        if any(size % step for size in image_size):
            raise ValueError(f"Every side of the UNet's input must be a multiple of {step}, "
                             f"got {'x'.join(map(str, image_size))}.")  # fmt: skip
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "image_size": list(image_size),
            "width": width,
            "depths": list(depths),
            "patch_size": patch_size,
        }
        self.patch_size = patch_size
        self.stage_dims = tuple(width * 2**level for level in range(len(depths)))
        self.num_features = self.embed_dim = self.stage_dims[-1]
        kernel, padding = (3, 1) if patch_size == 1 else (patch_size, 0)
        self.stem = nn.Conv3d(in_channels, width, kernel, patch_size, padding)
        self.levels = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(dim) for _ in range(depth)))
            for dim, depth in zip(self.stage_dims, depths, strict=True)
        )
        self.down = nn.ModuleList(nn.Conv3d(dim, 2 * dim, 3, stride=2, padding=1) for dim in self.stage_dims[:-1])

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return the maps of all levels, finest first, each ``(B, E, h, w, d)``."""
        x = self.levels[0](self.stem(x))
        maps = [x]
        for down, level in zip(self.down, self.levels[1:], strict=True):
            maps.append(level(down(maps[-1])))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return the coarsest map ``(B, E, H/8, W/8, D/8)`` of ``(B, C, H, W, D)``."""
        return self.stages(x)[-1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the coarsest map's voxels as tokens ``(B, N, E)``."""
        return self(x).flatten(2).transpose(1, 2)


class ResidualUNetDecoder(nn.Module):
    """Per level: a convolution of one voxel, doubling by nearest neighbours, a residual block; then a head.

    Args:
        encoder: The encoder whose levels are mirrored.
        out_channels: Channels of the result.
    """

    def __init__(self, encoder: ResidualUNetEncoder, out_channels: int = 1) -> None:
        super().__init__()
        widths = list(reversed(encoder.stage_dims))
        pairs = list(itertools.pairwise(widths))
        self.reduce = nn.ModuleList(nn.Conv3d(wide, narrow, 1) for wide, narrow in pairs)
        self.blocks = nn.ModuleList(ResidualBlock(narrow) for _, narrow in pairs)
        head = nn.Conv3d if encoder.patch_size == 1 else nn.ConvTranspose3d
        self.out = head(widths[-1], out_channels, encoder.patch_size, encoder.patch_size)

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps of all levels on the way up, coarsest first; skips, where there are any, are added.

        Args:
            maps: The encoder's coarsest map alone, or those of all levels, finest first.
        """
        x, result = maps[-1], []
        for index, (reduce, block) in enumerate(zip(self.reduce, self.blocks, strict=True)):
            x = F.interpolate(reduce(x), scale_factor=2.0, mode="nearest")
            if len(maps) > 1:
                x = x + maps[-2 - index]
            x = block(x)
            result.append(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_channels, H, W, D)`` of the coarsest map, without skips."""
        return self.out(self.levels([x])[-1])
