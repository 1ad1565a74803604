"""Weights of :class:`common.blocks.vit.VisionTransformer` in the names of timm's and transformers' ViT, and back.

timm's ViT gives its class token the first row of the position table; ours has no position for it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.blocks.patch_embed import conv_to_linear, linear_to_conv, patch_sides
from common.weights.names import renamed, weight_names

_TIMM_EPS = 1e-6
_WRAPPERS = ("model", "state_dict", "teacher")
_PREFIXES = ("module.", "encoder.", "backbone.")


def timm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``timm.models.VisionTransformer`` for the same shape as our encoder's ``config``.

    Raises:
        ValueError: the encoder is not one of images, or its LayerNorms have another epsilon than timm's.
    """
    if len(config["image_size"]) != 2:
        raise ValueError(f"timm's ViT takes images, not inputs of {list(config['image_size'])}.")
    if config["norm_eps"] != _TIMM_EPS:
        raise ValueError(f"timm's ViT has a LayerNorm epsilon of {_TIMM_EPS:g}, not {config['norm_eps']:g}.")
    return {
        "img_size": list(config["image_size"]),
        "patch_size": list(patch_sides(config["patch_size"], 2)),
        "in_chans": config["in_channels"],
        "embed_dim": config["embed_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "qkv_bias": config["qkv_bias"],
        "class_token": bool(config.get("class_token")),
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
    }


def to_timm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename an encoder's weights for timm; loads strictly into ``VisionTransformer(**timm_config(config))``.

    Biases that our encoder lacks (``qkv_bias=False``) are not written: timm's counterpart lacks them too.
    """
    result = dict(state)
    patch, weight = patch_sides(config["patch_size"], len(config["image_size"])), result["patch_embed.proj.weight"]
    result["patch_embed.proj.weight"] = linear_to_conv(weight, config["in_channels"], patch)
    if config.get("class_token"):
        positions = result["pos_embed"]
        result["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return result


def from_timm(loaded: Mapping[str, Any], class_token: bool = True) -> dict[str, Tensor]:
    """Rename the weights of a timm ViT, of MAE or of the published code of masked record modeling for our encoder.

    Args:
        loaded: A state dict, as it is or under ``model`` or ``state_dict``.
        class_token: Whether our encoder has a class token; else the file's is dropped.

    Returns:
        The encoder's part of the file. Keys of decoders and heads are kept as they are, so that what was not used can
        be reported. The position of the class token, if it is not 0, is added to the token.

    Raises:
        ValueError: the file holds no patch embedding of a ViT.
    """
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    state = {re.sub(rf"^(?:{'|'.join(map(re.escape, _PREFIXES))})+", "", key): value for key, value in loaded.items()}
    key = "patch_embed.proj.weight"
    if key not in state or not hasattr(state[key], "ndim"):
        raise ValueError("It has no patch_embed.proj.weight, so it is not a ViT of timm or MAE.")
    if state[key].ndim > 2:
        state[key] = conv_to_linear(state[key])
    if "cls_token" in state and "pos_embed" in state:
        first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
        state["pos_embed"], state["cls_token"] = rest, state["cls_token"] + first
        if not class_token:
            state.pop("cls_token")
    return state


_HF_NAMES = weight_names(
    {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
    {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "norm1": "layernorm_before",
     "norm2": "layernorm_after"},
    "layers",
) | {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}  # fmt: skip


def hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of transformers' ``ViTConfig`` for the same shape as our encoder's ``config``.

    Raises:
        ValueError: transformers' ViT cannot represent it: it needs square patches and a class token.
    """
    patch = patch_sides(config["patch_size"], len(config["image_size"]))
    if not config.get("class_token") or len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError("transformers' ViT needs square patches of an image and a class token.")
    return {
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": int(config["embed_dim"] * config["mlp_ratio"]),
        "image_size": list(config["image_size"]),
        "patch_size": patch[0],
        "num_channels": config["in_channels"],
        "qkv_bias": config["qkv_bias"],
        "layer_norm_eps": config["norm_eps"],
    }


def to_hf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename an encoder's weights for transformers; loads strictly into ``ViTModel(..., add_pooling_layer=False)``."""
    result: dict[str, Tensor] = {}
    for key, value in to_timm(state, config).items():
        if ".attn.qkv." in key:
            _, index, _, _, kind = key.split(".")
            for name, piece in zip("qkv", value.chunk(3), strict=True):
                result[f"layers.{index}.attention.{name}_proj.{kind}"] = piece
        else:
            result[renamed(key, _HF_NAMES)] = value
    return result
