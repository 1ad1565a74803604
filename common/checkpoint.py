"""Checkpoints: finding them, reading them safely, and transferring an encoder to another network."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.blocks.patch_embed import grid_of
from common.blocks.pos_embed import resize_position_embedding
from common.blocks.registry import build_encoder, check_arguments, class_path, declared_default, fits
from common.errors import CheckpointError
from common.finite import check_finite
from common.modalities import canonical_channels
from common.runtime.experiments import experiment_module
from common.types import InputSpec
from common.weights.channels import ChannelReport, Channels, NewChannels, fit_kernel
from common.weights.files import LAST, PREVIOUS, check_export, read_json, read_tensors, read_torch
from common.weights.monai_keys import from_monai
from common.weights.timm_keys import from_timm


def resolve_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """Find the checkpoint file for a path.

    Args:
        path: A file, a run folder or its ``checkpoints`` folder.
        prefer: Which file of a folder: ``"best"`` to evaluate or transfer, ``"last"`` to resume.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    path = Path(path)
    if path.is_file():
        return path
    names = ["best.ckpt", LAST, PREVIOUS] if prefer == "best" else [LAST, PREVIOUS, "best.ckpt"]
    for folder in (path / "checkpoints", path):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    if path.is_dir():
        raise CheckpointError(f"The folder {path} holds neither checkpoints/best.ckpt nor checkpoints/last.ckpt.")
    raise CheckpointError(f"There is no checkpoint at {path}: give a file or a run folder.")


def run_tokenizer(source: Path) -> Path | None:
    """Return the tokenizer saved with a run's checkpoints; None if there is none."""
    folders = (source, source.parent, source.parent.parent)
    return next((path for folder in folders if (path := folder / "tokenizer.json").is_file()), None)


def read_checkpoint(path: str | Path, prefer: str = "best") -> dict[str, Any]:
    """Read a checkpoint on the CPU without unpickling anything but tensors and plain values.

    Raises:
        CheckpointError: the file is missing, damaged, or holds objects that would have to be executed.
    """
    return read_torch(resolve_checkpoint(path, prefer))


def stored_membership(path: str | Path) -> dict[str, Any] | None:
    """Return the members of the splits of a checkpoint's run; None if they are not stored, as in exports.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if (Path(path) / "config.json").is_file():
        return None
    checkpoint = read_checkpoint(path)
    return checkpoint.get("membership") if isinstance(checkpoint, dict) else None


def check_shapes(loaded: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare a state dict with the network's.

    Raises:
        CheckpointError: keys or shapes differ; the message names the first and their number.
    """
    problems = [f"{key} is {tuple(value.shape)} there and {tuple(wanted[key].shape)} here"
                for key, value in loaded.items() if key in wanted and value.shape != wanted[key].shape]  # fmt: skip
    problems += [f"{key} is missing there" for key in wanted if key not in loaded]
    problems += [f"{key} is unknown here" for key in loaded if key not in wanted]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"The checkpoint does not fit this network: {problems[0]}{more}. Use the configuration it was trained "
            f"with, or start from its encoder with a fine-tuning configuration."
        )


def encoder_record(module: nn.Module, spec: InputSpec) -> dict[str, Any]:
    """Describe the encoder inside a module so that it can be rebuilt from the checkpoint alone.

    The encoder is the first submodule called ``encoder`` that carries its ``config``; ``spec`` is what it was built
    for.
    """
    for name, child in module.named_modules():
        if name.rsplit(".", 1)[-1] in ("encoder", "vit") and hasattr(child, "config"):
            return {
                "class_path": class_path(type(child)),
                "init_args": dict(child.config),
                "prefix": f"{name}.",
                "channels": list(spec.channels),
                "names": list(spec.names),
                "preprocessing": dict(spec.preprocessing),
            }
    return {}


class StoredEncoder(NamedTuple):
    """An encoder read from a file: how to build it, its weights, its input, and further weights.

    ``channels`` are canonical names, ``names`` those of the archive it was trained on; empty: the same.
    """

    class_path: str
    init_args: dict[str, Any]
    state: dict[str, Tensor]
    channels: list[str]
    preprocessing: dict[str, Any]
    rest: dict[str, Tensor] = {}
    names: list[str] = []


def read_encoder(path: str | Path) -> StoredEncoder:
    """Read the encoder of a run, of a checkpoint, or of a folder written by ``medmim export``.

    Raises:
        CheckpointError: the file holds no encoder of ours.
    """
    stored = _read_export(Path(path)) if (Path(path) / "config.json").is_file() else _read_run(path)
    # Older files hold only the archive's names.
    return stored._replace(channels=list(canonical_channels(stored.channels)), names=stored.names or stored.channels)


def _read_run(path: str | Path) -> StoredEncoder:
    """Read the encoder of a run or of a checkpoint."""
    checkpoint = read_checkpoint(path)
    record = checkpoint.get("encoder")
    if not record:
        raise CheckpointError(f"{path} holds no encoder: it was not written by a pre-training of this project.")
    part(record, "prefix", str, path)
    weights: dict[str, Tensor] = part(checkpoint, "state_dict", Mapping, path)
    prefix = record["prefix"]
    state = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    rest = {key.removeprefix("network."): value for key, value in weights.items() if not key.startswith(prefix)}
    return stored_encoder(record, record, state, path, rest)


def part(record: Any, name: str, kind: Any, source: str | Path) -> Any:
    """Return an entry of a file's description of its encoder.

    Args:
        record: The description.
        name: The entry.
        kind: What it must be: a type, or a declaration that :func:`~common.blocks.registry.fits` knows.
        source: The file.

    Raises:
        CheckpointError: the entry is missing, or of another kind.
    """
    value = record.get(name) if isinstance(record, Mapping) else None
    if not (isinstance(value, Mapping) if kind is Mapping else fits(value, kind)):
        raise CheckpointError(f"{source} does not describe its encoder: `{name}` is {value!r:.60} in it. Export the "
                              f"encoder again, or start from the run it came from.")  # fmt: skip
    return value


def stored_encoder(
    record: Mapping[str, Any],
    about: Mapping[str, Any],
    state: dict[str, Tensor],
    source: str | Path,
    rest: Mapping[str, Tensor] | None = None,
) -> StoredEncoder:
    """Assemble an encoder from a file's description.

    Args:
        record: ``class_path`` and ``init_args``.
        about: ``channels``, ``preprocessing`` and, from younger files, the archive's ``names`` of the channels.
        state: The encoder's weights.
        source: The file.
        rest: Further weights.

    Raises:
        CheckpointError: the description is incomplete or names no encoder of this project, or weights are not finite.
    """
    path = part(record, "class_path", str, source)
    arguments = {name: value for name in ("in_channels", "image_size")
                 if (value := declared_default(path, name)) is not None}  # fmt: skip
    arguments |= check_arguments(path, part(record, "init_args", Mapping, source))
    channels, preprocessing = part(about, "channels", list[str], source), part(about, "preprocessing", Mapping, source)
    # One kernel that was trained on several channels in turn is shared by all of them.
    if channels and arguments["in_channels"] not in (1, len(channels)):
        raise CheckpointError(f"{source} names {len(channels)} channels of an encoder of {arguments['in_channels']}: "
                              f"export the encoder again, or start from the run it came from.")  # fmt: skip
    names = part(about, "names", list[str], source) if "names" in about else []
    check_finite(state, str(source))
    return StoredEncoder(path, arguments, state, channels, dict(preprocessing), dict(rest or {}), names)


def _read_export(folder: Path) -> StoredEncoder:
    """Read back what ``medmim export`` wrote in the format monai or timm, or in one its experiment can read."""
    config = read_json(folder / "config.json")
    reader = _reader_of(config)
    if "encoder" not in config or (config.get("format") not in ("monai", "timm") and reader is None):
        raise CheckpointError(f"{folder} is no export in the format monai or timm; start from the run it came from.")
    check_export(folder, config)
    if reader is not None:
        return reader(folder, config)
    record = config["encoder"]
    weights = folder / "model.safetensors"
    state = read_tensors(weights)
    try:
        if config["format"] == "monai":
            state = from_monai(state)
        else:
            state = from_timm(state, class_token=bool(part(record, "init_args", Mapping, folder).get("class_token")))
    except ValueError as error:
        raise CheckpointError(f"{weights} holds no weights for this encoder: {error}") from error
    return stored_encoder(record, config, state, folder)


def _reader_of(config: Mapping[str, Any]) -> Any:
    """Return the experiment's own reader of an export's format, if there is one."""
    module = experiment_module(str(config.get("experiment", "")), "export")
    return getattr(module, "READERS", {}).get(str(config.get("format")))


class LoadReport(NamedTuple):
    """What happened when weights were carried into a network.

    Attributes:
        loaded: keys taken as they were.
        adapted: keys changed on the way, with the reason.
        missing: keys of the network that kept their initial value.
        unexpected: keys of the file that found no place.
        channels: how the input's channels were matched; None where the encoder maps its own keys.
    """

    loaded: list[str]
    adapted: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    channels: ChannelReport | None = None

    def __str__(self) -> str:
        adapted = "; ".join(f"{key}: {reason}" for key, reason in self.adapted.items()) or "none"
        return (
            f"encoder weights: {len(self.loaded)} loaded, adapted: {adapted}, "
            f"missing: {', '.join(self.missing) or 'none'}, unexpected: {', '.join(self.unexpected) or 'none'}"
        )


def transfer_encoder(
    stored: StoredEncoder,
    encoder: nn.Module,
    channels: Sequence[str] | None = None,
    new_channels: NewChannels = "refuse",
) -> LoadReport:
    """Carry stored weights into ``encoder``, which may differ in channels and image size.

    Learned positions are resampled to the new grid; the first kernel, which an encoder's ``input_kernel`` names,
    follows the channels' canonical names (:func:`common.weights.channels.fit_kernel`). Encoders that define
    ``adapt_state(state, stored arguments)`` map their own keys and report the changes.

    Args:
        stored: The weights.
        encoder: The target; must have ``config``.
        channels: Names of the new input's channels; None takes the first ones to be the same.
        new_channels: Initial weights of channels that are not stored; ``"refuse"`` is for frozen encoders.

    Raises:
        CheckpointError: a channel is not stored and must be, or another key differs in shape.
    """
    wanted = encoder.state_dict()
    config: Mapping[str, Any] = encoder.config  # type: ignore[assignment]
    state, adapted = dict(stored.state), {}
    if callable(adapt := getattr(encoder, "adapt_state", None)):
        state, adapted = adapt(state, stored.init_args)
        return _load(encoder, state, adapted)
    key = getattr(encoder, "input_kernel", "patch_embed.proj.weight")
    if key not in state or key not in wanted:
        raise CheckpointError(f"The weights of the encoder lack {key}: they are incomplete, or of another encoder.")
    old = Channels(stored.init_args["in_channels"], stored.channels or None, stored.names)
    new = Channels(config["in_channels"], None if channels is None else canonical_channels(channels))
    kernel, report = fit_kernel(state[key], wanted[key], old, new, new_channels)
    if kernel.shape != state[key].shape or not torch.equal(kernel, state[key]):
        adapted[key] = report.line().removeprefix("channels: ")
    state[key] = kernel
    old_size, new_size = list(stored.init_args["image_size"]), list(config["image_size"])
    if old_size != new_size and "pos_embed" in state:
        patch = config["patch_size"]
        patch = [patch] * len(new_size) if isinstance(patch, int) else patch
        grids = grid_of(old_size, patch), grid_of(new_size, patch)
        # A crop of another size has voxels as large as before: fixed positions go on. A whole image has not.
        go_on = config.get("pos_embed") == "sincos" and len(new_size) == 3
        state["pos_embed"] = wanted["pos_embed"] if go_on else resize_position_embedding(state["pos_embed"], *grids)
        adapted["pos_embed"] = f"{'computed' if go_on else 'resampled'} from {old_size} to {new_size}"
    return _load(encoder, state, adapted)._replace(channels=report)


def _load(encoder: nn.Module, state: Mapping[str, Tensor], adapted: dict[str, str]) -> LoadReport:
    """Load the weights that fit ``encoder`` and report on the rest.

    Raises:
        CheckpointError: a key differs in shape.
    """
    wanted = encoder.state_dict()
    check_shapes({k: v for k, v in state.items() if k in wanted}, {k: wanted[k] for k in state if k in wanted})
    report = LoadReport(
        loaded=[k for k in state if k in wanted and k not in adapted],
        adapted=adapted,
        missing=[k for k in wanted if k not in state],
        unexpected=[k for k in state if k not in wanted],
    )
    encoder.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
    return report


def read_foreign(path: str | Path, class_token: bool = True) -> dict[str, Tensor]:
    """Read the weights of a ViT from a file of MAE, of timm, or of the published code of masked record modeling.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save`` that holds only tensors and plain values.
        class_token: Whether the encoder they are for has a class token.

    Raises:
        CheckpointError: the file is missing, damaged, or not a ViT.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {path}: download them, and give the file.")
    loaded = read_tensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    try:
        state = from_timm(loaded, class_token=class_token)
    except ValueError as error:
        raise CheckpointError(f"{path} holds no weights for this encoder: {error}") from error
    check_finite(state, str(path))
    return state


def init_encoder(encoder: nn.Module, path: str | Path) -> LoadReport:
    """Start an image encoder from the weights of MAE, of timm, or of the published code of masked record modeling.

    Args:
        encoder: The target; must have ``config``.
        path: A ``.safetensors`` file, or one of ``torch.save`` that holds only tensors and plain values.

    Raises:
        CheckpointError: the file is missing, damaged, not a ViT, or of another shape.
    """
    config: Mapping[str, Any] = encoder.config  # type: ignore[assignment]
    state = read_foreign(path, class_token=bool(config.get("class_token")))
    arguments = dict(config)
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1])
        patch = config["patch_size"]
        first, second = (patch, patch) if isinstance(patch, int) else patch
        if side**2 == state["pos_embed"].shape[1] != math.prod(grid_of(config["image_size"], (first, second))):
            arguments["image_size"] = [side * first, side * second]
    patch = config["patch_size"]
    values = patch**2 if isinstance(patch, int) else math.prod(patch)
    arguments["in_channels"] = max(state["patch_embed.proj.weight"].shape[1] // values, 1)
    return transfer_encoder(StoredEncoder("", arguments, state, [], {}), encoder, new_channels="mean")


def load_encoder(
    path: str | Path,
    in_channels: int | None = None,
    image_size: Sequence[int] | None = None,
    channels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    new_channels: NewChannels = "refuse",
) -> nn.Module:
    """Load a pre-trained encoder by itself.

    Args:
        path: A run folder, a checkpoint, or a folder written by ``medmim export``.
        in_channels: Channels of the new input; None keeps the pre-training's.
        image_size: Size of the new input; None keeps the pre-training's. Positions are resampled.
        channels: Names of the new input's channels, to match them by name instead of by position.
        settings: Arguments of the encoder that override those of pre-training, such as a dropout rate.
        new_channels: Initial weights of channels that the encoder was not trained on; see :func:`transfer_encoder`.

    Returns:
        A module with ``num_features`` and ``forward_features``; its ``load_report`` says what was adapted.

    Raises:
        CheckpointError: there is no encoder at ``path``, or it does not fit.
    """
    stored = read_encoder(path)
    arguments = {**stored.init_args, **(settings or {})}
    if channels is not None:
        in_channels = len(channels)
    if in_channels is not None:
        arguments["in_channels"] = in_channels
    if image_size is not None:
        arguments["image_size"] = list(image_size)
    encoder = build_encoder(stored.class_path, arguments)
    encoder.load_report = transfer_encoder(stored, encoder, channels, new_channels)  # type: ignore[assignment]
    return encoder
