"""E-MIM's encoder for other libraries."""

from common.checkpoint import StoredEncoder
from common.errors import UserError
from common.weights.export import Exported, Writer
from common.weights.monai_keys import monai_config, to_monai

_USAGE = """
import json
from monai.networks.nets import ViT
from safetensors.torch import load_file

encoder = ViT(**json.load(open("config.json"))["arguments"])
encoder.load_state_dict(load_file("model.safetensors"))
tokens, hidden = encoder(volume)  # volume: (batch, channels, *input size), preprocessed as above, axes R, A, S
"""


def to_monai_vit(stored: StoredEncoder) -> Exported:
    """Convert to ``monai.networks.nets.ViT``; loads strictly, also as ``UNETR.vit``.

    Raises:
        UserError: positions are fixed sine-cosine, which MONAI computes in another order.
    """
    if stored.init_args.get("pos_embed", "learnable") != "learnable":
        raise UserError("Only encoders with learnable positions can be exported to MONAI; this one has "
                        f"{stored.init_args['pos_embed']}.")  # fmt: skip
    return Exported(to_monai(stored.state, stored.init_args), monai_config(stored.init_args), _USAGE)


FORMATS: dict[str, Writer] = {"monai": to_monai_vit}
