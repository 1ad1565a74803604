"""Image encoders with a class token in the formats of timm and transformers."""

from common.checkpoint import StoredEncoder
from common.errors import UserError
from common.weights.export import Exported, Writer
from common.weights.timm_keys import hf_config, timm_config, to_hf, to_timm

_TIMM = """import json
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

encoder = VisionTransformer(**json.load(open("config.json"))["arguments"])
encoder.load_state_dict(load_file("model.safetensors"))
features = encoder(images)  # mean of the normalised patch tokens; images standardised as the card says"""

_HF = """import json
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

config = ViTConfig(**json.load(open("config.json"))["arguments"])
encoder = ViTModel(config, add_pooling_layer=False)
encoder.load_state_dict(load_file("model.safetensors"))
tokens = encoder(images).last_hidden_state  # the class token first; images standardised as the card says"""


def to_timm_format(stored: StoredEncoder) -> Exported:
    """Write the encoder for timm.

    Raises:
        UserError: timm has no encoder of this form.
    """
    try:
        return Exported(to_timm(stored.state, stored.init_args), timm_config(stored.init_args), _TIMM)
    except ValueError as error:
        raise UserError(str(error)) from error


def to_hf_format(stored: StoredEncoder) -> Exported:
    """Write the encoder for transformers.

    Raises:
        UserError: transformers has no encoder of this form.
    """
    try:
        return Exported(to_hf(stored.state, stored.init_args), hf_config(stored.init_args), _HF)
    except ValueError as error:
        raise UserError(str(error)) from error


FORMATS: dict[str, Writer] = {"timm": to_timm_format, "hf": to_hf_format}
