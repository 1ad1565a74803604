"""Contrast of images with what belongs to them: texts (CLIP, ConVIRT) and genetics (ContIG).

Letters: B batch, C channels, E width, D projected width, T tokens of a text, F features, M kinds of genetics.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.attention import TransformerBlock
from common.blocks.vit import VisionTransformer, init_transformer_weights, init_xavier_weights
from common.errors import UserError
from common.losses.contrastive import retrieval_accuracy, symmetric_info_nce
from common.module import StepOutput, Term
from common.optim import OptimizerConfig
from common.types import InputSpec
from experiments.baselines.base import EncoderFactory, Unreconstructed, pooled

#: Makes a genome encoder with ``tokens``, ``blocks`` and ``norm`` from (features by kind, width, heads).
GenomeFactory = Callable[[Mapping[str, int], int, int], nn.Module]
#: The inverse of the temperature at most.
_LARGEST_SCALE = 100.0


class TextEncoder(nn.Module):
    """A small transformer over the tokens of a text; padding is attended by none.

    Args:
        vocabulary: Number of tokens.
        length: Longest text.
        dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
    """

    def __init__(self, vocabulary: int, length: int, dim: int = 384, depth: int = 6, num_heads: int = 6) -> None:
        super().__init__()
        self.dim = dim
        self.words, self.positions = nn.Embedding(vocabulary, dim), nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(init_transformer_weights)
        for parameter in (self.words.weight, self.positions):
            trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"positions"}

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts ``(B, T)`` to the class token's ``(B, dim)``."""
        x, real = self.words(ids) + self.positions[: ids.shape[1]], attention_mask.bool()
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            x = block.transform(x, real)
        return self.norm(x)[:, 0]


#: Makes the text encoder from (size of the vocabulary, longest text).
TextFactory = Callable[[int, int], TextEncoder]


class ImageTextNetwork(nn.Module):
    """Both towers, a linear projection of each, and the temperature.

    Args:
        encoder: Of images.
        text: Of texts.
        dim: Width of the space in which they are compared.
        temperature: The first.
    """

    def __init__(self, encoder: VisionTransformer, text: TextEncoder, dim: int, temperature: float) -> None:
        super().__init__()
        self.encoder, self.text = encoder, text
        self.from_image = nn.Linear(encoder.embed_dim, dim, bias=False)
        self.from_text = nn.Linear(text.dim, dim, bias=False)
        self.log_scale = nn.Parameter(-torch.tensor(temperature).log())

    def forward(self, image: Tensor, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections of both ``(B, D)``, and the inverse of the temperature, at most 100."""
        features = pooled(self.encoder, self.encoder.forward_features(image))
        scale = self.log_scale.exp().clamp(max=_LARGEST_SCALE)
        return self.from_image(features), self.from_text(self.text(ids, attention_mask)), scale


class CLIPPretrain(Unreconstructed):
    """Images and their texts find each other (ConVIRT, Zhang et al. 2020; CLIP, Radford et al. 2021).

    Samples that lack image or text are left out of no batch: choose data whose samples have both.

    Args:
        encoder: Makes the image encoder from (channels, image size).
        text: Makes the text encoder from (size of the vocabulary, longest text).
        temperature: The first; it is learned, its inverse at most 100.
        projection: Width of the space in which image and text are compared.
        optimization: How the weights are updated; the learning rate is for 256 samples per step.
        rate_factor: Factor of the learning rate.
    """

    remembered = ("channels", "image_size", "vocabulary")

    def __init__(
        self,
        encoder: EncoderFactory = VisionTransformer,
        text: TextFactory = TextEncoder,
        temperature: float = 0.07,
        projection: int = 512,
        optimization: OptimizerConfig = OptimizerConfig(),
        rate_factor: float = 1.0,
    ) -> None:
        super().__init__(optimization, rate_factor)
        self.save_hyperparameters()
        self.temperature, self.projection = temperature, projection
        self._factories = (encoder, text)

    def build_network(self, spec: InputSpec) -> ImageTextNetwork:
        """Make the towers for inputs of ``spec``.

        Raises:
            UserError: there are no texts.
        """
        if not spec.vocabulary:
            raise UserError("CLIP contrasts images with texts, and these data have none: choose an archive of reports.")
        make_encoder, make_text = self._factories
        encoder = make_encoder(len(spec.channels), spec.image_size)
        text = make_text(spec.vocabulary["size"], spec.vocabulary["length"])
        return ImageTextNetwork(encoder, text, self.projection, self.temperature)

    def on_fit_start(self) -> None:
        """Say what accumulation changes (Lightning hook)."""
        self.say_negatives()

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compute the loss of one batch; words that were hidden for other methods are put back."""
        counted = self.check_samples(len(batch["image"]), sync)
        ids = torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
        image, text, scale = self.network(self.images(batch), ids, batch["attention_mask"])
        loss = symmetric_info_nce(image, text, 1 / scale, sync)
        samples = float(len(image)) if counted else 0.0
        accuracy = retrieval_accuracy(image.detach(), text.detach())
        terms = {"contrast": Term(loss, samples, 1.0), "retrieval_accuracy": Term(accuracy, samples),
                 "temperature": Term(1 / scale.detach())}  # fmt: skip
        return StepOutput(terms, self.reconstruct(batch))


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

    def __init__(self, encoder: VisionTransformer, genome: Any, dim: int) -> None:
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


class ContIGPretrain(Unreconstructed):
    """Contrast between an image and the genetics of its person (Taleb et al. 2022), with the encoders of this method.

    The loss is the mean over kinds of genetics of the symmetric InfoNCE; every sample needs all kinds
    (``data.genome.complete_only``). Nothing is reconstructed, so there is no floor ratio.

    Args:
        genome_encoder: Makes the genome encoder from (features by kind, width, heads).
        encoder: Makes the image encoder from (channels, image size).
        temperature: Of the contrast.
        projection: Width of the space in which image and genetics are compared.
        optimization: How the weights are updated.
    """

    remembered = ("channels", "image_size", "genome")

    def __init__(
        self,
        genome_encoder: GenomeFactory,
        encoder: EncoderFactory = VisionTransformer,
        temperature: float = 0.1,
        projection: int = 128,
        optimization: OptimizerConfig = OptimizerConfig(),
    ) -> None:
        super().__init__(optimization)
        self.save_hyperparameters()
        self.temperature, self.projection = temperature, projection
        self._factories = (encoder, genome_encoder)

    def lr_scale(self, name: str) -> float:
        """Return 1: the rate is that of its step, as in the configurations of masked relation modeling it shares."""
        return 1.0

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

    def step(self, batch: Any, sync: bool) -> StepOutput:
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

    def pooled(self, batch: Any) -> dict[str, Tensor]:
        """Return the vectors ``(B, E)`` of images, before projection: the mean over their patches."""
        return {"image": pooled(self.encoder, self.encoder.forward_features(batch["image"]))}
