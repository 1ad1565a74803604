"""The networks of UMD (paper section III, Fig. 2).

Letters: B batch, N patches, K visible patches, S predicted patches or hidden tokens, T tokens, E width of the fusion,
F width of the image decoder, V tokens of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.co_attention import CoAttentionFusion
from common.blocks.registry import registered
from common.errors import UserError
from experiments.umd.towers import POSITIONS, TextTower, TowerConfig, VisionTower, resized_positions

Pool = Literal["masked_mean", "mean", "cls"]


def init_normal_weights(module: nn.Module) -> None:
    """Initialise new Linear layers and embeddings with a normal of std 0.02, biases 0, norms 1 and 0 (as BERT)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class Fused(NamedTuple):
    """The encoder's output for a pair.

    Attributes:
        text: Z^T ``(B, T, E)``.
        image: Z^I ``(B, 1 + N, E)`` or ``(B, 1 + K, E)``, the class token first.
        before: the image stream before each layer of the fusion.
    """

    text: Tensor
    image: Tensor
    before: list[Tensor]

    def image_at(self, layer: int) -> Tensor:
        """Return the image stream before fusion layer ``layer``; -1 is the output."""
        return self.image if layer < 0 else self.before[layer]


@registered
class UMDEncoder(nn.Module):
    """Vision tower, text tower, and six layers of co-attention between them (section III-A); poolers for tasks.

    Its ``config`` rebuilds it without weights. Of an image alone, ``forward_features`` gives the vision tower's tokens.

    Args:
        image_size: Height and width, square.
        vocab_size: V.
        pad_id: The padding token.
        in_channels: 3; gray images are repeated.
        patch_size: Side of a patch.
        vision: Size of the vision tower; published runs drop the last of CLIP's twelve layers.
        text: Size of the text tower.
        max_positions: Rows of its table of positions.
        dim: E.
        fusion_depth: Layers of the fusion.
        fusion_heads: Its attention heads.
        dropout: Rate in text tower and fusion.
        pool: What a pooled vector is of: ``"masked_mean"`` the real tokens, the image's class token among them;
            ``"mean"`` all tokens, padding included; ``"cls"`` the first token.

    Raises:
        ValueError: sizes that do not fit.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        image_size: Sequence[int],
        vocab_size: int,
        pad_id: int = 1,
        in_channels: int = 3,
        patch_size: int = 16,
        vision: TowerConfig = TowerConfig(depth=11),
        text: TowerConfig = TowerConfig(),
        max_positions: int = 514,
        dim: int = 768,
        fusion_depth: int = 6,
        fusion_heads: int = 12,
        dropout: float = 0.1,
        pool: Pool = "masked_mean",
    ) -> None:
        super().__init__()
        if in_channels != 3:
            raise ValueError(f"CLIP's vision transformer has 3 channels, got {in_channels}; gray is repeated.")
        if pool not in ("masked_mean", "mean", "cls"):
            raise ValueError(f"`pool` must be 'masked_mean', 'mean' or 'cls', got {pool!r}.")
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        plain = {"image_size": list(image_size), "vision": asdict(vision), "text": asdict(text)}
        self.config: dict[str, Any] = arguments | plain
        self.pool_kind = pool
        self.num_features = vision.width
        self.vision = VisionTower(image_size, patch_size, vision.width, vision.depth, vision.heads)
        self.text = TextTower(vocab_size, pad_id, text.width, text.depth, text.heads, max_positions, dropout)
        self.vision_proj, self.text_proj = nn.Linear(vision.width, dim), nn.Linear(text.width, dim)
        self.type_embedding = nn.Embedding(2, dim)  # 0 text, 1 image
        self.fusion = CoAttentionFusion(dim, fusion_depth, fusion_heads, dropout=dropout)
        self.text_pooler, self.image_pooler = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dim = dim
        for part in (self.vision_proj, self.text_proj, self.type_embedding, self.fusion, *self.poolers):
            part.apply(init_normal_weights)

    @property
    def poolers(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers that only pooled vectors go through."""
        return self.text_pooler, self.image_pooler

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return self.vision.grid_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    def train_image_alone(self) -> None:
        """Leave out of training whatever ``forward_features`` does not go through: DDP would wait for its gradients."""
        self.requires_grad_(False)
        self.vision.requires_grad_(True)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone; biases, norms and the class token are anyway."""
        table = "text.roberta.embeddings"
        return {
            f"vision.clip.{POSITIONS}",
            f"{table}.position_embeddings.weight",
            f"{table}.token_type_embeddings.weight",
            "type_embedding.weight",
        }

    def modality_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each modality (Eq. 13): tower, projection, and its side of the fusion.

        Type embeddings and poolers belong to neither.
        """
        parts = {
            "image": (self.vision, self.vision_proj, self.fusion.image_layers),
            "text": (self.text, self.text_proj, self.fusion.text_layers),
        }
        return {
            name: [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
            for name, modules in parts.items()
        }

    def adapt_state(
        self, state: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Resample the image positions of stored weights to this image size; return weights and what was changed.

        Raises:
            UserError: the weights are of another vocabulary.
        """
        if arguments["vocab_size"] != self.config["vocab_size"]:
            raise UserError(
                f"The encoder knows {arguments['vocab_size']} tokens, the tokenizer {self.config['vocab_size']}: set "
                f"data.text.tokenizer to the tokenizer.json of the encoder's run."
            )
        key, wanted = f"vision.clip.{POSITIONS}", self.num_patches + 1
        if len(state[key]) == wanted:
            return dict(state), {}
        return (
            {**state, key: resized_positions(state[key], wanted)},
            {key: f"resampled from {list(arguments['image_size'])} to {self.config['image_size']}"},
        )

    def encode_image(self, image: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode ``(B, 1 or 3, H, W)`` by itself to ``(B, 1 + N, E)``, or ``(B, 1 + K, E)`` of the kept patches."""
        tokens = self.vision(image.expand(-1, 3, -1, -1), ids_keep)
        return self.vision_proj(tokens) + self.type_embedding.weight[1]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode tokens ``(B, T)`` by themselves to ``(B, T, E)``."""
        return self.text_proj(self.text(input_ids, attention_mask)) + self.type_embedding.weight[0]

    def fuse(
        self,
        text: Tensor,
        image: Tensor,
        attention_mask: Tensor,
        attended: tuple[Tensor, Tensor] | None = None,
    ) -> Fused:
        """Let both streams attend to each other; ``attended`` is what ``fusion.attend_selves`` gave of them."""
        return Fused(*self.fusion(text, image, attention_mask.bool(), attended))

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, ids_keep: Tensor | None = None
    ) -> Fused:
        """Encode a pair.

        Args:
            image: ``(B, 1 or 3, H, W)``, standardised.
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 0 = padding.
            ids_keep: long ``(B, K)``, the visible patches; None keeps all.
        """
        text = self.encode_text(input_ids, attention_mask)
        return self.fuse(text, self.encode_image(image, ids_keep), attention_mask)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the vision tower's tokens ``(B, 1 + N, W)`` of ``(B, 1 or 3, H, W)``, the class token first."""
        return self.vision(image.expand(-1, 3, -1, -1))

    def _mean(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.pool_kind == "cls":
            return tokens[:, 0]
        if self.pool_kind == "mean" or attention_mask is None:
            return tokens.mean(1)
        weight = attention_mask[..., None].to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)

    def pool(self, fused: Fused, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors c^T and c^I, each ``(B, E)``."""
        text = torch.tanh(self.text_pooler(self._mean(fused.text, attention_mask)))
        return text, torch.tanh(self.image_pooler(self._mean(fused.image, None)))


class TextHead(nn.Module):
    """Predicts tokens, as RoBERTa's head, not tied to the embeddings.

    Args:
        dim: E.
        vocab_size: V.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, 1e-12)
        self.decoder = nn.Linear(dim, vocab_size)
        self.apply(init_normal_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(S, V)`` of tokens ``(S, E)``."""
        return self.decoder(self.norm(F.gelu(self.dense(tokens))))
