"""What the baselines share: the rule of the learning rate, pooled features, and what is watched.

Letters: B batch, C channels, N positions, E width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common.blocks.vit import VisionTransformer
from common.distributed import world_size
from common.errors import UserError
from common.module import SSLModule
from common.optim import OptimizerConfig
from common.runtime.reporting import print_line
from common.types import ImageKey, Panel, Reconstruction, TokenFeatures

EncoderFactory = Callable[[int, Sequence[int]], VisionTransformer]
Pool = Literal["mean", "cls"]
#: Samples per optimiser step that learning rates are given for.
RATE_SAMPLES = 256


def pooled(encoder: VisionTransformer, tokens: Tensor, pool: Pool = "mean") -> Tensor:
    """Return one vector ``(B, E)`` per sample: the mean over patches, or the class token."""
    return tokens[:, 0] if pool == "cls" else tokens[:, encoder.num_prefix_tokens :].mean(1)


def check_pool(encoder: VisionTransformer, pool: Pool) -> None:
    """Refuse to pool by a class token that the encoder lacks.

    Raises:
        ValueError: it has none.
    """
    if pool == "cls" and not encoder.num_prefix_tokens:
        raise ValueError(
            "model.pool is cls, and the encoder has no class token: set model.encoder.class_token to true."
        )


class Watched(NamedTuple):
    """What a validation step leaves for the collapse scalars.

    Attributes:
        first: ``(B, E)``, pooled features of one view.
        second: ``(B, E)``, of the other.
        loss: loss of the batch.
        floor: loss of equal vectors; None where that is no number to compare with.
        images: the views, to look at.
        targets: ``(S, K)``, a teacher's assignments to prototypes; None without any.
    """

    first: Tensor
    second: Tensor
    loss: float
    floor: float | None
    images: tuple[Tensor, Tensor]
    targets: Tensor | None = None


class Baseline(SSLModule[Any]):
    """A method on one encoder, whose learning rate is given for 256 samples per optimiser step and scales with them.

    Args:
        optimization: How its weights are updated.
        rate_factor: Factor of the learning rate; small networks and short runs take higher ones (ours).
    """

    def __init__(self, optimization: OptimizerConfig, rate_factor: float = 1.0) -> None:
        super().__init__(optimization)
        self.rate_factor = rate_factor

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder that is transferred."""
        encoder: VisionTransformer = self.network.encoder
        return encoder

    def samples_per_step(self) -> int:
        """Return the samples of an optimiser step, over all ranks and micro-batches."""
        batch = int(self.trainer.datamodule.batch_size)  # type: ignore[attr-defined]
        return batch * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def lr_scale(self, name: str) -> float:
        """Return the factor of the learning rate: linear in the samples of a step."""
        return self.rate_factor * self.samples_per_step() / RATE_SAMPLES

    def acquired(self, batch: Any) -> Tensor | None:
        """Return which channels of volumes were acquired, bool ``(B, C)``; None for pictures, which have them all."""
        return batch["modality_mask"].bool() if batch["image"].ndim == 5 else None

    def images(self, batch: Any) -> Tensor:
        """Return the images of a batch; a single channel stands for all."""
        image: Tensor = batch["image"]
        return image.expand(-1, self.encoder.patch_embed.in_channels, *image.shape[2:])

    def token_features(self, batch: Any) -> TokenFeatures:
        """Encode whole samples; positions where every channel is 0, such as air, are left out."""
        encoder, image = self.encoder, self.images(batch)
        tokens = encoder.forward_features(image)[:, encoder.num_prefix_tokens :]
        return TokenFeatures({"final": tokens}, (encoder.patch_embed.patchify(image) != 0).any(2))


class Unreconstructed(Baseline):
    """A method that reconstructs nothing: there is no floor ratio of a reconstruction, and nothing to draw."""

    def reconstruct(self, batch: Any, image: ImageKey = "image") -> Reconstruction:
        """Return nothing that could be scored."""
        target, valid = self.reconstruction_target(batch)
        return Reconstruction(torch.zeros_like(target), target, torch.zeros_like(valid), {})

    def reconstruction_target(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the image's patches; none of them is a target."""
        patches = self.encoder.patch_embed.patchify(self.images(batch)).float()
        return patches, torch.zeros_like(patches[..., 0], dtype=torch.bool)

    def panels(self, batch: Any, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw nothing."""
        return {}

    def check_samples(self, samples: int, sync: bool) -> bool:
        """Return whether a batch has two samples to compare; validation leaves a single one out.

        Raises:
            UserError: in training it has not.
        """
        if sync and samples * world_size() < 2:
            raise UserError("This method compares samples with each other and needs two in a step: "
                            "raise data.batch_size.")  # fmt: skip
        return sync or samples > 1

    def say_negatives(self) -> None:
        """Say how many samples a loss sees where an optimiser step adds up several micro-batches."""
        if (steps := self.trainer.accumulate_grad_batches) > 1:
            total = self.samples_per_step()
            print_line(f"note: negatives and moments come from {total // steps} samples, "
                f"not from the {total} of the optimiser step")  # fmt: skip


def log_pairs(samples: int, negatives_only: bool) -> float:
    """Return the loss of a contrast in which all are equal: log of the rows that one is told apart from."""
    return math.log(2 * samples - 1) if negatives_only else math.log(samples)
