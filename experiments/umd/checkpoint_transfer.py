"""Checkpoint transfer from one stage to the next: encoder, heads, vocabulary."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from common.blocks.registry import build_recorded
from common.checkpoint import load_encoder, read_checkpoint
from common.errors import CheckpointError, UserError
from common.runtime.reporting import print_line
from common.types import InputSpec, TaskState
from experiments.umd.encoder import UMDEncoder

EncoderFactory = Callable[[Sequence[int], int, int], UMDEncoder]
#: Settings that are not tied to the weights, so each stage has its own.
_OF_THE_STAGE = ("dropout", "pool")
_HEADS = ("decoder.", "mlm_head.", "itm_head.", "project_")
#: Computed from the sizes, so it is rebuilt.
_FIXED = "decoder.pos_embed"


def tower_scale(name: str, rest: float, head: float | None = None) -> float:
    """Return a learning rate's factor by a parameter's name: 1 in towers, ``head`` in a task's head, else ``rest``."""
    if name.startswith(("network.encoder.vision.", "network.encoder.text.")):
        return 1.0
    return head if head is not None and name.startswith("network.head.") else rest


def check_vocabulary(stored: Mapping[str, Any], spec: InputSpec, source: str) -> None:
    """Refuse a tokenizer of the data that is not that of the checkpoint, ``source``, with ``vocabulary`` ``stored``.

    Raises:
        UserError: another size or another fingerprint.
    """
    for name, words in (("size", "tokens"), ("fingerprint", "as fingerprint")):
        if name in stored and stored[name] != spec.vocabulary[name]:
            raise UserError(
                f"The tokenizer is not that of the encoder at {source}: {spec.vocabulary[name]} {words} instead of "
                f"{stored[name]}. Set data.text.tokenizer to the tokenizer.json of that run."
            )


def _from_scratch(factory: EncoderFactory, spec: InputSpec) -> UMDEncoder:
    return factory(list(spec.image_size), spec.vocabulary["size"], spec.vocabulary.get("pad_id", 0))


def make_umd_encoder(
    spec: InputSpec, pretrained: str | None, factory: EncoderFactory, record: Mapping[str, Any] | None
) -> UMDEncoder:
    """Make the encoder for inputs of ``spec``: as a checkpoint remembers it, from a run, or from scratch.

    Of a run come its sizes and weights; dropout and pooling are those of this stage.

    Raises:
        CheckpointError: nothing usable at ``pretrained``.
        UserError: it is of another vocabulary, or texts are longer than it has positions for.
    """
    if record is not None:
        encoder = build_recorded(record)
    elif pretrained:
        known = TaskState.read(read_checkpoint(pretrained)).spec
        stored = {} if known is None else known.vocabulary
        check_vocabulary(stored, spec, pretrained)
        with torch.device("meta"):
            wanted = _from_scratch(factory, spec).config
        settings = {name: wanted[name] for name in _OF_THE_STAGE}
        encoder = load_encoder(pretrained, image_size=spec.image_size, settings=settings)
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        print_line(f"encoder from {pretrained}: {encoder.load_report}; {said}")
    else:
        encoder = _from_scratch(factory, spec)
    if not isinstance(encoder, UMDEncoder):
        raise CheckpointError(f"{pretrained} holds a {type(encoder).__name__}, no encoder of images and texts.")
    if spec.vocabulary["length"] > encoder.text.longest:
        raise UserError(
            f"data.text.length {spec.vocabulary['length']} is more than the {encoder.text.longest} positions of the "
            f"text encoder (model.encoder.max_positions)."
        )
    return encoder


def load_heads(network: nn.Module, source: str) -> None:
    """Load the heads of an earlier stage that both stages have; the decoder's positions are rebuilt.

    Raises:
        CheckpointError: a head is of another shape.
    """
    state = read_checkpoint(source)["state_dict"]
    wanted = network.state_dict()
    heads = {key.removeprefix("network."): value for key, value in state.items()}
    heads = {key: value for key, value in heads.items() if key.startswith(_HEADS) and key in wanted and key != _FIXED}
    for key, value in heads.items():
        if value.shape != wanted[key].shape:
            raise CheckpointError(
                f"{source} has {key} of {tuple(value.shape)}, this configuration {tuple(wanted[key].shape)}: use the "
                f"settings of model.decoder and model.features that it was trained with."
            )
    network.load_state_dict(heads, strict=False)
    parts = sorted({key.split(".")[0] for key in heads})
    print_line(f"heads from {source}: {', '.join(parts) or 'none'}")
