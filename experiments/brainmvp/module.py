"""BrainMVP pre-training: cross-modal reconstruction, modality template distillation, modality-aware contrast.

Letters: B batch, S sequence types, V voxels of a crop.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.blocks.uniformer import UniFormer3D, UpsamplingDecoder
from common.errors import UserError
from common.losses.contrastive import retrieval_accuracy, symmetric_info_nce
from common.losses.reconstruction import masked_mse
from common.maskers.random import RandomMasker
from common.maskers.voxel_blocks import block_grid, blocks_to_voxels, replace_blocks
from common.module import SSLModule, StepOutput, Term
from common.optim import OptimizerConfig
from common.panels import filled_panel
from common.randomness import KeyedGenerator
from common.types import ImageKey, InputSpec, Panel, Reconstruction, SequencePairBatch, TokenFeatures
from experiments.brainmvp.model import BrainMVP, Views

EncoderFactory = Callable[[int, Sequence[int]], nn.Module]
DecoderFactory = Callable[[Any], nn.Module]
Fill = Literal["cross", "template", "zero"]


class _Inputs(NamedTuple):
    """The two views of a batch as the encoder sees them, and where the cross view was filled."""

    cross: Tensor
    template: Tensor
    hidden: Tensor
    scored: Tensor


class BrainMVPPretrain(SSLModule[SequencePairBatch]):
    """Reconstructs one sequence of a study from an eighth of its blocks and what fills the rest.

    The cross view's holes hold another sequence of the study, the template view's the learnable template of the same
    sequence. A study with one sequence has no partner: its cross view is filled by the template, counts for no
    cross-modal loss, and is contrasted all the same. One target is drawn per sample, uniformly over the sequences of
    its study: an unbiased sample of E-SSL's mean over them.

    Args:
        encoder: Makes the encoder from (channels, image size).
        decoder: Makes the decoder from the encoder.
        mask_ratio: Share of blocks that are replaced, p*.
        block_size: Side of a block in voxels, K.
        template_shape: Voxels of the atlas that templates cover; None: taken from the data.
        fill: What the cross view's holes hold: ``"cross"`` is the method; ``"template"`` and ``"zero"`` are ablations.
        template_weight: Weight of template distillation.
        contrastive_weight: Weight of the contrast.
        temperature: Of the contrast.
        contrastive_start: Share of the epochs before the contrast begins.
        template_warmup: Share of the epochs in which the templates fill both views.
        template_lr_scale: Learning rate of the templates over the network's.
        optimization: How the weights are updated.

    Raises:
        ValueError: a share is outside [0, 1], or the temperature is not positive.
    """

    def __init__(
        self,
        encoder: EncoderFactory = UniFormer3D,
        decoder: DecoderFactory = UpsamplingDecoder,
        mask_ratio: float = 0.875,
        block_size: int = 8,
        template_shape: Sequence[int] | None = None,
        fill: Fill = "cross",
        template_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        temperature: float = 0.1,
        contrastive_start: float = 2 / 3,
        template_warmup: float = 0.0,
        template_lr_scale: float = 1.0,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__(optimization)
        for name, share in (("contrastive_start", contrastive_start), ("template_warmup", template_warmup)):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` is a share of the epochs in [0, 1], got {share}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.save_hyperparameters()
        self.masker = RandomMasker(mask_ratio)
        self.block_size, self.template_shape = block_size, template_shape
        self.fill: Fill = fill
        self.template_weight, self.contrastive_weight = template_weight, contrastive_weight
        self.temperature = temperature
        self.contrastive_start, self.template_warmup = contrastive_start, template_warmup
        self.template_lr_scale = template_lr_scale
        self._make_encoder, self._make_decoder = encoder, decoder
        #: Features of both views of the last validation batch, for callbacks.
        self.views: tuple[Tensor, Tensor] | None = None

    def build_network(self, spec: InputSpec) -> BrainMVP:
        """Make encoder, decoder and templates for crops of ``spec``.

        Raises:
            ValueError: sizes that do not fit.
        """
        self.masker(1, math.prod(block_grid(spec.image_size, self.block_size)))
        encoder = self._make_encoder(1, spec.image_size)
        shape = self.template_shape or spec.preprocessing.get("atlas")
        if shape is None:
            raise ValueError("The dataset defines no atlas: set model.template_shape.")
        if spec.preprocessing.get("atlas") not in (None, list(shape)):
            raise ValueError(f"`template_shape` {list(shape)} differs from the data's atlas "
                             f"{spec.preprocessing['atlas']}: leave it out.")  # fmt: skip
        return BrainMVP(encoder, self._make_decoder(encoder), len(spec.channels), shape)

    def on_fit_start(self) -> None:
        """Refuse settings that the templates' own optimiser cannot support (Lightning hook).

        Raises:
            UserError: gradients are scaled.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise UserError("The templates take their gradients unscaled, so float16 does not work: "
                            "use bf16-mixed or 32-true.")  # fmt: skip

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1; 1 without a trainer, so that every term is active."""
        if self._trainer is None:
            return 1.0
        if self.trainer.max_epochs and self.trainer.max_epochs > 0:
            return self.current_epoch / self.trainer.max_epochs
        return self.global_step / max(self.trainer.max_steps, 1)

    def _hidden_blocks(self, batch: SequencePairBatch) -> tuple[Tensor, Tensor]:
        """Draw the masks of the two views, each bool ``(B, N)``: functions of the samples' keys."""
        generator = KeyedGenerator(batch["key"])
        count = math.prod(block_grid(batch["image"].shape[2:], self.block_size))
        cross = self.masker(len(batch["key"]), count, generator=generator).mask
        return cross, self.masker(len(batch["key"]), count, generator=generator).mask

    def _inputs(self, batch: SequencePairBatch, image: ImageKey = "image", track: bool = False) -> _Inputs:
        """Fill the holes of ``batch[image]``, with its partner for the cross view."""
        target = batch[image]
        own = image == "image"
        partner, paired = batch["partner" if own else "control_partner"], batch["paired" if own else "control_paired"]
        paired = paired[:, None, None, None, None]
        template = self.network.templates.view(batch["place"], target.shape[2:], track).to(target)
        cross_blocks, template_blocks = self._hidden_blocks(batch)
        warm = track and self.progress < self.template_warmup
        if self.fill == "template" or warm:
            filled = template
        elif self.fill == "zero":
            filled = torch.zeros_like(target)
        else:
            filled = torch.where(paired, partner, template)
        # Ablations score only the samples that the method can score; a warm-up scores all.
        scored = torch.ones_like(batch["paired"]) if warm else batch["paired"]
        hidden = blocks_to_voxels(cross_blocks, block_grid(target.shape[2:], self.block_size), self.block_size)
        return _Inputs(
            replace_blocks(target, filled, cross_blocks, self.block_size),
            replace_blocks(target, template, template_blocks, self.block_size),
            hidden,
            scored,
        )

    def step(self, batch: SequencePairBatch, sync: bool) -> StepOutput:
        """Compute the three losses of one batch.

        In training the contrast begins, and a warm-up ends, after its share of the epochs; validation always scores
        every term, so that its curves can be compared.
        """
        inputs = self._inputs(batch, track=self.training and torch.is_grad_enabled())
        views: Views = self.network(inputs.cross, inputs.template)
        target = batch["image"].flatten(1)
        every = torch.ones_like(inputs.scored)
        samples = float(len(target))
        cross = masked_mse(views.cross_pred.flatten(1), target, inputs.scored, sync)
        distilled = masked_mse(views.template_pred.flatten(1), target, every, sync)
        terms = {
            "cross_modal": Term(cross, inputs.scored.sum(), 1.0),
            "template": Term(distilled, samples, self.template_weight),
        }
        if not self.training or self.progress >= self.contrastive_start:
            pair = views.cross_features, views.template_features
            contrast = symmetric_info_nce(*pair, self.temperature, sync)
            terms["contrastive"] = Term(contrast, samples, self.contrastive_weight)
            terms["view_retrieval"] = Term(retrieval_accuracy(*pair), samples)
        if self.training:
            terms["paired_fraction"] = Term(batch["paired"].float().mean())
            terms["template_range"] = Term(self.network.templates.range().max())
            # Unchanged, because it is not displayed in training.
            return StepOutput(terms, Reconstruction(views.cross_pred.float(), batch["image"], inputs.hidden, {}))
        self.views = views.cross_features.detach().float(), views.template_features.detach().float()
        return StepOutput(terms, self._by_sequence(views.cross_pred, batch, inputs))

    def _spread(self, volume: Tensor, batch: SequencePairBatch) -> Tensor:
        """Place volumes ``(B, 1, H, W, D)`` at their sequence, ``(B, S, V)``; the others are 0."""
        flat = volume.flatten(1)
        result = flat.new_zeros(len(flat), len(self.spec.channels), flat.shape[1])
        result[torch.arange(len(flat), device=flat.device), batch["modality"]] = flat
        return result

    def _by_sequence(self, pred: Tensor, batch: SequencePairBatch, inputs: _Inputs) -> Reconstruction:
        """Return the cross view's reconstruction, an element being a voxel of a sequence: ``(B, S, V, 1)``."""
        scored = inputs.hidden & inputs.scored[:, None, None, None, None]
        groups = {"foreground": scored & (batch["image"] > 0)}
        if "lesion" in batch:
            groups["lesion"] = scored & batch["lesion"]
        return Reconstruction(
            self._spread(pred.float(), batch)[..., None],
            self._spread(batch["image"], batch)[..., None],
            self._spread(scored, batch),
            {name: self._spread(mask, batch) for name, mask in groups.items()},
            self._spread(inputs.cross.float(), batch)[..., None],
        )

    def reconstruct(self, batch: SequencePairBatch, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from what is visible of ``batch[image]`` and of its partner."""
        inputs = self._inputs(batch, image)
        pred = self.network.decoder(self.network.encoder(inputs.cross))
        return self._by_sequence(pred, batch, inputs)

    def reconstruction_target(self, batch: SequencePairBatch) -> tuple[Tensor, Tensor]:
        """Return the voxels ``(B, S, V, 1)`` of whole studies and which of them there are, bool ``(B, S, V)``."""
        target = batch["image"].flatten(2)
        return target[..., None], batch["modality_mask"][..., None].expand(target.shape)

    def reconstruction_groups(self, batch: SequencePairBatch) -> dict[str, Tensor]:
        """Return which voxels ``(B, S, V)`` are brain: air would draw the constant down."""
        return {"foreground": batch["image"].flatten(2) > 0}

    def token_features(self, batch: SequencePairBatch) -> TokenFeatures:
        """Encode unmasked crops; tokens of air alone are left out."""
        features = self.network.encoder(batch["image"])
        present = nn.functional.adaptive_max_pool3d((batch["image"] > 0).float(), features.shape[2:]) > 0
        return TokenFeatures({"final": features.flatten(2).transpose(1, 2)}, present.flatten(1))

    def panels(self, batch: SequencePairBatch, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw an axial slice of sample ``index``: target, what filled the holes, prediction where there were holes."""
        sequence = int(batch["modality"][index])
        name = self.shown_channels()[sequence]
        size = batch["image"].shape[2:]
        target = batch["image"][index]
        hidden = output.mask[index, sequence].reshape(1, *size)
        filled = self._inputs(batch).cross[index]
        pred = torch.where(hidden, output.pred[index, sequence, :, 0].reshape(1, *size), target)
        partner = int(batch["partner_modality"][index])
        other = self.shown_channels()[partner] if bool(batch["paired"][index]) else "its template"
        subject = f"{batch['subject_id'][index]}, {name} filled with {other if self.fill == 'cross' else self.fill}"
        return {name: filled_panel(subject, target, hidden, filled, pred)}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Update the templates after the network, where crops viewed them (Lightning hook)."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        rate = optimizer.param_groups[0]["lr"] * self.template_lr_scale
        size = [int(n) for n in self.spec.image_size]
        self.finite.also(self.network.templates.step(rate, size, self.finite.flag))
