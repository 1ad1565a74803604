"""The speed of masked record modeling's training step: the configured networks, one device's share of the batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from common.blocks.decoder import MAEDecoder
from common.blocks.vit import VisionTransformer
from common.sweeps.bench import Row, training_rows, training_step
from common.types import InputSpec
from experiments.mrm_record.module import MRMPretrain

#: 256 radiographs of 448 pixels in total, as configured, on eight devices.
_BATCH, _TOKENS, _VOCABULARY = 32, 100, 30000


def configured_step() -> list[Row]:
    """Hold the step against matrix products and bfloat16; half of the report's words are hidden."""
    module = MRMPretrain(
        encoder=partial(VisionTransformer, qkv_bias=True, pos_embed="sincos", class_token=True, norm_eps=1e-6),
        decoder=partial(MAEDecoder, decoder_dim=768, depth=4, num_heads=6, num_prefix_tokens=1, norm_eps=1e-6),
    )
    spec, batch = example({}, _BATCH)
    module.build(spec)
    return training_rows(training_step(module, batch, clip=None), f"ViT-B, 448 to 224 pixels, batch {_BATCH}")


def example(data: Mapping[str, Any], count: int) -> tuple[InputSpec, dict[str, Any]]:
    """Return what the data promise, and a batch with half of its words hidden, for ``data`` settings."""
    size = tuple((data.get("image") or {}).get("size") or (448, 448))
    length = int((data.get("text") or {}).get("length") or _TOKENS)
    vocabulary = {"size": _VOCABULARY, "length": length}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, _VOCABULARY, (count, length), generator=generator)
    hidden = (torch.arange(ids.numel()) % 2 == 1).view(ids.shape)
    batch = {
        "image": torch.rand(count, 1, *size, generator=generator),
        "modality_mask": torch.ones(count, 2, dtype=torch.bool),
        "key": torch.arange(count),
        "input_ids": ids.masked_fill(hidden, 3),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~hidden, -100),
        "hidden_index": hidden.flatten().nonzero()[:, 0],
        "hidden_ids": ids[hidden],
    }
    return InputSpec(("red", "green", "blue"), size, vocabulary=vocabulary), batch


ROWS: list[Callable[[], list[Row]]] = [configured_step]
