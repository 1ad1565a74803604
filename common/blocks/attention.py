"""Self-attention through fused kernels, and the pre-norm transformer block around it.

Letters: B batch, N tokens, E width, H heads, d width of a head.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

#: Up to this many tokens the plain form is faster on a CPU in 16 bits; see :func:`attention`.
_PLAIN_TOKENS = 256


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention.

    The fused kernel is used everywhere but in one case: on a CPU in 16-bit precision its backward pass uses no matrix
    instructions and loses to plain matrix products (measured 2.4 times at 216 tokens), as long as the scores are small.
    There the softmax reads and writes 16 bits and sums in float32 inside: as exact as a copy in float32 rounded back.

    Args:
        q: ``(B, H, N, d)``.
        k: ``(B, H, N, d)``.
        v: ``(B, H, N, d)``.

    Returns:
        ``(B, H, N, d)``.
    """
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and low_precision and k.shape[2] <= _PLAIN_TOKENS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention; parameters are called as in timm (``qkv``, ``proj``).

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

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``(B, N, E)``."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj_drop(self.proj(x))


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

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(B, N, E)``."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
