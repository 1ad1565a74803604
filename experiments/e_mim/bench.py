"""The speed of E-MIM's training step: ViT-B, 96^3 crops of four modalities."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from common.blocks.attention import SelfAttention
from common.cli import supports_bfloat16
from common.sweeps.bench import Row, in_turn, speedup, training_rows, training_step
from common.types import InputSpec
from experiments.e_mim.model import EMIM
from experiments.e_mim.module import EMIMPretrain

_CHANNELS = ("t1c", "t1", "flair", "t2")


class _TwoPasses(EMIM):
    """The same network with one encoder pass per branch, for comparison only."""

    def encode_branches(self, clean: torch.Tensor, masked: torch.Tensor) -> tuple:
        return self.encoder.encode(clean, self.taps), self.encoder.encode(masked, self.taps)


def _training_step(batch_size: int, two_passes: bool = False) -> Callable[..., None]:
    """Return a whole training step: forward, backward, clipping, AdamW."""
    module = EMIMPretrain()
    module.build(InputSpec(_CHANNELS, (96, 96, 96)))
    if two_passes:
        module.network.__class__ = _TwoPasses
    return training_step(module, example({}, batch_size)[1])


def example(data: Mapping[str, Any], count: int) -> tuple[InputSpec, dict[str, Any]]:
    """Return what the data promise, and a batch, for ``data`` settings of a configuration."""
    size = tuple((data.get("crops") or {}).get("size") or (96, 96, 96))
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.rand(count, 4, *size, generator=generator),
        "modality_mask": torch.ones(count, 4, dtype=torch.bool),
        "key": torch.arange(count),
    }
    return InputSpec(_CHANNELS, size), batch


def configured_step() -> list[Row]:
    """Hold the step at the configured batch against matrix products and bfloat16."""
    return training_rows(_training_step(batch_size=4), "ViT-B, 96^3, batch 4")


def stacked_branches() -> list[Row]:
    """Compare one pass over both branches with a pass for each, where it matters most: one sample per device."""
    one, two = in_turn(_training_step(batch_size=1), _training_step(batch_size=1, two_passes=True), rounds=7)
    return [Row("both branches stacked against two passes", speedup(two, one), 1.05, "ViT-B, 96^3, batch 1")]


def attention_step() -> list[Row]:
    """Compare our attention with the fused kernel alone, in the one case where it is not used: 16 bits on a CPU."""
    if not supports_bfloat16("cpu"):
        return [Row("plain attention against the fused CPU kernel, bf16", None, 1.0, "no bf16 instructions")]
    layer = SelfAttention(768, 12).bfloat16()
    x = torch.randn(2, 216, 768, dtype=torch.bfloat16, requires_grad=True)

    def fused() -> None:
        q, k, v = layer.qkv(x).reshape(2, 216, 3, 12, 64).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 216, 768)
        layer.proj(y).sum().backward()

    slow, fast = in_turn(fused, lambda: layer(x).sum().backward(), rounds=15)
    return [Row("attention layer at 216 tokens, ours against the fused CPU kernel, bf16", speedup(slow, fast), 1.0)]


ROWS: list[Callable[[], list[Row]]] = [configured_step, stacked_branches, attention_step]
