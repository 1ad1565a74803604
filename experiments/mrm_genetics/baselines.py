"""Baselines of masked relation modeling: contrast between images and genetics, and features without training.

Letters: B batch, C channels, E width, M kinds of genetics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks.registry import registered
from common.blocks.vit import VisionTransformer, init_xavier_weights
from common.errors import UserError
from common.losses.contrastive import retrieval_accuracy, symmetric_info_nce
from common.module import SSLModule, StepOutput, Term
from common.optim import OptimizerConfig
from common.types import ImageGenomeBatch, ImageKey, InputSpec, Panel, Reconstruction, TokenFeatures
from experiments.mrm_genetics.model import GenomeEncoder
from experiments.mrm_genetics.module import EncoderFactory, GenomeFactory


def _projector(width: int, out: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))
    layers.apply(init_xavier_weights)
    return layers


class ContrastiveNetwork(nn.Module):
    """Image and genome encoders with a projection of the image and of each kind of genetics.

    Args:
        encoder: Of the image.
        genome: Of the genome.
        dim: Width of the space in which they are compared.
    """

    def __init__(self, encoder: VisionTransformer, genome: GenomeEncoder, dim: int) -> None:
        super().__init__()
        self.encoder, self.genome = encoder, genome
        encoder.apply(init_xavier_weights)
        self.from_image = _projector(encoder.embed_dim, dim)
        self.from_genome = nn.ModuleDict({name: _projector(encoder.embed_dim, dim) for name in genome.tokens.cuts})

    def forward(self, image: Tensor, genome: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Project ``(B, C, H, W)`` and ``(B, F)``: a vector of the image, and one of each kind of genetics."""
        tokens = self.encoder.forward_features(image)[:, self.encoder.num_prefix_tokens :]
        genes = self.genome.tokens(genome)
        for block in self.genome.blocks:
            genes = block(genes)
        parts = self.genome.norm(genes).split([cut.tokens for cut in self.genome.tokens.cuts.values()], dim=1)
        named = zip(self.from_genome.values(), parts, strict=True)
        return self.from_image(tokens.mean(1)), [project(part.mean(1)) for project, part in named]


class ContIGPretrain(SSLModule[ImageGenomeBatch]):
    """Contrast between an image and the genetics of its person (Taleb et al. 2022), with the encoders of this method.

    The loss is the mean over kinds of genetics of the symmetric InfoNCE; every sample needs all kinds
    (``data.genome.complete_only``). Nothing is reconstructed, so there is no floor ratio.

    Args:
        encoder: Makes the image encoder from (channels, image size).
        genome_encoder: Makes the genome encoder from (features by kind, width, heads).
        temperature: Of the contrast.
        projection: Width of the space in which image and genetics are compared.
        optimization: How the weights are updated.
    """

    remembered = ("channels", "image_size", "genome")

    def __init__(
        self,
        encoder: EncoderFactory = VisionTransformer,
        genome_encoder: GenomeFactory = GenomeEncoder,
        temperature: float = 0.1,
        projection: int = 128,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__(optimization)
        self.save_hyperparameters()
        self.temperature, self.projection = temperature, projection
        self._factories = (encoder, genome_encoder)

    def build_network(self, spec: InputSpec) -> ContrastiveNetwork:
        """Make the networks for inputs of ``spec``.

        Raises:
            UserError: there are no genetics.
        """
        if not spec.genome:
            raise UserError("ContIG contrasts images with genetics, and there are none: "
                            "name them with data.genome.genotypes.")  # fmt: skip
        make_encoder, make_genome = self._factories
        encoder = make_encoder(len(spec.channels), spec.image_size)
        genome = make_genome(spec.genome, encoder.embed_dim, encoder.config["num_heads"])
        return ContrastiveNetwork(encoder, genome, self.projection)

    def step(self, batch: ImageGenomeBatch, sync: bool) -> StepOutput:
        """Compute the loss of one batch.

        Raises:
            UserError: a sample lacks a kind of genetics.
        """
        if not batch["complete"]:
            raise UserError("ContIG needs every kind of genetics of every person: "
                            "set data.genome.complete_only to true.")  # fmt: skip
        image, kinds = self.network(batch["image"], batch["genome"])
        losses = [symmetric_info_nce(image, kind, self.temperature, sync) for kind in kinds]
        samples = float(len(image))
        accuracy = torch.stack([retrieval_accuracy(image.detach(), kind.detach()) for kind in kinds]).mean()
        terms = {
            "contrast": Term(torch.stack(losses).mean(), samples, 1.0),
            "retrieval_accuracy": Term(accuracy, samples),
        }
        return StepOutput(terms, self.reconstruct(batch))

    def reconstruct(self, batch: ImageGenomeBatch, image: ImageKey = "image") -> Reconstruction:
        """Return nothing that could be scored."""
        target, valid = self.reconstruction_target(batch)
        return Reconstruction(torch.zeros_like(target), target, torch.zeros_like(valid), {})

    def reconstruction_target(self, batch: ImageGenomeBatch) -> tuple[Tensor, Tensor]:
        """Return the image's patches; none of them is a target."""
        patches = self.network.encoder.patch_embed.patchify(batch["image"]).float()
        return patches, torch.zeros_like(patches[..., 0], dtype=torch.bool)

    def token_features(self, batch: ImageGenomeBatch) -> TokenFeatures:
        """Encode whole images."""
        encoder = self.network.encoder
        patches = encoder.forward_features(batch["image"])[:, encoder.num_prefix_tokens :]
        return TokenFeatures({"final": patches}, torch.ones_like(patches[..., 0], dtype=torch.bool))

    def pooled(self, batch: ImageGenomeBatch) -> dict[str, Tensor]:
        """Return the vectors ``(B, E)`` of images, before projection: the mean over their patches."""
        return {"image": self.token_features(batch).features["final"].mean(1)}

    def panels(self, batch: ImageGenomeBatch, output: Reconstruction, index: int) -> dict[str, Panel]:
        """Draw nothing."""
        return {}


@registered
class ColourGrid(nn.Module):
    """An encoder that returns only the mean colours of an 8 x 8 grid.

    Args:
        in_channels: C.
        image_size: Unused: any size will do.
        grid: Cells along each axis.
    """

    num_prefix_tokens = 0

    def __init__(self, in_channels: int, image_size: Sequence[int], grid: int = 8) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"in_channels": in_channels, "image_size": list(image_size), "grid": grid}
        self.num_features = in_channels * grid * grid
        self.grid = grid

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the mean colour of each cell as one token ``(B, 1, C grid grid)``."""
        return F.adaptive_avg_pool2d(image.float(), self.grid).flatten(1)[:, None]
