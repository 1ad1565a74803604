"""Pre-training by masked record modeling (paper section 3)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.blocks.decoder import MAEDecoder
from common.blocks.vit import VisionTransformer
from common.checkpoint import init_encoder
from common.errors import UserError
from common.losses.reconstruction import masked_mse
from common.losses.text import masked_cross_entropy
from common.maskers.random import RandomMasker
from common.module import SSLModule, StepOutput, Term
from common.optim import OptimizerConfig
from common.panels import image_panel
from common.randomness import KeyedGenerator
from common.runtime.reporting import print_line
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
from experiments.mrm_record.model import MRM, Pool, ReportDecoder, TargetNorm

EncoderFactory = Callable[[int, Sequence[int]], VisionTransformer]
DecoderFactory = Callable[[int, Sequence[int], int], MAEDecoder]
ReportFactory = Callable[[int, int], ReportDecoder]


class MRMPretrain(SSLModule[ImageTextBatch]):
    """Hidden patches at twice the resolution, and hidden words given the visible ones and the image (Eq. 3).

    Args:
        encoder: Makes the encoder from (channels, image size).
        decoder: Makes the image decoder from (width, grid, values per patch).
        report: Makes the report decoder from (vocabulary, length).
        masker: Hides patches.
        mlm_weight: Weight of the report's loss, Eq. 3's sum being 1 to lambda; 0 is the ablation without reports.
        mim_weight: Lambda, the weight of the image's loss; 0 is the ablation without images as a target.
        mlm_scope: Tokens that are scored: the hidden ones (Eq. 1), all real ones, or padding too (published code),
            for which texts must come padded to their full length (``data.text.pad_to_length``).
        sr_factor: How many times finer the target is than the input; 1 is the ablation without super-resolution.
        target_norm: ``"patch"``, ``"unit"`` or ``"dataset"``; see :class:`experiments.mrm_record.model.MRM`.
        pool: ``"gap"`` or ``"gmp"``.
        text_to_image: Whether the visible words are fed to the image decoder.
        antialias: Whether the low-resolution copy is low-pass filtered.
        init_from: File of MAE, timm or published weights to start the encoder from; None starts from scratch.
        optimization: How the weights are updated.

    Raises:
        ValueError: both weights are 0, or an option is unknown.
    """

    remembered = ("channels", "image_size", "vocabulary")

    def __init__(
        self,
        encoder: EncoderFactory = VisionTransformer,
        decoder: DecoderFactory = MAEDecoder,
        report: ReportFactory = ReportDecoder,
        masker: RandomMasker | None = None,
        mlm_weight: float = 1.0,
        mim_weight: float = 1.0,
        mlm_scope: Literal["masked", "real", "all"] = "masked",
        sr_factor: Literal[1, 2] = 2,
        target_norm: TargetNorm = "patch",
        pool: Pool = "gap",
        text_to_image: bool = False,
        antialias: bool = True,
        init_from: str | None = None,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        if mlm_weight == mim_weight == 0:
            raise ValueError("mlm_weight and mim_weight are both 0: there is nothing to train on.")
        super().__init__(optimization)
        self.save_hyperparameters()
        self.masker = masker or RandomMasker(0.75)
        self.mim_weight, self.mlm_weight = mim_weight, mlm_weight
        self.mlm_scope = mlm_scope
        self.init_from = init_from
        self._factories = (encoder, decoder, report)
        self._options: dict[str, Any] = {
            "sr_factor": sr_factor,
            "target_norm": target_norm,
            "pool": pool,
            "text_to_image": text_to_image,
            "antialias": antialias,
        }

    def build_network(self, spec: InputSpec) -> MRM:
        """Make the networks for inputs of ``spec``.

        Raises:
            ValueError: sizes that do not fit.
        """
        factor = self._options["sr_factor"]
        if any(side % factor for side in spec.image_size):
            raise ValueError(f"image_size must be a multiple of sr_factor {factor}, got {list(spec.image_size)}.")
        make_encoder, make_decoder, make_report = self._factories
        channels = len(spec.channels)
        encoder = make_encoder(channels, [side // factor for side in spec.image_size])
        first, second = encoder.patch_embed.patch_size
        values = first * second * factor**2 * channels
        decoder = make_decoder(encoder.embed_dim, encoder.grid_size, values)
        report = make_report(spec.vocabulary["size"], spec.vocabulary["length"])
        self.masker(1, encoder.patch_embed.num_patches, generator=torch.Generator())
        scale = {name: spec.preprocessing[name] for name in ("mean", "std") if name in spec.preprocessing}
        return MRM(encoder, decoder, report, **self._options, **scale)

    def on_fit_start(self) -> None:
        """Log what is unusual; take the encoder's first weights, unless a checkpoint brings all (Lightning hook)."""
        patches = self.network.encoder.patch_embed.num_patches
        if not self.masker(1, patches, generator=torch.Generator()).mask.any():
            print_line("note: the masker hides no patch, so the image's loss is taken over all: super-resolution alone")
        if self.trainer.ckpt_path is not None:
            return
        if self.init_from:
            print_line(f"encoder from {self.init_from}: {init_encoder(self.network.encoder, self.init_from)}")
        else:
            print_line("note: the encoder starts from scratch; the published runs started from MAE's ImageNet weights "
                "(model.init_from)")  # fmt: skip

    def draw_mask(self, batch: ImageTextBatch) -> MaskOutput:
        """Draw the masks that belong to the batch's samples."""
        patches = self.network.encoder.patch_embed.num_patches
        return self.masker(len(batch["key"]), patches, generator=KeyedGenerator(batch["key"]))

    def _scored_text(self, batch: ImageTextBatch) -> ImageTextBatch:
        """Return the batch with the positions that the report's loss is taken over."""
        if self.mlm_scope == "masked":
            return batch
        truth = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]).flatten()
        if self.mlm_scope == "real":
            index = batch["attention_mask"].flatten().nonzero()[:, 0]
        else:
            width, length = batch["input_ids"].shape[1], self.network.report.length
            if width != length:
                raise UserError(
                    f"model.mlm_scope=all takes the mean over all {length} positions of a text, but those of this "
                    f"batch are padded to {width}: set data.text.pad_to_length to true."
                )
            index = torch.arange(len(truth), device=truth.device)
        return {**batch, "hidden_index": index, "hidden_ids": truth[index]}

    def step(self, batch: ImageTextBatch, sync: bool) -> StepOutput:
        """Compute both losses of one batch."""
        mask = self.draw_mask(batch)
        index = mask.hidden_index() if self.training else None
        scored = self._scored_text(batch)
        output = self.network(scored, mask, index)
        reconstruction = self._reconstruction(output.pred, output.target, mask, batch, index)
        pred, target, hidden = reconstruction[:3]
        words = masked_cross_entropy(output.logits, scored["hidden_ids"], sync)
        terms = {
            "reconstruction": Term(masked_mse(pred, target, hidden, sync), hidden.sum(), self.mim_weight),
            "report": Term(words, float(len(scored["hidden_ids"])), self.mlm_weight),
        }
        return StepOutput(terms, reconstruction)

    @staticmethod
    def _reconstruction(
        pred: Tensor, target: Tensor, mask: MaskOutput, batch: ImageTextBatch, index: Tensor | None
    ) -> Reconstruction:
        """Pair predictions with what is scored: the hidden patches of images that are there; all if none is hidden."""
        present = batch["modality_mask"][:, :1]
        everything = index is not None or mask.hides_nothing
        scored = present.expand(pred.shape[:2]) if everything else mask.mask & present
        return Reconstruction(pred, target, scored, {})

    def reconstruct(self, batch: ImageTextBatch, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct a batch from what is visible of ``batch[image]``."""
        network: MRM = self.network
        mask = self.draw_mask(batch)
        words = None
        if network.to_image is not None:
            words = network.visible_words(batch, network.report.embed(batch["input_ids"]))
        pred = network.decode(network.encode(batch[image], mask), mask, words, None)
        return self._reconstruction(pred.float(), network.target(batch["image"]), mask, batch, None)

    def reconstruction_target(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Return the target patches ``(B, N, P)`` and which of them are of an image that is there ``(B, N)``."""
        target = self.network.target(batch["image"])
        return target, batch["modality_mask"][:, :1].expand(target.shape[:2])

    def hidden_tokens(self, batch: ImageTextBatch, image: ImageKey | Literal["none"] = "image") -> HiddenTokens:
        """Predict the hidden words, given ``batch[image]``; ``image="none"`` gives the report decoder a zero vector."""
        network: MRM = self.network
        present = batch["modality_mask"][:, 0]
        if image == "none":
            vector = torch.zeros(len(present), network.report.dim, device=present.device)
        else:
            vector = network.image_vector(network.encode(batch[image], self.draw_mask(batch)), present)
        sample = batch["hidden_index"] // batch["input_ids"].shape[1]
        return HiddenTokens(network.report_logits(batch, vector), batch["hidden_ids"], sample)

    def token_features(self, batch: ImageTextBatch) -> TokenFeatures:
        """Encode whole images."""
        encoder = self.network.encoder
        tokens = encoder.forward_features(self.network.low_resolution(batch["image"]))
        patches = tokens[:, encoder.num_prefix_tokens :]
        keep = batch["modality_mask"][:, :1].expand(patches.shape[:2])
        return TokenFeatures({"final": patches}, keep)

    def panels(self, batch: ImageTextBatch, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw sample ``index`` at the resolution of the target and at that of the input."""
        network: MRM = self.network
        if not bool(batch["modality_mask"][index, 0]):
            return {}
        image = batch["image"][index : index + 1].float()
        hidden = network.spread(output.mask[index : index + 1])
        filled = torch.where(hidden, network.pixels(output.pred[index : index + 1].float(), image), image)
        name, factor = batch["subject_id"][index], network.sr_factor
        panels = {"high_resolution": image_panel(name, image[0, 0], hidden[0, 0], filled[0, 0])}
        if factor > 1:
            small = [F.avg_pool2d(x.float(), factor)[0, 0] for x in (image, hidden, filled)]
            panels["low_resolution"] = image_panel(name, small[0], small[1] > 0.5, small[2])
        return panels
