"""Self-attention with fused kernels, attention without its strongest relations, and the pre-norm block.

Letters: B batch, N tokens, E width, H heads, d width of a head, Q queries, K keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from common.maskers.relation import TieRule, mask_top_relations

#: Up to this many tokens the plain form is faster on a CPU in 16 bits; see :func:`attention`.
_PLAIN_TOKENS = 256


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    The fused kernel is used everywhere but in one case: on a CPU in 16-bit precision its backward pass uses no matrix
    instructions and loses to plain matrix products (measured 2.4 times at 216 tokens), as long as the scores are small.
    There the softmax reads and writes 16 bits and sums in float32 inside: as exact as a copy in float32 rounded back.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B, H, N, d)``.
        v: ``(B, H, N, d)``.
        key_mask: bool ``(B, K)``, True = real key, of which each sample needs one; None: all are real.

    Returns:
        ``(B, H, N, d)``.
    """
    if key_mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None, :])
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and low_precision and k.shape[2] <= _PLAIN_TOKENS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Relations(NamedTuple):
    """How queries relate to keys, and which relations are kept.

    Attributes:
        weights: ``(B, H, Q, K)``, rows of the full softmax, float32 (float64 stays).
        keep: bool ``(B, H, Q, K)``, False = removed.
    """

    weights: Tensor
    keep: Tensor

    def apply(self, v: Tensor, renormalize: bool = False) -> Tensor:
        """Sum values ``(B, H, K, d)`` over the kept relations; the rest of a row's mass is lost unless renormalised."""
        kept = self.weights.masked_fill(~self.keep, 0)
        if renormalize:
            kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
        return kept.to(v.dtype) @ v


def relations_of(
    q: Tensor, k: Tensor, ratio: float, key_mask: Tensor | None = None, tie_rule: TieRule = "threshold"
) -> Relations:
    """Relate queries to keys and choose the strongest share of each row for removal.

    The scores, the softmax and the choice are float32 whatever the precision: ties are real in 16 bits. What is kept
    carries no gradient, but the softmax is the full one, so logits that were removed get theirs through its
    denominator.

    Args:
        q: ``(B, H, Q, d)``.
        k: ``(B, H, K, d)``.
        ratio: Share of a row to remove, in [0, 1).
        key_mask: bool ``(B, K)``, True = real key; None: all are real.
        tie_rule: See :func:`common.maskers.relation.mask_top_relations`.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-2, -1)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        return Relations(scores.softmax(-1), mask_top_relations(scores, ratio, key_mask, tie_rule))


def relation_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ratio: float,
    key_mask: Tensor | None = None,
    tie_rule: TieRule = "threshold",
    renormalize: bool = False,
) -> Tensor:
    """Attend without the strongest relations of each row (masked relation modeling, Eqs. 3 to 6).

    Args:
        q: ``(B, H, Q, d)``.
        k: ``(B, H, K, d)``.
        v: ``(B, H, K, d)``.
        ratio: Share of a row to remove, in [0, 1).
        key_mask: bool ``(B, K)``, True = real key; None: all are real.
        tie_rule: See :func:`common.maskers.relation.mask_top_relations`.
        renormalize: Whether what is kept of a row is scaled to sum to 1; the equations do not.

    Returns:
        ``(B, H, Q, d)`` in the dtype of ``v``.
    """
    return relations_of(q, k, ratio, key_mask, tie_rule).apply(v, renormalize)


class SelfAttention(nn.Module):
    """Multi-head self-attention; parameters are named as in timm (``qkv``, ``proj``).

    Args:
        dim: E.
        num_heads: H; must divide E.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Rate after the output projection.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``(B, H, N, d)`` of ``(B, N, E)``."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """Join heads ``(B, H, N, d)`` and project them to ``(B, N, E)``."""
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``(B, N, E)``."""
        return self.merge(attention(*self.heads(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and MLP, each on a residual stream.

    Args:
        dim: E.
        num_heads: H.
        mlp_ratio: Width of the MLP over E.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Rate after the attention's projection and inside the MLP.
        drop_path: Rate at which a sample skips a residual branch in training (stochastic depth).
        norm_eps: Added to the variance in LayerNorm.
        quick_gelu: Whether the MLP has CLIP's approximation of GELU.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        activation = QuickGELU if quick_gelu else nn.GELU
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=activation, drop=dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the output of attention ``(B, H, N, d)`` to the stream ``(B, N, E)``, and run the MLP."""
        x = x + self.drop_path(self.attn.merge(attended))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, N, E)``."""
        return self.transform(x)

    def transform(self, x: Tensor, key_mask: Tensor | None = None, queries: slice | None = None) -> Tensor:
        """Transform ``(B, N, E)`` when some tokens are not keys, or when only some are needed.

        Args:
            x: The tokens.
            key_mask: bool ``(B, N)``, True = real token; None: all are real.
            queries: The tokens whose result is needed; the others only serve as keys. None: all.
        """
        q, k, v = self.attn.heads(self.norm1(x))
        if queries is not None:
            q, x = q[:, :, queries], x[:, queries]
        return self.finish(x, attention(q, k, v, key_mask))
