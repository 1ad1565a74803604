"""Two streams of tokens that attend to themselves and to each other, post-norm as in BERT.

Letters: B batch, N tokens of a stream, M tokens of the other, E width, H heads, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.attention import attention


class PostNormAttention(nn.Module):
    """Attention, output projection, dropout, residual, LayerNorm.

    Args:
        dim: E.
        num_heads: H; must divide E.
        dropout: Rate of attention weights and of the output.
        norm_eps: Added to the variance in LayerNorm.

    Raises:
        ValueError: H does not divide E.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.1, norm_eps: float = 1e-12) -> None:
        if dim % num_heads:
            raise ValueError(f"The width {dim} is not a multiple of {num_heads} attention heads.")
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Let ``x`` attend to ``context``.

        Args:
            x: ``(B, N, E)``.
            context: ``(B, M, E)``; ``x`` itself for self-attention.
            key_mask: bool ``(B, M)``, True = may be attended to; None allows all.
        """
        q, k, v = self._heads(self.query(x)), self._heads(self.key(context)), self._heads(self.value(context))
        rate = self.dropout if self.training else 0.0
        if key_mask is None and not rate:
            mixed = attention(q, k, v)
        else:
            allowed = None if key_mask is None else key_mask[:, None, None]
            mixed = F.scaled_dot_product_attention(q, k, v, allowed, rate)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(mixed, self.dropout, self.training))

    def weights(self, x: Tensor, context: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Return the attention weights ``(B, H, N, M)``, to look at."""
        q, k = self._heads(self.query(x)).float(), self._heads(self.key(context)).float()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
        return scores.softmax(-1)


class CoAttentionLayer(nn.Module):
    """One stream's layer: self-attention, attention to the other stream, feed-forward; each post-norm.

    Args:
        dim: E.
        num_heads: H.
        mlp_ratio: Width of the feed-forward part over E.
        dropout: Rate.
        norm_eps: Added to the variance in LayerNorm.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.1, norm_eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.self_attention = PostNormAttention(dim, num_heads, dropout, norm_eps)
        self.cross_attention = PostNormAttention(dim, num_heads, dropout, norm_eps)
        self.fc1, self.fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, norm_eps)

    def attend_self(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``x`` ``(B, N, E)`` after its self-attention; ``mask`` is bool ``(B, N)``."""
        return self.self_attention(x, x, mask)

    def finish(self, attended: Tensor, other: Tensor, other_mask: Tensor | None) -> Tensor:
        """Return the layer's output from what :meth:`attend_self` gave and the other stream ``(B, M, E)``."""
        x = self.cross_attention(attended, other, other_mask)
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
        """Return the stream ``(B, N, E)`` after the layer."""
        return self.finish(self.attend_self(x, mask), other, other_mask)


class CoAttentionFusion(nn.Module):
    """Layers of two streams with weights of their own; each reads the other as it was after the layer before.

    Args:
        dim: E.
        depth: Layers.
        num_heads: H.
        mlp_ratio: Width of the feed-forward part over E.
        dropout: Rate.
    """

    def __init__(
        self, dim: int, depth: int = 6, num_heads: int = 12, mlp_ratio: float = 4.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.text_layers, self.image_layers = (
            nn.ModuleList(CoAttentionLayer(dim, num_heads, mlp_ratio, dropout) for _ in range(depth)) for _ in range(2)
        )

    def attend_selves(self, text: Tensor, image: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the first layer's self-attention makes of each stream; it needs no partner, so it can be kept."""
        first_text, first_image = self.text_layers[0], self.image_layers[0]
        assert isinstance(first_text, CoAttentionLayer)
        assert isinstance(first_image, CoAttentionLayer)
        return first_text.attend_self(text, text_mask), first_image.attend_self(image, None)

    def forward(
        self, text: Tensor, image: Tensor, text_mask: Tensor | None, attended: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Fuse the streams.

        Args:
            text: ``(B, N, E)``.
            image: ``(B, M, E)``; all of it may be attended to.
            text_mask: bool ``(B, N)``, True = a token.
            attended: What :meth:`attend_selves` gave; None computes it.

        Returns:
            Text ``(B, N, E)``, image ``(B, M, E)``, and the image stream before each layer.
        """
        before = []
        for of_text, of_image in zip(self.text_layers, self.image_layers, strict=True):
            assert isinstance(of_text, CoAttentionLayer)
            assert isinstance(of_image, CoAttentionLayer)
            before.append(image)
            if attended is None:
                attended = of_text.attend_self(text, text_mask), of_image.attend_self(image, None)
            text, image = of_text.finish(attended[0], image, None), of_image.finish(attended[1], text, text_mask)
            attended = None
        return text, image, before

    @torch.no_grad()
    def text_to_image(self, text: Tensor, image: Tensor, text_mask: Tensor | None) -> Tensor:
        """Return how the last layer's text attends to the image, mean over heads, ``(B, N, M)``."""
        for of_text, of_image in zip(self.text_layers[:-1], self.image_layers[:-1], strict=True):
            text, image = of_text(text, image, text_mask, None), of_image(image, text, None, text_mask)
        last = self.text_layers[-1]
        assert isinstance(last, CoAttentionLayer)
        return last.cross_attention.weights(last.attend_self(text, text_mask), image).mean(1)
