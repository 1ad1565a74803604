"""Methods that reconstruct what they do not see: MAE, SimMIM and MultiMAE.

Letters: B batch, C channels, G groups of channels that are standardised together, N positions, P values of a patch and
group, M modalities, K kept tokens, E encoder width, F decoder width.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.attention import TransformerBlock
from common.blocks.co_attention import PostNormAttention
from common.blocks.modality_vit import ModalityTransformer
from common.blocks.patch_embed import normalise_patches
from common.blocks.pos_embed import sincos_position_embedding
from common.blocks.vit import VisionTransformer, init_transformer_weights
from common.losses.reconstruction import masked_l1, masked_mse
from common.maskers.dirichlet import DirichletMasker, ModalityTokens
from common.maskers.random import RandomMasker, order_to_output
from common.module import StepOutput, Term
from common.optim import OptimizerConfig
from common.panels import colour_panel, image_panel, volume_panels
from common.randomness import KeyedGenerator
from common.runtime.precision import at_least_float32
from common.types import ImageKey, InputSpec, MaskOutput, Panel, Reconstruction
from experiments.baselines.base import Baseline, EncoderFactory
from experiments.baselines.heads import light_decoder

DecoderFactory = Callable[[int, Sequence[int], int], nn.Module]
Fill = Literal["drop", "learnable"]


class HiddenPatches(Baseline):
    """What methods share whose target is the patches of their input, ``(B, N, G, P)``."""

    norm_pix = True

    @property
    def groups(self) -> int:
        """G: the modalities of a volume, whose units differ, each by itself; the colours of a picture together."""
        return self.encoder.patch_embed.in_channels if len(self.encoder.grid_size) == 3 else 1

    def patches(self, image: Tensor) -> Tensor:
        """Cut ``(B, C, *space)`` into ``(B, N, G, P)``."""
        return at_least_float32(self.encoder.patch_embed.patchify(image)).unflatten(2, (self.groups, -1))

    def reconstruction_target(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the target ``(B, N, G, P)`` in the loss's units, and which of it was acquired."""
        patches = self.patches(batch["image"])
        valid, acquired = torch.ones_like(patches[..., 0], dtype=torch.bool), self.acquired(batch)
        if acquired is not None:
            valid = valid & acquired[:, None, :]
        return normalise_patches(patches) if self.norm_pix else patches, valid

    def reconstruction_groups(self, batch: Any) -> dict[str, Tensor]:
        """Return which entries of the target lie at positions of tissue: air would draw the constant down."""
        inside = (self.patches(batch["image"]) != 0).any(3)
        return {"foreground": inside.any(2, keepdim=True).expand_as(inside)} if len(self.encoder.grid_size) == 3 else {}

    def scored(self, batch: Any, pred: Tensor, hidden: Tensor) -> Reconstruction:
        """Compare a prediction ``(B, N, G, P)`` with the batch where ``hidden`` ``(B, N, G)``."""
        target, acquired = self.reconstruction_target(batch)
        mask = hidden & acquired
        groups = {} if self.training else {n: mask & part for n, part in self.reconstruction_groups(batch).items()}
        return Reconstruction(at_least_float32(pred), target, mask, groups)

    @abstractmethod
    def reconstruct(self, batch: Any, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from what is visible of ``batch[image]``."""

    def shown_patches(self, pred: Tensor, image: Tensor) -> Tensor:
        """Return predicted patches in the image's units: standardised ones get their true mean and spread."""
        true = self.patches(image)
        return pred * true.std(3, keepdim=True) + true.mean(3, keepdim=True) if self.norm_pix else pred

    def panels(self, batch: Any, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw sample ``index``: a picture, or the middle axial slice of every modality."""
        one, embed = slice(index, index + 1), self.encoder.patch_embed
        image = batch["image"][one].float()
        pred = self.shown_patches(output.pred[one].float(), image)
        hidden = output.mask[one][..., None].expand_as(pred)
        whole = torch.where(hidden, pred, self.patches(image))
        hidden_image, filled = (embed.unpatchify(x.float().flatten(2))[0] for x in (hidden, whole))
        name = batch["subject_id"][index]
        if image.ndim == 5:
            acquired = batch["modality_mask"][index]
            return volume_panels(name, self.shown_channels(), acquired, image[0], hidden_image, filled)
        if image.shape[1] != 3:
            return {"image": image_panel(name, image[0, 0], hidden_image[0] > 0.5, filled[0])}
        return {"image": colour_panel(name, self._unit(image[0]), self._unit(filled), hidden_image[0] > 0.5)}

    def _unit(self, image: Tensor) -> Tensor:
        """Undo the standardisation of ``(3, H, W)``, to [0, 1]."""
        mean, std = (torch.tensor(self.spec.preprocessing.get(name, default), device=image.device).view(-1, 1, 1)
                     for name, default in (("mean", [0.0]), ("std", [1.0])))  # fmt: skip
        return (image * std + mean).clamp(0, 1)


class MaskedNetwork(nn.Module):
    """Encoder, fill and decoder.

    Args:
        encoder: Of images or volumes.
        decoder: Maps tokens (and ``ids_restore`` where tokens are dropped) to ``(B, N, C P)``.
        fill: ``"drop"`` leaves hidden patches out (MAE), ``"learnable"`` puts an embedding there (SimMIM).
    """

    def __init__(self, encoder: VisionTransformer, decoder: nn.Module, fill: Fill) -> None:
        super().__init__()
        self.encoder, self.decoder, self.fill = encoder, decoder, fill
        self.mask_embed = nn.Parameter(torch.zeros(encoder.embed_dim), requires_grad=fill == "learnable")
        trunc_normal_(self.mask_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"mask_embed"}

    def forward(self, image: Tensor, mask: MaskOutput) -> Tensor:
        """Predict the patches ``(B, N, C P)`` of ``(B, C, *space)``."""
        patches = self.encoder.patch_embed.patchify(image)
        if self.fill == "drop":
            tokens = self.encoder.encode(self.encoder.embed(patches, mask.ids_keep)).tokens
            return self.decoder(tokens, mask.ids_restore)
        hidden = mask.mask[..., None]
        x = self.encoder.embed(patches.masked_fill(hidden, 0), extra=hidden * self.mask_embed)
        return self.decoder(self.encoder.encode(x).tokens[:, self.encoder.num_prefix_tokens :])


class MaskedPretrain(HiddenPatches):
    """Reconstruction of hidden patches (MAE, He et al. 2022; SimMIM, Xie et al. 2022).

    Args:
        encoder: Makes the encoder from (channels, image size).
        decoder: Makes the decoder from (width, grid, values per position).
        masker: Draws what is hidden.
        block: Patches along each edge of what is hidden together.
        fill: ``"drop"`` leaves hidden patches out, ``"learnable"`` puts a learned embedding there.
        norm_pix: Whether every patch of the target is standardised by itself.
        error: ``"squared"``, or ``"absolute"`` as SimMIM.
        optimization: How the weights are updated; the learning rate is for 256 samples per step.
        rate_factor: Factor of the learning rate.
    """

    def __init__(
        self,
        encoder: EncoderFactory = VisionTransformer,
        decoder: DecoderFactory = light_decoder,
        masker: RandomMasker = RandomMasker(),
        block: int = 1,
        fill: Fill = "drop",
        norm_pix: bool = True,
        error: Literal["squared", "absolute"] = "squared",
        optimization: OptimizerConfig = OptimizerConfig(),
        rate_factor: float = 1.0,
    ) -> None:
        super().__init__(optimization, rate_factor)
        self.save_hyperparameters()
        self.masker, self.block, self.fill, self.norm_pix = masker, block, fill, norm_pix
        self.error = masked_mse if error == "squared" else masked_l1
        self._make_encoder, self._make_decoder = encoder, decoder

    def build_network(self, spec: InputSpec) -> MaskedNetwork:
        """Make encoder and decoder for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit.
        """
        encoder = self._make_encoder(len(spec.channels), spec.image_size)
        if any(size % self.block for size in encoder.grid_size):
            grid = "x".join(map(str, encoder.grid_size))
            raise ValueError(f"Blocks of {self.block} patches do not fill a grid of {grid}: "
                             "change model.block or the size of the images.")  # fmt: skip
        decoder = self._make_decoder(encoder.embed_dim, encoder.grid_size, encoder.patch_embed.proj.in_features)
        return MaskedNetwork(encoder, decoder, self.fill)

    def draw_mask(self, batch: Any) -> MaskOutput:
        """Draw what is hidden of the batch's samples: whole blocks of patches, equally many in each."""
        grid, keys = self.encoder.grid_size, batch["key"]
        coarse = [size // self.block for size in grid]
        drawn = self.masker(len(keys), torch.Size(coarse).numel(), generator=KeyedGenerator(keys))
        if self.block == 1:
            return drawn
        blocks = drawn.mask.view(len(keys), *coarse)
        for axis in range(1, 1 + len(grid)):
            blocks = blocks.repeat_interleave(self.block, axis)
        mask = blocks.flatten(1)
        visible = int(drawn.ids_keep.shape[1]) * self.block ** len(grid) if drawn.ids_keep is not None else 0
        return order_to_output(mask.long().argsort(dim=1, stable=True), visible)

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compute the reconstruction error of one batch."""
        recon = self.reconstruct(batch)
        error = self.error(recon.pred, recon.target, recon.mask, sync)
        return StepOutput({"reconstruction": Term(error, recon.mask.sum(), 1.0)}, recon)

    def reconstruct(self, batch: Any, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from what is visible of ``batch[image]``."""
        mask = self.draw_mask(batch)
        pred = self.network(batch[image], mask).unflatten(2, (self.groups, -1))
        return self.scored(batch, pred, mask.mask[..., None].expand(pred.shape[:3]))


class ModalityDecoder(nn.Module):
    """Predicts one modality: its positions attend to all encoded tokens, then to each other (MultiMAE, section 3.4).

    Args:
        embed_dim: E.
        grid_size: Positions along each axis.
        modalities: M.
        out_features: P.
        dim: F.
        depth: Blocks after the cross-attention.
        num_heads: Attention heads.
    """

    def __init__(
        self, embed_dim: int, grid_size: Sequence[int], modalities: int, out_features: int,
        dim: int = 256, depth: int = 2, num_heads: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Linear(embed_dim, dim)
        self.modality_embed = nn.Parameter(torch.zeros(modalities, dim))
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(grid_size, dim), requires_grad=False)
        self.cross = PostNormAttention(dim, num_heads, dropout=0.0, norm_eps=1e-6)
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, qkv_bias=True) for _ in range(depth))
        self.norm, self.proj = nn.LayerNorm(dim), nn.Linear(dim, out_features)
        self.apply(init_transformer_weights)
        for parameter in (self.modality_embed, self.mask_token):
            trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"modality_embed", "mask_token", "pos_embed"}

    def forward(self, encoded: Tensor, tokens: ModalityTokens, modality: int) -> Tensor:
        """Predict all patches ``(B, N, P)`` of a modality from ``(B, K, E)``."""
        positions = self.pos_embed.shape[1]
        of, place = tokens.keep // positions, tokens.keep % positions
        context = self.embed(encoded)
        own = (of == modality) & tokens.real
        # What is not of this modality is written to a place beyond the last one, which is cut off.
        target = torch.where(own, place, positions)[..., None].expand(context.shape)
        queries = self.mask_token.to(context.dtype).expand(len(context), positions + 1, -1).scatter(1, target, context)
        context = context + self.pos_embed[0][place] + self.modality_embed[of]
        x = self.cross(queries[:, :-1] + self.pos_embed + self.modality_embed[modality], context, tokens.real)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x))


class MultiMAENetwork(nn.Module):
    """Encoder and one decoder per modality.

    Args:
        encoder: With a token for every modality and position.
    """

    def __init__(self, encoder: ModalityTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        modalities = encoder.patch_embed.in_channels
        values = encoder.patch_embed.proj.in_features // modalities
        self.decoders = nn.ModuleList(
            ModalityDecoder(encoder.embed_dim, encoder.grid_size, modalities, values) for _ in range(modalities)
        )

    def forward(self, image: Tensor, tokens: ModalityTokens) -> Tensor:
        """Predict ``(B, N, M, P)`` from the visible tokens of ``(B, M, *space)``."""
        every = self.encoder.embed_modalities(image)
        kept = every.gather(1, tokens.keep[..., None].expand(-1, -1, every.shape[2]))
        encoded = self.encoder.encode_tokens(kept, tokens.real)
        return torch.stack([decode(encoded, tokens, m) for m, decode in enumerate(self.decoders)], 2)


class MultiMAEPretrain(HiddenPatches):
    """Reconstruction of several modalities from a few tokens of all (Bachmann et al. 2022).

    The modalities are the channels: sequences of a volume, colours of a picture.

    Args:
        encoder: Makes the encoder from (channels, image size).
        masker: Draws which tokens stay visible.
        norm_pix: Whether every patch of the target is standardised by itself.
        optimization: How the weights are updated; the learning rate is for 256 samples per step.
        rate_factor: Factor of the learning rate.
    """

    def __init__(
        self,
        encoder: Callable[[int, Sequence[int]], ModalityTransformer] = ModalityTransformer,
        masker: DirichletMasker = DirichletMasker(),
        norm_pix: bool = True,
        optimization: OptimizerConfig = OptimizerConfig(),
        rate_factor: float = 1.0,
    ) -> None:
        super().__init__(optimization, rate_factor)
        self.save_hyperparameters()
        self.masker, self.norm_pix, self._make_encoder = masker, norm_pix, encoder

    @property
    def groups(self) -> int:
        """G: the modalities."""
        return self.encoder.patch_embed.in_channels

    def build_network(self, spec: InputSpec) -> MultiMAENetwork:
        """Make encoder and decoders for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit.
        """
        return MultiMAENetwork(self._make_encoder(len(spec.channels), spec.image_size))

    def draw_tokens(self, batch: Any) -> ModalityTokens:
        """Draw which tokens of the acquired modalities stay visible."""
        image, acquired = batch["image"], self.acquired(batch)
        acquired = torch.ones_like(image[:, :, 0, 0], dtype=torch.bool) if acquired is None else acquired
        return self.masker(KeyedGenerator(batch["key"]), self.encoder.patch_embed.num_patches, acquired)

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compute the reconstruction error of one batch, over all modalities and ranks."""
        recon = self.reconstruct(batch)
        error = masked_mse(recon.pred, recon.target, recon.mask, sync)
        return StepOutput({"reconstruction": Term(error, recon.mask.sum(), 1.0)}, recon)

    def reconstruct(self, batch: Any, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from the visible tokens of ``batch[image]``."""
        tokens = self.draw_tokens(batch)
        return self.scored(batch, self.network(batch[image], tokens), tokens.mask.transpose(1, 2))
