"""Methods that compare two views of each sample, without a teacher: SimCLR, VICReg and Barlow Twins.

Letters: B batch, C channels, E encoder width, D projected width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.blocks.vit import VisionTransformer
from common.losses.barlow_twins import token_barlow_twins
from common.losses.contrastive import nt_xent
from common.losses.vicreg import vicreg
from common.module import StepOutput, Term
from common.optim import OptimizerConfig
from common.types import InputSpec
from common.views import ViewConfig, two_views
from experiments.baselines.base import EncoderFactory, Pool, Unreconstructed, Watched, check_pool, log_pairs, pooled
from experiments.baselines.heads import expander, simclr_projector

Comparison = Literal["simclr", "vicreg", "barlow"]


class TwoViewNetwork(nn.Module):
    """Encoder and projector.

    Args:
        encoder: Of images or volumes.
        projector: Maps pooled features ``(B, E)`` to ``(B, D)``.
        pool: How the encoder's tokens are pooled.
    """

    def __init__(self, encoder: VisionTransformer, projector: nn.Module, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.projector, self.pool = encoder, projector, pool

    def forward(self, first: Tensor, second: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the pooled features ``(B, E)`` and the projections ``(B, D)`` of both views."""
        tokens = self.encoder.forward_features(torch.cat([first, second]))
        features = list(pooled(self.encoder, tokens, self.pool).chunk(2))
        return features, [self.projector(x) for x in features]


def compare(
    method: Comparison, a: Tensor, b: Tensor, temperature: float, sync: bool
) -> dict[str, tuple[Tensor, float]]:
    """Return the losses of projections ``(B, D)`` by name, each with its weight in the paper's loss."""
    if method == "simclr":
        return {"contrast": (nt_xent(a, b, temperature, sync), 1.0)}
    if method == "barlow":
        loss = token_barlow_twins(a[:, None], b[:, None], "feature", "sum", off_diagonal_weight=5e-3, sync=sync)
        return {"barlow_twins": (loss, 1.0)}
    terms = vicreg(a, b, sync)
    return {
        "invariance": (terms.invariance, 25.0),
        "variance": (terms.variance, 25.0),
        "covariance": (terms.covariance, 1.0),
    }


def loss_of_equal_vectors(method: Comparison, samples: int, width: int) -> float:
    """Return the loss where every sample has one and the same projection: complete collapse."""
    return {"simclr": log_pairs(samples, negatives_only=True), "barlow": float(width), "vicreg": 24.75}[method]


class TwoViewPretrain(Unreconstructed):
    """Two views of a sample agree, and samples stay apart.

    Args:
        method: ``"simclr"`` (Chen et al. 2020), ``"vicreg"`` (Bardes et al. 2022) or ``"barlow"`` (Zbontar et al.
            2021).
        encoder: Makes the encoder from (channels, image size).
        temperature: Of SimCLR's contrast.
        pool: What represents a sample: the mean over its patches, or the class token.
        views: How views differ; None takes what suits the data: radiographs, photographs or volumes.
        optimization: How the weights are updated; the learning rate is for 256 samples per step.
        rate_factor: Factor of the learning rate.
    """

    def __init__(
        self,
        method: Comparison = "simclr",
        encoder: EncoderFactory = VisionTransformer,
        temperature: float = 0.2,
        pool: Pool = "mean",
        views: ViewConfig | None = None,
        optimization: OptimizerConfig = OptimizerConfig(),
        rate_factor: float = 1.0,
    ) -> None:
        super().__init__(optimization, rate_factor)
        self.save_hyperparameters()
        self.method, self.temperature, self.pool, self._views = method, temperature, pool, views
        self._make_encoder = encoder
        self.views = ViewConfig()
        self.watched: Watched | None = None

    def build_network(self, spec: InputSpec) -> TwoViewNetwork:
        """Make encoder and projector for inputs of ``spec``.

        Raises:
            ValueError: sizes or settings that do not fit.
        """
        self.views = self._views or ViewConfig.suiting(spec)
        self.views.check(len(spec.channels))
        encoder = self._make_encoder(len(spec.channels), spec.image_size)
        check_pool(encoder, self.pool)
        make = simclr_projector if self.method == "simclr" else expander
        return TwoViewNetwork(encoder, make(encoder.embed_dim), self.pool)

    def on_fit_start(self) -> None:
        """Say what accumulation changes (Lightning hook)."""
        self.say_negatives()

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Compare two views of a batch."""
        first, second = two_views(batch["image"], batch["key"], self.views, self.acquired(batch))
        return self.outcome(batch, first.image, second.image, sync)

    def outcome(self, batch: Any, first: Tensor, second: Tensor, sync: bool) -> StepOutput:
        """Compute the losses of two views ``(B, C, *space)``."""
        samples = len(first)
        counted = self.check_samples(samples, sync)
        features, (a, b) = self.network(first, second)
        if not counted:
            a, b = a.repeat(2, 1), b.repeat(2, 1)
        losses = compare(self.method, a, b, self.temperature, sync)
        count = float(samples) if counted else 0.0
        output = StepOutput({name: Term(value, count, weight) for name, (value, weight) in losses.items()},
                            self.reconstruct(batch))  # fmt: skip
        if not self.training and counted:
            floor = loss_of_equal_vectors(self.method, samples, a.shape[1])
            self.watched = Watched(features[0], features[1], float(output.loss().detach()), floor, (first, second))
        return output
