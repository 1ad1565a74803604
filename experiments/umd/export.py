"""Format of an exported encoder: both towers for transformers, the fusion as plain tensors."""

from common.blocks.registry import build_encoder
from common.checkpoint import StoredEncoder
from common.errors import UserError
from common.weights.export import Exported, Part, Writer
from experiments.umd.encoder import UMDEncoder

_HF = """from safetensors.torch import load_file
from transformers import CLIPVisionModel, RobertaModel

vision = CLIPVisionModel.from_pretrained("vision").eval()
text = RobertaModel.from_pretrained("text", add_pooling_layer=False).eval()
fusion = load_file("model.safetensors")  # projections, type embedding, co-attention layers and poolers by name
tokens = vision.post_layernorm(vision(images).last_hidden_state)  # class token first; images standardised as above
words = text(input_ids, attention_mask=attention_mask).last_hidden_state  # tokenizer.json makes the ids"""


def to_hf_format(stored: StoredEncoder) -> Exported:
    """Write ``vision/`` and ``text/`` for transformers, and the rest as ``model.safetensors``.

    Raises:
        UserError: the encoder is another experiment's.
    """
    encoder = build_encoder(stored.class_path, stored.init_args)
    if not isinstance(encoder, UMDEncoder):
        raise UserError(f"The checkpoint holds a {type(encoder).__name__}, no encoder of images and texts.")
    prefixes = {"vision": "vision.clip.", "text": "text.roberta."}
    configs = {"vision": encoder.vision.clip.config, "text": encoder.text.roberta.config}
    parts = {
        name: Part(
            {key.removeprefix(prefix): value for key, value in stored.state.items() if key.startswith(prefix)},
            configs[name].to_dict() | {"architectures": [type(encoder.get_submodule(prefix[:-1])).__name__]},
        )
        for name, prefix in prefixes.items()
    }
    rest = {key: value for key, value in stored.state.items() if not key.startswith(tuple(prefixes.values()))}
    return Exported(rest, dict(stored.init_args), _HF, parts=parts)


FORMATS: dict[str, Writer] = {"hf": to_hf_format}
