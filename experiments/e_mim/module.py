"""E-MIM pre-training (paper sections III-A to III-C)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from common.blocks.decoder import LinearDecoder
from common.blocks.vit import VisionTransformer
from common.losses.barlow_twins import cross_correlation, sample_barlow_twins, token_barlow_twins
from common.losses.reconstruction import masked_mse
from common.maskers.hybrid import HybridMasker
from common.module import SSLModule, StepOutput
from common.optim import Schedule
from common.panels import volume_panels
from common.randomness import KeyedGenerator
from common.runtime.precision import at_least_float32
from common.types import InputSpec, MaskOutput, Panel, Reconstruction, TokenFeatures
from experiments.e_mim.model import EMIM, CleanBranch, EMIMOutput, MaskFill

EncoderFactory = Callable[[int, Sequence[int]], VisionTransformer]
DecoderFactory = Callable[[int, Sequence[int], int], nn.Module]


class EMIMPretrain(SSLModule):
    """Masked reconstruction under the hybrid mask pattern, with pyramid Barlow Twins.

    Args:
        encoder: Makes the encoder from (channels, image size).
        decoder: Makes the decoder from (width, grid, values per token); the paper's is one projection.
        masker: Draws what is hidden in training, and in validation where ``val_masker`` is None.
        val_masker: Draws what is hidden in validation, to score several methods on one set of masks.
        taps: Blocks (1-based, 0 = patch embedding) of the pyramid; Table IV.
        mask_fill: What stands in for hidden patches: ``"zero"``, ``"learnable"`` or, for MAE, ``"drop"``.
        loss_on: ``"masked"`` is Eq. 1, ``"all"`` Eq. 9.
        barlow_twins_weight: Weight of the pyramid; 0 leaves the full volume uncomputed.
        correlation_axis: ``"position"`` as the paper (Eq. 4), or ``"feature"``.
        correlation_sum: ``"batch"`` sums Eq. 4 over batch and features; ``"sample"`` makes one matrix per sample.
        correlation_center: Whether each position's mean is subtracted before Eq. 4.
        reduction: ``"sum"`` is Eq. 8; ``"mean"`` does not grow with the number of tokens.
        off_diagonal_weight: Factor of Eq. 8's second sum.
        detach_clean: Whether the full volume's branch gets no gradient.
        optimizer: Makes the optimiser.
        schedule: Attaches the learning-rate schedule.
        compile_network: Whether to compile the network.
        channels: Names of the modalities; None = as the data say.
        image_size: Size of a crop; None = as the data say.

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
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        compile_network: bool = False,
        channels: list[str] | None = None,
        image_size: list[int] | None = None,
    ) -> None:
        super().__init__({"reconstruction": 1.0, "barlow_twins": barlow_twins_weight}, optimizer, schedule)
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
        self.loss_on = loss_on
        self.compile_network = compile_network
        self.clean_branch: CleanBranch = "off" if barlow_twins_weight == 0 else ("detach" if detach_clean else "train")
        self._make_encoder, self._make_decoder = encoder, decoder
        self._correlation = (correlation_axis, correlation_sum, correlation_center, reduction, off_diagonal_weight)

    def build_network(self, spec: InputSpec) -> EMIM:
        """Make encoder and decoder for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit; a masker that cannot hide what it is asked to of these modalities.
        """
        encoder = self._make_encoder(len(spec.channels), spec.image_size)
        for masker in (self.masker, self.val_masker):
            masker(1, encoder.grid_size, len(spec.channels), generator=torch.Generator())
        decoder = self._make_decoder(encoder.embed_dim, encoder.grid_size, encoder.patch_embed.proj.in_features)
        return EMIM(encoder, decoder, self.taps, self.mask_fill)

    def draw_mask(self, batch: Mapping[str, Any], masker: HybridMasker) -> MaskOutput:
        """Draw the masks that belong to the batch's samples."""
        grid = self.network.encoder.grid_size
        batch_size, modalities = batch["modality_mask"].shape
        generator = KeyedGenerator(batch["key"])
        return masker(batch_size, grid, modalities, batch["modality_mask"], generator)

    def _run(
        self, batch: Mapping[str, Any], clean: CleanBranch, image: str = "image"
    ) -> tuple[EMIMOutput, Reconstruction]:
        mask = self.draw_mask(batch, self.masker if self.training else self.val_masker)
        output = self.network(batch[image], mask, clean, batch["image"])
        scored = mask.mask & batch["modality_mask"][:, :, None]
        groups = {} if self.training else self._groups(mask, scored, output.target)
        return output, Reconstruction(at_least_float32(output.pred), output.target, scored, groups)

    @classmethod
    def _groups(cls, mask: MaskOutput, scored: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the parts of the hidden entries that are scored apart."""
        nothing_visible = mask.mask.all(1, keepdim=True)
        return {
            "fully_hidden": scored & nothing_visible,
            "partly_visible": scored & ~nothing_visible,
            "foreground": scored & cls._foreground(target),
        }

    @staticmethod
    def _foreground(target: Tensor) -> Tensor:
        """Return which positions ``(B, 1, N)`` of patches ``(B, C, N, P)`` are not air in every modality."""
        return (target != 0).any(3).any(1, keepdim=True)

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compute reconstruction error and pyramid of one batch."""
        output, reconstruction = self._run(batch, self.clean_branch)
        scored = reconstruction.mask
        if self.loss_on == "all":
            scored = batch["modality_mask"][:, :, None].expand_as(scored)
        losses = {"reconstruction": masked_mse(reconstruction.pred, reconstruction.target, scored, sync)}
        samples = torch.tensor(float(len(scored)))
        weights = {"reconstruction": scored.sum().float(), "barlow_twins": samples}
        extras = {}
        if output.clean:
            pairs = zip(self.taps, output.clean, output.masked, strict=True)
            extras = {f"loss_barlow_twins_tap{tap}": self._tap_loss(a, b, sync) for tap, a, b in pairs}
            losses["barlow_twins"] = torch.stack(list(extras.values())).sum()
            if not sync:
                extras |= self._diagonals(output)
        weights |= {name.removeprefix("loss_"): samples for name in extras}
        return StepOutput(losses, weights, reconstruction, extras)

    def _tap_loss(self, clean: Tensor, masked: Tensor, sync: bool) -> Tensor:
        """Return Eq. 8 at one level."""
        axis, summed, center, reduction, weight = self._correlation
        if summed == "sample":
            return sample_barlow_twins(clean, masked, reduction, weight, sync)
        return token_barlow_twins(clean, masked, axis, reduction, weight, center, sync)

    def _diagonals(self, output: EMIMOutput) -> dict[str, Tensor]:
        """Return the mean diagonal and mean absolute off-diagonal of the last level's matrix."""
        axis, _, center, _, _ = self._correlation
        matrix = cross_correlation(output.clean[-1], output.masked[-1], axis, center, sync=False)
        diagonal, n = matrix.diagonal(), len(matrix)
        off = (matrix.abs().sum() - diagonal.abs().sum()) / max(n * (n - 1), 1)
        return {"correlation_diagonal": diagonal.mean(), "correlation_off_diagonal": off}

    def reconstruct(self, batch: Any, image: str = "image") -> Reconstruction:
        """Reconstruct a batch from what is visible of ``batch[image]``."""
        return self._run(batch, "off", image)[1]

    def reconstruction_target(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the patches ``(B, C, N, P)`` and which of them were acquired ``(B, C, N)``."""
        target = self.network.patches(batch["image"])
        return target, batch["modality_mask"][:, :, None].expand(target.shape[:3])

    def reconstruction_groups(self, batch: Any) -> dict[str, Tensor]:
        """Return which patches ``(B, C, N)`` lie at positions of tissue: air would draw the constant down."""
        target = self.network.patches(batch["image"])
        return {"foreground": self._foreground(target).expand(target.shape[:3])}

    def token_features(self, batch: Any) -> TokenFeatures:
        """Encode unmasked volumes; tokens of air alone are left out."""
        network: EMIM = self.network
        taps = tuple(tap for tap in self.taps if tap != len(network.encoder.blocks))
        output = network.encoder.encode_image(batch["image"], taps)
        features = {"final": output.tokens} | {f"tap{t}": h for t, h in zip(taps, output.hidden, strict=True)}
        return TokenFeatures(features, (network.patches(batch["image"]) != 0).any(3).any(1))

    def panels(self, batch: Any, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw the middle axial slice of sample ``index``, one panel a modality."""
        network: EMIM = self.network
        hidden = output.mask[index][..., None].expand_as(output.target[index])
        filled = torch.where(hidden, output.pred[index], output.target[index])
        volumes = [network.volume(x[None].float())[0] for x in (output.target[index], hidden, filled)]
        names = self.shown_channels()
        acquired = batch["modality_mask"][index]
        return volume_panels(batch["subject_id"][index], names, acquired, *volumes)
