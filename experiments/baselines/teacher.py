"""Methods that follow a moving average of themselves: MoCo v3, BYOL, DINO, iBOT and AttMask.

Letters: B batch, C channels, N positions, M hidden positions, E encoder width, D projected width, K prototypes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from common.blocks.attention import TransformerBlock
from common.blocks.batch_norm import GlobalBatchNorm1d
from common.blocks.vit import VisionTransformer
from common.ema import EMATeacher, MovingCentre, need_teacher
from common.losses.contrastive import cosine_regression, query_key_info_nce
from common.losses.distillation import centred_softmax, dino_cross_entropy, ibot_cross_entropy, sinkhorn
from common.maskers.attention import Choice, mask_by_attention
from common.maskers.boxes import box_mask
from common.module import StepOutput, Term
from common.optim import OptimizerConfig, cosine_between
from common.randomness import KeyedGenerator
from common.runtime.reporting import print_line
from common.types import InputSpec
from common.views import ViewConfig, two_views
from experiments.baselines.base import EncoderFactory, Pool, Unreconstructed, Watched, check_pool, log_pairs, pooled
from experiments.baselines.heads import PrototypeHead, momentum_heads

Method = Literal["mocov3", "byol", "dino", "ibot", "attmask"]
#: The methods whose teacher's encoder is transferred, as published; of the others it is the student's.
_TEACHER_SERVES = ("dino", "ibot", "attmask")
_CONTRASTS = ("mocov3", "byol")


@dataclass(frozen=True)
class TeacherConfig:
    """How teacher and prototypes run; what depends on the step is a function of the step alone.

    Args:
        momentum: Share of the teacher's weights that is kept in the first step; it rises to 1 along a cosine. In short
            runs it starts at 1 - 10 / steps, so that the teacher leaves the random network behind.
        temperature: Of MoCo v3's contrast, or of the student's assignments.
        teacher_temperature: Of the teacher's assignments, first and last.
        warmup: Share of the steps in which that temperature rises.
        centre_momentum: Share of the old centre that is kept in a step.
        centering: ``"centre"`` subtracts a moving mean; ``"sinkhorn"`` uses prototypes alike within a batch.
        prototypes: K; 0 takes the head's own.
        frozen: Share of the steps in which the prototypes stay as they are.
        weight_decay: First and last, along a cosine; None keeps the optimiser's.
        freeze_patches: Whether the patch embedding stays random, which keeps MoCo v3 stable.
    """

    momentum: float = 0.996
    temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    warmup: float = 0.3
    centre_momentum: float = 0.9
    centering: Literal["centre", "sinkhorn"] = "centre"
    prototypes: int = 0
    frozen: float = 0.01
    weight_decay: tuple[float, float] | None = None
    freeze_patches: bool = False


@dataclass(frozen=True)
class HiddenConfig:
    """What iBOT and AttMask hide from the student.

    Args:
        share: Lowest and highest share of hidden patches.
        probability: Share of the views in which any are hidden.
        attended: AttMask's choice: the ``high``est or ``low``est attended patches.
    """

    share: tuple[float, float] = (0.1, 0.5)
    probability: float = 0.5
    attended: Choice = "high"


class Branch(nn.Module):
    """An encoder and the head on it, of which the teacher is a moving copy.

    Args:
        encoder: Of images or volumes.
        head: Maps features ``(..., E)`` to projections or prototypes.
        pool: How tokens are pooled.
    """

    def __init__(self, encoder: VisionTransformer, head: nn.Module, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.head, self.pool = encoder, head, pool

    def encode(self, image: Tensor, hidden: Tensor | None = None, mask_embed: Tensor | None = None) -> Tensor:
        """Encode ``(B, C, *space)``; positions ``hidden`` ``(B, N)`` are replaced by a learned embedding."""
        patches, extra = self.encoder.patch_embed.patchify(image), None
        if hidden is not None and mask_embed is not None:
            patches, extra = patches.masked_fill(hidden[..., None], 0), hidden[..., None] * mask_embed
        return self.encoder.encode(self.encoder.embed(patches, extra=extra)).tokens

    def represent(self, tokens: Tensor) -> Tensor:
        """Pool tokens to ``(B, E)``."""
        return pooled(self.encoder, tokens, self.pool)

    def patches(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the head's output ``(M, K)`` at hidden positions."""
        return self.head(tokens[:, self.encoder.num_prefix_tokens :][hidden])

    def attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of ``(B, C, *space)`` and how much each patch is attended in the last block, ``(B, N)``.

        It is the class token's row averaged over heads, or the mean over all queries where there is none. Of that block
        queries and keys are computed again; the other blocks keep their fused kernels.
        """
        last = len(self.encoder.blocks) - 1
        output = self.encoder.encode_image(image, (last,))
        block, prefix = self.encoder.blocks[last], self.encoder.num_prefix_tokens
        assert isinstance(block, TransformerBlock)
        q, k, _ = block.attn.heads(block.norm1(output.hidden[0]))
        with torch.autocast(image.device.type, enabled=False):
            rows = (q.float()[:, :, :1] if prefix else q.float()) * q.shape[-1] ** -0.5
            weights = (rows @ k.float().transpose(2, 3)).softmax(-1)
        return output.tokens, weights.mean((1, 2))[:, prefix:]


class TeacherNetwork(nn.Module):
    """Student, teacher, and what belongs to one of them.

    Args:
        student: The branch that is trained.
        predictor: On the student's projections; None without.
        momentum: The teacher's.
        teacher_first: Whether the teacher's encoder is the one that is transferred: files take the first they find.
        centre_momentum: Of the centres; None without prototypes.
    """

    def __init__(
        self,
        student: Branch,
        predictor: nn.Module | None,
        momentum: float,
        teacher_first: bool,
        centre_momentum: float | None,
    ) -> None:
        super().__init__()
        teacher = EMATeacher(student, momentum)
        for name, part in (("teacher", teacher), ("student", student))[:: 1 if teacher_first else -1]:
            self.add_module(name, part)
        self.teacher: EMATeacher
        self.student: Branch
        self.predictor = predictor
        self.mask_embed = nn.Parameter(torch.zeros(student.encoder.embed_dim))
        trunc_normal_(self.mask_embed, std=0.02)
        width = student.head.num_prototypes if isinstance(student.head, PrototypeHead) else 0
        self.centre = MovingCentre(width, centre_momentum) if centre_momentum is not None else None
        self.patch_centre = MovingCentre(width, centre_momentum) if centre_momentum is not None else None

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        return {"mask_embed"}

    @property
    def master(self) -> Branch:
        """The teacher's branch, whose batch normalisation uses its batch's statistics while training, as published."""
        branch: Branch = self.teacher.module  # type: ignore[assignment]
        for module in branch.modules():
            if isinstance(module, GlobalBatchNorm1d):
                module.train(self.training)
        return branch


class Temperatures(NamedTuple):
    """Temperatures of a step: of the student's assignments, and of the teacher's."""

    student: float
    teacher: float


class TeacherPretrain(Unreconstructed):
    """A student matches what a moving average of itself makes of another view.

    Args:
        method: ``"mocov3"`` (Chen, Xie and He 2021), ``"byol"`` (Grill et al. 2020), ``"dino"`` (Caron et al. 2021),
            ``"ibot"`` (Zhou et al. 2022) or ``"attmask"`` (Kakogeorgiou et al. 2022).
        encoder: Makes the encoder from (channels, image size).
        teacher: How teacher and prototypes run.
        hidden: What iBOT and AttMask hide.
        pool: What represents a sample: the mean over its patches, or the class token.
        views: How views differ; None takes what suits the data: radiographs, photographs or volumes.
        optimization: How the weights are updated; the learning rate is for 256 samples per step.
        rate_factor: Factor of the learning rate.
    """

    def __init__(
        self,
        method: Method = "ibot",
        encoder: EncoderFactory = VisionTransformer,
        teacher: TeacherConfig = TeacherConfig(),
        hidden: HiddenConfig = HiddenConfig(),
        pool: Pool = "mean",
        views: ViewConfig | None = None,
        optimization: OptimizerConfig = OptimizerConfig(),
        rate_factor: float = 1.0,
    ) -> None:
        super().__init__(optimization, rate_factor)
        self.save_hyperparameters()
        self.method, self.config, self.hidden, self.pool, self._views = method, teacher, hidden, pool, views
        self._make_encoder = encoder
        self.views = ViewConfig()
        self.watched: Watched | None = None
        #: Optimiser steps of the whole training; 0 until it is known.
        self.total_steps = 0

    @property
    def hides(self) -> bool:
        """Whether patches are hidden from the student."""
        return self.method in ("ibot", "attmask")

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder that is transferred."""
        network: TeacherNetwork = self.network
        teacher: Branch = network.teacher.module  # type: ignore[assignment]
        return teacher.encoder if self.method in _TEACHER_SERVES else network.student.encoder

    def build_network(self, spec: InputSpec) -> TeacherNetwork:
        """Make student and teacher for inputs of ``spec``.

        Raises:
            ValueError: sizes or settings that do not fit.
        """
        self.views = self._views or ViewConfig.suiting(spec)
        self.views.check(len(spec.channels))
        encoder = self._make_encoder(len(spec.channels), spec.image_size)
        check_pool(encoder, self.pool)
        encoder.patch_embed.requires_grad_(not self.config.freeze_patches)
        head, predictor = (
            momentum_heads(encoder.embed_dim)
            if self.method in _CONTRASTS
            else (PrototypeHead(encoder.embed_dim, self.config.prototypes), None)
        )
        if self.method in _CONTRASTS:
            return self._unmasked(
                TeacherNetwork(Branch(encoder, head, self.pool), predictor, self.config.momentum, False, None)
            )
        centre = self.config.centre_momentum
        return self._unmasked(
            TeacherNetwork(Branch(encoder, head, self.pool), None, self.config.momentum, True, centre)
        )

    def _unmasked(self, network: TeacherNetwork) -> TeacherNetwork:
        """Leave the mask embedding out of training where nothing is hidden: DDP would wait for its gradient."""
        network.mask_embed.requires_grad_(self.hides)
        return network

    def configure_optimizers(self) -> Any:
        """Make the optimiser, and learn how long training is (Lightning hook)."""
        self.total_steps = max(int(self.trainer.estimated_stepping_batches), 1)
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        """Say what accumulation and a short run change (Lightning hook)."""
        if self.method == "mocov3":
            self.say_negatives()
        if (start := self.first_momentum()) < self.config.momentum:
            print_line(f"note: the teacher's momentum starts at {start:.3f}, not at {self.config.momentum}, "
                f"in a run of {self.total_steps} steps")  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights without a teacher in one sentence (Lightning hook)."""
        need_teacher(checkpoint["state_dict"], "network.teacher.")
        super().on_load_checkpoint(checkpoint)

    def first_momentum(self) -> float:
        """Return the momentum of the first step."""
        return (
            min(self.config.momentum, max(1 - 10 / self.total_steps, 0.0)) if self.total_steps else self.config.momentum
        )

    def progress(self) -> float:
        """Return how much of the training is over, 0 to 1; 1 where nothing is trained."""
        return self.global_step / self.total_steps if self.total_steps else 1.0

    def temperatures(self) -> Temperatures:
        """Return the temperatures of this step."""
        first, last = self.config.teacher_temperature
        risen = min(self.progress() / self.config.warmup, 1.0) if self.config.warmup else 1.0
        return Temperatures(self.config.temperature, first + (last - first) * risen)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the weight decay of this step, and hold the prototypes in the first ones (Lightning hook).

        Without a gradient the optimiser leaves a parameter alone; with one of 0 it would still decay it.
        """
        if self.config.weight_decay is not None:
            decay = cosine_between(*self.config.weight_decay, self.progress())
            for group in optimizer.param_groups:
                group["weight_decay"] = decay if group["weight_decay"] else 0.0
        head = self.network.student.head
        if isinstance(head, PrototypeHead) and self.global_step < int(self.config.frozen * self.total_steps):
            head.prototypes.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let teacher and centres follow: once per optimiser step (Lightning hook)."""
        momentum = cosine_between(self.first_momentum(), 1.0, self.progress())
        super().optimizer_step(*args, **kwargs)
        network: TeacherNetwork = self.network
        network.teacher.update(network.student, self.finite.flag, momentum)
        for centre in (network.centre, network.patch_centre):
            if centre is not None:
                centre.move(self.finite.flag)

    def step(self, batch: Any, sync: bool) -> StepOutput:
        """Match two views of a batch."""
        u, v = two_views(batch["image"], batch["key"], self.views, self.acquired(batch))
        images = (u.image, v.image)
        contrasts = self.method in _CONTRASTS
        terms = self._contrast(images, sync) if contrasts else self._assign(images, batch["key"], sync)
        output = StepOutput(terms, self.reconstruct(batch))
        if not self.training and self.watched is not None:
            self.watched = self.watched._replace(loss=float(output.loss().detach()))
        return output

    def _contrast(self, images: Sequence[Tensor], sync: bool) -> dict[str, Term]:
        network: TeacherNetwork = self.network
        samples = len(images[0])
        counted = self.check_samples(samples, sync)
        features = network.student.represent(network.student.encode(torch.cat(tuple(images)))).chunk(2)
        assert network.predictor is not None
        queries = [network.predictor(network.student.head(x)) for x in features]
        with torch.no_grad():
            master = network.master
            taught = master.represent(master.encode(torch.cat(tuple(images)))).chunk(2)
            keys = [master.head(x) for x in taught]
        pairs = ((queries[0], keys[1]), (queries[1], keys[0]))
        floor = None
        if self.method == "mocov3":
            temperature = self.config.temperature
            losses = [query_key_info_nce(q, k, temperature, sync) for q, k in pairs]
            floor = 4 * temperature * log_pairs(samples, negatives_only=False)
        else:
            losses = [cosine_regression(q, k, sync) for q, k in pairs]
        self._watch(images, features, floor if counted else None)
        return {"contrast": Term(losses[0] + losses[1], float(samples) if counted else 0.0, 1.0)}

    def _watch(
        self, images: Sequence[Tensor], features: Sequence[Tensor], floor: float | None, targets: Any = None
    ) -> None:
        if not self.training:
            self.watched = Watched(features[0], features[1], 0.0, floor, (images[0], images[1]), targets)

    def draw_hidden(self, keys: Tensor, grid: Sequence[int], attention: Sequence[Tensor] | None) -> Tensor:
        """Draw what is hidden from the student in both views, bool ``(2 B, N)``.

        Args:
            keys: int64 ``(B,)``, one per sample.
            grid: Positions along each axis.
            attention: ``(B, N)`` of each view, which AttMask follows; None hides boxes.
        """
        masks = []
        low, high = self.hidden.share
        for index, view in enumerate("uv"):
            generator = KeyedGenerator(keys, f"hidden {view}")
            share = low + (high - low) * generator.rand((len(keys),))
            share = torch.where(generator.rand((len(keys),)) < self.hidden.probability, share, 0.0)
            masks.append(
                box_mask(generator, share, grid)
                if attention is None
                else mask_by_attention(attention[index], share, self.hidden.attended)
            )
        return torch.cat(masks)

    def _assign(self, images: Sequence[Tensor], keys: Tensor, sync: bool) -> dict[str, Term]:
        """Compare assignments to prototypes: of both views, and of hidden patches where any are."""
        network: TeacherNetwork = self.network
        both, samples = torch.cat(tuple(images)), float(len(images[0]))
        hidden = None
        with torch.no_grad():
            master, attention = network.master, None
            if self.method == "attmask":
                tokens, attended = master.attention(both)
                attention = attended.chunk(2)
            else:
                tokens = master.encode(both)
            if self.hides:
                hidden = self.draw_hidden(keys, master.encoder.grid_size, attention)
            logits = master.head(master.represent(tokens))
            targets = self._targets(logits, network.centre, sync)
        student = network.student
        seen = student.encode(both, hidden, network.mask_embed)
        features = student.represent(seen)
        tau = self.temperatures()
        loss = dino_cross_entropy(targets.chunk(2), student.head(features).chunk(2), tau.student, sync)
        terms = {"prototypes": Term(loss, samples, 1.0)}
        if hidden is not None:
            patch_logits = master.patches(tokens, hidden)
            patch_targets = self._targets(patch_logits, network.patch_centre, sync)
            patches = ibot_cross_entropy(patch_targets, student.patches(seen, hidden), hidden, tau.student, sync)
            terms["patches"] = Term(patches, samples, 1.0)
        self._watch(images, features.chunk(2), None, targets)
        return terms

    @torch.no_grad()
    def _targets(self, logits: Tensor, centre: MovingCentre | None, sync: bool) -> Tensor:
        """Return the teacher's assignments, by the centre of the steps before; training adds to the next one."""
        temperature = self.temperatures().teacher
        if self.config.centering == "sinkhorn":
            return sinkhorn(logits, temperature, sync=sync)
        assert centre is not None
        targets = centred_softmax(logits, centre.value, temperature)
        if self.training:
            centre.add(logits)
        return targets


def prototype_information(mean_target: Tensor, mean_entropy: float) -> float:
    """Return how much targets tell samples apart, 0 to 1: 0 is one prototype for all as well as all alike.

    Args:
        mean_target: ``(K,)``, the mean of the targets.
        mean_entropy: The mean of their entropies, in nats.
    """
    entropy = -float(torch.special.xlogy(mean_target, mean_target).sum())
    return (entropy - mean_entropy) / math.log(len(mean_target))
