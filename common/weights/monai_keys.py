"""Weights of :class:`common.blocks.vit.VisionTransformer` in the names of ``monai.networks.nets.ViT``, and back.

The pair is exact for MONAI's ``proj_type='conv'``, ``pos_embed_type='learnable'``, ``classification=False``. MONAI's
blocks own a ``norm_cross_attn`` that self-attention never uses; it is written as a fresh LayerNorm and skipped on the
way back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.blocks.patch_embed import conv_to_linear, linear_to_conv

_RENAMED = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.linear1",
    "mlp.fc2": "mlp.linear2",
    "norm1": "norm1",
    "norm2": "norm2",
}


def _rename_block(key: str, names: Mapping[str, str]) -> str:
    prefix, index, rest = key.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"{prefix}.{index}.{names[part]}.{kind}"


def monai_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make MONAI's ViT of the same shape from our encoder's ``config``."""
    dims = len(config["image_size"])
    patch = config["patch_size"]
    return {
        "in_channels": config["in_channels"],
        "img_size": list(config["image_size"]),
        "patch_size": [patch] * dims if isinstance(patch, int) else list(patch),
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
    """Rename an encoder's weights for ``monai.networks.nets.ViT(**monai_config(config))``; loads strictly."""
    target = monai_config(config)
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            result[_rename_block(key, _RENAMED)] = value
        elif key == "patch_embed.proj.weight":
            weight = linear_to_conv(value, target["in_channels"], target["patch_size"])
            result["patch_embedding.patch_embeddings.weight"] = weight
        elif key == "patch_embed.proj.bias":
            result["patch_embedding.patch_embeddings.bias"] = value
        elif key == "pos_embed":
            result["patch_embedding.position_embeddings"] = value
        else:
            result[key] = value
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
    names = {theirs: ours for ours, theirs in _RENAMED.items()}
    fixed = {
        "patch_embedding.patch_embeddings.weight": "patch_embed.proj.weight",
        "patch_embedding.patch_embeddings.bias": "patch_embed.proj.bias",
        "patch_embedding.position_embeddings": "pos_embed",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if "cross_attn" in key:
            continue
        if key not in fixed and not (key.startswith("blocks.") and key.split(".", 2)[2].rsplit(".", 1)[0] in names):
            raise ValueError(f"{key!r} is not a weight of MONAI's ViT without a classification head.")
        value = conv_to_linear(value) if key.endswith("patch_embeddings.weight") else value
        result[fixed.get(key) or _rename_block(key, names)] = value
    return result
