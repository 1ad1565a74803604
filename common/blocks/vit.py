"""A plain vision transformer for images and volumes, with taps.

Letters: B batch, C channels, N patches, K kept patches, P voxels per patch, E width.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.blocks.attention import TransformerBlock
from common.blocks.patch_embed import PatchEmbed
from common.blocks.pos_embed import sincos_position_embedding
from common.blocks.registry import registered
from common.types import EncoderOutput


def init_transformer_weights(module: nn.Module) -> None:
    """Initialise Linear layers with a truncated normal of std 0.02 and zero bias, as ViT, MAE and MONAI do."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_xavier_weights(module: nn.Module) -> None:
    """Initialise Linear layers with Xavier's uniform distribution and zero bias, as MAE's code does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@registered
class VisionTransformer(nn.Module):
    """Encoder of patches; the default is ViT-B with 16^d patches and no class token.

    Args:
        in_channels: C.
        image_size: Size along each axis; two axes make an image encoder, three a volume encoder.
        patch_size: One size for all axes, or one per axis.
        embed_dim: E.
        depth: Number of blocks.
        num_heads: Attention heads; must divide ``embed_dim``.
        mlp_ratio: Width of the MLP over E.
        qkv_bias: Whether queries, keys and values have a bias.
        pos_embed: ``"learnable"`` or fixed ``"sincos"``.
        pos_span: Exponent that the frequencies of ``"sincos"`` run to; see :mod:`common.blocks.pos_embed`.
        class_token: Whether a learned token, without position, goes before the patches.
        norm_eps: Added to the variance in LayerNorm; timm has 1e-6.
        dropout: Rate after the position embedding, in the attention output and in the MLP.
        drop_path: Rate of stochastic depth in the last block; it rises linearly from 0 in the first.
        grad_checkpointing: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: sizes do not divide, or ``pos_embed`` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: Sequence[int],
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        pos_embed: str = "learnable",
        pos_span: float = 1.0,
        class_token: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"`num_heads` must divide `embed_dim`, got {num_heads} and {embed_dim}.")
        if pos_embed not in ("learnable", "sincos"):
            raise ValueError(f"`pos_embed` must be 'learnable' or 'sincos', got {pos_embed!r}.")
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "image_size": list(image_size),
            "patch_size": patch_size if isinstance(patch_size, int) else list(patch_size),
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "pos_embed": pos_embed,
            "pos_span": pos_span,
            "class_token": class_token,
            "norm_eps": norm_eps,
        }
        self.num_features = self.embed_dim = embed_dim
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed = PatchEmbed(in_channels, image_size, patch_size, embed_dim)
        if pos_embed == "learnable":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
            trunc_normal_(self.pos_embed, std=0.02)
        else:
            table = sincos_position_embedding(self.patch_embed.grid_size, embed_dim, span=pos_span)
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.num_prefix_tokens = int(class_token)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, dropout, norm_eps=norm_eps)
            for _ in range(depth)
        )
        self.set_drop_path(drop_path)
        self.norm = nn.LayerNorm(embed_dim, norm_eps)
        self.apply(init_transformer_weights)
        self.add_parameters()

    def add_parameters(self) -> None:
        """Make what a subclass needs besides; it takes the same arguments, which files name."""

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return self.patch_embed.grid_size

    def set_drop_path(self, rate: float) -> None:
        """Set the rate of stochastic depth in the last block; it rises linearly from 0 in the first."""
        for index, block in enumerate(self.blocks):
            share = rate * index / max(len(self.blocks) - 1, 1)
            block.drop_path = DropPath(share) if share else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone, as timm's models do."""
        return {"pos_embed"} | ({"cls_token"} if self.num_prefix_tokens else set())

    def layer_index(self, name: str) -> int:
        """Return the depth of a parameter for layer-wise learning rates: 0 embedding, i + 1 block i, depth + 1 rest."""
        if name.startswith(("patch_embed", "pos_embed", "cls_token")):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else len(self.blocks) + 1

    def embed(self, patches: Tensor, ids_keep: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        """Project patches and add their positions.

        Args:
            patches: ``(B, N, C P)``, all of them.
            ids_keep: long ``(B, K)``, the patches to encode; the others are never computed. None keeps all.
            extra: ``(B, N, E)`` added to the embeddings, such as mask embeddings.

        Returns:
            ``(B, K, E)``, or ``(B, N, E)``; one token more, the first, where there is a class token.
        """
        positions = self.pos_embed.expand(len(patches), -1, -1)
        positions = positions if extra is None else positions + extra
        if ids_keep is not None:
            patches = patches.gather(1, ids_keep[..., None].expand(-1, -1, patches.shape[2]))
            positions = positions.gather(1, ids_keep[..., None].expand(-1, -1, positions.shape[2]))
        x = self.patch_embed(patches) + positions
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return self.pos_drop(x)

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run one of the blocks on ``(B, N, E)``; its activations are recomputed if ``grad_checkpointing`` is set."""
        recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        return checkpoint(block, x, use_reentrant=False) if recompute else block(x)

    def encode(self, x: Tensor, taps: Collection[int] = ()) -> EncoderOutput:
        """Run embedded tokens through the blocks.

        Args:
            x: ``(B, N, E)``, from :meth:`embed`.
            taps: Blocks (1-based; 0 is the embedding) after which to return the residual stream, in this order.

        Returns:
            ``tokens`` (B, N, E) after the final LayerNorm, ``hidden`` one such tensor per tap before it.
        """
        stream = {0: x}
        for index, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x)
            if index in taps:
                stream[index] = x
        return EncoderOutput(self.norm(x), [stream[tap] for tap in taps])

    def encode_image(self, image: Tensor, taps: Collection[int] = ()) -> EncoderOutput:
        """Embed and encode ``(B, C, *space)``."""
        return self.encode(self.embed(self.patch_embed.patchify(image)), taps)

    def forward_features(self, image: Tensor) -> Tensor:
        """Encode ``(B, C, *space)`` to normalised tokens ``(B, N, E)``, as timm after any class token."""
        return self.encode_image(image).tokens

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode ``(B, C, *space)`` to normalised tokens and the residual stream after every block, as MONAI's ViT."""
        tokens, hidden = self.encode_image(image, range(1, len(self.blocks) + 1))
        return tokens, hidden
