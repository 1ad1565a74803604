"""E-MIM pre-training (paper sections III-A to III-C)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from common.blocks.decoder import LinearDecoder
from common.blocks.vit import VisionTransformer
from common.maskers.hybrid import HybridMasker
from common.module import SSLModule, StepOutput
from common.optim import OptimizerConfig
from common.panels import volume_panels
from common.randomness import KeyedGenerator
from common.types import ImageKey, InputSpec, MaskOutput, Panel, Reconstruction, TokenFeatures, VolumeBatch
from experiments.e_mim.model import EMIM, CleanBranch, MaskFill
from experiments.e_mim.objective import Correlation, Objective, foreground, scored_reconstruction

EncoderFactory = Callable[[int, Sequence[int]], VisionTransformer]
DecoderFactory = Callable[[int, Sequence[int], int], nn.Module]


class EMIMPretrain(SSLModule[VolumeBatch]):
    """Masked reconstruction under the hybrid mask pattern, with pyramid Barlow Twins.

    Args:
        encoder: Makes the encoder from (channels, image size).
        decoder: Makes the decoder from (width, grid, values per token); the paper's is one projection.
        masker: Draws what is hidden in training, and in validation where ``val_masker`` is None.
        val_masker: Draws what is hidden in validation, to score several methods on one set of masks.
        taps: Blocks (1-based, 0 = patch embedding) of the pyramid; Table IV.
        mask_fill: What replaces hidden patches: ``"zero"``, ``"learnable"`` or, for MAE, ``"drop"``.
        loss_on: ``"masked"`` is Eq. 1, ``"all"`` Eq. 9.
        barlow_twins_weight: Weight of the pyramid; 0 leaves the full volume uncomputed.
        correlation_axis: ``"position"`` as the paper (Eq. 4), or ``"feature"``.
        correlation_sum: ``"batch"`` sums Eq. 4 over batch and features; ``"sample"`` makes one matrix per sample.
        correlation_center: Whether each position's mean is subtracted before Eq. 4.
        reduction: ``"sum"`` is Eq. 8; ``"mean"`` does not grow with the number of tokens.
        off_diagonal_weight: Factor of Eq. 8's second sum.
        detach_clean: Whether the full volume's branch gets no gradient.
        optimization: How the weights are updated.

    Raises:
        ValueError: an option is unknown, or a combination has no effect or no meaning.
    """

    def __init__(
        self,
        encoder: EncoderFactory = VisionTransformer,
        decoder: DecoderFactory = LinearDecoder,
        masker: HybridMasker | None = None,
        val_masker: HybridMasker | None = None,
        taps: Sequence[int] = (3, 6, 9, 12),
        mask_fill: MaskFill = "zero",
        loss_on: Literal["masked", "all"] = "masked",
        barlow_twins_weight: float = 0.1,
        correlation_axis: Literal["position", "feature"] = "position",
        correlation_sum: Literal["batch", "sample"] = "batch",
        correlation_center: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        off_diagonal_weight: float = 1.0,
        detach_clean: bool = False,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__(optimization)
        if correlation_sum == "sample" and (correlation_axis != "position" or correlation_center):
            raise ValueError("correlation_sum='sample' belongs to the uncentred position form alone.")
        if mask_fill == "drop" and barlow_twins_weight > 0:
            raise ValueError("mask_fill='drop' leaves no token at hidden positions to correlate: "
                             "set barlow_twins_weight to 0.")  # fmt: skip
        self.save_hyperparameters()
        self.masker = masker or HybridMasker()
        self.val_masker = val_masker or self.masker
        self.taps = tuple(taps)
        self.mask_fill: MaskFill = mask_fill
        self.clean_branch: CleanBranch = "off" if barlow_twins_weight == 0 else ("detach" if detach_clean else "train")
        self._make_encoder, self._make_decoder = encoder, decoder
        correlation = Correlation(correlation_axis, correlation_sum, correlation_center, reduction, off_diagonal_weight)
        self.objective = Objective(loss_on, self.taps, barlow_twins_weight, correlation)

    def build_network(self, spec: InputSpec) -> EMIM:
        """Make encoder and decoder for inputs of ``spec``.

        Raises:
            ValueError: sizes do not fit, or the masker cannot hide the requested share of these modalities.
        """
        encoder = self._make_encoder(len(spec.channels), spec.image_size)
        for masker in (self.masker, self.val_masker):
            masker(1, encoder.grid_size, len(spec.channels), generator=torch.Generator())
        decoder = self._make_decoder(encoder.embed_dim, encoder.grid_size, encoder.patch_embed.proj.in_features)
        return EMIM(encoder, decoder, self.taps, self.mask_fill)

    def draw_mask(self, batch: VolumeBatch) -> MaskOutput:
        """Draw the masks that belong to the batch's samples."""
        masker = self.masker if self.training else self.val_masker
        batch_size, modalities = batch["modality_mask"].shape
        grid, generator = self.network.encoder.grid_size, KeyedGenerator(batch["key"])
        return masker(batch_size, grid, modalities, batch["modality_mask"], generator)

    def step(self, batch: VolumeBatch, sync: bool) -> StepOutput:
        """Compute reconstruction error and pyramid of one batch."""
        mask, acquired = self.draw_mask(batch), batch["modality_mask"]
        output = self.network(batch["image"], mask, self.clean_branch)
        reconstruction = scored_reconstruction(output, mask, acquired, grouped=not self.training)
        return StepOutput(self.objective.terms(output, reconstruction, acquired, sync), reconstruction)

    def reconstruct(self, batch: VolumeBatch, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from what is visible of ``batch[image]``."""
        mask = self.draw_mask(batch)
        output = self.network(batch[image], mask, "off", batch["image"])
        return scored_reconstruction(output, mask, batch["modality_mask"], grouped=not self.training)

    def reconstruction_target(self, batch: VolumeBatch) -> tuple[Tensor, Tensor]:
        """Return the patches ``(B, C, N, P)`` and which of them were acquired ``(B, C, N)``."""
        target = self.network.patches(batch["image"])
        return target, batch["modality_mask"][:, :, None].expand(target.shape[:3])

    def reconstruction_groups(self, batch: VolumeBatch) -> dict[str, Tensor]:
        """Return which patches ``(B, C, N)`` lie at positions of tissue: air would draw the constant down."""
        target = self.network.patches(batch["image"])
        return {"foreground": foreground(target)[:, None].expand(target.shape[:3])}

    def token_features(self, batch: VolumeBatch) -> TokenFeatures:
        """Encode unmasked volumes; tokens of air alone are left out."""
        network: EMIM = self.network
        taps = tuple(tap for tap in self.taps if tap != len(network.encoder.blocks))
        output = network.encoder.encode_image(batch["image"], taps)
        features = {"final": output.tokens} | {f"tap{t}": h for t, h in zip(taps, output.hidden, strict=True)}
        return TokenFeatures(features, foreground(network.patches(batch["image"])))

    def panels(self, batch: VolumeBatch, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw the middle axial slice of sample ``index``, one panel per modality."""
        network: EMIM = self.network
        hidden = output.mask[index][..., None].expand_as(output.target[index])
        filled = torch.where(hidden, output.pred[index], output.target[index])
        volumes = [network.volume(x[None].float())[0] for x in (output.target[index], hidden, filled)]
        acquired = batch["modality_mask"][index]
        return volume_panels(batch["subject_id"][index], self.shown_channels(), acquired, *volumes)
