"""Weights of :class:`common.blocks.vit.VisionTransformer` in the names of ``monai.networks.nets.ViT``, and back.

The pair is exact for MONAI's ``proj_type='conv'``, ``pos_embed_type='learnable'``, ``classification=False``. MONAI's
blocks own a ``norm_cross_attn`` that self-attention never uses; it is written as a fresh LayerNorm and skipped on the
way back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.blocks.patch_embed import conv_to_linear, linear_to_conv, patch_sides
from common.weights.names import renamed, weight_names

_NAMES = weight_names(
    {"patch_embed.proj": "patch_embedding.patch_embeddings", "norm": "norm"},
    {"attn.qkv": "attn.qkv", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.linear1", "mlp.fc2": "mlp.linear2",
     "norm1": "norm1", "norm2": "norm2"},
) | {"pos_embed": "patch_embedding.position_embeddings"}  # fmt: skip
_PATCHES = _NAMES["patch_embed.proj.weight"]


def monai_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make MONAI's ViT of the same shape from our encoder's ``config``."""
    dims = len(config["image_size"])
    return {
        "in_channels": config["in_channels"],
        "img_size": list(config["image_size"]),
        "patch_size": list(patch_sides(config["patch_size"], dims)),
        "hidden_size": config["embed_dim"],
        "mlp_dim": int(config["embed_dim"] * config["mlp_ratio"]),
        "num_layers": config["depth"],
        "num_heads": config["num_heads"],
        "proj_type": "conv",
        "pos_embed_type": "learnable",
        "classification": False,
        "spatial_dims": dims,
        "qkv_bias": config["qkv_bias"],
    }


def to_monai(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename an encoder's weights for ``monai.networks.nets.ViT(**monai_config(config))``; loads strictly.

    Raises:
        ValueError: positions are fixed sine-cosine, which MONAI computes in another order, or MONAI lacks a weight.
    """
    if config.get("pos_embed", "learnable") != "learnable":
        raise ValueError("Only encoders with learnable positions can be exported to MONAI; this one has "
                         f"{config['pos_embed']}.")  # fmt: skip
    target = monai_config(config)
    result = {renamed(key, _NAMES): value for key, value in state.items()}
    result[_PATCHES] = linear_to_conv(result[_PATCHES], target["in_channels"], target["patch_size"])
    width = state["norm.weight"]
    for index in range(config["depth"]):
        result[f"blocks.{index}.norm_cross_attn.weight"] = torch.ones_like(width)
        result[f"blocks.{index}.norm_cross_attn.bias"] = torch.zeros_like(width)
    return result


def from_monai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of MONAI's ViT (or of ``UNETR.vit``) for our encoder; loads strictly.

    Raises:
        ValueError: a key does not belong to MONAI's ViT.
    """
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if "cross_attn" in key:
            continue
        try:
            result[renamed(key, names)] = conv_to_linear(value) if key == _PATCHES else value
        except ValueError:
            raise ValueError(f"{key!r} is not a weight of MONAI's ViT without a classification head.") from None
    return result
