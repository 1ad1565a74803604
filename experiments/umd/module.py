"""MR-Pretrain and TD-Calib (paper sections III-B and III-C): one module, with and without image-text matching."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.blocks.decoder import MAEDecoder
from common.blocks.patch_embed import patchify_channels_last, unpatchify
from common.distributed import world_size
from common.downstream.encoder import encoder_architecture
from common.ema import need_teacher
from common.maskers.random import RandomMasker
from common.module import SSLModule, StepOutput
from common.optim import OptimizerConfig, Schedule, WarmupLinear
from common.panels import image_panel
from common.randomness import KeyedGenerator
from common.runtime.reporting import say
from common.types import (
    HiddenTokens,
    ImageKey,
    ImageTextBatch,
    InputSpec,
    MaskOutput,
    Panel,
    Reconstruction,
    TokenFeatures,
)
from experiments.umd.checkpoint_transfer import EncoderFactory, load_heads, make_umd_encoder, tower_scale
from experiments.umd.encoder import UMDEncoder
from experiments.umd.objective import Objective, total_weights
from experiments.umd.pairs import gather_route, shown_pairs
from experiments.umd.pretrain_network import FeatureConfig, UMDNetwork, UMDOutput, whole_text
from experiments.umd.towers import load_text, load_vision

DecoderFactory = Callable[[int, Sequence[int], int], MAEDecoder]


class UMDPretrain(SSLModule[ImageTextBatch]):
    """Hidden patches and words, a teacher's features of the whole pair, and image-text matching (Eq. 7).

    TD-Calib (Eq. 8) is the same without matching (``weights: {itm: 0}``) on the task's data, from a pre-training run.

    Args:
        pretrained: Run folder or checkpoint to start encoder and heads from; None starts from scratch.
        encoder: Makes the encoder from (image size, vocabulary size, padding token).
        decoder: Makes the image decoder from (width, grid, values per patch).
        masker: Hides patches.
        alpha: Share of the losses of features.
        weights: Weights that differ from Eq. 7: of mim, mlm, feature_image, feature_text, itm. A loss of weight 0 is
            not computed.
        features: How the features of student and teacher are compared.
        mim_layer: Fusion layer before which patches are decoded; -1 decodes the output.
        itm_negatives: ``"batch"`` shows a text another image of the batch; ``"dataset"`` one that was loaded for it
            (``data.samples.negative_images``).
        vision_weights: Folder or name of CLIP weights for the vision tower.
        text_weights: Folder or name of RoBERTa weights for the text tower.
        fusion_lr_scale: Learning rate of all but the towers over theirs.
        optimization: How the weights are updated; the learning rate is the towers'.
        grad_checkpointing: Whether the towers recompute activations in the backward pass.

    Raises:
        ValueError: weights that mean nothing.
    """

    remembered = ("channels", "image_size", "vocabulary")

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = UMDEncoder,
        decoder: DecoderFactory = MAEDecoder,
        masker: RandomMasker | None = None,
        alpha: float = 0.5,
        weights: dict[str, float] | None = None,
        features: FeatureConfig = FeatureConfig(),
        mim_layer: int = -1,
        itm_negatives: Literal["batch", "dataset"] = "batch",
        vision_weights: str | None = None,
        text_weights: str | None = None,
        fusion_lr_scale: float = 5.0,
        optimization: OptimizerConfig = OptimizerConfig(),
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimization)
        self.save_hyperparameters()
        self.masker = masker or RandomMasker(0.75)
        self.itm_negatives = itm_negatives
        self.objective = Objective(total_weights(alpha, weights), standardised=features.target == "ema_ln")
        self._pretrained = pretrained
        self._factories = (encoder, decoder)
        self._weights_of = {"vision": vision_weights, "text": text_weights}
        self._lr_scale = fusion_lr_scale
        self._grad_checkpointing = grad_checkpointing
        self._features, self._mim_layer = features, mim_layer
        #: Spread of the teacher's projected features of the last step, image and text.
        self.feature_spread: dict[str, Tensor] = {}

    def build_network(self, spec: InputSpec) -> UMDNetwork:
        """Make the networks for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit.
            UserError: the checkpoint to start from is of another vocabulary.
        """
        make_encoder, make_decoder = self._factories
        resumed = self.state.encoder
        encoder = make_umd_encoder(spec, self._pretrained, make_encoder, resumed)
        self.state = self.state._replace(encoder=encoder_architecture(encoder))
        values = 3 * encoder.vision.patch_size**2
        decoder = make_decoder(encoder.dim, encoder.grid_size, values)
        self.masker(1, encoder.num_patches, generator=torch.Generator())
        taught = self.objective.wants("feature_image", "feature_text")
        network = UMDNetwork(encoder, decoder, spec.vocabulary["size"], self._features, taught, self._mim_layer)
        if self._pretrained and resumed is None:
            load_heads(network, self._pretrained)
            network.reset_teacher()
        self._freeze_unused(network)
        if self._grad_checkpointing:
            encoder.vision.clip.gradient_checkpointing_enable()
            encoder.text.roberta.gradient_checkpointing_enable()
        return network

    def _freeze_unused(self, network: UMDNetwork) -> None:
        """Leave out of training what no loss reaches: DDP would wait for its gradients."""
        parts: list[tuple[bool, list[nn.Module]]] = [
            (self.objective.wants("itm"), [network.itm_head, *network.encoder.poolers]),
            (self.objective.wants("mlm"), [network.mlm_head]),
            (self.objective.wants("mim"), [network.decoder]),
            (self.objective.wants("feature_image") or network.positions == "upstream", [network.project_image]),
            (self.objective.wants("feature_text"), [network.project_text]),
        ]
        for used, modules in parts:
            for module in modules:
                if not used:
                    module.requires_grad_(False)
        if network.positions == "masked_decoder" and network.target != "paper":
            network.project_image.requires_grad_(False)  # the student goes through the decoder

    def on_fit_start(self) -> None:
        """Take the towers' first weights, unless a checkpoint brings all (Lightning hook)."""
        if self.trainer.ckpt_path is not None or self._pretrained:
            return
        encoder = self.network.encoder
        for name, source in self._weights_of.items():
            if source:
                load_vision(encoder.vision, source) if name == "vision" else load_text(encoder.text, source)
                say(f"{name} tower from {source}")
        if not all(self._weights_of.values()):
            say("note: not both towers start from published weights; the paper's start from CLIP and RoBERTa "
                "(SIZE=clip_roberta, or model.vision_weights and model.text_weights)")  # fmt: skip
        self.network.reset_teacher()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights without a teacher or of another shape in one sentence (Lightning hook)."""
        if self.network.teacher is not None:
            need_teacher(checkpoint["state_dict"], "network.teacher.")
        super().on_load_checkpoint(checkpoint)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the teacher follow: once per optimiser step (Lightning hook)."""
        super().optimizer_step(*args, **kwargs)
        self.network.update_teacher()

    def draw_mask(self, batch: ImageTextBatch) -> MaskOutput:
        """Draw the masks that belong to the batch's samples."""
        return self.masker(len(batch["key"]), self.network.encoder.num_patches, generator=KeyedGenerator(batch["key"]))

    def on_host(self, batch: ImageTextBatch) -> dict[str, Any]:
        """Agree with the other ranks on who is shown what, before the batch goes to the device."""
        if world_size() == 1 or not self.objective.wants("itm") or self.itm_negatives == "dataset":
            return {}
        return {"route": gather_route(batch)}

    def step(self, batch: ImageTextBatch, sync: bool) -> StepOutput:
        """Compute the losses of one batch: one masked pass, the teacher's whole one, and one for matching."""
        mask = self.draw_mask(batch)
        index = mask.hidden_index() if self.training else None
        pairs, shown = None, None
        if self.objective.wants("itm"):
            pairs, shown = shown_pairs(batch, self.itm_negatives == "dataset", sync)
        output: UMDOutput = self.network(batch, mask, index, self.objective.wants("mlm"), shown)
        self.feature_spread = output.spread
        return StepOutput(self.objective.terms(output, batch, pairs, sync), output.reconstruction)

    def reconstruct(self, batch: ImageTextBatch, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct patches from what is visible of ``batch[image]`` and the text."""
        return self.network.reconstruct(batch, self.draw_mask(batch), image)

    def reconstruction_target(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Return the target patches ``(B, N, P)`` and which of them are of an image that is there ``(B, N)``."""
        target = self.network.patch_target(batch["image"].float())
        return target, batch["modality_mask"][:, :1].expand(target.shape[:2])

    def hidden_tokens(self, batch: ImageTextBatch, image: ImageKey = "image") -> HiddenTokens:
        """Predict the hidden words, given the visible patches of ``batch[image]``."""
        fused = self.network.student(batch, self.draw_mask(batch), image)
        sample = batch["hidden_index"] // batch["input_ids"].shape[1]
        return HiddenTokens(self.network.words(fused, batch["hidden_index"]), batch["hidden_ids"], sample)

    def token_features(self, batch: ImageTextBatch) -> TokenFeatures:
        """Encode whole pairs: the image's tokens after the fusion, and those of the vision tower."""
        fused = self.network.encoder(batch["image"], whole_text(batch), batch["attention_mask"])
        alone = self.network.encoder.forward_features(batch["image"])[:, 1:]
        keep = batch["modality_mask"][:, :1].expand(alone.shape[:2])
        return TokenFeatures({"fused": fused.image[:, 1:], "vision": alone}, keep)

    def panels(self, batch: ImageTextBatch, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw sample ``index`` in gray."""
        if not bool(batch["modality_mask"][index, 0]):
            return {}
        encoder = self.network.encoder
        size, image = (encoder.vision.patch_size,) * 2, batch["image"][index : index + 1].float().expand(-1, 3, -1, -1)
        true = patchify_channels_last(image, size)
        pred = output.pred[index : index + 1] * (true.var(2, keepdim=True) + 1e-6).sqrt() + true.mean(2, keepdim=True)
        gray = unpatchify(pred.unflatten(2, (-1, 3)).mean(3), encoder.grid_size, size)[0, 0]
        hidden = output.mask[index].reshape(encoder.grid_size)
        hidden = hidden.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        shown = image.mean(1)[0]
        return {"image": image_panel(batch["subject_id"][index], shown, hidden, torch.where(hidden, gray, shown))}

    def lr_scale(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter."""
        return tower_scale(name, self._lr_scale)

    def default_schedule(self) -> Schedule:
        """Return the schedule where the configuration has none."""
        return WarmupLinear(0.1)
