"""The speed of masked record modeling's training step: the configured networks, one device's share of the batch."""

from collections.abc import Callable
from functools import partial

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
    vocabulary = {"size": _VOCABULARY, "length": _TOKENS}
    module.build(InputSpec(("red", "green", "blue"), (448, 448), vocabulary=vocabulary))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, _VOCABULARY, (_BATCH, _TOKENS), generator=generator)
    hidden = torch.rand(ids.shape, generator=generator) < 0.5
    batch = {
        "image": torch.rand(_BATCH, 1, 448, 448, generator=generator),
        "modality_mask": torch.ones(_BATCH, 2, dtype=torch.bool),
        "key": torch.arange(_BATCH),
        "input_ids": ids.masked_fill(hidden, 3),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~hidden, -100),
        "hidden_index": hidden.flatten().nonzero()[:, 0],
        "hidden_ids": ids[hidden],
    }
    return training_rows(training_step(module, batch, clip=None), f"ViT-B, 448 to 224 pixels, batch {_BATCH}")


ROWS: list[Callable[[], list[Row]]] = [configured_step]
