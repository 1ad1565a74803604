"""Image encoders with a class token in the formats of timm and transformers."""

from common.weights.export import Writer, renaming_writer
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

FORMATS: dict[str, Writer] = {
    "timm": renaming_writer(to_timm, timm_config, _TIMM),
    "hf": renaming_writer(to_hf, hf_config, _HF),
}
