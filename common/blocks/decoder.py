"""Decoders of masked modeling. Letters: B batch, N patches, K kept patches, E encoder width, F decoder width."""

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.attention import TransformerBlock
from common.blocks.pos_embed import sincos_position_embedding
from common.blocks.vit import init_transformer_weights


class LinearDecoder(nn.Module):
    """One projection per token (SimMIM; E-MIM section III-C).

    Args:
        embed_dim: E.
        grid_size: Positions along each axis; unused here, but every decoder accepts it.
        out_features: Values per token.
    """

    def __init__(self, embed_dim: int, grid_size: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embed_dim, out_features)
        init_transformer_weights(self.proj)

    def forward(self, tokens: Tensor, ids_restore: Tensor | None = None) -> Tensor:
        """Project ``(B, N, E)`` to ``(B, N, out_features)``.

        Raises:
            ValueError: tokens were dropped; this decoder cannot put them back.
        """
        if ids_restore is not None:
            raise ValueError("LinearDecoder needs every token; use MAEDecoder where the encoder drops hidden ones.")
        return self.proj(tokens)


class MAEDecoder(nn.Module):
    """Light transformer over visible tokens and mask tokens (MAE, He et al. 2022, section 3).

    Args:
        embed_dim: E.
        grid_size: Positions along each axis.
        out_features: Values per token.
        decoder_dim: F.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over F.
        num_prefix_tokens: Tokens before the patches, such as a class token; they have no position.
        pos_span: Exponent that the frequencies of the positions run to.
        norm_eps: Added to the variance in LayerNorm.
        quick_gelu: Whether the MLPs have CLIP's approximation of GELU.
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: Sequence[int],
        out_features: int,
        decoder_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_prefix_tokens: int = 0,
        pos_span: float = 1.0,
        norm_eps: float = 1e-5,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        table = sincos_position_embedding(grid_size, decoder_dim, span=pos_span)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(decoder_dim, num_heads, mlp_ratio, qkv_bias=True, norm_eps=norm_eps, quick_gelu=quick_gelu)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(decoder_dim, norm_eps)
        self.proj = nn.Linear(decoder_dim, out_features)
        self.apply(init_transformer_weights)
        trunc_normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"mask_token", "pos_embed"}

    def forward(self, tokens: Tensor, ids_restore: Tensor | None = None, predict: Tensor | None = None) -> Tensor:
        """Decode the visible tokens to all positions.

        Args:
            tokens: ``(B, K, E)``, after any prefix tokens.
            ids_restore: long ``(B, N)``, as a masker gives it; None where K = N and nothing was dropped.
            predict: long ``(B, S)``, the positions to predict; None predicts all.

        Returns:
            ``(B, N, out_features)``, or ``(B, S, out_features)``.
        """
        return self.proj(self.features(tokens, ids_restore, predict))

    def restore(self, tokens: Tensor, ids_restore: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed prefix ``(B, ., F)`` and patches ``(B, N, F)``, mask tokens for those dropped; no positions."""
        prefix, x = self.embed(tokens).tensor_split([self.num_prefix_tokens], dim=1)
        if ids_restore is not None:
            batch, num_positions = ids_restore.shape
            hidden = self.mask_token.expand(batch, num_positions - x.shape[1], -1)
            x = torch.cat([x, hidden.to(x.dtype)], dim=1)
            x = x.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        return prefix, x

    def features(self, tokens: Tensor, ids_restore: Tensor | None = None, predict: Tensor | None = None) -> Tensor:
        """Return the normalised features that are projected to predictions, ``(B, N, F)`` or ``(B, S, F)``."""
        prefix, x = self.restore(tokens, ids_restore)
        x = torch.cat([prefix, x + self.pos_embed], dim=1) if self.num_prefix_tokens else x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = x[:, self.num_prefix_tokens :]
        if predict is not None:
            x = x.gather(1, predict[..., None].expand(-1, -1, x.shape[2]))
        return self.norm(x)
