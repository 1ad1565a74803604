"""The encoder of a downstream task: pre-trained, from scratch, or rebuilt from a checkpoint's record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from common.blocks.registry import build_recorded, class_path
from common.checkpoint import load_encoder, read_encoder
from common.errors import UserError
from common.runtime.reporting import print_line
from common.types import InputSpec
from common.weights.channels import NewChannels, deliver_channels

EncoderFactory = Callable[[int, Sequence[int]], nn.Module]


def meet_encoder(datamodule: Any, pretrained: str, new_channels: NewChannels) -> InputSpec:
    """Have a data module also deliver, as absent, the channels that only a pre-trained encoder knows.

    An encoder with one kernel shared by all channels needs none of them.

    Args:
        datamodule: The data.
        pretrained: Run folder, checkpoint or export.
        new_channels: Initial weights of channels that the encoder does not know.

    Returns:
        The resulting content of the batches.

    Raises:
        CheckpointError: nothing usable at ``pretrained``, or it does not know the channels.
    """
    known = read_encoder(pretrained)
    if len(known.channels) != known.init_args["in_channels"]:
        return datamodule.input_spec
    return deliver_channels(datamodule, known.channels, known.names, new_channels)[0]


def make_encoder(
    spec: InputSpec,
    pretrained: str | None,
    factory: EncoderFactory,
    record: Mapping[str, Any] | None = None,
    new_channels: NewChannels = "refuse",
) -> nn.Module:
    """Make the encoder for inputs of ``spec``.

    Args:
        spec: Channels and size of the input.
        pretrained: Run folder, checkpoint or export to start from; None or empty starts from scratch.
        factory: Makes an encoder from (channels, image size), for scratch.
        record: Architecture of an encoder whose weights a task's checkpoint will load; overrides the others.
        new_channels: Initial weights of channels that the pre-trained encoder does not know.

    Raises:
        CheckpointError: nothing usable at ``pretrained``, or it does not know the channels.
    """
    if record is not None:
        return build_recorded(record)
    if pretrained:
        encoder = load_encoder(pretrained, None, spec.image_size, spec.channels, new_channels=new_channels)
        print_line(f"encoder from {pretrained}: {encoder.load_report}")
        return encoder
    print_line("encoder from scratch (no CKPT given)")
    return factory(len(spec.channels), spec.image_size)


def mean_features(encoder: nn.Module, image: Tensor) -> Tensor:
    """Return the mean ``(B, E)`` over the normalised tokens of patches, float32; without the class token.

    Args:
        encoder: With ``forward_features``.
        image: ``(B, C, *space)``; a single channel is repeated.
    """
    channels = getattr(encoder, "config", {}).get("in_channels", image.shape[1])
    if image.shape[1] == 1 < channels:
        image = image.expand(-1, channels, *image.shape[2:])
    tokens = encoder.forward_features(image)  # type: ignore[operator]
    return tokens[:, getattr(encoder, "num_prefix_tokens", 0) :].float().mean(1)


def encoder_architecture(encoder: nn.Module) -> dict[str, Any]:
    """Return the ``record`` for :func:`make_encoder`.

    Raises:
        UserError: the encoder does not carry its ``config``.
    """
    config = getattr(encoder, "config", None)
    if config is None:
        raise UserError(
            f"{type(encoder).__name__} carries no `config` of its arguments, so no checkpoint could rebuild it."
        )
    return {"class_path": class_path(type(encoder)), "init_args": dict(config)}
