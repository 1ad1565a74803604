"""The speed of relation masking and of the training step at the configured sizes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.blocks.attention import relation_masked_attention
from common.blocks.vit import VisionTransformer
from common.sweeps.bench import Row, in_turn, speedup, training_rows, training_step
from common.types import InputSpec
from experiments.mrm_genetics.module import RelationPretrain

_BATCH = 4
#: Features of each kind in UK Biobank, as the paper uses it.
_GENOME = {"snp": 7854, "pgs": 481, "burden": 18574}


def _naive(q: Tensor, k: Tensor, v: Tensor, ratio: float) -> Tensor:
    """Sort out the largest of each row, and put zeros in their places."""
    relation = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return relation.scatter(-1, relation.topk(int(ratio * k.shape[2]), dim=-1).indices, 0.0) @ v


def masked_attention() -> list[Row]:
    """Compare relation-masked attention with the naive form, forward and backward, 8 x 12 x 197 x 64."""
    base = [torch.randn(8, 12, 197, 64, requires_grad=True) for _ in range(3)]

    def run(function: Callable[..., Tensor]) -> None:
        function(*base, 0.75).sum().backward()
        for leaf in base:
            leaf.grad = None

    slow, fast = in_turn(partial(run, _naive), partial(run, relation_masked_attention), rounds=9)
    detail = "topk(147) and scatter, forward and backward, 8 x 12 x 197 x 64, fp32"
    return [Row("relation masking against the naive form", speedup(slow, fast), 1.6, detail)]


def configured_step() -> list[Row]:
    """Hold the step against matrix products and bfloat16: ViT-B, 224 pixels, 144 genome tokens."""
    module = RelationPretrain(
        encoder=partial(VisionTransformer, qkv_bias=True, pos_embed="sincos", class_token=True, norm_eps=1e-6),
    )
    spec, batch = example({}, _BATCH)
    module.build(spec)
    return training_rows(training_step(module, batch), f"ViT-B, 224 pixels, 144 genome tokens, batch {_BATCH}")


def example(data: Mapping[str, Any], count: int) -> tuple[InputSpec, dict[str, Any]]:
    """Return what the data promise, and a batch of persons with all of their genetics, for ``data`` settings."""
    size = tuple((data.get("image") or {}).get("size") or (224, 224))
    genome = _GENOME if data.get("genetics", True) else {}
    generator = torch.Generator().manual_seed(0)
    features = sum(genome.values())
    batch = {
        "image": torch.rand(count, 3, *size, generator=generator),
        "genome": torch.randn(count, features, generator=generator),
        "genome_observed": torch.ones(count, features, dtype=torch.bool),
        "modality_mask": torch.ones(count, 4, dtype=torch.bool),
        "complete": True,
        "key": torch.arange(count),
    }
    return InputSpec(("red", "green", "blue"), size, genome=genome), batch


ROWS: list[Callable[[], list[Row]]] = [masked_attention, configured_step]
