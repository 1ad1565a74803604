"""How fast E-MIM's training step is: ViT-B, 96^3 crops of four modalities, batch 1."""

import resource
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.bench import Row, in_turn, matrix_products, speedup
from common.blocks.attention import SelfAttention
from common.cli import supports_bfloat16
from common.optim import param_groups
from experiments.e_mim.model import EMIM
from experiments.e_mim.module import EMIMPretrain

_CHANNELS = ["t1c", "t1n", "t2f", "t2w"]


class _TwoPasses(EMIM):
    """The same network with one encoder pass per branch, for comparison only."""

    def encode_branches(self, clean: torch.Tensor, masked: torch.Tensor) -> tuple:
        return self.encoder.encode(clean, self.taps), self.encoder.encode(masked, self.taps)


def _training_step(batch_size: int, two_passes: bool = False) -> Callable[..., None]:
    """Return a whole training step: forward, backward, clipping, AdamW."""
    module = EMIMPretrain(channels=_CHANNELS, image_size=[96, 96, 96])
    module.configure_model()
    if two_passes:
        module.network.__class__ = _TwoPasses
    optimizer = torch.optim.AdamW(param_groups(module), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.rand(batch_size, 4, 96, 96, 96, generator=generator),
        "modality_mask": torch.ones(batch_size, 4, dtype=torch.bool),
        "key": torch.arange(batch_size),
    }
    module.train()

    def step(bfloat16: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            loss = module.total(module.step(batch, sync=False).losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _count(step: Callable[[], None]) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def training_step() -> list[Row]:
    """Compare the step with the matrix-product peak and with bfloat16, at the configured batch; report its memory."""
    step = _training_step(batch_size=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    operations = _count(step)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    product, product_operations = matrix_products(count=1)
    bfloat16 = supports_bfloat16("cpu")
    # Products on both sides of the steps that are held against them, and each precision for several steps on end, as
    # a training has it: a shared machine's clock drifts by a fifth within a minute.
    turns: list[Callable[[], None]] = [product, step, product, *([partial(step, bfloat16=True)] if bfloat16 else [])]
    before_step, single, after_step, *half = in_turn(*turns, rounds=4, calls=3)
    around = [(a + b) / 2 for a, b in zip(before_step, after_step, strict=True)]
    share = speedup(around, single) * operations / product_operations
    peak = product_operations / statistics.median(around)
    detail = f"ViT-B, 96^3, batch 4: {operations / 1e9:.0f} GFLOP a step, torch.mm {peak / 1e9:.0f} GFLOP/s"
    best = f"best single product {product_operations / min(before_step + after_step) / 1e9:.0f} GFLOP/s"
    size = f"{before / 2**20:.2f} GiB before it"
    return [
        Row("training step, share of the fp32 torch.mm peak", share, 0.75, f"{detail}, {best}", ""),
        Row("training step, bf16 against fp32", speedup(single, half[0]), 2.3)
        if half
        else Row("training step, bf16 against fp32", None, 2.3, "this CPU has neither avx512_bf16 nor AMX"),
        Row("training step, peak memory in fp32", memory / 2**20, None, size, "GiB"),
    ]


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


ROWS: list[Callable[[], list[Row]]] = [training_step, stacked_branches, attention_step]
