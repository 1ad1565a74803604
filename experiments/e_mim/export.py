"""E-MIM's encoder for other libraries."""

from common.weights.export import Writer, renaming_writer
from common.weights.monai_keys import monai_config, to_monai

_USAGE = """
import json
from monai.networks.nets import ViT
from safetensors.torch import load_file

encoder = ViT(**json.load(open("config.json"))["arguments"])
encoder.load_state_dict(load_file("model.safetensors"))
tokens, hidden = encoder(volume)  # volume: (batch, channels, *input size), preprocessed as above, axes R, A, S
"""

#: ``monai.networks.nets.ViT``; loads strictly, also as ``UNETR.vit``.
FORMATS: dict[str, Writer] = {"monai": renaming_writer(to_monai, monai_config, _USAGE)}
