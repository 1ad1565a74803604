"""The pre-training network: encoder, heads, teacher (paper section III-B and C).

Letters: B batch, N patches, K visible patches, S predicted patches or hidden tokens, T tokens, E width, P values of a
patch, D width of projected features.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from common.blocks.decoder import MAEDecoder
from common.blocks.patch_embed import normalise_patches, patchify_channels_last
from common.ema import EMATeacher
from common.runtime.precision import at_least_float32
from common.types import ImageKey, ImageTextBatch, MaskOutput, Reconstruction
from experiments.umd.encoder import Fused, TextHead, UMDEncoder, init_normal_weights

Positions = Literal["visible", "masked_decoder", "upstream"]
Target = Literal["ema_ln", "paper", "stopgrad"]


class Features(NamedTuple):
    """Projected features of student and teacher, token by token.

    Attributes:
        pred: ``(B, n, D)``, the student's.
        target: ``(B, n, D)``, the teacher's.
        mask: bool ``(B, n)``, which tokens are compared.
    """

    pred: Tensor
    target: Tensor
    mask: Tensor


@dataclass(frozen=True)
class FeatureConfig:
    """How the features of student and teacher are compared (section III-C).

    Args:
        dim: Width of projected image features.
        text_dim: Width of projected text features.
        positions: Which image tokens are compared. ``"visible"``: the class token and the kept patches; ``"upstream"``:
            the removed ones, where the student has nothing but its mask token, so that its encoder gets no gradient;
            ``"masked_decoder"``: the removed ones after the image decoder.
        target: ``"ema_ln"``: the teacher projects with averaged projections, and targets are standardised and get no
            gradient; ``"paper"``: one projection for both, trained through both; ``"stopgrad"``: one projection, the
            target gets no gradient.
        text_padding: Whether padding counts among the text tokens that are compared (published code).
        teacher_decay: Lambda of Eq. 5, per optimiser step.

    Raises:
        ValueError: an option is unknown.
    """

    dim: int = 384
    text_dim: int = 384
    positions: Positions = "visible"
    target: Target = "ema_ln"
    text_padding: bool = False
    teacher_decay: float = 0.995

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"`positions` must be one of {', '.join(get_args(Positions))}, got {self.positions!r}.")
        if self.target not in get_args(Target):
            raise ValueError(f"`target` must be one of {', '.join(get_args(Target))}, got {self.target!r}.")


class UMDOutput(NamedTuple):
    """The network's output for a batch; None for parts that were not requested.

    Attributes:
        reconstruction: hidden patches.
        words: logits ``(S, V)`` at the hidden positions.
        image_features: of student and teacher.
        text_features: likewise.
        spread: standard deviation of the teacher's projected features, ``"img"`` and ``"txt"``; empty without one.
        matches: logits ``(B, 2)`` of whether texts and the images they were shown belong together.
    """

    reconstruction: Reconstruction
    words: Tensor | None
    image_features: Features | None
    text_features: Features | None
    spread: dict[str, Tensor]
    matches: Tensor | None


def whole_text(batch: ImageTextBatch) -> Tensor:
    """Return the tokens ``(B, T)`` as they were before any was hidden."""
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def spread_of(features: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation over tokens, mean over features: ``(B, n, D)`` where ``mask`` ``(B, n)``."""
    weight = mask[..., None].to(features.dtype)
    count = weight.sum().clamp(min=1)
    mean = (features * weight).sum((0, 1)) / count
    return ((features - mean).square() * weight).sum((0, 1)).div(count).sqrt().mean()


class UMDNetwork(nn.Module):
    """Encoder with its heads, and a teacher of encoder and projections.

    Args:
        encoder: E.
        decoder: Rebuilds patches; keeps one prefix token.
        vocab_size: Tokens that the text head tells apart.
        features: How features are compared.
        teacher: Whether there is a teacher to compare them with.
        mim_layer: Fusion layer before which patches are decoded; -1 decodes the output.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(
        self,
        encoder: UMDEncoder,
        decoder: MAEDecoder,
        vocab_size: int,
        features: FeatureConfig = FeatureConfig(),
        teacher: bool = True,
        mim_layer: int = -1,
    ) -> None:
        super().__init__()
        depth = len(encoder.fusion.text_layers)
        if not -1 <= mim_layer < depth:
            raise ValueError(f"`mim_layer` must be -1 or one of the fusion's layers 0 to {depth - 1}, got {mim_layer}.")
        self.encoder, self.decoder = encoder, decoder
        self.mlm_head = TextHead(encoder.dim, vocab_size)
        self.itm_head = nn.Linear(2 * encoder.dim, 2)
        shared = features.positions == "upstream"
        self.project_image = decoder.embed if shared else nn.Linear(encoder.dim, features.dim)
        self.project_text = nn.Linear(encoder.dim, features.text_dim)
        # What the decoder makes of the removed patches has a width of its own.
        self.project_decoded = (
            nn.Linear(decoder.proj.in_features, features.dim) if features.positions == "masked_decoder" else None
        )
        for head in (self.itm_head, decoder, self.project_image, self.project_text, self.project_decoded):
            if head is not None:
                head.apply(init_normal_weights)
        self.positions, self.target, self.text_padding = features.positions, features.target, features.text_padding
        self.mim_layer = mim_layer
        self.teacher = EMATeacher(self.averaged(), features.teacher_decay) if teacher else None

    def averaged(self) -> nn.ModuleDict:
        """Return the modules that the teacher averages."""
        parts = {"encoder": self.encoder, "image": self.project_image, "text": self.project_text}
        return nn.ModuleDict(parts)

    def reset_teacher(self) -> None:
        """Make the teacher an exact copy again, after weights were loaded."""
        if self.teacher is not None:
            self.teacher.reset(self.averaged())

    def update_teacher(self, hold: Tensor | None = None) -> None:
        """Move the teacher by one step (Eq. 5), unless ``hold`` is raised: the student has not moved either."""
        if self.teacher is not None:
            self.teacher.update(self.averaged(), hold)

    def forward(
        self, batch: ImageTextBatch, mask: MaskOutput, index: Tensor | None, words: bool, shown: Tensor | None
    ) -> UMDOutput:
        """Run one masked pass, the teacher's whole one, and one of whole pairs for matching.

        Args:
            batch: Images and texts with hidden words.
            mask: Hidden patches.
            index: long ``(B, S)``, the patches to predict; None predicts all.
            words: Whether hidden words are predicted.
            shown: The images ``(B, C, H, W)`` that texts are shown for matching; None leaves it out.
        """
        fused = self.student(batch, mask)
        decoded = self.decode(fused, mask, index)
        pred = at_least_float32(self.decoder.proj(decoded))
        reconstruction = self.reconstruction(pred, batch, mask, index)
        logits = self.words(fused, batch["hidden_index"]) if words else None
        image_features, text_features, spread = None, None, {}
        if self.teacher is not None:
            image, text = self.teacher_features(batch, whole_text(batch))
            image_features = self.image_features(fused, mask, image, decoded, index)
            text_features = self.text_features(fused, text, batch["attention_mask"])
            everywhere = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
            spread = {
                "img": spread_of(image.detach().float(), everywhere),
                "txt": spread_of(text.detach().float(), batch["attention_mask"]),
            }
        matches = None if shown is None else self.match(shown, whole_text(batch), batch["attention_mask"])
        return UMDOutput(reconstruction, logits, image_features, text_features, spread, matches)

    def reconstruct(self, batch: ImageTextBatch, mask: MaskOutput, image: ImageKey = "image") -> Reconstruction:
        """Reconstruct all patches from what is visible of ``batch[image]`` and the text."""
        pred = self.decoder.proj(self.decode(self.student(batch, mask, image), mask)).float()
        return self.reconstruction(pred, batch, mask, None)

    def patch_target(self, image: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the standardised patches ``(B, S, P)`` of ``(B, 1 or 3, H, W)``; ``index`` ``(B, S)``, None: all."""
        size = self.encoder.vision.patch_size
        patches = patchify_channels_last(image.expand(-1, 3, -1, -1), (size, size))
        if index is not None:
            patches = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[2]))
        return normalise_patches(patches)

    def student(self, batch: ImageTextBatch, mask: MaskOutput, image: ImageKey = "image") -> Fused:
        """Encode the visible patches of ``batch[image]`` and the text with its hidden words."""
        return self.encoder(batch[image], batch["input_ids"], batch["attention_mask"], mask.ids_keep)

    def decode(self, fused: Fused, mask: MaskOutput, index: Tensor | None = None) -> Tensor:
        """Return what patches are predicted from, ``(B, S, F)``; ``index`` ``(B, S)``, None: all."""
        return self.decoder.features(fused.image_at(self.mim_layer), mask.ids_restore, index)

    def reconstruction(
        self, pred: Tensor, batch: ImageTextBatch, mask: MaskOutput, index: Tensor | None
    ) -> Reconstruction:
        """Pair predictions ``(B, S, P)`` with the hidden patches of the batch's images; with all if none is hidden."""
        target = self.patch_target(batch["image"].to(pred.dtype), index)
        everything = index is not None or mask.hides_nothing
        scored = torch.ones(pred.shape[:2], dtype=torch.bool, device=pred.device) if everything else mask.mask
        return Reconstruction(pred, target, scored & batch["modality_mask"][:, :1], {})

    def words(self, fused: Fused, hidden_index: Tensor) -> Tensor:
        """Return logits ``(S, V)`` at the hidden positions, counted through the flattened ``(B, T)``."""
        return self.mlm_head(fused.text.flatten(0, 1)[hidden_index])

    def teacher_features(self, batch: ImageTextBatch, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's projected features of the whole pair: image ``(B, 1 + N, D)``, text ``(B, T, D)``.

        Args:
            batch: The images and the attention mask.
            input_ids: ``(B, T)``, no word hidden.
        """
        assert self.teacher is not None
        modules: Any = self.teacher.module
        with torch.no_grad():
            seen = modules["encoder"](batch["image"], input_ids, batch["attention_mask"])
            if self.target == "ema_ln":
                return modules["image"](seen.image), modules["text"](seen.text)
        image, text = self.project_image(seen.image), self.project_text(seen.text)
        return (image, text) if self.target == "paper" else (image.detach(), text.detach())

    def image_features(
        self, fused: Fused, mask: MaskOutput, target: Tensor, decoded: Tensor | None, index: Tensor | None
    ) -> Features:
        """Pair the student's image features with the teacher's.

        Args:
            fused: The student's.
            mask: What it saw.
            target: ``(B, 1 + N, D)``.
            decoded: ``(B, S, F)``, what :meth:`decode` gave.
            index: long ``(B, S)``, the patches that ``decoded`` is of; None: all N.
        """
        if self.positions == "visible":
            assert mask.ids_keep is not None
            keep = torch.cat([torch.zeros_like(mask.ids_keep[:, :1]), mask.ids_keep + 1], dim=1)
            target = target.gather(1, keep[..., None].expand(-1, -1, target.shape[2]))
            pred = self.project_image(fused.image)
            return Features(pred, target, torch.ones(pred.shape[:2], dtype=torch.bool, device=pred.device))
        target, hidden = target[:, 1:], mask.mask
        if self.positions == "upstream":
            return Features(self.decoder.restore(fused.image, mask.ids_restore)[1], target, hidden)
        assert self.project_decoded is not None
        assert decoded is not None
        if index is not None:
            target = target.gather(1, index[..., None].expand(-1, -1, target.shape[2]))
            hidden = torch.ones_like(index, dtype=torch.bool)
        return Features(self.project_decoded(decoded), target, hidden)

    def text_features(self, fused: Fused, target: Tensor, attention_mask: Tensor) -> Features:
        """Pair the student's text features ``(B, T, D)`` with the teacher's."""
        counted = torch.ones_like(attention_mask) if self.text_padding else attention_mask
        return Features(self.project_text(fused.text), target, counted.bool())

    def match(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(B, 2)`` of whether images and whole texts belong together (Eq. 6)."""
        fused = self.encoder(image, input_ids, attention_mask)
        return self.itm_head(torch.cat(self.encoder.pool(fused, attention_mask), dim=1))
