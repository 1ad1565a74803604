"""``medmim convert``: weights of MAE, of timm or of published code as an encoder that fine-tuning can start from.

An experiment whose published weights are not a ViT provides ``convert.py`` with ``read_weights(path)``, which returns a
:class:`common.checkpoint.StoredEncoder`, and ``FORMAT``, the format it is kept in.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from common.blocks.registry import build_encoder, class_path
from common.blocks.vit import VisionTransformer
from common.checkpoint import StoredEncoder, read_foreign, transfer_encoder
from common.errors import CheckpointError
from common.runtime.experiments import experiment_module
from common.runtime.reporting import print_line
from common.weights.export import formats_of, write_export

#: Width of a head in every published ViT.
_HEAD_WIDTH = 64
_CHANNELS = ["red", "green", "blue"]


def architecture(state: dict[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """Infer a ViT's arguments from its weights.

    Args:
        state: Weights under our names.
        num_heads: Attention heads, which no shape shows; None: heads of 64.

    Raises:
        CheckpointError: the patches are not those of a square image of three channels, or the heads do not divide.
    """
    width, values = state["patch_embed.proj.weight"].shape
    patch, side = math.isqrt(values // len(_CHANNELS)), math.isqrt(state["pos_embed"].shape[1])
    if len(_CHANNELS) * patch**2 != values or side**2 != state["pos_embed"].shape[1]:
        raise CheckpointError(f"The weights are not those of square images of three channels: {values} values a patch, "
                              f"{state['pos_embed'].shape[1]} patches.")  # fmt: skip
    heads = num_heads or width // _HEAD_WIDTH
    if heads < 1 or width % heads:
        raise CheckpointError(f"The width {width} does not divide into {heads} heads: give --num-heads.")
    return {
        "in_channels": len(_CHANNELS),
        "image_size": [side * patch, side * patch],
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": "cls_token" in state,
        "norm_eps": 1e-6,
    }


def run(exp: str, weights: str, out: str, num_heads: int | None) -> None:
    """Carry out ``medmim convert``, whose help explains the arguments, and report the keys that were not used.

    Raises:
        CheckpointError: the file holds no ViT, or an incomplete one.
    """
    formats_of(exp)
    if (module := experiment_module(exp, "convert")) is not None:
        stored = module.read_weights(Path(weights))
        where = write_export(stored, exp, module.FORMAT, Path(out), Path(weights).name)
        print_line(f"converted to {where}")
        return
    state = read_foreign(weights)
    if "pos_embed" not in state:
        raise CheckpointError(f"{weights} holds no position table.")
    arguments = architecture(state, num_heads)
    path = class_path(VisionTransformer)
    encoder = build_encoder(path, arguments)
    report = transfer_encoder(StoredEncoder(path, arguments, state, _CHANNELS, {}), encoder)
    print_line(report)
    if report.missing:
        raise CheckpointError(f"{weights} lacks {', '.join(report.missing)}: no whole encoder can be made of it.")
    whole = StoredEncoder(path, arguments, encoder.state_dict(), _CHANNELS, {"source": Path(weights).name})
    print_line(f"converted to {write_export(whole, exp, 'timm', Path(out), Path(weights).name)}")
