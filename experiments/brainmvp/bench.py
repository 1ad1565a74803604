"""The speed of BrainMVP's training step, where its time goes, and the best memory layouts."""

import resource
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.blocks.depthwise import DepthwiseConv3d
from common.blocks.template_bank import TemplateBank
from common.blocks.uniformer import UniFormer3D
from common.cli import supports_bfloat16
from common.modalities import TEMPLATES
from common.sweeps.bench import Row, in_turn, one_thread, seconds, speedup, training_step
from common.types import InputSpec
from experiments.brainmvp.module import BrainMVPPretrain

_ATLAS = (240, 240, 155)
#: Memory that the full-size step may use at the paper's batch per device.
_GIB = 24


def _module(size: int, **encoder: Any) -> BrainMVPPretrain:
    module = BrainMVPPretrain(encoder=partial(UniFormer3D, **encoder), template_shape=_ATLAS)
    module.build(InputSpec(TEMPLATES, (size,) * 3))
    return module


def _batch(count: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image, partner = (torch.rand(count, 1, size, size, size, generator=generator) for _ in range(2))
    return {
        "image": image,
        "partner": partner,
        "paired": torch.ones(count, dtype=torch.bool),
        "modality": torch.arange(count) % 8,
        "partner_modality": (torch.arange(count) + 1) % 8,
        "place": [(index % 8, 60, 70, 20) for index in range(count)],
        "key": torch.arange(count),
    }


def example(data: Mapping[str, Any], count: int) -> tuple[InputSpec, dict[str, Any]]:
    """Return what the data promise, and a batch, for ``data`` settings of a configuration."""
    size = tuple((data.get("crops") or {}).get("size") or (96, 96, 96))
    return InputSpec(TEMPLATES, size, preprocessing={"atlas": list(data.get("atlas") or _ATLAS)}), _batch(
        count, size[0]
    )


def full_size_step() -> list[Row]:
    """Take the paper's step on one device, in fp32, and hold its memory against a card of 24 GiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = _module(96, recompute_stages=2)
    step = training_step(module, _batch(3, 96))

    def whole() -> None:
        step()
        module.network.templates.step(1e-4, (96, 96, 96))

    whole()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    detail = f"UniFormer-S, 96^3, batch 3, both views, templates and moments; {before / 2**20:.2f} GiB before it"
    return [
        Row("training step, peak memory in fp32", memory, None, detail, "GiB"),
        Row("room left below 24 GiB", _GIB / memory, 1.0),
    ]


def _stopwatch(module: nn.Module, spent: dict[str, float], name: str) -> None:
    """Add the seconds of a module's forward passes to ``spent[name]`` from now on."""
    forward = module.forward

    def timed(x: Tensor) -> Tensor:
        begin = time.perf_counter()
        result = forward(x)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin
        return result

    module.forward = timed


def step_shares() -> list[Row]:
    """Report which share of a forward pass each stage has, and which share of a step the templates' update."""
    module = _module(48)
    step = training_step(module, _batch(1, 48))
    step()
    module.network.templates.forget()
    total = seconds(step)
    update = seconds(lambda: module.network.templates.step(1e-4, (48, 48, 48)))
    rows = [
        Row("templates, crop-sparse update, share of a step", update / (total + update), None, "a crop of 48^3", "")
    ]
    spent: dict[str, float] = {}
    for stage in (1, 2, 3, 4):
        for block in module.network.encoder.get_submodule(f"blocks{stage}").children():
            _stopwatch(block, spent, f"stage {stage}")
    _stopwatch(module.network.decoder, spent, "decoder")
    views = torch.rand(2, 1, 48, 48, 48)
    with torch.no_grad():
        forward = seconds(lambda: module.network.decoder(module.network.encoder(views)))
    return rows + [Row(f"forward pass, share of {name}", part / forward, None, "48^3, fp32", "")
                   for name, part in spent.items()]  # fmt: skip


def _convolve(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    y.backward(torch.ones_like(y))


def depthwise_layout() -> list[Row]:
    """Compare depth-wise convolutions channels-first, channels-last, and with a backward pass of our own, in fp32."""
    rows = []
    for kernel in (3, 5):
        first, last = (nn.Conv3d(64, 64, kernel, padding=kernel // 2, groups=64) for _ in range(2))
        ours = DepthwiseConv3d(64, kernel)
        x = torch.randn(1, 64, 24, 24, 24, requires_grad=True)
        y = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        for layer in (last, ours):
            layer.to(memory_format=torch.channels_last_3d)
        with one_thread():
            with torch.no_grad():
                slow, fast = in_turn(partial(first, x), partial(last, y), rounds=5)
            rows.append(Row(f"depth-wise {kernel}^3, channels-last against channels-first", speedup(slow, fast), 1.0,
                            "forward, 64 channels of 24^3"))  # fmt: skip
            slow, fast = in_turn(partial(_convolve, last, y), partial(_convolve, ours, y), rounds=5)
        rows.append(Row(f"depth-wise {kernel}^3, our backward pass against oneDNN's", speedup(slow, fast), 1.0,
                        "forward and backward, channels-last"))  # fmt: skip
    return rows


def whole_layout() -> list[Row]:
    """Compare a whole training step of the encoder in both layouts."""
    steps = []
    for layout in (False, True):
        encoder = UniFormer3D(1, (48, 48, 48), channels_last=layout)
        x = torch.rand(1, 1, 48, 48, 48)

        def step(encoder: UniFormer3D = encoder, x: Tensor = x) -> None:
            encoder(x).square().mean().backward()

        steps.append(step)
    slow, fast = in_turn(*steps, rounds=3)
    return [Row("UniFormer-S forward and backward, channels-last against channels-first", speedup(slow, fast), 1.0,
                "48^3, fp32")]  # fmt: skip


def attention_layout() -> list[Row]:
    """Compare the fused kernel with plain products at the 1,728 tokens of stage 3."""
    q, k, v = (torch.randn(1, 5, 1728, 64, requires_grad=True) for _ in range(3))

    def plain() -> None:
        (((q * 64**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).sum().backward()

    def fused() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    slow, fast = in_turn(plain, fused, rounds=5)
    return [Row("attention at 1,728 tokens, fused against plain products, fp32", speedup(slow, fast), 1.0)]


def sparse_templates() -> list[Row]:
    """Compare the crop-sparse update with AdamW over all templates, at the paper's sizes."""
    bank, size = TemplateBank(8, _ATLAS), (96, 96, 96)
    dense = nn.Parameter(torch.zeros(8, *_ATLAS))
    dense.grad = torch.zeros_like(dense)
    optimizer = torch.optim.AdamW([dense], lr=1e-4, fused=True)
    places = [(index, 60, 70, 20) for index in range(3)]

    def look() -> None:
        bank.view(places, size, track=True).square().sum().backward()

    def sparse() -> None:
        look()
        bank.step(1e-4, size)

    def whole() -> None:
        look()
        bank.forget()
        optimizer.step()

    slow, fast = in_turn(whole, sparse, rounds=5)
    return [Row("templates, crop-sparse update against dense AdamW", speedup(slow, fast), 1.0, "3 crops of 96^3")]


def mixed_precision() -> list[Row]:
    """Compare a training step in bfloat16 with one in float32."""
    if not supports_bfloat16("cpu"):
        return [Row("training step, bf16 against fp32", None, None, "no bf16 instructions")]
    encoder = UniFormer3D(1, (48, 48, 48))
    x = torch.rand(2, 1, 48, 48, 48)

    def step(low: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            loss = encoder(x).float().square().mean()
        loss.backward()

    slow, fast = in_turn(partial(step, False), partial(step, True), rounds=3)
    return [Row("UniFormer-S forward and backward, bf16 against fp32", speedup(slow, fast), None, "48^3")]


ROWS: list[Callable[[], list[Row]]] = [
    step_shares,
    depthwise_layout,
    whole_layout,
    attention_layout,
    sparse_templates,
    mixed_precision,
    full_size_step,
]
