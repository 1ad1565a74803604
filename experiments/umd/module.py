"""MR-Pretrain and TD-Calib (paper sections III-B and III-C): one module, with and without image-text matching."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from common.blocks.decoder import MAEDecoder
from common.blocks.patch_embed import patchify_channels_last, unpatchify
from common.distributed import all_gather_rows, all_reduce_sum, rank
from common.downstream.encoder import encoder_architecture
from common.ema import need_teacher
from common.errors import UserError
from common.losses.distillation import token_feature_mse
from common.losses.reconstruction import masked_mse
from common.losses.text import masked_cross_entropy
from common.maskers.random import RandomMasker
from common.module import SSLModule, StepOutput
from common.optim import Schedule, WarmupLinear, param_groups
from common.panels import image_panel
from common.randomness import KeyedGenerator
from common.runtime.precision import at_least_float32
from common.runtime.reporting import say
from common.types import HiddenTokens, InputSpec, MaskOutput, Panel, Reconstruction, TokenFeatures
from experiments.umd.encoder import Fused, UMDEncoder
from experiments.umd.handover import EncoderFactory, load_heads, make_umd_encoder, tower_scale
from experiments.umd.pairs import Pairs, matching_pairs
from experiments.umd.pretrain_network import Positions, Target, UMDNetwork
from experiments.umd.towers import load_text, load_vision

DecoderFactory = Callable[[int, Sequence[int], int], MAEDecoder]
LOSSES = ("mim", "mlm", "feature_image", "feature_text", "itm")


def total_weights(alpha: float, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of each loss (Eq. 7): 1 - alpha for patches and words, alpha for features, 1 for matching.

    Args:
        alpha: In [0, 1].
        weights: Weights that differ, by name.

    Raises:
        ValueError: ``alpha`` is no share, or a name is none of the losses.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}.")
    unknown = set(weights or {}) - set(LOSSES)
    if unknown:
        raise ValueError(f"`weights` names {sorted(unknown)[0]!r}; the losses are {', '.join(LOSSES)}.")
    shares = (1 - alpha, 1 - alpha, alpha, alpha, 1.0)
    return dict(zip(LOSSES, shares, strict=True)) | dict(weights or {})


def whole_text(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens ``(B, T)`` as they were before any was hidden."""
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def spread_of(features: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation over tokens, mean over features: ``(B, n, D)`` where ``mask`` ``(B, n)``."""
    weight = mask[..., None].to(features.dtype)
    count = weight.sum().clamp(min=1)
    mean = (features * weight).sum((0, 1)) / count
    return ((features - mean).square() * weight).sum((0, 1)).div(count).sqrt().mean()


class UMDPretrain(SSLModule):
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
        teacher_decay: Lambda of Eq. 5, per optimiser step.
        feature_dim: Width of projected image features.
        text_feature_dim: Width of projected text features.
        feature_positions: ``"visible"``, ``"masked_decoder"`` or ``"upstream"``; see
            :class:`experiments.umd.pretrain_network.UMDNetwork`.
        feature_target: ``"ema_ln"``, ``"paper"`` or ``"stopgrad"``.
        feature_text_padding: Whether padding counts among text features.
        mim_layer: Fusion layer before which patches are decoded; -1 decodes the output.
        itm_negatives: ``"batch"`` shows a text another image of the batch; ``"dataset"`` one that was loaded for it
            (``data.negative_images``).
        vision_weights: Folder or name of CLIP weights for the vision tower.
        text_weights: Folder or name of RoBERTa weights for the text tower.
        fusion_lr_scale: Learning rate of all but the towers over theirs.
        optimizer: Makes the optimiser; its rate is the towers'.
        schedule: Attaches the learning-rate schedule.
        compile_network: Whether to compile the network.
        grad_checkpointing: Whether the towers recompute activations in the backward pass.
        channels: Names of the channels; None = as the data say.
        image_size: Size of the images; None = as the data say.
        vocabulary: Size, length and fingerprint of the tokens; None = as the data say.
        encoder_record: Architecture of the encoder; filled in for checkpoints.

    Raises:
        ValueError: weights that mean nothing.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        encoder: EncoderFactory = UMDEncoder,
        decoder: DecoderFactory = MAEDecoder,
        masker: RandomMasker | None = None,
        alpha: float = 0.5,
        weights: dict[str, float] | None = None,
        teacher_decay: float = 0.995,
        feature_dim: int = 384,
        text_feature_dim: int = 384,
        feature_positions: Positions = "visible",
        feature_target: Target = "ema_ln",
        feature_text_padding: bool = False,
        mim_layer: int = -1,
        itm_negatives: Literal["batch", "dataset"] = "batch",
        vision_weights: str | None = None,
        text_weights: str | None = None,
        fusion_lr_scale: float = 5.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        compile_network: bool = False,
        grad_checkpointing: bool = False,
        channels: list[str] | None = None,
        image_size: list[int] | None = None,
        vocabulary: dict[str, Any] | None = None,
        encoder_record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(total_weights(alpha, weights), optimizer, schedule or WarmupLinear(0.1))
        self.save_hyperparameters()
        self.masker = masker or RandomMasker(0.75)
        self.itm_negatives = itm_negatives
        self.compile_network = compile_network
        self._pretrained, self._record = pretrained, encoder_record
        self._factories = (encoder, decoder)
        self._weights_of = {"vision": vision_weights, "text": text_weights}
        self._lr_scale = fusion_lr_scale
        self._grad_checkpointing = grad_checkpointing
        self._options: dict[str, Any] = {
            "teacher_decay": teacher_decay if self._any("feature_image", "feature_text") else None,
            "feature_dim": feature_dim,
            "text_feature_dim": text_feature_dim,
            "positions": feature_positions,
            "target": feature_target,
            "mim_layer": mim_layer,
            "text_padding": feature_text_padding,
        }
        #: Spread of the teacher's projected features of the last step, image and text.
        self.feature_spread: dict[str, Tensor] = {}

    def _any(self, *names: str) -> bool:
        return any(self.loss_weights[name] for name in names)

    def build_network(self, spec: InputSpec) -> UMDNetwork:
        """Make the networks for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit.
            UserError: the checkpoint to start from is of another vocabulary.
        """
        make_encoder, make_decoder = self._factories
        encoder = make_umd_encoder(spec, self._pretrained, make_encoder, self._record)
        self.hparams["encoder_record"] = encoder_architecture(encoder)
        values = 3 * encoder.vision.patch_size**2
        decoder = make_decoder(encoder.dim, encoder.grid_size, values)
        self.masker(1, encoder.num_patches, generator=torch.Generator())
        network = UMDNetwork(encoder, decoder, spec.vocabulary["size"], **self._options)
        if self._pretrained and self._record is None:
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
            (self._any("itm"), [network.itm_head, *network.encoder.poolers]),
            (self._any("mlm"), [network.mlm_head]),
            (self._any("mim"), [network.decoder]),
            (self._any("feature_image") or network.positions == "upstream", [network.project_image]),
            (self._any("feature_text"), [network.project_text]),
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

    def draw_mask(self, batch: Any) -> MaskOutput:
        """Draw the masks that belong to the batch's samples."""
        return self.masker(len(batch["key"]), self.network.encoder.num_patches, generator=KeyedGenerator(batch["key"]))

    @staticmethod
    def _hidden(mask: MaskOutput) -> Tensor | None:
        """Return the hidden patches ``(B, S)``; None, which means all, where nothing is hidden."""
        assert mask.ids_keep is not None
        assert mask.ids_restore is not None
        visible, total = mask.ids_keep.shape[1], mask.ids_restore.shape[1]
        return None if visible == total else torch.argsort(mask.ids_restore, dim=1)[:, visible:]

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compute the losses of one batch: one masked pass, the teacher's whole one, and one for matching."""
        network: UMDNetwork = self.network
        mask = self.draw_mask(batch)
        index = self._hidden(mask) if self.training else None
        fused = network.student(batch, mask)
        decoded = network.decode(fused, mask, index)
        pred = at_least_float32(network.decoder.proj(decoded))
        reconstruction = self._reconstruction(pred, batch, mask, index)
        losses, weights, extras = {}, {}, {}
        if self._any("mim"):
            losses["mim"] = masked_mse(*reconstruction[:3], sync)
            weights["mim"] = reconstruction.mask.sum().float()
        if self._any("mlm"):
            losses["mlm"] = masked_cross_entropy(network.words(fused, batch["hidden_index"]), batch["hidden_ids"], sync)
            weights["mlm"] = torch.tensor(float(len(batch["hidden_ids"])))
        if network.teacher is not None:
            self._add_features(batch, fused, mask, decoded, index, sync, losses, weights)
        if self._any("itm"):
            losses["itm"], extras["itm_accuracy"], weights["itm"] = self._matching(batch, sync)
            weights["itm_accuracy"] = weights["itm"]
        return StepOutput(losses, weights, reconstruction, extras)

    def _add_features(
        self,
        batch: Any,
        fused: Fused,
        mask: MaskOutput,
        decoded: Tensor,
        index: Tensor | None,
        sync: bool,
        losses: dict[str, Tensor],
        weights: dict[str, Tensor],
    ) -> None:
        """Add the losses of features (Eq. 4)."""
        network: UMDNetwork = self.network
        image, text = network.teacher_features(batch, whole_text(batch))
        pairs = {
            "feature_image": network.image_features(fused, mask, image, decoded, index),
            "feature_text": network.text_features(fused, text, batch["attention_mask"]),
        }
        everywhere = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        self.feature_spread = {
            "img": spread_of(image.detach().float(), everywhere),
            "txt": spread_of(text.detach().float(), batch["attention_mask"]),
        }
        for name, (pred, target, counted) in pairs.items():
            if self._any(name):
                losses[name] = token_feature_mse(pred, target, counted, network.target == "ema_ln", sync)
                weights[name] = counted.sum().float()

    def _pairs(self, batch: Any, sync: bool) -> tuple[Pairs, Tensor]:
        """Return who is shown what, and the images ``(B, C, H, W)`` that are shown."""
        loaded = self.itm_negatives == "dataset"
        if loaded and "negative_image" not in batch:
            raise UserError("model.itm_negatives is 'dataset', but the data load none: set data.negative_images=true.")
        keys, images = ((all_gather_rows(batch[name]) if sync else batch[name]) for name in ("key", "image_key"))
        pairs = matching_pairs(keys, torch.arange(len(keys), device=keys.device) if loaded else images)
        begin = rank() * len(batch["key"]) if sync else 0
        pairs = Pairs(*(part[begin : begin + len(batch["key"])] for part in pairs))
        if loaded:
            own = pairs.label.bool()[:, None, None, None]
            return pairs, torch.where(own, batch["image"], batch["negative_image"])
        return pairs, (all_gather_rows(batch["image"]) if sync else batch["image"])[pairs.image]

    def _matching(self, batch: Any, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss and accuracy of image-text matching (Eq. 6), and of how many pairs."""
        pairs, shown = self._pairs(batch, sync)
        logits = self.network.match(shown, whole_text(batch), batch["attention_mask"])
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_float32(logits)
            valid = pairs.valid.to(logits.dtype)
            total = (F.cross_entropy(logits, pairs.label, reduction="none") * valid).sum()
            right = ((logits.argmax(1) == pairs.label) * valid).sum().detach()
            count = valid.sum()
            if sync:
                total, right, count = all_reduce_sum(total), all_reduce_sum(right), all_reduce_sum(count)
        return total / count.clamp(min=1), right / count.clamp(min=1), count

    def _reconstruction(
        self, pred: Tensor, batch: Any, mask: MaskOutput, index: Tensor | None, image: str = "image"
    ) -> Reconstruction:
        """Pair predictions with the hidden patches of the batch's images."""
        target = self.network.patch_target(batch["image"].to(pred.dtype), index)
        everything = index is not None or not bool(self._masks_any(mask))
        scored = torch.ones(pred.shape[:2], dtype=torch.bool, device=pred.device) if everything else mask.mask
        return Reconstruction(pred, target, scored & batch["modality_mask"][:, :1], {})

    @staticmethod
    def _masks_any(mask: MaskOutput) -> bool:
        assert mask.ids_keep is not None
        return mask.ids_keep.shape[1] < mask.mask.shape[1]

    def reconstruct(self, batch: Any, image: str = "image") -> Reconstruction:
        """Reconstruct patches from what is visible of ``batch[image]`` and the text."""
        network: UMDNetwork = self.network
        mask = self.draw_mask(batch)
        pred = network.decoder.proj(network.decode(network.student(batch, mask, image), mask)).float()
        return self._reconstruction(pred, batch, mask, None)

    def reconstruction_target(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the target patches ``(B, N, P)`` and which of them are of an image that is there ``(B, N)``."""
        target = self.network.patch_target(batch["image"].float())
        return target, batch["modality_mask"][:, :1].expand(target.shape[:2])

    def hidden_tokens(self, batch: Any, image: str = "image") -> HiddenTokens:
        """Predict the hidden words, given the visible patches of ``batch[image]``."""
        fused = self.network.student(batch, self.draw_mask(batch), image)
        sample = batch["hidden_index"] // batch["input_ids"].shape[1]
        return HiddenTokens(self.network.words(fused, batch["hidden_index"]), batch["hidden_ids"], sample)

    def token_features(self, batch: Any) -> TokenFeatures:
        """Encode whole pairs: the image's tokens after the fusion, and those of the vision tower."""
        fused = self.network.encoder(batch["image"], whole_text(batch), batch["attention_mask"])
        alone = self.network.encoder.forward_features(batch["image"])[:, 1:]
        keep = batch["modality_mask"][:, :1].expand(alone.shape[:2])
        return TokenFeatures({"fused": fused.image[:, 1:], "vision": alone}, keep)

    def panels(self, batch: Any, output: Reconstruction, index: int) -> dict[str, Panel]:
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

    def configure_optimizers(self) -> Any:
        """Make the optimiser and its schedule (Lightning hook)."""
        optimizer = self._make_optimizer(param_groups(self, lr_scale=tower_scale(self._lr_scale)))
        schedule = self._make_schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
