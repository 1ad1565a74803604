"""UniFormer in 3D (Li et al. 2022): convolutions where resolution is high, attention where it is low; upstream's names.

Letters: B batch, C channels, H W D space, E width of a stage, N tokens of a stage.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks.attention import TransformerBlock
from common.blocks.batch_norm import GlobalBatchNorm3d
from common.blocks.depthwise import DepthwiseConv3d
from common.blocks.registry import registered


class PatchEmbed3D(nn.Module):
    """A strided convolution and a LayerNorm over channels.

    Args:
        in_channels: C.
        embed_dim: E.
        kernel_size: Side of the kernel.
        stride: Step of the kernel; None: its side, so that patches do not overlap.
        padding: Voxels added on every side.
    """

    def __init__(
        self, in_channels: int, embed_dim: int, kernel_size: int = 2, stride: int | None = None, padding: int = 0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel_size, stride or kernel_size, padding)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``(B, C, H, W, D)``."""
        return self.norm(self.proj(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class PointMlp(nn.Module):
    """Two convolutions of one voxel with a GELU between them.

    Args:
        dim: E.
        hidden_dim: Width between them.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv3d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, E, H, W, D)``."""
        return self.fc2(self.act(self.fc1(x)))


class ConvBlock(nn.Module):
    """UniFormer's local block: position by a depth-wise convolution, local relations by another, and an MLP.

    Args:
        dim: E.
        mlp_ratio: Width of the MLP over E.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv3d(dim, 3)
        self.norm1 = GlobalBatchNorm3d(dim)
        self.conv1 = nn.Conv3d(dim, dim, 1)
        self.conv2 = nn.Conv3d(dim, dim, 1)
        self.attn = DepthwiseConv3d(dim, 5)
        self.norm2 = GlobalBatchNorm3d(dim)
        self.mlp = PointMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, E, H, W, D)``."""
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AttentionBlock(TransformerBlock):
    """UniFormer's global block: position by a depth-wise convolution, then a transformer block over all voxels.

    Args:
        dim: E.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over E.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_eps=1e-6)
        self.pos_embed = DepthwiseConv3d(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, E, H, W, D)``."""
        x = x + self.pos_embed(x)
        tokens = super().forward(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def init_convolutions(module: nn.Module) -> None:
    """Draw the kernels of all 3D convolutions as upstream: Kaiming normal over the outputs, biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv3d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


@registered
class UniFormer3D(nn.Module):
    """UniFormer-S by default: 22,038,464 parameters with one channel.

    Args:
        in_channels: C.
        image_size: Voxels of the crops it is trained on, multiples of 16; other sizes work as well.
        embed_dims: E of the four stages, at 1/2, 1/4, 1/8 and 1/16 of the resolution.
        depths: Blocks of the stages; the first two are convolutional, the others attend.
        head_dim: Width of an attention head.
        mlp_ratio: Width of the MLPs over E.
        drop_path: Rate of stochastic depth of the last block; the others' rise to it.
        recompute_stages: How many of the first stages compute their activations again in the backward pass.
        channels_last: Whether kernels and activations lie channels-last, which a CPU needs for depth-wise convolutions.

    Raises:
        ValueError: a side of the crop is not a multiple of 16, or heads do not divide a width.
    """

    #: Step of the coarsest stage.
    STRIDE = 16
    #: The weight that is applied to the input's channels.
    input_kernel = "patch_embed1.proj.weight"

    def __init__(
        self,
        in_channels: int = 1,
        image_size: Sequence[int] = (96, 96, 96),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 8, 3),
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        recompute_stages: int = 0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if any(size % self.STRIDE for size in image_size):
            raise ValueError(f"Every side of UniFormer's input must be a multiple of {self.STRIDE}, "
                             f"got {'x'.join(map(str, image_size))}.")  # fmt: skip
        if len(embed_dims) != 4 or len(depths) != 4 or any(width % head_dim for width in embed_dims[2:]):
            raise ValueError(f"UniFormer has four stages, the last two of a width that heads of {head_dim} divide, "
                             f"got widths {list(embed_dims)} and depths {list(depths)}.")  # fmt: skip
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "image_size": list(image_size),
            "embed_dims": list(embed_dims),
            "depths": list(depths),
            "head_dim": head_dim,
            "mlp_ratio": mlp_ratio,
            "drop_path": drop_path,
            "recompute_stages": recompute_stages,
            "channels_last": channels_last,
        }
        self.stage_dims = tuple(embed_dims)
        self.num_features = self.embed_dim = embed_dims[-1]
        self.recompute_stages, self.channels_last = recompute_stages, channels_last
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        widths = [in_channels, *embed_dims]
        for stage, (width, depth) in enumerate(zip(embed_dims, depths, strict=True), 1):
            self.add_module(f"patch_embed{stage}", PatchEmbed3D(widths[stage - 1], width))
            blocks = [
                ConvBlock(width, mlp_ratio, next(rates))
                if stage < 3
                else AttentionBlock(width, width // head_dim, mlp_ratio, next(rates))
                for _ in range(depth)
            ]
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))
        self.norm = GlobalBatchNorm3d(self.num_features)
        init_convolutions(self)
        if channels_last:
            self.to(memory_format=torch.channels_last_3d)

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        recompute = stage <= self.recompute_stages and self.training and torch.is_grad_enabled()
        x = self.get_submodule(f"patch_embed{stage}")(x)
        for block in self.get_submodule(f"blocks{stage}").children():
            # One block at a time, so that the backward pass holds the activations of one.
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return the maps of all stages, finest first, each ``(B, E, h, w, d)``; the last one is normalised."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        maps = []
        for stage in range(1, 5):
            x = self._stage(x, stage)
            maps.append(x)
        maps[-1] = self.norm(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's map ``(B, E, H/16, W/16, D/16)`` of ``(B, C, H, W, D)``."""
        return self.stages(x)[-1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's tokens ``(B, N, E)``."""
        return self(x).flatten(2).transpose(1, 2)


class UpsamplingDecoder(nn.Module):
    """BrainMVP's pre-training decoder: transposed convolutions without skips, norms or activations, and a head.

    Args:
        encoder: A UniFormer whose stages are mirrored.
        out_channels: Channels of the result.
    """

    def __init__(self, encoder: UniFormer3D, out_channels: int = 1) -> None:
        super().__init__()
        widths = [*reversed(encoder.stage_dims), encoder.stage_dims[0]]
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(wide, narrow, 2, 2, bias=False) for wide, narrow in itertools.pairwise(widths)
        )
        self.out = nn.Conv3d(widths[-1], out_channels, 1)
        init_convolutions(self)
        if encoder.channels_last:
            self.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_channels, H, W, D)`` of the last stage's map."""
        for layer in self.up:
            x = layer(x)
        return self.out(x)
