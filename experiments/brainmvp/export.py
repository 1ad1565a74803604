"""BrainMVP's encoder for others: as a ``torch.export`` program, and with all else under the released names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.blocks.registry import build_encoder
from common.blocks.template_bank import TemplateBank
from common.checkpoint import StoredEncoder, stored_encoder
from common.files import whole_file
from common.weights.export import Exported, Writer
from common.weights.files import read_tensors
from common.weights.uniformer_keys import from_released, to_released

_PROGRAM = """
import torch

encoder = torch.export.load("model.pt2").module()
features = encoder(volume)  # volume: (batch, 1, *input size), one sequence in [0, 1], preprocessed as above
"""
_RELEASED = """
from safetensors.torch import load_file

state_dict = load_file("model.safetensors")  # the keys of BrainMVP's released checkpoints
"""


def normalized_templates(rest: Mapping[str, Tensor]) -> Tensor | None:
    """Return the templates ``(S, H, W, D)`` in [0, 1] from the weights beside an encoder; None where there are none."""
    if "templates" in rest:  # released: as they were trained
        weight = rest["templates"].float()
        low, high = weight.flatten(1).aminmax(dim=1)
    elif "templates.weight" in rest:
        weight, (low, high) = rest["templates.weight"].float(), rest["templates.extremes"].float().T
    else:
        return None
    scale = (high - low).clamp(min=TemplateBank.MIN_RANGE)
    return (weight - low[:, None, None, None]) / scale[:, None, None, None]


def to_program(stored: StoredEncoder) -> Exported:
    """Trace the encoder for crops of its size and any number of them."""
    encoder: Any = build_encoder(stored.class_path, stored.init_args)
    encoder.load_state_dict(stored.state)
    volume = torch.zeros(2, stored.init_args["in_channels"], *stored.init_args["image_size"])
    program = torch.export.export(encoder.eval(), (volume,), dynamic_shapes=({0: torch.export.Dim("batch")},))

    def save(folder: Path) -> None:
        with whole_file(folder / "model.pt2") as temporary:
            torch.export.save(program, temporary)

    return Exported(stored.state, stored.init_args, _PROGRAM, save)


def to_published(stored: StoredEncoder) -> Exported:
    """Rename encoder, decoder and templates, these stretched to [0, 1], as the authors' checkpoints have them."""
    state = {f"encoder.{name}": value for name, value in stored.state.items()}
    state |= {name: value for name, value in stored.rest.items() if name.startswith("decoder.")}
    templates = normalized_templates(stored.rest)
    if templates is not None:
        state["templates"] = templates
    return Exported(to_released(state), stored.init_args, _RELEASED)


def read_published(folder: Path, config: Mapping[str, Any]) -> StoredEncoder:
    """Read back what :func:`to_published` wrote."""
    state, _ = from_released(read_tensors(folder / "model.safetensors"))
    encoder = {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
    rest = {name: value for name, value in state.items() if not name.startswith("encoder.")}
    return stored_encoder(config["encoder"], config, encoder, folder, rest)


FORMATS: dict[str, Writer] = {"torch": to_program, "released": to_published}
READERS: dict[str, Callable[[Path, Mapping[str, Any]], StoredEncoder]] = {"released": read_published}
