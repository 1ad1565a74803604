"""Pre-training by masked relation modeling (paper section 3)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.blocks.attention import Relations
from common.blocks.patch_embed import normalise_patches
from common.blocks.vit import VisionTransformer
from common.checkpoint import init_encoder
from common.losses.reconstruction import masked_mse
from common.losses.relation import relation_matching
from common.maskers.random import RandomMasker
from common.module import SSLModule, StepOutput, Term
from common.optim import OptimizerConfig
from common.panels import colour_panel
from common.randomness import KeyedGenerator
from common.runtime.precision import at_least_float32
from common.runtime.reporting import print_line
from common.types import ImageGenomeBatch, ImageKey, InputSpec, MaskOutput, Panel, Reconstruction, TokenFeatures
from experiments.mrm_genetics.model import (
    FusedDecoder,
    Genetics,
    GenomeEncoder,
    Pool,
    RelationConfig,
    RelationNetwork,
    RelationOutput,
)

EncoderFactory = Callable[[int, Sequence[int]], VisionTransformer]
GenomeFactory = Callable[[Mapping[str, int], int, int], GenomeEncoder]
DecoderFactory = Callable[[int, Sequence[int], int, int, Literal["image", "genome"], bool], FusedDecoder]


def _decoder_sizes(encoder: VisionTransformer) -> tuple[int, Sequence[int], int]:
    return encoder.embed_dim, encoder.grid_size, encoder.num_prefix_tokens


@dataclass(frozen=True)
class MatchingConfig:
    """How relations between samples are compared (section 3.4).

    Args:
        pool: ``"mean"`` over an image's patches, or its ``"cls"`` token; a genome's tokens are always averaged.
        center: Whether vectors lose their batch mean before they are compared.
        stop_gradient: Whether the intact pass gets no gradient from the comparison.
    """

    pool: Pool = "mean"
    center: bool = False
    stop_gradient: bool = False


class RelationPretrain(SSLModule[ImageGenomeBatch]):
    """Reconstruction from masked relations, and relations between samples that masking must not change (Eq. 14).

    Images come with genetics or alone, depending on the data (section 4.6).

    Args:
        encoder: Makes the image encoder from (channels, image size).
        genome_encoder: Makes the genome encoder from (features by kind, width, heads).
        decoder: Makes the image decoder; called with its sizes.
        genome_decoder: Makes the genome decoder likewise.
        tau_image: Share of relations removed from the image's rows, to itself and to the genome.
        tau_genome: The same for the genome's rows. Both 0: the control, an autoencoder without masking.
        match_weight: Lambda of Eq. 14; 0 is the ablation without relation matching.
        relations: How relations are masked.
        matching: How relations between samples are compared.
        norm_pix_loss: Whether each patch is standardised by itself before it is compared.
        masker: Hides patches at the input, which are then all that is scored: masked autoencoding, the baseline. Images
            alone.
        init_from: File of MAE, timm or published weights to start the encoder from; None starts from scratch.
        optimization: How the weights are updated.

    Raises:
        ValueError: a share is outside [0, 1).
    """

    remembered = ("channels", "image_size", "genome")

    def __init__(
        self,
        encoder: EncoderFactory = VisionTransformer,
        genome_encoder: GenomeFactory = GenomeEncoder,
        decoder: DecoderFactory = FusedDecoder,
        genome_decoder: DecoderFactory = FusedDecoder,
        tau_image: float = 0.75,
        tau_genome: float = 0.5,
        match_weight: float = 1.0,
        relations: RelationConfig = RelationConfig(),
        matching: MatchingConfig = MatchingConfig(),
        norm_pix_loss: bool = False,
        masker: RandomMasker | None = None,
        init_from: str | None = None,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        for name, value in (("tau_image", tau_image), ("tau_genome", tau_genome)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is the share of relations to remove, in [0, 1), got {value}.")
        super().__init__(optimization)
        self.save_hyperparameters()
        self.masker = masker
        self.match_weight = match_weight
        self.norm_pix_loss = norm_pix_loss
        self.init_from = init_from
        self._factories = (encoder, genome_encoder, decoder, genome_decoder)
        self._taus, self._relations, self._matching = (tau_image, tau_genome), relations, matching

    def build_network(self, spec: InputSpec) -> RelationNetwork:
        """Make the networks for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit, or patches hidden beside genetics.
        """
        if self.masker is not None and spec.genome:
            raise ValueError(
                "Patches are hidden at the input for images alone: leave model.masker or the genetics out."
            )
        make_encoder, make_genome, make_decoder, make_genome_decoder = self._factories
        encoder = make_encoder(len(spec.channels), spec.image_size)
        genome, genome_decoder, tokens = None, None, 0
        if spec.genome:
            genome = make_genome(spec.genome, encoder.embed_dim, encoder.config["num_heads"])
            tokens = genome.tokens.num_tokens
            genome_decoder = make_genome_decoder(*_decoder_sizes(encoder), tokens, "genome", False)
        decoder = make_decoder(*_decoder_sizes(encoder), tokens, "image", self.masker is not None)
        if self.masker is not None:
            self.masker(1, encoder.patch_embed.num_patches, generator=torch.Generator())
        return RelationNetwork(
            encoder, genome, decoder, genome_decoder, *self._taus, self._relations, self._matching.pool
        )

    def on_fit_start(self) -> None:
        """Take the encoder's first weights from a file, unless a checkpoint brings all (Lightning hook)."""
        if self.trainer.ckpt_path is None and self.init_from:
            print_line(f"encoder from {self.init_from}: {init_encoder(self.network.encoder, self.init_from)}")

    def draw_mask(self, batch: ImageGenomeBatch) -> MaskOutput | None:
        """Draw the hidden patches that belong to the batch's samples; None where nothing is hidden at the input."""
        if self.masker is None:
            return None
        patches = self.network.encoder.patch_embed.num_patches
        return self.masker(len(batch["key"]), patches, generator=KeyedGenerator(batch["key"]))

    def genetics(self, batch: ImageGenomeBatch) -> Genetics | None:
        """Return the genetics of a batch; None where the network has none."""
        if self.network.genome is None:
            return None
        return Genetics(batch["genome"], None if batch["complete"] else batch["modality_mask"][:, 1:])

    def target(self, image: Tensor) -> Tensor:
        """Return the patches ``(B, N, P)`` of an image, in the units of the loss."""
        patches = at_least_float32(self.network.encoder.patch_embed.patchify(image))
        return normalise_patches(patches) if self.norm_pix_loss else patches

    def matching(self, output: RelationOutput, batch: ImageGenomeBatch, sync: bool) -> dict[str, Tensor]:
        """Compare the relations between samples of both passes."""
        image, genome, image_masked, genome_masked = output.pooled
        assert image is not None
        assert image_masked is not None
        # Passed on every rank, whether or not its samples are complete: all ranks must join the exchange.
        present = None if genome is None else batch["modality_mask"][:, 1:].any(1)
        center, stop_gradient = self._matching.center, self._matching.stop_gradient
        return relation_matching(image, genome, image_masked, genome_masked, present, center, stop_gradient, sync)

    def step(self, batch: ImageGenomeBatch, sync: bool) -> StepOutput:
        """Compute the losses of one batch."""
        genetics, mask = self.genetics(batch), self.draw_mask(batch)
        matched = self.match_weight > 0
        output = self.network(batch["image"], genetics, mask, intact=matched)
        recon = self._reconstruction(output.image, batch, mask)
        terms = {"image": Term(masked_mse(recon.pred, recon.target, recon.mask, sync), recon.mask.sum(), 1.0)}
        if genetics is not None:
            observed = batch["genome_observed"]
            error = masked_mse(output.genome[..., None], genetics.values[..., None], observed, sync)
            terms["genome"] = Term(error, observed.sum(), 1.0)
        if matched:
            relations = self.matching(output, batch, sync)
            wanted = ("self",) if genetics is None else ("self", "cross")
            samples = float(len(batch["image"]))
            terms |= {name: Term(relations[name], samples, self.match_weight) for name in wanted}
        return StepOutput(terms, recon)

    def _reconstruction(self, pred: Tensor, batch: ImageGenomeBatch, mask: MaskOutput | None) -> Reconstruction:
        target = self.target(batch["image"])
        scored = torch.ones_like(target[..., 0], dtype=torch.bool) if mask is None else mask.mask
        return Reconstruction(at_least_float32(pred), target, scored, {})

    def reconstruct(self, batch: ImageGenomeBatch, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from ``batch[image]`` with its relations masked, and its own genetics."""
        mask = self.draw_mask(batch)
        output = self.network(batch[image], self.genetics(batch), mask, intact=False)
        return self._reconstruction(output.image, batch, mask)

    def reconstruct_genome(self, batch: ImageGenomeBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return predicted and true features ``(B, F)``, and which were observed, bool ``(B, F)``."""
        output = self.network(batch["image"], self.genetics(batch), self.draw_mask(batch), intact=False)
        return output.genome.float(), batch["genome"].float(), batch["genome_observed"]

    def relations(self, batch: ImageGenomeBatch) -> dict[str, Relations]:
        """Return the masked relations of a batch by name: ``image_self``, ``genome_cross`` and so on."""
        record: dict[str, Relations] = {}
        self.network(batch["image"], self.genetics(batch), self.draw_mask(batch), intact=False, record=record)
        return record

    def pooled(self, batch: ImageGenomeBatch) -> dict[str, Tensor]:
        """Return the vectors ``(B, E)`` that samples are compared by, of both passes, by name."""
        output = self.network(batch["image"], self.genetics(batch), self.draw_mask(batch), intact=True)
        names = ("image", "genome", "image_masked", "genome_masked")
        return {name: x for name, x in zip(names, output.pooled, strict=True) if x is not None}

    def reconstruction_target(self, batch: ImageGenomeBatch) -> tuple[Tensor, Tensor]:
        """Return the target patches ``(B, N, P)``, and that all of them exist."""
        target = self.target(batch["image"])
        return target, torch.ones_like(target[..., 0], dtype=torch.bool)

    def token_features(self, batch: ImageGenomeBatch) -> TokenFeatures:
        """Encode whole images, nothing masked."""
        encoder = self.network.encoder
        patches = encoder.forward_features(batch["image"])[:, encoder.num_prefix_tokens :]
        return TokenFeatures({"final": patches}, torch.ones_like(patches[..., 0], dtype=torch.bool))

    def pixels(self, patches: Tensor, image: Tensor) -> Tensor:
        """Turn predicted patches ``(B, N, P)`` into images in [0, 1], to look at.

        Args:
            patches: In the units of the loss.
            image: ``(B, C, H, W)``, the truth, standardised: patches that were standardised get its mean and spread.
        """
        embed = self.network.encoder.patch_embed
        if self.norm_pix_loss:
            true = embed.patchify(image)
            patches = patches * true.std(2, keepdim=True) + true.mean(2, keepdim=True)
        return self.unit(embed.unpatchify(patches))

    def unit(self, image: Tensor) -> Tensor:
        """Undo the standardisation of ``(B, C, H, W)``, to [0, 1]."""
        mean, std = (
            torch.tensor(self.spec.preprocessing.get(name, default), device=image.device).view(1, -1, 1, 1)
            for name, default in (("mean", [0.0]), ("std", [1.0]))
        )
        return (image.float() * std + mean).clamp(0, 1)

    def panels(self, batch: ImageGenomeBatch, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw sample ``index``."""
        one = slice(index, index + 1)
        image = batch["image"][one].float()
        hidden = None
        pred = self.pixels(output.pred[one].float(), image)[0]
        if self.masker is not None:
            embed = self.network.encoder.patch_embed
            values = embed.in_channels * embed.patch_size[0] * embed.patch_size[1]
            hidden = embed.unpatchify(output.mask[one][..., None].float().expand(-1, -1, values))[0, 0] > 0.5
            pred = torch.where(hidden, pred, self.unit(image)[0])
        lesion = batch["lesion"][index] if "lesion" in batch else None
        return {"image": colour_panel(batch["subject_id"][index], self.unit(image)[0], pred, hidden, lesion)}
