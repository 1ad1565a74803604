"""E-MIM's network: one encoder for the full and the masked volume, and a decoder (paper section III-C, Fig. 6).

Letters: B batch, C modalities, N positions, P voxels per patch of one modality, E encoder width. A token is a position:
it embeds the C patches that lie there together.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.vit import VisionTransformer
from common.types import EncoderOutput, MaskOutput

MaskFill = Literal["zero", "learnable", "drop"]
CleanBranch = Literal["train", "detach", "off"]


class EMIMOutput(NamedTuple):
    """The network's output.

    Attributes:
        pred: ``(B, C, N, P)``, the reconstruction.
        target: ``(B, C, N, P)``, the patches of the target volume.
        clean: tokens ``(B, N, E)`` of the full volume after each tap; empty where that branch is off.
        masked: tokens of the masked volume after each tap, likewise.
    """

    pred: Tensor
    target: Tensor
    clean: list[Tensor]
    masked: list[Tensor]


class EMIM(nn.Module):
    """Encoder, mask fill and decoder.

    Args:
        encoder: A volume encoder over C modalities.
        decoder: Maps tokens ``(B, N, E)`` (and ``ids_restore`` where tokens are dropped) to ``(B, N, C P)``.
        taps: Blocks (1-based, 0 = patch embedding) whose outputs feed the pyramid.
        mask_fill: ``"zero"`` sets hidden patches to 0; ``"learnable"`` also adds a learned embedding per hidden
            modality; ``"drop"`` leaves out positions that are hidden in every modality, as MAE does.

    Raises:
        ValueError: a tap lies outside the encoder.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: nn.Module,
        taps: Sequence[int] = (3, 6, 9, 12),
        mask_fill: MaskFill = "zero",
    ) -> None:
        super().__init__()
        if not all(0 <= tap <= len(encoder.blocks) for tap in taps):
            raise ValueError(f"`taps` must lie in 0..{len(encoder.blocks)}, got {list(taps)}.")
        self.encoder = encoder
        self.decoder = decoder
        self.taps = tuple(taps)
        self.mask_fill = mask_fill
        self.num_modalities = encoder.patch_embed.in_channels
        self.mask_embed = nn.Parameter(torch.zeros(self.num_modalities, encoder.embed_dim))
        trunc_normal_(self.mask_embed, std=0.02)
        self.mask_embed.requires_grad_(mask_fill == "learnable")

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"mask_embed"}

    def patches(self, image: Tensor) -> Tensor:
        """Cut ``(B, C, H, W, D)`` into ``(B, C, N, P)``, a view of tokens ``(B, N, C P)``."""
        return self._by_modality(self.encoder.patch_embed.patchify(image))

    def volume(self, patches: Tensor) -> Tensor:
        """Put ``(B, C, N, P)`` back together to ``(B, C, H, W, D)``."""
        return self.encoder.patch_embed.unpatchify(patches.transpose(1, 2).flatten(2))

    def _by_modality(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.num_modalities, -1)).transpose(1, 2)

    def _mask_embedding(self, hidden: Tensor) -> Tensor | None:
        """Sum the embeddings of the modalities hidden at each position, ``(B, N, E)``."""
        if self.mask_fill != "learnable":
            return None
        return hidden.transpose(1, 2).to(self.mask_embed.dtype) @ self.mask_embed

    def _drop_ids(self, mask: MaskOutput) -> tuple[Tensor | None, Tensor | None]:
        """Return which positions to encode where hidden ones are dropped.

        A masker that hides whole positions, equally many in each sample, returns them itself. For any other mask (in
        evaluation) every position with something visible is encoded, filled up with empty ones to equal numbers.
        """
        if self.mask_fill != "drop" or mask.ids_keep is not None:
            keep = self.mask_fill == "drop"
            return (mask.ids_keep, mask.ids_restore) if keep else (None, None)
        visible = ~mask.mask.all(1)
        order = torch.argsort(visible.long(), dim=1, descending=True, stable=True)
        count = max(int(visible.sum(1).max()), 1)
        return order[:, :count], torch.argsort(order, dim=1)

    def encode_branches(self, clean: Tensor, masked: Tensor) -> tuple[EncoderOutput, EncoderOutput]:
        """Encode embedded tokens of both branches in one pass: larger matrix products, the same result."""
        tokens, hidden = self.encoder.encode(torch.cat([clean, masked]), self.taps)
        halves = [tap.chunk(2) for tap in (tokens, *hidden)]
        first, second = ([half[branch] for half in halves] for branch in (0, 1))
        return EncoderOutput(first[0], first[1:]), EncoderOutput(second[0], second[1:])

    def forward(
        self, image: Tensor, mask: MaskOutput, clean: CleanBranch = "train", target_image: Tensor | None = None
    ) -> EMIMOutput:
        """Reconstruct what is hidden, and encode the full volume beside it.

        Args:
            image: ``(B, C, H, W, D)``; its visible patches are the input.
            mask: Hidden patches, ``mask.mask`` ``(B, C, N)``.
            clean: Whether the full volume is encoded with gradients, without, or not at all (then its cost is saved).
            target_image: Where the target comes from; None means ``image``.
        """
        flat = self.encoder.patch_embed.patchify(image)
        target = self._by_modality(flat) if target_image is None else self.patches(target_image)
        hidden = mask.mask.transpose(1, 2)[..., None]
        masked = flat.unflatten(2, (self.num_modalities, -1)).masked_fill(hidden, 0).flatten(2)
        ids_keep, ids_restore = self._drop_ids(mask)
        x = self.encoder.embed(masked, ids_keep, self._mask_embedding(mask.mask))
        clean_taps: list[Tensor] = []
        if clean == "train":
            (_, clean_taps), (tokens, masked_taps) = self.encode_branches(self.encoder.embed(flat), x)
        else:
            if clean == "detach":
                with torch.no_grad():
                    clean_taps = self.encoder.encode(self.encoder.embed(flat), self.taps).hidden
            tokens, masked_taps = self.encoder.encode(x, self.taps)
        pred = self._by_modality(self.decoder(tokens, ids_restore))
        return EMIMOutput(pred, target, clean_taps, masked_taps)
