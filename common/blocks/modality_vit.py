"""A transformer over the tokens of several modalities (MultiMAE, Bachmann et al. 2022).

Letters: B batch, M modalities, N positions, K kept tokens, E width.
"""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.attention import TransformerBlock
from common.blocks.registry import registered
from common.blocks.vit import VisionTransformer


@registered
class ModalityTransformer(VisionTransformer):
    """A vision transformer with a token for every modality and position.

    Every modality has its own patch embedding, a part of the shared one's matrix, and its own learned vector. One that
    is 0 everywhere is absent and gives no token. Arguments are the vision transformer's; there is no class token.
    """

    def add_parameters(self) -> None:
        """Make the modalities' vectors.

        Raises:
            ValueError: there is a class token.
        """
        if self.num_prefix_tokens:
            raise ValueError("A token for every modality and position leaves no place for a class token: "
                             "set model.encoder.class_token to false.")  # fmt: skip
        self.modality_embed = nn.Parameter(torch.zeros(self.patch_embed.in_channels, self.embed_dim))
        trunc_normal_(self.modality_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return super().no_weight_decay() | {"modality_embed"}

    def layer_index(self, name: str) -> int:
        """Return the depth of a parameter for layer-wise learning rates."""
        return 0 if name == "modality_embed" else super().layer_index(name)

    def embed_modalities(self, image: Tensor) -> Tensor:
        """Embed ``(B, M, *space)`` to tokens ``(B, M N, E)``, those of a modality together."""
        modalities = self.patch_embed.in_channels
        patches = self.patch_embed.patchify(image).unflatten(2, (modalities, -1))
        weight = self.patch_embed.proj.weight.unflatten(1, (modalities, -1))
        tokens = torch.einsum("bnmp,emp->bmne", patches, weight) + self.patch_embed.proj.bias
        return (tokens + self.modality_embed[:, None] + self.pos_embed[:, None]).flatten(1, 2)

    def encode_tokens(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        """Run tokens ``(B, K, E)`` through the blocks; those that are not ``real`` ``(B, K)`` are attended by none."""
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            tokens = block.transform(tokens, real)
        return self.norm(tokens)

    def forward_features(self, image: Tensor) -> Tensor:
        """Encode ``(B, M, *space)`` to the mean over the acquired modalities of each position, ``(B, N, E)``."""
        acquired = (image != 0).flatten(2).any(2)
        acquired = acquired | ~acquired.any(1, keepdim=True)
        positions = self.patch_embed.num_patches
        real = acquired.repeat_interleave(positions, 1)
        tokens = self.encode_tokens(self.embed_modalities(image), real)
        weight = acquired[:, :, None, None].to(tokens.dtype)
        return (tokens.unflatten(1, (-1, positions)) * weight).sum(1) / weight.sum(1)
