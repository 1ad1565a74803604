"""The cost of a step of MR-Pretrain, part by part, and the gain of computing the same with less."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.blocks.co_attention import PostNormAttention
from common.blocks.decoder import MAEDecoder
from common.sweeps.bench import Row, in_turn, speedup, training_rows, training_step
from common.types import ImageTextBatch, InputSpec
from experiments.umd.encoder import UMDEncoder
from experiments.umd.module import UMDPretrain
from experiments.umd.pretrain_network import whole_text
from experiments.umd.towers import TowerConfig

_TOKENS, _VOCABULARY, _HIDDEN = 64, 50265, 10
_SMALLER = {"vision": TowerConfig(384, 11, 6), "text": TowerConfig(384, 12, 6), "dim": 384, "fusion_heads": 6}


def _module(side: int, **sizes: Any) -> UMDPretrain:
    module = UMDPretrain(
        encoder=partial(UMDEncoder, **sizes),
        decoder=partial(MAEDecoder, decoder_dim=384, depth=4, num_heads=6, num_prefix_tokens=1, quick_gelu=True),
    )
    vocabulary = {"size": _VOCABULARY, "length": _TOKENS, "pad_id": 1}
    module.build(InputSpec(("red", "green", "blue"), (side, side), vocabulary=vocabulary))
    return module


def _batch(count: int, side: int) -> ImageTextBatch:
    """Make images with texts of 64 tokens, ten of them hidden."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, _VOCABULARY - 1, (count, _TOKENS), generator=generator)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 1 : 1 + _HIDDEN] = True
    return {
        "image": torch.rand(count, 3, side, side, generator=generator),
        "modality_mask": torch.ones(count, 2, dtype=torch.bool),
        "key": torch.arange(count),
        "image_key": torch.arange(count),
        "input_ids": ids.masked_fill(hidden, _VOCABULARY - 1),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~hidden, -100),
        "hidden_index": hidden.flatten().nonzero()[:, 0],
        "hidden_ids": ids[hidden],
    }


def example(data: Mapping[str, Any], count: int) -> tuple[InputSpec, ImageTextBatch]:
    """Return what the data promise, and a batch, for ``data`` settings of a configuration."""
    side = int((data.get("image") or {}).get("size", (384, 384))[0])
    vocabulary = {"size": _VOCABULARY, "length": _TOKENS, "pad_id": 1}
    return InputSpec(("red", "green", "blue"), (side, side), vocabulary=vocabulary), _batch(count, side)


def _operations(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def full_size_step() -> list[Row]:
    """Hold the configured networks' step at batch 1 and 384 pixels against matrix products; report its memory."""
    module = _module(384)
    step = training_step(module, _batch(1, 384), clip=None)
    rows = training_rows(step, "ViT-B/16 and RoBERTa-base, 384 pixels, batch 1", calls=1)
    memory = next(row for row in rows if row.unit == "GiB")
    fits = Row("full-size step, memory left of 24 GiB", 24 - (memory.value or 0), 0.0, "batch 1, fp32", "GiB")
    return [*rows, fits]


def cost_by_part() -> list[Row]:
    """Share of the operations and of the time of a step that each pass takes; half the width, 192 pixels, batch 4."""
    module, batch = _module(192, **_SMALLER), _batch(4, 192)
    network, text = module.network, whole_text(batch)
    module.train()

    def masked() -> None:
        mask = module.draw_mask(batch)
        fused = network.student(batch, mask)
        decoded = network.decoder.proj(network.decode(fused, mask, mask.hidden_index()))
        (decoded.square().mean() + network.words(fused, batch["hidden_index"]).square().mean()).backward()

    def teacher() -> None:
        with torch.no_grad():
            network.teacher_features(batch, text)

    def matching() -> None:
        network.match(batch["image"], text, batch["attention_mask"]).square().mean().backward()

    parts = {"masked student": masked, "teacher": teacher, "image-text matching": matching}
    operations = {name: _operations(part) for name, part in parts.items()}
    times = dict(zip(parts, in_turn(*parts.values(), rounds=3), strict=True))
    spent = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return [
        Row(f"step, share of {name}", operations[name] / sum(operations.values()), None,
            f"of the operations; {spent[name] / sum(spent.values()):.2f} of the time", "")
        for name in parts
    ]  # fmt: skip


def same_with_less() -> list[Row]:
    """Fused attention, the text head at hidden positions only, features of a pool computed once."""
    block = PostNormAttention(384, 6, dropout=0.0)
    x, context = torch.randn(4, 577, 384), torch.randn(4, 577, 384)

    def plain() -> Tensor:
        mixed = block.weights(x, context) @ block._heads(block.value(context))
        return block.norm(x + block.proj(mixed.transpose(1, 2).flatten(2)))

    assert torch.allclose(plain(), block(x, context), atol=1e-4)
    slow, fast = in_turn(lambda: plain().sum().backward(), lambda: block(x, context).sum().backward(), rounds=3)
    rows = [Row("co-attention of 577 tokens, fused against plain", speedup(slow, fast), 1.0)]
    module, batch = _module(192, **_SMALLER), _batch(4, 192)
    fused = module.network.student(batch, module.draw_mask(batch))
    tokens = fused.text.detach()

    def head(index: Tensor) -> None:
        module.network.mlm_head(tokens.flatten(0, 1)[index]).sum().backward()

    everywhere = torch.arange(tokens.shape[0] * tokens.shape[1])
    slow, fast = in_turn(partial(head, everywhere), partial(head, batch["hidden_index"]), rounds=3)
    rows.append(Row("text head, hidden positions against all", speedup(slow, fast), 1.0, f"{_HIDDEN} of {_TOKENS}"))
    return [*rows, _cached_features(module.network.encoder.eval(), batch)]


def _cached_features(encoder: UMDEncoder, batch: ImageTextBatch) -> Row:
    """Score 4 x 4 pairs from cached features before the fusion, and by recomputing everything."""
    ids, mask, images = whole_text(batch), batch["attention_mask"], batch["image"]
    count = len(ids)

    def anew() -> Tensor:
        rows = [encoder.pool(encoder(images, ids[i : i + 1].expand(count, -1), mask), mask)[0] for i in range(count)]
        return torch.stack(rows)

    def kept() -> Tensor:
        image, text = encoder.encode_image(images), encoder.encode_text(ids, mask)
        own_text, own_image = encoder.fusion.attend_selves(text, image, mask.bool())
        rows = []
        for i in range(count):
            one, own = (part[i : i + 1].expand(count, -1, -1) for part in (text, own_text))
            rows.append(encoder.pool(encoder.fuse(one, image, mask, (own, own_image)), mask)[0])
        return torch.stack(rows)

    with torch.no_grad():
        assert torch.allclose(anew(), kept(), atol=1e-5)
        slow, fast = in_turn(anew, kept, rounds=3)
    return Row("pool of 4 x 4 pairs, kept features against none", speedup(slow, fast), 1.0, "more for larger pools")


ROWS: list[Callable[[], list[Row]]] = [cost_by_part, same_with_less, full_size_step]
