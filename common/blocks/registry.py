"""The encoders that a file may request, and the arguments they accept.

A checkpoint or an export names its encoder's class and arguments. A name is looked up among the classes that carry
:func:`registered`; a file never causes an import, and arguments whose kind differs from the class's declaration are
refused. To use an encoder of your own, decorate its class and import its module.
"""

import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from common.errors import CheckpointError

#: Modules of this project with encoders, imported when a file asks for one of them.
HOMES = (
    "common.blocks.vit",
    "common.blocks.modality_vit",
    "common.blocks.uniformer",
    "common.blocks.residual_unet",
    "experiments.umd.encoder",
    "experiments.baselines.controls",
)
#: Encoders that have moved since some files were written: the recorded name and the current one.
_MOVED = {
    "experiments.umd.encoder.UMDEncoder": "experiments.umd.encoder.UMDEncoder",
    "experiments.mrm_record.baselines.GrayHistogram": "experiments.baselines.controls.GreyHistogram",
    "experiments.mrm_genetics.baselines.ColourGrid": "experiments.baselines.controls.ColourGrid",
}
#: An upper bound on any size or count of an encoder.
_LARGEST = 2**24

_ENCODERS: dict[str, type[nn.Module]] = {}
Encoder = TypeVar("Encoder", bound=nn.Module)


def class_path(cls: type) -> str:
    """Return the name by which files refer to a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def registered(cls: type[Encoder]) -> type[Encoder]:
    """Allow files to request an encoder (class decorator)."""
    _ENCODERS[class_path(cls)] = cls
    return cls


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value from a file is of the declared kind: plain values, and what is made of them."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return isinstance(value, dict) and all(name in hints and fits(v, hints[name]) for name, v in value.items())
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(entry, parts[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) <= _LARGEST
    return kind in (bool, str, NoneType) and type(value) is kind


def find_encoder(path: str) -> type[nn.Module]:
    """Return the registered class of that name.

    Raises:
        CheckpointError: no such class is registered.
    """
    path = _MOVED.get(path, path)
    if path.rpartition(".")[0] in HOMES:
        importlib.import_module(path.rpartition(".")[0])
    if path not in _ENCODERS:
        raise CheckpointError(
            f"The file asks for the class {path[:100]!r}, which is not an encoder of this project: nothing was run. An "
            f"encoder of your own needs `common.blocks.registry.registered` on its class, and its module imported."
        )
    return _ENCODERS[path]


def declared_default(path: str, name: str) -> Any:
    """Return the default of an argument of a registered class; None where it has none."""
    argument = inspect.signature(find_encoder(path)).parameters.get(name)
    return None if argument is None or argument.default is argument.empty else argument.default


def check_arguments(path: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments if they are those that a registered class declares.

    Raises:
        CheckpointError: the class is not registered, or an argument is unknown, missing or of another kind.
    """
    cls = find_encoder(path)
    declared = inspect.signature(cls).parameters
    kinds = get_type_hints(cls.__init__)
    wrong = [f"{name!r:.60} is not one of its arguments" for name in arguments if name not in declared]
    wrong += [f"`{name}` is {value!r:.60}" for name, value in arguments.items()
              if name in declared and not fits(value, kinds.get(name))]  # fmt: skip
    wrong += [f"`{name}` is missing" for name, argument in declared.items()
              if argument.default is argument.empty and name not in arguments]  # fmt: skip
    if wrong:
        raise CheckpointError(f"The file describes no {cls.__name__} that can be built: {wrong[0]}. Export the encoder "
                              f"again, or start from the run it came from.")  # fmt: skip
    return dict(arguments)


def build_encoder(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build an encoder as a file describes it.

    Args:
        path: The class.
        arguments: Its arguments, of the kinds that it declares.

    Raises:
        CheckpointError: as :func:`check_arguments`, or the class refuses them.
    """
    cls = find_encoder(path)
    kinds: dict[str, Any] = get_type_hints(cls.__init__)
    checked = check_arguments(path, arguments)
    made = {name: kinds[name](**value) for name, value in checked.items() if dataclasses.is_dataclass(kinds[name])}
    try:
        return cls(**checked | made)
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise CheckpointError(f"The file describes no {cls.__name__} that can be built: {reason}") from error


def build_recorded(record: Mapping[str, Any]) -> nn.Module:
    """Build an encoder from the ``encoder_record`` of a checkpoint: ``class_path`` and ``init_args``.

    Raises:
        CheckpointError: as :func:`build_encoder`, or the record has another form.
    """
    path, arguments = record.get("class_path"), record.get("init_args")
    if not isinstance(path, str) or not isinstance(arguments, Mapping):
        raise CheckpointError("The checkpoint's `encoder_record` has no class_path or no init_args: it was not written "
                              "by this project, or changed since.")  # fmt: skip
    return build_encoder(path, arguments)
